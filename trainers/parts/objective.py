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

from ..errors import RecipeError

Metrics = dict[str, float]
Critic = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t [B, C, ...], t [B], condition) -> real-or-fake logits [B, ...]; positive means real."""
Reward = Callable[[Tensor, Condition], Tensor]
"""(samples [B, C, ...], condition) -> [B]; more is better."""


@dataclass(frozen=True)
class Batch:
    """Clean samples as the denoiser sees them, their condition, and the condition that says nothing (for guidance).

    noise: shaped as x0, the noise that each sample was made from, where a network made them (`trainers.parts.pairs`).
    taught: what the teacher is asked for in place of cond, where a concept is to be forgotten
    (`trainers.distribution.forgetting`).
    """

    x0: Tensor
    cond: Condition
    uncond: Condition
    noise: Tensor | None = None
    taught: Condition | None = None


@dataclass(frozen=True)
class Part:
    """Which rows of the joint batch one process sees in one pass: every `count`th from row `index`.

    Interleaved and not cut in pieces, so that the first so many rows of the joint batch are the first of each part.
    """

    index: int = 0
    count: int = 1

    def rows(self, joint: Tensor) -> Tensor:
        return joint if self.count == 1 else joint[self.index :: self.count]

    def within(self, index: int, count: int) -> "Part":
        """A part of this part, as a part of the joint batch."""
        return Part(self.index + self.count * index, self.count * count)

    def of(self, batch: Batch) -> Batch:
        """Errors: `RecipeError` for rows that do not divide."""
        if self.count == 1:
            return batch
        if rows := len(batch.x0) % self.count:
            raise RecipeError(
                f"{len(batch.x0)} samples cannot be shared evenly by {self.count}, {rows} are left over; set batch to "
                "a multiple of processes x accumulate"
            )
        sides = (batch.cond, batch.uncond, batch.taught or {})
        cond, uncond, taught = ({name: self.rows(value) for name, value in side.items()} for side in sides)
        noise = None if batch.noise is None else self.rows(batch.noise)
        return Batch(self.rows(batch.x0), cond, uncond, noise, None if batch.taught is None else taught)


WHOLE = Part()


@dataclass
class Switch:
    """Whether the student's stages are fed the teacher's inputs at present."""

    on: bool = True


@dataclass(frozen=True)
class Cast:
    """Who plays which role: `student`, `teacher`, and as a method needs them `target`, `fake` and a critic.

    seen: role -> stage -> that stage's output in the role's last evaluation, for the roles that are watched. led: turns
    the feeding of the student's stages with the teacher's inputs on and off, where they can be. rewards: who judges
    samples, by name: "reward" as the recipe says, "proxy" a player that learns to agree with it.
    """

    roles: Mapping[str, Denoiser]
    critic: Critic | None = None
    seen: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    led: Switch | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)

    def __getitem__(self, role: str) -> Denoiser:
        return self.roles[role]


@dataclass(frozen=True)
class Turn:
    """One player's turn in one step: where the run is, and every random draw of it.

    Draws are a function of (seed, step, player) alone, so a resumed run repeats them with no saved state. Each is drawn
    for the joint batch, and a part of it takes its rows: the parts together see what one process would, and noise
    differs between them, but what the batch shares (`pick`) is the same for all.
    """

    step: int
    total: int
    rng: torch.Generator = field(repr=False)
    dropout_seed: int = 0
    done: float | None = None
    part: Part = WHOLE

    @staticmethod
    def of(
        seed: int, step: int, total: int, player: str, device: torch.device | str = "cpu", done: float | None = None,
        part: Part = WHOLE,
    ) -> "Turn":  # fmt: skip
        """Dropout's masks are the one draw that parts do not share out: each has a stream of its own."""
        rng = torch.Generator(device).manual_seed(derive(seed, step, player))
        own = (part.index,) if part.index else ()
        return Turn(step, total, rng, derive(seed, step, player, "dropout", *own), done, part)

    @property
    def progress(self) -> float:
        """Share of the run that is done: what the loop says, who also counts time, else by steps."""
        return self.step / max(1, self.total) if self.done is None else self.done

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal, shaped as `like`."""
        shape = (self.part.count * like.shape[0], *like.shape[1:])
        draw = torch.randn(shape, generator=self.rng, device=self.rng.device, dtype=like.dtype)
        return self.part.rows(draw).to(like.device)

    def normal(self, count: int) -> Tensor:
        """[count] float64, standard normal."""
        shape = (self.part.count * count,)
        return self.part.rows(torch.randn(shape, generator=self.rng, device=self.rng.device, dtype=torch.float64))

    def places(self, count: int) -> Tensor:
        """[count] float64 in [0, 1): where each row stands in the joint batch, evenly spread; no draw."""
        joint = self.part.count * count
        return self.part.rows(torch.arange(joint, device=self.rng.device, dtype=torch.float64)) / max(1, joint)

    def uniform(self, low: float, high: float, count: int) -> Tensor:
        """[count] float64 in [low, high)."""
        joint = self.part.count * count
        draw = torch.rand(joint, generator=self.rng, device=self.rng.device, dtype=torch.float64)
        return low + (high - low) * self.part.rows(draw)

    def common(self, low: float, high: float, count: int) -> Tensor:
        """[count] float64 in [low, high), the same in every part: what the whole batch shares."""
        draw = torch.rand(count, generator=self.rng, device=self.rng.device, dtype=torch.float64)
        return low + (high - low) * draw

    def integers(self, high: int, count: int) -> Tensor:
        """[count] int64 in 0 .. high-1."""
        joint = (self.part.count * count,)
        return self.part.rows(torch.randint(high, joint, generator=self.rng, device=self.rng.device))

    def choose(self, weights: Tensor, count: int) -> Tensor:
        """[count] indices drawn with probability proportional to `weights`."""
        joint = self.part.count * count
        draw = torch.multinomial(weights.to(self.rng.device), joint, replacement=True, generator=self.rng)
        return self.part.rows(draw)

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
