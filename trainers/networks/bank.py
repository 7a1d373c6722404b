"""Teacher, student and fake score as one frozen network with a LoRA set each, switched per evaluation.

Memory then holds the base's weights once. A `Voice` is one set of the shared network, and stands wherever a network
does: its parameters are its own set's, its answers are the network's with that set switched on.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .student import add_lora

TEACHER = "teacher"
"""The voice without a set."""


class Shared:
    """The network, who speaks at present, and how many sets were ever added."""

    def __init__(self, network: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.network = network
        self.speaks: str | None = None
        self.sets = 0
        self._layer = BaseTunerLayer

    def add(self, config: Any, weights: Mapping[str, Tensor]) -> str:
        """A further set with these weights, by their names without a set's; returns the set's name."""
        name, self.sets, self.speaks = f"set{self.sets}", self.sets + 1, None
        # peft draws weights that are overwritten: whoever draws next must not notice
        with self._asking_as_before(), torch.random.fork_rng([]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several sets are meant
            self.network.add_adapter(deepcopy(config), adapter_name=name)
        with torch.no_grad():
            for key, weight in self.weights(name).items():
                weight.copy_(weights[key])
        return name

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        return {
            key.replace(f".{name}.", "."): weight
            for key, weight in self.network.named_parameters()
            if "lora_" in key and f".{name}." in key
        }

    def switch(self, name: str, training: bool) -> None:
        """Let a set answer."""
        if self.network.training != training:
            self.network.train(training)
        if self.speaks == name:
            return
        with self._asking_as_before():
            for layer in self.network.modules():
                if isinstance(layer, self._layer):
                    layer.enable_adapters(name != TEACHER)
                    if name != TEACHER:
                        layer.set_adapter(name)
        self.speaks = name

    @contextmanager
    def _asking_as_before(self) -> Iterator[None]:
        """Which weights ask for gradients is the players' business, and peft changes it: put back."""
        asks = [(w, w.requires_grad) for key, w in self.network.named_parameters() if "lora_" in key]
        yield
        for weight, asked in asks:
            weight.requires_grad_(asked)


class Voice(nn.Module):
    """One set of a shared network, or none of them (`TEACHER`). A deep copy is a further set of the same network."""

    def __init__(self, shared: Shared, name: str) -> None:
        super().__init__()
        self._outside = (shared, name)
        found = {} if name == TEACHER else shared.weights(name)
        self.own = nn.ParameterDict({key.replace(".", "/"): weight for key, weight in found.items()})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._speaking()(*args, **kwargs)

    def _speaking(self) -> Any:
        shared, name = self._outside
        shared.switch(name, self.training)
        return shared.network

    def __getattr__(self, name: str) -> Any:
        """What a voice has not itself is the network's: its configuration, its device, its blocks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_outside":
                raise
            return getattr(self._speaking(), name)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        found: Iterator[tuple[str, nn.Module]] = self._outside[0].network.named_children()
        return found

    def get_submodule(self, target: str) -> nn.Module:
        found: nn.Module = self._outside[0].network.get_submodule(target)
        return found

    def train(self, mode: bool = True) -> "Voice":
        """The network follows when the voice is asked."""
        self.training = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Voice":
        shared, name = self._outside
        if name == TEACHER:
            return Voice(shared, name)
        config = shared.network.peft_config[name]
        return Voice(shared, shared.add(config, shared.weights(name)))

    def alone(self) -> Any:
        """A network of its own with this set, as `add_lora` makes it."""
        shared, name = self._outside
        plain = deepcopy(shared.network)
        plain.unload_lora()
        add_lora(plain, shared.network.peft_config[name].r)
        own = shared.weights(name)
        with torch.no_grad():
            for key, weight in plain.named_parameters():
                if "lora_" in key:
                    weight.copy_(own[key.replace(".default.", ".")])
        return plain


def can_share(frozen: Any, *learners: Any) -> bool:
    """Whether each is the frozen network with LoRA of its own."""
    if not all(getattr(learner, "peft_config", None) for learner in learners):
        return False
    base = dict(frozen.named_parameters())
    for learner in learners:
        found = {key.replace(".base_layer.", "."): w for key, w in learner.named_parameters() if "lora_" not in key}
        if found.keys() != base.keys() or not all(torch.equal(w, base[key].to(w.device)) for key, w in found.items()):
            return False
    return True


def share(frozen: Any, *learners: Any) -> tuple[Voice, ...]:
    """The frozen network's voice, and each learner's as a set of its own. The network is changed in place; the
    learners are not needed any more."""
    shared = Shared(frozen.requires_grad_(False))
    names = []
    for learner in learners:
        own = {k.replace(".default.", "."): w.to(frozen.device) for k, w in learner.named_parameters() if "lora_" in k}
        names.append(shared.add(learner.peft_config["default"], own))
    voices = [Voice(shared, name) for name in names]
    for voice in voices:
        voice.requires_grad_(True)
    return Voice(shared, TEACHER), *voices


def plain(network: Any) -> Any:
    """A voice as a network of its own; any other network as it is."""
    return network.alone() if isinstance(network, Voice) else network
