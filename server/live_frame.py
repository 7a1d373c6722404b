"""Messages of a live session: a JSON header, then, in binary messages, a line feed and a picture file's bytes.

A frame is complete in itself, so any of them may be dropped and the next one still says everything.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.service.live import SimilarityFilter
from fewstep.runtime.service.local import Model

from .errors import described
from .wire import Body, Job
from .wire_native import GenerateBody, generate_job

Shape = TypeVar("Shape", bound=Body)
_STEERS = ("control", "edit")
"""Fields that a picture after the header may belong to."""


class Hello(Body):
    """The first message of a caller who cannot send an Authorization header."""

    key: str


class Number(Body):
    """What a frame's header says beside the fields of `GenerateBody`: the caller's number for it, which comes back with
    the answer; whether the frames in the making are to end rather than be waited for; the cosine between its picture
    and the last one from which it may be skipped; and how many frames of the session may be in the making at once: as
    many as a picture has steps, and they share their engine calls (StreamDiffusion's stream batch)."""

    frame: int
    replace: bool = False
    similar: float | None = Field(None, ge=0.0, lt=1.0)
    depth: int = Field(1, ge=1, le=8)


@dataclass(frozen=True)
class Frame:
    """One picture asked for. `body` is checked by `frame_job`: a frame that is dropped costs nothing."""

    number: Number
    body: Mapping[str, Any]
    picture: bytes


class BadMessage(Exception):
    """A message that is no frame; `envelope` says what is wrong with it."""

    def __init__(self, envelope: dict[str, Any]) -> None:
        super().__init__(envelope["error"]["message"])
        self.envelope = envelope


def read_message(message: str | bytes) -> Hello | Frame:
    """Text is a header alone; bytes are a header, a line feed, and a picture.

    Errors: `BadMessage`.
    """
    text, _, picture = (message, "", b"") if isinstance(message, str) else message.partition(b"\n")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
        fault = {"type": "json_invalid", "loc": ("message", getattr(error, "pos", 0)), "ctx": {"error": str(error)}}
        raise BadMessage(described(fault)) from error
    if not isinstance(data, dict):
        raise BadMessage(described({"type": "object", "loc": ("message",)}))
    if "key" in data:
        return _checked(Hello, data)
    number = _checked(Number, {name: data.pop(name) for name in Number.model_fields if name in data})
    return Frame(number, data, picture)


def write_message(header: Mapping[str, Any], picture: bytes) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode() + b"\n" + picture


class Repeats:
    """What one session's frames repeat: StreamDiffusion's similarity filter, for frames of the same settings.

    The picture of the last frame that passed must still stand; begin anew where it was not made.
    """

    def __init__(self) -> None:
        self._settings: Any = None
        self._filter = SimilarityFilter()

    def skips(self, frame: Frame, job: Job) -> bool:
        """Whether a frame, and its job, is to be answered by the picture that stands.

        Errors: `InvalidRequest` where it has no picture to compare.
        """
        eta, edit, control = frame.number.similar, job.request.edit, job.request.control
        if eta is None:
            self._settings = None
            return False
        if edit is not None:
            name, image = "edit", edit.image
        elif control is not None:
            name, image = "control", control.edge
        else:
            raise InvalidRequest("similar", f"similar is {eta}, but the frame has no picture: send one or leave it out")
        placed = _placed(frame)
        settings = {**placed, "similar": eta, name: {**placed[name], "image_b64": None}}
        if settings != self._settings:
            self._settings, self._filter = settings, SimilarityFilter(eta)
        return not self._filter.passes(image)


def frame_job(frame: Frame, models: Mapping[str, Model]) -> Job:
    """Read a frame; its picture is unpacked here, so call it outside the event loop.

    Errors: `BadMessage` where the header is none; `InvalidRequest`, `Refused` as `generate_job`.
    """
    job = generate_job(_checked(GenerateBody, _placed(frame)), models)
    if job.request.n != 1:
        raise InvalidRequest("n", f"n is {job.request.n}; a frame makes one picture: leave it out")
    return job


def _placed(frame: Frame) -> Mapping[str, Any]:
    """The body with the picture in the one field that waits for it."""
    waiting = [n for n in _STEERS if isinstance(part := frame.body.get(n), dict) and "image_b64" not in part]
    if not frame.picture:
        return frame.body
    if len(waiting) != 1:
        said = "control and edit both wait" if waiting else "neither control nor edit waits"
        raise InvalidRequest("picture", f"a picture came after the header, but {said} for one; add one of them")
    (name,) = waiting
    return {**frame.body, name: {**frame.body[name], "image_b64": base64.b64encode(frame.picture).decode()}}


def _checked(shape: type[Shape], data: Mapping[str, Any]) -> Shape:
    try:
        return shape.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadMessage(described({**first, "loc": ("message", *first["loc"])})) from error
