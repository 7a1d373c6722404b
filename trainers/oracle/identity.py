"""The oracle of score identities: golden values, the theorems behind them by quadrature, divergences, forgetting."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewstep.models.analytic import Mixture, exact, gaussian, log_density, mixture
from fewstep.models.denoiser import Condition
from fewstep.models.paths import EDM, VP

from ..distribution import score_identity
from ..distribution.distribution import DistributionMatching, Term
from ..distribution.forgetting import Forgetting
from ..distribution.score_identity import DIVERGENCES, Huber, Linear, RatioWeight, ScoreIdentity
from ..parts.objective import Batch, Cast
from ..parts.rollout import Made
from ..parts.times import UniformScale
from ..recipes.recipe import Recipe
from .world import SHIFT, Bent, Check, World, absorbed, below, between, grad_of, holds, turn, world

COUNT = 2048
REACH, STEP = 140, 0.05
"""Of the grid of standard normal variables: so many steps of this size to either side."""
STUDENT = (2.5, 1.0)
SIGMA = 1.0
GOLDEN = {
    0.0: (0.51289, -0.64404, 0.63009),
    0.5: (0.25645, -0.36943, 0.31309),
    1.0: (0.0, -0.09482, -0.00390),
    1.2: (-0.10258, 0.01503, -0.13070),
}
"""alpha -> value of the loss, its derivative in b and in a, for a student b + a z at (2.5, 1), noise 1 and a teacher of
two equal bumps N(-3, .25) and N(3, .25), computed apart from this code; the last digit is rounded."""


def identity_checks(recipe: Recipe, objective: DistributionMatching, term: ScoreIdentity) -> Iterator[Check]:
    plain = replace(term, normalised=False, weight=None, force=Linear(), fake_guidance=1.0)
    yield from _golden(plain)
    yield from _gaussians(plain)
    yield from _theorems(plain)
    yield from _forces(plain)
    if term.weight is not None:
        yield from _divergences(plain, term.weight)
    yield from _normaliser(term)
    unguided = replace(term, fake_guidance=1.0)
    yield from zero_checks(unguided)
    yield from pull_checks(replace(unguided, weight=None, alpha=min(term.alpha, 1.0)))
    yield from _scales(replace(term, weight=None))


@cache
def nodes() -> tuple[Tensor, Tensor, Tensor]:
    """Two standard normal variables on an even grid, each [N, 1], and the weights of the expectation [N]: the rule of
    trapezia, which a steep but smooth function suits better than Gauss-Hermite's."""
    points = torch.arange(-REACH, REACH + 1, dtype=torch.float64) * STEP
    weights = STEP * torch.exp(-0.5 * points**2) / math.sqrt(2.0 * math.pi)
    z, noise = torch.meshgrid(points, points, indexing="ij")
    return z.reshape(-1, 1), noise.reshape(-1, 1), torch.outer(weights, weights).reshape(-1)


def bumps() -> Mixture:
    """T2's teacher."""
    return mixture(torch.tensor([[-3.0], [3.0]]), torch.tensor([0.5, 0.5]), torch.ones(2))


Law = tuple[Tensor, Tensor]
"""(b, a) of a student b + a z, with gradient."""


def law_of(mean: float, spread: float) -> Law:
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mean, spread))  # type: ignore[return-value]


def quadrature(term: ScoreIdentity, teacher: Mixture, law: Law, sigma: float, ratio: Any = None) -> Tensor:
    """E of the term's loss at one noise level; the fake score is exact for the law and stands still."""
    path, (b, a) = EDM(), law
    z, noise, weights = nodes()
    x, t = b + a * z, torch.full((len(z),), sigma, dtype=torch.float64)
    real = exact(teacher, path, "x0")
    fake = exact(gaussian(b.detach()[None], float(a.detach())), path, "x0")
    each, _ = term.each((real, fake), Made(x, x, t), t, noise, {}, Cast({}, ratio))
    return (weights * each).sum()


def slopes(value: Tensor, law: Law) -> tuple[float, float]:
    found = torch.autograd.grad(value, law)
    return float(found[0]), float(found[1])


def moving_gap(teacher: Mixture, law: Law, x_t: Tensor, sigma: float) -> Tensor:
    """D at x_t with the exact fake as a function of the law."""
    b, a = law
    t = torch.full((len(x_t),), sigma, dtype=torch.float64)
    fake = b + a**2 / (a**2 + sigma**2) * (x_t - b)
    return exact(teacher, EDM(), "x0").x0(x_t, t, {}) - fake


