"""The oracle of critics: each loss's best critic, regularisers in closed form, features that gradients go through."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.analytic import exact, gaussian, log_density
from fewstep.models.denoiser import Condition
from fewstep.models.paths import VP

from .adversarial import TeacherAim
from .also import Also
from .critics import TEACHER, CriticPlan, FrozenCritic, TeacherEye
from .discriminator import Adversary, Judge
from .distribution import DistributionMatching
from .errors import RecipeError
from .gan_losses import R1, ApproximateR1, FiniteDifference, Hinge, Judged, Relativistic, Softplus
from .noised_rollout import NoisedRollout, SampledTimes, StartMoreOften
from .objective import Batch, Cast, Metrics, Turn
from .oracle_distribution import cast_of, slope_at, with_terms
from .oracle_parts import perfect_student, sampled, source_checks
from .oracle_world import Bent, Check, MeanCritic, below, between, holds, recipe_spec, turn, world
from .recipe import Recipe
from .rollout import Made
from .self_paced import BesideNext, NextCount, WholeWalk
from .times import UniformScale, UniformTimes

COUNT = 4096


def loss_checks(adversary: Adversary) -> Iterator[Check]:
    """T6 for losses of no ratio: hinge's best critic is the sign, a relativistic one is free up to a constant."""
    levels = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    z = torch.special.ndtri(levels)[:, None]
    p, q = ((torch.tensor([m], dtype=torch.float64), s) for m, s in ((0.6, 0.8), (-0.2, 1.1)))
    real, fake = (m + s * z for m, s in (p, q))
    one, none = torch.ones(()).double(), torch.zeros(()).double()

    def ratio(x: Tensor) -> Tensor:
        return log_density(gaussian(*p), x, one, none) - log_density(gaussian(*q), x, one, none)

    if isinstance(adversary.loss, Hinge):
        grid = torch.linspace(-8.0, 8.0, 160001, dtype=torch.float64)[:, None]
        both = [log_density(gaussian(*side), grid, one, none).exp() for side in (p, q)]
        overlap = float(torch.minimum(*both).sum() * 1e-4)
        best = adversary.loss.critic(ratio(real).sign(), ratio(fake).sign())
        yield below("hinge: the loss of the sign of log(p / q) is twice the overlap", float(best) - 2 * overlap, 1e-2)
        for scale in (0.5, 2.0):
            other = adversary.loss.critic(scale * ratio(real).sign(), scale * ratio(fake).sign())
            yield between(f"hinge: more at {scale} times that", float(other - best), 1e-3, float("inf"))
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        adversary.loss.critic(scale * ratio(real), scale * ratio(fake)).backward()
        yield between("hinge: log(p / q) is not its best critic", abs(float(scale.grad or 0.0)), 1e-2, float("inf"))
    if isinstance(adversary.loss, Relativistic):
        pairs = torch.cartesian_prod(torch.arange(400), torch.arange(400)).unbind(1)
        for factor in (1.0, 0.5, 2.0):
            scale = torch.tensor(factor, dtype=torch.float64, requires_grad=True)
            logits = [scale * ratio(side) for side in (real, fake)]
            adversary.loss.critic(logits[0][pairs[0]], logits[1][pairs[1]]).backward()
            slope = float(scale.grad or 0.0)
            if factor == 1.0:
                yield below("relativistic: slope at log(p / q)", slope, 1e-2)
            else:
                yield between(f"relativistic: slope beside it, {factor}", slope * (factor - 1.0), 1e-2, float("inf"))
        moved = adversary.loss.critic(real + 3.0, fake + 3.0) - adversary.loss.critic(real, fake)
        yield below("relativistic: a constant changes nothing", moved, 1e-6)
    logits, other = torch.tensor([-1.0, 0.5], requires_grad=True), torch.tensor([0.0, 0.3])
    adversary.loss.student(logits, other).backward()
    yield holds("the student raises the logits of its samples", bool((logits.grad < 0.0).all()))  # type: ignore[operator]
    yield from _ratio_refused(adversary)


class ReadsRatio:
    """What stands for a term that takes logits for ratios."""

    roles = ()
    reads_ratio = True

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        return made.x0.mean(), {}


def _ratio_refused(adversary: Adversary) -> Iterator[Check]:
    try:
        DistributionMatching(rollout=_nothing(), terms={"student": (ReadsRatio(),), "critic": (Judge(adversary),)})
    except RecipeError as error:
        named = type(adversary.loss).__name__ in str(error)
        yield holds("a term that reads ratios is refused, and the loss named", named and not adversary.loss.is_ratio)
    else:
        yield holds("a term that reads ratios is let in", isinstance(adversary.loss, Softplus))


def _nothing() -> Any:
    return None


