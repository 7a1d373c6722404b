"""Networks of the layer shapes of well-known models, in plain torch, for timing where diffusers is not installed.

Weights are random, so only time, operations and memory mean anything. The layers and their order are those of
diffusers' `UNet2DConditionModel`, `SanaTransformer2DModel` and `AutoencoderTiny`; a test holds parameter and operation
counts equal to theirs at small widths. Axes: x [B, C, h, w]; t [B]; ctx [B, L, D]; added [B, A] (SDXL's pooled text and
sizes, embedded).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class UNetShape:
    """`depths`: transformer layers per level, 0 for a level without attention. `added`: width of SDXL's extra input."""

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    middle_depth: int
    ctx: int
    head: int = 64
    layers: int = 2
    latent: int = 4
    added: int = 0
    groups: int = 32


@dataclass(frozen=True, kw_only=True)
class SanaShape:
    width: int
    layers: int
    latent: int
    caption: int
    head: int
    cross_heads: int
    mlp_ratio: float = 2.5
    guided: bool = True


SD_TURBO = UNetShape(channels=(320, 640, 1280, 1280), depths=(1, 1, 1, 0), middle_depth=1, ctx=1024)
SDXL_TURBO = UNetShape(channels=(320, 640, 1280), depths=(0, 2, 10), middle_depth=10, ctx=2048, added=2816)
SANA_SPRINT = SanaShape(width=2240, layers=20, latent=32, caption=2304, head=32, cross_heads=20)


