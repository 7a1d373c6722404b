"""Which TensorRT is here: the package `tensorrt`, or `tensorrt-rtx` with the same interface, and where they differ."""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import EngineUnavailable


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """package: what pip installs. portable: engines are built without a GPU and finished on the one that opens them;
    else they are tuned on a GPU and run on its model alone. times_kernels: a timing cache spares a second build the
    tuning. own_graphs: contexts are made from a runtime configuration, which captures CUDA graphs and caches the
    kernels finished at the first call.
    """

    name: str
    module: str
    package: str
    portable: bool
    times_kernels: bool
    own_graphs: bool


FLAVOURS = {
    "tensorrt": Flavour(
        name="tensorrt", module="tensorrt", package="tensorrt", portable=False, times_kernels=True, own_graphs=False
    ),
    "tensorrt-rtx": Flavour(
        name="tensorrt-rtx",
        module="tensorrt_rtx",
        package="tensorrt-rtx",
        portable=True,
        times_kernels=False,
        own_graphs=True,
    ),
}


@dataclass(frozen=True)
class TensorRT:
    """A flavour and its imported module."""

    flavour: Flavour
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    def __str__(self) -> str:
        return f"{self.flavour.name} {self.version}"

    def logger(self, errors: list[str]) -> Any:
        """A logger that appends what TensorRT reports as an error: its calls return None or False and say why here."""
        base = self.module.ILogger

        class Logger(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, level: Any, message: str) -> None:
                if level in (base.ERROR, base.INTERNAL_ERROR):
                    errors.append(message)

        return Logger()


def load_tensorrt(flavour: str = "auto") -> TensorRT:
    """The wanted flavour; "auto" is `tensorrt` where it is installed, else `tensorrt-rtx`.

    Errors: `EngineUnavailable` naming the packages to install or the flavours there are.
    """
    if flavour != "auto" and flavour not in FLAVOURS:
        raise EngineUnavailable(f"flavour is {flavour!r}; use one of auto, {', '.join(FLAVOURS)}")
    wanted = FLAVOURS if flavour == "auto" else {flavour: FLAVOURS[flavour]}
    reasons = []
    for known in wanted.values():
        try:
            return TensorRT(known, importlib.import_module(known.module))
        except ImportError as error:
            reasons.append(f"pip install {known.package} ({error})")
    raise EngineUnavailable(f"{' and '.join(wanted)} cannot be imported; {' or '.join(reasons)}")


def said(errors: Sequence[str]) -> str:
    """What TensorRT reported, without source positions and without its remarks that a build machine has no driver."""
    told = [message for message in dict.fromkeys(errors) if "cudaError 35" not in message] or list(
        dict.fromkeys(errors)
    )
    plain = (re.sub(r"\s*\(In \S+ at /_src/[^()]*\)|\s*In \S+ at /_src/[^\s()]+", "", m).strip() for m in told)
    return "; ".join(plain) or "it gave no reason"
