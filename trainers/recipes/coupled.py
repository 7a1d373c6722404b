"""Recipes that couple noise and samples: by a teacher's own pairs, by a learned encoder, by an inverse student.

Guidance scales follow u + w (c - u); a paper's omega of the form c + omega (c - u) is w = 1 + omega.
"""

from dataclasses import replace

from ..errors import RecipeError
from ..loop.player import PlayerSettings
from ..networks.student import Student
from ..objectives.backward import BackwardDistillation, Shift
from ..objectives.consistency import Consistency
from ..objectives.invertible import Invertible, LowerEdges, RisingPairs, UpperEdges
from ..objectives.reflow import Annealing, AnnealingReflow
from ..objectives.variational import VariationalCoupling
from ..parts.curricula import Fixed
from ..parts.distances import Absolute, PseudoHuber, Squared, unweighted
from ..parts.ends import PhaseEdges
from ..parts.jumps import DdimJump, ToClean
from ..parts.pairs import Pairs
from ..parts.rollout import BackwardSimulation
from ..parts.steps import OdeStep, SameNoise
from ..parts.times import EvenGrids, GridPairs, GridTimes, UniformScale
from ..parts.transitions import NoisedData
from .consistency import tuned
from .forms import FROM_DATA, ONE, chain, learn, multistep, single, staged
from .recipe import Needs, Recipe, RecipeFunction, Stage


def get(
    *, steps: int = 3000, lr: float = 5e-4, pairs: int = 8192, pair_steps: int = 32, guidance: float = 3.0
) -> Recipe:
    """GET's offline distillation, Geng et al. 2023 (arXiv 2401.08639): `|x0_theta(z) - x^|` on stored pairs, no data.

    z is the noise that the teacher's ODE took to x^. Of the method only the loss: its generative equilibrium
    transformer (injected noise, weight-tied blocks solved to a fixed point, whose solver steps trade time for quality)
    is left out, and the student is the teacher's own network at the noisiest time, from its weights, where GET begins
    at random ones. The paper: 1 to 2 million pairs of EDM. Unverified: its distance; decided: absolute difference.
    """
    objective = AnnealingReflow(
        times=GridTimes(1), source=NoisedData(), distance=Absolute(), weight=unweighted, anneal=Annealing(0.0)
    )
    plan = Pairs(count=pairs, steps=pair_steps, guidance=UniformScale(guidance, guidance))
    stage = Stage(name="get", objective=objective, player_settings={"student": learn(lr)}, steps=steps, pairs=plan)
    paper = "Geng et al. 2023, One-Step Diffusion Distillation via Deep Equilibrium Models, arXiv:2401.08639"
    return staged("get", paper, (stage,), chain((1,)), needs=Needs(data=False), family="rectified-flow")


def vct(
    *, steps: int = 3000, lr: float = 3e-4, encoder_lr: float = 3e-4, q: float = 2.0, stages: int = 8, kl: float = 10.0
) -> Recipe:
    """Variational consistency training, Silvestri et al. 2025 (arXiv 2502.18197): ECT whose noise an encoder couples.

    `eps = mean(x0) + std(x0) n` in x_t and x_r, ECT's loss, and `kl / (t_max - r) KL(N(mean, std^2) || N(0, 1))`; as in
    its code softplus makes the deviation, here moved so that a fresh encoder says N(0, 1). The encoder is a copy of the
    network with twice the outputs. The loss is taken once in each player's turn, the paper's once for both. Left out:
    the kernel that mixes linearly, and the encoder at sampling, which the paper asks again at a second step.
    """
    objective = VariationalCoupling(base=tuned(q, stages, SameNoise()), kl=kl)
    players = {"student": learn(lr), "encoder": PlayerSettings(lr=encoder_lr, warmup=50, cooldown=0.4)}
    stage = Stage(name="vct", objective=objective, player_settings=players, steps=steps)
    paper = "Silvestri et al. 2025, Training Consistency Models with Variational Noise Coupling, arXiv:2502.18197"
    return staged("vct", paper, (stage,), multistep(), needs=FROM_DATA)


