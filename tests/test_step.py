from dataclasses import replace

import pytest
import torch

from fewstep.models.predictions import estimates
from fewstep.models.spec import Guidance
from fewstep.runtime.engine import CONTROLNET, DENOISER, DENOISER_CONTROL
from fewstep.runtime.engines.fake_engine import FakeEngine, Fault, fake_spec
from fewstep.runtime.errors import EngineFailed
from fewstep.runtime.sampling.plan import Hooks, Row
from fewstep.runtime.sampling.rng import NoiseStream
from fewstep.runtime.sampling.step import RowState, advance, run_batch

SPEC = fake_spec()
ROW = Row(index=1, t=499.0, s=259.0, a=0.9, b=-0.4, c=0.0, w=3.0, pair=False, control=0.0)
SHAPE = (4, 8, 8)


def state(seed, row=ROW, edge=None):
    words = torch.Generator().manual_seed(1000 + seed)
    noise = NoiseStream(seed)
    x, ctx, uncond = noise.draw(SHAPE), torch.randn(5, 8, generator=words), torch.randn(5, 8, generator=words)
    return RowState(row, x, {"ctx": ctx}, noise, {"ctx": uncond}, edge)


def raw(engine, role, states, **more):
    feeds = {"x": torch.stack([s.x for s in states]), "t": torch.tensor([s.row.t for s in states])}
    feeds["ctx"] = torch.stack([more.pop("ctx", s.cond["ctx"]) for s in states])
    if engine.capabilities.takes_w:
        feeds["w"] = torch.tensor([s.row.w for s in states])
    return engine.run(role, {**feeds, **more})


def test_a_step_is_one_call_and_one_affine_update():
    engine = FakeEngine(SPEC)
    rows = [ROW, replace(ROW, t=999.0, a=0.3, b=1.2, w=5.0)]
    states = [state(1, rows[0]), state(2, rows[1])]
    out = advance(engine, states, SPEC)
    assert [(call.role, call.batch, call.t) for call in engine.calls] == [(DENOISER, 2, (499.0, 999.0))]
    f = raw(FakeEngine(SPEC), DENOISER, states)[0]
    for k, row in enumerate(rows):
        assert torch.allclose(out[k], row.a * states[k].x + row.b * f[k], atol=1e-6)


def test_a_guided_row_is_two_rows_of_the_same_call():
    spec = fake_spec(guidance=Guidance(mode="cfg", default=3.0, range=(1.0, 9.0)))
    engine = FakeEngine(spec)
    states = [state(1), state(2, replace(ROW, pair=True, w=4.0))]
    out = advance(engine, states, spec)
    assert [call.batch for call in engine.calls] == [3]
    cond = raw(engine, DENOISER, states)[0]
    uncond = raw(engine, DENOISER, states[1:], ctx=states[1].uncond["ctx"])[0]
    f = uncond[0] + 4.0 * (cond[1] - uncond[0])
    assert torch.allclose(out[1], 0.9 * states[1].x - 0.4 * f, atol=1e-6)
    assert torch.allclose(out[0], 0.9 * states[0].x - 0.4 * cond[0], atol=1e-6)


def test_noise_comes_from_the_rows_own_stream_in_order():
    """One stochastic row beside a deterministic one: only the first draws, and draws what its seed says."""
    noisy, still = state(1, replace(ROW, c=0.5)), state(2)
    out = advance(FakeEngine(SPEC), [still, noisy], SPEC)
    expected = NoiseStream(1)
    expected.draw(SHAPE)
    f = raw(FakeEngine(SPEC), DENOISER, [noisy])[0][0]
    assert torch.allclose(out[1], 0.9 * noisy.x - 0.4 * f + 0.5 * expected.draw(SHAPE), atol=1e-6)
    untouched = NoiseStream(2)
    untouched.draw(SHAPE)
    assert torch.equal(still.noise.draw(SHAPE), untouched.draw(SHAPE))


def test_control_runs_on_its_rows_only_and_leaves_the_others_as_they_were():
    engine = FakeEngine(SPEC)
    edge = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    steered = state(1, replace(ROW, control=0.8), edge)
    out = advance(engine, [state(2), steered, state(3)], SPEC)
    assert [(call.role, call.batch) for call in engine.calls] == [(CONTROLNET, 1), (DENOISER_CONTROL, 3)]
    for k, seed in ((0, 2), (2, 3)):
        (alone,) = advance(FakeEngine(SPEC), [state(seed)], SPEC)
        assert torch.equal(out[k], alone)
    (plain,) = advance(FakeEngine(SPEC), [state(1)], SPEC)
    (alone,) = advance(FakeEngine(SPEC), [state(1, replace(ROW, control=0.8), edge)], SPEC)
    assert torch.allclose(out[1], alone, atol=1e-6)
    assert not torch.allclose(out[1], plain, atol=1e-3)


