"""The README's commands exist, and the files it shows are there."""

import re
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"^ {4}fewstep (bench \w+|\w+)", TEXT, flags=re.MULTILINE)))


def test_readme_names_most_commands():
    assert {"distill", "export", "verify", "generate", "serve", "bench latency", "bench quality"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_real_and_helps_with_an_example(command, capsys):
    found = {point.name: point for point in entry_points(group="fewstep.commands")}
    with pytest.raises(SystemExit) as end:
        found[command.replace(" ", "-")].load()(["--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"usage: fewstep {command}" in shown
    assert f"example: fewstep {command}" in shown


def test_make_targets_are_real():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test", "check", "serve"} <= targets
    assert set(re.findall(r"`?make ([\w-]+)", TEXT)) <= targets


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_changelog_has_the_version():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version("fewstep") == declared
    assert f"## [{declared}]" in (ROOT / "CHANGELOG.md").read_text()
