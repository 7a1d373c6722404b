"""The runtime's own plans and steps on perfect networks: known laws, known points, in mixed batches.

`trainers.oracle.samplers` follows the coefficients alone; here everything runs, from the request to the last latent.
"""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from fewstep.models import analytic
from fewstep.models.analytic import gaussian, mixture
from fewstep.models.denoiser import expand
from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.models.spec import Guidance, Spacing
from fewstep.runtime.engine import DENOISER, Capabilities
from fewstep.runtime.sampling.plan import compile_plan
from fewstep.runtime.sampling.request import GenerateRequest, resolve
from fewstep.runtime.sampling.rng import NoiseStream
from fewstep.runtime.sampling.samplers import time_pairs
from fewstep.runtime.sampling.step import RowState, advance
from fewstep.trainers.oracle.samplers import landings, plain_spec

SHAPE = (1, 96, 96)
MEAN, STD = 0.4, 0.6
DATA = gaussian(torch.full(SHAPE, MEAN), STD)


class AnalyticEngine:
    """A perfect denoiser behind the engine protocol; `nets` are chosen by the time a row asks about."""

    name = "analytic"

    def __init__(self, nets, *, takes_w=False):
        self.nets = nets
        self.capabilities = Capabilities(roles=frozenset({DENOISER}), max_batch=1024, takes_w=takes_w)
        self.batches = []

    def run(self, role, feeds):
        assert role == DENOISER
        self.batches.append(len(feeds["t"]))
        rows = []
        for k, t in enumerate(feeds["t"].tolist()):
            net = self.nets[t] if isinstance(self.nets, dict) else self.nets
            cond = {name: feeds[name][k : k + 1] for name in ("ctx", "w") if name in feeds}
            rows.append(net.raw(feeds["x"][k : k + 1], torch.tensor([t], dtype=torch.float64), cond))
        return (torch.cat(rows),)

    def close(self):
        pass


def start(spec, t, seed, data=DATA):
    """A sample of the data noised to t, float32."""
    rng = torch.Generator().manual_seed(1000 + seed)
    x0 = data.draw(1, rng)[0]
    noise = torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    return (spec.path.alpha(t) * x0 + spec.path.sigma(t) * noise).float()


def generate(engine, spec, requests, starts, ctx=0.0):
    """All requests together, each to its own end; the last latents."""
    plans = [compile_plan(resolve(request, spec), spec) for request in requests]
    ctxs = torch.full((2, 3), ctx), torch.zeros(2, 3)
    noises = [NoiseStream(request.seed) for request in requests]
    xs = list(starts)
    for index in range(max(len(plan.rows) for plan in plans)):
        live = [i for i, plan in enumerate(plans) if index < len(plan.rows)]
        states = [
            RowState(plans[i].rows[index], xs[i], {"ctx": ctxs[0]}, noises[i], uncond={"ctx": ctxs[1]}) for i in live
        ]
        for i, x in zip(live, advance(engine, states, spec), strict=True):
            assert isinstance(x, torch.Tensor)
            xs[i] = x
    return xs


CASES = [
    ("lcm", VP(), "v"),
    ("lcm", RectifiedFlow(), "flow"),
    ("ddim", VP(), "eps"),
    ("euler", RectifiedFlow(), "flow"),
    ("phased", VP(), "v"),
    ("tcd", VP(), "v"),
    ("trig", TrigFlow(sigma_data=0.5), "trig"),
    ("edm", EDM(), "x0"),
]
IDS = [f"{sampler}-{path.kind}" for sampler, path, _ in CASES]


def student(spec, steps):
    """For each time of a grid the perfect network of that step."""
    path, kind = spec.path, spec.prediction
    nets = {}
    for (t, _), to in zip(time_pairs(spec, steps), landings(spec, steps), strict=True):
        if spec.sampler == "edm":
            nets[t] = analytic.consistency(DATA, path, kind)
        else:
            land = None if to is None else (lambda t, cond, to=to: torch.full_like(t, to))
            nets[t] = analytic.jumper(DATA, path, kind, land)
    return {float(torch.tensor(t, dtype=torch.float32)): net for t, net in nets.items()}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("sampler", "path", "kind"), CASES, ids=IDS)
