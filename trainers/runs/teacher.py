"""`fewstep teacher`: train the built-in `scenes` family from nothing, in four stages of the one loop.

1. autoencoder: pictures to 8x8 latents and back; noise on the latent keeps it smooth, its scale becomes the bundle's.
2. words: the text encoder learns to tell each caption's claims from its end token, so the denoiser starts from text
   features that already bind colours to shapes. The reading heads are thrown away.
3. denoiser: v-prediction on the VP path (Salimans & Ho 2022), text encoder along, prompts dropped for guidance.
4. control: a ControlNet (Zhang et al. 2023) on the drawings' edges, everything else frozen.

Beside `OUT` stands `OUT.run` with a folder per stage (checkpoint, metrics, loss curve, grids); `--resume` goes on.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle, seal_bundle
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import SD
from fewstep.models.networks import ControlNet, DenoiserNet, as_network
from fewstep.models.paths import VP
from fewstep.models.spec import Guidance, Latent, SamplerSpec, Spacing

from ..loop.loop import LoopSettings, Method, Source, train
from ..loop.player import Player, PlayerSettings
from ..parts.objective import Batch
from ..pictures import scenes
from ..pictures.data import Latents, encode_scenes, load_latents, save_latents, tokenize
from ..pictures.family import build_autoencoder, build_controlnet, build_text_encoder, build_tokenizer, build_unet
from ..pictures.preview import sample, save_grid
from .folders import check_out, open_run, run_folder
from .teacher_parts import (
    CLAIM_SIZES,
    AutoencoderLoss,
    CaptionSource,
    DenoiserLoss,
    EdgeSource,
    IdSource,
    PictureSource,
    WordsLoss,
)

GUIDANCE = Guidance(mode="cfg", default=3.0, range=(1.0, 10.0))


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Steps and batch of each stage; the defaults are those of the shipped family."""

    autoencoder_steps: int = 4500
    words_steps: int = 420
    denoiser_steps: int = 6100
    control_steps: int = 550
    pictures: int = 24000
    scenes: int = 60000
    control_scenes: int = 6000
    batch: int = 64
    seed: int = 0
    bf16: bool = True


def train_teacher(out: Path, settings: TeacherSettings, *, resume: bool = False, device: str | None = None) -> Bundle:
    """Train all four stages and seal the bundle. A stage whose result is there is not trained again on resume.

    Errors: `TrainingDiverged`, `CheckpointError`; `RecipeError` where `out` holds something else.
    """
    check_out(out)
    run = run_folder(out)
    open_run(run, asdict(settings), resume=resume, same=False)  # stages to come may be told otherwise
    parts = run / "bundle"
    parts.mkdir(exist_ok=True)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    stage = _Stage(run, settings, where, resume)
    _autoencoder(stage, parts)
    tokenizer = build_tokenizer(parts / "tokenizer")
    tokenizer.save_pretrained(parts / "tokenizer")
    spec = teacher_spec(json.loads((parts / "vae" / "config.json").read_text())["scaling_factor"])
    bundle = Bundle(parts, "scenes-teacher", spec)
    bundle.family = SD  # a family is read off the denoiser, which is trained after the autoencoder is used
    _words(stage, bundle)
    _denoiser(stage, bundle)
    _control(stage, bundle)
    write_pipeline(parts)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(parts, out)
    return seal_bundle(out, "scenes-teacher", spec)


def teacher_spec(latent_scale: float) -> SamplerSpec:
    """DDIM on evenly spaced times, any step count to 100, classifier-free guidance."""
    return SamplerSpec(
        prediction="v",
        path=VP(),
        sampler="ddim",
        grids={},
        spacing=Spacing(kind="trailing", max_steps=100),
        stochastic=False,
        guidance=GUIDANCE,
        latent=Latent(channels=8, factor=8, scale=latent_scale),
        sizes=((scenes.SIZE, scenes.SIZE),),
        recipe="teacher",
    )


