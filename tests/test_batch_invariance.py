"""A row in any mix equals its solo run: within 1e-5 relative in float32 per step, and picture for picture."""

import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.models.spec import Boundary
from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle, fake_spec
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.plan import compile_plan
from fewstep.runtime.sampling.request import Control, GenerateRequest, resolve
from fewstep.runtime.sampling.rng import NoiseStream
from fewstep.runtime.sampling.step import RowState, advance
from fewstep.runtime.service.config import RuntimeConfig
from fewstep.runtime.service.local import Runtime

BOUND = 1e-5


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return tiny_teacher, TorchEngine(tiny_teacher)


@pytest.fixture(scope="module")
def lcm(tiny_lcm):
    return tiny_lcm, TorchEngine(tiny_lcm)


class Reusing:
    """An engine that spoils its earlier outputs of a role at the next call, as the protocol allows."""

    def __init__(self, inner):
        self._inner, self._given = inner, {}
        self.name, self.capabilities, self.close = inner.name, inner.capabilities, inner.close

    def run(self, role, feeds):
        feeds = {name: value.clone() for name, value in feeds.items()}
        for old in self._given.get(role, ()):
            old.fill_(float("nan"))
        with torch.inference_mode():
            self._given[role] = tuple(out.clone() for out in self._inner.run(role, feeds))
        return self._given[role]


def variants(spec):
    """The model's own sampler and others that its network could be run with: their rows may share a call."""
    grids = {2: (999.0, 499.0), 4: (999.0, 759.0, 499.0, 259.0)}
    common = {"grids": grids, "spacing": None}
    return [
        spec,
        replace(spec, **common, sampler="lcm", stochastic=True, boundary=Boundary()),
        replace(spec, **common, sampler="tcd", gamma=0.3, stochastic=True, boundary=None),
        replace(spec, **common, sampler="ddim", stochastic=False, boundary=None),
    ]


def random_state(rng, spec, shape, ctx_shape, size, control):
    spec = rng.choice(variants(spec))
    low, high = spec.guidance.range
    request = GenerateRequest(prompt="-", steps=rng.choice([2, 4]), guidance=rng.choice([low, rng.uniform(low, high)]))
    if control and rng.random() < 0.4:
        edge = np.zeros((size, size, 3), np.uint8)
        request = replace(request, control=Control(edge=edge, scale=rng.uniform(0.1, 2.0)))
    row = rng.choice(compile_plan(resolve(request, spec), spec).rows)
    draw = torch.Generator().manual_seed(rng.randrange(2**32))
    ctx, uncond = torch.randn(ctx_shape, generator=draw), torch.randn(ctx_shape, generator=draw)
    edge_tensor = torch.rand(3, size, size, generator=draw) if row.control else None
    x = torch.randn(shape, generator=draw)
    return RowState(
        row, x, {"ctx": ctx}, NoiseStream(rng.randrange(2**32)), {"ctx": uncond} if row.pair else None, edge_tensor
    )


def same_noise(state):
    """The state again, its stream at the same place."""
    generator = torch.Generator().manual_seed(0)
    generator.set_state(state.noise._generator.get_state())
    copy = NoiseStream(0)
    copy._generator = generator
    return replace(state, noise=copy)


def assert_rows_equal_solo(engine, states, spec):
    alone = [advance(engine, [same_noise(state)], spec)[0] for state in states]
    together = advance(engine, states, spec)
    for k, (mixed, solo) in enumerate(zip(together, alone, strict=True)):
        error = ((mixed - solo).abs().max() / solo.abs().max()).item()
        assert error <= BOUND, f"row {k} of {len(states)} differs by {error:.1e}: {states[k].row}"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("which", ["teacher", "lcm"])
def test_networks_in_mixed_batches(request, which, seed):
    bundle, engine = request.getfixturevalue(which)
    rng = random.Random(seed)
    states = [random_state(rng, bundle.spec, (4, 16, 16), (24, 32), 32, True) for _ in range(rng.randint(2, 12))]
    assert_rows_equal_solo(engine, states, bundle.spec)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 12), max_batch=st.integers(1, 8), padded=st.booleans())
