"""ONNX Runtime behind the engine seam: one session per role over the graphs of `<bundle>/engines/onnx/`.

On a CUDA device, buffers are bound once per role and shapes. On the CPU that was measured to gain nothing: inputs are
read and outputs handed over in place. Idle threads do not spin: several sessions share the cores here, and spinning
ones slow each other by a quarter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fewstep.models.bundle import Bundle

from ..engine import DECODER, DENOISER, TEXT, Capabilities
from ..errors import EngineFailed, EngineUnavailable
from .manifest import checked_files, engine_folder, read_manifest

MAX_BATCH = 16
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS = {"onnx-cuda": (CUDA, CPU), "onnx-tensorrt": (TENSORRT, CUDA, CPU)}
"""Engine kind -> ONNX Runtime's providers, the wanted one first; any other kind runs on the CPU."""


class OrtEngine:
    """Runs exported graphs. On a CUDA device an output is valid until the next call of the same role.

    kind: whose manifest is read, and which providers run it (`PROVIDERS`). threads: CPU threads of a call; None takes
    torch's count. providers: others than the kind's. It is an error if the first one does not become active, since ONNX
    Runtime falls back to the CPU without a word.

    Errors: `EngineUnavailable` where a package, a provider or a file is missing, or files and weights do not match.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        kind: str = "onnx",
        threads: int | None = None,
        providers: Sequence[str] | None = None,
    ) -> None:
        wanted = tuple(providers or PROVIDERS.get(kind, (CPU,)))
        self._ort = _onnxruntime(wanted)
        manifest = read_manifest(bundle, kind)
        self._files = checked_files(bundle, manifest)
        self._options = session_options(self._ort, threads)
        self._wanted = wanted[0]
        self._providers = [(name, provider_options(name, bundle)) for name in wanted]
        self._sessions: dict[str, Any] = {}
        self._bound: dict[tuple[Any, ...], BoundCall] = {}
        self._closed = False
        self.name = kind
        self.capabilities = Capabilities(
            roles=frozenset(manifest.roles),
            max_batch=MAX_BATCH,
            device="cpu" if self._wanted == CPU else "cuda",
            takes_w=manifest.takes("w"),
            takes_s=manifest.takes("s"),
            text_outputs=tuple(p.name for p in manifest.roles[TEXT].outputs) if TEXT in manifest.roles else ("ctx",),
        )
        for role in (TEXT, DENOISER, DECODER):  # the rest is opened when first asked for
            if role in self._files:
                self._session(role)

    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        session = self._session(role)
        try:
            return run_on_cpu(session, feeds) if self.capabilities.device == "cpu" else self._run_bound(role, feeds)
        except Exception as error:  # its own exceptions share no class of their own
            raise EngineFailed(f"engine {self.name} broke in {role!r}: {error}") from error

    def close(self) -> None:
        self._closed = True
        self._bound.clear()
        self._sessions.clear()

    def _run_bound(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        shapes = (role, *((name, feed.shape, feed.dtype) for name, feed in feeds.items()))
        if shapes not in self._bound:
            self._bound[shapes] = BoundCall(self._session(role), feeds)
        return self._bound[shapes].run(feeds)

    def _session(self, role: str) -> Any:
        if self._closed or role not in self._files:
            able = "nothing: it is closed" if self._closed else ", ".join(sorted(self._files))
            raise EngineFailed(f"engine {self.name} cannot run {role!r}; it runs {able}")
        if role not in self._sessions:
            try:
                session = self._ort.InferenceSession(
                    str(self._files[role]), self._options, providers=self._providers, enable_fallback=False
                )
            except Exception as error:
                raise EngineUnavailable(f"{self._files[role]} cannot be opened by ONNX Runtime: {error}") from error
            active = session.get_providers()[0]
            if active != self._wanted:
                raise EngineUnavailable(
                    f"provider {self._wanted!r} was asked for and {active!r} became active; "
                    "check the CUDA libraries or ask for the active one"
                )
            self._sessions[role] = session
        return self._sessions[role]


def session_options(ort: Any, threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def run_on_cpu(session: Any, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Inputs are torch's own memory, and so are the outputs ONNX Runtime's: nothing is copied here."""
    arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in feeds.items()}
    return tuple(torch.from_numpy(out) for out in session.run(None, arrays))


class BoundCall:
    """One graph at one set of shapes, on any device: its inputs and outputs are bound once, and feeds copied in.

    Outputs are valid until its next run.
    """

    def __init__(self, session: Any, feeds: Mapping[str, Tensor]) -> None:
        self._session = session
        whole = torch.contiguous_format
        self._inputs = {name: feed.detach().clone(memory_format=whole) for name, feed in feeds.items()}
        self._device = next(iter(self._inputs.values())).device
        self._binding = session.io_binding()
        for name, held in self._inputs.items():
            kind = str(held.dtype).removeprefix("torch.")
            self._binding.bind_input(name, held.device.type, self._index, kind, tuple(held.shape), held.data_ptr())
        for output in session.get_outputs():  # the first run finds their shapes and memory, later ones write there
            self._binding.bind_output(output.name, self._device.type, self._index)
        self._run()
        self._values = self._binding.get_outputs()
        self._outputs = tuple(from_dlpack(value) for value in self._values)
        for output, value in zip(session.get_outputs(), self._values, strict=True):
            self._binding.bind_ortvalue_output(output.name, value)

    def run(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        for name, held in self._inputs.items():
            held.copy_(feeds[name])
        self._run()
        return self._outputs

    @property
    def _index(self) -> int:
        return self._device.index or 0

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # ONNX Runtime works on a stream of its own
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()


def provider_options(provider: str, bundle: Bundle) -> dict[str, str]:
    """Settings of a provider. TensorRT's engines and timings are kept beside the graphs, by the weights' digest.

    TensorRT itself tells engines of other graphs, versions and devices apart by their file names.
    """
    if provider != TENSORRT:
        return {}
    folder = engine_folder(bundle, "onnx-tensorrt") / f"cache-{bundle.weights_digest[:16]}"
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }


def _onnxruntime(providers: Sequence[str]) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineUnavailable("onnxruntime is not installed; pip install 'fewstep[export]'") from error
    known = onnxruntime.get_available_providers()
    if missing := [p for p in providers if p not in known]:
        raise EngineUnavailable(
            f"this onnxruntime has no {missing[0]}; it has {', '.join(known)}. "
            "For a GPU install 'fewstep[gpu]' in place of 'fewstep[export]'"
        )
    return onnxruntime
