"""The distillation of guidance alone as recipes: students of many steps, each at half the cost of its guided teacher.

A student sold here walks its teacher's own chain of first-order steps.
Guidance scales follow u + w (c - u); a paper's omega of the form c + omega (c - u) is w = 1 + omega.
"""

from dataclasses import replace

from ..errors import RecipeError
from ..networks.student import Student
from ..objectives.guidance import GuidanceDistillation
from ..parts.distances import Squared, snr_plus_one, truncated_snr
from ..parts.times import UniformScale, UniformTimes
from ..parts.transitions import NoisedData, TeacherWalk
from .forms import chain, learn, single
from .recipe import Needs, Recipe, RecipeFunction, Sampling

COUNTS = (2, 4, 8, 20, 40)
"""Steps that are sold. The students know every time, so these are only the usual ones."""


def w_embedding(
    *, steps: int = 2000, lr: float = 3e-4, guidance_low: float = 1.0, guidance_high: float = 5.0,
    guidance_default: float = 3.0, guidance_width: int = 256,
) -> Recipe:  # fmt: skip
    """Guided distillation's first stage, Meng et al. 2022, algorithm 1 (arXiv 2210.03142): the scale as an input.

    `max(SNR, 1) |x0_theta(x_t, w) - x0_w(x_t)|^2` on noised data, w even on the paper's range, omega from 0 to 4.
    """
    objective = GuidanceDistillation(
        times=UniformTimes(), source=NoisedData(), distance=Squared(), weight=truncated_snr,
        guidance=UniformScale(guidance_low, guidance_high),
    )  # fmt: skip
    paper = "Meng et al. 2022, On Distillation of Guided Diffusion Models, arXiv:2210.03142"
    sampling = told("w-embedding", guidance_low, guidance_high, guidance_default)
    student = Student(guidance_width=guidance_width)
    return single("w-embedding", paper, objective, learn(lr), steps, sampling, student, family="guidance")


def agd(
    *, steps: int = 2000, lr: float = 1e-3, width: int = 32, walk: int = 4, guidance_low: float = 1.0,
    guidance_high: float = 6.0, guidance_default: float = 3.0,
) -> Recipe:  # fmt: skip
    """Adapter guidance distillation, Jensen & Sadat 2025 (arXiv 2503.07274): a frozen network, adapters that know w.

    Each cross-attention adds what its queries read from tokens of w, the time and the prompt. States are those of
    the guided teacher's own walks, with no data: here a fresh walk of `walk` steps for each, where the paper keeps all
    999 states of walks made beforehand. Squares are of the network's output (the paper's eps; here v or eps). The
    paper: width 320 for Stable Diffusion, w to 12, lr 1e-4, 5000 steps of batch 64.
    """
    objective = GuidanceDistillation(
        times=UniformTimes(), source=TeacherWalk(walk), distance=Squared(), weight=snr_plus_one,
        guidance=UniformScale(guidance_low, guidance_high),
    )  # fmt: skip
    paper = "Jensen & Sadat 2025, Efficient Distillation of Classifier-Free Guidance using Adapters, arXiv:2503.07274"
    sampling = told("agd", guidance_low, guidance_high, guidance_default)
    return single(
        "agd", paper, objective, learn(lr), steps, sampling, Student(adapter_width=width), needs=Needs(data=False),
        family="guidance",
    )  # fmt: skip


def lora_guided(*, steps: int = 2000, lr: float = 1e-3, rank: int = 16, guidance: float = 3.0) -> Recipe:
    """LoRA-enhanced guided distillation, Golnari 2023 (arXiv 2312.06899): low-rank updates take in one scale.

    `|F_theta(x_t) - F_w(x_t)|^2` on noised data; merged when saved, kept beside as LCM-LoRA's are. Unverified: rank,
    scale, data; decided: 16, the scale of the other recipes, the usual pictures.
    """
    objective = GuidanceDistillation(
        times=UniformTimes(), source=NoisedData(), distance=Squared(), weight=snr_plus_one,
        guidance=UniformScale(guidance, guidance),
    )  # fmt: skip
    paper = "Golnari 2023, LoRA-Enhanced Distillation on Guided Diffusion Models, arXiv:2312.06899"
    student = Student(lora_rank=rank)
    return single("lora-guided", paper, objective, learn(lr), steps, chain(COUNTS), student, family="guidance")


def told(name: str, low: float, high: float, default: float) -> Sampling:
    """The teacher's chain with the scale as an input.

    Errors: `RecipeError` where the default is not one of the scales that are trained.
    """
    if not low <= default <= high:
        raise RecipeError(
            f"{name}: guidance_default is {default}, outside of what is trained, guidance_low {low} to guidance_high "
            f"{high}; widen these, or choose a default between them"
        )
    return replace(chain(COUNTS), guidance_mode="embedded", guidance_default=default, guidance_range=(low, high))


GUIDANCE: dict[str, RecipeFunction] = {"w-embedding": w_embedding, "agd": agd, "lora-guided": lora_guided}
