"""A ControlNet trained on a few-step student: what `fewstep distill` does for recipes whose student follows a control.

The U-Net stays as it is and only the ControlNet learns, from the student's own or, where it has none, from the U-Net's
encoder. The student's bundle is written again with it, so everything that serves a ControlNet serves this one.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle, as_bundle, load_bundle, seal_bundle
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.networks import ControlNet, DenoiserNet, as_network
from fewstep.models.second_time import with_second_time

from ..distribution.control_terms import CONTROL
from ..errors import RecipeError
from ..loop.checkpoint import has_checkpoint
from ..loop.player import Player
from ..loop.ranks import ALONE
from ..networks.critics import CriticPlan
from ..networks.partners import picture_proxy
from ..networks.rewards import PICTURE_REWARDS, check_reward, picture_reward
from ..networks.student import fake_of, is_unet, load_denoiser
from ..parts.objective import Batch, Reward
from ..pictures.data import LatentSource
from ..pictures.edges import EdgeLikelihood, detect
from ..recipes.casting import assemble_stage
from ..recipes.control import FRESH
from ..recipes.recipe import Recipe, Run, Stage, describe
from .folders import check_out, check_partners, in_place_of, open_run, run_folder
from .settling import training_data
from .sharing import check_shares
from .teacher_parts import EdgeSource


class SteeredFake(nn.Module):
    """A fake score that is told the control: a copy of the teacher's U-Net with a ControlNet, both of which learn.

    The U-Net may be told a second time too, at which a sample's step began.
    """

    def __init__(self, unet: Any, control: Any) -> None:
        super().__init__()
        self.unet, self.control = unet, control

    def denoiser(self, like: Denoiser) -> Denoiser:
        net: Any = with_second_time(DenoiserNet(self.unet, control=True))
        control = ControlNet(self.control)

        def run(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            given = {**cond, "x": x, "t": t.float().to(x.device), "scale": torch.ones(len(x), device=x.device)}
            given |= dict(zip(control.outputs, control(*(given[name] for name in control.inputs)), strict=True))
            found: Tensor = net(*(given.get(name) for name in net.inputs))
            return found

        return Denoiser(run, like.path, like.prediction)


class DetectedEdges:
    """A user's pictures with the edges that are found in them; half the time without their text, as in `EdgeSource`."""

    def __init__(self, source: LatentSource, decoder: Any) -> None:
        self.source, self.decoder = source, decoder

    def batch(self, step: int) -> Batch:
        found = self.source.batch(step)
        with torch.no_grad():
            edge = (detect(self.decoder(found.x0)) > 0.5).float().expand(-1, 3, -1, -1)
        rng = torch.Generator().manual_seed(self.source.seed + step)
        kept = (torch.rand(len(found.x0), generator=rng) < 0.5).to(found.x0.device)
        cond = {
            name: torch.where(kept.reshape(-1, *([1] * (value.ndim - 1))), value, found.uncond[name])
            for name, value in found.cond.items()
        }
        return Batch(found.x0, {**cond, "edge": edge}, found.uncond)


def control_start(student: Bundle, teacher: Bundle, *, fresh: bool = False) -> Any:
    """The ControlNet that training begins with: carried, the student's or else the teacher's; fresh, or where neither
    has one, the U-Net's encoder.

    Errors: `RecipeError` for a network that none fits.
    """
    if not is_unet(student):
        raise RecipeError(f"a ControlNet is trained beside a U-Net, and {student.name!r} has none; take an SD student")
    if not fresh:
        holder = next((bundle for bundle in (student, teacher) if bundle.has("controlnet")), None)
        if holder is not None:
            return holder.load("controlnet").requires_grad_(True)
    return fresh_control(load_denoiser(student), student.spec.latent.factor)


