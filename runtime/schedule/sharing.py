"""Which of the items that wait share the next call, by what calls were measured to cost. Pure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..engine import DENOISER
from .costs import CONSIDERED, Batches
from .jobs import DENOISE, Item, mixed
from .pricing import Pricing

Key = tuple[str, str, str]
"""(model, kind of work, role): what a queue is for."""


class Entry(NamedTuple):
    """An item that waits. Entries sort by the request's due time, then arrival; within it decodes go first."""

    due_s: float
    arrival: int
    rank: int
    number: int
    item: Item
    size: int
    alone_s: float


Queues = Mapping[Key, list[Entry]]
"""Never empty ones; each sorted."""


def share(queues: Queues, wanted: Key, pricing: Pricing) -> tuple[Key, list[Entry], bool]:
    """(queue, entries of the next call, whether rows that need no steering are among those that do).

    Rows that no picture steers can share a call with those of one steered role, with zeros for what steers them.
    They do where serving all together ends earlier in the mean than serving each kind in calls of its own.
    """
    model, kind, role = wanted
    own = queues[wanted][:CONSIDERED]
    other = _partner(queues, wanted, pricing) if kind == DENOISE and len(queues) > 1 else None
    if other is None and len(own) == 1:
        return wanted, own, False
    alone = _batches(pricing, model, role, own)
    if other is None:
        return wanted, own[: alone.size], False
    theirs = queues[other][: CONSIDERED - len(own)]
    steered = other if role == DENOISER else wanted
    apart = _batches(pricing, model, other[2], theirs)
    both = sorted(own + theirs)
    together = _batches(pricing, model, mixed(steered[2]), both)
    found = both[: together.size]
    mine = len(set(found) & set(own))
    apart_s = alone.total_s + len(theirs) * alone.span_s + apart.total_s
    if mine == len(found) or together.total_s >= apart_s * (1 - 1e-9):
        return wanted, own[: alone.size], False
    return steered, found, True


def _partner(queues: Queues, wanted: Key, pricing: Pricing) -> Key | None:
    """The queue whose rows may share a call with those of `wanted`, if what that costs was measured."""
    model, _, role = wanted
    if role != DENOISER:
        other = (model, DENOISE, DENOISER)
        return other if other in queues and pricing.known(model, mixed(role)) else None
    steered = [
        (queue[0], key)
        for key, queue in queues.items()
        if key[:2] == wanted[:2] and key != wanted and pricing.known(model, mixed(key[2]))
    ]
    return min(steered)[1] if steered else None


def _batches(pricing: Pricing, model: str, role: str, entries: Sequence[Entry]) -> Batches:
    return pricing.batches(model, role, [entry.size for entry in entries])
