"""The recipes: every method as a function that returns its whole run.

Defaults suit the built-in family (3 million weights, 8x8 latents, one to two CPU cores, minutes).

Guidance scales follow u + w (c - u); a paper's omega of the form c + omega (c - u) is w = 1 + omega.
"""

from ..errors import RecipeError
from ..loop.player import PlayerSettings
from ..networks.student import Student
from ..objectives.progressive import ProgressiveHalving
from ..parts.distances import Squared, truncated_snr
from ..parts.times import EvenGrids, HalvingPairs, UniformScale
from ..parts.transitions import NoisedData
from .adapted import ADAPTED
from .adversarial import ADVERSARIAL
from .compression import a_sdm, bk_sdm, edgefusion, linfusion, ppcl, slim, vdmini
from .consistency import CONSISTENCY
from .continuous import CONTINUOUS
from .control import CONTROL
from .coupled import COUPLED
from .distribution import DISTRIBUTION
from .finetune import FINETUNE
from .flow import FLOWS
from .guidance import GUIDANCE
from .identity import IDENTITY
from .lcm import lcm, lcm_lora
from .matching import MATCHING
from .mixture import MIXTURE
from .multistep import MULTISTEP
from .recipe import Needs, Recipe, RecipeFunction, Sampling, Stage
from .reward import REWARD
from .score import SCORE
from .straight import STRAIGHT
from .trajectory import TRAJECTORY


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
        stages.append(
            Stage(
                name=f"{2 * n}-to-{n}", objective=objective, player_settings={"student": learn}, steps=steps,
                teacher="teacher" if first else "previous", start="init" if first else "previous",
            )
        )  # fmt: skip
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


RECIPES: dict[str, RecipeFunction] = {
    "lcm": lcm,
    "lcm-lora": lcm_lora,
    "progressive": progressive,
    **CONSISTENCY,
    **TRAJECTORY,
    **CONTINUOUS,
    **FLOWS,
    **STRAIGHT,
    **MATCHING,
    **COUPLED,
    **ADAPTED,
    **GUIDANCE,
    **DISTRIBUTION,
    **CONTROL,
    **FINETUNE,
    **ADVERSARIAL,
    **IDENTITY,
    **MIXTURE,
    **SCORE,
    **MULTISTEP,
    **REWARD,
    "bk-sdm": bk_sdm,
    "edgefusion": edgefusion,
    "a-sdm": a_sdm,
    "vdmini": vdmini,
    "slim": slim,
    "linfusion": linfusion,
    "ppcl": ppcl,
}
"""Every recipe by its name. Being listed here is what enters a recipe into `fewstep recipes` and the oracle suite."""


def find_recipe(name: str) -> RecipeFunction:
    """Errors: `RecipeError` listing the recipes."""
    if name not in RECIPES:
        raise RecipeError(f"there is no recipe {name!r}; recipes are {', '.join(RECIPES)}")
    return RECIPES[name]
