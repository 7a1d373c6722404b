"""OpenVINO GenAI's own pipeline on a bundle's networks, as a peer to be measured beside.

GenAI reads a folder of its own layout, which `write_genai_folder` makes from the bundle's torch networks with
OpenVINO's converter. It runs as fast as it can be set: one fixed shape per batch size, the precision and threads asked
for. It draws its noise with a generator of its own, so only its times are comparable, not its pictures.
"""

import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.models.pipeline_folder import read_config, read_index

from ..errors import EngineUnavailable
from ..sampling.images import encode
from .contestants import Contestant, Sample

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle

PIPELINES = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
"""What this conversion covers; GenAI itself has more."""
PACKAGES = ("openvino", "openvino_genai", "openvino_tokenizers")


def genai_contestant(bundle: "Bundle", folder: Path, *, precision: str, threads: int | None) -> Contestant:
    """GenAI's pipeline over `folder`, which is converted where it is not yet there. Each batch size compiles once.

    precision: "f32" or "bf16", OpenVINO's `INFERENCE_PRECISION_HINT`.

    Errors: as `check_genai`.
    """
    check_genai(bundle)
    if not (folder / "model_index.json").is_file():
        write_genai_folder(bundle, folder)
    width, height = bundle.spec.sizes[0]
    guidance = bundle.spec.guidance.default

    @cache
    def pipeline(batch: int) -> Any:
        import openvino_genai

        made = openvino_genai.Text2ImagePipeline(folder)
        made.reshape(batch, height, width, guidance)
        settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
        made.compile("CPU", **settings, INFERENCE_NUM_THREADS=threads or torch.get_num_threads())
        return made

    def run(prompt: str, seed: int, steps: int, batch: int) -> Sample:
        ready = pipeline(batch)
        begun = time.perf_counter()
        drawn = ready.generate(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            num_images_per_prompt=batch,
            rng_seed=seed,
        )
        for picture in drawn.data:
            encode(picture, "png")
        return Sample(time.perf_counter() - begun, {}, drawn.data[0].copy())

    return run


def check_genai(bundle: "Bundle") -> None:
    """Errors: `EngineUnavailable` saying which package is missing or what of the bundle is not covered."""
    from .diffusers_pipeline import pipeline_name

    if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
        raise EngineUnavailable(
            f"the peer openvino-genai needs the package {missing[0]}; pip install openvino-genai openvino-tokenizers"
        )
    name = pipeline_name(bundle)
    if name not in PIPELINES:
        raise EngineUnavailable(f"{bundle.name} is a {name}; the peer openvino-genai takes {' or '.join(PIPELINES)}")


def genai_notes(bundle: "Bundle") -> tuple[str, ...]:
    """What GenAI's folder cannot say as the bundle does; none of it changes how long a picture takes."""
    notes = []
    scheduler = _config(bundle, "scheduler", "scheduler_config.json")
    if _needs_epsilon(scheduler):
        notes.append(f"its LCMScheduler knows only epsilon: timed with that, not with {scheduler['prediction_type']}")
    if _config(bundle, "vae")["_class_name"] != "AutoencoderKL":
        notes.append("it accepts only the name AutoencoderKL: the bundle's own decoder runs under that name")
    return tuple(notes)


def write_genai_folder(bundle: "Bundle", folder: Path) -> None:
    """Convert a bundle's networks, float32, and settings into GenAI's layout; `model_index.json` comes last.

    Errors: as `check_genai`.
    """
    check_genai(bundle)
    import openvino
    import openvino_tokenizers

    scheduler = _config(bundle, "scheduler", "scheduler_config.json")
    if _needs_epsilon(scheduler):
        scheduler["prediction_type"] = "epsilon"  # its code reads past an empty vector for any other
    vae, latent = _config(bundle, "vae"), bundle.spec.latent
    decoder = {name: vae[name] for name in ("in_channels", "out_channels", "latent_channels", "block_out_channels")}
    decoder |= {"scaling_factor": latent.scale, "shift_factor": latent.shift}
    for part, convert in (("text_encoder", _text), ("unet", _unet), ("vae_decoder", _decoder)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        openvino.save_model(convert(bundle), folder / part / "openvino_model.xml", compress_to_fp16=False)
        settings = decoder if part == "vae_decoder" else _config(bundle, part)
        (folder / part / "config.json").write_text(json.dumps(settings))
    for part in ("tokenizer", "scheduler"):
        (folder / part).mkdir(exist_ok=True)
    openvino.save_model(
        openvino_tokenizers.convert_tokenizer(bundle.tokenizer), folder / "tokenizer" / "openvino_tokenizer.xml"
    )
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = read_index(bundle.root) | {"vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))


class _Flat(nn.Module):
    """A call of positional tensors, as the converter traces it."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network
        self.call = call

    def forward(self, *feeds: Tensor) -> Tensor:
        return self.call(*feeds)


def _text(bundle: "Bundle") -> Any:
    network = bundle.load("text_encoder")
    ids = torch.zeros(2, bundle.tokenizer.model_max_length, dtype=torch.int64)
    return _converted(_Flat(network, lambda i: network(i)[0]), {"input_ids": ids}, "last_hidden_state")


def _unet(bundle: "Bundle") -> Any:
    network, (width, height), factor = bundle.load("unet"), bundle.spec.sizes[0], bundle.spec.latent.factor
    config = network.config
    feeds = {
        "sample": torch.randn(2, config.in_channels, height // factor, width // factor),
        "timestep": torch.tensor([999]),
        "encoder_hidden_states": torch.randn(2, bundle.tokenizer.model_max_length, config.cross_attention_dim),
    }
    if config.time_cond_proj_dim is not None:
        feeds["timestep_cond"] = torch.randn(2, config.time_cond_proj_dim)

    def call(x: Tensor, t: Tensor, ctx: Tensor, w: Tensor | None = None) -> Tensor:
        out: Tensor = network(x, t, ctx, timestep_cond=w, return_dict=False)[0]
        return out

    return _converted(_Flat(network, call), feeds, "out_sample")


def _decoder(bundle: "Bundle") -> Any:
    network, (width, height), latent = bundle.load("vae"), bundle.spec.sizes[0], bundle.spec.latent
    feeds = {"latent_sample": torch.randn(2, latent.channels, height // latent.factor, width // latent.factor)}
    return _converted(_Flat(network, lambda x: network.decode(x, return_dict=False)[0]), feeds, "sample")


def _converted(network: nn.Module, feeds: dict[str, Tensor], output: str) -> Any:
    """An OpenVINO model whose ports have GenAI's names."""
    import openvino

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer remarks on every Python branch in the network
        model = openvino.convert_model(network.eval(), example_input=tuple(feeds.values()))
    for port, name in zip([*model.inputs, *model.outputs], [*feeds, output], strict=True):
        port.get_tensor().set_names({name})
    return model


def _config(bundle: "Bundle", part: str, file: str = "config.json") -> dict[str, Any]:
    """Settings without those that are null, which GenAI does not read as absent."""
    return {name: value for name, value in read_config(bundle.root, part, file).items() if value is not None}


def _needs_epsilon(scheduler: dict[str, Any]) -> bool:
    return bool(scheduler["_class_name"] == "LCMScheduler") and scheduler.get("prediction_type", "epsilon") != "epsilon"