@dataclass(frozen=True)
class _Stage:
    """What every stage is run with."""

    run: Path
    settings: TeacherSettings
    device: str
    resume: bool

    def go(self, name: str, method: Method, source: Source, steps: int, on_picture: Any = None) -> None:
        folder = self.run / name
        settings = LoopSettings(
            steps=steps, seed=self.settings.seed, bf16=self.settings.bf16, picture_every=500 if on_picture else 0
        )
        resume = self.resume and (folder / "checkpoint.pt").is_file()
        train(method, source, settings, folder, resume=resume, label=name, device=self.device, on_picture=on_picture)


def _autoencoder(stage: _Stage, parts: Path) -> None:
    if (parts / "vae").is_dir():
        return
    s = stage.settings
    torch.manual_seed(s.seed)
    vae: Any = build_autoencoder().to(stage.device, memory_format=torch.channels_last)
    learn = PlayerSettings(lr=2e-3, weight_decay=1e-4, warmup=100, cooldown=0.9, ema={"kept": 0.998})
    player = Player("autoencoder", vae, learn)
    source = PictureSource(s.pictures, 48, s.seed, stage.device)
    stage.go("autoencoder", AutoencoderLoss((player,)), source, s.autoencoder_steps)
    kept: Any = player.averages["kept"].eval()  # the library's own class, as `vae`
    with torch.no_grad():
        spread = torch.cat([kept.encoder(source.batch(-k).x0) for k in range(1, 9)]).square().mean().sqrt()
    kept.register_to_config(scaling_factor=round(1.0 / float(spread), 4))
    kept.to("cpu", memory_format=torch.contiguous_format).save_pretrained(parts / "vae")


def _words(stage: _Stage, bundle: Bundle) -> None:
    if (bundle.root / "text_encoder").is_dir():
        return
    s = stage.settings
    torch.manual_seed(s.seed)
    text = build_text_encoder(bundle.tokenizer)
    module = nn.ModuleList([text, nn.Linear(text.config.hidden_size, sum(CLAIM_SIZES))]).to(stage.device)
    player = Player("words", module, PlayerSettings(lr=1.2e-3, weight_decay=0.01, warmup=100, cooldown=1.0))
    source = CaptionSource(bundle.tokenizer, 3 * s.batch, s.seed, stage.device)
    stage.go("words", WordsLoss((player,), bundle.tokenizer.eos_token_id), source, s.words_steps)
    text.to("cpu").save_pretrained(bundle.root / "text_encoder")


