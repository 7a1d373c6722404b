"""Bundle to AOTInductor: each role compiled ahead of time by torch into a package for this machine and this torch."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle
from fewstep.models.files import PARTIAL, sha256_of
from fewstep.runtime.engines.aoti_engine import build_facts
from fewstep.runtime.engines.built import remember
from fewstep.runtime.engines.compiled_engine import ROUNDED, Rounded, cpp_compiler
from fewstep.runtime.engines.manifest import Graph, Manifest, Port, engine_folder, write_manifest
from fewstep.runtime.errors import EngineUnavailable

from .graphs import RoleGraph, role_graph

Progress = Callable[[str], None]


def export_aoti(
    bundle: Bundle,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    roles: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write `<bundle>/engines/aoti[-bf16]/`: a package per role, free in its batch, and an unverified manifest.

    roles: None is every role of the bundle; each takes half a minute or more.

    Errors: `EngineUnavailable` where the compiler or the device is missing, a role is unknown, torch cannot compile it,
    or the folder cannot be written.
    """
    if precision not in ("fp32", "bf16"):
        raise EngineUnavailable(f"precision is {precision!r}; the engine 'aoti' has fp32, bf16")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EngineUnavailable(f"device is {device!r} and torch sees no CUDA device; use 'cpu'")
    if cpp_compiler() is None:
        raise EngineUnavailable("the engine 'aoti' needs a C++ compiler and finds neither $CXX, g++ nor clang++")
    kind = "aoti" if precision == "fp32" else f"aoti-{precision}"
    folder = engine_folder(bundle, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)  # packages in the making have no manifest
        made = {}
        for role in bundle.roles if roles is None else roles:
            if progress is not None:
                progress(role)
            made[role] = export_role(role_graph(bundle, role), folder, precision=precision, device=device)
        manifest = Manifest(
            engine=kind,
            precision=precision,
            opset=0,
            roles=made,
            weights_digest=bundle.weights_digest,
            producers={"torch": torch.__version__},
            build=build_facts(device),
        )
        write_manifest(bundle, manifest)
        remember(manifest)
    except OSError as error:
        raise EngineUnavailable(f"{folder} cannot be written ({error}); export a copy that you own") from error
    return manifest


def export_role(graph: RoleGraph, folder: Path, *, precision: str, device: str) -> Graph:
    """Compile one role and give its manifest entry."""
    rounds = precision == "bf16" and graph.role in ROUNDED
    module: nn.Module = Rounded(graph.module.network) if rounds else graph.module
    module = module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    feeds = {name: feed.to(device) for name, feed in graph.feeds.items()}
    path = folder / f"{graph.role.replace('+', '_')}.pt2"
    beside = path.with_name(f"{path.stem}{PARTIAL}.pt2")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the compiler's own workings
            axes = (tuple(graph.axes[name] for name in feeds),)
            program = torch.export.export(module, tuple(feeds.values()), dynamic_shapes=axes)
            settings = {"cpp.dynamic_threads": True}  # as many threads as torch has when it runs, not when it compiled
            torch._inductor.aoti_compile_and_package(program, package_path=str(beside), inductor_configs=settings)
            outputs = module(*feeds.values())
        beside.replace(path)
    except OSError:
        raise
    except Exception as error:  # torch.export and the compiler raise errors of many classes
        said = str(error).strip().splitlines()[0]
        raise EngineUnavailable(
            f"torch {torch.__version__} cannot compile {graph.role!r} ahead ({said}); use --engine torch"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    given = outputs if isinstance(outputs, tuple) else (outputs,)
    return Graph(
        file=path.name,
        sha256=sha256_of(path),
        inputs=tuple(_port(name, feed, graph.axes[name]) for name, feed in feeds.items()),
        outputs=tuple(_port(name, out, {0: "batch"}) for name, out in zip(graph.outputs, given, strict=True)),
    )


def _port(name: str, tensor: Tensor, free: dict[int, Any]) -> Port:
    shape = tuple(length if axis not in free else _axis_name(free[axis]) for axis, length in enumerate(tensor.shape))
    return Port(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=shape)


def _axis_name(axis: Any) -> str:
    return str(getattr(axis, "__name__", axis))
