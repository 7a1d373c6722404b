"""What is exported: for each role of a bundle, its network behind flat inputs, example feeds, and which axes may vary.

Axes: B batch, always free; h, w latent height and width, free only where the spec has several sizes; L tokens, fixed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle
from fewstep.models.paths import told_time
from fewstep.models.roles import (
    ADAPTER,
    CONTROLNET,
    DECODER,
    DECODER_TINY,
    DENOISER,
    DENOISER_ADAPTER,
    DENOISER_CONTROL,
    DENOISER_IMAGE_PROMPT,
    DENOISER_LORA,
    DENOISER_NEGATIVE,
    ENCODER,
    IMAGE_PROMPT,
    TEXT,
    picture_steps,
)
from fewstep.runtime.errors import EngineUnavailable
from fewstep.runtime.sampling.loop import size_conditions
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.sampling.samplers import updates
from fewstep.runtime.sampling.text import kept_places

MAX_BATCH = 32
"""diffusers' upsampling branches at a batch of 64: a graph that allowed it would be traced twice."""
Axes = dict[int, Any]
Run = Callable[[str, Mapping[str, Tensor]], tuple[Tensor, ...]]
"""(role, feeds) -> outputs, as an engine's `run`."""


@dataclass(frozen=True)
class RoleGraph:
    """A module of positional tensors; `axes` gives the free axes of each input as `torch.export` dimensions."""

    role: str
    module: nn.Module
    feeds: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    axes: Mapping[str, Axes]


def role_graph(bundle: Bundle, role: str) -> RoleGraph:
    """The network of one role and all that an exporter must know of it.

    Errors: `EngineUnavailable` where the bundle has no network for the role.
    """
    if role not in (*bundle.roles, *bundle.extra_roles):
        raise EngineUnavailable(f"role is {role!r}; {bundle.root} has the roles {', '.join(bundle.roles)}")
    network = bundle.network(role)
    feeds = random_feeds(bundle, role, batch=2, size=bundle.spec.sizes[0], seed=0)
    ordered = {name: feeds[name] for name in network.inputs}
    return RoleGraph(role, Positional(network).eval(), ordered, network.outputs, _axes(bundle, ordered))


class Positional(nn.Module):
    """A role's network as exporters see it: any number of positional tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *feeds: Tensor) -> Any:
        return self.network(*feeds)


def random_feeds(
    bundle: Bundle, role: str, *, batch: int, size: tuple[int, int], seed: int, run: Run | None = None
) -> dict[str, Tensor]:
    """Inputs as a role meets them, the same for the same seed: times, scales and guidance differ within the batch.

    size: (width, height) of the picture. run: makes what other roles give this one (embeddings, residuals); the
    bundle's own networks where it is left out.
    """
    spec, draw = bundle.spec, torch.Generator("cpu").manual_seed(seed)
    width, height = size
    latent = (batch, spec.latent.channels, height // spec.latent.factor, width // spec.latent.factor)
    if role == TEXT:
        return _random_tokens(bundle, batch, draw)
    if role in (DECODER, DECODER_TINY):
        return {"latent": torch.randn(latent, generator=draw)}
    if role == ENCODER:
        return {"picture": torch.rand(batch, 3, height, width, generator=draw) * 2 - 1}
    if role == ADAPTER:
        return {"edge": _random_edges(batch, size, draw)}
    if role == IMAGE_PROMPT:
        side = int(bundle.config("image_encoder")["image_size"])
        return {"pixels": torch.randn(batch, 3, side, side, generator=draw)}
    if (steps := picture_steps(role)) is not None:
        return _whole_feeds(bundle, steps, batch, size, seed)
    run = run or own_networks(bundle)
    words = run(TEXT, _random_tokens(bundle, batch, draw))
    outputs = bundle.family.text_outputs
    feeds = {"x": torch.randn(latent, generator=draw)}
    feeds["t"], landings = _times(bundle, batch, draw)
    feeds |= {name: value.clone() for name, value in zip(outputs, words, strict=True)}
    sized = size_conditions(GenerateRequest(prompt="-", width=width, height=height), spec)
    feeds |= {name: value.expand(batch, -1).contiguous() for name, value in sized.items()}
    if role == CONTROLNET:
        feeds |= {"edge": _random_edges(batch, size, draw), "scale": 0.5 + torch.rand(batch, generator=draw)}
        if kinds := bundle.config("controlnet").get("num_control_type"):
            feeds["kind"] = torch.randint(0, kinds, (batch,), generator=draw)
        return feeds
    if spec.second_time:
        feeds["s"] = landings
    if bundle.family.takes_w(bundle.config(bundle.family.folder)):
        low, high = spec.guidance.range
        feeds["w"] = low + (high - low) * torch.rand(batch, generator=draw)
    if role == DENOISER_CONTROL:
        inputs = random_feeds(bundle, CONTROLNET, batch=batch, size=size, seed=seed, run=run)
        feeds |= {f"residual_{k}": residual.clone() for k, residual in enumerate(run(CONTROLNET, inputs))}
    if role == DENOISER_ADAPTER:
        found = run(ADAPTER, {"edge": _random_edges(batch, size, draw)})
        scale = 0.5 + torch.rand(batch, 1, 1, 1, generator=draw)
        feeds |= {f"feature_{k}": feature * scale.to(feature.device) for k, feature in enumerate(found)}
    if role == DENOISER_IMAGE_PROMPT:
        (tokens,) = run(IMAGE_PROMPT, random_feeds(bundle, IMAGE_PROMPT, batch=batch, size=size, seed=seed))
        layers = len(bundle.load("ip_adapter").attention) // 2
        feeds |= {"img_tok": tokens.clone(), "img_scale": torch.rand(batch, layers, generator=draw)}
    if role == DENOISER_LORA:
        feeds["lora_scale"] = torch.randn(batch, len(bundle.lora_names), generator=draw)
    if role == DENOISER_NEGATIVE:
        avoided = run(TEXT, _random_tokens(bundle, batch, draw))
        feeds["neg_ctx"] = avoided[outputs.index("ctx")].clone()
        feeds["neg_scale"] = 4 * torch.rand(batch, generator=draw)
    return feeds


def _whole_feeds(bundle: Bundle, steps: int, batch: int, size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Whole requests from their tokens on: every row begins at the noisiest time."""
    feeds = random_feeds(bundle, TEXT, batch=batch, size=size, seed=seed)
    inner = random_feeds(bundle, DENOISER, batch=batch, size=size, seed=seed)
    feeds |= {name: value for name, value in inner.items() if name not in bundle.family.text_outputs}
    rows = updates(bundle.spec, steps)
    numbers = {"t": [t for t, _ in rows], "a": [u.a for _, u in rows], "b": [u.b for _, u in rows]}
    if bundle.spec.second_time:
        numbers["s"] = [told_time(bundle.spec.path, update.lands) for _, update in rows]
    feeds |= {name: torch.tensor(values).expand(batch, -1).contiguous() for name, values in numbers.items()}
    if steps > 1:
        draw = torch.Generator("cpu").manual_seed(seed + 1)
        scales = torch.tensor([update.c for _, update in rows[:-1]]).reshape(1, -1, 1, 1, 1)
        feeds["z"] = scales * torch.randn(batch, steps - 1, *feeds["x"].shape[1:], generator=draw)
    return feeds


