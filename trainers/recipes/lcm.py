"""Latent Consistency Models as recipes: of the whole network, and as a LoRA.

Guidance scales follow u + w (c - u); a paper's omega of the form c + omega (c - u) is w = 1 + omega.
"""

from fewstep.models.spec import Boundary

from ..networks.student import Student
from ..objectives.consistency import Consistency
from ..parts.distances import PseudoHuber, unweighted
from ..parts.jumps import LcmJump
from ..parts.steps import OdeStep
from ..parts.times import GridPairs, LcmGrids, UniformScale
from ..parts.transitions import NoisedData
from .forms import learn, multistep, single
from .recipe import Recipe, Sampling


def lcm(
    *, steps: int = 2000, lr: float = 3e-4, points: int = 50, huber_c: float = 0.03, target_ema: float = 0.95,
    guidance_low: float = 1.5, guidance_high: float = 6.0, guidance_default: float = 3.0, guidance_width: int = 256,
    order: int = 1,
) -> Recipe:  # fmt: skip
    """Latent Consistency Models, Luo et al. 2023, algorithm 1 (arXiv 2310.04378).

    `huber(f_theta(x_t, w, c, t) - f_ema(x_s, w, c, s))`, x_s one DDIM step of the guided teacher, 20 of 1000 below t;
    w is drawn per sample and embedded. order: the solver's, 1 (DDIM) or 2 (Heun); the paper also takes others. The
    paper: omega in [5, 15], lr 1e-4 (8e-6 for SD), target average 0.95, huber c 0.001.
    """
    return single(
        "lcm",
        "Luo et al. 2023, Latent Consistency Models, arXiv:2310.04378",
        latent_consistency(points, huber_c, UniformScale(guidance_low, guidance_high), "target", order),
        learn(lr, target=target_ema),
        steps,
        Sampling(
            sampler="lcm", grids=LcmGrids((1, 2, 4, 8), points), stochastic=True, boundary=Boundary(),
            guidance_mode="embedded", guidance_default=guidance_default, guidance_range=(guidance_low, guidance_high),
        ),
        Student(guidance_width=guidance_width),
    )  # fmt: skip


def lcm_lora(
    *, steps: int = 2000, lr: float = 1e-3, rank: int = 16, points: int = 50, huber_c: float = 0.001,
    guidance: float = 3.0, order: int = 1, target_ema: float = 0.95,
) -> Recipe:  # fmt: skip
    """LCM-LoRA, Luo et al. 2023 (arXiv 2311.05556): LCM's loss on low-rank updates; fixed guidance.

    The update is merged when saved, and kept beside as `pytorch_lora_weights.safetensors`. The paper: rank 64, and the
    weights of the moment as target, target_ema 0; at learning rates as high as here those do not settle.
    """
    return single(
        "lcm-lora",
        "Luo et al. 2023, LCM-LoRA, arXiv:2311.05556",
        latent_consistency(points, huber_c, UniformScale(guidance, guidance), "target", order),
        learn(lr, target=target_ema),
        steps,
        multistep(Boundary(), points),
        Student(lora_rank=rank),
    )


def latent_consistency(points: int, huber_c: float, guidance: UniformScale, target: str, order: int = 1) -> Consistency:
    """The loss of both: pairs of a grid of `points`, DDIM under guidance between them, LCM's scalings, Huber."""
    return Consistency(
        pairs=GridPairs(points),
        source=NoisedData(pure_at_start=True),
        jump=LcmJump(),
        distance=PseudoHuber(huber_c),
        weight=unweighted,
        guidance=guidance,
        cfg=True,
        target=target,
        step=OdeStep(order),
    )
