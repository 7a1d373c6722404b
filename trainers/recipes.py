"""The recipes: every method as a function that returns its whole run.

Defaults suit the built-in family (3 million weights, 8x8 latents, one to two CPU cores, minutes).

Guidance scales follow u + w (c - u); a paper's omega of the form c + omega (c - u) is w = 1 + omega.
"""

from dataclasses import replace

from fewstep.models.spec import Boundary

from .consistency import ConsistencyDistillation
from .discriminator import Adversary
from .distances import PseudoHuber, Squared, snr_plus_one, truncated_snr, unweighted
from .distillation import KnowledgeDistillation
from .distribution import DistributionMatching
from .errors import RecipeError
from .jumps import LcmJump
from .player import PlayerSettings
from .progressive import ProgressiveHalving
from .recipe import Needs, Recipe, RecipeFunction, Sampling, Stage
from .rollout import BackwardSimulation
from .student import Student
from .surgery import Cut
from .times import EvenGrids, GridPairs, GridTimes, HalvingPairs, LcmGrids, UniformScale, UniformTimes
from .transitions import NoisedData


def lcm(
    *, steps: int = 2000, lr: float = 3e-4, points: int = 50, huber_c: float = 0.03, target_ema: float = 0.95,
    guidance_low: float = 1.5, guidance_high: float = 6.0, guidance_default: float = 3.0, guidance_width: int = 256,
) -> Recipe:  # fmt: skip
    """Latent Consistency Models, Luo et al. 2023, algorithm 1 (arXiv 2310.04378).

    `huber(f_theta(x_t, w, c, t) - f_ema(x_s, w, c, s))`, x_s one DDIM step of the guided teacher, 20 of 1000 below t;
    w is drawn per sample and embedded. The paper: omega in [5, 15], lr 1e-4 (8e-6 for SD), target average 0.95,
    huber c 0.001.
    """
    objective = ConsistencyDistillation(
        pairs=GridPairs(points),
        source=NoisedData(pure_at_start=True),
        jump=LcmJump(),
        distance=PseudoHuber(huber_c),
        weight=unweighted,
        guidance=UniformScale(guidance_low, guidance_high),
        cfg=True,
        target="target",
    )
    learn = PlayerSettings(lr=lr, warmup=50, cooldown=0.4, ema={"target": target_ema, "kept": 0.99})
    return Recipe(
        name="lcm",
        family="consistency",
        paper="Luo et al. 2023, Latent Consistency Models, arXiv:2310.04378",
        needs=Needs(),
        student=Student(guidance_width=guidance_width),
        stages=(Stage(name="lcm", objective=objective, player_settings={"student": learn}, steps=steps),),
        sampling=Sampling(
            sampler="lcm", grids=LcmGrids((1, 2, 4, 8), points), stochastic=True, boundary=Boundary(),
            guidance_mode="embedded", guidance_default=guidance_default, guidance_range=(guidance_low, guidance_high),
        ),
    )  # fmt: skip


