"""Networks of critics: where the features come from that tell data from samples, and the heads that read them.

A plan is data (`CriticPlan`). Features of a network are what named blocks of it give, by hooks, so that U-Nets and
transformers are read alike; the evaluation ends at the last block that is read. Where features are of a frozen network
the gradient still goes through it to the samples.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu, pad
from torch.nn.utils.parametrizations import spectral_norm

from fewstep.models.denoiser import Condition, Network

from ..errors import RecipeError
from ..pictures.features import WEIGHTS, FeatureNet, load_features
from .watch import streams_out

FAKE, ENCODER, TEACHER, VISION = "fake", "fake-encoder", "teacher", "vision"
OWN_WEIGHTS = (TEACHER, VISION)
"""Features of frozen networks: their heads are a player of their own, `critic`."""

BLOCKS = (0.25, 0.5, 0.75, 1.0)
"""Depths of the teacher at which heads read it: SANA-Sprint's blocks 2, 8, 14, 19 of 20 are about these."""


@dataclass(frozen=True, kw_only=True)
class CriticPlan:
    """Where features come from, and how they are read.

    features: "fake", the fake score's own, which train with the critic (DMD2); "fake-encoder", the mean over channels
    of its middle, with no weights besides (SiDA); "teacher", frozen blocks of the teacher (LADD, SANA-Sprint);
    "vision", a frozen vision network on decoded pictures (ADD, GDD). depths: which blocks are read, each as a share of
    the way through the network, 0 the first and 1 the last; none means all of them. kernel: neighbours that a head
    looks at, 1 for single patches (Uni-DAD). text: whether heads are told the condition by a projection, which a
    network that reads it already need not be. by_steps: the k-th head judges samples of the k-th step count, told as
    `steps` of the condition, and no other (ASD). step: heads are told at which time the student's step began, `s` of
    the condition (`Adversary.told`). network: for "vision" a folder of a `Dinov2Model`; None takes the
    built-in one, made for small pictures.
    """

    features: str = FAKE
    by_steps: bool = False
    step: bool = False
    depths: tuple[float, ...] = (0.5,)
    kernel: int = 9
    text: bool = False
    network: str | None = None

    def __post_init__(self) -> None:
        if self.features not in (FAKE, ENCODER, TEACHER, VISION):
            known = ", ".join((FAKE, ENCODER, TEACHER, VISION))
            raise RecipeError(f"a critic's features are {self.features!r}; known are {known}")
        if self.network is not None and self.features != VISION:
            raise RecipeError(f"a critic of {self.features!r} features reads no vision network; leave network out")
        if any(not 0.0 <= depth <= 1.0 for depth in self.depths):
            raise RecipeError(f"a critic reads blocks at depths {self.depths}; they are shares of the way, 0 to 1")
        if self.step and self.features in (FAKE, ENCODER):
            raise RecipeError(f"a critic of {self.features!r} features is told no step; leave step out")
        if self.by_steps and self.features in (ENCODER, VISION):
            raise RecipeError(f"a critic of {self.features!r} features has no head for each step count")
        if self.features == ENCODER and (self.text or len(self.depths) != 1):
            raise RecipeError("a critic without weights reads one block and has no head to tell the text; set depths")

    @property
    def player(self) -> str:
        """Who learns to judge: the fake score, or a critic of its own."""
        return "critic" if self.features in OWN_WEIGHTS else "fake"


MIDDLE = CriticPlan()
"""DMD2's."""


