"""The oracle of laws corrected or mixed: Langevin's walk, mixtures of scores, a ratio alone, random embeddings."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.models.analytic import Mixture, exact, gaussian, log_density, score
from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import EDM, VP

from ..distribution import embedding, expectation, mixture_scores
from ..distribution.density_ratio import ClimbRatio
from ..distribution.distribution import DistributionMatching, Term
from ..distribution.embedding import EmbeddingLoss
from ..distribution.expectation import Expectation, Langevin
from ..distribution.mixture_scores import AmortisedGap, DenoiseMixture, FitRatio, RatioGap
from ..parts.objective import Cast
from ..parts.rollout import Made
from ..recipes.recipe import Recipe
from .adversary import LogRatio
from .distribution import descent_checks, with_terms
from .identity import COUNT, bumps, placed, pull_checks, slopes, zero_checks
from .world import SHIFT, Bent, Check, World, below, between, grad_of, holds, turn, world

WALKERS, STEPS = 2000, 500


def expectation_checks(recipe: Recipe, objective: DistributionMatching, term: Expectation) -> Iterator[Check]:
    yield from _one_step(term)
    yield from _walk(term)
    yield from descent_checks(with_terms(objective, "student", replace(term, langevin=Langevin(steps=2))))


def _one_step(term: Expectation) -> Iterator[Check]:
    """One step of the noise alone is the score gap: the aim is g + step / 2 (mu_real - mu_fake)."""
    stage = world(VP(), "v")
    made, cast, batch, _ = placed(term, stage, offset=0.4, gain=1.3)
    nets = (cast["teacher"], cast["fake"])
    t = turn().uniform(50.0, 900.0, COUNT)
    student = expectation.Student(Denoiser(lambda x, t, cond: x, stage.path, "x0"), term.jump, made.t, batch.cond)
    made = replace(made, x0=made.x)  # this student gives back its start
    for size in (0.16, 0.5):
        one = replace(term, langevin=Langevin(steps=1, noise_step=size, start_step=0.0))
        z, _, kept = one.correct(student, nets, made, t, turn())
        x_t = made.at(stage.path, t, turn().noise(made.x0))
        gap = nets[0].x0(x_t, t, batch.cond) - nets[1].x0(x_t, t, batch.cond)
        added = expand(stage.path.level(t), kept) * kept
        yield below(f"EMD: one step of size {size} is the score gap", added - 0.5 * size * gap, 1e-6)
        yield below(f"EMD: the start stays where its step is 0, size {size}", z - made.x, 1e-12)


def _walk(term: Expectation) -> Iterator[Check]:
    """T2: from a student at one mode the walk of (z, e) comes to the teacher's law of x_t, mean 0 and both modes."""
    path, sigma = EDM(), 2.0
    mean, spread = 2.5, 1.0
    nets = (exact(bumps(), path, "x0"), exact(gaussian(torch.tensor([mean]), spread), path, "x0"))
    start = path.sigma(path.start)
    net = Denoiser(lambda x, t, cond: mean + spread * x / start, path, "x0")
    t = torch.full((WALKERS,), sigma, dtype=torch.float64)
    walk = replace(term, langevin=Langevin(steps=STEPS, noise_step=0.2, start_step=0.2))
    rng = torch.Generator().manual_seed(7)
    z = torch.randn(WALKERS, 1, generator=rng, dtype=torch.float64)
    student = expectation.Student(net, term.jump, torch.full_like(t, path.start), {})
    z, e, _ = walk.correct(student, nets, Made(mean + spread * z, start * z, t), t, turn())
    x_t = mean + spread * z / start + sigma * e
    yield below("EMD: mean of x_t after a long walk", x_t.mean(), 0.5)
    yield between("EMD: spread of x_t after a long walk", x_t.std() / math.sqrt(9.25 + sigma**2), 0.93, 1.07)
    small = replace(term, langevin=Langevin(steps=40, noise_step=0.05, start_step=0.05))
    teacher_alone = (nets[1], nets[1])
    _, e, kept = small.correct(student, teacher_alone, Made(mean + 0.0 * z, 0.0 * z, t), t, turn())
    yield below("EMD: noise is left out of the aim where there is no gap", kept, 1e-9)