def own_networks(bundle: Bundle) -> Run:
    """The bundle's networks in torch, each loaded once."""
    network = cache(bundle.network)

    @torch.no_grad()
    def run(role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        module = network(role)
        out = module(*(feeds[name] for name in module.inputs))
        return out if isinstance(out, tuple) else (out,)

    return run


def _random_edges(batch: int, size: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Grey pictures [B, 3, H, W] with a tenth of their pixels white."""
    width, height = size
    return (torch.rand(batch, 1, height, width, generator=draw) < 0.1).float().expand(-1, 3, -1, -1).contiguous()


def _random_tokens(bundle: Bundle, batch: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Random words between the marks of a real prompt, and for masks a random number of real tokens."""
    feeds = {}
    for k, (tokenizer, text) in enumerate(zip(bundle.tokenizers(), bundle.spec.text, strict=True), start=1):
        suffix = "" if k == 1 else f"_{k}"
        length = text.length or tokenizer.model_max_length
        words = torch.randint(0, len(tokenizer), (batch, length), generator=draw)
        for place, mark in ((0, tokenizer.bos_token_id), (-1, tokenizer.eos_token_id)):
            if mark is not None:
                words[:, place] = mark
        feeds[f"ids{suffix}"] = words
        if text.mask:
            real = torch.randint(1, length + 1, (batch, 1), generator=draw)
            feeds[f"mask{suffix}"] = (torch.arange(length) < real).long()
        if text.keep is not None:
            kept = kept_places(length, text.keep), kept_places(length, text.keep, bare=True)
            feeds[f"keep{suffix}"] = torch.tensor([kept[k % 2] for k in range(batch)])
    return feeds


def _times(bundle: Bundle, batch: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Times that the sampler asks for and where it lands from each, drawn without repetition while they last: noisiest
    first, then at random."""
    spec = bundle.spec
    steps = spec.steps[-1] if spec.steps else 8
    times = [(t, told_time(spec.path, update.lands)) for t, update in updates(spec, steps)]
    order = [0, *(1 + torch.randperm(len(times) - 1, generator=draw)).tolist()]
    drawn = torch.tensor([times[order[k % len(order)]] for k in range(batch)], dtype=torch.float32)
    return drawn[:, 0].contiguous(), drawn[:, 1].contiguous()


def axis_lengths(bundle: Bundle) -> list[dict[str, int]]:
    """For each picture size of a bundle, the lengths of the free axes that `role_graph` names."""
    unit = bundle.size_unit
    return [{"rows": height // unit, "columns": width // unit} for width, height in bundle.spec.sizes]


def _axes(bundle: Bundle, feeds: Mapping[str, Tensor]) -> dict[str, Axes]:
    """Free axes of each input: the batch, and height and width in steps of the denoiser's own stride."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    axes: dict[str, Axes] = {name: {0: batch} for name in feeds}
    sizes = bundle.spec.sizes
    if len(sizes) == 1:
        return axes
    unit, (width, height), every = bundle.size_unit, sizes[0], axis_lengths(bundle)
    rows, columns = (torch.export.Dim(a, min=1, max=max(at[a] for at in every)) for a in ("rows", "columns"))
    for name, tensor in feeds.items():
        if tensor.ndim == 4 and name != "pixels":  # an image encoder has one size
            axes[name][2] = (tensor.shape[2] * unit // height) * rows
            axes[name][3] = (tensor.shape[3] * unit // width) * columns
    return axes
