"""The engines that `fewstep export` can make, as data: who makes each, in which precisions, with which options."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewstep.runtime.errors import EngineUnavailable

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle
    from fewstep.runtime.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Option:
    """A setting of one engine: `--two-words VALUE` on the command line, `two_words=value` to the exporter.

    read: text to value; it raises `ValueError` or `argparse.ArgumentTypeError` for a wrong one. Two engines that share
    an option's name share how it is read.
    """

    name: str
    help: str
    read: Callable[[str], Any] = str
    metavar: str = "VALUE"


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """`fewstep.export<module>:<function>(bundle, *, precision, progress=None, **options) -> Manifest`.

    precisions: what it can make, the usual one first; `fp32` gives the engine kind its bare name. Imported when called.
    """

    module: str
    function: str
    precisions: tuple[str, ...] = ("fp32",)
    options: tuple[Option, ...] = ()


EXPORTERS: dict[str, Exporter | None] = {
    "torch": None,
    "onnx": Exporter(module=".onnx", function="export_onnx"),
    "openvino": Exporter(module=".openvino", function="export_openvino", precisions=("fp32", "bf16")),
}
"""Engine -> what makes it. None: it is the bundle itself, so an export only makes golden cases and checks them."""


def precisions_of(engine: str) -> tuple[str, ...]:
    exporter = EXPORTERS[engine]
    return ("fp32",) if exporter is None else exporter.precisions


def options_of(engine: str) -> dict[str, Option]:
    exporter = EXPORTERS[engine]
    return {} if exporter is None else {option.name: option for option in exporter.options}


def all_options() -> dict[str, tuple[Option, tuple[str, ...]]]:
    """Each option of any engine by name, with the engines that have it."""
    found: dict[str, tuple[Option, tuple[str, ...]]] = {}
    for engine in EXPORTERS:
        for name, option in options_of(engine).items():
            found[name] = (option, (*found.get(name, (option, ()))[1], engine))
    return found


def kind_of(engine: str, precision: str) -> str:
    """The engine kind, which is its folder in `engines/` and its name in `open_engine`."""
    return engine if precision == "fp32" else f"{engine}-{precision}"


def check_choice(engine: str, precision: str, options: Mapping[str, Any]) -> None:
    """Whether an engine has a precision and options.

    Errors: `EngineUnavailable` naming what it lacks and what it has.
    """
    if precision not in precisions_of(engine):
        able = ", ".join(precisions_of(engine))
        raise EngineUnavailable(f"--precision is {precision!r}; the engine {engine!r} has {able}")
    known = options_of(engine)
    for name in options:
        if name not in known:
            able = ", ".join(map(flag, known)) or "no options"
            raise EngineUnavailable(f"{flag(name)} was given; the engine {engine!r} has {able}")


def make_engine(
    bundle: "Bundle", engine: str, *, precision: str, progress: Callable[[str], None] | None = None, **options: Any
) -> "Manifest | None":
    """Write `<bundle>/engines/<kind>/`, unverified; None where the engine is the bundle itself.

    Errors: as `check_choice`, and the exporter's own `EngineUnavailable`.
    """
    check_choice(engine, precision, options)
    exporter = EXPORTERS[engine]
    if exporter is None:
        return None
    make = getattr(importlib.import_module(exporter.module, __package__), exporter.function)
    manifest: Manifest = make(bundle, precision=precision, progress=progress, **options)
    return manifest


def flag(name: str) -> str:
    """An option as the command line writes it."""
    return "--" + name.replace("_", "-")
