"""What a critic and a student minimise, and what keeps a critic smooth. Logits are positive for real.

A regulariser sees the critic as it is asked (`Judged`); its derivatives are of each sample's mean logit.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

from fewstep.models.denoiser import Condition

from ..errors import RecipeError
from .objective import Critic, Turn


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """`softplus(-l(real)) + softplus(l(fake))`, means over everything (DMD2, non-saturating GAN)."""
    return softplus(-real.float()).mean() + softplus(fake.float()).mean()


def deceiver_loss(fake: Tensor) -> Tensor:
    """`softplus(-l(fake))`: what the student minimises."""
    return softplus(-fake.float()).mean()


class GanLoss(Protocol):
    """is_ratio: whether the best logit is log(p / q). asks_real: whether the student's side reads logits of data."""

    is_ratio: bool
    asks_real: bool

    def critic(self, real: Tensor, fake: Tensor) -> Tensor: ...

    def student(self, fake: Tensor, real: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Softplus:
    """The non-saturating GAN (Goodfellow et al. 2014). Its best logit is log(p / q)."""

    is_ratio = True
    asks_real = False

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return critic_loss(real, fake)

    def student(self, fake: Tensor, real: Tensor | None) -> Tensor:
        return deceiver_loss(fake)


@dataclass(frozen=True)
class Hinge:
    """`relu(1 - l(real)) + relu(1 + l(fake))`, and `-l(fake)` (ADD, LADD). Its logits are no ratio of densities."""

    is_ratio = False
    asks_real = False

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return torch.relu(1.0 - real.float()).mean() + torch.relu(1.0 + fake.float()).mean()

    def student(self, fake: Tensor, real: Tensor | None) -> Tensor:
        return -fake.float().mean()


@dataclass(frozen=True)
class Relativistic:
    """`softplus(l(fake) - l(real))` pair by pair, and the pair swapped (Jolicoeur-Martineau 2018; Self-Forcing, ASD).

    Its best logit is log(p / q) up to a constant that nothing fixes.
    """

    is_ratio = False
    asks_real = True

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return softplus(fake.float() - real.float()).mean()

    def student(self, fake: Tensor, real: Tensor | None) -> Tensor:
        if real is None:
            raise TypeError("a relativistic loss compares the student's logits with those of data")
        return softplus(real.float() - fake.float()).mean()


@dataclass(frozen=True)
class Judged:
    """A critic, and one side of what it was shown: x [B, C, ...] at t [B], with its logits [B, ...]."""

    critic: Critic
    x: Tensor
    t: Tensor
    cond: Condition
    logits: Tensor


def by_sample(logits: Tensor) -> Tensor:
    """Each sample's mean logit, [B]."""
    return logits.float().reshape(len(logits), -1).mean(1)


class Regulariser(Protocol):
    def loss(self, real: Judged, fake: Judged, turn: Turn) -> Tensor: ...


@dataclass(frozen=True)
class R1:
    """`weight / 2 |grad l(real)|^2` (Mescheder et al. 2018), every so many steps with that much more weight (lazy).

    on: the derivative in the "input", or in the "features" that a frozen network gives of it (ADD), which costs no
    second derivative of that network.
    """

    weight: float
    every: int = 1
    on: str = "input"

    def __post_init__(self) -> None:
        if self.on not in ("input", "features"):
            raise RecipeError(f"R1 is on {self.on!r}; it must be 'input' or 'features'")

    def loss(self, real: Judged, fake: Judged, turn: Turn) -> Tensor:
        if (turn.step + 1) % self.every:
            return real.logits.new_zeros(())
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            if self.on == "features":
                judge: Any = getattr(real.critic, "__self__", real.critic)
                if not hasattr(judge, "features"):
                    raise RecipeError("R1 on features needs a critic of a frozen network's; use R1 on the input")
                seen = [f.detach().requires_grad_() for f in judge.features(real.x.detach(), real.t, real.cond)]
                logits = judge.answer(seen, real.cond)
            else:
                seen = [real.x.detach().requires_grad_()]
                logits = real.critic(seen[0], real.t, real.cond)
            slopes = torch.autograd.grad(by_sample(logits).sum(), seen, create_graph=True)
        size = torch.stack([slope.float().flatten(1).square().sum(1) for slope in slopes]).sum(0)
        return 0.5 * self.weight * self.every * size.mean()


@dataclass(frozen=True)
class FiniteDifference:
    """`weight ((l(x + width n) - l(x)) / width)^2` on real and fake: R1 and R2 in expectation over the direction n.

    Self-Forcing's GAN and ASD (weight 600 with width 0.05 on means over patches).
    """

    weight: float
    width: float = 0.05

    def loss(self, real: Judged, fake: Judged, turn: Turn) -> Tensor:
        return self.weight * (self.slope(real, turn) + self.slope(fake, turn))

    def slope(self, side: Judged, turn: Turn) -> Tensor:
        moved = side.critic(side.x + self.width * turn.noise(side.x), side.t, side.cond)
        return ((by_sample(moved) - by_sample(side.logits)) / self.width).square().mean()


@dataclass(frozen=True)
class ApproximateR1:
    """`weight (l(x) - l(x + width n))^2` on real alone (APT, Lin et al. 2025: weight 100, width 0.01 to 0.1)."""

    weight: float
    width: float = 0.1

    def loss(self, real: Judged, fake: Judged, turn: Turn) -> Tensor:
        moved = real.critic(real.x + self.width * turn.noise(real.x), real.t, real.cond)
        return self.weight * (moved.float() - real.logits.float()).square().mean()