def _golden(term: ScoreIdentity) -> Iterator[Check]:
    """T13."""
    for alpha, wanted in GOLDEN.items():
        law = law_of(*STUDENT)
        value = quadrature(replace(term, alpha=alpha), bumps(), law, SIGMA)
        found = (float(value.detach()), *slopes(value, law))
        for name, ours, theirs in zip(("value", "slope in b", "slope in a"), found, wanted, strict=True):
            yield below(f"T13: alpha {alpha}, {name}", ours - theirs, 1e-5)


def _gaussians(term: ScoreIdentity) -> Iterator[Check]:
    """T3 in closed form: zero means, k = var / (var + sigma^2), c = k_r - k_f."""
    s, a = 0.7, 1.2
    for sigma in (0.3, 1.0, 3.0):
        k_r, k_f = (v**2 / (v**2 + sigma**2) for v in (s, a))
        c = k_r - k_f
        for alpha in (0.0, 0.5, 1.0, 1.2):
            law = law_of(0.0, a)
            value = quadrature(replace(term, alpha=alpha), gaussian(torch.zeros(1), s), law, sigma)
            slope = -2.0 * a * c * (1.0 - k_f) + 2.0 * (1.0 - alpha) * a * c**2
            yield below(
                f"T3: value at noise {sigma}, alpha {alpha}",
                float(value.detach()) - (1.0 - alpha) * c**2 * (a**2 + sigma**2), 1e-9,
            )  # fmt: skip
            yield below(f"T3: slope in a at noise {sigma}, alpha {alpha}", slopes(value, law)[1] - slope, 1e-9)


def _theorems(term: ScoreIdentity) -> Iterator[Check]:
    """T3: alpha = 1/2 has half the gradient of E |D|^2, alpha = 1 half of it at a law of x_t that stands still."""
    teacher, (z, noise, weights) = bumps(), nodes()
    for alpha, still in ((0.5, False), (1.0, True)):
        law = law_of(*STUDENT)
        found = slopes(quadrature(replace(term, alpha=alpha), teacher, law, SIGMA), law)
        law = law_of(*STUDENT)
        x_t = law[0] + law[1] * z + SIGMA * noise
        gap = moving_gap(teacher, law, x_t.detach() if still else x_t, SIGMA)
        wanted = slopes(0.5 * (weights * gap[:, 0] ** 2).sum(), law)
        for name, ours, theirs in zip("ba", found, wanted, strict=True):
            label = "where its law stands still" if still else "of it all"
            yield below(f"T3: half the Fisher divergence's slope in {name}, {label}", ours - theirs, 1e-6)
    value = quadrature(replace(term, alpha=1.0, force=lambda gap: gap.sin()), teacher, law_of(*STUDENT), SIGMA)
    yield below("T3: E u(x_t) (mu_fake - x) is 0 for another u", value, 1e-6)


def _forces(term: ScoreIdentity) -> Iterator[Check]:
    """SIM: for any distance d the gradient is that of E d(D) at a law that stands still; Huber's limit is SiD."""
    teacher, (z, noise, weights) = bumps(), nodes()
    for c in (0.5, 2.0):
        law = law_of(*STUDENT)
        found = slopes(quadrature(replace(term, alpha=1.0, force=Huber(c)), teacher, law, SIGMA), law)
        law = law_of(*STUDENT)
        x_t = (law[0] + law[1] * z + SIGMA * noise).detach()
        gap = moving_gap(teacher, law, x_t, SIGMA)[:, 0]
        wanted = slopes((weights * (gap**2 + c**2).sqrt()).sum(), law)
        for name, ours, theirs in zip("ba", found, wanted, strict=True):
            yield below(f"SIM: Huber's slope in {name}, c = {c}", ours - theirs, 1e-4)
    law = law_of(*STUDENT)
    far = slopes(quadrature(replace(term, alpha=1.0, force=Huber(1e4)), teacher, law, SIGMA), law)
    for name, ours, theirs in zip("ba", far, GOLDEN[1.0][1:], strict=True):
        yield below(f"SIM: c to infinity is SiD at alpha 1, slope in {name}", 1e4 * ours - theirs, 1e-5)


def _f(name: str, r: Tensor) -> Tensor:
    """The divergences E_p f(q / p) themselves."""
    rkl, kl = r * r.log(), -r.log()
    js = r * r.log() - (r + 1.0) * ((r + 1.0) / 2.0).log()
    return {"rkl": rkl, "kl": kl, "jeffreys": 0.6 * rkl + 0.4 * kl, "js": js, "chi2": (1.0 - r) ** 2 / r}[name]


