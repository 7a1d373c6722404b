"""ControlNet units, as clients of sd-webui-controlnet send them among A1111's `alwayson_scripts`."""

from collections.abc import Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.request import Control
from fewstep.runtime.service.local import Model

from .errors import Refused
from .uploads import FITS, fitted, picture

SCRIPT = "controlnet"
DEFAULT_MODEL = "control"
"""How the one ControlNet of a model whose pictures are of one kind is listed."""
_FITS = {
    **dict.fromkeys(("0", "just resize"), 0),
    **dict.fromkeys(("1", "crop and resize", "inner fit", "scale to fit"), 1),
    **dict.fromkeys(("2", "resize and fill", "outer fit", "envelope"), 2),
}
"""The place in `FITS` of a mode, by number or by the words of either version of the extension."""
_BALANCED = ("0", "balanced")


class Unit(BaseModel):
    """One unit. Settings of preprocessors come along too; there are none here, so they mean nothing."""

    model_config = ConfigDict(extra="allow")

    enabled: bool = True
    module: str | None = None
    model: str | None = None
    weight: float = 1.0
    image: str | dict[str, Any] | None = Field(None, validation_alias=AliasChoices("image", "input_image"))
    resize_mode: int | str = 1
    guidance_start: float = 0.0
    guidance_end: float = Field(1.0, validation_alias=AliasChoices("guidance_end", "guidance"))
    control_mode: int | str = 0


def control_of(scripts: Mapping[str, Any], model: Model, size: tuple[int, int], init_image: Any) -> Control | None:
    """What the units ask for, at most one of them. size: (width, height); init_image: what a unit without one follows.

    Errors: `Refused` 422 for another script; `InvalidRequest` with the unit's field.
    """
    found: list[tuple[str, Unit]] = []
    for name, script in scripts.items():
        if name.lower() != SCRIPT:
            raise Refused(422, "unknown_script", f"always on script {name[:80]!r} not found", param="alwayson_scripts")
        args = script.get("args") if isinstance(script, dict) else None
        if not isinstance(args, list):
            raise InvalidRequest("alwayson_scripts", f"alwayson_scripts.{name} has no args; send a list of units")
        found += [(f"alwayson_scripts.{name}.args.{i}", _unit(arg, i)) for i, arg in enumerate(args)]
    enabled = [(where, unit) for where, unit in found if unit.enabled]
    if len(enabled) > 1:
        message = f"alwayson_scripts has {len(enabled)} ControlNet units enabled; a picture follows one here"
        raise InvalidRequest("alwayson_scripts", message)
    return _control(*enabled[0], model, size, init_image) if enabled else None


def models_of(model: Model) -> list[str]:
    """The names under which a model's ControlNets are listed."""
    return list(model.spec.control_kinds) or [DEFAULT_MODEL]


def _unit(arg: Any, number: int) -> Unit:
    where = f"alwayson_scripts.{SCRIPT}.args.{number}"
    try:
        return Unit.model_validate(arg)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([where, *map(str, first["loc"])])
        raise InvalidRequest(field, f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error


def _control(where: str, unit: Unit, model: Model, size: tuple[int, int], init_image: Any) -> Control:
    if (unit.module or "none").lower() != "none":
        message = (
            f"{where}.module is {str(unit.module)[:40]!r}; nothing is traced here: send the picture to follow, 'none'"
        )
        raise InvalidRequest(f"{where}.module", message)
    if str(unit.control_mode).lower() not in _BALANCED:
        message = f"{where}.control_mode is {str(unit.control_mode)[:40]!r}; use 0 (balanced), and weight"
        raise InvalidRequest(f"{where}.control_mode", message)
    fit = _fit(where, unit.resize_mode)
    text = unit.image.get("image") if isinstance(unit.image, dict) else unit.image
    if not isinstance(text, str) and init_image is None:
        raise InvalidRequest(f"{where}.image", f"{where}.image is missing; send the picture to follow")
    edge = init_image if not isinstance(text, str) else picture(text, f"{where}.image")
    return Control(
        edge=fitted(edge, *size, fit),
        scale=unit.weight,
        start=unit.guidance_start,
        end=unit.guidance_end,
        kind=_kind(where, unit.model, model),
    )


def _fit(where: str, mode: int | str) -> str:
    number = _FITS.get(str(mode).lower().partition(" (")[0])
    if number is None:
        message = f"{where}.resize_mode is {str(mode)[:40]!r}; use 0 (resize), 1 (crop) or 2 (fill)"
        raise InvalidRequest(f"{where}.resize_mode", message)
    return FITS[number]


def _kind(where: str, name: str | None, model: Model) -> str | None:
    """The kind of picture that a unit's model follows; None where there is one kind."""
    names = models_of(model)
    asked = (name or "None").partition(" [")[0]
    if asked.lower() == "none" and len(names) == 1:
        asked = names[0]
    if asked not in names:
        raise InvalidRequest(f"{where}.model", f"{where}.model is {asked[:40]!r}; use {', '.join(names)}")
    return asked if model.spec.control_kinds else None
