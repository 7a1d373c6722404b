"""The definition of right: a bundle's own networks in eager float32."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle

from .engine import DENOISER, ENCODER, TEXT, Capabilities
from .errors import EngineFailed, EngineUnavailable

MAX_BATCH = 16


class TorchEngine:
    """Runs `fewstep.models.networks` under inference mode.

    threads: CPU threads, a setting of the whole process in torch; None leaves it. device: "cpu", "cuda" or "cuda:N".

    Errors: `BundleError` where a network cannot be loaded; `EngineUnavailable` where the device is not there.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str = "cpu") -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise EngineUnavailable(f"device is {device!r} and torch sees no CUDA device; use 'cpu'")
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = "torch"
        self._bundle = bundle
        self._load = cache(bundle.load)  # the denoiser with and without residuals has one set of weights
        self._modules: dict[str, Any] = {}
        self._closed = False
        for role in bundle.roles:
            if role != ENCODER:  # opened when first asked for
                self._modules[role] = bundle.network(role, self._load).to(device)
        self.capabilities = Capabilities(
            roles=frozenset(bundle.roles),
            max_batch=MAX_BATCH,
            device=device,
            takes_w="w" in self._modules[DENOISER].inputs,
            text_outputs=self._modules[TEXT].outputs,
        )

    @torch.inference_mode()
    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        module = self._module(role)
        try:
            out = module(*(feeds.get(name) for name in module.inputs))
        except (RuntimeError, IndexError, TypeError) as error:
            raise EngineFailed(f"engine torch broke in {role!r}: {error}") from error
        return out if isinstance(out, tuple) else (out,)

    def close(self) -> None:
        self._closed = True
        self._modules.clear()

    def _module(self, role: str) -> Any:
        if self._closed or role not in self.capabilities.roles:
            able = "nothing: it is closed" if self._closed else ", ".join(sorted(self.capabilities.roles))
            raise EngineFailed(f"engine torch cannot run {role!r}; it runs {able}")
        if role not in self._modules:
            self._modules[role] = self._bundle.network(role, self._load).to(self.capabilities.device)
        return self._modules[role]
