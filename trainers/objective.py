"""What a method is to the loop: a frozen dataclass of parts whose `loss` is a pure function of what it is given.

Shapes: x0 [B, C, ...] with any trailing axes; every condition tensor leads with B; times are [B] float64 in the path's
native unit. Nothing here or in the parts assumes a picture, a text or a U-Net, so the same objective runs on the
analytic teachers of the oracle suite and on the networks that train.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser

Metrics = dict[str, float]
Critic = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t [B, C, ...], t [B], condition) -> real-or-fake logits [B, ...]; positive means real."""


@dataclass(frozen=True)
class Batch:
    """Clean samples as the denoiser sees them, their condition, and the condition that says nothing (for guidance).

    noise: shaped as x0, the noise that each sample was made from, where a network made them (`trainers.pairs`).
    """

    x0: Tensor
    cond: Condition
    uncond: Condition
    noise: Tensor | None = None


@dataclass
class Switch:
    """Whether the student's stages are fed the teacher's inputs at present."""

    on: bool = True


@dataclass(frozen=True)
class Cast:
    """Who plays which role: `student`, `teacher`, and as a method needs them `target`, `fake` and a critic.

    seen: role -> stage -> that stage's output in the role's last evaluation, for the roles that are watched. led: turns
    the feeding of the student's stages with the teacher's inputs on and off, where they can be.
    """

    roles: Mapping[str, Denoiser]
    critic: Critic | None = None
    seen: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    led: Switch | None = None

    def __getitem__(self, role: str) -> Denoiser:
        return self.roles[role]


@dataclass(frozen=True)
class Turn:
    """One player's turn in one step: where the run is, and every random draw of it.

    Draws are a function of (seed, step, player) alone, so a resumed run repeats them with no saved state.
    """

    step: int
    total: int
    rng: torch.Generator = field(repr=False)
    dropout_seed: int = 0
    done: float | None = None

    @staticmethod
    def of(
        seed: int, step: int, total: int, player: str, device: torch.device | str = "cpu", done: float | None = None
    ) -> "Turn":
        rng = torch.Generator(device).manual_seed(derive(seed, step, player))
        return Turn(step, total, rng, derive(seed, step, player, "dropout"), done)

    @property
    def progress(self) -> float:
        """Share of the run that is done: what the loop says, who also counts time, else by steps."""
        return self.step / max(1, self.total) if self.done is None else self.done

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal, shaped as `like`."""
        return torch.randn(like.shape, generator=self.rng, device=self.rng.device, dtype=like.dtype).to(like.device)

    def uniform(self, low: float, high: float, count: int) -> Tensor:
        """[count] float64 in [low, high)."""
        draw = torch.rand(count, generator=self.rng, device=self.rng.device, dtype=torch.float64)
        return low + (high - low) * draw

    def integers(self, high: int, count: int) -> Tensor:
        """[count] int64 in 0 .. high-1."""
        return torch.randint(high, (count,), generator=self.rng, device=self.rng.device)

    def choose(self, weights: Tensor, count: int) -> Tensor:
        """[count] indices drawn with probability proportional to `weights`."""
        return torch.multinomial(weights.to(self.rng.device), count, replacement=True, generator=self.rng)

    def pick(self, weights: Tensor) -> int:
        """One index for the whole batch, drawn with probability proportional to `weights`."""
        return int(torch.multinomial(weights.double().to(self.rng.device), 1, generator=self.rng))

    def share_dropout(self) -> None:
        """Begin the turn's dropout stream anew: two forwards that both call this first get the same masks.

        Only the generators that masks are drawn from: `torch.manual_seed` also leaves word, with a formatted stack, for
        every kind of device that is not there, which is a millisecond.
        """
        torch.default_generator.manual_seed(self.dropout_seed)
        if self.rng.device.type == "cuda":
            torch.cuda.manual_seed(self.dropout_seed)


class Objective(Protocol):
    """A method. Frozen dataclasses of parts satisfy this; `players` names who trains, in the order of their turns."""

    @property
    def players(self) -> tuple[str, ...]: ...

    @property
    def roles(self) -> tuple[str, ...]:
        """The denoisers it asks its cast for."""
        ...

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]: ...


def derive(*parts: object) -> int:
    """A 63-bit seed that depends on every part."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
