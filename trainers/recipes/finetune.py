"""Fine-tuning after distillation: a few-step student learns a user's pictures and keeps its steps.

Guidance scales follow u + w (c - u); a paper's omega of the form c + omega (c - u) is w = 1 + omega.
"""

import inspect
from dataclasses import replace

from ..errors import RecipeError
from ..loop.player import PlayerSettings
from ..networks.student import Student
from ..objectives.distillation import KnowledgeDistillation
from ..parts.distances import Squared, snr_plus_one
from ..parts.times import UniformTimes
from ..parts.transitions import NoisedData
from ..pictures.blending import Blend
from .forms import ONE
from .recipe import Recipe, RecipeFunction, Stage


def finetune_student(
    *, base: str = "lcm", steps: int = 240, tune_steps: int = 200, lr: float = 3e-4, tune_lr: float = 5e-4,
    rank: int = 8, others: float = 0.75, dropped: float = 0.1, prior: str | None = None, guidance_width: int = 256,
    guidance: float = 3.0, guidance_low: float = 1.5, guidance_high: float = 6.0, guidance_default: float = 3.0,
) -> Recipe:  # fmt: skip
    """Fine-tune a few-step student: the teacher learns the pictures, then the student is distilled from it again.

    First a LoRA of the teacher learns the pictures by denoising, `|v_theta(x_t, c) - v|^2`, prompts dropped from the
    share `dropped` (Ho & Salimans 2022). Then a LoRA of the student, which starts as the student is (`init`), learns
    from that teacher by the loss the student was made with (`base`), briefly; the share `others` of its rows are
    prompts of the old domain (`prior`), as DreamBooth keeps a class (Ruiz et al. 2022, arXiv 2208.12242): what few
    pictures cannot show, how prompts are followed in few steps, is practised there. Scales are the base's settings.
    Unverified: no paper settles the steps after distillation; decided: by comparing this with denoising the student
    itself and with carrying the teacher's LoRA over (docs/recipes/control.md).
    """
    from .registry import find_recipe

    function = find_recipe(base)
    known = inspect.signature(function).parameters
    told = {
        "guidance_width": guidance_width, "guidance": guidance, "guidance_low": guidance_low,
        "guidance_high": guidance_high, "guidance_default": guidance_default,
    }  # fmt: skip
    first = function(**{name: value for name, value in told.items() if name in known})
    plain = Student(guidance_width=first.student.guidance_width, lora_rank=first.student.lora_rank)
    few = first.sampling is not None and first.sampling.guidance_mode != "cfg"
    if not few or first.beside or first.needs.student or first.student != plain:
        raise RecipeError(
            f"finetune-student distils again by the recipe that made its student, and base {base!r} makes none of few "
            "steps by itself; name the student's own recipe, lcm or dmd2 for example"
        )
    if steps < 1 or tune_steps < 1:
        raise RecipeError(f"finetune-student: steps is {steps} and tune_steps {tune_steps}; each stage needs some")
    last = first.stages[-1]
    players = {name: replace(one, lr=lr if name == "student" else one.lr) for name, one in last.player_settings.items()}
    tune = Stage(
        name="tune",
        objective=KnowledgeDistillation(
            times=UniformTimes(), source=NoisedData(pure_at_start=False), distance=Squared(), weight=snr_plus_one,
            guidance=ONE, output=0.0, feature=0.0,
        ),
        player_settings={"student": PlayerSettings(lr=tune_lr, warmup=20, cooldown=0.3, ema={"kept": 0.98})},
        steps=tune_steps, start="teacher", student=Student(lora_rank=rank), blend=Blend(dropped=dropped),
    )  # fmt: skip
    again = replace(
        last, name="distil", player_settings=players, steps=steps, teacher="previous", start="init",
        blend=Blend(others=others, prior=prior),
    )  # fmt: skip
    return replace(
        first, name="finetune-student", family="finetune", paper="none; prior preservation of Ruiz et al. 2022, "
        "DreamBooth, arXiv:2208.12242", needs=replace(first.needs, student=True),
        student=replace(first.student, lora_rank=rank), stages=(tune, again), run=replace(first.run, batch=16),
    )  # fmt: skip


FINETUNE: dict[str, RecipeFunction] = {"finetune-student": finetune_student}
