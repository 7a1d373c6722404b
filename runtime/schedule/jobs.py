"""What the scheduler is told of a request, and what it says back. Values only.

A request is preparations (texts and pictures to encode), then rows (one per step and picture), then a decode per
picture. Each of these names the served model that does it, so a request may visit several.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from ..engine import DECODER, DENOISER

TEXT, ENCODE, DENOISE, DECODE = "text", "encode", "denoise", "decode"
KINDS = (TEXT, ENCODE, DENOISE, DECODE)
"""Kinds of work, in the order in which a request needs them."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """What one model's engine takes in a call: any size up to `max_batch`, or padded to one of `batch_sizes`."""

    max_batch: int
    batch_sizes: tuple[int, ...] = ()


class Prepare(NamedTuple):
    """Work of a request as a whole, ahead of its rows: `size` texts or pictures through one role.

    kind: "text" or "encode".
    """

    kind: str
    model: str
    role: str
    size: int = 1


class RowCall(NamedTuple):
    """One step of one picture: the model and the denoiser's role that it needs, and its network evaluations."""

    model: str
    role: str = DENOISER
    evaluations: int = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the scheduler knows of a request. `rows` holds one `RowCall` per step, the same for each of its pictures.

    finish: the role of `model` that ends each picture, None where nothing is decoded; where that role does all the
    work, there are neither preparations nor rows. watch: a role of `model` that is run after each row (a preview), ""
    for none. deadline_s: absolute, on the clock of `now_s`. then_s: not None where more may follow once this work is
    done (`Scheduler.extend`), as seconds of it to be expected.
    """

    id: str
    model: str
    rows: tuple[RowCall, ...] = ()
    before: tuple[Prepare, ...] = ()
    finish: str | None = DECODER
    pictures: int = 1
    watch: str = ""
    priority: int = 0
    deadline_s: float | None = None
    then_s: float | None = None

    models: frozenset[str] = field(init=False, repr=False, compare=False)
    """Every model that it visits."""

    def __post_init__(self) -> None:
        names = {self.model}
        for row in self.rows:
            names.add(row.model)
        for part in self.before:
            names.add(part.model)
        object.__setattr__(self, "models", frozenset(names))


@dataclass(frozen=True)
class Accepted:
    """`finish_s`: when the request is predicted to end."""

    finish_s: float


@dataclass(frozen=True)
class Rejected:
    """reason: "queue" (too many requests), "deadline" (it or one admitted before would be late), "hopeless" (late even
    alone).

    predicted_s: how long the request would take from now.
    """

    reason: str
    retry_after_s: float
    predicted_s: float


class Item(NamedTuple):
    """A share of a call: step `step` of a request's picture `picture`. Of a preparation, `step` is its place in
    `Job.before`."""

    id: str
    picture: int = 0
    step: int = 0


@dataclass(frozen=True)
class Work:
    """One engine call. `size` is its batch in texts, evaluations or pictures.

    priced: the name of its cost in the table: the role, or `mixed(role)` where rows that need less are in the call.
    """

    kind: str
    model: str
    role: str
    items: tuple[Item, ...]
    size: int
    priced: str


@dataclass(frozen=True)
class Stepped:
    """A picture has done `step` steps."""

    id: str
    picture: int
    step: int


@dataclass(frozen=True)
class Paused:
    """All work of a request whose job has `then_s` is done; `extend` or `conclude` follows."""

    id: str


@dataclass(frozen=True)
class Ended:
    """The request's one end. reason: "finished", "failed" (with `error`), "cancelled", "expired" or "closed"."""

    id: str
    reason: str
    error: object = None


def mixed(role: str) -> str:
    """The name, in a cost table, of calls of a steered role that hold plain rows too, with zeros for what steers."""
    return f"{role}, mixed"
