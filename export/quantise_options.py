"""The options of `fewstep export --precision int8`: mode, treatments, prompts, and what may be lost."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.runtime.engines.budget import Budget
from fewstep.runtime.errors import EngineUnavailable

from .option import Option, flag

MEASURES = {
    "error": "relative error a component may have",
    "compliance": "how far mean compliance may fall",
    "frechet": "how far the Frechet distance may rise",
}
"""What a budget may bound."""


def _treatments(text: str) -> dict[str, str]:
    pairs = [part.split("=") for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of treatments such as text=int8-dynamic,decoder=int8")
    return {pair[0]: pair[1] for pair in pairs}


def _prompts(text: str) -> tuple[str, ...]:
    try:
        lines = tuple(line.strip() for line in Path(text).read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read ({error}); name a file with a prompt a line") from None
    if not lines:
        raise argparse.ArgumentTypeError(f"{text} holds no prompts; name a file with one a line")
    return lines


INT8_OPTIONS = (
    Option(name="mode", help="int8: auto, or for every role: weight-only, dynamic, static", metavar="MODE"),
    Option(name="treatments", help="int8: forced per role, as decoder=int8", read=_treatments, metavar="ROLE=T,..."),
    Option(name="prompts", help="int8: a file of prompts to calibrate on, one a line", read=_prompts, metavar="FILE"),
    *(Option(name=f"budget_{name}", help=f"int8: {said}", read=float, metavar="X") for name, said in MEASURES.items()),
)


def int8_settings(precision: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as `quantise` takes them.

    Errors: `EngineUnavailable` for one of them with another precision, or for a budget that is no number above 0.
    """
    if options and precision != "int8":
        raise EngineUnavailable(f"{flag(next(iter(options)))} was given; it is an option of --precision int8")
    budget = Budget(**{name: options[f"budget_{name}"] for name in MEASURES if f"budget_{name}" in options})
    rest = {name: value for name, value in options.items() if not name.startswith("budget_")}
    return {**rest, "budget": budget}
