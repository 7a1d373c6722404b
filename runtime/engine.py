"""The seam between sampling and whatever runs the networks.

An engine runs *roles*. All tensors are torch tensors on the engine's device, every input and output with leading batch:

| role | feeds | gives |
| --- | --- | --- |
| text | ids [B, L] int64 | (ctx [B, L, D],) |
| denoiser | x [B, C, h, w], t [B], ctx; w [B] if the model takes it | (F,) |
| denoiser+control | the same and residual_0 .. residual_K | (F,) |
| controlnet | x, t, ctx, edge [B, 3, H, W] in [0, 1], scale [B] | residuals, K+1 of them |
| decoder | latent [B, C, h, w] | (picture [B, 3, H, W] in [-1, 1],) |
| encoder | picture | (latent,) |

An engine is called from one thread at a time. It may return outputs that it reuses at the next call of the same role.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

TEXT, DENOISER, DENOISER_CONTROL = "text", "denoiser", "denoiser+control"
CONTROLNET, DECODER, ENCODER = "controlnet", "decoder", "encoder"
ROLES = (TEXT, DENOISER, DENOISER_CONTROL, CONTROLNET, DECODER, ENCODER)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an engine runs here. Empty `batch_sizes` means any size up to `max_batch`; else calls are padded to one."""

    roles: frozenset[str]
    max_batch: int
    batch_sizes: tuple[int, ...] = ()
    device: str = "cpu"
    takes_w: bool = False


class Engine(Protocol):
    """Run networks; nothing about requests, schedules or pictures."""

    @property
    def name(self) -> str: ...
    @property
    def capabilities(self) -> Capabilities: ...
    def run(self, role: str, feeds: "Mapping[str, Tensor]") -> "tuple[Tensor, ...]":
        """Run one role for one batch.

        Errors: `EngineFailed` where the call breaks; the engine stays usable for later calls.
        """
        ...

    def close(self) -> None: ...
