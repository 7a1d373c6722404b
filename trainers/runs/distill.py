"""From a teacher bundle of any family and a recipe to a sealed student bundle.

Beside the bundle `OUT` stands a run folder `OUT.run` with the configuration, and per stage a checkpoint, metrics, loss
curves and sample grids. A stage that ended leaves its student there, so `resume` continues in the stage that was cut.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.models.bundle import Bundle, as_bundle, load_bundle
from fewstep.models.networks import as_network

from ..errors import RecipeError
from ..loop.bands import Watch, bands_of
from ..loop.checkpoint import has_checkpoint
from ..loop.checkpoint_search import Elsewhere, KeptFiles, Saving, settle, weights_of
from ..loop.loop import LoopSettings, take_partners, train
from ..loop.method import Assembled
from ..loop.player import Player
from ..loop.ranks import ALONE, Ranks, join, leave, save_network
from ..networks.bank import plain
from ..networks.rewards import check_reward, with_prompts_for
from ..networks.student import Student, again, build_student, load_denoiser, merged, unlearned
from ..networks.watch import Twin, lead, stage_pairs, watch_both
from ..objectives.distillation import KnowledgeDistillation
from ..parts.objective import Objective
from ..parts.pairs import Pairs, PairSource, draw_pairs, load_pairs, save_pairs
from ..pictures.blending import BlendedSource
from ..pictures.data import Latents, LatentSource
from ..pictures.parting import CellSource
from ..pictures.preview import sample, save_grid
from ..recipes.casting import assemble_stage
from ..recipes.recipe import Recipe, Stage, configure, describe
from ..recipes.registry import find_recipe
from .folders import check_out, check_partners, open_run, run_folder
from .forgetting_data import ForgettingSource
from .picture_networks import PictureNetworks
from .picture_score import picture_score
from .selling import beside_of, sell_beside, sell_parts
from .settling import settled, training_data
from .sharing import check_shares
from .student_bundle import check_contract, check_start, student_spec, write_student


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

    Every process that torchrun started calls this; `out` must be one folder for all of them.

    Errors: `RecipeError` for an unknown recipe or setting, `DataError`, `BundleError`, `TrainingDiverged`.
    """
    if isinstance(recipe, str):
        recipe = configure(find_recipe(recipe), overrides or {})
    if recipe.student.control:
        from .control import train_control

        return train_control(recipe, teacher, Path(out), resume=resume, max_seconds=max_seconds, device=device)
    ranks = join(device, mode=recipe.run.parallel, bf16=recipe.run.bf16)
    try:
        return _distill(recipe, teacher, Path(out), ranks, resume, max_seconds, data)
    finally:
        leave(ranks)


def _distill(
    recipe: Recipe, teacher: str | Path | Bundle, out: Path, ranks: Ranks, resume: bool, max_seconds: float | None,
    data: Latents | None,
) -> Bundle:  # fmt: skip
    check_shares(recipe, ranks)
    teacher = as_bundle(teacher)
    check_contract(recipe, teacher)
    init = teacher if recipe.run.init is None else load_bundle(recipe.run.init)
    if recipe.needs.student and init is not teacher:
        check_start(student_spec(recipe, teacher), init, recipe.name)
    run = run_folder(out)
    further = [stage.name for stage in recipe.stages[:-1] if stage.cell is not None]
    for place in (out, *(beside_of(out, name) for name in (*recipe.beside, *further))):
        check_out(place, teacher, init)
    check_partners(recipe, out)
    ranks.once(lambda: open_run(run, describe(recipe), resume=resume))
    if recipe.reward is not None:
        check_reward(recipe.reward)  # before anything is encoded
    if data is None:
        read = partial(training_data, recipe, teacher)
        data = ranks.first_then_all(read) if recipe.run.latents else read()
    data = with_prompts_for(recipe.reward, data, teacher)
    given, unsettled = data, recipe
    recipe = ranks.first_then_all(lambda: settled(unsettled, teacher, given, run / "runs.json", ranks.device))
    run_of = recipe.run
    source = LatentSource(
        data, teacher.text_encoder(), run_of.batch, seed=run_of.seed, bf16=run_of.bf16, device=ranks.device,
        spec=teacher.spec, part=ranks.part,
    )  # fmt: skip
    total = sum(stage.steps for stage in recipe.stages)
    previous: Any = None
    for stage in recipe.stages:
        seconds = None if max_seconds is None else max_seconds * stage.steps / total
        previous = _run_stage(recipe, stage, teacher, init, previous, source, run / stage.name, resume, seconds, ranks)
    if ranks.first:
        sell_beside(recipe, teacher, run, out)
        last = write_student(recipe, teacher, previous.cpu(), out)
        sell_parts(recipe, teacher, run, out, last, source)
    ranks.wait()
    return load_bundle(out)


