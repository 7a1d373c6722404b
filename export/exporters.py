"""The engines that `fewstep export` can make, as data: who makes each, in which precisions, with which options."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fewstep.models.arguments import read_names
from fewstep.runtime.errors import EngineUnavailable

from .option import Option, flag
from .quantise_options import INT8_OPTIONS
from .tensorrt_options import TENSORRT_OPTIONS

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle
    from fewstep.runtime.engines.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """`fewstep.export<module>:<function>(bundle, *, precision, progress=None, **settings, **options)`, imported when
    called. It gives the manifest that it wrote, or None where the engine is the bundle itself.

    precisions: what it can make, the usual one first; `fp32` gives the engine kind its bare name. settings: what the
    engine fixes, options: what its user may set.
    """

    module: str
    function: str
    precisions: tuple[str, ...] = ("fp32",)
    options: tuple[Option, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


_ROLES = Option(name="roles", help="comma-separated; default: all", read=read_names, metavar="ROLES")
_GRAPHS = Option(
    name="graphs",
    help="further graphs: picture, picture-2, picture-4 (whole requests of so many steps in one call)",
    read=read_names,
    metavar="GRAPHS",
)
_DEVICE = Option(name="device", help="cpu or cuda, what it is built for; default: cpu", metavar="DEVICE")


def _variant(engine: str) -> Exporter:
    return Exporter(
        module=".variants", function="export_variant", precisions=("fp32", "bf16"), settings={"engine": engine}
    )


def _provider(engine: str) -> Exporter:
    return Exporter(module=".variants", function="export_provider", settings={"engine": engine})


EXPORTERS: dict[str, Exporter] = {
    "torch": _variant("torch"),
    "torch-compile": _variant("torch-compile"),
    "torch-cudagraphs": _variant("torch-cudagraphs"),
    "torch-compile-cudagraphs": _variant("torch-compile-cudagraphs"),
    "aoti": Exporter(module=".aoti", function="export_aoti", precisions=("fp32", "bf16"), options=(_ROLES, _DEVICE)),
    "onnx": Exporter(
        module=".quantise_onnx",
        function="export_onnx_precision",
        precisions=("fp32", "int8"),
        options=(_GRAPHS, *INT8_OPTIONS),
    ),
    "onnx-cuda": _provider("onnx-cuda"),
    "onnx-tensorrt": _provider("onnx-tensorrt"),
    "tensorrt": Exporter(
        module=".tensorrt",
        function="export_tensorrt",
        precisions=("fp32", "fp16", "bf16"),
        options=(_ROLES, *TENSORRT_OPTIONS),
    ),
    "openvino": Exporter(
        module=".openvino", function="export_openvino", precisions=("fp32", "bf16", "int8"), options=INT8_OPTIONS
    ),
}
"""Engine -> what makes it."""


def precisions_of(engine: str) -> tuple[str, ...]:
    return EXPORTERS[engine].precisions


def options_of(engine: str) -> dict[str, Option]:
    return {option.name: option for option in EXPORTERS[engine].options}


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
    make = getattr(importlib.import_module(exporter.module, __package__), exporter.function)
    manifest: Manifest | None = make(bundle, precision=precision, progress=progress, **exporter.settings, **options)
    return manifest
