"""From a teacher bundle and a recipe to a sealed student bundle.

Beside the bundle `OUT` stands a run folder `OUT.run` with the configuration, and per stage a checkpoint, metrics, loss
curves and sample grids. A stage that ended leaves its student there, so `resume` continues in the stage that was cut.
"""

import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle, load_bundle
from fewstep.models.denoiser import Denoiser
from fewstep.models.networks import DenoiserNet, as_network
from fewstep.models.spec import SamplerSpec

from .data import Latents, LatentSource, encode_folder, encode_scenes, load_latents, save_latents
from .discriminator import FakeWithCritic
from .distillation import KnowledgeDistillation
from .errors import CheckpointError, RecipeError
from .loop import LoopSettings, train
from .objective import Batch, Cast, Metrics, Objective, Turn
from .player import Player
from .preview import sample, save_grid
from .recipe import Recipe, Stage, configure, describe
from .recipes import find_recipe
from .student import again, build_student, merged
from .student_bundle import student_spec, write_student
from .watch import Seen, lead, stage_pairs, watch


def distill(
    recipe: str | Recipe,
    teacher: str | Path | Bundle,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    max_seconds: float | None = None,
    device: str | None = None,
    data: Latents | None = None,
) -> Bundle:
    """Train a student and write it to `out` as a bundle; `max_seconds` is shared by the stages in proportion to steps.

    Errors: `RecipeError` for an unknown recipe or setting, `DataError`, `BundleError`, `TrainingDiverged`.
    """
    if isinstance(recipe, str):
        recipe = configure(find_recipe(recipe), overrides or {})
    teacher = teacher if isinstance(teacher, Bundle) else load_bundle(teacher)
    out = Path(out)
    run = out.with_name(out.name + ".run")
    _check_out(out, run, teacher)
    _open_run(run, recipe, resume=resume)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = data if data is not None else training_data(recipe, teacher)
    run_of = recipe.run
    source = LatentSource(data, teacher.text_encoder(), run_of.batch, seed=run_of.seed, bf16=run_of.bf16, device=where)
    total = sum(stage.steps for stage in recipe.stages)
    previous: Any = None
    for stage in recipe.stages:
        seconds = None if max_seconds is None else max_seconds * stage.steps / total
        previous = _run_stage(recipe, stage, teacher, previous, source, run / stage.name, resume, seconds, where)
    return write_student(recipe, teacher, previous.cpu(), out)


def training_data(recipe: Recipe, teacher: Bundle) -> Latents:
    """The recipe's data, encoded by the teacher; kept in and read from the file `run.latents` where it is named."""
    kept = Path(recipe.run.latents) if recipe.run.latents else None
    if kept is not None and kept.exists():
        return load_latents(kept)
    if recipe.run.data is not None:
        data = encode_folder(teacher, Path(recipe.run.data))
    else:
        data = encode_scenes(teacher, recipe.run.scenes, seed=recipe.run.seed)
    if kept is not None:
        save_latents(kept, data)
    return data