def assemble(
    recipe: Recipe, stage: Stage, teacher: Bundle, frozen: Any, learner: Any, ranks: Ranks = ALONE
) -> Assembled:
    """A stage's cast and players, and what an objective that compares stages of two networks sees of them.

    frozen, learner: denoisers of the teacher bundle's family, as their own class; spread over the processes in place.

    Errors: `RecipeError` for an objective that needs what the family or the recipe does not have.
    """
    frozen.requires_grad_(False)
    networks = PictureNetworks(recipe, stage, teacher, frozen, learner, ranks)
    method = assemble_stage(networks)
    if pairs := _compared(recipe, stage.objective, networks.learner, frozen):
        led = lead(networks.learner, frozen, pairs) if getattr(stage.objective, "alone", 0.0) else None
        seen = watch_both(networks.learner, frozen, pairs)
        method = replace(method, cast=replace(method.cast, seen=seen, led=led))
    ranks.spread(frozen)
    return method


def _compared(recipe: Recipe, objective: Objective, learner: Any, frozen: Any) -> dict[str, Twin]:
    """The stages of student and teacher that an objective compares."""
    if not isinstance(objective, KnowledgeDistillation) or not objective.feature:
        return {}
    return stage_pairs(learner, frozen, recipe.student.runs)


def _run_stage(
    recipe: Recipe, stage: Stage, teacher: Bundle, init: Bundle, previous: Any, source: LatentSource, folder: Path,
    resume: bool, max_seconds: float | None, ranks: Ranks,
) -> Any:  # fmt: skip
    """Train one stage and return its student's network; a stage that ended before is read back, and by all processes
    one that has just ended."""
    done = folder / "student.safetensors"
    torch.manual_seed(recipe.run.seed)
    plan = stage.student or recipe.student
    begun = teacher if stage.start == "teacher" else init
    start = again(previous, plan) if stage.start == "previous" else _begin(recipe, plan, teacher, begun)
    start = again(unlearned(start), plan) if stage.start == "noise" else start
    if resume and ranks.once(done.is_file):
        from safetensors.torch import load_model

        load_model(start, done)
        return start
    frozen = deepcopy(merged(start)) if stage.teacher == "start" else _frozen(recipe, stage, teacher, init, previous)
    layout = torch.contiguous_format if ranks.sharded else torch.channels_last
    frozen, start = (network.to(device=ranks.device, memory_format=layout) for network in (frozen, start))
    method = assemble(recipe, stage, teacher, frozen, start, ranks)
    del frozen, start  # where weights are shared these may be copies that nobody needs
    resume = resume and ranks.once(lambda: has_checkpoint(folder))
    if recipe.run.partners is not None and not resume:
        take_partners(method.players, Path(recipe.run.partners) / stage.name)
    settings = _settings(recipe, stage, max_seconds)
    kept = _kept(method.players[0], stage)
    show = _painter(recipe, teacher, kept, source, folder, ranks)
    batches = _batches(stage, method, teacher, source, folder, ranks)
    shelf = KeptFiles(folder / "saved")
    watch = Watch(bands_of(recipe.name) if ranks.first and _alike(recipe) else {})
    keeper = shelf if ranks.first else Elsewhere()
    saving = method if stage.search is None else Saving(method, stage.search, stage.average, keeper)
    train(
        saving, batches, settings, folder, resume=resume, label=stage.name, device=ranks.device, on_picture=show,
        on_row=watch.see, ranks=ranks,
    )  # fmt: skip
    if watch.outside:
        (folder / "outside.json").write_text(json.dumps(watch.outside, indent=1) + "\n")
    if stage.search is not None and ranks.first:
        search, saved = stage.search, [*shelf.all(), weights_of(method.players[0], stage.average)]
        distance = picture_score(teacher, student_spec(recipe, teacher), source, search.samples)
        best = settle(search, saved, kept, lambda network: distance(network, search.steps), recipe.run.seed)
        report = {"coefficients": best.alpha.tolist(), "distance": best.score, "last": best.plain}
        (folder / "search.json").write_text(json.dumps(report, indent=1) + "\n")
    show(stage.steps)
    for player in method.players:
        if player.name in recipe.beside:
            made = player.averages.get(stage.average or "", player.module)
            save_network(plain(made), folder / f"{player.name}.safetensors", ranks)
    kept = plain(kept)
    save_network(kept, done, ranks)
    if ranks.count == 1:
        return kept
    return _run_stage(recipe, stage, teacher, init, previous, source, folder, True, None, ranks)


