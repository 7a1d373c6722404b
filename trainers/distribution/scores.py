"""Parts of score distillation: the surrogate that carries a score difference, and the fake score's own training.

mu_real and mu_fake are clean estimates at x_t of the teacher (density p) and of the fake network (density q of student
samples). `mu_fake - mu_real` is a positive multiple of the gradient of KL(q || p) in x, so x moves along
`mu_real - mu_fake` (Yin et al. 2023).
"""

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand

from ..parts.distances import Squared, Weight
from ..parts.rollout import Made


def carry(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient in x is `gradient / x.numel()`: `mean((x - sg(x - g))^2) / 2` (DMD, equation 7)."""
    aim = (x - torch.nan_to_num(gradient)).detach()
    return 0.5 * (x.float() - aim.float()).square().mean()


def dmd_gradient(
    real: Denoiser, fake: Denoiser, made: Made, t: Tensor, noise: Tensor, cond: Condition, floor: float | None = 1e-6
) -> Tensor:
    """`(mu_fake - mu_real) / mean|x - mu_real|` at x_t, the normalised KL gradient of DMD, equation 8; no gradient.

    The normaliser is per sample, over all its elements, and at least `floor`; None leaves it out.
    """
    with torch.no_grad():
        x_t = made.at(real.path, t, noise)
        mu_real, mu_fake = real.x0(x_t, t, cond), fake.x0(x_t, t, cond)
        if floor is None:
            return mu_fake - mu_real
        scale = (made.x0 - mu_real).flatten(1).abs().mean(1).clamp(min=floor)
        return (mu_fake - mu_real) / expand(scale, mu_real)


def denoising_loss(fake: Denoiser, made: Made, t: Tensor, noise: Tensor, cond: Condition, weight: Weight) -> Tensor:
    """Denoising score matching of student samples: mean of `weight(t) |mu_fake(x_t) - x0|^2`; x0 is detached."""
    x0 = made.x0.detach()
    guess = fake.x0(made.at(fake.path, t, noise).detach(), t, cond)
    return (Squared()(guess, x0) * weight(fake.path, t).to(guess.device, torch.float32)).mean()
