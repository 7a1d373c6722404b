"""The definition of right: a bundle's own networks in eager float32."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle

from .engine import CONTROLNET, DECODER, DENOISER, DENOISER_CONTROL, ENCODER, TEXT, Capabilities
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
        denoiser = bundle.denoiser_net()
        self._modules: dict[str, nn.Module] = {
            TEXT: bundle.text_encoder(),
            DENOISER: denoiser,
            DECODER: bundle.decoder(),
        }
        if bundle.has("controlnet"):
            self._modules |= {CONTROLNET: bundle.controlnet(), DENOISER_CONTROL: denoiser}
        for module in self._modules.values():
            module.to(device)
        self.capabilities = Capabilities(
            roles=frozenset({*self._modules, ENCODER}), max_batch=MAX_BATCH, device=device, takes_w=denoiser.takes_w
        )

    @torch.inference_mode()
    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        try:
            out = self._module(role)(*arguments(role, feeds))
        except (RuntimeError, IndexError, TypeError) as error:
            raise EngineFailed(f"engine torch broke in {role!r}: {error}") from error
        return out if isinstance(out, tuple) else (out,)

    def close(self) -> None:
        self._modules.clear()

    def _module(self, role: str) -> Any:
        if role == ENCODER and ENCODER not in self._modules and self._modules:
            self._modules[ENCODER] = self._bundle.encoder().to(self.capabilities.device)
        if role not in self._modules:
            raise EngineFailed(
                f"engine torch cannot run {role!r}; it runs {', '.join(sorted(self._modules)) or 'nothing'}"
            )
        return self._modules[role]


def arguments(role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    """Feeds in the order of the role's `forward` (`fewstep.models.networks`)."""
    if role in (DENOISER, DENOISER_CONTROL):
        residuals = [feeds[f"residual_{k}"] for k in range(sum(name.startswith("residual_") for name in feeds))]
        return (feeds["x"], feeds["t"], feeds["ctx"], feeds.get("w"), *residuals)
    if role == CONTROLNET:
        return tuple(feeds[name] for name in ("x", "t", "ctx", "edge", "scale"))
    return (next(iter(feeds.values())),)
