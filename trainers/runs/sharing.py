"""What must hold before a batch is shared out over processes and passes."""

from collections.abc import Iterable

from ..errors import RecipeError
from ..loop.ranks import Ranks
from ..recipes.recipe import Recipe


def check_shares(recipe: Recipe, ranks: Ranks) -> None:
    """Errors: `RecipeError` for a batch that does not divide, or a method whose samples look at each other."""
    run = recipe.run
    if run.accumulate < 1:
        raise RecipeError(f"accumulate is {run.accumulate}; a batch is seen in 1 pass or more")
    parts = ranks.count * run.accumulate
    if run.batch % parts:
        more = -(-run.batch // parts) * parts
        raise RecipeError(
            f"batch is {run.batch} in all, and {ranks.count} processes x accumulate {run.accumulate} share it evenly "
            f"only where {parts} divides it; set batch to {more}"
        )
    for stage in recipe.stages:
        if parts > 1 and (found := whole_batch(stage.objective)) is not None:
            raise RecipeError(
                f"{recipe.name} compares samples of one batch with each other ({found}), so {parts} parts of a batch "
                "are not the batch; train it in one process with accumulate=1"
            )
        if ranks.sharded and stage.search is not None:
            raise RecipeError(
                f"{recipe.name} searches among whole checkpoints, which sharded processes do not have; set parallel=ddp"
            )


def whole_batch(part: object) -> str | None:
    """The class of the first part of an objective that needs the batch in one piece (`whole_batch`), or None."""
    if getattr(part, "whole_batch", False):
        return type(part).__name__
    if isinstance(part, (list, tuple)):
        inner: Iterable[object] = part
    elif isinstance(part, dict):
        inner = part.values()
    else:
        inner = (getattr(part, name) for name in getattr(type(part), "__dataclass_fields__", ()))
    return next((found for each in inner if (found := whole_batch(each)) is not None), None)
