"""What may follow in a request: pictures that a scorer finds poor are drawn again by a helper.

Adaptive collaboration (Starodubcev et al. 2024): the student draws first; what scores below the threshold goes to the
helper as image-to-image. The operator gives the scorer, a function of prompt and picture.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import EngineFailed
from ..sampling.events import Picture
from ..sampling.inflight import Live
from ..sampling.loop import admit
from ..sampling.request import Edit, GenerateRequest
from ..sampling.served import Served
from ..schedule.jobs import Job
from .serving import Visit

Scorer = Callable[[str, Picture], float]
"""(prompt, picture [H, W, 3] uint8) -> how good it is; higher is better."""


def redrawing(scorer: Scorer, models: Mapping[str, Served], first: Job) -> Callable[[Visit], Job | None]:
    """What follows a request in mode "refine": its pictures are scored, and those below the threshold drawn again.

    first: the job that went before, for its deadline and priority.
    """

    def then(visit: Visit) -> Job | None:
        live, helper = visit.live, visit.live.request.helper
        assert helper is not None and helper.threshold is not None
        pictures = [canvas.picture for canvas in live.canvases]
        visit.scores = tuple([score(scorer, live.request.prompt, picture) for picture in pictures])
        poor = [k for k, found in enumerate(visit.scores) if found < helper.threshold]
        visit.again = [(k, again(live, pictures[k], live.canvases[k].seed, models)) for k in poor]
        visit.owners = [part for _, part in visit.again for _ in part.before]
        return job_again(first, [part for _, part in visit.again]) if poor else None

    return then


def score(scorer: Scorer, prompt: str, picture: Any) -> float:
    """Errors: `EngineFailed` where the scorer breaks or gives no number."""
    try:
        found = float(scorer(prompt, picture))
    except Exception as error:
        raise EngineFailed(f"the scorer broke: {error!r}") from error
    if math.isnan(found):
        raise EngineFailed("the scorer gave NaN")
    return found


def again(live: Live, picture: Any, seed: int, models: Mapping[str, Served]) -> Live:
    """One picture of a request, given to its helper; its time counts as the request's."""
    request, helper = live.request, live.request.helper
    assert helper is not None and helper.strength is not None
    model = models[helper.model]
    found = admit(
        model,
        GenerateRequest(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt if model.spec.guidance.mode == "cfg" else None,
            steps=helper.steps,
            seed=seed,
            guidance=helper.guidance,
            width=request.width,
            height=request.height,
            edit=Edit(image=picture, strength=helper.strength),
        ),
        None,
        live.begun_s,
        models,
    )
    found.spent_s, found.started_s = live.spent_s, live.started_s
    return found


def job_again(first: Job, parts: list[Live]) -> Job:
    """The work of pictures that are drawn again, after that of their request."""
    one = parts[0]
    return replace(
        first,
        model=one.model.name,
        rows=one.calls,
        before=tuple([work for part in parts for work in part.before]),
        finish=one.decoder,
        pictures=len(parts),
        watch="",
        then_s=None,
    )


def most_work(live: Live, models: Mapping[str, Served], first: Job) -> Job:
    """The work if every picture were drawn again, to be priced ahead.

    Errors: `InvalidRequest` where the helper cannot do that.
    """
    request = live.request
    blank = np.zeros((request.height or 0, request.width or 0, 3), np.uint8)
    return job_again(first, [again(live, blank, request.seed, models)] * request.n)
