"""What is exported: for each role of a bundle, its network behind flat inputs, example feeds, and which axes may vary.

Axes: B batch, always free; h, w latent height and width, free only where the spec has several sizes; L tokens, fixed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle
from fewstep.models.networks import DenoiserNet
from fewstep.runtime.engine import CONTROLNET, DECODER, DENOISER, DENOISER_CONTROL, ENCODER, ROLES, TEXT
from fewstep.runtime.errors import EngineUnavailable
from fewstep.runtime.samplers import time_pairs

MAX_BATCH = 32
"""diffusers' upsampling branches at a batch of 64: a graph that allowed it would be traced twice."""
Axes = dict[int, Any]
Steer = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
"""The feeds of the role `controlnet` to its residuals."""


@dataclass(frozen=True)
class RoleGraph:
    """A module of positional tensors; `axes` gives the free axes of each input as `torch.export` dimensions."""

    role: str
    module: nn.Module
    feeds: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    axes: Mapping[str, Axes]


def roles_of(bundle: Bundle) -> tuple[str, ...]:
    """The roles that a bundle's networks can play, in the order of the engine table."""
    return tuple(r for r in ROLES if bundle.has("controlnet") or r not in (DENOISER_CONTROL, CONTROLNET))


def role_graph(bundle: Bundle, role: str) -> RoleGraph:
    """The network of one role and all that an exporter must know of it.

    Errors: `EngineUnavailable` where the bundle has no network for the role.
    """
    if role not in roles_of(bundle):
        raise EngineUnavailable(f"role is {role!r}; {bundle.root} has the roles {', '.join(roles_of(bundle))}")
    module = _module(bundle, role)
    feeds = random_feeds(bundle, role, batch=2, size=bundle.spec.sizes[0], seed=0)
    outputs = {TEXT: ("ctx",), DENOISER: ("f",), DENOISER_CONTROL: ("f",), DECODER: ("picture",), ENCODER: ("latent",)}
    names = outputs.get(role) or _residual_names(module, feeds)
    return RoleGraph(role, module, feeds, names, _axes(bundle, feeds))


def random_feeds(
    bundle: Bundle, role: str, *, batch: int, size: tuple[int, int], seed: int, controlnet: Steer | None = None
) -> dict[str, Tensor]:
    """Inputs as a role meets them, the same for the same seed: times, scales and guidance differ within the batch.

    size: (width, height) of the picture. controlnet: what makes residuals for `denoiser+control`; the bundle's own
    network where it is left out.
    """
    spec, draw = bundle.spec, torch.Generator("cpu").manual_seed(seed)
    width, height = size
    latent = (batch, spec.latent.channels, height // spec.latent.factor, width // spec.latent.factor)
    if role == TEXT:
        tokens = bundle.tokenizer
        words = torch.randint(0, len(tokens), (batch, tokens.model_max_length), generator=draw)
        words[:, 0], words[:, -1] = tokens.bos_token_id, tokens.eos_token_id
        return {"ids": words}
    if role == DECODER:
        return {"latent": torch.randn(latent, generator=draw)}
    if role == ENCODER:
        return {"picture": torch.rand(batch, 3, height, width, generator=draw) * 2 - 1}
    unet = _unet_config(bundle)
    ctx = (batch, bundle.tokenizer.model_max_length, unet["cross_attention_dim"])
    feeds = {
        "x": torch.randn(latent, generator=draw),
        "t": _times(bundle, batch, draw),
        "ctx": torch.randn(ctx, generator=draw),
    }
    if role == CONTROLNET:
        edge = (torch.rand(batch, 1, height, width, generator=draw) < 0.1).float().expand(-1, 3, -1, -1).contiguous()
        return feeds | {"edge": edge, "scale": 0.5 + torch.rand(batch, generator=draw)}
    if unet.get("time_cond_proj_dim") is not None:
        low, high = spec.guidance.range
        feeds["w"] = low + (high - low) * torch.rand(batch, generator=draw)
    if role == DENOISER_CONTROL:
        inputs = random_feeds(bundle, CONTROLNET, batch=batch, size=size, seed=seed)
        residuals = (controlnet or _own_controlnet(bundle))(inputs)
        feeds |= {f"residual_{k}": residual for k, residual in enumerate(residuals)}
    return feeds


def _residual_names(controlnet: nn.Module, feeds: Mapping[str, Tensor]) -> tuple[str, ...]:
    with torch.no_grad():
        return tuple(f"residual_{k}" for k in range(len(controlnet(*feeds.values()))))


def _own_controlnet(bundle: Bundle) -> Steer:
    network = bundle.controlnet()

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            out: tuple[Tensor, ...] = network(*inputs.values())
        return out

    return run


def _times(bundle: Bundle, batch: int, draw: torch.Generator) -> Tensor:
    """Times that the sampler asks for, drawn without repetition while they last: noisiest first, then at random."""
    spec = bundle.spec
    steps = spec.steps[-1] if spec.steps else 8
    times = [t for t, _ in time_pairs(spec, steps)]
    order = [0, *(1 + torch.randperm(len(times) - 1, generator=draw)).tolist()]
    return torch.tensor([times[order[k % len(order)]] for k in range(batch)], dtype=torch.float32)


def _unet_config(bundle: Bundle) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((bundle.root / "unet" / "config.json").read_text())
    return config


class _FlatDenoiser(nn.Module):
    """`DenoiserNet` with every tensor positional: x, t, ctx, then w if the network takes it, then residuals."""

    def __init__(self, net: DenoiserNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor, *rest: Tensor) -> Tensor:
        w, residuals = (rest[0], rest[1:]) if self.net.takes_w else (None, rest)
        out: Tensor = self.net(x, t, ctx, w, *residuals)
        return out


def _module(bundle: Bundle, role: str) -> nn.Module:
    if role in (DENOISER, DENOISER_CONTROL):
        return _FlatDenoiser(bundle.denoiser_net()).eval()
    makers = {
        TEXT: bundle.text_encoder,
        CONTROLNET: bundle.controlnet,
        DECODER: bundle.decoder,
        ENCODER: bundle.encoder,
    }
    return makers[role]()


def _axes(bundle: Bundle, feeds: Mapping[str, Tensor]) -> dict[str, Axes]:
    """Free axes of each input: the batch, and height and width in steps of the denoiser's own stride."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    axes: dict[str, Axes] = {name: {0: batch} for name in feeds}
    sizes = bundle.spec.sizes
    if len(sizes) == 1:
        return axes
    unit = bundle.spec.latent.factor * 2 ** (len(_unet_config(bundle)["block_out_channels"]) - 1)
    width, height = sizes[0]
    rows = torch.export.Dim("rows", min=1, max=max(h for _, h in sizes) // unit)
    columns = torch.export.Dim("columns", min=1, max=max(w for w, _ in sizes) // unit)
    for name, tensor in feeds.items():
        if tensor.ndim == 4:
            axes[name][2] = (tensor.shape[2] * unit // height) * rows
            axes[name][3] = (tensor.shape[3] * unit // width) * columns
    return axes
