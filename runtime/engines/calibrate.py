"""Warm an engine up and measure what its calls cost at each batch size, within a time budget."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch

from fewstep.models.roles import picture_steps

from ..engine import DECODER, DECODER_TINY, DENOISER, DENOISER_CONTROL, TEXT
from ..sampling.loop import admit, latent_shape, size_conditions
from ..sampling.plan import compile_plan
from ..sampling.request import GenerateRequest, resolve
from ..sampling.rng import NoiseStream
from ..sampling.served import Served
from ..sampling.step import RowState, advance, run_batch
from ..sampling.work import decode, embed, paint_rows
from ..schedule.costs import Costs
from ..schedule.jobs import Lane, mixed

REPEATS = 3
ROUNDS = 5


@torch.inference_mode()
def calibrate(model: Served, lane: Lane, costs: Costs, budget_s: float) -> None:
    """Fill `costs` for the model's roles: size 1 always, larger sizes while the role's share of the budget lasts.

    The empty prompt's embedding stays in the model's cache.

    Errors: `EngineFailed` where the engine breaks on its first calls.
    """
    calls = role_calls(model, mixes=True)
    sizes = lane.batch_sizes or tuple(2**k for k in range(lane.max_batch.bit_length()))
    for role, seconds in in_turns(calls, sizes[0], budget_s / 4, time.perf_counter):
        costs.record((model.name, role), sizes[0], seconds)
    for role in filter(picture_steps, calls):
        costs.saved[model.name, role] = saved_s(calls, role, budget_s / 4, time.perf_counter)
    for role, call in calls.items():
        share = 0.5 if role == DENOISER else 0.5 / (len(calls) - 1)
        first = sizes[0], costs.seconds((model.name, role), sizes[0])
        for size, seconds in measure(call, sizes[1:], first, budget_s * share, time.perf_counter):
            costs.record((model.name, role), size, seconds)


def role_calls(
    model: Served, size: tuple[int, int] | None = None, *, mixes: bool = False
) -> dict[str, Callable[[int], object]]:
    """Engine calls as serving makes them, by role: each takes the number of rows.

    size: (width, height) of the picture; the spec's first where it is left out. mixes: with control, also calls of
    which every other row has none, named by `runtime.schedule.jobs.mixed`. The empty prompt's embedding stays in
    the model's cache. To be called, as what it returns, under inference mode.

    Errors: `EngineFailed` where the engine breaks on the empty prompt.
    """
    engine, device = model.engine, model.engine.capabilities.device
    width, height = size or (None, None)
    request = resolve(GenerateRequest(prompt="-", width=width, height=height), model.spec)
    row = replace(compile_plan(request, model.spec).rows[-1], pair=False, control=0.0, c=0.0, d=0.0, keep=None)
    (empty,) = embed(engine, model.prompts, [""])
    model.prompts.embeddings.put("", empty)
    cond = {**empty, **{name: value.to(device) for name, value in size_conditions(request, model.spec).items()}}
    read = model.prompts.tokens("").feeds
    tokens = {name: torch.tensor([values], device=device) for name, values in read.items()}
    noise = NoiseStream(0)
    x = noise.draw(latent_shape(request, model.spec)).to(device)
    plain = RowState(row, x, cond, noise)
    calls: dict[str, Callable[[int], object]] = {
        DENOISER: lambda n: advance(engine, [plain] * n, model.spec),
        DECODER: lambda n: decode(engine, torch.stack([x] * n)),
        TEXT: lambda n: run_batch(engine, TEXT, {k: v.expand(n, -1).contiguous() for k, v in tokens.items()}),
    }
    if DECODER_TINY in engine.capabilities.roles:
        calls[DECODER_TINY] = lambda n: decode(engine, torch.stack([x] * n), DECODER_TINY)
    for role in engine.capabilities.roles:
        if (steps := picture_steps(role)) is not None:
            live = admit(model, GenerateRequest(prompt="-", steps=steps))
            calls[role] = lambda n, live=live: paint_rows(model, [(live, live.canvases[0])] * n)  # type: ignore[misc]
    if model.has_control:
        edge = torch.zeros(3, request.height or 0, request.width or 0, device=device)
        kind = 0 if model.spec.control_kinds else None
        steered = replace(plain, row=replace(row, control=1.0), edge=edge, kind=kind)
        calls[DENOISER_CONTROL] = lambda n: advance(engine, [steered] * n, model.spec)
        if mixes:
            calls[mixed(DENOISER_CONTROL)] = lambda n: advance(engine, ([steered, plain] * n)[:n], model.spec)
    return calls


def in_turns(
    calls: Mapping[str, Callable[[int], object]], size: int, budget_s: float, clock: Callable[[], float]
) -> list[tuple[str, float]]:
    """(role, seconds) of single calls, in rounds of all roles: one to warm them, then one or more within the budget."""
    found: list[tuple[str, float]] = []
    for done in _rounds(budget_s, clock):
        for role, call in calls.items():
            start = clock()
            call(size)
            if done:
                found.append((role, clock() - start))
    return found


def saved_s(
    calls: Mapping[str, Callable[[int], object]], whole: str, budget_s: float, clock: Callable[[], float]
) -> float:
    """Seconds by which one call of a `picture` role ends before the calls that it replaces: the median of pairs.

    Whole requests are compared, since a denoiser that follows itself finds its weights in the processor's cache, and
    the graph of several steps holds them once for each step.
    """
    saved = []
    for done in _rounds(budget_s, clock):
        start = clock()
        for role in (TEXT, *[DENOISER] * (picture_steps(whole) or 0), DECODER):
            calls[role](1)
        middle = clock()
        calls[whole](1)
        if done:
            saved.append(2 * middle - start - clock())
    return median(saved)


def _rounds(budget_s: float, clock: Callable[[], float]) -> Iterator[int]:
    """0 for the round that warms, then 1 to `ROUNDS`: one at least, the others while they fit."""
    begun = clock()
    for done in range(1 + ROUNDS):
        if done > 1 and (clock() - begun) * (done + 1) / done > budget_s:
            return
        yield done


def measure(
    call: Callable[[int], object],
    sizes: Sequence[int],
    known: tuple[int, float],
    budget_s: float,
    clock: Callable[[], float],
) -> list[tuple[int, float]]:
    """(size, seconds) of several calls per size, after one to warm it. A size is begun only if it would fit.

    sizes: rising, all above that of `known`, which is a (size, seconds) measured before.
    """
    found: list[tuple[int, float]] = []
    begun = clock()
    for size in sizes:
        last_size, last_s = found[-1] if found else known
        if clock() - begun + (1 + REPEATS) * last_s * size / last_size > budget_s:
            break
        call(size)
        for _ in range(REPEATS):
            start = clock()
            call(size)
            found.append((size, clock() - start))
    return found