def _divergences(term: ScoreIdentity, used: RatioWeight) -> Iterator[Check]:
    """Uni-Instruct: r f''(r) by differentiation, and the gradient of E r f''(r) |D|^2 / 2, its weight's included."""
    logit = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    teacher, (z, noise, weights) = bumps(), nodes()
    for name in DIVERGENCES:
        own = RatioWeight(name, clip=60.0, by_mean=False)
        r = (-logit).exp().requires_grad_()
        first = torch.autograd.grad(_f(name, r).sum(), r, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), r)[0]
        yield below(f"{name}: weight r f''(r)", own(logit)[0] - r.detach() * second, 1e-9)
        law = law_of(*STUDENT)
        found = slopes(quadrature(replace(term, alpha=0.5, weight=own), teacher, law, 2.0, _ratio(teacher)), law)
        law = law_of(*STUDENT)
        x_t = law[0] + law[1] * z + 2.0 * noise
        gap = moving_gap(teacher, law, x_t, 2.0)[:, 0]
        spread = law[1] ** 2 + 4.0
        log_q = -0.5 * ((x_t[:, 0] - law[0]) ** 2 / spread + spread.log() + math.log(2.0 * math.pi))
        one, two = torch.ones(len(z), dtype=torch.float64), torch.full((len(z),), 2.0, dtype=torch.float64)
        h = own(log_density(teacher, x_t, one, two) - log_q)[0]
        wanted = slopes(0.5 * (weights * h * gap**2).sum(), law)
        for axis, ours, theirs in zip("ba", found, wanted, strict=True):
            yield below(f"{name}: slope in {axis} of the whole divergence", ours / theirs - 1.0, 1e-3)
    h, _ = replace(used, clip=60.0)(logit)
    yield below("ratio weight: over its mean in the batch", h.mean() - 1.0 if used.by_mean else 0.0, 1e-9)
    bound = replace(used, by_mean=False)
    ends = torch.tensor([used.clip, used.clip + 5.0], dtype=torch.float64)
    h, _ = bound(ends)
    yield below("ratio weight: the logit is bounded", h[0] - h[1], 1e-12)


def _ratio(teacher: Mixture) -> Any:
    """The exact log(p / q) on EDM, the student's law standing still."""
    student = gaussian(torch.tensor([STUDENT[0]]), STUDENT[1])

    def critic(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        one = torch.ones_like(t)
        return log_density(teacher, x, one, t) - log_density(student, x, one, t)

    return critic


def _normaliser(term: ScoreIdentity) -> Iterator[Check]:
    """Per sample by its own distance from the teacher's estimate, which has no gradient."""
    x = torch.tensor([[1.0, 3.0], [10.0, 30.0]], dtype=torch.float64, requires_grad=True)
    real = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    found = score_identity.size_of(x, real)
    yield below("normaliser: mean |x - mu_real| of each sample", found - torch.tensor([2.0, 20.0]), 1e-9)
    yield holds("normaliser: no gradient", not found.requires_grad)


def placed(
    term: Term, stage: World, offset: float = 0.0, gain: float = 1.0, step: int = 0, taught: float | None = None
) -> tuple[Made, Cast, Batch, Law]:
    """Samples of N(guided mean + offset, (gain std)^2) with their law's weights, the exact fake, the exact teacher.

    taught: samples have the law of this shift and not the condition's, and so has what the teacher is asked for.
    """
    scale: UniformScale = getattr(term, "guidance", None) or UniformScale(1.0, 1.0)
    batch = stage.batch(COUNT, step)
    shift = SHIFT if taught is None else taught
    moved = Mixture(stage.data.means + offset, stage.data.stds * gain, stage.data.weights)
    law = law_of(offset, gain)
    z = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(step + 99), dtype=torch.float64)
    x = stage.data.means[0] + scale.low * shift + law[0] + law[1] * stage.data.stds[0] * z
    fake = absorbed(World(stage.path, stage.prediction, moved).teacher(), scale.low * shift / SHIFT)
    roles = {"student": fake, "teacher": stage.teacher(), "fake": fake}
    if taught is not None:
        batch = replace(batch, taught={"ctx": torch.full_like(batch.cond["ctx"], taught)})
    made = Made(x, torch.randn_like(x), torch.full((COUNT,), stage.path.start, dtype=torch.float64))
    return made, Cast(roles, _vp_ratio(stage, scale.low * SHIFT, offset)), batch, law