def test_the_step_itself_in_mixed_batches(seed, rows, max_batch, padded):
    """The same with an engine that splits and pads every way."""
    spec = fake_spec()
    sizes = (max_batch,) if padded else ()
    engine = Reusing(FakeEngine(spec, max_batch=max_batch, batch_sizes=sizes))
    rng = random.Random(seed)
    states = [random_state(rng, spec, (4, 8, 8), (5, 8), 64, True) for _ in range(rows)]
    assert_rows_equal_solo(engine, states, spec)


def mixed_requests(bundle):
    side = bundle.spec.sizes[0][0]
    edge = np.zeros((side, side, 3), np.uint8)
    edge[side // 4 : side // 2] = 255
    control = Control(edge=edge, scale=0.8, end=0.5)
    teacher = bundle.spec.guidance.mode == "cfg"
    return [
        GenerateRequest(prompt="a cat", steps=4, seed=1),
        GenerateRequest(prompt="a dog", steps=1, seed=2, guidance=2.0),
        GenerateRequest(prompt="a cat", steps=2, seed=3, n=3),
        GenerateRequest(prompt="two", steps=4, seed=4, control=control),
        GenerateRequest(prompt="six", steps=2, seed=5, negative_prompt="red" if teacher else None),
        GenerateRequest(prompt="a dog", steps=1, seed=6, guidance=1.0),
        GenerateRequest(prompt="ten", steps=8, seed=7, control=control),
    ]


def slow_start(engine):
    """Hold the engine's first call until `go` is set, so that every request is there before any runs."""
    go = threading.Event()

    class Held:
        name, capabilities, close = engine.name, engine.capabilities, engine.close

        def run(self, role, feeds):
            go.wait(30)
            return engine.run(role, feeds)

    return Held(), go


def served_together(bundle, engine, requests, costs):
    """Pictures of requests that were all in the runtime at once, and how large the denoiser calls were."""
    held, go = slow_start(engine)
    with Runtime([bundle], engines={bundle.name: held}, config=RuntimeConfig()) as runtime:
        for role, table in costs.items():
            for size, seconds in table.items():
                runtime._serving.costs.record((bundle.name, role), size, seconds)
        runtime._serving.costs.record = lambda *_: None  # the table stays as it is, whatever this machine measures
        tickets = [runtime.submit(r) for r in requests]
        go.set()
        results = [ticket.result(60) for ticket in tickets]
        batches = runtime.metrics().batch_size["denoise"]
    return results, batches


FREE = {role: {1: 0.01, 8: 0.0101} for role in ("text", "denoiser", "denoiser+control", "decoder")}


@pytest.mark.parametrize("which", ["teacher", "lcm"])
def test_requests_served_together_equal_the_dull_loop(request, which):
    bundle, engine = request.getfixturevalue(which)
    requests = mixed_requests(bundle)
    together, batches = served_together(bundle, Reusing(engine), requests, FREE)
    assert sum(batches.counts[2:]) >= 2, "calls of more than two evaluations: the test would show nothing without"
    for asked, result in zip(requests, together, strict=True):
        alone = run_request(engine, bundle, asked)
        assert result.seeds == alone.seeds and result.nfe == alone.nfe
        for mixed, solo in zip(result.pictures, alone.pictures, strict=True):
            assert np.abs(mixed.astype(int) - solo).max() <= 1


def test_a_fake_served_together_equals_the_dull_loop_to_the_bit():
    bundle = fake_bundle()
    requests = mixed_requests(bundle)
    together, batches = served_together(bundle, Reusing(FakeEngine()), requests, FREE)
    assert batches.count < sum(r.steps * r.n for r in requests)
    for asked, result in zip(requests, together, strict=True):
        alone = run_request(FakeEngine(), bundle, asked)
        assert all(np.array_equal(a, b) for a, b in zip(result.pictures, alone.pictures, strict=True))
