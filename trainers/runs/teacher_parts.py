"""What the four stages of the built-in teacher learn from: their losses and their batches (`trainers.runs.teacher`)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.models.bundle import Bundle
from fewstep.models.denoiser import Denoiser
from fewstep.models.predictions import target

from ..loop.player import Player
from ..parts.objective import Batch, Metrics, Turn, derive
from ..parts.transitions import noised
from ..pictures import scenes
from ..pictures.data import Latents, to_pixels, tokenize

ATTRIBUTES = (len(scenes.SHAPES) + 1, len(scenes.COLOURS) + 1, len(scenes.RADII) + 1)
CLAIM_SIZES = (*ATTRIBUTES * 3, len(scenes.RELATIONS) + 1, len(scenes.BACKGROUNDS) + 1, 4)


@dataclass(frozen=True)
class AutoencoderLoss:
    """Absolute, squared and gradient error of the picture decoded from a noisy latent."""

    players: tuple[Player, ...]
    latent_noise: float = 0.12

    def loss(self, player: str, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        vae: Any = self.players[0].module  # diffusers' autoencoder, which has no types
        latent = vae.encoder(batch.x0)
        off = (vae.decoder(latent + self.latent_noise * turn.noise(latent)).float() - batch.x0).contiguous()
        slope = off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()
        error = off.square().mean()
        total = off.abs().mean() + 2 * error + 0.5 * slope + 2e-3 * latent.float().square().mean()
        return total, {"error": float(error.detach())}


@dataclass(frozen=True)
class WordsLoss:
    """Cross-entropy of every claim of the caption, read from the end token."""

    players: tuple[Player, ...]
    end_token: int

    def loss(self, player: str, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        ids, claims = batch.x0, batch.cond["claims"]
        module = self.players[0].module
        assert isinstance(module, nn.ModuleList)
        text, heads = module
        states = text(ids).last_hidden_state
        end = states[torch.arange(len(ids), device=ids.device), (ids == self.end_token).int().argmax(1)]
        guesses = heads(end).float().split(CLAIM_SIZES, dim=1)
        total = torch.stack([functional.cross_entropy(g, c) for g, c in zip(guesses, claims.T, strict=True)]).sum()
        right = torch.stack([g.argmax(1) == c for g, c in zip(guesses, claims.T, strict=True)]).float().mean()
        return total, {"right": float(right)}


@dataclass(frozen=True)
class DenoiserLoss:
    """`|F - v|^2` at uniform integer times; with a ControlNet in `control`, of the controlled network."""

    players: tuple[Player, ...]
    denoiser: Callable[[Batch], tuple[Denoiser, dict[str, Tensor]]]

    def loss(self, player: str, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        denoiser, cond = self.denoiser(batch)
        t = turn.integers(1000, len(batch.x0)).double().to(batch.x0.device)
        noise = turn.noise(batch.x0)
        f = denoiser.raw(noised(denoiser.path, batch.x0, t, noise), t, cond).float()
        grid = t.reshape(-1, *([1] * (noise.ndim - 1)))
        aim = target(denoiser.prediction, denoiser.path, grid, batch.x0.double(), noise.double()).float()
        return (f - aim).square().mean(), {}


class PictureSource:
    """Rendered scenes as pixels, drawn once."""

    def __init__(self, count: int, batch: int, seed: int, device: str) -> None:
        rng = random.Random(derive(seed, "pictures"))
        drawn = [np.asarray(scenes.render(scenes.sample(rng).scene)) for _ in range(count)]
        self.pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
        self.size, self.seed, self.device = batch, seed, device

    def batch(self, step: int) -> Batch:
        rows = torch.randint(len(self.pixels), (self.size,), generator=_generator(self.seed, step))
        x = self.pixels[rows].to(self.device).float().div(127.5).sub(1)
        return Batch(x.contiguous(memory_format=torch.channels_last), {}, {})


class CaptionSource:
    """Fresh captions as token ids, with their claims as class numbers."""

    def __init__(self, tokenizer: Any, batch: int, seed: int, device: str) -> None:
        self.tokenizer, self.size, self.seed, self.device = tokenizer, batch, seed, device

    def batch(self, step: int) -> Batch:
        rng = random.Random(derive(self.seed, step, "captions"))
        captions = [scenes.sample(rng).caption for _ in range(self.size)]
        ids = tokenize(self.tokenizer, [c.text for c in captions]).long().to(self.device)
        claims = torch.tensor([claim_numbers(c) for c in captions], device=self.device)
        return Batch(ids, {"claims": claims}, {})


class IdSource:
    """Latents and token ids, prompts dropped at a rate, for a text encoder that trains along."""

    def __init__(self, data: Latents, batch: int, seed: int, device: str, drop: float = 0.1) -> None:
        self.data, self.size, self.seed, self.device, self.drop = data, batch, seed, device, drop

    def batch(self, step: int) -> Batch:
        rng = _generator(self.seed, step)
        rows = torch.randint(len(self.data), (self.size,), generator=rng)
        phrasing = torch.randint(self.data.ids.shape[1], (self.size,), generator=rng)
        ids = self.data.ids[rows, phrasing].long()
        ids[torch.rand(self.size, generator=rng) < self.drop] = self.data.empty["ids"].long()
        x0 = self.data.latents[rows].float().to(self.device)
        return Batch(x0.contiguous(memory_format=torch.channels_last), {"ids": ids.to(self.device)}, {})


class EdgeSource:
    """Latents, text features and edge pictures of scenes drawn once; the text is dropped half the time, so the
    ControlNet learns to follow the edges by themselves (Zhang et al. 2023, section 3.3)."""

    def __init__(self, bundle: Bundle, count: int, batch: int, seed: int, device: str) -> None:
        rng = random.Random(derive(seed, "edges"))
        drawn = [scenes.sample(rng) for _ in range(count)]
        encoder, text = bundle.encoder(), bundle.text_encoder()
        ids = tokenize(bundle.tokenizer, [s.caption.text for s in drawn]).long()
        with torch.no_grad():
            chunks = [drawn[k : k + 64] for k in range(0, count, 64)]
            pixels = (torch.stack([to_pixels(scenes.render(s.scene)) for s in chunk]) for chunk in chunks)
            self.latents = torch.cat([encoder(p) for p in pixels])
            self.ctx = torch.cat([text(i) for i in ids.split(256)])
            self.empty = text(tokenize(bundle.tokenizer, [""]).long())
        edges = np.stack([np.asarray(scenes.edges(s.scene))[..., 0] for s in drawn])
        self.edges = torch.from_numpy(edges)
        self.size, self.seed, self.device = batch, seed, device

    def batch(self, step: int) -> Batch:
        rng = _generator(self.seed, step)
        rows = torch.randint(len(self.latents), (self.size,), generator=rng)
        ctx = self.ctx[rows].clone()
        ctx[torch.rand(self.size, generator=rng) < 0.5] = self.empty[0]
        edge = (self.edges[rows].float() / 255)[:, None].expand(-1, 3, -1, -1)
        cond = {"ctx": ctx.to(self.device), "edge": edge.to(self.device)}
        return Batch(self.latents[rows].to(self.device), cond, {})


def claim_numbers(caption: scenes.Caption) -> list[int]:
    """A caption's claims as class numbers, 0 where it says nothing; `CLAIM_SIZES` has the number of classes of each."""

    def number(names: Sequence[str], name: str | None) -> int:
        return 0 if name is None else 1 + list(names).index(name)

    out: list[int] = []
    for k in range(3):
        claim = caption.objects[k] if k < len(caption.objects) else None
        out.append(number(scenes.SHAPES, claim.shape if claim else None))
        out.append(number(tuple(scenes.COLOURS), claim.colour if claim else None))
        out.append(number(tuple(scenes.RADII), claim.size if claim else None))
    out.append(number(scenes.RELATIONS, caption.relation))
    out.append(number(tuple(scenes.BACKGROUNDS), caption.background))
    return [*out, len(caption.objects)]


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, step, "rows"))
