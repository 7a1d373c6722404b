"""ARCHITECTURE.md names every source file with its first sentence, and no file that is gone.

`python tests/test_architecture.py` rewrites the list of files.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "ARCHITECTURE.md"
ROOMS = ("models", "runtime", "export", "trainers", "server")


def sources():
    found = [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"), key=lambda p: (p.parent, p.name))]
    return [p for p in found if not p.name.startswith("__")]


def first_sentence(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    line = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<!al)[.?]\s", line)[0].rstrip(":;.")


def file_list():
    lines, folder = [], None
    for path in sources():
        if path.parent != folder:
            folder = path.parent
            lines.append(
                f"\n**`{folder.relative_to(ROOT).as_posix()}/`**: {first_sentence(folder / '__init__.py')}.\n\n"
            )
        lines.append(f"- `{path.relative_to(ROOT).as_posix()}`: {first_sentence(path)}\n")
    return "".join(lines).lstrip("\n")


def test_every_file_says_what_it_is():
    silent = [p.name for p in sources() if len(first_sentence(p)) < 15]
    assert not silent, f"a module's first sentence says what it holds: {silent}"


def test_the_list_of_files_is_the_tree():
    listed = PAGE.read_text().split("## Files\n\n")[1]
    assert listed == file_list(), "run `python tests/test_architecture.py`"


def test_files_named_in_the_text_exist():
    named = re.findall(r"`((?:models|runtime|export|trainers|server|tests)/[\w/]+\.py)`", PAGE.read_text())
    assert len(named) > 40
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_the_life_of_a_request_is_ten_lines_and_names_real_functions():
    life = PAGE.read_text().split("## The life of a request\n\n")[1].split("\n\n")[0]
    assert [line.split(".")[0] for line in life.splitlines()] == [str(k) for k in range(1, 11)]


if __name__ == "__main__":
    head = PAGE.read_text().split("## Files\n\n")[0]
    PAGE.write_text(head + "## Files\n\n" + file_list())
