"""`fewstep distill tiny-decoder`: a small decoder that draws what a bundle's own decoder draws, as TAESD does.

At one step the decoder costs more than the denoiser. The small one is an `AutoencoderTiny` like the one it learns from
(narrower, fewer blocks; the encoder is a copy), so diffusers loads it as any autoencoder. It learns on latents of real
pictures and of the student's own samples at each of its step counts, since those are what it will be given.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle, load_bundle, seal_bundle
from fewstep.models.networks import Decoder, as_network

from ..errors import RecipeError
from ..loop.loop import LoopSettings, train
from ..loop.player import Player, PlayerSettings
from ..parts.objective import Batch, Metrics, Turn, derive
from ..pictures.data import Latents, LatentSource, encode_scenes, load_latents
from ..pictures.features import FeatureNet, as_input, load_features
from ..pictures.preview import sample, save_grid
from .folders import check_out, in_place_of, open_run, run_folder

COMPONENT = "tiny_decoder"
CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class TinyDecoderSettings:
    """The small decoder and its training. The defaults have 0.42 of the shipped decoder's operations.

    width: channels; None keeps those of the larger decoder, whose weights are then inherited. blocks: residual blocks
    per resolution, coarse to fine; the fine ones cost most. pictures: latents of each kind (real, made) to learn from.
    features: weight of the distance in the eye of the feature network. latents: a file of encoded data to reuse.
    use_at: the step counts whose pictures it shall decode when served; none until it was measured to be good enough.
    """

    width: int | None = None
    blocks: tuple[int, ...] = (2, 2, 1, 0)
    steps: int = 2500
    batch: int = 32
    lr: float = 2e-3
    features: float = 0.02
    pictures: int = 4096
    seed: int = 0
    bf16: bool = True
    latents: str | None = None
    use_at: tuple[int, ...] = ()


@dataclass(frozen=True)
class DecoderDistillation:
    """`|p - q| + 2 |p - q|^2 + 0.5 |grad(p - q)| + features |phi(p) - phi(q)|^2`, q the larger decoder's picture."""

    players: tuple[Player, ...]
    eye: FeatureNet
    features: float

    def loss(self, player: str, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        made = self.players[0].module(batch.cond["latent"]).float()
        off = (made - batch.x0).contiguous()
        slope = off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()
        seen = self.eye.body(as_input(made)) - self.eye.body(as_input(batch.x0))
        error, look = off.square().mean(), seen.float().square().mean()
        total = off.abs().mean() + 2 * error + 0.5 * slope + self.features * look
        return total, {"error": float(error.detach()), "look": float(look.detach())}


class DecodedSource:
    """Latents [N, C, h, w] with the larger decoder's pictures, decoded once and kept as bytes."""

    def __init__(self, latents: Tensor, decoder: nn.Module, batch: int, seed: int, device: torch.device) -> None:
        self.latents, self.size, self.seed, self.device = latents, batch, seed, device
        decoder = decoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.pixels = torch.cat([_bytes(p) for p in _decode(latents, decoder, device)])

    def batch(self, step: int) -> Batch:
        rng = torch.Generator().manual_seed(derive(self.seed, step, "rows"))
        rows = torch.randint(len(self.latents), (self.size,), generator=rng)
        x0 = self.pixels[rows].to(self.device).float().div(127.5).sub(1)
        latent = self.latents[rows].float().to(self.device, memory_format=torch.channels_last)
        return Batch(x0.contiguous(memory_format=torch.channels_last), {"latent": latent}, {})


def distill_decoder(
    bundle: Bundle, out: Path, settings: TinyDecoderSettings | None = None, *, device: str | None = None,
    max_seconds: float | None = None,
) -> Bundle:  # fmt: skip
    """A copy of the bundle in `out` with the component `tiny_decoder/`, without engines, which must be made anew.

    The run (checkpoint, metrics, sample grid) stands beside it in `OUT.run`.
    Errors: `RecipeError` where the bundle's decoder is of another class, or `out` holds something else.
    """
    s = settings or TinyDecoderSettings()
    check_out(out, bundle)
    torch.manual_seed(s.seed)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tiny = build_tiny(bundle.load("vae"), s.width, s.blocks)
    student: Decoder = Decoder(tiny).to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    tiny.encoder.requires_grad_(False)
    data = load_latents(Path(s.latents)) if s.latents else encode_scenes(bundle, s.pictures, seed=s.seed)
    latents = training_latents(bundle, data, s.pictures, s.seed)
    larger = bundle.decoder()
    source = DecodedSource(latents, larger, s.batch, s.seed, where)
    learn = PlayerSettings(lr=s.lr, warmup=50, cooldown=0.8, ema={"kept": 0.995})
    player = Player("decoder", student, learn)
    method = DecoderDistillation((player,), load_features().to(where), s.features)
    run = run_folder(out)
    open_run(run, asdict(s))
    loop = LoopSettings(steps=s.steps, seed=s.seed, bf16=s.bf16, max_seconds=max_seconds)
    train(method, source, loop, run, label="tiny decoder", device=where)
    kept = player.averages["kept"].cpu().eval()
    seen = latents[:8].float()
    for name, decoder in (("larger", larger.cpu()), ("tiny", kept)):
        save_grid([seen], decoder, run / "samples" / f"{name}.png")
    return write_decoder(bundle, kept.vae, out, s.use_at)


def build_tiny(vae: Any, width: int | None, blocks: Sequence[int]) -> Any:
    """An `AutoencoderTiny` with a smaller decoder; encoder and scaling are copies.

    Of the same width its layers are the larger one's: the first blocks of each resolution, and what stands between.

    Errors: `RecipeError` where `vae` is no `AutoencoderTiny`, or `blocks` has another number of resolutions.
    """
    if type(vae).__name__ != "AutoencoderTiny":
        raise RecipeError(f"the decoder is an {type(vae).__name__}; a tiny decoder is made of an AutoencoderTiny")
    count = len(vae.config.num_decoder_blocks)
    if len(blocks) != count:
        raise RecipeError(f"blocks is {list(blocks)}; this decoder has {count} resolutions, so give {count} numbers")
    names = {n: v for n, v in vae.config.items() if not n.startswith("_") and n != "block_out_channels"}
    had = vae.config.decoder_block_out_channels
    names |= {"decoder_block_out_channels": (width or had[0],) * count, "num_decoder_blocks": tuple(blocks)}
    tiny = type(vae)(**names)
    tiny.encoder.load_state_dict(vae.encoder.state_dict())
    if width in (None, had[0]):
        for mine, theirs in zip(_resolutions(tiny), _resolutions(vae), strict=True):
            for small, large in zip(mine.blocks, theirs.blocks, strict=False):
                small.load_state_dict(large.state_dict())
            mine.last.load_state_dict(theirs.last.state_dict())
        tiny.decoder.layers[0].load_state_dict(vae.decoder.layers[0].state_dict())
    return tiny


@dataclass(frozen=True)
class _Resolution:
    """A resolution of a tiny decoder: its residual blocks, and the convolution that ends it."""

    blocks: list[nn.Module]
    last: nn.Module


def _resolutions(vae: Any) -> list[_Resolution]:
    """From coarse to fine. The first convolution of all stands before them."""
    found: list[_Resolution] = []
    blocks: list[nn.Module] = []
    for layer in vae.decoder.layers[1:]:
        if isinstance(layer, nn.Conv2d):
            found.append(_Resolution(blocks, layer))
            blocks = []
        elif any(True for _ in layer.parameters()):
            blocks.append(layer)
    return found


def training_latents(bundle: Bundle, data: Latents, count: int, seed: int) -> Tensor:
    """[2 count, C, h, w] half: latents of data, and the bundle's own samples, evenly from each of its step counts."""
    rng = torch.Generator().manual_seed(derive(seed, "tiny decoder"))
    rows = torch.randperm(len(data), generator=rng)[:count]
    spec, net = bundle.spec, as_network(bundle.denoiser_net())
    source = LatentSource(data, bundle.text_encoder(), CHUNK, spec=spec)
    steps = [n for n in spec.steps if n <= 4] or [4]
    made = []
    for k, chunk in enumerate(torch.stack([rows, torch.zeros_like(rows)], dim=1).split(CHUNK)):
        given = source.gather(chunk)
        uncond = given.uncond if spec.guidance.mode == "cfg" else None
        count, shape, w = steps[k % len(steps)], given.x0.shape, spec.guidance.default
        made.append(sample(net, spec, count, given.cond, shape, w=w, seed=k, uncond=uncond).half())
    return torch.cat([data.latents[rows].half(), *made])


def write_decoder(bundle: Bundle, tiny: Any, out: Path, use_at: Sequence[int] = ()) -> Bundle:
    """The bundle without its engines, with `tiny_decoder/` in it for the step counts `use_at`, sealed."""
    left = shutil.ignore_patterns("engines", "bundle.json", COMPONENT)
    with in_place_of(out) as beside:
        shutil.copytree(bundle.root, beside, ignore=left, dirs_exist_ok=True)
        tiny.to(memory_format=torch.contiguous_format).half().save_pretrained(beside / COMPONENT)
        seal_bundle(beside, bundle.name, replace(bundle.spec, tiny_decoder=tuple(use_at)))
    return load_bundle(out)


def with_tiny_decoder(bundle: Bundle, out: Path) -> Bundle:
    """A bundle in `out` whose decoder is this one's tiny decoder, for measuring it like any other bundle.

    Errors: `RecipeError` where the bundle has none.
    """
    if not bundle.has(COMPONENT):
        raise RecipeError(f"{bundle.root} has no {COMPONENT}/; make one with `fewstep distill tiny-decoder`")
    shutil.copytree(bundle.root, out, ignore=shutil.ignore_patterns("engines", "bundle.json", "vae", COMPONENT))
    shutil.copytree(bundle.root / COMPONENT, out / "vae")
    return seal_bundle(out, f"{bundle.name}+tiny", replace(bundle.spec, tiny_decoder=()))


def _decode(latents: Tensor, decoder: nn.Module, device: torch.device) -> Iterator[Tensor]:
    for chunk in latents.split(CHUNK):
        with torch.no_grad():
            yield decoder(chunk.float().to(device, memory_format=torch.channels_last))


def _bytes(picture: Tensor) -> Tensor:
    return ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def command(argv: list[str]) -> int:
    """`fewstep distill tiny-decoder`."""
    parser = argparse.ArgumentParser(
        prog="fewstep distill tiny-decoder",
        description="Give a bundle a small decoder that draws what its own decoder draws.",
        epilog="example: fewstep distill tiny-decoder --teacher scenes-lcm --out runs/lcm-tiny --minutes 8",
    )
    parser.add_argument("--teacher", default="scenes-lcm", help="bundle whose decoder is learned from (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="where the bundle with tiny_decoder/ goes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; repeatable")
    parser.add_argument("--minutes", type=float, help="stop after this long")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (the best there is)")
    args = parser.parse_args(argv)
    from ..recipes.recipe import check_setting, parse_setting

    known = {f.name: f.type for f in fields(TinyDecoderSettings)}
    changed = dict(parse_setting(text) for text in args.set)
    for name in changed:
        if name not in known:
            raise RecipeError(f"tiny-decoder has no setting {name!r}; it has {', '.join(sorted(known))}")
    settings = TinyDecoderSettings(**{n: check_setting(n, known[n], v) for n, v in changed.items()})
    seconds = None if args.minutes is None else 60 * args.minutes
    bundle = distill_decoder(load_bundle(args.teacher), args.out, settings, device=args.device, max_seconds=seconds)
    weights = (bundle.root / COMPONENT / "diffusion_pytorch_model.safetensors").stat().st_size
    print(
        f"{bundle.root}/{COMPONENT}: {weights / 1e6:.2f} MB; compare it with `fewstep bench compression {bundle.root}`"
    )
    return 0