def regulariser_checks(adversary: Adversary) -> Iterator[Check]:
    """Against closed forms of `gain mean(x) + offset`, whose slope is `gain / n` in each of n elements."""
    critic, gain = MeanCritic(gain=3.0), 3.0
    x = torch.randn(COUNT, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.zeros(COUNT, dtype=torch.float64)
    side, square = Judged(critic, x, t, {}, critic(x, t, {})), gain**2 / 6.0
    for rule in adversary.regularisers:
        every = rule.every if isinstance(rule, R1) else 1
        found = sum(float(rule.loss(side, side, turn(step)).detach()) for step in range(every)) / every
        if isinstance(rule, R1):
            yield below("R1: w/2 |grad l|^2 in the mean", found / (0.5 * rule.weight * square) - 1, 1e-6)
            on = [float(rule.loss(side, side, turn(step)).detach()) != 0.0 for step in range(2 * every)]
            yield holds("R1: in the last of so many steps", on == ([False] * (every - 1) + [True]) * 2)
            critic.zero_grad()
            rule.loss(side, side, turn(every - 1)).backward()
            wanted = rule.weight * every * gain / 6.0
            yield below("R1: its slope in the critic's gain", float(critic.gain.grad or 0.0) / wanted - 1.0, 1e-6)
        elif isinstance(rule, FiniteDifference):
            yield below("finite differences: R1 and R2", found / (2.0 * rule.weight * square) - 1.0, 0.1)
        elif isinstance(rule, ApproximateR1):
            wanted = rule.weight * rule.width**2 * square
            yield below("aR1: w (l(x) - l(x + s n))^2", found / wanted - 1.0, 0.1)
        other = MeanCritic(gain=7.0)
        moved = Judged(other, x, t, {}, other(x, t, {}))
        one_sided = not isinstance(rule, FiniteDifference)
        again = float(rule.loss(side, moved, turn(every - 1)).detach())
        same = math.isclose(again, float(rule.loss(side, side, turn(every - 1)).detach()))
        yield holds(f"{type(rule).__name__}: looks at {'data alone' if one_sided else 'both sides'}", same == one_sided)


def misaligned_checks(adversary: Adversary) -> Iterator[Check]:
    """Data i under the condition of data i - 1 are fakes, unless the two conditions are one."""
    if not adversary.misaligned:
        return
    owner = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 3.0], dtype=torch.float64)[:, None]
    batch = Batch(owner, {"ctx": owner}, {"ctx": owner})

    def critic(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return torch.where(x == cond["ctx"], 0.8, -0.8)[:, 0]  # says whether a pair is aligned

    plain = replace(adversary, times=None, share=1.0, regularisers=(), critic_weight=1.0)
    made = Made(owner, owner, torch.zeros(6, dtype=torch.float64))
    cast = Cast({"student": world(VP(), "v").teacher()}, critic)
    found = float(Judge(plain).loss(made, cast, batch, turn())[0])
    real, fake = torch.full((6,), 0.8), torch.tensor([0.8] * 6 + [-0.8] * 4)
    yield below("misaligned pairs: four of six, none aligned", found - float(plain.loss.critic(real, fake)), 1e-6)


class _Config(dict[str, Any]):
    __getattr__ = dict.__getitem__


class _Layers(nn.Module):
    """A network of two layers, as a teacher whose blocks are read."""

    def __init__(self) -> None:
        super().__init__()
        self.config = _Config(dim=4)
        self.layers = nn.ModuleList((nn.Linear(1, 4), nn.Linear(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x.flatten(1)[:, :, None]).tanh())  # type: ignore[no-any-return]


def frozen_checks(plan: CriticPlan | None) -> Iterator[Check]:
    """A critic on frozen blocks: its derivative in the sample is that of the whole, and the blocks learn nothing."""
    if plan is None or plan.features != TEACHER:
        return
    torch.manual_seed(0)
    network = _Layers().requires_grad_(False)
    eye = TeacherEye(network, lambda x, t, cond: network(x), replace(plan, depths=(0.0, 1.0)))
    critic = FrozenCritic(eye, plan, None).eval()
    x, t = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(1)).requires_grad_(), torch.zeros(1)
    logit = critic.judge(x, t, {}).mean()
    logit.backward()
    slope = torch.zeros_like(x) if x.grad is None else x.grad
    h, direction = 1e-2, slope / slope.norm().clamp(min=1e-12)
    with torch.no_grad():
        ahead, behind = (critic.judge(x + k * direction, t, {}).mean() for k in (h, -h))
    steep = float((ahead - behind) / (2 * h))
    yield between("frozen features: the gradient goes through them", float(slope.norm()), 1e-6, float("inf"))
    yield below(
        "frozen features: gradient in x against differences", steep / float(slope.norm().clamp(1e-12)) - 1, 0.02
    )
    learned = [w.grad is not None for w in critic.parameters()], [w.grad is not None for w in network.parameters()]
    yield holds("frozen features: the heads learn, the blocks do not", any(learned[0]) and not any(learned[1]))
    yield holds("frozen features: no hook is left", not any(part._forward_hooks for part in network.modules()))


def aim_checks(recipe: Recipe, objective: DistributionMatching, term: TeacherAim) -> Iterator[Check]:
    """A teacher's estimate alone pulls the mean, is at rest there, and shrinks the spread: `scale c(t) s (1 - k)`."""
    stage, plain = world(VP(), "x0", mean=0.0), replace(term, cfg=False, guidance=UniformScale(1.0, 1.0))
    alone = with_terms(objective, "student", plain)
    for offset in (0.4, -0.4):
        found = slope_at(stage, alone, "offset", offset=offset)
        yield between(f"teacher's aim: mean off by {offset}", found / offset, 0.01, float("inf"))
    for share in (0.3, 0.6):
        s, path = 0.7, VP()
        data = gaussian(torch.tensor([0.2], dtype=torch.float64), s)
        t = torch.full((50_000,), math.floor(share * 1000), dtype=torch.float64)
        z = torch.randn(len(t), 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        x = (0.2 + s * z).requires_grad_()

        at = replace(plain, times=UniformTimes(share, share + 5e-4))
        cast = Cast({"teacher": exact(data, path, "v")})
        at.loss(Made(x, x, t), cast, Batch(x, {}, {}), turn())[0].backward()
        assert x.grad is not None
        alpha, sigma = path.alpha(t[0]), path.sigma(t[0])
        k = alpha**2 * s**2 / (alpha**2 * s**2 + sigma**2)
        wanted = float(2.0 * term.scale * term.weight(path, t[:1])[0] * s * (1.0 - k))
        spread = float((x.grad * z).sum())
        yield below(f"teacher's aim: it shrinks the spread, at {share}", spread / wanted - 1.0, 0.03)
        yield below(f"teacher's aim: no pull on the mean of the data, at {share}", float(x.grad.sum()) / wanted, 0.03)


def also_checks(recipe: Recipe, objective: DistributionMatching, term: Also) -> Iterator[Check]:
    """The other objective's own suite, and that it is untouched by what stands beside it."""
    from .oracle import SUITES

    stage = replace(recipe.stages[-1], objective=term.objective)
    yield from SUITES[type(term.objective)](replace(recipe, stages=(stage,)), term.objective)
    bench = world(VP(), "v")
    silent = {player: tuple(_silent(t) for t in terms) for player, terms in objective.terms.items()}
    grads = []
    for whole in (term.objective, replace(objective, terms=silent)):
        cast, student = cast_of(bench, objective, offset=0.2)
        loss = whole.loss("student", Cast(cast.roles, MeanCritic()), bench.batch(64), turn(3))[0]
        loss.backward()
        grads.append(torch.stack([student.gain.grad, student.offset.grad]))  # type: ignore[list-item]
    factor = term.weight
    yield holds("beside weights of 0 it is the other objective, bit for bit", torch.equal(factor * grads[0], grads[1]))


def _silent(term: Any) -> Any:
    """The term with its adversary's weight 0."""
    own = getattr(term, "adversary", None)
    return term if own is None else replace(term, adversary=replace(own, student_weight=0.0))


def noised_checks(recipe: Recipe, rollout: NoisedRollout) -> Iterator[Check]:
    """Inputs are noised data of the times that are said, and the sample is the jump from there."""
    yield from source_checks(rollout.source)
    stage = world(VP(), "v")
    path, batch, student = stage.path, stage.batch(COUNT), Bent(stage.teacher(), gain=0.1).denoiser()
    made = rollout.make(student, batch, turn())
    cond = {**batch.cond, "w": torch.ones(COUNT, dtype=torch.float64)}
    again = rollout.jump(student, made.x, made.t, torch.zeros_like(made.t), cond)
    yield below("noised rollout: one evaluation at its state", made.x0 - again, 1e-12)
    yield holds("noised rollout: with a gradient", made.x0.requires_grad and not made.x.requires_grad)
    apart = made.x - rollout.source.mix(path, batch.x0, made.t, torch.zeros_like(batch.x0))
    scale = rollout.source.coefficients(path, made.t)[1].clamp(min=1e-3)
    yield between("noised rollout: the noise's size at its times", (apart.flatten(1).std(1) / scale).mean(), 0.85, 1.0)
    law = rollout.times
    if isinstance(law, SampledTimes):
        grid = law.grids.of(path)[max(law.grids.counts)]
        weights = torch.tensor(law.weights or [1.0] * len(grid)).double()
        got = torch.tensor([float((made.t == time).double().mean()) for time in grid])
        yield below("noised rollout: each time with its weight", got - weights / weights.sum(), 0.03)
    if isinstance(law, StartMoreOften):
        plain = float((law.law.draw(path, COUNT, turn(1)) >= path.start).double().mean())
        wanted = law.share + (1.0 - law.share) * plain
        yield below(
            "noised rollout: the share of the noisiest", float((made.t >= path.start).double().mean()) - wanted, 0.03
        )


def walk_checks(recipe: Recipe, rollout: WholeWalk) -> Iterator[Check]:
    """Samples of n steps are those of the student's own sampler, draw by draw, for every n."""
    stage = world(VP(), "v")
    spec, student, batch = recipe_spec(recipe, stage.path, stage.prediction), stage.teacher(), stage.batch(16)
    for n in rollout.grids.counts:
        ours = rollout.walk(student, n, batch.x0, batch.cond, turn(n))
        theirs = sampled(student, spec, spec.grids[n], batch.x0, batch.cond, turn(n))
        yield below(f"walk of {n}: against the sampler of the recipe", ours.x0 - theirs, 1e-9)
        yield holds(f"walk of {n}: its steps are counted", len(ours.before) + 1 == n)
    reached = {len(rollout.make(student, batch, turn(step)).before) + 1 for step in range(60)}
    yield holds("walk: every step count is drawn", reached == set(rollout.grids.counts))
    learner = Bent(student).denoiser()
    made = rollout.walk(learner, max(rollout.grids.counts), batch.x0, batch.cond, turn())
    first = made.before[0].x0.requires_grad
    yield holds(
        "walk: gradient through the last step alone", made.x0.requires_grad and not (first or made.x.requires_grad)
    )


class _Spread(nn.Module):
    """`gain mean(x^2)`, which tells laws of other spread apart; it knows nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.gain * x.flatten(1).square().mean(1)


def next_checks(recipe: Recipe, objective: DistributionMatching, term: BesideNext) -> Iterator[Check]:
    """ASD: at equal laws of n and n + 1 the critic's loss is log 2 and no slope is left; else it learns."""
    walk = term.next.walk
    counts = walk.grids.counts
    if isinstance(term.side, Judge):
        stage = world(VP(), "x0")
        perfect = perfect_student(stage, _aims(walk))
        for name, student in (("a perfect student", perfect), ("a mean of the data", stage.teacher())):
            critic = _Spread()
            made = walk.walk(student, counts[0], stage.batch(COUNT).x0, stage.batch(COUNT).cond, turn())
            plain = replace(
                term, side=Judge(replace(term.adversary, times=None, share=1.0, critic_weight=1.0, regularisers=()))
            )
            loss = plain.loss(made, Cast({"student": student}, critic), stage.batch(COUNT), turn(1, "fake"))[0]
            loss.backward()
            slope = abs(float(critic.gain.grad or 0.0))
            yield below(f"next count, {name}: an ignorant critic's loss is log 2", loss - math.log(2.0), 1e-6)
            if student is perfect:
                yield below(f"next count, {name}: nothing to learn", slope, 0.02)
            else:
                yield between(f"next count, {name}: the critic learns", slope, 0.02, float("inf"))
    follows = {n: NextCount(walk).after(_of(n)) for n in counts}
    wanted = dict(zip(counts, [*counts[1:], None], strict=True))
    yield holds("next count: each is held against the next, the last against none", follows == wanted)
    stage = world(VP(), "v")
    told: list[int] = []

    def critic(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        told.append(int(cond["steps"][0]))
        return x.flatten(1).mean(1)

    for n in counts:
        made = walk.walk(Bent(stage.teacher()).denoiser(), n, stage.batch(4).x0, stage.batch(4).cond, turn())
        term.loss(made, Cast({"student": stage.teacher()}, critic), stage.batch(4), turn())
    yield holds("next count: the critic is told n, and the last count is not judged", set(told) == set(counts[:-1]))


def _of(n: int) -> Made:
    one = torch.zeros(1)
    return Made(one, one, one, before=(Made(one, one, one),) * (n - 1))


def _aims(walk: WholeWalk) -> Any:
    return SimpleNamespace(jump=walk.jump, guidance=UniformScale(1.0, 1.0))


def judge_parts(recipe: Recipe, adversary: Adversary) -> Iterator[Check]:
    """What an adversary is made of."""
    yield from loss_checks(adversary)
    yield from regulariser_checks(adversary)
    yield from misaligned_checks(adversary)
    yield from frozen_checks(recipe.critic)
