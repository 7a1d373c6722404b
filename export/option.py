"""A setting of an engine's exporter, as data: its flag on the command line and its name for the exporter."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Option:
    """A setting of one engine: `--two-words VALUE` on the command line, `two_words=value` to the exporter.

    read: text to value; it raises `ValueError` or `argparse.ArgumentTypeError` for a wrong one. Two engines that share
    an option's name share how it is read.
    """

    name: str
    help: str
    read: Callable[[str], Any] = str
    metavar: str = "VALUE"


def flag(name: str) -> str:
    """An option as the command line writes it."""
    return "--" + name.replace("_", "-")
