"""A U-Net with adapters that read a prompt to avoid, and the empty prompt that they avoid where none is given."""

from typing import Any

import torch

from fewstep.models.bundle import Bundle
from fewstep.models.negative_adapter import add_negative
from fewstep.runtime.sampling.loop import negative_text
from fewstep.runtime.sampling.request import GenerateRequest

from ..pictures.data import read_texts


@torch.no_grad()
def with_negative(start: Bundle, unet: Any) -> Any:
    """The bundle's U-Net with fresh adapters, which know what its text network makes of the empty prompt."""
    encoder: Any = start.text_encoder()
    feeds = read_texts(start.tokenizers(), start.spec, [negative_text(GenerateRequest(prompt="-"), start.spec)])
    out = encoder(*(feeds[name].long() for name in encoder.inputs))
    found = dict(zip(encoder.outputs, out if isinstance(out, tuple) else (out,), strict=True))
    ctx = torch.zeros_like(found["ctx"]) if start.spec.guidance.zero_empty else found["ctx"]
    unet = add_negative(unet, ctx.shape[1])
    unet.avoided.copy_(ctx[0])
    return unet