def icd(
    *, steps: int = 3000, lr: float = 3e-4, phases: int = 4, points: int = 40, huber_c: float = 0.001,
    preserve: float = 1.5, guidance_high: float = 6.0, guidance_default: float = 3.0, guidance_width: int = 256,
    target_ema: float = 0.95, order: int = 1,
) -> Recipe:  # fmt: skip
    """Invertible consistency distillation, Starodubcev et al. 2024 (arXiv 2406.14539): a student and an inverse of it.

    The student lands on the lower edge of its phase, under a guidance scale that it is told; the inverse, a second
    player, on the upper edge, unguided; both Huber. Preservation: across a whole phase each undoes the other, unguided,
    `preserve` times Huber; added to the player's own loss where the paper takes steps of their own. Both are sold, the
    inverse beside the student as NAME-inverse, for `invert` requests; scales from 1 on, so that `guidance_ramp`
    (dynamic guidance) may turn it off. Here all weights are trained, and the teacher is guided by two evaluations; the
    paper has LoRA of rank 64 on a teacher that was told the scale, phases of 13, 13, 13 and 11 of 50 steps, and targets
    of the weights of the moment (target_ema 0), which at learning rates as high as here do not settle.
    """
    if phases < 1 or points % phases:
        raise RecipeError(
            f"icd: {phases} phases do not divide the {points} points of its grid; change points or phases"
        )
    parts = {
        "source": NoisedData(), "jump": DdimJump(), "distance": PseudoHuber(huber_c), "weight": unweighted,
        "step": OdeStep(order),
    }  # fmt: skip
    reverse = Consistency(
        pairs=GridPairs(points, to_clean=True), ends=PhaseEdges(Fixed(phases)), cfg=True, target="target",
        guidance=UniformScale(1.0, guidance_high), **parts,  # type: ignore[arg-type]
    )  # fmt: skip
    forward = Consistency(
        pairs=RisingPairs(points), ends=UpperEdges(phases), guidance=ONE, cfg=False, target="inverse.target",
        **parts,  # type: ignore[arg-type]
    )  # fmt: skip
    objective = Invertible(
        reverse=reverse, forward=forward, phases=phases, points=points, preserve=preserve, cycle=PseudoHuber(huber_c)
    )
    sampling = replace(
        chain((phases,), "phased", phases), guidance_mode="embedded", guidance_default=guidance_default,
        guidance_range=(1.0, guidance_high),
    )  # fmt: skip
    upwards = replace(chain((phases,)), grids=LowerEdges(phases, points))
    players = {name: learn(lr, target=target_ema) for name in objective.players}
    stage = Stage(name="icd", objective=objective, steps=steps, player_settings=players)
    paper = "Starodubcev et al. 2024, Invertible Consistency Distillation, arXiv:2406.14539"
    recipe = staged("icd", paper, (stage,), sampling, Student(guidance_width=guidance_width))
    return replace(recipe, beside={"inverse": upwards})


def imagine_flash(
    *, steps: int = 2000, lr: float = 3e-4, parts: int = 8, shift: float = 1.5, guidance: float = 3.0, order: int = 1
) -> Recipe:
    """Imagine Flash, Kohler et al. 2024 (arXiv 2405.05224): the teacher corrects the student on its own walk.

    Its clean estimate, carried to gamma(t), is held against what the teacher makes of it there. Noise correction is the
    runtime's, `noise_correction` of a request; the GAN is left out. The paper: 1 to 3 steps.
    Unverified: gamma(t), which noise carries the estimate there, how many steps the teacher has from there; decided:
    `tau_T (tau / tau_T)^shift` in flow time, so that t = T leaves the whole picture to the teacher and lower times the
    details; the student's own noise estimate, so that an exact student has no gradient at shift 1; `parts`.
    """
    if shift < 1.0 or parts < 1:
        raise RecipeError(f"imagine-flash: shift is {shift} and parts {parts}; both must be at least 1")
    counts = (1, 2, 3, 4)
    objective = BackwardDistillation(
        rollout=BackwardSimulation(EvenGrids(counts), (), ToClean(), chained=True), shift=Shift(shift),
        step=OdeStep(order, parts), distance=Squared(), guidance=UniformScale(guidance, guidance), cfg=True,
    )  # fmt: skip
    paper = "Kohler et al. 2024, Imagine Flash: Accelerating Emu Diffusion Models with Backward Distillation, "
    sampling = chain(counts)
    return single(
        "imagine-flash", paper + "arXiv:2405.05224", objective, learn(lr), steps, sampling, needs=Needs(data=False)
    )


COUPLED: dict[str, RecipeFunction] = {"vct": vct, "get": get, "icd": icd, "imagine-flash": imagine_flash}
