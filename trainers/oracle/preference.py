"""The oracle of preferences: walks as they are sampled, equal chances at the reference, and who is pulled where."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import logsigmoid

from fewstep.models.analytic import exact, gaussian
from fewstep.models.denoiser import Denoiser, times
from fewstep.models.paths import VP
from fewstep.runtime.sampling.samplers import path_start, updates

from ..distribution import faithful, preference
from ..distribution.distribution import DistributionMatching
from ..distribution.faithful import Faithful
from ..distribution.preference import DenoisePreferred, PairedLikelihood, PreferenceGap, PreferredPairs
from ..distribution.scores import denoising_loss
from ..parts.chain import Chain, doubled
from ..parts.objective import Batch, Cast, Turn
from ..parts.rollout import Made
from ..parts.times import LcmGrids, UniformScale
from ..recipes.recipe import Recipe
from .reward import leaf
from .world import Bent, Check, below, between, gradient_checks, holds, liking, recipe_spec, turn, world

COUNT = 512


def chain_checks(recipe: Recipe, rollout: Chain) -> Iterator[Check]:
    """A walk is the sampler's own, draw by draw, in every grid; and its gradient is where it is said to be."""
    stage = world(VP(), "v")
    spec, student, batch = recipe_spec(recipe, stage.path, stage.prediction), stage.teacher(), stage.batch(8)
    gaps, reached = [], set()
    for step in range(30):
        made, again = rollout.make(student, batch, turn(step)), turn(step)
        grid = rollout.grid(stage.path, again)
        reached.add(grid)
        ours = [*(part.x for part in (*made.before, made)), made.x0]
        theirs = _walk(rollout, student, spec, len(grid), batch, again)
        gaps += [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    yield below("chain: every state against the sampler of the recipe, same draws", max(gaps), 1e-9)
    yield holds("chain: every grid is walked, and no other", reached == set(spec.grids.values()))
    yield from _chain_gradients(replace(rollout, grids=LcmGrids((4,)), weights=()), batch)


def _walk(rollout: Chain, student: Any, spec: Any, steps: int, batch: Batch, again: Turn) -> list[Tensor]:
    """The states of the runtime's sampler on twins' own draws, the last being its sample."""
    cond = doubled(batch.cond) if rollout.twins else batch.cond

    def noise() -> Tensor:
        return torch.cat([again.noise(batch.x0) for _ in range(2 if rollout.twins else 1)])

    if rollout.twins and rollout.stretch is not None:
        first = again.noise(batch.x0)
        x = torch.cat([first, rollout.stretch * first]) * path_start(spec.path)
    else:
        x = noise() * path_start(spec.path)
    states = [x]
    for k, (t, update) in enumerate(updates(spec, steps)):
        x = update.a * x + update.b * student.raw(x, times(t, x), cond)
        x = x + update.c * noise() if k < steps - 1 else x
        states.append(x)
    return states


def _chain_gradients(rollout: Chain, batch: Batch) -> Iterator[Check]:
    def walked() -> tuple[Bent, Made]:
        student = Bent(world(VP(), "v").teacher(), gain=0.05, offset=0.1)
        return student, rollout.make(student.denoiser(), batch, turn())

    student, made = walked()
    inner = {"whole": (True, True), "each": (True, False), "last": (False, False)}[rollout.gradient]
    asked = {(step.x0.requires_grad, then.x.requires_grad) for step, then in pairwise((*made.before, made))}
    yield holds(f"chain: gradient of {rollout.gradient}", asked == {inner} and made.x0.requires_grad)
    if rollout.gradient == "whole":
        made.x0.mean().backward()
        again = rollout.make
        yield from gradient_checks(
            "chain: ", lambda: again(student.denoiser(), batch, turn()).x0.mean(), student, bound=1e-4
        )
    with torch.no_grad():
        _, silent = walked()
    yield holds("chain: none where none is asked", not silent.x0.requires_grad)


def _cast(objective: DistributionMatching, bent: float = 0.0, reward: Any = liking) -> tuple[Cast, Bent]:
    """A student that is bent from its reference by so much."""
    reference = world(VP(), "v").teacher()
    student = Bent(reference, offset=bent)
    roles = {"student": student.denoiser(), "teacher": reference}
    return Cast(roles, rewards={"reward": reward}), student


def _disliking(x: Tensor, cond: Any) -> Tensor:
    return -liking(x, cond)


def _even(x: Tensor, cond: Any) -> Tensor:
    return x.new_zeros(len(x))


def likelihood_checks(recipe: Recipe, objective: DistributionMatching, term: PairedLikelihood) -> Iterator[Check]:
    """PSO: log 2 at the reference; the other preference turns the sign; no gradient outside the clip."""
    batch = world(VP(), "v").batch(COUNT)
    yield from _pairs(objective)
    a, b, s = leaf(4, 1).detach(), leaf(4, 2).detach(), torch.full((4,), 300.0, dtype=torch.float64)
    law = Normal(VP().alpha(s)[:, None, None] * a, VP().sigma(s)[:, None, None].expand_as(a))
    other = Normal(VP().alpha(s)[:, None, None] * b, VP().sigma(s)[:, None, None].expand_as(b))
    found = preference.log_likelihood(VP(), a, b, s) - preference.log_likelihood(VP(), b, b, s)
    wanted = (law.log_prob(b) - other.log_prob(b)).flatten(1).mean(1)
    yield below("likelihood: of a Gaussian step, mean over elements", found - wanted, 1e-9)
    cast, _ = _cast(objective, bent=0.01)
    made = objective.rollout.make(cast["student"], batch, turn(3))
    won = preference.preferred(made, cast, batch)
    yield from _sides(made, won)
    step = made.before[0]
    theirs = term.jump(cast["teacher"], step.x, step.t, torch.zeros_like(step.t), doubled(batch.cond))
    margin = term.margin(VP(), step, theirs).detach()
    wanted_loss = [-logsigmoid(sign * term.beta * won * margin).mean() for sign in (1.0, -1.0)]
    alone = replace(made, before=(step,))
    for label, reward, wanted in zip(("liked", "disliked"), (liking, _disliking), wanted_loss, strict=True):
        loss = term.loss(alone, Cast(cast.roles, rewards={"reward": reward}), batch, turn())[0]
        yield below(f"PSO: -log sigmoid of the margin, {label}", loss - wanted, 1e-9)
    far, bent = _cast(objective, bent=40.0)
    loss = objective.loss("student", far, batch, turn(3))[0]
    slope = float(torch.autograd.grad(loss, bent.offset)[0])
    yield below("PSO: outside the clip no gradient", slope, 1e-12)
    limit = math.log((1.0 + term.clip) / (1.0 - term.clip))
    drawn = replace(step, x0=step.x0 + torch.randn_like(step.x0))
    widest = term.margin(VP(), drawn, theirs).abs().max()
    yield below("PSO: the widest margin is the clip's", widest - limit, 1e-9)
    offline = PreferredPairs(beta=5.0, grids=objective.rollout.grids, jump=term.jump)  # type: ignore[attr-defined]
    fixed = replace(objective, terms={"student": (offline,)}, walker="teacher")
    yield from pairs_checks(recipe, fixed, offline)


def _pairs(objective: DistributionMatching) -> Iterator[Check]:
    """What holds of both forms: log 2 at the reference, and the student moves towards what is preferred."""
    batch = world(VP(), "v").batch(COUNT)
    cast, _ = _cast(objective)
    for step in range(4):
        loss = objective.loss("student", cast, batch, turn(step))[0]
        yield below(f"pairs: log 2 at the reference, step {step}", loss - math.log(2.0), 1e-6)
    online = isinstance(objective.terms["student"][0], PairedLikelihood)
    if not online and objective.terms["student"][0].winners == "data":  # type: ignore[attr-defined]
        return  # no reward is asked
    slopes = {}
    for label, reward in (("liked", liking), ("disliked", _disliking), ("even", _even)):
        cast, student = _cast(objective, reward=reward)
        total = torch.stack([objective.loss("student", cast, batch, turn(step))[0] for step in range(8)]).mean()
        slopes[label] = float(torch.autograd.grad(total, student.offset)[0])
    toward = _direction(objective, batch)
    yield holds("pairs: pulled towards the preferred", slopes["liked"] * toward < 0.0 < slopes["disliked"] * toward)
    # offline the noise goes with winner and loser, so that the two are alike in the mean alone
    turned = slopes["liked"] / slopes["disliked"] + 1.0
    yield below("pairs: the other preference turns the sign", turned, 1e-6 if online else 0.3)


def _direction(objective: DistributionMatching, batch: Batch) -> float:
    """The sign by which the bend moves samples towards what is liked."""
    cast, student = _cast(objective)
    made = replace(objective.rollout, gradient="whole").make(cast["student"], batch, turn())  # type: ignore[type-var]
    return float(torch.autograd.grad(liking(made.x0, {}).mean(), student.offset)[0])


def _sides(made: Made, won: Tensor) -> Iterator[Check]:
    winner, loser = preference.sides(made, won)
    gap = liking(winner, {}) - liking(loser, {})
    yield holds("pairs: winners are preferred", bool((gap >= 0.0).all()))


def pairs_checks(recipe: Recipe, objective: DistributionMatching, term: PreferredPairs) -> Iterator[Check]:
    """PSO offline: the same at the reference; a margin is the difference of two gains in squared error."""
    yield from _pairs(objective)
    batch = world(VP(), "v").batch(COUNT)
    cast, _ = _cast(objective, bent=0.05)
    winner = batch.x0 if term.winners == "data" else None
    made = objective.rollout.make(cast["teacher"], batch, turn())
    won = preference.preferred(made, cast, batch)
    found = term.loss(made, cast, batch, turn(1))[1]["margin"]
    again = turn(1)
    asked = sorted({t for grid in term.grids.of(VP()).values() for t in grid})
    t = times(asked[again.pick(torch.ones(len(asked)))], batch.x0)
    first, second = made.x0.detach().chunk(2)
    ahead = won[:, None, None] >= 0
    mine = [winner if winner is not None else torch.where(ahead, first, second)]
    mine.append(first if winner is not None else torch.where(ahead, second, first))
    gains = []
    for x in mine:
        x_t = VP().alpha(t)[:, None, None] * x + VP().sigma(t)[:, None, None] * again.noise(x)
        errors = [
            (term.jump(cast[role], x_t, t, torch.zeros_like(t), batch.cond) - x).square().flatten(1).mean(1)
            for role in ("teacher", "student")
        ]
        gains.append(errors[0] - errors[1])
    yield below("pairs: margin of errors", found - float(term.beta * (gains[0] - gains[1]).detach().mean()), 1e-6)


def gap_checks(recipe: Recipe, objective: DistributionMatching, term: PreferenceGap) -> Iterator[Check]:
    """Distillation-DPO: x is multiplied, so that its gradient is not zero; equal samples give none."""
    plain = replace(term, guidance=UniformScale(1.0, 1.0))
    batch = Batch(torch.zeros(8, 1, dtype=torch.float64), {}, {})
    laws = {"teacher": (0.0, 1.0), "winner": (0.6, 0.8), "loser": (-0.5, 1.3)}
    roles = {n: exact(gaussian(torch.tensor([m], dtype=torch.float64), s), VP(), "v") for n, (m, s) in laws.items()}
    cast = Cast(roles, rewards={"reward": liking})
    x = torch.linspace(-1.0, 1.5, 16, dtype=torch.float64)[:, None].requires_grad_()
    for form in (plain, replace(plain, lose=1.0, prefer=0.0), replace(plain, lose=0.3, prefer=0.7)):
        again = turn()
        (pull,) = torch.autograd.grad(form.loss(Made(x, x, x[:, 0]), cast, batch, turn())[0], x)
        form.guidance.draw(8, again)
        t, noise = form.times.draw(VP(), 8, again), again.noise(batch.x0)
        wanted = _by_row(form, roles, x.detach(), preference.preferred(Made(x, x, t), cast, batch), t, noise)
        label = f"gap, lose {form.lose:g} prefer {form.prefer:g}: "
        yield below(f"{label}gradient in each sample", pull - wanted, 1e-6)
        yield holds(f"{label}not zero in any sample", bool((pull.abs() > 1e-6).all()))
    plain = replace(plain, prefer=0.0)
    one = torch.linspace(-1.0, 1.5, 8, dtype=torch.float64)[:, None].requires_grad_()
    same = torch.cat([one, one])
    alike = Cast({**roles, "loser": roles["winner"]}, rewards={"reward": liking})
    loss = replace(plain, lose=1.0).loss(Made(same, same, same[:, 0]), alike, batch, turn())[0]
    yield below("gap: equal samples give no gradient", torch.autograd.grad(loss, one)[0], 1e-6)
    right = Cast(dict.fromkeys(laws, roles["teacher"]), rewards={"reward": liking})
    loss = plain.loss(Made(x, x, x[:, 0]), right, batch, turn())[0]
    yield below("gap: none where both laws are the teacher's", torch.autograd.grad(loss, x)[0], 1e-12)
    for role in ("winner", "loser"):
        law = gaussian(torch.tensor([laws[role][0]], dtype=torch.float64), laws[role][1])
        drawn = law.draw(4096, torch.Generator().manual_seed(0))
        many = torch.full((4096,), 400.0, dtype=torch.float64)
        g = preference.preference_gradient(roles["teacher"], roles[role], drawn, many, torch.randn_like(drawn), {})
        found = float(g.mean()) * laws[role][0]
        yield between(f"gap: the {role}'s KL falls along minus its gradient", found, 1e-3, math.inf)


def _by_row(
    form: PreferenceGap, roles: Mapping[str, Denoiser], x: Tensor, won: Tensor, t: Tensor, noise: Tensor
) -> Tensor:  # fmt: skip
    """What each of twins [16, 1] should have for a gradient, row by row."""
    first = won[:, None] >= 0
    win = torch.cat([first, ~first])
    t, noise = torch.cat([t, t]), torch.cat([noise, noise])
    x_t = VP().alpha(t)[:, None] * x + VP().sigma(t)[:, None] * noise
    real, best, worst = (roles[name].eps(x_t, t, {}) for name in ("teacher", "winner", "loser"))
    own = torch.where(win, real - best, -form.lose * (real - worst))
    return (own + form.prefer * (best - worst)) / 8


def denoise_checks(recipe: Recipe, objective: DistributionMatching, term: DenoisePreferred) -> Iterator[Check]:
    """Winners teach the winners' network, losers the losers'."""
    stage = world(VP(), "v")
    batch, x = stage.batch(64), torch.cat([leaf(64, 6), leaf(64, 7)])
    made, reward = Made(x, x, x[:, 0, 0]), {"reward": liking}
    first, second = x.chunk(2)
    ahead = (liking(first, {}) >= liking(second, {}))[:, None, None]
    parts = {"winner": torch.where(ahead, first, second), "loser": torch.where(ahead, second, first)}
    for role, part in parts.items():
        fake = stage.teacher()
        found = replace(term, role=role).loss(made, Cast({role: fake}, rewards=reward), batch, turn())[0]
        again = turn()
        t = term.times.draw(VP(), 64, again)
        wanted = denoising_loss(fake, Made(part, part, t), t, again.noise(part), batch.cond, term.weight)
        yield below(f"{role}: denoises the {role}s alone", found - wanted, 1e-12)
    asked: list[Tensor] = []

    def listening(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        asked.append(cond.get("s", torch.zeros_like(t)))
        return stage.teacher().raw(x, t, cond)

    began = torch.full((128,), 259.0, dtype=torch.float64)
    net = Denoiser(listening, VP(), "v")
    term.loss(replace(made, t=began), Cast({term.role: net}, rewards=reward), batch, turn())
    yield holds("scores are told where the step began", bool((asked[0] == 259.0).all()))
    own = sorted(name for name, terms in objective.terms.items() if any(getattr(t, "role", "") == name for t in terms))
    yield holds("each network learns its own side", own == ["loser", "winner"])


def faithful_checks(recipe: Recipe, objective: DistributionMatching, term: Faithful) -> Iterator[Check]:
    """ROCM: the closed forms against integrals, the sum over a walk, zero at the reference, a pull back beside it."""
    x = torch.linspace(-30.0, 40.0, 200_001, dtype=torch.float64)
    dx = float(x[1] - x[0])
    for d in (0.1, 1.0, 3.0):
        p, q = (Normal(torch.tensor(m, dtype=torch.float64), 1.0) for m in (0.0, d))
        lp, lq = p.log_prob(x), q.log_prob(x)
        middle = torch.logaddexp(lp, lq) - math.log(2.0)
        wanted = {
            "kl": (lp.exp() * (lp - lq)).sum() * dx,
            "hellinger": 1.0 - (0.5 * (lp + lq)).exp().sum() * dx,
            "fisher": (lp.exp() * d**2).sum() * dx,
            "js": 0.5 * ((lp.exp() * (lp - middle)).sum() + (lq.exp() * (lq - middle)).sum()) * dx,
        }
        for name, divergence in faithful.DIVERGENCES.items():
            found = float(divergence(torch.tensor([[d]], dtype=torch.float64)))
            yield below(f"{name}: closed form against its integral, {d} apart", found - float(wanted[name]), 1e-6)
    batch, alone = world(VP(), "v").batch(64), replace(objective, terms={"student": (term,)})
    for bend in (0.0, 0.2, -0.2):
        cast, student = _cast(alone, bent=bend)
        loss = alone.loss("student", cast, batch, turn(1))[0]
        slope = float(torch.autograd.grad(loss, student.offset)[0])
        if bend:
            yield holds(f"faithful: pulled back, bent by {bend}", slope * bend > 0.0)
            continue
        yield below("faithful: zero at the reference", loss, 1e-12)
        yield below("faithful: no gradient there", slope, 1e-12)
    cast, _ = _cast(alone, bent=0.2)
    for k in range(4):
        made = alone.rollout.make(cast["student"], batch, turn(k))
        by_kl = replace(term, divergence="kl").loss(made, cast, batch, turn())[0]
        total = _summed_kl(term, made, cast, batch)
        yield below(f"faithful: KL summed over a walk of {len(made.before) + 1}", by_kl - term.weight * total, 1e-9)


def _summed_kl(term: Faithful, made: Made, cast: Cast, batch: Batch) -> Tensor:
    """The mean over samples and elements of the divergence of each step's Gaussian from the reference's, summed."""
    total = torch.zeros((), dtype=torch.float64)
    for step in (*made.before, made):
        theirs = term.jump(cast["teacher"], step.x, step.t, torch.zeros_like(step.t), batch.cond)
        a, sigma = (1.0, term.last) if step.s is None else (VP().alpha(step.s[0]), VP().sigma(step.s[0]))
        spread = torch.full_like(theirs, float(sigma))
        total = total + kl_divergence(Normal(a * step.x0, spread), Normal(a * theirs, spread)).mean()
    return total