def test_every_sampler_returns_the_data(sampler, path, kind, steps):
    spec = plain_spec(sampler, path, kind)
    engine = AnalyticEngine(student(spec, steps))
    requests = [GenerateRequest(prompt="x", steps=steps, seed=seed) for seed in range(2)]
    first = spec.grids[steps][0]
    begin = [start(spec, first, seed) for seed in range(2)]
    ends = generate(engine, spec, requests, begin)
    pixels = torch.stack(ends).double()
    assert float(pixels.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(pixels.std()) == pytest.approx(STD, abs=0.02)
    assert abs(float(torch.corrcoef(pixels.flatten(1))[0, 1])) < 0.05, "two seeds are two pictures"
    if not spec.stochastic:
        end = path.end if not spec.final_alpha_one else None
        to = None if end is None else torch.tensor([end], dtype=torch.float64)
        truth = analytic.flow_map(DATA, path, begin[0][None], torch.tensor([first], dtype=torch.float64), to)[0]
        torch.testing.assert_close(ends[0], truth.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_gamma_of_a_request(gamma):
    spec = plain_spec("tcd", VP(), "v")
    used = replace(spec, gamma=gamma, stochastic=gamma > 0)
    engine = AnalyticEngine(student(used, 4))
    requests = [GenerateRequest(prompt="x", steps=4, seed=seed, gamma=gamma) for seed in (0, 1)]
    begin = [start(spec, spec.grids[4][0], 0)] * 2
    ends = generate(engine, spec, requests, begin)
    assert float(ends[0].mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(ends[0].std()) == pytest.approx(STD, abs=0.03)
    apart = float((ends[0] - ends[1]).abs().mean())
    assert apart == 0.0 if gamma == 0.0 else apart > 0.05, "only gamma makes the seed matter after the start"


def test_a_mixed_batch_gives_each_row_its_own_picture():
    """Step counts 1, 2, 4 and 8 together, against each alone; and they do share calls."""
    spec = plain_spec("lcm", VP(), "v")
    net = analytic.jumper(DATA, spec.path, spec.prediction)
    requests = [GenerateRequest(prompt="x", steps=n, seed=n) for n in (1, 2, 4, 8)]
    begin = [start(spec, spec.grids[r.steps][0], r.seed) for r in requests]
    engine = AnalyticEngine(net)
    together = generate(engine, spec, requests, begin)
    assert engine.batches == [4, 3, 2, 2, 1, 1, 1, 1]
    for request, x, mixed in zip(requests, begin, together, strict=True):
        (alone,) = generate(AnalyticEngine(net), spec, [request], [x])
        torch.testing.assert_close(mixed, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("w", [1.0, 2.0, 4.5])
def test_classifier_free_guidance_reaches_the_guided_data(w):
    """250 DDIM steps of the exact teacher land where the guided Gaussian is, u + w (c - u)."""
    spec = replace(
        plain_spec("ddim", VP(), "v", (1,)),
        spacing=Spacing(kind="trailing", max_steps=250),
        guidance=Guidance(mode="cfg", default=1.0, range=(1.0, 8.0)),
        grids={},
    )
    small = gaussian(torch.full((1, 8, 8), MEAN), STD)
    engine = AnalyticEngine(analytic.exact(small, spec.path, "v"))
    begin = start(spec, 999.0, 0, small)
    (end,) = generate(engine, spec, [GenerateRequest(prompt="x", steps=250, guidance=w)], [begin], ctx=0.5)
    truth = analytic.flow_map(
        small.moved(0.5 * w), spec.path, begin[None], torch.tensor([999.0], dtype=torch.float64), None
    )
    torch.testing.assert_close(end[None].double(), truth, rtol=0, atol=0.03)
    assert engine.batches == [1 if w == 1.0 else 2] * 250


def test_embedded_guidance_reaches_the_guided_data():
    guidance = Guidance(mode="embedded", default=2.0, range=(1.0, 8.0))
    spec = replace(plain_spec("lcm", VP(), "v"), guidance=guidance)
    engine = AnalyticEngine(analytic.jumper(DATA, spec.path, "v", takes_w=True), takes_w=True)
    requests = [GenerateRequest(prompt="x", steps=4, seed=k, guidance=w) for k, w in enumerate((1.0, None, 5.0))]
    begin = [start(spec, spec.grids[4][0], k) for k in range(3)]
    ends = generate(engine, spec, requests, begin, ctx=0.5)
    for end, w in zip(ends, (1.0, 2.0, 5.0), strict=True):
        assert float(end.mean()) == pytest.approx(MEAN + 0.5 * w, abs=0.03)
        assert float(end.std()) == pytest.approx(STD, abs=0.03)
    assert engine.batches == [3, 3, 3, 3]


def test_clipped_estimates_stay_within_the_bound():
    spec = replace(plain_spec("ddim", VP(), "eps"), clip=0.9)
    engine = AnalyticEngine(analytic.jumper(DATA, spec.path, "eps"))
    begin = [start(spec, spec.grids[4][0], 0)]
    (end,) = generate(engine, spec, [GenerateRequest(prompt="x", steps=4)], begin)
    assert float(end.abs().max()) <= 0.9 + 1e-5
    assert float((end.abs() > 0.899).float().mean()) > 0.05, "the bound is felt"


@pytest.mark.parametrize("steps", [1, 2])
def test_modes_keep_their_weights(steps, monkeypatch):
    """A mixture has no closed flow map: the perfect student is integrated, and meets each mode as often as the data."""
    monkeypatch.setattr(analytic, "RK4_STEPS", 60)
    data = mixture(torch.tensor([-1.0, 1.5]).reshape(2, 1), torch.tensor([0.2, 0.4]), torch.tensor([0.3, 0.7]))
    path, rng = RectifiedFlow(), torch.Generator().manual_seed(0)
    spec = plain_spec("lcm", path, "flow")
    net = analytic.jumper(data, path, "flow")
    x = torch.randn(4000, 1, generator=rng)
    rows = compile_plan(resolve(GenerateRequest(prompt="x", steps=steps), spec), spec).rows
    for row in rows:
        f = net.raw(x, torch.full((len(x),), row.t, dtype=torch.float64), {})
        x = row.a * x + row.b * f + row.c * torch.randn(x.shape, generator=rng)
    left = x[x < 0.2]
    assert len(left) / len(x) == pytest.approx(0.3, abs=0.03)
    assert float(left.mean()) == pytest.approx(-1.0, abs=0.03) and float(left.std()) == pytest.approx(0.2, abs=0.03)


def test_start_noise_of_every_path():
    """A plan's start scale makes standard noise what the path's noisiest time looks like."""
    for sampler, path, kind in CASES:
        spec = plain_spec(sampler, path, kind)
        plan = compile_plan(resolve(GenerateRequest(prompt="x", steps=4), spec), spec)
        t = torch.tensor([spec.grids[4][0]], dtype=torch.float64)
        std = (expand(path.alpha(t), torch.zeros(1)) * STD).square() + path.sigma(t).square()
        assert plan.start_scale == pytest.approx(float(std.sqrt()), rel=0.01)


@pytest.mark.parametrize("kind", ["trailing", "leading"])
def test_spaced_grids_are_those_of_diffusers(kind):
    """Times and landings of diffusers' DDIM at every count to 250, without the stray time -1 that it adds at some."""
    spec = replace(plain_spec("ddim", VP(), "v", (1,)), grids={}, spacing=Spacing(kind=kind, max_steps=250, offset=1))
    theirs = DDIMScheduler(timestep_spacing=kind, steps_offset=1)
    for steps in range(1, 251):
        theirs.set_timesteps(steps)
        times = theirs.timesteps.tolist()[:steps]
        pairs = time_pairs(spec, steps)
        assert [t for t, _ in pairs] == times, steps
        assert [-1.0 if to is None else to for _, to in pairs] == [max(-1, t - 1000 // steps) for t in times], steps
