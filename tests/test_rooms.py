"""The house rules that would drift without a test: import direction, packages, light imports, sizes."""

import ast
import json
import os
import pathlib
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ALLOWED = {
    "models": set(),
    "runtime": {"models"},
    "export": {"models", "runtime"},
    "trainers": {"models", "runtime"},
    "server": {"runtime"},
}
MAX_LINES, MAX_FUNCTION = 400, 60
WITHOUT_TORCH = [
    "fewstep.models.errors", "fewstep.models.paths", "fewstep.models.predictions", "fewstep.models.spec",
    "fewstep.models.bundle", "fewstep.runtime.errors", "fewstep.runtime.sampling.request",
    "fewstep.runtime.sampling.samplers", "fewstep.runtime.sampling.plan", "fewstep.runtime.schedule.scheduler",
"fewstep.runtime.engine", "fewstep.runtime.cli", ]  # fmt: skip
FILES = sorted(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


PACKAGES = {
    "runtime": ("schedule", "sampling", "engines", "service", "bench"),
    "trainers": (
        "parts", "pictures", "networks", "loop", "distribution", "objectives", "recipes", "plane", "oracle", "runs",
        "bench",
    ),
}  # fmt: skip
"""Of rooms that have some: each may import those before it."""


def name_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: pathlib.Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            if node.module == "fewstep":
                yield from (f"fewstep.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            depth = len(path.relative_to(ROOT).parts) - 1
            assert node.level <= depth, f"{path}:{node.lineno} leaves its room"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def faults(room: str, path: pathlib.Path) -> list[str]:
    found = []
    for name in imports(path):
        head = name.split(".")
        if head[0] in ALLOWED or head[0] == "tests":
            found.append(f"{path.name}: bare import of the room {name}")
        if head[0] == "fewstep" and len(head) > 1 and head[1] not in ALLOWED[room] | {room}:
            found.append(f"{path.name}: {room} may not import {name}")
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_down(room):
    assert [f for path in (ROOT / room).rglob("*.py") for f in faults(room, path)] == []


@pytest.mark.parametrize(("room", "package"), [(room, name) for room, names in PACKAGES.items() for name in names])
def test_packages_of_a_room_import_downwards(room, package):
    order = PACKAGES[room]
    found = [path.name for path in (ROOT / room).iterdir() if (path / "__init__.py").is_file()]
    assert sorted(found) == sorted(order)
    above = order[order.index(package) + 1 :]
    for path in (ROOT / room / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                named = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                assert not set(named) & set(above), f"{name_of(path)}:{node.lineno} imports {named[0]}, which is above"


@pytest.mark.parametrize(
    "line",
    ["import models", "from runtime.plan import Plan", "import fewstep.server.app", "from fewstep import trainers"],
)
def test_a_wrong_import_would_be_seen(line, tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text(f"def f():\n    {line}\n")
    assert faults("runtime", planted)


def test_every_package_is_in_the_wheel():
    settings = PYPROJECT["tool"]["setuptools"]
    inits = (path.parent.relative_to(ROOT).parts for room in ALLOWED for path in (ROOT / room).rglob("__init__.py"))
    assert set(settings["packages"]) == {"fewstep." + ".".join(parts) for parts in inits}
    assert settings["package-dir"] == {f"fewstep.{room}": room for room in ALLOWED}
    assert all((ROOT / room / "py.typed").is_file() for room in ALLOWED)


def test_data_files_are_in_the_wheel():
    """Whatever a room ships beside code matches a package-data pattern of its own."""
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    missed = []
    for room in ALLOWED:
        shipped = {
            path
            for package, own in patterns.items()
            for pattern in own
            for path in (ROOT / (room if package == "*" else package.removeprefix("fewstep.").replace(".", "/"))).glob(
                pattern
            )
        }
        for path in (ROOT / room).rglob("*"):
            if not path.is_file() or path.suffix in (".py", ".pyc") or "__pycache__" in path.parts:
                continue
            if path not in shipped:
                missed.append(name_of(path))
    assert missed == []


def test_commands_point_at_functions():
    """Every entry point names a function that is there; read from the source, so nothing heavy is imported."""
    for name, target in PYPROJECT["project"]["entry-points"]["fewstep.commands"].items():
        module, function = target.split(":")
        tree = ast.parse((ROOT / f"{module.removeprefix('fewstep.').replace('.', '/')}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{name}: {target}"


def loaded_by(*modules: str) -> set[str]:
    """Every module in a fresh interpreter after importing these."""
    code = f"import sys, json, {', '.join(modules)}; print(json.dumps(list(sys.modules)))"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout))


def test_light_modules_load_nothing_heavy():
    heavy = {"torch", "diffusers", "transformers", "onnxruntime", "openvino", "fastapi", "PIL", "matplotlib"}
    assert loaded_by(*WITHOUT_TORCH) & heavy == set()


def test_the_runtime_is_a_library_without_the_server():
    loaded = loaded_by("fewstep.runtime.service.local")
    assert "fewstep.runtime.service.local" in loaded
    upper = ("fewstep.server", "fewstep.export", "fewstep.trainers")
    assert [name for name in loaded if name.startswith(upper)] == []
    assert not {"fastapi", "uvicorn", "peft", "matplotlib", "onnx"} & loaded


def test_help_is_quick():
    """Below 0.5 s, best of five, in processor time: a busy machine must not make it look slow."""
    command = [sys.executable, "-P", "-m", "fewstep.runtime.cli", "--help"]
    taken = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert out.stdout.startswith("usage: fewstep COMMAND")
    assert min(taken) < 0.5


def test_files_and_functions_stay_small():
    files = [*FILES, *sorted((ROOT / "tests").glob("*.py"))]
    long = {name_of(path): n for path in files if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert long == {}, f"over {MAX_LINES} lines: {long}"
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= MAX_FUNCTION, f"{name_of(path)}:{node.lineno} {node.name} has {length} lines"


def test_no_vague_names_and_no_unfinished_work():
    vague = {"utils", "common", "manager", "base", "helpers", "misc", "types", "queue", "io", "select", "logging"}
    assert [name_of(path) for path in FILES if path.stem in vague] == []
    words = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")
    assert [(name_of(p), w) for p in FILES for w in words if w in p.read_text()] == []


def test_every_file_says_what_it_is():
    silent = [name_of(p) for p in FILES if p.stem != "__init__" and ast.get_docstring(ast.parse(p.read_text())) is None]
    assert silent == []


def test_tests_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)) > 20
