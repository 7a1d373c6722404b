"""An engine that keeps what another one is fed, row by row: to calibrate on, or to time each network on."""

from collections import defaultdict, deque
from collections.abc import Mapping

import torch
from torch import Tensor

from ..engine import DECODER, Capabilities, Engine


class RecordingEngine:
    """Passes calls on to an engine and keeps copies of their feeds, split into batches of one, in `rows[role]`.

    keep: how many rows of a role, the last ones; None for all. pictures: what the decoder gave, each of a batch of one.
    """

    def __init__(self, engine: Engine, *, keep: int | None = None) -> None:
        self._engine = engine
        self.rows: dict[str, deque[dict[str, Tensor]]] = defaultdict(lambda: deque(maxlen=keep))
        self.pictures: deque[Tensor] = deque(maxlen=keep)

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def capabilities(self) -> Capabilities:
        return self._engine.capabilities

    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        batch = next(iter(feeds.values())).shape[0]
        self.rows[role].extend({name: value[k : k + 1].clone() for name, value in feeds.items()} for k in range(batch))
        outputs = self._engine.run(role, feeds)
        if role == DECODER:
            self.pictures.extend(torch.split(outputs[0].clone(), 1))
        return outputs

    def close(self) -> None:
        self._engine.close()
