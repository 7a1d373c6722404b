"""Numbers and names as command lines have them."""

import argparse

import pytest

from fewstep.models.arguments import read_count, read_counts, read_names


def test_what_is_read():
    assert read_count("12") == 12 and read_counts("4,1,4") == (4, 1)
    assert read_names("text,,decoder") == ("text", "decoder") and read_names("") == ()


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "two", "\N{SUPERSCRIPT TWO}"])
def test_what_is_no_count(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 1"):
        read_count(text)
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 1"):
        read_counts(f"1,{text}")