def _alike(recipe: Recipe) -> bool:
    """Whether its stages do one thing, each for a part of the conditions, so that the same bands hold for all."""
    first = recipe.stages[0]
    return all(replace(stage, name=first.name, cell=first.cell) == first for stage in recipe.stages)


def _settings(recipe: Recipe, stage: Stage, max_seconds: float | None) -> LoopSettings:
    run = recipe.run
    return LoopSettings(
        steps=stage.steps, seed=run.seed, bf16=run.bf16, max_seconds=max_seconds,
        checkpoint_every=run.checkpoint_every, picture_every=run.picture_every, max_bad_steps=run.max_bad_steps,
        accumulate=run.accumulate,
    )  # fmt: skip


def _batches(
    stage: Stage, method: Assembled, teacher: Bundle, source: LatentSource, folder: Path, ranks: Ranks
) -> Any:  # fmt: skip
    """What a stage learns from: the data, the teacher's samples, or a part or a mixture of the data."""
    if stage.pairs is not None:
        return _paired(stage.pairs, method, teacher, source, folder, ranks)
    if stage.forget is not None:
        return ForgettingSource(source, stage.forget, teacher)
    if stage.blend is not None:
        return BlendedSource(source, stage.blend, teacher)
    return source if stage.cell is None else CellSource(source, stage.cell)


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
    return merged(load_denoiser(source))


def _paired(
    plan: Pairs, method: Assembled, teacher: Bundle, source: LatentSource, folder: Path, ranks: Ranks
) -> PairSource:
    """The stage's pairs, read back where they were drawn before; a sharded teacher draws them in all processes."""
    file = folder / "pairs.safetensors"
    if not ranks.once(file.is_file):
        if ranks.first or ranks.sharded:
            by_cfg = teacher.spec.guidance.mode == "cfg"
            drawn = draw_pairs(method.cast["teacher"], by_cfg, plan, source, seed=source.seed)
        if ranks.first:
            save_pairs(file, drawn)
        ranks.wait()
    return PairSource(load_pairs(file), source, source.size, seed=source.seed, part=ranks.part)


def _begin(recipe: Recipe, plan: Student, teacher: Bundle, init: Bundle) -> Any:
    scale = recipe.stages[0].objective
    w = getattr(getattr(scale, "guidance", None), "high", init.spec.guidance.default if recipe.needs.student else 1.0)
    if init.spec.prediction != teacher.spec.prediction or init.spec.path != teacher.spec.path:
        raise RecipeError(f"init {init.name!r} and the teacher {teacher.name!r} differ in path or prediction")
    return build_student(init, plan, fold_scale=float(w))


def _kept(student: Player, stage: Stage) -> Any:
    return student.module if stage.average is None else student.averages[stage.average]


SHOWN_STEPS = (1, 2, 4, 8, 25)


def _painter(
    recipe: Recipe, teacher: Bundle, network: nn.Module, source: LatentSource, folder: Path, ranks: Ranks
) -> Any:
    """A callback that writes `samples/step_N.png`: a row of pictures per step count, the same noise in each.

    A sharded network makes them in all processes, and the first writes.
    """
    spec = student_spec(recipe, teacher)
    decoder = teacher.decoder().to(source.device)
    counts = [n for n in SHOWN_STEPS if spec.allows(n)] or list(spec.steps[:1])
    batch = source.joint(-1)
    shape = (min(8, batch.x0.shape[0]), *batch.x0.shape[1:])
    cond, uncond = ({n: v[: shape[0]] for n, v in side.items()} for side in (batch.cond, batch.uncond))
    empty = uncond if spec.guidance.mode == "cfg" else None

    def paint(step: int) -> None:
        if not (ranks.first or ranks.sharded):
            return
        net = as_network(teacher.family.denoiser(network, False).to(source.device))
        w = spec.guidance.default
        rows = [sample(net, spec, n, cond, shape, w=w, uncond=empty) for n in counts]
        if ranks.first:
            save_grid([*rows, batch.x0[: shape[0]]], decoder, folder / "samples" / f"step_{step:06d}.png")

    return paint