def lcm_lora(
    *, steps: int = 2000, lr: float = 1e-3, rank: int = 16, points: int = 50, huber_c: float = 0.001,
    guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """LCM-LoRA, Luo et al. 2023 (arXiv 2311.05556): LCM's loss on low-rank updates; fixed guidance, target theta.

    The update is merged when saved, and kept beside as `pytorch_lora_weights.safetensors`. The paper: rank 64.
    """
    objective = ConsistencyDistillation(
        pairs=GridPairs(points),
        source=NoisedData(pure_at_start=True),
        jump=LcmJump(),
        distance=PseudoHuber(huber_c),
        weight=unweighted,
        guidance=UniformScale(guidance, guidance),
        cfg=True,
        target="student",
    )
    learn = PlayerSettings(lr=lr, warmup=50, cooldown=0.4, ema={"kept": 0.99})
    return Recipe(
        name="lcm-lora",
        family="consistency",
        paper="Luo et al. 2023, LCM-LoRA, arXiv:2311.05556",
        needs=Needs(),
        student=Student(lora_rank=rank),
        stages=(Stage(name="lcm-lora", objective=objective, player_settings={"student": learn}, steps=steps),),
        sampling=Sampling(
            sampler="lcm", grids=LcmGrids((1, 2, 4, 8), points), stochastic=True, boundary=Boundary(),
            guidance_mode="none", guidance_default=1.0, guidance_range=(1.0, 1.0),
        ),
    )  # fmt: skip


def dmd2(
    *, steps: int = 2000, lr: float = 5e-5, fake_lr: float = 1e-4, every: int = 4, guidance: float = 3.0,
    gan_student: float = 3e-3, gan_critic: float = 1e-2, gan_share: float = 0.5,
    grid_weights: tuple[float, ...] = (2.0, 1.0, 1.0),
) -> Recipe:  # fmt: skip
    """DMD2, Yin et al. 2024 (arXiv 2405.14867): distribution matching, two time scales, GAN, backward simulation.

    Student: `carry(x, (mu_fake - mu_real) / |x - mu_real|) + gan_student softplus(-l(x_t))` every `every` steps. Fake:
    denoising of fresh student samples `+ gan_critic (softplus(l(x_t)) + softplus(-l(data_t)))` every step. One student
    serves 1, 2 and 4 steps; the teacher's guidance is taken in. The paper: ratio 5 to 10, lr 5e-7 to 1e-5.
    """
    grids = LcmGrids((1, 2, 4))
    objective = DistributionMatching(
        rollout=BackwardSimulation(grids, grid_weights, LcmJump()),
        score_times=UniformTimes(0.02, 0.98),
        fake_times=UniformTimes(),
        fake_weight=snr_plus_one,
        guidance=UniformScale(guidance, guidance),
        cfg=True,
        adversary=Adversary(
            student_weight=gan_student, critic_weight=gan_critic, times=UniformTimes(), share=gan_share
        ),
    )
    players = {
        "student": PlayerSettings(lr=lr, every=every, warmup=10, cooldown=0.3, clip_norm=10.0, ema={"kept": 0.98}),
        "fake": PlayerSettings(lr=fake_lr, warmup=10, clip_norm=10.0),
    }
    return Recipe(
        name="dmd2",
        family="distribution",
        paper="Yin et al. 2024, Improved Distribution Matching Distillation, arXiv:2405.14867",
        needs=Needs(critic=True),
        student=Student(),
        stages=(Stage(name="dmd2", objective=objective, player_settings=players, steps=steps),),
        sampling=Sampling(
            sampler="lcm", grids=grids, stochastic=True, boundary=Boundary(),
            guidance_mode="none", guidance_default=1.0, guidance_range=(1.0, 1.0),
        ),
    )  # fmt: skip


def progressive(
    *, steps: int = 400, lr: float = 2e-4, start_steps: int = 32, final_steps: int = 1, guidance: float = 3.0,
    keep_share: float = 0.3,
) -> Recipe:  # fmt: skip
    """Progressive distillation, Salimans & Ho 2022, algorithm 2 (arXiv 2202.00512): rounds that halve the steps.

    `max(SNR, 1) |x~ - x_theta(x_t)|^2`, x~ the clean estimate whose one DDIM step does the teacher's two. `steps` are
    those of each round. The first round also takes in the teacher's guidance (Meng et al. 2022). Rounds below 4 steps
    go on practising 4 and 2, so the last student serves all of them. The paper: 50,000 steps a round.
    """
    counts, n = [], start_steps // 2
    while n >= final_steps:
        counts.append(n)
        n //= 2
    sold = tuple(sorted({n for n in counts if n <= 4} or {counts[-1]}))
    learn = PlayerSettings(lr=lr, warmup=20, cooldown=0.5, ema={"kept": 0.98})
    stages = []
    for n in counts:
        first = n == counts[0]
        objective = ProgressiveHalving(
            pairs=HalvingPairs(n, tuple(k for k in sold if k > n), keep_share),
            source=NoisedData(pure_at_start=True),
            distance=Squared(),
            weight=truncated_snr,
            guidance=UniformScale(guidance, guidance),
            cfg=first,
        )
        who = {"teacher": "teacher", "start": "init"} if first else {"teacher": "previous", "start": "previous"}
        name = f"{2 * n}-to-{n}"
        stages.append(Stage(name=name, objective=objective, player_settings={"student": learn}, steps=steps, **who))
    return Recipe(
        name="progressive",
        family="progressive",
        paper="Salimans & Ho 2022, Progressive Distillation, arXiv:2202.00512",
        needs=Needs(),
        student=Student(),
        stages=tuple(stages),
        sampling=Sampling(
            sampler="ddim", grids=EvenGrids(sold), stochastic=False,
            guidance_mode="none", guidance_default=1.0, guidance_range=(1.0, 1.0),
        ),
    )  # fmt: skip


def bk_sdm(
    *, steps: int = 2000, lr: float = 3e-4, middle: bool = False, layers: tuple[int, ...] | None = None,
    stages: int | None = None, task: float = 1.0, output: float = 1.0, feature: float = 1.0, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """BK-SDM, Kim et al. 2023 (arXiv 2305.15798): a block-pruned teacher, still of many steps; students start from it.

    `task |F - v|^2 + output |F - F_T|^2 + feature sum_l |f_l - f_T,l|^2`, each weight 1. `middle`, `layers`, `stages`
    say what stays (`trainers.surgery.Cut`). The paper: lr 5e-5, 50,000 steps of batch 256.
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
    the next `joint` the assembled network is distilled. Shares, weights and layer lists are ours: the paper's were not
    at hand. With `init` a few-step student, `task=0`.
    """
    apart = _distillation("apart", round(share * steps), lr, LCM_SCALES, task=0.0, output=0.0, alone=True)
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
    task: float = 1.0, start_share: float = 0.2, guidance_width: int = 256,
) -> Recipe:  # fmt: skip
    """SlimFlow's sizes, Zhu et al. 2024 (arXiv 2407.12718): a narrow network taught by a wide one, then LCM.

    Each weight starts as the corner of the wide one. SlimFlow anneals pairs of a rectified flow; here the pairs are
    (x_t, the wide network's estimate) on the teacher's own path, since teachers are on any. With `init` a few-step
    student, `task=0`. The paper: 3 to 28 million weights.
    """
    distil = _distillation("kd", round(share * steps), lr, LCM_SCALES, task=task, feature=0.0, start_share=start_share)
    return _before_lcm(
        "slim", "Zhu et al. 2024, SlimFlow: Training Smaller One-Step Diffusion Models, arXiv:2407.12718",
        Student(width=width), (distil,), steps=steps - distil.steps, lr=lcm_lr, width=guidance_width,
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


LCM_SCALES = UniformScale(1.5, 6.0)
"""The scales of `lcm`, which a student that is distilled before it must know."""


def _distillation(
    name: str, steps: int, lr: float, guidance: UniformScale, *, task: float = 1.0, output: float = 1.0,
    feature: float = 1.0, start_share: float = 0.0, alone: bool = False,
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


RECIPES: dict[str, RecipeFunction] = {
    "lcm": lcm,
    "lcm-lora": lcm_lora,
    "dmd2": dmd2,
    "progressive": progressive,
    "bk-sdm": bk_sdm,
    "edgefusion": edgefusion,
    "a-sdm": a_sdm,
    "vdmini": vdmini,
    "slim": slim,
    "linfusion": linfusion,
}
"""Every recipe by its name. Being listed here is what enters a recipe into `fewstep recipes` and the oracle suite."""


def find_recipe(name: str) -> RecipeFunction:
    """Errors: `RecipeError` listing the recipes."""
    if name not in RECIPES:
        raise RecipeError(f"there is no recipe {name!r}; recipes are {', '.join(RECIPES)}")
    return RECIPES[name]