def waves(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of [B], cosines first, [B, width]."""
    rate = torch.exp(torch.arange(width // 2, device=t.device) * (-math.log(10000.0) / (width // 2)))
    angle = t.float()[:, None] * rate
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, inside: int, outside: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.time = nn.Linear(time, outside)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outside), nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(emb))[:, :, None, None]
        out: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class Attention(nn.Module):
    def __init__(self, width: int, ctx: int, head: int, *, bias: bool = False, heads: int | None = None) -> None:
        super().__init__()
        self.heads = heads or width // head
        self.q, self.k, self.v = (nn.Linear(d, width, bias=bias) for d in (width, ctx, ctx))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, ctx: Tensor) -> Tensor:
        q, k, v = (f(s).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f, s in
                   ((self.q, x), (self.k, ctx), (self.v, ctx)))  # fmt: skip
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class Layer(nn.Module):
    """Self attention, cross attention, gated feed-forward."""

    def __init__(self, width: int, ctx: int, head: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = Attention(width, width, head), Attention(width, ctx, head)
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, ctx: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.own(h, h)
        x = x + self.cross(self.norm2(x), ctx)
        value, gate = self.up(self.norm3(x)).chunk(2, dim=-1)
        out: Tensor = x + self.down(value * F.gelu(gate))
        return out


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, ctx: int, head: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width, ctx, head) for _ in range(depth))

    def forward(self, x: Tensor, ctx: Tensor) -> Tensor:
        h = self.enter(self.norm(x).flatten(2).transpose(1, 2))
        for layer in self.layers:
            h = layer(h, ctx)
        change: Tensor = self.leave(h).transpose(1, 2).reshape(x.shape)
        return x + change


class UNet(nn.Module):
    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        first, time = shape.channels[0], 4 * shape.channels[0]
        self.first = first
        self.time = _perceptron(first, time)
        self.added = _perceptron(shape.added, time) if shape.added else None
        self.enter = nn.Conv2d(shape.latent, first, 3, padding=1)

        def block(inside: int, outside: int, depth: int) -> nn.ModuleList:
            parts: list[nn.Module] = [ResBlock(inside, outside, time, shape.groups)]
            if depth:
                parts.append(Transformer(outside, depth, shape.ctx, shape.head, shape.groups))
            return nn.ModuleList(parts)

        self.down, self.shrink, kept, width = nn.ModuleList(), nn.ModuleList(), [first], first
        for level, (channels, depth) in enumerate(zip(shape.channels, shape.depths, strict=True)):
            blocks = nn.ModuleList()
            for _ in range(shape.layers):
                blocks.append(block(width, channels, depth))
                width = channels
                kept.append(width)
            self.down.append(blocks)
            if level < len(shape.channels) - 1:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                kept.append(width)
        self.middle = block(width, width, shape.middle_depth)
        self.middle_end = ResBlock(width, width, time, shape.groups)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, (channels, depth) in enumerate(zip(shape.channels[::-1], shape.depths[::-1], strict=True)):
            blocks = nn.ModuleList()
            for _ in range(shape.layers + 1):
                blocks.append(block(width + kept.pop(), channels, depth))
                width = channels
            self.up.append(blocks)
            if level < len(shape.channels) - 1:
                self.grow.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm, self.leave = nn.GroupNorm(shape.groups, width), nn.Conv2d(width, shape.latent, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor, added: Tensor | None = None) -> Tensor:
        emb = self.time(waves(t, self.first).to(x.dtype))
        if self.added is not None and added is not None:
            emb = emb + self.added(added)
        x = self.enter(x)
        kept = [x]
        for level, blocks in enumerate(self.down):
            for parts in blocks:  # type: ignore[attr-defined]
                x = _run(parts, x, emb, ctx)
                kept.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
                kept.append(x)
        x = self.middle_end(_run(self.middle, x, emb, ctx), emb)
        for level, blocks in enumerate(self.up):
            for parts in blocks:  # type: ignore[attr-defined]
                x = _run(parts, torch.cat([x, kept.pop()], dim=1), emb, ctx)
            if level < len(self.grow):
                x = self.grow[level](F.interpolate(x, scale_factor=2.0))
        out: Tensor = self.leave(F.silu(self.norm(x)))
        return out


class SanaBlock(nn.Module):
    """Linear self attention, cross attention, and a gated feed-forward with a depthwise convolution between."""

    def __init__(self, shape: SanaShape) -> None:
        super().__init__()
        width, hidden = shape.width, int(shape.mlp_ratio * shape.width)
        self.heads = width // shape.head
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm_q, self.norm_k = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.cross = Attention(width, width, 0, bias=True, heads=shape.cross_heads)
        self.cross_q, self.cross_k = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.wide = nn.Conv2d(width, 2 * hidden, 1)
        self.depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.narrow = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x: Tensor, ctx: Tensor, emb: Tensor, rows: int) -> Tensor:
        table = self.table + emb.reshape(emb.shape[0], 6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unsqueeze(2).unbind(1)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.out(self._linear_attention(h))
        x = x + self._cross_attention(x, ctx)
        h = self.norm2(x) * (1 + scale2) + shift2
        h = h.transpose(1, 2).unflatten(2, (rows, -1))
        value, gate = self.depth(F.silu(self.wide(h))).chunk(2, dim=1)
        change: Tensor = self.narrow(value * F.silu(gate)).flatten(2).transpose(1, 2)
        return x + gate2 * change

    def _linear_attention(self, h: Tensor) -> Tensor:
        """relu(q) (relu(k)^T [v 1]): the last row of the product is the normaliser; float32, as its sums are long."""
        q, k, v = (s.transpose(1, 2).unflatten(1, (self.heads, -1)) for s in
                   (self.norm_q(self.q(h)), self.norm_k(self.k(h)), self.v(h)))  # fmt: skip
        q, k = F.relu(q), F.relu(k).transpose(2, 3)
        mixed = torch.matmul(torch.matmul(F.pad(v, (0, 0, 0, 1), value=1.0).float(), k.float()), q.float())
        out = mixed[:, :, :-1] / (mixed[:, :, -1:] + 1e-15)
        return out.flatten(1, 2).transpose(1, 2).to(h.dtype)

    def _cross_attention(self, x: Tensor, ctx: Tensor) -> Tensor:
        attend = self.cross
        q, k, v = (s.unflatten(-1, (attend.heads, -1)).transpose(1, 2) for s in
                   (self.cross_q(attend.q(x)), self.cross_k(attend.k(ctx)), attend.v(ctx)))  # fmt: skip
        out: Tensor = attend.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Sana(nn.Module):
    def __init__(self, shape: SanaShape) -> None:
        super().__init__()
        width = shape.width
        self.patch = nn.Conv2d(shape.latent, width, 1)
        self.time = _perceptron(256, width)
        self.guidance = _perceptron(256, width) if shape.guided else None
        self.gates = nn.Linear(width, 6 * width)
        self.caption = nn.Sequential(nn.Linear(shape.caption, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.caption_norm = nn.RMSNorm(width, eps=1e-5)
        self.blocks = nn.ModuleList(SanaBlock(shape) for _ in range(shape.layers))
        self.table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.leave = nn.Linear(width, shape.latent)

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor, added: Tensor | None = None) -> Tensor:
        """added [B]: the guidance scale, where the shape takes one."""
        rows = x.shape[2]
        emb = self.time(waves(t, 256).to(x.dtype))
        if self.guidance is not None and added is not None:
            emb = emb + self.guidance(waves(added, 256).to(x.dtype))
        ctx = self.caption_norm(self.caption(ctx))
        h = self.patch(x).flatten(2).transpose(1, 2)
        gates = self.gates(F.silu(emb))
        for block in self.blocks:
            h = block(h, ctx, gates, rows)
        shift, scale = (self.table[None] + emb[:, None]).chunk(2, dim=1)
        out: Tensor = self.leave(self.norm(h) * (1 + scale) + shift)
        return out.transpose(1, 2).reshape(x.shape)


class TinyDecoder(nn.Module):
    """TAESD's decoder: `blocks` residual blocks per level, 8 times the latent's side with three doublings."""

    def __init__(self, latent: int = 4, width: int = 64, blocks: Sequence[int] = (3, 3, 3, 1)) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(latent, width, 3, padding=1), nn.ReLU()]
        for level, count in enumerate(blocks):
            parts += [TinyBlock(width) for _ in range(count)]
            if level < len(blocks) - 1:
                parts.append(nn.Upsample(scale_factor=2.0))
            last = level == len(blocks) - 1
            parts.append(nn.Conv2d(width, 3 if last else width, 3, padding=1, bias=last))
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.parts(torch.tanh(x / 3) * 3).mul(2).sub(1)
        return out


class TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs(x) + x)


def _perceptron(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, outside), nn.SiLU(), nn.Linear(outside, outside))


def _run(parts: nn.Module, x: Tensor, emb: Tensor, ctx: Tensor) -> Tensor:
    """A residual block and, where the level has one, its transformer."""
    block, *rest = parts.children()
    x = block(x, emb)
    for transformer in rest:
        x = transformer(x, ctx)
    return x
