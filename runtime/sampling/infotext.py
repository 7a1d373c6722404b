"""Generation parameters as one text, in the form that AUTOMATIC1111's web UI writes into pictures and others read back:

the prompt, over as many lines as it has
Negative prompt: the negative prompt, if there is one
Steps: 4, Sampler: lcm, CFG scale: 3, Seed: 7, Size: 64x64, Model: "a name, with a comma"
"""

import importlib.metadata
import json
import re
from collections.abc import Mapping

from .events import Result
from .images import PARAMETERS
from .request import GenerateRequest

VERSION = importlib.metadata.version("fewstep")
_NEGATIVE = "Negative prompt: "
_SETTING = re.compile(r'\s*([^\s:,"][^:,"]*):\s*("(?:\\.|[^\\"])*"|[^,]*)\s*(?:,|$)')
_LEAST_SETTINGS = 3
"""A last line with fewer is prompt, for every reader of this form."""


def picture_metadata(result: Result, request: GenerateRequest, seed: int, sampler: str) -> dict[str, str]:
    """What a picture's file says of its making, for `images.encode`: a text per setting, and `infotext` of them all.

    seed: this picture's, of `result.seeds`. sampler: the model's.
    """
    height, width = result.pictures[0].shape[:2]
    guidance, steps = f"{result.guidance:g}", str(result.steps)
    about = {"prompt": request.prompt, "model": result.model, "steps": steps, "guidance": guidance, "seed": str(seed)}
    if request.negative_prompt:
        about["negative_prompt"] = request.negative_prompt
    settings = {"Steps": steps, "Sampler": sampler, "CFG scale": guidance, "Seed": str(seed)}
    settings |= {"Size": f"{width}x{height}", "Model": result.model}
    if request.edit is not None:
        settings["Denoising strength"] = f"{request.edit.strength:g}"
    text = infotext(request.prompt, request.negative_prompt, {**settings, "Version": f"fewstep {VERSION}"})
    return {**about, PARAMETERS: text}


def infotext(prompt: str, negative_prompt: str | None, settings: Mapping[str, str]) -> str:
    """The text of one picture. settings: at least three, in the order to be written; values may hold anything."""
    negative = [] if not negative_prompt else [_NEGATIVE + negative_prompt]
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items())
    return "\n".join([prompt, *negative, line])


def read_infotext(text: str) -> dict[str, str]:
    """What `infotext` wrote, ours or another program's: `Prompt`, `Negative prompt`, and every setting by its name."""
    before, _, line = text.rpartition("\n")
    settings = _SETTING.findall(line)
    if len(settings) < _LEAST_SETTINGS:
        before, settings = text, []
    prompt, mark, negative = f"\n{before}".partition(f"\n{_NEGATIVE.rstrip()}")
    found = {"Prompt": prompt[1:], "Negative prompt": negative.removeprefix(" ")} if mark else {"Prompt": prompt[1:]}
    return found | {name.strip(): _unquoted(value) for name, value in settings}


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value


def _unquoted(value: str) -> str:
    value = value.strip()
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:  # another program's quotes
        return value