class CriticHead(nn.Module):
    """Middle features [B, C, h, w] of a U-Net -> patch logits [B, 1, h, w]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.layers(features)
        return out


class TokenHead(nn.Module):
    """Features [B, C, N], tokens or places of a map -> a logit for each, [B, N] (StyleGAN-T's heads, as in ADD, LADD).

    Spectral norms hold its slope; a group norm stands for the paper's local batch norm, so that a sample's logits do
    not hang on its batch. told [B, D]: the condition, which is projected on the features.
    """

    def __init__(self, channels: int, kernel: int, told: int | None) -> None:
        super().__init__()
        width = max(8, min(channels, 256))
        self.kernel = kernel
        self.enter = spectral_norm(nn.Conv1d(channels, width, 1))
        self.wide = spectral_norm(nn.Conv1d(width, width, kernel))
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(width, 8), width) for _ in range(2))
        self.leave = spectral_norm(nn.Conv1d(width, 1, 1))
        self.told = None if told is None else nn.Linear(told, width)

    def forward(self, features: Tensor, told: Tensor | None = None) -> Tensor:
        h = leaky_relu(self.norms[0](self.enter(features.float())), 0.2)
        reach = self.kernel // 2
        # tokens may be fewer than the head is wide: then what lies outside is nothing
        mode = "circular" if h.shape[2] > reach else "constant"
        wide = self.wide(pad(h, (reach, self.kernel - 1 - reach), mode=mode))
        h = (h + leaky_relu(self.norms[1](wide), 0.2)) / math.sqrt(2.0)
        logits: Tensor = self.leave(h)[:, 0]
        if self.told is not None and told is not None:
            logits = logits + (h * self.told(told.float())[:, :, None]).sum(1) / math.sqrt(h.shape[1])
        return logits


class FakeWithCritic(nn.Module):
    """The fake network and heads on its features: one player, since the critic's loss trains both (DMD2).

    run: the network behind the contract of every denoiser, which is told the condition's tensors by name.
    """

    def __init__(self, network: Any, run: Network, plan: CriticPlan = MIDDLE) -> None:
        super().__init__()
        self.network, self.plan = network, plan
        self.names = taps(network, plan.depths)
        self.head = heads_for(network, self.names, plan)
        self._outside = (run,)

    def judge(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Logits of x_t; only the part of the network up to the last features runs."""
        told = cond if "w" in cond else {**cond, "w": torch.ones_like(t)}  # for a network that takes a scalar: none
        found = read_blocks(self.network, self.names, lambda: self._outside[0](x, t, told))
        if self.plan.features == ENCODER:
            return found[0].mean(1) if found[0].ndim == 4 else found[0].mean(-1)
        if isinstance(self.head, CriticHead):
            logits: Tensor = self.head(found[0])
            return logits
        return answer(self.head, found, told_of(cond) if self.plan.text else None, head_of(self.plan, cond))


class FrozenCritic(nn.Module):
    """Heads on the features of a network that does not train: the player `critic`."""

    def __init__(self, eye: "Eye", plan: CriticPlan, told: int | None, span: float = 1.0) -> None:
        """told: numbers of the condition; span: the path's noisiest time."""
        super().__init__()
        self.plan, self.span = plan, span
        told = (told or 0) + STEP_WAVES * plan.step or None
        self.head = nn.ModuleList(TokenHead(width, plan.kernel, told) for width in eye.widths)
        self._outside = (eye,)

    def judge(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Logits [B, patches] of x_t."""
        return self.answer(self.features(x, t, cond), cond)

    def features(self, x: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
        return self._outside[0].see(x, t, cond)

    def answer(self, features: Sequence[Tensor], cond: Condition) -> Tensor:
        told = [told_of(cond).float()] if self.plan.text else []
        told += [step_waves(cond["s"], self.span)] if self.plan.step else []
        return answer(self.head, features, torch.cat(told, 1) if told else None, head_of(self.plan, cond))


class Eye:
    """A frozen network as features: `widths` of them, and `see(x, t, cond)`."""

    widths: tuple[int, ...]

    def see(self, x: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
        raise TypeError("an eye is a TeacherEye or a VisionEye")


class TeacherEye(Eye):
    """Blocks of the frozen teacher at (x_t, t, cond)."""

    def __init__(self, network: Any, run: Network, plan: CriticPlan) -> None:
        self.network, self.run = network, run
        self.names = taps(network, plan.depths)
        self.widths = tuple(width_of(network, name) for name in self.names)

    def see(self, x: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
        return read_blocks(self.network, self.names, lambda: self.run(x, t, cond))


class VisionEye(Eye):
    """A vision network on the pictures that latents decode to; it is told neither the time nor the condition."""

    def __init__(self, decoder: nn.Module, network: Any, plan: CriticPlan) -> None:
        self.decoder, self.network = decoder.requires_grad_(False).eval(), network.requires_grad_(False).eval()
        layers = vision_layers(network)
        depths = plan.depths or tuple(k / max(1, len(layers) - 1) for k in range(len(layers)))
        chosen = {round(depth * (len(layers) - 1)) for depth in depths}
        self.names = tuple(layers[k][0] for k in sorted(chosen))
        self.widths = tuple(layers[k][1] for k in sorted(chosen))

    def see(self, x: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
        pictures = self.decoder(x).float()
        return read_blocks(self.network, self.names, lambda: self.network(fitted(self.network, pictures)))


def vision_network(folder: str | None) -> Any:
    """The built-in feature network, or a `Dinov2Model` from a folder.

    Errors: `RecipeError` for a folder that holds none.
    """
    if folder is None:
        return load_features(WEIGHTS)
    from transformers import Dinov2Model

    if not (Path(folder) / "config.json").is_file():
        raise RecipeError(f"{folder} holds no config.json of a Dinov2Model; name a folder in transformers' format")
    return Dinov2Model.from_pretrained(folder, local_files_only=True)


def vision_layers(network: Any) -> list[tuple[str, int]]:
    """(module, channels) of each layer whose output may be read."""
    if isinstance(network, FeatureNet):
        named = [(f"body.{k}", part) for k, part in enumerate(network.body)]
        convolutions = [part.out_channels for _, part in named if isinstance(part, nn.Conv2d)]
        active = [name for name, part in named if isinstance(part, nn.SiLU)]
        return list(zip(active, convolutions, strict=True))
    return [(f"encoder.layer.{k}", network.config.hidden_size) for k in range(network.config.num_hidden_layers)]


def fitted(network: Any, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] as a vision network wants them."""
    if isinstance(network, FeatureNet):
        return pictures
    side = network.config.image_size
    side = side if isinstance(side, int) else side[0]
    x = interpolate(pictures, (side, side), mode="bilinear", antialias=True, align_corners=False) * 0.5 + 0.5
    mean, std = (
        torch.tensor(v, device=x.device)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (x - mean) / std


def blocks_of(network: Any) -> tuple[str, ...]:
    """A denoiser's blocks in the order in which they run: a U-Net's down, middle, up; a transformer's layers.

    Errors: `RecipeError` for a network without any.
    """
    found: list[str] = []
    for name, module in network.named_children():
        if isinstance(module, nn.ModuleList) and (name.endswith("blocks") or name == "layers"):
            found += [f"{name}.{k}" for k in range(len(module))]
    if getattr(network, "mid_block", None) is not None:
        found.insert(len(network.down_blocks), "mid_block")
    if not found:
        raise RecipeError(f"a critic finds no blocks in a {type(network).__name__}; use features 'vision'")
    return tuple(found)


def taps(network: Any, depths: Sequence[float]) -> tuple[str, ...]:
    """The blocks at these shares of the way; all of them where none are named."""
    names = blocks_of(network)
    chosen = {round(depth * (len(names) - 1)) for depth in depths} if depths else set(range(len(names)))
    return tuple(names[k] for k in sorted(chosen))


def width_of(network: Any, name: str) -> int:
    """Channels of a block's output."""
    c = network.config
    if "block_out_channels" in c:
        stack, _, k = name.partition(".")
        widths = list(c.block_out_channels)
        return int({"down_blocks": widths, "up_blocks": widths[::-1]}[stack][int(k)] if k else widths[-1])
    return int(c.dim if "dim" in c else c.num_attention_heads * c.attention_head_dim)


def heads_for(network: Any, names: Sequence[str], plan: CriticPlan) -> nn.Module | None:
    """DMD2's head on a U-Net's middle alone, else one for each block; none where the features answer themselves."""
    if plan.features == ENCODER:
        return None
    if tuple(names) == ("mid_block",) and not plan.text:
        return CriticHead(network.config.block_out_channels[-1], network.config.norm_num_groups)
    told = text_width(network.config) if plan.text else None
    return nn.ModuleList(TokenHead(width_of(network, name), plan.kernel, told) for name in names)


def answer(heads: Any, features: Sequence[Tensor], told: Tensor | None, only: int | None = None) -> Tensor:
    """All heads' logits side by side, or one's, [B, patches]; features are maps [B, C, h, w] or tokens [B, N, C]."""
    flat = [f.flatten(2) if f.ndim == 4 else f.transpose(1, 2) for f in features]
    pairs = list(zip(heads, flat, strict=True))
    return torch.cat([head(f, told) for head, f in (pairs if only is None else pairs[only : only + 1])], 1)


def head_of(plan: CriticPlan, cond: Condition) -> int | None:
    """The one head that is asked, of a plan with one for each step count; a batch shares its count.

    Errors: `RecipeError` for more counts than blocks that are read.
    """
    if not plan.by_steps or "steps" not in cond:
        return None
    place = int(cond["steps"][0]) - 1
    if plan.depths and place >= len(plan.depths):
        raise RecipeError(f"samples of {place + 1} steps have no head: the critic reads {len(plan.depths)} blocks")
    return place


def told_of(cond: Condition) -> Tensor:
    """The condition as one vector [B, D]: a class, or the mean of the text's tokens that count."""
    if "label" in cond:
        return cond["label"]
    ctx = cond["ctx"].flatten(1, -2) if cond["ctx"].ndim > 3 else cond["ctx"]
    mask = cond.get("ctx_mask")
    if mask is None:
        return ctx.mean(1)
    share = mask.to(ctx) / mask.to(ctx).sum(1, keepdim=True).clamp(min=1.0)
    return (ctx * share[:, :, None]).sum(1)


STEP_WAVES = 8


def step_waves(s: Tensor, span: float) -> Tensor:
    """[B, STEP_WAVES]: cosines of the time s [B] at which a step began, as a share of `span`."""
    order = torch.arange(STEP_WAVES, device=s.device, dtype=torch.float32)
    return torch.cos(math.pi * order * (s.float() / span)[:, None])


def text_width(config: Mapping[str, Any]) -> int:
    """Numbers per token of the text that a denoiser is told.

    Errors: `RecipeError` for a class that does not say.
    """
    for name in ("joint_attention_dim", "caption_channels", "cross_attention_dim", "cap_feat_dim"):
        if config.get(name) is not None:
            return int(config[name])
    raise RecipeError("this denoiser's config names no width of its text; set text=false for the critic")


class _Reached(Exception):
    """All blocks that are read have run."""


def read_blocks(network: Any, names: Sequence[str], run: Any) -> list[Tensor]:
    """What the named blocks give while `run` evaluates the network, which ends at the last of them."""
    seen: dict[str, Tensor] = {}
    with _watched(network, names, seen), suppress(_Reached):
        run()
    return [seen[name] for name in names]


@contextmanager
def _watched(network: Any, names: Sequence[str], seen: dict[str, Tensor]) -> Iterator[None]:
    def watcher(name: str) -> Any:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            seen[name] = streams_out(out)["picture"]
            if len(seen) == len(names):
                raise _Reached

        return note

    hooks = [network.get_submodule(name).register_forward_hook(watcher(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def picture_critic(plan: CriticPlan, teacher: Any, frozen: Any, run: Network) -> FrozenCritic:
    """The player `critic` of a bundle `teacher`, whose denoiser is `frozen`, behind `run`."""
    told, span = text_width(frozen.config) if plan.text else None, teacher.spec.path.start
    if plan.features == TEACHER:
        return FrozenCritic(TeacherEye(frozen, run, plan), plan, told, span)
    device = next(frozen.parameters()).device
    return FrozenCritic(
        VisionEye(teacher.decoder().to(device), vision_network(plan.network).to(device), plan), plan, told, span
    )
