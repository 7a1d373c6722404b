"""The oracle of a search among checkpoints: combinations are what they say, and a bowl's affine minimum is found."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..loop.checkpoint_search import Search, average_coefficients, combined, search
from ..recipes.recipe import Recipe
from .world import Check, below, between, holds

COUNT, SIZE = 5, 7


def checks(recipe: Recipe) -> Iterator[Check]:
    """None where no stage of the recipe searches."""
    for stage in recipe.stages:
        if stage.search is not None:
            yield from _combined()
            yield from _averages()
            yield from _bowl(stage.search)
            yield from _saved(stage.search)


def _points() -> Tensor:
    return torch.randn(COUNT, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _combined() -> Iterator[Check]:
    """One coefficient of 1 returns that checkpoint; others the sum, and what is no weight is the last one's."""
    saved = [{"w": row, "n": torch.tensor(k)} for k, row in enumerate(_points())]
    for k in range(COUNT):
        out = combined(saved, torch.eye(COUNT, dtype=torch.float64)[k])
        yield below(f"combination: all of checkpoint {k}", out["w"] - saved[k]["w"], 1e-12)
    alpha = torch.tensor([-1.0, 0.5, 2.0, -0.25, -0.25], dtype=torch.float64)
    out = combined(saved, alpha)
    yield below("combination: the sum", out["w"] - alpha @ _points(), 1e-12)
    yield holds("combination: counters are the last one's", int(out["n"]) == COUNT - 1)


def _averages() -> Iterator[Check]:
    """A running average is one combination."""
    points = _points()
    for decay in (0.0, 0.3, 0.9):
        average = points[0]
        for row in points[1:]:
            average = decay * average + (1.0 - decay) * row
        alpha = average_coefficients(COUNT, decay)
        yield below(f"averages: of decay {decay}", alpha @ points - average, 1e-12)
        yield below(f"averages: coefficients of decay {decay} sum to 1", alpha.sum() - 1.0, 1e-12)


def _bowl(plan: Search) -> Iterator[Check]:
    """A bowl whose minimum among affine combinations has a negative coefficient, and is known in closed form."""
    points = _points()
    truth = torch.tensor([0.6, -0.5, 0.2, 0.9, -0.2], dtype=torch.float64)
    aim = truth @ points
    tried: list[Tensor] = []

    def score(alpha: Tensor) -> float:
        tried.append(alpha)
        return float((alpha @ points - aim).square().sum())

    long = Search(saved=plan.saved, population=plan.population, rounds=1200, spread=plan.spread)
    found = search(score, COUNT, long, 0)
    yield holds("search: every combination sums to 1", all(abs(float(a.sum()) - 1.0) < 1e-9 for a in tried))
    yield below(
        "search: the last checkpoint is among the first", found.plain - score(torch.eye(COUNT).double()[-1]), 1e-12
    )
    yield below("search: the score is that of what it gives", found.score - score(found.alpha), 1e-12)
    yield between(
        "search: the bowl's depth left over that of the last checkpoint", found.score / found.plain, 0.0, 0.02
    )
    yield holds("search: coefficients below 0 where they are best", bool((found.alpha[truth < -0.3] < 0).all()))
    again = search(score, COUNT, long, 0)
    yield holds("search: repeats", torch.equal(again.alpha, found.alpha))
    none = search(score, COUNT, Search(saved=plan.saved, population=plan.population, rounds=0), 0)
    yield holds("search: never worse than the averages", found.score <= none.score <= found.plain)
    broken = search(lambda alpha: float("nan") if alpha.min() < 0 else score(alpha), COUNT, plan, 0)
    yield holds("search: a score that is no number is passed over", bool((broken.alpha >= 0).all()))


def _saved(plan: Search) -> Iterator[Check]:
    """Checkpoints are due evenly over the last part of the stage."""
    places = [plan.place(k / 1000) for k in range(1000)]
    early = round(1000 * (1.0 - plan.window))
    yield holds("saved: none before the window", all(p is None for p in places[: early - 1]))
    counts = [sum(p == k for p in places) for k in range(plan.saved)]
    even = 1000 * plan.window / plan.saved
    yield holds("saved: evenly within it", all(abs(c - even) <= 2.0 for c in counts))
