"""Latent Consistency Models as recipes: of the whole network, and as a LoRA.

Guidance scales follow u + w (c - u); a paper's omega of the form c + omega (c - u) is w = 1 + omega.
"""

from fewstep.models.spec import Boundary

from .consistency import Consistency
from .distances import PseudoHuber, unweighted
from .jumps import LcmJump
from .player import PlayerSettings
from .recipe import Needs, Recipe, Sampling, Stage
from .student import Student
from .times import GridPairs, LcmGrids, UniformScale
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
    objective = Consistency(
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
    objective = Consistency(
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
