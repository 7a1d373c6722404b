"""The seam between sampling and whatever runs the networks.

An engine runs *roles*. All tensors are torch tensors on the engine's device, every input and output with leading batch:

| role | feeds | gives |
| --- | --- | --- |
| text | ids [B, L] int64; ids_2, mask, ... where the model reads them | the `text_outputs`: ctx [B, L, D], ... |
| denoiser | x [B, C, h, w], t [B]; the text outputs; size_ids [B, K], w [B] if the model takes them | (F,) |
| denoiser+control | the same and residual_0 .. residual_K | (F,) |
| denoiser+adapter | the same and feature_0 .. feature_K, multiplied by their scale; zeros for none | (F,) |
| denoiser+image-prompt | the same and img_tok [B, T, D], img_scale [B, layers]; 0 for none | (F,) |
| denoiser+lora | the same and lora_scale [B, K], one per registered LoRA; 0 for none | (F,) |
| denoiser+negative | the same and neg_ctx [B, L, D], neg_scale [B]; 0 for none | (F,) |
| controlnet | x, t, ctx, edge [B, 3, H, W] in [0, 1], scale [B]; kind [B] int64 of a union | residuals, K+1 of them |
| adapter | edge | features, K+1 of them |
| image-prompt | pixels [B, 3, S, S] as CLIP's processor makes them | (img_tok,) |
| picture | the feeds of text and denoiser, a [B], b [B] | (picture of the latent a x + b F,) |
| decoder, decoder+tiny | latent [B, C, h, w] | (picture [B, 3, H, W] in [-1, 1],) |
| encoder | picture | (latent,) |

Text outputs are the conditions of the model's family (`fewstep.models.families`): ctx always, and ctx_mask [B, L],
pooled [B, P] where it has them. The networks themselves name their inputs and outputs.

An engine is called from one thread at a time. It may return outputs that it reuses at the next call of the same role.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fewstep.models.roles import (
    ADAPTER,
    CONTROLNET,
    DECODER,
    DECODER_TINY,
    DENOISER,
    DENOISER_ADAPTER,
    DENOISER_CONTROL,
    DENOISER_IMAGE_PROMPT,
    ENCODER,
    IMAGE_PROMPT,
    PICTURE,
    ROLES,
    TEXT,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ADAPTER", "CONTROLNET", "DECODER", "DECODER_TINY", "DENOISER", "DENOISER_ADAPTER", "DENOISER_CONTROL",
    "DENOISER_IMAGE_PROMPT", "ENCODER", "IMAGE_PROMPT", "PICTURE", "ROLES", "TEXT", "Capabilities", "Engine",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an engine runs here. Empty `batch_sizes` means any size up to `max_batch`; else calls are padded to one.

    takes_w, takes_s: whether the denoiser takes the guidance scale, and the time where a step lands.
    """

    roles: frozenset[str]
    max_batch: int
    batch_sizes: tuple[int, ...] = ()
    device: str = "cpu"
    takes_w: bool = False
    takes_s: bool = False
    text_outputs: tuple[str, ...] = ("ctx",)


class Engine(Protocol):
    """Run networks; nothing about requests, schedules or pictures."""

    @property
    def name(self) -> str: ...
    @property
    def capabilities(self) -> Capabilities: ...
    def run(self, role: str, feeds: "Mapping[str, Tensor]") -> "tuple[Tensor, ...]":
        """Run one role for one batch.

        Errors: `EngineFailed` where the call breaks; the engine stays usable for later calls.
        """
        ...

    def close(self) -> None: ...
