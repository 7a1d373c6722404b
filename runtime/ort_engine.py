"""ONNX Runtime behind the engine seam: one session per role over `<bundle>/engines/onnx/`.

Idle threads do not spin: several sessions share the cores here, and spinning ones slow each other by a quarter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fewstep.models.bundle import Bundle

from .engine import DECODER, DENOISER, TEXT, Capabilities
from .errors import EngineFailed, EngineUnavailable
from .manifest import checked_files, read_manifest

MAX_BATCH = 16


class OrtEngine:
    """Runs the exported graphs in float32.

    threads: CPU threads of a call; None takes torch's count. providers: ONNX Runtime's names, the wanted one first; it
    is an error if that one does not become active, since ONNX Runtime falls back to the CPU without a word. With
    `CUDAExecutionProvider` inputs and outputs stay on the device.

    Errors: `EngineUnavailable` where a package, a provider or a file is missing, or files and weights do not match.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        self._ort = _onnxruntime(providers)
        manifest = read_manifest(bundle, "onnx")
        self._files = checked_files(bundle, manifest)
        self._options = session_options(self._ort, threads)
        self._providers = list(providers)
        self._sessions: dict[str, Any] = {}
        self._closed = False
        self.name = "onnx"
        self.capabilities = Capabilities(
            roles=frozenset(manifest.roles),
            max_batch=MAX_BATCH,
            device="cpu" if providers[0] == "CPUExecutionProvider" else "cuda",
            takes_w=DENOISER in manifest.roles and any(p.name == "w" for p in manifest.roles[DENOISER].inputs),
        )
        for role in (TEXT, DENOISER, DECODER):  # the rest is opened when first asked for
            if role in self._files:
                self._session(role)

    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        session = self._session(role)
        try:
            return run_on_cpu(session, feeds) if self.capabilities.device == "cpu" else run_bound(session, feeds)
        except Exception as error:  # its own exceptions share no class of their own
            raise EngineFailed(f"engine onnx broke in {role!r}: {error}") from error

    def close(self) -> None:
        self._closed = True
        self._sessions.clear()

    def _session(self, role: str) -> Any:
        if self._closed or role not in self._files:
            able = "nothing: it is closed" if self._closed else ", ".join(sorted(self._files))
            raise EngineFailed(f"engine onnx cannot run {role!r}; it runs {able}")
        if role not in self._sessions:
            try:
                session = self._ort.InferenceSession(
                    str(self._files[role]), self._options, providers=self._providers, enable_fallback=False
                )
            except Exception as error:
                raise EngineUnavailable(f"{self._files[role]} cannot be opened by ONNX Runtime: {error}") from error
            active = session.get_providers()[0]
            if active != self._providers[0]:
                raise EngineUnavailable(
                    f"provider {self._providers[0]!r} was asked for and {active!r} became active; "
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


def run_bound(session: Any, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """As `run_on_cpu` for tensors on any device: ONNX Runtime reads their memory and leaves its outputs beside them."""
    binding = session.io_binding()
    kept = {name: tensor.detach().contiguous() for name, tensor in feeds.items()}
    device = next(iter(kept.values())).device
    index = device.index or 0
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # ONNX Runtime works on a stream of its own
    for name, tensor in kept.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        binding.bind_input(name, device.type, index, kind, tuple(tensor.shape), tensor.data_ptr())
    for output in session.get_outputs():
        binding.bind_output(output.name, device.type, index)
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return tuple(from_dlpack(value) for value in binding.get_outputs())


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