def test_the_controlnet_sees_both_halves_of_a_guided_row():
    edge = torch.ones(3, 64, 64)
    engine = FakeEngine(SPEC)
    advance(engine, [state(1), state(2, replace(ROW, pair=True, control=1.0), edge)], SPEC)
    assert [(call.role, call.batch) for call in engine.calls] == [(CONTROLNET, 2), (DENOISER_CONTROL, 3)]


def test_a_non_finite_row_fails_alone():
    engine = FakeEngine(SPEC, faults={(DENOISER, 0): Fault("nan", rows=(1,))})
    out = advance(engine, [state(k, replace(ROW, c=0.5)) for k in range(3)], SPEC)
    assert isinstance(out[1], EngineFailed) and "non-finite output at step 2" in str(out[1])
    for k in (0, 2):
        (alone,) = advance(FakeEngine(SPEC), [state(k, replace(ROW, c=0.5))], SPEC)
        assert torch.equal(out[k], alone)


def test_a_call_that_raises_may_be_repeated():
    engine = FakeEngine(SPEC, faults={(DENOISER, 0): Fault("fail")})
    row = state(1, replace(ROW, c=0.5))
    with pytest.raises(EngineFailed, match="told to fail"):
        advance(engine, [row], SPEC)
    (again,) = advance(engine, [row], SPEC)
    (clean,) = advance(FakeEngine(SPEC), [state(1, replace(ROW, c=0.5))], SPEC)
    assert torch.equal(again, clean)


@pytest.mark.parametrize(("max_batch", "sizes", "calls"), [(2, (), [2, 2, 1]), (4, (1, 4), [4, 1]), (4, (4,), [4, 4])])
def test_batches_are_split_and_padded_to_what_the_engine_has(max_batch, sizes, calls):
    engine = FakeEngine(SPEC, max_batch=max_batch, batch_sizes=sizes)
    out = advance(engine, [state(k) for k in range(5)], SPEC)
    assert [call.batch for call in engine.calls] == calls
    for k in range(5):
        assert torch.equal(out[k], advance(FakeEngine(SPEC), [state(k)], SPEC)[0])


def test_run_batch_gives_every_output_for_every_row():
    engine = FakeEngine(SPEC, max_batch=2)
    feeds = {"x": torch.randn(3, *SHAPE), "t": torch.ones(3), "ctx": torch.randn(3, 5, 8), "w": torch.ones(3)}
    feeds |= {"edge": torch.rand(3, 3, 64, 64), "scale": torch.tensor([0.0, 1.0, 2.0])}
    residuals = run_batch(engine, CONTROLNET, feeds)
    assert [tuple(r.shape) for r in residuals] == [(3, *SHAPE)] * 2
    assert residuals[0][0].abs().max() == 0 and residuals[1][2].abs().max() > 0


def test_clip_bounds_the_clean_estimate_and_keeps_the_step_consistent():
    spec = fake_spec()
    out = estimates(spec.prediction, spec.path, 499.0)
    to_x0 = replace(ROW, a=out.x0_x, b=out.x0_f)
    (free,) = advance(FakeEngine(), [state(1, to_x0)], fake_spec())
    (bound,) = advance(FakeEngine(), [state(1, replace(to_x0, hooks=Hooks(clip=0.5)))], spec)
    assert free.abs().max() > 0.6
    assert torch.allclose(bound, free.clamp(-0.5, 0.5), atol=1e-5)
    to_eps = replace(ROW, a=out.eps_x, b=out.eps_f, hooks=Hooks(clip=0.5))
    (eps,) = advance(FakeEngine(), [state(1, to_eps)], spec)
    path, x = spec.path, state(1).x
    assert torch.allclose(path.alpha(499.0) * bound + path.sigma(499.0) * eps, x, atol=1e-4), "x0 and eps still make x"


@pytest.mark.parametrize(("row", "missing"), [(replace(ROW, pair=True), "uncond"), (replace(ROW, control=1.0), "edge")])
def test_a_row_without_what_it_needs_is_our_mistake(row, missing):
    lacking = replace(state(1, row), uncond=None, edge=None)
    with pytest.raises(ValueError, match=missing):
        advance(FakeEngine(SPEC), [lacking], SPEC)
