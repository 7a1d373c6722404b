"""A preference model of a user's own: a CLIP taught which picture of a prompt people choose (PickScore, HPSv2).

The folder is as transformers saves a `CLIPModel` with its tokenizer and image processor. Its logit of a picture against
its prompt is the reward. Prompts reach it as `prompt` of the condition: token ids of its own tokenizer, [B, L].
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.models.bundle import Bundle, load_component
from fewstep.models.denoiser import Condition
from fewstep.models.errors import BundleError

from ..errors import RecipeError
from ..pictures.data import PROMPT, Latents, tokenize

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's CLIP; a folder's `preprocessor_config.json` may say others."""


@dataclass(frozen=True)
class Preference:
    """`exp(logit_scale) cos(picture, prompt)`, [B]; PickScore's lie near 20, and differ by about 1 where people agree.

    mean, std: [1, 3, 1, 1], of pictures in 0 .. 1.
    """

    model: Any
    decoder: Any
    mean: Tensor
    std: Tensor

    def __call__(self, x: Tensor, cond: Condition) -> Tensor:
        if PROMPT not in cond:
            raise RecipeError("this reward reads prompts, and the data was prepared without; use `with_prompts`")
        said = self.model(
            input_ids=cond[PROMPT].long(), pixel_values=self.see(self.decoder(x).float()), return_dict=True
        )
        agreement = (said.image_embeds.float() * said.text_embeds.float()).sum(1)
        return self.model.logit_scale.exp().float() * agreement  # type: ignore[no-any-return]

    def see(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] as the model's input: shortest side to its size, cut from the middle."""
        size = int(self.model.config.vision_config.image_size)
        height, width = pictures.shape[-2:]
        scale = size / min(height, width)
        shape = (max(size, round(height * scale)), max(size, round(width * scale)))
        x = interpolate(pictures, shape, mode="bicubic", antialias=True, align_corners=False)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        x = x[..., top : top + size, left : left + size]
        return ((0.5 * (x + 1.0)).clamp(0.0, 1.0) - self.mean) / self.std


def load_preference(folder: Path, decoder: Any, device: torch.device | str = "cpu") -> Preference:
    """The frozen model of a folder.

    Errors: `RecipeError` for another class than CLIPModel, missing weights, or an unreadable processor file.
    """
    try:
        model = load_component(folder.parent, folder.name)
    except BundleError as error:
        raise RecipeError(f"reward: {error}") from error
    if type(model).__name__ != "CLIPModel":
        raise RecipeError(
            f"{folder} holds a {type(model).__name__}; a reward is a CLIPModel, the class that PickScore is saved as"
        )
    mean, std = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in _statistics(folder))
    return Preference(model.to(device), decoder, mean, std)


def _statistics(folder: Path) -> tuple[Any, Any]:
    """(mean, deviation) by which the processor of a folder scales colours."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return _MEAN, _STD
    try:
        said = json.loads(file.read_text())
        return said["image_mean"], said["image_std"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{file} does not say image_mean and image_std ({error}); save the processor anew") from error


def with_prompts(data: Latents, teacher: Bundle, folder: Path) -> Latents:
    """The data with each caption as the model's own tokens too, read back from the teacher's.

    Errors: `RecipeError` for a folder without a tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="right")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder} has no tokenizer for prompts ({error}); save it beside the model") from error
    rows = data.ids.flatten(0, -2)
    texts = teacher.tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)
    found = tokenize(tokenizer, texts).reshape(*data.ids.shape[:-1], -1)
    feeds: Mapping[str, Tensor] = {**data.feeds, PROMPT: found}
    return replace(data, feeds=feeds, empty={**data.empty, PROMPT: tokenize(tokenizer, [""])[0]})