class Blend:
    """The exact network of SMT: the clean estimate of `a p + (1 - a) q`, a read from the condition."""

    def __init__(self, stage: World, shift: float, offset: float) -> None:
        self.path = stage.path
        self.p = stage.data.moved(shift)
        self.q = self.p.moved(offset)

    def ratio(self, x: Tensor, t: Tensor) -> Tensor:
        a, s = self.path.alpha(t), self.path.sigma(t)
        return log_density(self.p, x, a, s) - log_density(self.q, x, a, s)

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        real, fake = (exact(law, self.path, "x0").x0(x, t, {}) for law in (self.p, self.q))
        a = ((cond["w"].double() - 1.0) / 7.0).clamp(0.0, 1.0)
        lam = expand((self.ratio(x, t) + a.logit()).sigmoid(), real)
        return lam * real + (1.0 - lam) * fake

    def denoiser(self) -> Denoiser:
        return Denoiser(self, self.path, "x0")


def blended(term: Term, offset: float, step: int = 0) -> tuple[Any, ...]:
    """`oracle_identity.placed` with SMT's exact network for the fake score."""
    stage = world(VP(), "x0", mean=0.0)
    made, cast, batch, law = placed(term, stage, offset, 1.0, step)
    roles = {**cast.roles, "fake": Blend(stage, SHIFT, offset).denoiser()}
    return made, Cast(roles, cast.critic), batch, law


def amortised_checks(recipe: Recipe, objective: DistributionMatching, term: AmortisedGap) -> Iterator[Check]:
    rng = torch.Generator().manual_seed(3)
    x, none, some, whole = (torch.randn(5, 4, generator=rng, dtype=torch.float64) for _ in range(4))
    found = mixture_scores.amortised_gradient(x, none, some, whole)
    sizes = found.square().mean(1) * (x - whole).abs().mean(1) ** 2 / (none - whole).square().mean(1)
    yield below("SMT: length of the gradient is that of a = 1, whatever a", sizes - 1.0, 1e-6)
    dmd = (none - whole) / (x - whole).abs().mean(1, keepdim=True)
    yield below("SMT: a = 1 is the score gap", mixture_scores.amortised_gradient(x, none, whole, whole) - dmd, 1e-6)
    along = (found * (none - some)).sum(1)
    yield holds("SMT: along mu_0 - mu_a", bool((along > 0.0).all()))
    for offset in (0.4, -0.4):
        made, cast, batch, law = blended(term, offset)
        pulled = slopes(term.loss(made, cast, batch, turn())[0], law)[0] / offset
        yield between(f"SMT: pull, mean off by {offset}", pulled, 1e-3, float("inf"))
    yield from _shares(term.shares)


def _shares(shares: mixture_scores.Shares) -> Iterator[Check]:
    drawn = shares.draw(20000, turn())
    yield holds(
        "shares: in [0, 1], never 0 where no ends are asked for", bool((drawn >= 0.0).all() & (drawn <= 1.0).all())
    )
    ends = ((drawn == 0.0) | (drawn == 0.5) | (drawn == 1.0)).double().mean()
    yield between("shares: how often an end is drawn", ends, 0.9 * shares.ends, shares.ends + 0.02)
    yield between("shares: even", drawn.mean(), 0.49, 0.51)


def mixture_denoise_checks(recipe: Recipe, objective: DistributionMatching, term: DenoiseMixture) -> Iterator[Check]:
    """The network is best at the mixture's own estimate (T5), and the mixture's by the ratio is the closed form."""
    yield from _union()
    yield from _shares(term.shares)
    for bend in (0.3, -0.3):
        made, cast, batch, _ = blended(term, 0.8)
        learner = Bent(cast["fake"], offset=bend)
        told = Cast({**cast.roles, "fake": learner.denoiser()})
        term.loss(made, told, batch, turn(player="fake"))[0].backward()
        yield holds(f"SMT: its loss pulls the network back, bend {bend}", float(grad_of(learner.offset)) * bend > 0.0)
    yield from _best(term)