def _vp_ratio(stage: World, shift: float, offset: float) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    p = stage.data.moved(shift)
    q = p.moved(offset)

    def critic(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        a, s = stage.path.alpha(t), stage.path.sigma(t)
        return log_density(p, x, a, s) - log_density(q, x, a, s)

    return critic


def zero_checks(term: Term) -> Iterator[Check]:
    """Where the student's law is the guided teacher's nothing pulls, at any time, whatever the prediction."""
    for prediction in ("v", "eps"):
        stage = world(VP(), prediction)
        made, cast, batch, law = placed(term, stage)
        value, _ = term.loss(made, cast, batch, turn())
        yield below(f"{prediction}: nothing pulls at the guided data", max(map(abs, slopes(value, law))), 1e-8)


def pull_checks(term: Term) -> Iterator[Check]:
    """The term pulls mean and spread towards the teacher's."""
    stage = world(VP(), "x0", mean=0.0)
    for offset in (0.4, -0.4):
        found = mean_slopes(term, stage, offset, 1.0)[0]
        yield between(f"pull: mean off by {offset}", found / offset, 1e-3, float("inf"))
    for gain in (1.5, 0.6):
        found = mean_slopes(term, stage, 0.0, gain)[1]
        yield between(f"pull: spread off by {gain}", found / (gain - 1.0), 1e-3, float("inf"))


def mean_slopes(term: Term, stage: World, offset: float, gain: float, turns: int = 6) -> tuple[float, float]:
    found = []
    for step in range(turns):
        made, cast, batch, law = placed(term, stage, offset, gain, step)
        found.append(slopes(term.loss(made, cast, batch, turn(step))[0], law))
    return sum(b for b, _ in found) / turns, sum(a for _, a in found) / turns


def _scales(term: ScoreIdentity) -> Iterator[Check]:
    """Teacher and fake are each asked at its own scale: the gap of two Gaussians by what guidance moves them."""
    stage = world(VP(), "v")
    batch, again = stage.batch(COUNT), turn()
    made, _, _, _ = placed(term, stage)
    roles = {"teacher": stage.teacher(), "fake": stage.teacher()}
    found = term.loss(made, Cast(roles), batch, turn())[1]["gap"]
    w, t = term.guidance.draw(COUNT, again), term.times.draw(stage.path, COUNT, again)
    a, s = stage.path.alpha(t), stage.path.sigma(t)
    var = stage.data.stds[0].flatten() ** 2
    stays = s[:, None] ** 2 / (a[:, None] ** 2 * var + s[:, None] ** 2)
    scale = w if term.cfg else torch.ones_like(w)
    wanted = float((((scale - term.fake_guidance) * SHIFT)[:, None] * stays).square().mean())
    yield below("each network at its own guidance scale", found - wanted, 1e-6)


def forgetting_checks(recipe: Recipe, objective: DistributionMatching, term: Forgetting) -> Iterator[Check]:
    """Kept rows learn as ever; forgotten ones want the other concept's law, and count by their weight."""
    from .terms import TERMS

    yield from TERMS[type(term.term)](recipe, objective, term.term)
    stage = world(VP(), "v")
    made, cast, batch, law = placed(term, stage, offset=0.3)
    gap = term.loss(made, cast, batch, turn())[0] - term.term.loss(made, cast, batch, turn())[0]
    yield below("forgetting: nothing to forget is the term itself", gap, 1e-9)
    yield from _by_weight(term, stage)
    if "teacher" in term.roles:
        whole = replace(term, weight=1.0)
        made, cast, batch, law = placed(term, stage, taught=-0.7)
        pulled = slopes(whole.loss(made, cast, batch, turn())[0], law)
        yield below("forgetting: nothing pulls at the other concept", max(map(abs, pulled)), 1e-8)
        made, cast, batch, law = placed(term, stage, taught=-0.7)
        pulled = slopes(whole.loss(made, cast, replace(batch, taught=None), turn())[0], law)
        yield holds("forgetting: the concept itself would pull", max(map(abs, pulled)) > 1e-3)


def _by_weight(term: Forgetting, stage: World) -> Iterator[Check]:
    """What forgotten rows teach is `weight` times what they would, and kept rows teach as ever."""
    for part in (1.0, 0.5):
        mine, whole, kept = (_taught(replace(term, weight=w), stage, part) for w in (term.weight, 1.0, 0.0))
        wanted = kept + term.weight * (whole - kept)
        yield below(f"forgetting: {part:g} of the rows count by their weight", (mine - wanted) / whole, 1e-6)
        if part == 1.0:
            yield below("forgetting: no other row teaches", kept / whole, 1e-9)


def _taught(term: Forgetting, stage: World, part: float) -> float:
    """The gradient that a term gives its player, the student or the fake score; the first rows are forgotten."""
    made, cast, batch, law = placed(term, stage, offset=0.3, taught=-0.7)
    taught = batch.cond["ctx"].clone()
    taught[: round(part * COUNT)] = -0.7
    batch = replace(batch, taught={"ctx": taught})
    if "teacher" in term.roles:
        return slopes(term.loss(made, cast, batch, turn())[0], law)[0]
    learner = Bent(cast["fake"], offset=0.3)
    them = Cast({**cast.roles, "fake": learner.denoiser()})
    still = replace(made, x0=made.x0.detach())
    term.loss(still, them, batch, turn(player="fake"))[0].backward()
    return float(grad_of(learner.offset))
