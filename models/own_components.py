"""Components of a bundle whose classes are ours: the class that `config.json` names -> how its folder is opened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import net_image_prompt, net_lora, net_negative

OWN: dict[str, Callable[[Path], Any]] = {
    net_image_prompt.CLASS: net_image_prompt.load_image_prompt,
    net_lora.CLASS: net_lora.load_loras,
    net_negative.CLASS: net_negative.load_negative,
}