def _best(term: DenoiseMixture) -> Iterator[Check]:
    """The loss of the exact network against ones told a wrong share: it reads a, and weighs both sides by it."""
    made, cast, batch, _ = blended(term, 0.8)
    own = cast["fake"]

    def told(change: Any) -> float:
        net = Denoiser(lambda x, t, cond: own.raw(x, t, {**cond, "w": change(cond["w"])}), own.path, "x0")
        with torch.no_grad():
            values = [term.loss(made, Cast({**cast.roles, "fake": net}), batch, turn(s))[0] for s in range(8)]
        return float(torch.stack(values).mean())

    best = told(lambda a: a)
    for name, change in (
        ("1 - a", lambda w: 9.0 - w),
        ("1/2", lambda w: 0.0 * w + 4.5),
        ("0", lambda w: 0.0 * w + 1.0),
    ):
        yield holds(f"SMT: told {name} for a it denoises worse", told(change) > best)


def _union() -> Iterator[Check]:
    """`mixed` against the exact denoiser of the mixture itself, and at both ends."""
    path, sigma = VP(), 400.0
    p, q = bumps(), gaussian(torch.tensor([1.0]), 1.2)
    x = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64)[:, None]
    t = torch.full((13,), sigma, dtype=torch.float64)
    a, s = path.alpha(t), path.sigma(t)
    ratio = log_density(p, x, a, s) - log_density(q, x, a, s)
    real, fake = (exact(law, path, "x0").x0(x, t, {}) for law in (p, q))
    for share in (0.1, 0.5, 0.8):
        both = Mixture(
            torch.cat([p.means, q.means]), torch.cat([p.stds.expand_as(p.means), q.stds.expand_as(q.means)]),
            torch.cat([share * p.weights, (1.0 - share) * q.weights]),
        )  # fmt: skip
        ours = mixture_scores.mixed(real, fake, ratio, torch.full_like(t, share))
        yield below(f"mixture of share {share}: closed form", ours - exact(both, path, "x0").x0(x, t, {}), 1e-9)
    for share, wanted in ((1.0, real), (0.0, fake)):
        ours = mixture_scores.mixed(real, fake, ratio, torch.full_like(t, share))
        yield below(f"mixture of share {share:g}: one of the two", ours - wanted, 1e-12)


def ratio_gap_checks(recipe: Recipe, objective: DistributionMatching, term: RatioGap) -> Iterator[Check]:
    yield from _union()
    alone = replace(term, deceive=0.0)
    yield from zero_checks(alone)
    yield from pull_checks(alone)
    stage = world(VP(), "x0", mean=0.0)
    made, cast, batch, law = placed(alone, stage, offset=0.4)
    a, t = torch.full((COUNT,), 0.3, dtype=torch.float64), torch.full((COUNT,), 400.0, dtype=torch.float64)
    fixed = replace(alone, shares=_Fixed(a), times=_Fixed(t))  # type: ignore[arg-type]
    found = COUNT * made.x0[0].numel() * torch.autograd.grad(fixed.loss(made, cast, batch, turn())[0], made.x0)[0]
    again = turn()
    alone.guidance.draw(COUNT, again)
    x_t = made.at(stage.path, t, again.noise(made.x0)).detach()
    whole = Blend(stage, alone.guidance.low * SHIFT, 0.4)
    mean = whole(x_t, t, mixture_scores.told_share({}, a))
    none = whole(x_t, t, mixture_scores.told_share({}, 0.0 * a))
    real = whole(x_t, t, mixture_scores.told_share({}, a / a))
    size = (made.x0 - real).detach().flatten(1).abs().mean(1)
    wanted = (none - mean) / expand(size * a, mean)
    yield below("SMD: (mu_0 - mu_a) / (|x - mu_real| a)", (found - wanted) / wanted.abs().max(), 1e-4)
    if term.deceive:
        value = replace(term, times=_Fixed(t)).loss(made, cast, batch, turn())[0]
        without = replace(alone, times=_Fixed(t)).loss(made, cast, batch, turn())[0]
        pulled = slopes(value - without, law)[0]
        yield holds("SMD: its GAN term pulls the mean back", pulled * 0.4 > 0.0)


