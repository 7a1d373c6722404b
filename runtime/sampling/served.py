"""A model that can be asked: its contract, its engine, its prompts, and what its graphs can be steered by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.models.bundle import Bundle
from fewstep.models.roles import DENOISER_IMAGE_PROMPT, DENOISER_LORA, DENOISER_NEGATIVE
from fewstep.models.spec import SamplerSpec

from ..engine import ADAPTER, CONTROLNET, DENOISER_ADAPTER, DENOISER_CONTROL, Engine
from .plan import Plan, compile_plan, wants_methods
from .request import GenerateRequest, Offers
from .text import Prompts

MOST_PLANS = 1000
"""Plans that a model keeps; a client may ask for any guidance scale."""


@dataclass(frozen=True)
class Served:
    """A model that can be asked: its contract, its engine, its prompts; made of a bundle by `serve`.

    negative: how its graph hears negative prompts. image_side, image_layers: pixels that its image encoder reads along
    a side, cross-attentions that hear a picture prompt; 0 where it has none. loras: names that its engine mixes by row.
    """

    name: str
    spec: SamplerSpec
    engine: Engine
    prompts: Prompts
    negative: str | None = None
    image_side: int = 0
    image_layers: int = 0
    loras: tuple[str, ...] = ()
    _plans: dict[Any, Plan] = field(default_factory=dict, repr=False)

    def plan(self, request: GenerateRequest, others: Mapping[str, SamplerSpec] | None = None) -> Plan:
        """The plan of a resolved request; requests that sample alike share one."""
        if request.times is not None or wants_methods(request):
            return compile_plan(request, self.spec, others)
        control = request.control
        steered = None if control is None else (control.scale, control.start, control.end)
        key = request.steps, request.guidance, request.gamma, request.guidance_ramp, steered
        if key not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = compile_plan(request, self.spec)
        return self._plans[key]

    def offers(self, models: Mapping[str, "Served"]) -> Offers:
        """What it can do beyond its spec, beside the other models served here."""
        specs = {name: model.spec for name, model in models.items()}
        return Offers(
            name=self.name,
            roles=self.engine.capabilities.roles,
            negative=self.negative,
            models=specs,
            loras=self.loras,
        )

    @property
    def has_control(self) -> bool:
        roles = self.engine.capabilities.roles
        return {CONTROLNET, DENOISER_CONTROL} <= roles or {ADAPTER, DENOISER_ADAPTER} <= roles


def serve(bundle: Bundle, engine: Engine, prompts: Prompts) -> Served:
    """A bundle and its engine as a model that can be asked."""
    roles = engine.capabilities.roles
    settings: dict[str, Any] = {}
    if DENOISER_NEGATIVE in roles:
        settings["negative"] = str(bundle.config("negative").get("method", "nag"))
    if DENOISER_IMAGE_PROMPT in roles:
        settings["image_side"] = int(bundle.config("image_encoder")["image_size"])
        settings["image_layers"] = bundle.image_layers
    if DENOISER_LORA in roles:
        settings["loras"] = bundle.lora_names
    return Served(bundle.name, bundle.spec, engine, prompts, **settings)