@dataclass(frozen=True)
class Assembled:
    """An objective with its cast and players: what the loop runs."""

    objective: Objective
    cast: Cast
    players: tuple[Player, ...]

    def loss(self, player: str, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        return self.objective.loss(player, self.cast, batch, turn)


def assemble(recipe: Recipe, stage: Stage, spec: SamplerSpec, teacher_unet: Any, student_unet: Any) -> Assembled:
    """Networks of U-Nets for a stage: the student, its averages, a frozen teacher, and a fake score with its critic."""

    def denoiser(unet: Any) -> Denoiser:
        return Denoiser(as_network(DenoiserNet(unet)), spec.path, spec.prediction)

    student = Player("student", student_unet.train(), stage.player_settings["student"])
    players = [student]
    seen = _watched(stage.objective, student_unet, teacher_unet)
    roles = {"student": denoiser(student_unet), "teacher": denoiser(teacher_unet.requires_grad_(False).eval())}
    roles |= {name: denoiser(average) for name, average in student.averages.items()}
    critic = None
    if "fake" in stage.objective.players:
        fake = FakeWithCritic(deepcopy(teacher_unet).requires_grad_(True)).to(teacher_unet.device).train()
        players.append(Player("fake", fake, stage.player_settings["fake"]))
        roles["fake"], critic = denoiser(fake.unet), fake.judge
    if absent := [role for role in stage.objective.roles if role not in roles]:
        raise RecipeError(f"recipe {recipe.name!r} asks for the role {absent[0]!r}, which its settings do not make")
    return Assembled(stage.objective, Cast(roles, critic, seen), tuple(players))


def _watched(objective: Objective, student_unet: Any, teacher_unet: Any) -> dict[str, Seen]:
    """What the stages of student and teacher give, for an objective that compares them."""
    if not isinstance(objective, KnowledgeDistillation) or not objective.feature:
        return {}
    pairs = stage_pairs(student_unet, teacher_unet)
    if objective.alone:
        lead(student_unet, teacher_unet, pairs)
    return {
        "student": watch(student_unet, {name: name for name in pairs}),
        "teacher": watch(teacher_unet, {twin: name for name, twin in pairs.items()}),
    }


def _run_stage(
    recipe: Recipe, stage: Stage, teacher: Bundle, previous: Any, source: LatentSource, folder: Path, resume: bool,
    max_seconds: float | None, device: torch.device,
) -> Any:  # fmt: skip
    """Train one stage and return its student's U-Net; a stage that ended before is read back."""
    done = folder / "student.safetensors"
    torch.manual_seed(recipe.run.seed)
    init = teacher if recipe.run.init is None else load_bundle(recipe.run.init)
    start = again(previous, recipe.student) if stage.start == "previous" else _begin(recipe, teacher, init)
    if resume and done.is_file():
        from safetensors.torch import load_model

        load_model(start, done)
        return start
    frozen = _frozen(recipe, stage, teacher, init, previous)
    frozen = frozen.to(device=device, memory_format=torch.channels_last)
    method = assemble(recipe, stage, teacher.spec, frozen, start.to(device=device, memory_format=torch.channels_last))
    settings = LoopSettings(
        steps=stage.steps,
        seed=recipe.run.seed,
        bf16=recipe.run.bf16,
        max_seconds=max_seconds,
        checkpoint_every=recipe.run.checkpoint_every,
        picture_every=recipe.run.picture_every,
        max_bad_steps=recipe.run.max_bad_steps,
    )
    kept = _kept(method.players[0], stage)
    show = _painter(recipe, teacher, kept, source, folder)
    train(
        method, source, settings, folder, resume=resume and (folder / "checkpoint.pt").is_file(),
        label=stage.name, device=device, on_picture=show,
    )  # fmt: skip
    show(stage.steps)
    from safetensors.torch import save_model

    save_model(kept, str(done))
    return kept


def _frozen(recipe: Recipe, stage: Stage, teacher: Bundle, init: Bundle, previous: Any) -> Any:
    """The network that a stage learns from.

    Errors: `RecipeError` where a few-step student would be held against data.
    """
    if stage.teacher == "previous":
        return deepcopy(merged(previous))
    source = init if stage.teacher == "init" else teacher
    if getattr(stage.objective, "task", 0.0) and source.spec.spacing is None:
        raise RecipeError(
            f"stage {stage.name!r} learns from {source.name!r}, a student of few steps, and from data too: its "
            "estimate is not the mean of the data, so set task=0"
        )
    return merged(source.load("unet"))


def _begin(recipe: Recipe, teacher: Bundle, init: Bundle) -> Any:
    scale = recipe.stages[0].objective
    w = getattr(getattr(scale, "guidance", None), "high", 1.0)
    if init.spec.prediction != teacher.spec.prediction or init.spec.path != teacher.spec.path:
        raise RecipeError(f"init {init.name!r} and the teacher {teacher.name!r} differ in path or prediction")
    return build_student(init, recipe.student, fold_scale=float(w))


def _kept(student: Player, stage: Stage) -> Any:
    return student.module if stage.average is None else student.averages[stage.average]


def _painter(recipe: Recipe, teacher: Bundle, unet: nn.Module, source: LatentSource, folder: Path) -> Any:
    """A callback that writes `samples/step_N.png`: a row of pictures per step count, the same noise in each."""
    spec = student_spec(recipe, teacher)
    decoder = teacher.decoder().to(source.device)
    batch = source.batch(-1)
    shape = (min(8, batch.x0.shape[0]), *batch.x0.shape[1:])
    cond = {"ctx": batch.cond["ctx"][: shape[0]]}

    def paint(step: int) -> None:
        net = as_network(DenoiserNet(unet))
        rows = [sample(net, spec, n, cond, shape, w=recipe.sampling.guidance_default) for n in spec.steps]
        save_grid([*rows, batch.x0[: shape[0]]], decoder, folder / "samples" / f"step_{step:06d}.png")

    return paint


def _check_out(out: Path, run: Path, teacher: Bundle) -> None:
    """Nothing but an earlier student and its run is ever replaced.

    Errors: `RecipeError` naming the folder that holds something else.
    """
    if out.resolve() == teacher.root.resolve():
        raise RecipeError(f"{out} is the teacher itself; give the student another folder")
    for folder, mark in ((out, "bundle.json"), (run, "config.json")):
        if folder.exists() and not (folder / mark).is_file() and (folder.is_file() or any(folder.iterdir())):
            raise RecipeError(f"{folder} exists and holds no {mark}; choose another --out, or empty it")


def _open_run(run: Path, recipe: Recipe, *, resume: bool) -> None:
    """A fresh run folder, or one whose configuration is the same."""
    wanted = json.dumps(describe(recipe), indent=1) + "\n"
    config = run / "config.json"
    if resume:
        if not config.is_file():
            raise CheckpointError(f"{run} holds no run; leave out --resume to start anew")
        if config.read_text() != wanted:
            raise CheckpointError(f"{config} differs from this configuration; repeat its settings, or start anew")
        return
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    config.write_text(wanted)
