"""What every API's bodies share: how they are checked, and the `Job` that each becomes.

Types and names are checked here, values by the runtime, so a limit is written once. No field is dropped in silence.
"""

import difflib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.service.local import Model

from .errors import Refused

Format = Literal["png", "jpeg", "webp"]
LEVELS = {"png": (0, 9), "jpeg": (1, 100), "webp": (1, 100)}


class Body(BaseModel):
    """Strict: no unknown field, no number in quotes, no whole number with a fraction."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_and_readable(cls, data: Any) -> Any:
        """Refuse a field that does not exist, saying which one was probably meant, and text that is no Unicode."""
        for name in data if isinstance(data, dict) else ():
            if name not in cls.model_fields:
                close = difflib.get_close_matches(name, cls.model_fields, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(cls.model_fields)}"
                context = {"field": name.encode("utf-8", "replace").decode(), "hint": hint}
                raise PydanticCustomError("unknown_parameter", "{field} is not a field of this call; {hint}", context)
        return refuse_half_pairs(data)


@dataclass(frozen=True)
class Job:
    """One checked call: what to make with which model, how to encode it, and the caller's names of runtime fields.

    sampler: the model's, for the picture's metadata.
    """

    request: GenerateRequest
    model: str
    format: Format
    level: int | None
    names: Mapping[str, str]
    sampler: str = "unknown"

    def renamed(self, error: InvalidRequest) -> InvalidRequest:
        """The runtime's error about the field as this caller wrote it."""
        name, message = self.names.get(error.field, error.field), str(error)
        if name == "deadline_ms" and self.request.deadline_s is not None:
            seconds = f"{error.field} is {self.request.deadline_s}"
            message = message.replace(seconds, f"{error.field} is {self.request.deadline_s * 1000:g}", 1)
        return InvalidRequest(name, re.sub(rf"\b{re.escape(error.field)}\b", lambda _: name, message, count=1))


def find_model(name: str | None, models: Mapping[str, Model]) -> str:
    """The name of a served model; the first where none is asked for.

    Errors: `Refused` 404; 503 where no model is loaded.
    """
    if not models:
        raise Refused(503, "no_model", "no model is loaded here now; try again later", retry_after="5")
    if name is None:
        return next(iter(models))
    if name not in models:
        raise Refused(404, "model_not_found", f"model is {name!r}; this server has {', '.join(models)}", param="model")
    return name


def new_seed() -> int:
    """For callers who give none: random, and small enough for JavaScript to repeat."""
    return secrets.randbelow(2**32)


def refuse_half_pairs(data: Any) -> Any:
    """A body as it is; as its validator, refuses fields with half of a surrogate pair, which is no Unicode."""
    for name, value in data.items() if isinstance(data, dict) else ():
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            message = "{field} holds half of a surrogate pair; send it as valid Unicode"
            raise PydanticCustomError("invalid_value", message, {"field": name})
    return data
