"""Model families: which networks a bundle's components make, and what stands between them and the roles.

A family is recognised by the class that its denoiser's `config.json` names. Everything beyond this room sees roles
(`fewstep.models.roles`) and named tensors only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from .errors import BundleError
from .guidance_adapter import FIELD as GUIDANCE_ADAPTER
from .networks import Decoder, DenoiserNet, Encoder, TextEncoder, TextEncoderXL
from .pipeline_folder import read_config, read_index
from .roles import DECODER, DECODER_TINY, DENOISER, DENOISER_CONTROL, ENCODER, NEEDS, TEXT
from .schedulers import SetTimes, plain_times
from .second_time import with_second_time
from .spec import Latent, TextInput
from .unet_roles import UNET_ROLES

Load = Callable[[str], Any]
"""A component's name -> the component, as its own class."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a folder of the family states beside its scheduler: fields of the `SamplerSpec`.

    size: (width, height) that the denoiser was trained for. zero_empty: as in `Guidance`.
    """

    latent: Latent
    size: tuple[int, int]
    text: tuple[TextInput, ...] = (TextInput(),)
    size_ids: str | None = None
    zero_empty: bool = False


@dataclass(frozen=True)
class Family:
    """plain: (component, with ControlNet inputs or not) -> network. text: the encoders' network, which gives
    `text_outputs`. Of the denoiser's config: takes_w, whether it takes a guidance scale; stride, what a latent's sides
    must be multiples of. more: the networks of further roles, each from the components it needs.
    For `fewstep import`: facts, what the folder states; set_times, how diffusers' pipeline sets its scheduler."""

    name: str
    folder: str
    plain: Callable[[Any, bool], nn.Module]
    text: Callable[[Load], nn.Module]
    text_outputs: tuple[str, ...]
    takes_w: Callable[[Mapping[str, Any]], bool]
    stride: Callable[[Mapping[str, Any]], int]
    facts: Callable[[Path], Facts]
    set_times: SetTimes = plain_times
    more: Mapping[str, Callable[[Load], nn.Module]] = field(default_factory=dict)

    def denoiser(self, component: Any, control: bool) -> nn.Module:
        """The denoiser's network, with every time that it takes among its inputs."""
        net: nn.Module = with_second_time(self.plain(component, control))
        return net

    def network(self, role: str, load: Load) -> nn.Module:
        """The network of one role, for evaluation; `load` gives its components."""
        if role in (DENOISER, DENOISER_CONTROL):
            net = self.denoiser(load(self.folder), role == DENOISER_CONTROL)
        elif role == TEXT:
            net = self.text(load)
        elif role in self.more:
            net = with_second_time(self.more[role](load))
        elif role == DECODER_TINY:
            net = Decoder(load("tiny_decoder"))
        elif role in NEEDS:
            raise BundleError(
                f"the {self.name} family has no network for {role!r}: import again without {NEEDS[role]}/"
            )
        else:
            net = {DECODER: Decoder, ENCODER: Encoder}[role](load("vae"))
        return net.eval()


def _unet(unet: Any, control: bool) -> nn.Module:
    return DenoiserNet(unet, control=control)


def _unet_takes_w(config: Mapping[str, Any]) -> bool:
    return config.get("time_cond_proj_dim") is not None or GUIDANCE_ADAPTER in config


def _unet_stride(config: Mapping[str, Any]) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


def latent_of(root: Path) -> Latent:
    """The latent that a diffusers autoencoder of the usual kinds makes (`AutoencoderKL`, `AutoencoderTiny`)."""
    vae = read_config(root, "vae")
    if vae.get("latents_mean") is not None:
        raise BundleError(
            f"{root}/vae/config.json has latents_mean, a scaling per channel that this release cannot state"
        )
    return Latent(
        channels=int(vae["latent_channels"]),
        factor=vae_factor(vae),
        scale=float(vae["scaling_factor"]),
        shift=float(vae.get("shift_factor") or 0.0),
    )


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels of a picture's side per latent of an autoencoder with these settings: every level but one halves it."""
    blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return int(2 ** (len(blocks) - 1))


def _sd_facts(root: Path) -> Facts:
    latent = latent_of(root)
    side = int(read_config(root, "unet")["sample_size"]) * latent.factor
    return Facts(latent=latent, size=(side, side))


def _sdxl_facts(root: Path) -> Facts:
    zeros = bool(read_index(root).get("force_zeros_for_empty_prompt", True))
    text = (TextInput(), TextInput(tokenizer="tokenizer_2"))
    return replace(_sd_facts(root), text=text, size_ids="sdxl", zero_empty=zeros)


SD = Family(
    name="sd",
    folder="unet",
    plain=_unet,
    text=lambda load: TextEncoder(load("text_encoder")),
    text_outputs=TextEncoder.outputs,
    takes_w=_unet_takes_w,
    stride=_unet_stride,
    facts=_sd_facts,
    more=UNET_ROLES,
)
SDXL = replace(
    SD,
    name="sdxl",
    text=lambda load: TextEncoderXL(load("text_encoder"), load("text_encoder_2")),
    text_outputs=TextEncoderXL.outputs,
    facts=_sdxl_facts,
)


def _unet_family(config: Mapping[str, Any]) -> Family:
    return SDXL if config.get("addition_embed_type") == "text_time" else SD


def _transformer(file: str) -> Callable[[Mapping[str, Any]], Family]:
    """`family` of a file of this room, which is imported when first asked."""

    def choose(config: Mapping[str, Any]) -> Family:
        found: Family = import_module(f".{file}", __package__).family(config)
        return found

    return choose


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Family]] = {
    "UNet2DConditionModel": _unet_family,
    "PixArtTransformer2DModel": _transformer("net_pixart"),
    "SanaTransformer2DModel": _transformer("net_sana"),
    "SD3Transformer2DModel": _transformer("net_sd3"),
    "FluxTransformer2DModel": _transformer("net_flux"),
    "ZImageTransformer2DModel": _transformer("net_zimage"),
}
"""The denoiser's class -> what chooses the family by the denoiser's config."""


def find_family(root: Path) -> Family:
    """The family of a bundle or diffusers folder.

    Errors: `BundleError` where no denoiser is there, or of a class that this release does not know.
    """
    for folder in ("unet", "transformer"):
        path = root / folder / "config.json"
        if not path.is_file():
            continue
        config = read_config(root, folder)
        name = config.get("_class_name")
        if name not in FAMILIES:
            raise BundleError(f"{path} names the class {name!r}; this release knows {', '.join(FAMILIES)}")
        return FAMILIES[name](config)
    raise BundleError(f"{root} has neither unet/config.json nor transformer/config.json; a bundle holds its denoiser")
