"""Numbers and names as command lines have them."""

import argparse

import pytest

from fewstep.models.arguments import read_count, read_counts, read_names, read_output


def test_what_is_read():
    assert read_count("12") == 12 and read_counts("4,1,4") == (4, 1)
    assert read_names("text,,decoder") == ("text", "decoder")


def test_an_empty_list_of_names_names_nothing():
    with pytest.raises(argparse.ArgumentTypeError, match="',' names nothing"):
        read_names(",")


def test_a_file_can_be_written_where_its_folder_is(tmp_path):
    assert read_output(str(tmp_path / "new.json")) == tmp_path / "new.json"
    with pytest.raises(argparse.ArgumentTypeError, match="gone is no folder; make it first"):
        read_output(str(tmp_path / "gone" / "new.json"))
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder; name a file"):
        read_output(str(tmp_path))


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "two", "\N{SUPERSCRIPT TWO}"])
def test_what_is_no_count(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 1"):
        read_count(text)
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 1"):
        read_counts(f"1,{text}")