def fresh_control(unet: Any, factor: int) -> Any:
    """A ControlNet that changes nothing yet, with the U-Net's encoder; it takes no guidance scale.

    factor: pixels of the picture per side of a latent's, a power of 2, which its first layers bridge.
    """
    from diffusers import ControlNetModel

    told = unet.config.time_cond_proj_dim
    widths = tuple(max(8, unet.config.block_out_channels[0] // 16) * 2**k for k in range(factor.bit_length()))
    net = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=widths, load_weights_from_unet=told is None
    )
    if told is not None:  # diffusers cannot copy the weights of a network with a guidance input
        net.load_state_dict(unet.state_dict() | _own(net, unet), strict=False)
    return net.requires_grad_(True)


def _own(net: Any, unet: Any) -> Mapping[str, Tensor]:
    """Weights of the ControlNet that are not the U-Net's, or are of another shape."""
    theirs = unet.state_dict()
    return {n: v for n, v in net.state_dict().items() if n not in theirs or theirs[n].shape != v.shape}


class ControlNetworks:
    """`recipes.casting.Networks` of a ControlNet that learns beside a frozen student.

    The teacher knows no control; a fake score does, by a ControlNet of its own.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, student: Bundle, teacher: Bundle, control: Any, device: torch.device
    ) -> None:
        self.recipe, self.stage, self.bundle, self.device = recipe, stage, teacher, device
        self.learner = control.to(device)
        self.scale = student.spec.guidance.default
        self.unet, self.alone = (
            load_denoiser(bundle).requires_grad_(False).eval().to(device) for bundle in (student, teacher)
        )

    def player(self, name: str, module: nn.Module, body: nn.Module | None = None) -> Player:
        return Player(name, module.to(self.device).train(), self.stage.player_settings[name])

    def teacher(self) -> Denoiser:
        spec = self.bundle.spec
        return Denoiser(as_network(DenoiserNet(self.alone)), spec.path, spec.prediction)

    def ask(self, network: Any) -> Denoiser:
        if isinstance(network, SteeredFake):
            return network.denoiser(self.teacher())
        steered = as_network(DenoiserNet(self.unet), ControlNet(network))

        def run(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            told = torch.full((len(x),), self.scale, device=x.device)
            return steered(x, t, {**cond, "w": told})  # the scale that it is served at, where it takes one

        return Denoiser(run, self.bundle.spec.path, self.bundle.spec.prediction)

    def fake(self, plan: CriticPlan) -> tuple[Any, Any]:
        plain = load_denoiser(self.bundle)
        copy = fake_of(plain, replace(self.recipe.fake, control=False), self.bundle.spec.path)
        fake = SteeredFake(copy, fresh_control(plain, self.bundle.spec.latent.factor)).to(self.device)
        return fake, fake

    def rewards(self) -> dict[str, Reward]:
        decoder = self.bundle.decoder().requires_grad_(False).to(self.device)
        found: dict[str, Reward] = {CONTROL: EdgeLikelihood(decoder)}
        if self.recipe.reward is not None:
            found["reward"] = picture_reward(self.recipe.reward, self.bundle, self.device)
        return found

    def partner(self, name: str) -> Any:
        raise RecipeError(
            f"{self.recipe.name} has a player {name!r}, and a ControlNet learns beside a fake score alone"
        )

    def critic(self, plan: CriticPlan) -> Any:
        return self.partner("critic")

    def proxy(self) -> Any:
        return picture_proxy(self.bundle)

    def adapted(self) -> Denoiser:
        raise RecipeError(f"{self.recipe.name} asks for a teacher of a new domain, which no ControlNet is trained with")


def followed(recipe: Recipe) -> Bundle:
    """The few-step student that the recipe's ControlNet is trained on.

    Errors: `RecipeError` where none is named, or for settings that a ControlNet's run has no use for; `BundleError`.
    """
    if recipe.run.init is None:
        raise RecipeError(f"{recipe.name} trains a ControlNet on a few-step student; name it with --set init=DIR")
    _refuse_unused(recipe)
    check_shares(recipe, ALONE)
    return load_bundle(recipe.run.init)


def control_networks(recipe: Recipe, student: Bundle, teacher: Bundle, device: torch.device) -> ControlNetworks:
    """Those of the recipe's last stage, with the ControlNet that it begins from. Errors: those of `control_start`."""
    stage = recipe.stages[-1]
    control = control_start(student, teacher, fresh=stage.start == FRESH)
    return ControlNetworks(recipe, stage, student, teacher, control, device)


def control_source(recipe: Recipe, teacher: Bundle, device: torch.device, first: int | None = None) -> Any:
    """A user's pictures with detected edges, or scenes with the drawn ones; of them all, or the `first` so many."""
    run = recipe.run
    if run.data is None:
        count = run.scenes if first is None else min(first, run.scenes)
        source: Any = EdgeSource(teacher, count, run.batch, run.seed, str(device))
    else:
        data = training_data(recipe, teacher, first)
        inner = LatentSource(data, teacher.text_encoder(), run.batch, seed=run.seed, device=device, spec=teacher.spec)
        source = DetectedEdges(inner, teacher.decoder().to(device))
    return EmptyText(source, teacher, device)


class EmptyText:
    """Batches with the empty prompt as what guidance subtracts."""

    def __init__(self, source: Any, teacher: Bundle, device: torch.device) -> None:
        from ..pictures.data import tokenize

        with torch.no_grad():
            self.empty = teacher.text_encoder()(tokenize(teacher.tokenizer, [""]).long()).to(device)
        self.source = source

    def batch(self, step: int) -> Batch:
        found: Batch = self.source.batch(step)
        return Batch(found.x0, found.cond, {"ctx": self.empty.expand_as(found.cond["ctx"])})


def train_control(
    recipe: Recipe, teacher: str | Path | Bundle, out: Path, *, resume: bool = False, max_seconds: float | None = None,
    device: str | None = None,
) -> Bundle:  # fmt: skip
    """Train the recipe's ControlNet on the student `run.init` and write that student with it.

    Errors: `RecipeError` for a recipe with no student named, or settings that a ControlNet's run has no use for;
    `CheckpointError` for a resume of nothing; `TrainingDiverged`.
    """
    from ..loop.loop import LoopSettings, take_partners, train

    student, stage, run = followed(recipe), recipe.stages[-1], recipe.run
    teacher = as_bundle(teacher)
    check_out(out, teacher, student)
    check_partners(recipe, out)
    open_run(run_folder(out), describe(recipe), resume=resume)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = run_folder(out) / stage.name
    resume = resume and has_checkpoint(folder)
    torch.manual_seed(run.seed)
    method = assemble_stage(control_networks(recipe, student, teacher, where))
    settings = LoopSettings(
        steps=stage.steps, seed=run.seed, bf16=run.bf16, max_seconds=max_seconds,
        checkpoint_every=run.checkpoint_every, max_bad_steps=run.max_bad_steps, accumulate=run.accumulate,
    )  # fmt: skip
    if run.partners is not None and not resume:
        take_partners(method.players, Path(run.partners) / stage.name)
    source = control_source(recipe, teacher, where)
    train(method, source, settings, folder, resume=resume, label=stage.name, device=where)
    learner = method.players[0]
    kept = learner.module if stage.average is None else learner.averages[stage.average]
    return write_controlled(student, kept, out, half=run.fp16_weights)


def _refuse_unused(recipe: Recipe) -> None:
    run = recipe.run
    if run.parallel != "ddp" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(f"{recipe.name} trains a ControlNet in one process; leave out parallel and torchrun")
    if run.picture_every not in (0, Run().picture_every):
        raise RecipeError(
            f"picture_every is {run.picture_every}, and {recipe.name} draws no pictures on its way; leave it out"
        )
    if run.latents is not None and run.data is None:
        raise RecipeError(f"latents is {run.latents!r}, and {recipe.name} draws scenes with their edges; leave it out")
    if recipe.reward is not None and check_reward(recipe.reward) not in PICTURE_REWARDS:
        raise RecipeError(
            f"reward is {recipe.reward!r}, which reads prompts, and {recipe.name} leaves half of them out so that "
            f"edges are followed alone; take one that looks at pictures alone: {', '.join(PICTURE_REWARDS)}"
        )


def write_controlled(student: Bundle, control: Any, out: Path, *, half: bool = True) -> Bundle:
    """The student with this ControlNet; engines and golden cases were of another and are left out."""
    left = shutil.ignore_patterns("engines", "golden", "controlnet")
    control = control.eval().to(device="cpu", memory_format=torch.contiguous_format)
    with in_place_of(out) as beside:
        shutil.copytree(student.root, beside, ignore=left, dirs_exist_ok=True)
        (control.half() if half else control.float()).save_pretrained(beside / "controlnet")
        sealed = seal_bundle(beside, out.name, replace(student.spec, golden=(), control_kinds=()))
    return Bundle(out, sealed.name, sealed.spec)
