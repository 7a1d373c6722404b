"""What `fewstep export --engine tensorrt` can be told."""

import argparse

from .option import Option


def _ranges(text: str) -> tuple[tuple[int, ...], ...]:
    """Text such as 1-1-1,2-4-4: ranges of batches, each the least, the usual and the most."""
    ranges = []
    for part in text.split(","):
        numbers = part.split("-")
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            raise argparse.ArgumentTypeError(f"{part!r} is no range least-usual-most, such as 2-4-4")
        ranges.append(tuple(map(int, numbers)))
    return tuple(ranges)


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def _level(text: str) -> int:
    if text not in tuple("012345"):
        raise argparse.ArgumentTypeError(f"{text!r} is no level from 0 to 5")
    return int(text)


TENSORRT_OPTIONS = (
    Option(name="flavour", help="tensorrt or tensorrt-rtx; default: the one installed", metavar="NAME"),
    Option(
        name="batches",
        help="batches to tune for, each as least-usual-most; default: 1-1-1,2-4-4,5-8-8",
        read=_ranges,
        metavar="RANGES",
    ),
    Option(name="refit", help="yes: weights can be changed without a build; needs a GPU", read=_yes, metavar="YES"),
    Option(name="level", help="effort of the builder, 0 (quickest) to 5; default: 3", read=_level, metavar="N"),
)
