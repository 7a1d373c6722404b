"""`fewstep recipes --methods`: the committed pages follow the code, and nothing in them is typed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.trainers.bench import methods_page as module
from fewstep.trainers.bench.commands import recipe_rows, recipes
from fewstep.trainers.bench.headlines import HEADLINES
from fewstep.trainers.bench.methods_page import memory, methods_page, needs, parts, plane_results, unverified
from fewstep.trainers.bench.recipes import FULL, key_of
from fewstep.trainers.parts.curricula import Fixed
from fewstep.trainers.parts.distances import PseudoHuber, unweighted
from fewstep.trainers.parts.laws import KarrasPairs
from fewstep.trainers.recipes.registry import RECIPES

DOCS = Path(__file__).parents[1] / "docs"
FAMILIES = {
    page: page.read_text() for page in sorted((DOCS / "recipes").glob("*.md")) if page.stem not in ("README", "plane")
}


def test_the_committed_page_is_what_the_command_writes(tmp_path, capsys):
    assert recipes(["--methods", str(tmp_path / "methods.md")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert (DOCS / "methods.md").read_text() == (tmp_path / "methods.md").read_text(), (
        "write it again: fewstep recipes --methods docs/methods.md"
    )


def test_every_recipe_has_a_row_and_a_section():
    page = methods_page()
    for name, function in RECIPES.items():
        recipe = function()
        assert page.count(f"\n### {name}\n") == 1
        (row,) = [line for line in page.splitlines() if line.startswith(f"| [{name}](#")]
        assert f"| {recipe.family} | {' '.join(map(str, recipe.steps)) or 'as teacher'} |" in row
        for stage in recipe.stages:
            assert parts(stage.objective) in page


def test_parts_are_written_as_they_are_made_without_defaults():
    assert parts(KarrasPairs(Fixed(39))) == "KarrasPairs(points=Fixed(count=39))"
    assert parts(PseudoHuber()) == "PseudoHuber()" and parts(PseudoHuber(0.03)) == "PseudoHuber(c=0.03)"
    assert parts((unweighted, 1.50, None)) == "(unweighted, 1.5, None)"


def test_what_stayed_unverified_comes_from_the_docstring():
    def settled():
        """All of it was read."""

    def open_question():
        """A method.

        Left out: a term. Unverified: a rate;
        decided: ours.
        """

    assert unverified(settled) is None and unverified(open_question) == "a rate; decided: ours."
    for function in RECIPES.values():
        text = " ".join((function.__doc__ or "").split())
        assert len(re.findall("[Uu]nverified", text)) == text.count("Unverified: ") <= 1, function.__name__
    found = [name for name, function in RECIPES.items() if unverified(function)]
    assert "lora-guided" in found and "lcm" not in found


def test_memory_and_needs_follow_the_recipe():
    # student, two averages, teacher; gradient and two moments
    assert memory(RECIPES["lcm"]()) == 1 + 2 + 1 + 3
    assert memory(RECIPES["lcm-lora"]()) == 1 + 1 + 2 == 1 + memory(RECIPES["agd"]()), "an average to be held against"
    assert memory(RECIPES["dmd2"]()) == (1 + 1 + 1 + 3) + (1 + 3)
    assert needs(RECIPES["lcm"]()) == "a teacher, pictures"
    assert needs(RECIPES["ct"]()) == "random weights, pictures" != needs(RECIPES["ect"]())
    assert needs(RECIPES["reflow"]()).startswith("a teacher, prompts, 8192 pairs")


def test_only_results_of_the_recipe_as_it_is_are_shown(tmp_path, monkeypatch):
    against = {"1": {"of_same": 0.5, "of_many": 3.0, "better": True, "near": False}}
    row = {"recipe": "lcm", "key": key_of("lcm", FULL), "steps": {"1": {"swd": 0.25}}, "against": against}
    other = {**row, "recipe": "cd"}
    (tmp_path / "plane.json").write_text(json.dumps({"rows": [row, other, {**row, "recipe": "gone"}]}))
    assert plane_results(tmp_path) == {"lcm": {"1": {"swd": 0.25, "of_same": 0.5, "near": False}}}
    assert plane_results(tmp_path / "nothing") == {}
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "plane_results", lambda: plane_results(tmp_path))
    assert "1: 0.250 (0.50)" in methods_page()
    lcm = next(row for row in recipe_rows() if row["name"] == "lcm")
    assert lcm["plane"]["1"]["swd"] == 0.25 and lcm["quality"] and lcm["unverified"] is None
    monkeypatch.setitem(RECIPES, "lcm", lambda: replace(RECIPES["lcm-lora"](), name="lcm"))
    assert plane_results(tmp_path) == {}


def test_headlines_are_of_recipes_that_papers_have():
    listed = {"imm", "twinflow", "consistency-fm", "lcsc"}  # of further recipes of the catalogue
    assert set(HEADLINES) <= set(RECIPES) | listed
    assert all(text and not text.endswith(".") for text in HEADLINES.values())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_stands_on_one_page_of_its_family(name):
    """Its equations are there under a heading with its name, among others'."""
    where = [page.name for page, text in FAMILIES.items() if f"`{name}`" in _headings(text)]
    assert len(where) == 1, f"{name} is explained on {where}; docs/recipes should have it once"


def test_pages_name_only_recipes_that_exist():
    readme = (DOCS / "recipes" / "README.md").read_text()
    named = {
        word for line in readme.splitlines() if line.startswith("|") for word in re.findall(r"`([a-z0-9+-]+)`", line)
    }
    assert named and named <= set(RECIPES)
    for page, text in FAMILIES.items():
        assert f"({page.name})" in readme, f"docs/recipes/README.md does not lead to {page.name}"
        assert set(re.findall(r"`([a-z0-9+-]+)`", _headings(text))) <= set(RECIPES)


COLUMNS = ({1}, {2, 3, 4}, set(range(8, 1000)))


def test_the_table_of_choices_agrees_with_the_recipes():
    """Whoever has no pictures or no teacher is sent to recipes that need none, and finds the steps asked for."""
    readme = (DOCS / "recipes" / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in readme.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) > 8
    for has, *cells in rows:
        for cell, counts in zip(cells, COLUMNS, strict=True):
            for name in re.findall("`([a-z0-9+-]+)`", cell):
                recipe = RECIPES[name]()
                assert not recipe.steps or counts & set(recipe.steps), f"{name} has {recipe.steps} steps"
                assert not (recipe.needs.data and "no pictures" in has), f"{name} needs pictures"
                if "no teacher" in has or "random weights" in has:
                    assert not recipe.needs.teacher, f"{name} needs a teacher"
                if "random weights" in has:
                    assert recipe.stages[0].start == "noise", name


def _headings(text):
    return "\n".join(line for line in text.splitlines() if line.startswith("#"))
