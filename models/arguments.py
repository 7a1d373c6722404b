"""What commands read of their command lines: whole numbers, lists of them, lists of names."""

import argparse


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
    """Names between commas."""
    return tuple(part for part in text.split(",") if part)