class _Fixed:
    """A law that always draws the same."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def draw(self, *told: Any) -> Tensor:
        return self.values


def fit_checks(recipe: Recipe, objective: DistributionMatching, term: FitRatio) -> Iterator[Check]:
    """The critic becomes log(p / q): too sure or too unsure it is pulled back, and nobody else learns."""
    stage = world(VP(), "x0", mean=0.0)
    for scale in (0.5, 2.0):
        made, cast, batch, law = placed(term, stage, offset=0.8)
        shift = SHIFT * term.guidance.low
        p = stage.data.moved(shift)
        batch = replace(batch, x0=batch.x0 - SHIFT + shift)  # data of the guided law, so that the ratio is known
        critic = LogRatio(p, p.moved(0.8), scale=scale)
        term.loss(made, Cast(cast.roles, critic), batch, turn(player="fake"))[0].backward()
        yield holds(
            f"SMD: the critic is pulled back from {scale} log(p / q)", float(grad_of(critic.scale)) * (scale - 1) > 0
        )
        yield holds(f"SMD: samples do not learn from the fit, {scale}", law[0].grad is None)


def climb_checks(recipe: Recipe, objective: DistributionMatching, term: ClimbRatio) -> Iterator[Check]:
    """T1 with grad l in place of the gap: its gradient is `weight alpha (s_fake - s_real)`, sample by sample."""
    stage = world(VP(), "x0", mean=0.0)
    path = stage.path
    for offset, gain in ((0.4, 1.0), (0.0, 1.0), (-0.4, 1.0)):
        made, cast, batch, law = placed(term, stage, offset, gain)
        value = term.loss(made, cast, batch, turn())[0]
        found = COUNT * made.x0[0].numel() * torch.autograd.grad(value, made.x0, retain_graph=True)[0]
        again = turn()
        t = term.times.draw(path, COUNT, again)
        x_t = made.at(path, t, again.noise(made.x0)).detach()
        p = stage.data.moved(SHIFT)
        gap = score(p.moved(offset), path, x_t, t) - score(p, path, x_t, t)
        wanted = expand(term.weight(path, t) * path.alpha(t), gap) * gap
        yield below(f"ratio: the gap of the scores, mean off by {offset}", found - wanted, 1e-6)
        if offset:
            yield between(f"ratio: pull, mean off by {offset}", slopes(value, law)[0] / offset, 1e-3, float("inf"))


def embedding_checks(recipe: Recipe, objective: DistributionMatching, term: EmbeddingLoss) -> Iterator[Check]:
    """The U-statistic is 0 in the mean on two halves of one sample; beside T2's teacher a student leaves its mode."""
    for kernel in ("linear", "gaussian"):
        for told in (False, True):
            values = torch.stack([_halves(kernel, told, seed) for seed in range(225)])
            mean, error = float(values.mean()), float(values.std()) / 15.0
            yield below(f"embedding: mean on two halves, {kernel}{', told' if told else ''}", mean / error, 4.0)
            biased = torch.stack([_halves(kernel, told, seed, moved=1.5) for seed in range(10)]).mean()
            yield holds(f"embedding: not on two laws, {kernel}{', told' if told else ''}", float(biased) > 10.0 * error)
    student, teacher = torch.tensor([2.5, 1.0], dtype=torch.float64, requires_grad=True), bumps()
    walker = torch.optim.Adam([student], lr=0.1)
    for step in range(80):
        rng = torch.Generator().manual_seed(step)
        x = student[0] + student[1] * torch.randn(64, 1, generator=rng, dtype=torch.float64)
        walker.zero_grad()
        term.loss(Made(x, x, x[:, 0]), Cast({}), _batch(teacher.draw(64, rng)), turn(step))[0].backward()
        walker.step()
    found = student.detach().abs()
    yield between("embedding: T2, the student leaves its mode", found[0], 0.0, 1.5)
    yield between("embedding: T2, the student grows over both modes", found[1], 2.0, 4.5)


def _halves(kernel: str, told: bool, seed: int, moved: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 24, 3, generator=rng, dtype=torch.float64)
    labels = torch.eye(3, dtype=torch.float64)[torch.randint(3, (24,), generator=rng)]
    return embedding.discrepancy(x, y + moved, labels if told else None, kernel)


def _batch(x: Tensor) -> Any:
    from ..parts.objective import Batch

    label = torch.ones(len(x), 1, dtype=torch.float64)
    return Batch(x, {"label": label}, {"label": 0.0 * label})
