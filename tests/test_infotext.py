"""Generation parameters as web UIs write them, and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.runtime.sampling.images import FORMATS, encode, read_metadata
from fewstep.runtime.sampling.infotext import infotext, read_infotext

SETTINGS = {"Steps": "4", "Sampler": "lcm", "CFG scale": "3", "Seed": "7", "Size": "64x64", "Model": "scenes-lcm"}
LINE = "Steps: 4, Sampler: lcm, CFG scale: 3, Seed: 7, Size: 64x64, Model: scenes-lcm"


def test_the_form_is_the_web_uis():
    assert infotext("a cat", "blurry, dark", SETTINGS) == f"a cat\nNegative prompt: blurry, dark\n{LINE}"
    assert infotext("a cat", None, SETTINGS) == f"a cat\n{LINE}"


def test_another_programs_text_is_read():
    text = """girl, (masterpiece), detailed
second line
Negative prompt: ugly, bad: anatomy
more of it
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model: "a, b", Lora hashes: "x: 1, y: 2" """
    found = read_infotext(text)
    assert found["Prompt"] == "girl, (masterpiece), detailed\nsecond line"
    assert found["Negative prompt"] == "ugly, bad: anatomy\nmore of it"
    assert (found["Steps"], found["Sampler"], found["Size"]) == ("20", "Euler a", "512x512")
    assert (found["Model"], found["Lora hashes"]) == ("a, b", "x: 1, y: 2")


@pytest.mark.parametrize("text", ["", "a cat", "a cat\nNegative prompt: dog", "one: two, three: four", '"', 'x: "'])
def test_a_text_without_settings_is_prompt(text):
    found = read_infotext(text)
    assert set(found) <= {"Prompt", "Negative prompt"}
    assert found["Prompt"] == text.partition("\nNegative")[0]


PROMPTS = st.text(min_size=1).filter(lambda text: "\nNegative prompt:" not in "\n" + text)


@given(PROMPTS, PROMPTS | st.none(), st.text(min_size=1).filter(lambda text: text == text.strip()))
def test_what_is_written_is_read(prompt, negative, model):
    found = read_infotext(infotext(prompt, negative, {**SETTINGS, "Model": model}))
    assert found["Prompt"] == prompt and found.get("Negative prompt") == negative
    assert {name: found[name] for name in SETTINGS} == {**SETTINGS, "Model": model}


@given(st.text())
def test_no_text_breaks_the_reader(text):
    assert "Prompt" in read_infotext(text)


@pytest.mark.parametrize("form", FORMATS)
def test_files_of_every_format_hold_the_text(form, picture):
    text = infotext("a cat, größer 😀", "blurry", SETTINGS)
    about = {"prompt": "a cat, größer 😀", "negative_prompt": "blurry", "seed": "7", "parameters": text}
    assert read_metadata(encode(picture, form, metadata=about)) == about


@pytest.mark.parametrize("form", FORMATS)
def test_the_longest_prompts_fit(form, picture):
    long = "😀" * 4000
    text = infotext(long, long, SETTINGS)
    found = read_metadata(encode(picture, form, metadata={"prompt": long, "negative_prompt": long, "parameters": text}))
    assert found["parameters"] == text


def test_a_picture_without_texts_has_none(picture):
    assert read_metadata(encode(picture)) == {}


@pytest.fixture
def picture():
    import numpy as np

    return np.full((16, 24, 3), 90, np.uint8)
