"""Optimisation profiles of a TensorRT engine: which shapes it takes, and which profile takes these."""

from typing import Any

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""(input, shape) for every input, in the order of their names."""


def served_batches(batches: Any, *, tuned_only: bool) -> tuple[int, ...]:
    """The batch sizes that profiles (least, usual, most) take: the usual ones, or all; () where none is left out."""
    if tuned_only:
        return tuple(sorted({usual for _, usual, _ in batches}))
    taken = sorted({size for least, _, most in batches for size in range(least, most + 1)})
    return () if taken == list(range(1, len(taken) + 1)) else tuple(taken)


def pick_profile(engine: Any, shapes: Shapes) -> int | None:
    """The first optimisation profile that all shapes lie within, or None."""
    for profile in range(engine.num_optimization_profiles):
        ranges = {name: engine.get_tensor_profile_shape(name, profile) for name, _ in shapes}
        if all(_within(shape, ranges[name][0], ranges[name][2]) for name, shape in shapes):
            return profile
    return None


def _within(shape: tuple[int, ...], least: Any, most: Any) -> bool:
    low, high = tuple(least), tuple(most)
    return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))


def describe_profiles(engine: Any, shapes: Shapes) -> str:
    """The ranges of every profile, for the first input."""
    name = shapes[0][0]
    ranges = (engine.get_tensor_profile_shape(name, k) for k in range(engine.num_optimization_profiles))
    return f"{name} may be " + " or ".join(f"{tuple(least)} to {tuple(most)}" for least, _, most in ranges)


def describe(shapes: Shapes) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes)
