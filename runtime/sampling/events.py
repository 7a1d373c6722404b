"""What a request gives back while it runs and when it ends. Values only; no torch here.

Every accepted request ends in exactly one final event, `Finished` or `Failed`; nothing follows it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import FewstepError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Picture = npt.NDArray[np.uint8]
    """[H, W, 3]."""
else:
    Picture = Any


@dataclass(frozen=True)
class Timings:
    """Where one request's time went, in seconds.

    queue_s: accepted until its first engine call. text_s, denoise_s, decode_s: inside engine calls it took part in
    (a call shared with other requests counts in full). total_s: from `submit` to the final event; what the others leave
    of it is waiting between calls and our own work. predicted_s: what `total_s` was predicted to be when the request
    was accepted; None where nothing else was there to wait for.
    """

    queue_s: float
    text_s: float
    denoise_s: float
    decode_s: float
    total_s: float
    predicted_s: float | None = None


@dataclass(frozen=True)
class Result:
    """Pictures of one request; picture i was made from `seeds[i]`. `nfe` counts network evaluations per picture.

    scores, refined: what the runtime's scorer said of each picture as first drawn, and whether it was drawn again by a
    helper; empty where nobody asked for that.
    """

    pictures: tuple[Picture, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    nfe: int
    model: str
    notes: tuple[str, ...]
    timings: Timings
    scores: tuple[float, ...] = ()
    refined: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Progress:
    """Picture number `picture` (from 0) has done `step` of `steps` steps; one that is drawn again goes on counting.

    preview: what its clean estimate shows, where the request asks for previews; it may be smaller than the picture.
    """

    ticket_id: str
    picture: int
    step: int
    steps: int
    preview: Picture | None = None


@dataclass(frozen=True)
class Finished:
    ticket_id: str
    result: Result


@dataclass(frozen=True)
class Failed:
    ticket_id: str
    error: FewstepError


Event = Progress | Finished | Failed