def _denoiser(stage: _Stage, bundle: Bundle) -> None:
    if (bundle.root / "unet").is_dir():
        return
    s = stage.settings
    torch.manual_seed(s.seed)
    text = bundle.load("text_encoder").requires_grad_(True).train()
    module = nn.ModuleDict({"unet": build_unet(), "text": text})
    module.to(stage.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    learn = PlayerSettings(
        lr=1.2e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=200, cooldown=0.5, ema={"kept": 0.9993},
        slow={"text.": 0.3},
    )  # fmt: skip
    player = Player("denoiser", module, learn)

    def denoiser(batch: Batch) -> tuple[Denoiser, dict[str, Tensor]]:
        ctx = module["text"](batch.cond["ids"]).last_hidden_state
        return Denoiser(as_network(DenoiserNet(module["unet"])), bundle.spec.path, "v"), {"ctx": ctx}

    source = IdSource(_latents(stage, bundle), s.batch, s.seed, stage.device)
    kept: Any = player.averages["kept"]
    paint = _painter(stage, bundle, kept, source)
    stage.go("denoiser", DenoiserLoss((player,), denoiser), source, s.denoiser_steps, paint)
    kept = kept.eval().to("cpu", memory_format=torch.contiguous_format)
    kept["unet"].half().save_pretrained(bundle.root / "unet")
    save_text_encoder(kept["text"], bundle.root / "text_encoder")


def _control(stage: _Stage, bundle: Bundle) -> None:
    if (bundle.root / "controlnet").is_dir():
        return
    s = stage.settings
    torch.manual_seed(s.seed)
    unet = bundle.load("unet").to(stage.device)
    net = build_controlnet(unet).requires_grad_(True).to(stage.device)
    learn = PlayerSettings(lr=8e-4, weight_decay=0.01, warmup=100, cooldown=0.5, ema={"kept": 0.998})
    player = Player("control", net, learn)

    def denoiser(batch: Batch) -> tuple[Denoiser, dict[str, Tensor]]:
        network = as_network(DenoiserNet(unet), ControlNet(net))
        return Denoiser(network, bundle.spec.path, "v"), dict(batch.cond)

    source = EdgeSource(bundle, s.control_scenes, s.batch, s.seed, stage.device)
    stage.go("control", DenoiserLoss((player,), denoiser), source, s.control_steps)
    kept: Any = player.averages["kept"]
    kept.half().cpu().save_pretrained(bundle.root / "controlnet")


def _latents(stage: _Stage, bundle: Bundle) -> Latents:
    kept = stage.run / "latents.safetensors"
    if kept.is_file():
        return load_latents(kept)
    data = encode_scenes(bundle, stage.settings.scenes, seed=stage.settings.seed, phrasings=4)
    save_latents(kept, data)
    return data


def _painter(stage: _Stage, bundle: Bundle, kept: Any, source: IdSource) -> Callable[[int], None]:
    """A callback that draws the first captions of a batch at 25 guided steps, above the pictures they come from."""
    decoder = bundle.decoder().to(stage.device)
    batch = source.batch(-1)
    x0, ids = batch.x0[:12], batch.cond["ids"][:12]
    empty = tokenize(bundle.tokenizer, [""]).long().to(stage.device).expand_as(ids)

    @torch.no_grad()
    def paint(step: int) -> None:
        net = as_network(DenoiserNet(kept["unet"]))
        cond, uncond = ({"ctx": kept["text"](i).last_hidden_state} for i in (ids, empty))
        drawn = sample(net, bundle.spec, 25, cond, x0.shape, w=GUIDANCE.default, uncond=uncond)
        save_grid([drawn, x0], decoder, stage.run / "denoiser" / "samples" / f"step_{step:06d}.png")

    return paint


def save_text_encoder(text: Any, folder: Path) -> None:
    """float16 weights that load as float32, as diffusers loads the other networks; transformers reads the config."""
    text.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def write_pipeline(folder: Path) -> None:
    """`scheduler/` and `model_index.json`: what makes the folder a diffusers pipeline."""
    from diffusers import DDIMScheduler

    path = VP()
    DDIMScheduler(
        num_train_timesteps=path.num_train_timesteps, beta_start=path.beta_start, beta_end=path.beta_end,
        beta_schedule=path.beta_schedule, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing", steps_offset=1,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.36.0",
        "requires_safety_checker": False,
        "vae": ["diffusers", "AutoencoderTiny"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fewstep teacher",
        description="Train the built-in scenes family from nothing: autoencoder, words, denoiser, ControlNet.",
        epilog="example: fewstep teacher --out runs/teacher        about 90 minutes on two CPU cores",
    )
    parser.add_argument("--out", type=Path, required=True, help="where the bundle goes; OUT.run keeps the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT.run")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    for setting in fields(TeacherSettings):
        if setting.name != "bf16":
            flag = "--" + setting.name.replace("_", "-")
            parser.add_argument(flag, type=int, default=setting.default, help="default: %(default)s")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="train in float32")
    args = vars(parser.parse_args(argv))
    out, resume, device = args.pop("out"), args.pop("resume"), args.pop("device")
    bundle = train_teacher(out, TeacherSettings(**args), resume=resume, device=device)
    print(f'wrote {bundle.root}; try: fewstep generate {bundle.root} "a red circle" --steps 25 --out circle.png')
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
