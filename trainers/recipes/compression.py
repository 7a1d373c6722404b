"""Smaller students as recipes: a network is cut, narrowed or simplified, and learns from the whole one.

Defaults suit the built-in family. Guidance scales follow u + w (c - u).
"""

from dataclasses import replace

from ..errors import RecipeError
from ..loop.player import PlayerSettings
from ..networks.probing import Probe
from ..networks.student import Student
from ..networks.surgery import Cut, Run
from ..objectives.distillation import KnowledgeDistillation
from ..objectives.reflow import KINDS, Annealing, AnnealingReflow
from ..parts.distances import Squared, snr_plus_one
from ..parts.pairs import Pairs
from ..parts.times import EvenGrids, GridTimes, UniformScale
from ..parts.transitions import NoisedData
from .lcm import lcm
from .recipe import Needs, Recipe, Sampling, Stage


def bk_sdm(
    *, steps: int = 2000, lr: float = 3e-4, middle: bool = False, layers: tuple[int, ...] | None = None,
    stages: int | None = None, task: float = 1.0, output: float = 1.0, feature: float = 1.0, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """BK-SDM, Kim et al. 2023 (arXiv 2305.15798): a block-pruned teacher, still of many steps; students start from it.

    `task |F - v|^2 + output |F - F_T|^2 + feature sum_l |f_l - f_T,l|^2`, each weight 1. `middle`, `layers`, `stages`
    say what stays (`trainers.networks.surgery.Cut`). The paper: lr 5e-5, 50,000 steps of batch 256.
    """
    distil = _distillation("bk-sdm", steps, lr, UniformScale(1.0, 1.0), task=task, output=output, feature=feature)
    return Recipe(
        name="bk-sdm",
        family="compression",
        paper="Kim et al. 2023, BK-SDM: Architecturally Compressed Stable Diffusion, arXiv:2305.15798",
        needs=Needs(),
        student=Student(cut=Cut(middle=middle, layers=layers, stages=stages)),
        stages=(distil,),
        sampling=Sampling(
            sampler="ddim", grids=EvenGrids((4, 8, 25)), stochastic=False,
            guidance_mode="cfg", guidance_default=guidance, guidance_range=(1.0, 10.0),
        ),
    )  # fmt: skip


def edgefusion(
    *, steps: int = 3000, share: float = 0.5, lr: float = 5e-4, lcm_lr: float = 3e-4, middle: bool = False,
    layers: tuple[int, ...] | None = None, stages: int | None = None, task: float = 1.0, output: float = 1.0,
    feature: float = 1.0, start_share: float = 0.2, guidance_width: int = 256,
) -> Recipe:  # fmt: skip
    """EdgeFusion, Castells et al. 2024 (arXiv 2404.11925): BK-SDM's pruning and distillation, then LCM.

    The first `share` of the steps distils the pruned network from the whole one it was cut from, the rest is LCM with
    the large teacher. With `init` a few-step student, `task=0`. The paper: skipping the first stage costs 2.7 FID.
    """
    distil = _distillation(
        "kd", round(share * steps), lr, LCM_SCALES, task=task, output=output, feature=feature, start_share=start_share
    )
    cut = Cut(middle=middle, layers=layers, stages=stages)
    return _before_lcm(
        "edgefusion", "Castells et al. 2024, EdgeFusion: On-Device Text-to-Image Generation, arXiv:2404.11925",
        Student(cut=cut), (distil,), steps=steps - round(share * steps), lr=lcm_lr, width=guidance_width,
    )  # fmt: skip


def a_sdm(
    *, steps: int = 3000, share: float = 0.25, joint: float = 0.35, lr: float = 5e-4, lcm_lr: float = 3e-4,
    middle: bool = True, layers: tuple[int, ...] | None = (0, 1), task: float = 1.0, start_share: float = 0.2,
    guidance_width: int = 256,
) -> Recipe:  # fmt: skip
    """A-SDM's model assembly, Zhu et al. 2024 (arXiv 2406.00210): pruned stages learn apart, then together, then LCM.

    In the first `share` of the steps each stage is fed what the whole network's stage is fed and learns its output; in
    the next `joint` the assembled network is distilled. With `init` a few-step student, `task=0`. Unverified: shares,
    weights and layer lists; decided: ours.
    """
    apart = _distillation("apart", round(share * steps), lr, LCM_SCALES, task=0.0, output=0.0, alone=1.0)
    together = _distillation("kd", round(joint * steps), lr, LCM_SCALES, task=task, start_share=start_share)
    left = steps - apart.steps - together.steps
    return _before_lcm(
        "a-sdm", "Zhu et al. 2024, A-SDM: Accelerating Stable Diffusion through Model Assembly, arXiv:2406.00210",
        Student(cut=Cut(middle=middle, layers=layers)), (apart, replace(together, start="previous")),
        steps=left, lr=lcm_lr, width=guidance_width,
    )  # fmt: skip


def vdmini(
    *, steps: int = 3000, share: float = 0.5, lr: float = 5e-4, lcm_lr: float = 3e-4, remove: int = 1,
    task: float = 1.0, feature: float = 0.1, start_share: float = 0.2, guidance_width: int = 256,
) -> Recipe:  # fmt: skip
    """VDMini, Wu et al. 2024 (arXiv 2411.18375), for pictures: blocks ranked by what their absence changes.

    The `remove` least go; distillation with the paper's 0.1 on features (its ICD loss), then LCM. Its motion loss needs
    video. With `init` a few-step student, `task=0`.
    """
    distil = _distillation(
        "kd", round(share * steps), lr, LCM_SCALES, task=task, feature=feature, start_share=start_share
    )
    return _before_lcm(
        "vdmini", "Wu et al. 2024, Individual Content and Motion Dynamics Preserved Pruning, arXiv:2411.18375",
        Student(remove=remove), (distil,), steps=steps - distil.steps, lr=lcm_lr, width=guidance_width,
    )  # fmt: skip


def slim(
    *, steps: int = 4000, share: float = 0.6, lr: float = 1e-3, lcm_lr: float = 3e-4, width: float = 0.6,
    anneal: float = 0.6, schedule: str = "linear", pairs: int = 4096, pair_steps: int = 8, start_share: float = 0.2,
    guidance_width: int = 256,
) -> Recipe:  # fmt: skip
    """SlimFlow, Zhu et al. 2024 (arXiv 2407.12718): a narrow network by annealing reflow on a wide one's pairs; LCM.

    `|x_theta(x_t) - x^|^2 (SNR + 1)`, x^ the teacher's sample of z, x_t of x^ and `sqrt(1 - beta^2) z + beta n`; beta
    falls from 1 to 0 over `anneal` of the first stage, as "linear", "cosine" or "exponential". It is on the teacher's
    own path. Each weight starts as the corner of the wide one; the paper starts from nothing, flips pairs, and then
    distils to one step where here is LCM. The paper: 3 to 28 million weights, 300,000 of 500,000 steps.
    """
    if schedule not in KINDS or not 0.0 < anneal <= 1.0:
        raise RecipeError(f"slim: schedule is {schedule!r}, anneal {anneal}; use {', '.join(KINDS)}, and above 0 to 1")
    objective = AnnealingReflow(
        times=GridTimes(50, start_share),
        source=NoisedData(pure_at_start=True),
        distance=Squared(),
        weight=snr_plus_one,
        anneal=Annealing(anneal, schedule),
    )
    learn = PlayerSettings(lr=lr, warmup=50, cooldown=0.6, ema={"kept": 0.99})
    drawn = Pairs(count=pairs, steps=pair_steps, guidance=LCM_SCALES)
    reflow = Stage(
        name="reflow", objective=objective, player_settings={"student": learn}, steps=round(share * steps), pairs=drawn
    )
    return _before_lcm(
        "slim", "Zhu et al. 2024, SlimFlow: Training Smaller One-Step Diffusion Models, arXiv:2407.12718",
        Student(width=width), (reflow,), steps=steps - reflow.steps, lr=lcm_lr, width=guidance_width,
    )  # fmt: skip


def linfusion(
    *, steps: int = 2000, share: float = 0.5, lr: float = 5e-4, lcm_lr: float = 3e-4, task: float = 1.0,
    output: float = 0.5, feature: float = 0.5, start_share: float = 0.2, guidance_width: int = 256,
) -> Recipe:  # fmt: skip
    """LinFusion, Liu et al. 2024 (arXiv 2409.02097): self-attention made linear, distilled, then LCM.

    `task |F - v|^2 + 0.5 |F - F_T|^2 + 0.5 sum_l |f_l - f_T,l|^2`, then LCM. The paper trains the attention alone, lr
    1e-4; here all weights train. With `init` a few-step student, `task=0`.
    """
    distil = _distillation(
        "kd", round(share * steps), lr, LCM_SCALES, task=task, output=output, feature=feature, start_share=start_share
    )
    return _before_lcm(
        "linfusion", "Liu et al. 2024, LinFusion: 1 GPU, 1 Minute, 16K Image, arXiv:2409.02097",
        Student(attention="linear"), (distil,), steps=steps - distil.steps, lr=lcm_lr, width=guidance_width,
    )  # fmt: skip


def ppcl(
    *, steps: int = 2000, lr: float = 1e-4, runs: tuple[str, ...] | None = None, least: float = 0.95,
    rise: float = 0.01, alone: float = 0.5, output: float = 0.0, start_share: float = 0.1,
) -> Recipe:  # fmt: skip
    """PPCL, Ma et al. 2025 (arXiv 2511.16156): one layer for each near-linear run of a transformer's layers.

    `mean |f_s - f_t|^2 / |f_t|^2` of both streams behind each run; the new layers alone train, each from its run's
    middle one. In the share `alone` of the steps they see the teacher's inputs (the paper: all; its code: by turns).
    The student is sampled as its teacher, few-step or not. The paper compares unit vectors, lr 1e-5, and goes on to
    prune widths. runs: STACK.FIRST-LAST; where None they are found (`trainers.networks.probing`).
    """
    distil = _distillation("ppcl", steps, lr, None, task=0.0, output=output, alone=alone, start_share=start_share)
    return Recipe(
        name="ppcl",
        family="compression",
        paper="Ma et al. 2025, PPCL: Pluggable Pruning with Contiguous Layer Distillation, arXiv:2511.16156",
        needs=Needs(),
        student=Student(runs=tuple(Run.read(run) for run in runs or ()), probe=Probe(least=least, rise=rise)),
        stages=(distil,),
        sampling=None,
    )


LCM_SCALES = UniformScale(1.5, 6.0)
"""The scales of `lcm`, which a student that is distilled before it must know."""


def _distillation(
    name: str, steps: int, lr: float, guidance: UniformScale | None, *, task: float = 1.0, output: float = 1.0,
    feature: float = 1.0, start_share: float = 0.0, alone: float = 0.0,
) -> Stage:  # fmt: skip
    """A stage in which a changed student learns from the network it was made from."""
    objective = KnowledgeDistillation(
        times=GridTimes(50, start_share),
        source=NoisedData(pure_at_start=True),
        distance=Squared(),
        weight=snr_plus_one,
        guidance=guidance,
        task=task,
        output=output,
        feature=feature,
        alone=alone,
    )
    learn = PlayerSettings(lr=lr, warmup=50, cooldown=0.6, ema={"kept": 0.99})
    return Stage(name=name, objective=objective, player_settings={"student": learn}, steps=steps, teacher="init")


def _before_lcm(
    name: str, paper: str, student: Student, stages: tuple[Stage, ...], *, steps: int, lr: float, width: int
) -> Recipe:
    """`lcm` after stages of distillation on a student that was changed; no LCM where no steps are left for it.

    Errors: `RecipeError` where the shares leave a stage nothing.
    """
    if steps < 0 or any(stage.steps < 1 for stage in stages):
        raise RecipeError(f"{name}: its stages get {[*(s.steps for s in stages), steps]} steps; change steps or share")
    base = lcm(steps=steps, lr=lr, guidance_low=LCM_SCALES.low, guidance_high=LCM_SCALES.high, guidance_width=width)
    last = (replace(base.stages[0], start="previous"),) if steps else ()
    return replace(
        base, name=name, family="compression", paper=paper, student=replace(student, guidance_width=width),
        stages=(*stages, *last),
    )  # fmt: skip
