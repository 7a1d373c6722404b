"""What commands read of their command lines: whole numbers, lists of them, lists of names, files to be written."""

import argparse
from pathlib import Path


def read_count(text: str) -> int:
    """A whole number of at least 1.

    Errors: `argparse.ArgumentTypeError`.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def read_counts(text: str) -> tuple[int, ...]:
    """Such numbers between commas, each once. Errors: as `read_count`."""
    return tuple(dict.fromkeys(read_count(part) for part in text.split(",")))


def read_names(text: str) -> tuple[str, ...]:
    """Names between commas.

    Errors: `argparse.ArgumentTypeError` where there is none.
    """
    names = tuple(part for part in text.split(",") if part)
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return names


def read_output(text: str) -> Path:
    """A file to be written when the work is done: told before it that there is no folder for it.

    Errors: `argparse.ArgumentTypeError`.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no folder; make it first")
    return path
