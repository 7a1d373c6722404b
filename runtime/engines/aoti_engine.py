"""AOTInductor packages behind the engine seam: networks compiled ahead by torch, one shared library per role.

An engine folder of this kind is trusted code: opening it loads and runs the machine code inside. Its digests, its
versions and the features of the processor are checked before anything of it is loaded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle

from ..engine import TEXT, Capabilities
from ..errors import EngineFailed, EngineUnavailable
from .manifest import Manifest, checked_files, export_command, read_manifest

MAX_BATCH = 16


class AotiEngine:
    """Runs the packages of `<bundle>/engines/aoti[-bf16]/`.

    threads: CPU threads, a setting of the whole process in torch; None leaves it.

    Errors: `EngineUnavailable` where files are missing, changed or of other weights, or were built by another torch or
    for another device.
    """

    def __init__(self, bundle: Bundle, *, kind: str = "aoti", threads: int | None = None) -> None:
        manifest = read_manifest(bundle, kind)
        check_build(bundle, manifest)
        files = checked_files(bundle, manifest)
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = kind
        self._inputs = {role: tuple(port.name for port in graph.inputs) for role, graph in manifest.roles.items()}
        self._models: dict[str, Any] = {}
        for role, path in files.items():
            try:
                self._models[role] = torch._inductor.aoti_load_package(str(path))
            except Exception as error:  # the loader raises whatever unpacking, linking or torch raise
                raise EngineUnavailable(f"{path} cannot be loaded ({error}); {_remedy(bundle, kind)}") from error
        self.capabilities = Capabilities(
            roles=frozenset(files),
            max_batch=MAX_BATCH,
            device=str((manifest.build or {})["device"]),
            takes_w=manifest.takes("w"),
            takes_s=manifest.takes("s"),
            text_outputs=tuple(port.name for port in manifest.roles[TEXT].outputs) if TEXT in files else ("ctx",),
        )

    @torch.inference_mode()
    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if role not in self._models:
            able = ", ".join(sorted(self._models)) or "nothing: it is closed"
            raise EngineFailed(f"engine {self.name} cannot run {role!r}; it runs {able}")
        if missing := [name for name in self._inputs[role] if name not in feeds]:
            raise EngineFailed(f"engine {self.name} broke in {role!r}: it was not given {missing[0]!r}")
        try:
            out = self._models[role](*(feeds[name].contiguous() for name in self._inputs[role]))
        except (RuntimeError, ValueError, TypeError) as error:
            raise EngineFailed(f"engine {self.name} broke in {role!r}: {error}") from error
        return tuple(out) if isinstance(out, Sequence) else (out,)

    def close(self) -> None:
        self._models.clear()


def build_facts(device: str) -> dict[str, Any]:
    """What a package is bound to: torch's version, the device's name, and on a CPU the features it may use."""
    facts: dict[str, Any] = {"torch": torch.__version__, "device": device, "cpu_features": cpu_features()}
    if device.startswith("cuda"):
        facts["device_name"] = torch.cuda.get_device_name(device)
        facts["capability"] = list(torch.cuda.get_device_capability(device))
    return facts


def check_build(bundle: Bundle, manifest: Manifest) -> None:
    """Whether packages built elsewhere may run here.

    Errors: `EngineUnavailable` with both sides of the first difference.
    """
    built, device = manifest.build or {}, str((manifest.build or {}).get("device"))
    who, remedy = f"the {manifest.engine} engine of {bundle.name}", _remedy(bundle, manifest.engine)
    if device != "cpu" and not device.startswith("cuda"):
        raise EngineUnavailable(f"{who} does not say what device it was built for; {remedy}")
    if device != "cpu" and not torch.cuda.is_available():
        raise EngineUnavailable(f"{who} was built for {device} and torch sees no CUDA device; {remedy}")
    here = build_facts(device)
    for fact in ("torch", "device_name", "capability"):
        if built.get(fact) != here.get(fact):
            raise EngineUnavailable(
                f"{who} was built with {fact} {built.get(fact)!r}, and here it is {here.get(fact)!r}; {remedy}"
            )
    if lacking := sorted(set(built.get("cpu_features", ())) - set(here["cpu_features"])):
        raise EngineUnavailable(f"{who} was built for a CPU with {', '.join(lacking)}, which this one lacks; {remedy}")


def cpu_features() -> list[str]:
    """The instruction sets of this CPU that torch knows of."""
    known = getattr(torch.cpu, "get_capabilities", None)
    if known is None:
        return [torch.backends.cpu.get_cpu_capability()]
    return sorted(name for name, value in known().items() if value is True)


def _remedy(bundle: Bundle, kind: str) -> str:
    return f"run `{export_command(bundle, kind)}` here"
