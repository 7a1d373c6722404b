"""The definition of right: a bundle's own networks in eager float32."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle

from ..engine import DENOISER, ENCODER, TEXT, Capabilities
from ..errors import EngineFailed, EngineUnavailable

MAX_BATCH = 16
Prepare = Callable[[str, Any], Callable[..., Any]]
"""(role, its network on its device) -> what is called in the network's place, with the same arguments."""


class TorchEngine:
    """Runs `fewstep.models.networks` under inference mode.

    threads: CPU threads, a setting of the whole process in torch; None leaves it. device: "cpu", "cuda" or "cuda:N".
    name, prepare, batch_sizes: for other ways to run the same networks (`fewstep.runtime.engines.compiled_engine`).

    Errors: `BundleError` where a network cannot be loaded; `EngineUnavailable` where the device is not there.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        device: str = "cpu",
        name: str = "torch",
        prepare: Prepare | None = None,
        batch_sizes: tuple[int, ...] = (),
    ) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise EngineUnavailable(f"device is {device!r} and torch sees no CUDA device; use 'cpu'")
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = name
        self._bundle = bundle
        self._load = cache(bundle.load)  # the denoiser with and without residuals has one set of weights
        self._prepare: Prepare = prepare or (lambda role, network: network)
        self._modules: dict[str, Any] = {}
        self._calls: dict[str, Callable[..., Any]] = {}
        self._closed = False
        for role in bundle.roles:
            if role != ENCODER:  # opened when first asked for
                self._open(role, device)
        self.capabilities = Capabilities(
            roles=frozenset(bundle.roles),
            max_batch=max(batch_sizes, default=MAX_BATCH),
            batch_sizes=batch_sizes,
            device=device,
            takes_w="w" in self._modules[DENOISER].inputs,
            takes_s="s" in self._modules[DENOISER].inputs,
            text_outputs=self._modules[TEXT].outputs,
        )

    @torch.inference_mode()
    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        inputs = self._module(role).inputs
        try:
            out = self._calls[role](*(feeds.get(name) for name in inputs))
        except (RuntimeError, IndexError, TypeError) as error:
            raise EngineFailed(f"engine {self.name} broke in {role!r}: {error}") from error
        return out if isinstance(out, tuple) else (out,)

    def close(self) -> None:
        self._closed = True
        self._modules.clear()
        self._calls.clear()

    def _open(self, role: str, device: str) -> None:
        self._modules[role] = self._bundle.network(role, self._load).to(device)
        self._calls[role] = self._prepare(role, self._modules[role])

    def _module(self, role: str) -> Any:
        if self._closed or role not in (*self._bundle.roles, *self._bundle.extra_roles):
            able = "nothing: it is closed" if self._closed else ", ".join(sorted(self.capabilities.roles))
            raise EngineFailed(f"engine {self.name} cannot run {role!r}; it runs {able}")
        if role not in self._modules:
            self._open(role, self.capabilities.device)
        return self._modules[role]
