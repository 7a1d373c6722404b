"""Students as networks: where their weights start, the guidance input, LoRA, and taking these out again.

All surgery is exact: a student with a fresh guidance input or fresh LoRA answers as the network it came from.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.models import guidance_adapter, negative_adapter
from fewstep.models.altered import remade
from fewstep.models.bundle import Bundle
from fewstep.models.linear_attention import FIELD, linearise
from fewstep.models.networks import guidance_embedding
from fewstep.models.paths import Path as NoisePath
from fewstep.models.second_time import SecondTime, add_second_time
from fewstep.runtime.sampling.plan import span

from ..errors import RecipeError
from .avoided import with_negative
from .probing import Probe
from .pruning import ranked_cut
from .surgery import Cut, Run, cut_unet, deepen_unet, layer_twins, narrow_unet, rebuilt, replace_runs

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
"""The layers LCM-LoRA adapts (diffusers' train_lcm_distill_lora_sd)."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """What a recipe asks of its student.

    guidance_width: size of the guidance embedding, None for no input. second_time: whether it also takes the time where
    a jump lands, as `s` of its condition. adapter_width: size of guidance adapters beside a frozen network
    (`models.guidance_adapter`), None for none. negative: whether it reads a prompt to avoid by adapters of its own,
    beside a frozen network (`models.negative_adapter`). cut: blocks it keeps (`trainers.networks.surgery`).
    extra_layers: transformer layers by which the attention of each stage is deeper, fine to coarse, and the middle's
    with the last. remove: how many parts to take out, those that change the start's output least
    (`trainers.networks.pruning`). width: channels as a fraction of the start's. attention: "softmax" or "linear"
    self-attention. runs: of a transformer's layers, each replaced by one, which alone trains; probe: how they are found
    where none are named (`trainers.networks.probing`). frozen: words; weights of blocks with one of them in their name
    stay as they are (GDD-I: convolutions, projections). control: whether it follows a control, by a ControlNet beside
    it (`trainers.runs.control`).
    """

    guidance_width: int | None = None
    second_time: bool = False
    adapter_width: int | None = None
    negative: bool = False
    lora_rank: int | None = None
    cut: Cut | None = None
    extra_layers: tuple[int, ...] = ()
    remove: int | None = None
    width: float | None = None
    attention: str = "softmax"
    runs: tuple[Run, ...] = ()
    probe: Probe | None = None
    frozen: tuple[str, ...] = ()
    control: bool = False

    @property
    def unet_only(self) -> bool:
        """Whether it asks for what is done to U-Nets alone."""
        asked = (self.guidance_width, self.adapter_width, self.cut, self.remove, self.width, self.extra_layers or None)
        return self.attention != "softmax" or self.negative or any(each is not None for each in asked)


PLAIN = Student()
"""The teacher's network as it is."""


def build_student(start: Bundle, plan: Student, *, fold_scale: float) -> Any:
    """A trainable network that begins as `start`'s. A guidance input it does not want is folded at one w.

    Errors: `RecipeError` for a plan that this network cannot follow.
    """
    _check_times(start, plan)
    if plan.runs:
        network = replace_runs(load_denoiser(start), plan.runs)
    elif not is_unet(start):
        _refuse_unet_surgery(start, plan)
        network = load_denoiser(start)
    else:
        network = reshaped(with_guidance(start, plan, fold_scale=fold_scale), plan)
    if plan.second_time and not start.spec.second_time:
        network = add_second_time(network, 1000.0 / span(start.spec.path))
    return again(network, plan)


def _check_times(start: Bundle, plan: Student) -> None:
    if start.spec.second_time and not plan.second_time:
        raise RecipeError(
            f"{start.name!r} is told where its jumps land, which this recipe's student would lose; start from a "
            "network of one time"
        )
    if plan.second_time and plan.lora_rank is not None:
        raise RecipeError(
            "this recipe's student has a second time and LoRA, which would leave the new input untrained; train all "
            "weights, or leave second_time out"
        )


def load_denoiser(bundle: Bundle) -> Any:
    """The denoiser of a bundle of any family, as its own class."""
    return bundle.load(bundle.family.folder)


def is_unet(bundle: Bundle) -> bool:
    return bundle.family.folder == "unet"


def _refuse_unet_surgery(start: Bundle, plan: Student) -> None:
    name = start.config(start.family.folder)["_class_name"]
    if plan.unet_only:
        raise RecipeError(
            f"this recipe changes a U-Net (its blocks, channels, attention or guidance input), and {start.name!r} is a "
            f"{name}; for transformers use ppcl or progressive"
        )
    if start.family.takes_w(start.config(start.family.folder)):
        raise RecipeError(
            f"{start.name!r} takes the guidance scale as an input, which this recipe's student would lose, and in a "
            f"{name} it cannot be folded; start from a network without it"
        )


def with_guidance(start: Bundle, plan: Student, *, fold_scale: float) -> Any:
    """The start's U-Net with the guidance input or the adapters that the plan asks for, or without.

    Errors: `RecipeError` for a start whose guidance can be neither kept nor folded.
    """
    unet = load_denoiser(start)
    width = unet.config.get(guidance_adapter.FIELD)
    if width not in (None, plan.adapter_width):
        raise RecipeError(
            f"{start.name!r} has guidance adapters of width {width}, and this recipe's student has "
            f"{plan.adapter_width or 'none'}; start from the bundle that it was made of, {start.spec.teacher!r}"
        )
    if negative_adapter.FIELD in unet.config and not plan.negative:
        raise RecipeError(
            f"{start.name!r} has negative adapters, which this recipe's student would lose; start from the bundle that "
            f"it was made of, {start.spec.teacher!r}"
        )
    if plan.negative and negative_adapter.FIELD not in unet.config:
        unet = with_negative(start, unet)
    if plan.adapter_width is not None and width is None:
        unet = guidance_adapter.adapt(unet, plan.adapter_width)
    if plan.guidance_width is None and unet.config.time_cond_proj_dim is not None:
        unet = fold_guidance(unet, fold_scale)
    elif plan.guidance_width is not None:
        unet = add_guidance(unet, plan.guidance_width)
    return unet


def reshaped(unet: Any, plan: Student) -> Any:
    """The U-Net with fewer blocks, fewer channels, linear attention or more layers, as the plan says.

    Errors: `RecipeError` for a plan that this U-Net cannot follow.
    """
    if plan.attention not in ("softmax", "linear"):
        raise RecipeError(f"attention is {plan.attention!r}; it must be softmax or linear")
    if plan.remove is not None:
        unet = cut_unet(unet, ranked_cut(unet, _answer(unet), plan.remove)[0])
    if plan.cut is not None:
        unet = cut_unet(unet, plan.cut)
    if plan.width is not None:
        unet = narrow_unet(unet, plan.width)
    if plan.attention == "linear" and FIELD not in unet.config:
        unet = linearise(deepcopy(unet))
    if plan.extra_layers:
        unet = deepen_unet(unet, plan.extra_layers)
    return unet


def _answer(unet: Any) -> Any:
    """The U-Net's answers to noise at four times, the same at every call."""
    draw = torch.Generator().manual_seed(0)
    c, size = unet.config, unet.config.sample_size
    x = torch.randn(8, c.in_channels, size, size, generator=draw)
    t = torch.tensor([999.0, 749.0, 499.0, 249.0] * 2)
    ctx = torch.randn(8, 16, c.cross_attention_dim, generator=draw)
    width = c.time_cond_proj_dim
    w = None if width is None else guidance_embedding(torch.full((8,), 3.0), width)
    return lambda: unet(x, t, ctx, timestep_cond=w, return_dict=False)[0]


def again(unet: Any, plan: Student) -> Any:
    """A trainable copy of a network, with LoRA of its own where the plan asks for it; of runs only the new layers, of
    guidance adapters only these."""
    out = deepcopy(merged(unet)).requires_grad_(not plan.runs)
    if plan.adapter_width is not None:
        for name, weight in out.named_parameters():
            weight.requires_grad_(guidance_adapter.is_adapter(name))
    if plan.negative:
        for name, weight in out.named_parameters():
            weight.requires_grad_(negative_adapter.is_negative_adapter(name))
    for name, weight in out.named_parameters():
        if any(word in name for word in plan.frozen) and ("block" in name or "layers." in name):
            weight.requires_grad_(False)
    for name in layer_twins(plan.runs):
        out.get_submodule(name).requires_grad_(True)
    if plan.lora_rank is not None:
        add_lora(out, plan.lora_rank)
    return out


def fake_of(frozen: Any, plan: Student, path: NoisePath) -> Any:
    """A fake score: a trainable copy of the teacher's network, with a second time or a scalar where the plan asks.

    Errors: `RecipeError` for a scalar in anything but a U-Net.
    """
    if plan.guidance_width is not None and "time_cond_proj_dim" not in getattr(frozen, "config", {}):
        raise RecipeError(
            f"this recipe's fake score takes a scalar, and the teacher is a {type(frozen).__name__}, which has no "
            "input for one; use a recipe whose fake score takes none, such as smd or sid"
        )
    out = again(frozen, plan)
    if plan.guidance_width is not None:
        out = add_guidance(out, out.config.time_cond_proj_dim or plan.guidance_width)
    told = any(isinstance(part, SecondTime) for part in out.modules())
    return add_second_time(out, 1000.0 / span(path)) if plan.second_time and not told else out


def unlearned(network: Any) -> Any:
    """A network of the same configuration with random weights."""
    plain = merged(network)
    return remade(type(plain), plain.config)


def add_guidance(unet: Any, width: int) -> Any:
    """The U-Net with an input for the guidance scale, ignored at first: its projection starts at zero."""
    if unet.config.time_cond_proj_dim == width:
        return unet
    if unet.config.time_cond_proj_dim is not None:
        raise RecipeError(
            f"the start has a guidance input of width {unet.config.time_cond_proj_dim}, the recipe asks for {width}; "
            "set guidance_width to that of the start"
        )
    out = _like(unet, time_cond_proj_dim=width)
    missing, unexpected = out.load_state_dict(unet.state_dict(), strict=False)
    if missing != ["time_embedding.cond_proj.weight"] or unexpected:
        raise RecipeError(f"this U-Net cannot take a guidance input: {missing} {unexpected}")
    nn.init.zeros_(out.time_embedding.cond_proj.weight)
    return out


def fold_guidance(unet: Any, w: float) -> Any:
    """The U-Net without its guidance input, answering as it did at scale w.

    The projected embedding is added before `time_embedding.linear_1`, so a fixed one is a change of that layer's bias.
    """
    out = _like(unet, time_cond_proj_dim=None)
    state = unet.state_dict()
    projection = state.pop("time_embedding.cond_proj.weight")
    shift = projection @ guidance_embedding(torch.tensor([w]), projection.shape[1])[0]
    out.load_state_dict(state)
    with torch.no_grad():
        out.time_embedding.linear_1.bias += out.time_embedding.linear_1.weight @ shift
    return out


def add_lora(unet: Any, rank: int) -> None:
    """Freeze the network and add trainable low-rank updates (Hu et al. 2021), zero at first.

    Errors: `RecipeError` for a class that diffusers adds none to.
    """
    from peft import LoraConfig

    if not hasattr(type(unet), "add_adapter"):
        raise RecipeError(f"diffusers adds no LoRA to {type(unet).__name__}; use a recipe that trains all weights")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)))


def merged(unet: Any) -> Any:
    """A copy with any LoRA added into its weights, of the plain class."""
    if not getattr(unet, "peft_config", None):
        return unet
    out = deepcopy(unet)
    out.fuse_lora()
    out.unload_lora()
    return out


def save_lora(unet: Any, folder: Path, component: str) -> None:
    """`pytorch_lora_weights.safetensors`, which diffusers' `load_lora_weights` reads."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    layers = get_peft_model_state_dict(unet)  # by peft's names, all of which diffusers reads
    named = {f"{component}.{name}": weight.contiguous() for name, weight in layers.items()}
    save_file(named, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})


def _like(unet: Any, **changes: Any) -> Any:
    """The U-Net with a changed config; weights of the same name and shape stay, others are new."""
    return rebuilt(unet, changes, lambda name: name)
