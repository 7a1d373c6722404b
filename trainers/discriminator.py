"""Adversarial parts: a critic on the fake network's own features, and the losses of both sides.

Logits are [B, ...], positive for real. With `softplus` losses the best logit is log(p / q), so it is a density ratio.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fewstep.models.denoiser import Condition

from .objective import Batch, Cast, Critic, Metrics, Turn
from .rollout import Made
from .times import UniformTimes
from .transitions import noised


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """Weights of the GAN terms of both sides, and the times at which samples are noised before they are judged.

    `share` is the part of a batch that is judged; judging data and samples costs the critic a second pass.
    """

    student_weight: float
    critic_weight: float
    times: UniformTimes
    share: float = 1.0

    def rows(self, count: int) -> slice:
        return slice(0, max(1, round(self.share * count)))


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """`softplus(-l(real)) + softplus(l(fake))`, means over everything (DMD2, non-saturating GAN)."""
    return softplus(-real.float()).mean() + softplus(fake.float()).mean()


def deceiver_loss(fake: Tensor) -> Tensor:
    """`softplus(-l(fake))`: what the student minimises."""
    return softplus(-fake.float()).mean()


@dataclass(frozen=True)
class Deceive:
    """The student's GAN term: `student_weight softplus(-l(x_t))` on samples noised to the adversary's times."""

    adversary: Adversary

    roles = ()

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        path, rows = cast["student"].path, self.adversary.rows(len(made.x0))
        seen, cond = made.x0[rows], {name: value[rows] for name, value in batch.cond.items()}
        t = self.adversary.times.draw(path, len(seen), turn)
        gan = deceiver_loss(critic_of(cast)(noised(path, seen, t, turn.noise(seen)), t, cond))
        return self.adversary.student_weight * gan, {"gan_student": float(gan.detach())}


@dataclass(frozen=True)
class Judge:
    """The critic's own loss on data against the student's samples, each noised by times and noise of its own."""

    adversary: Adversary

    roles = ()

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        path, rows = cast["student"].path, self.adversary.rows(len(made.x0))
        cond = {name: torch.cat([value[rows], value[rows]]) for name, value in batch.cond.items()}
        sides = []
        for x in (batch.x0[rows], made.x0[rows].detach()):
            t = self.adversary.times.draw(path, len(x), turn)
            sides.append((noised(path, x, t, turn.noise(x)), t))
        (real, t_real), (fake, t_fake) = sides
        seen, t = torch.cat([real, fake]), torch.cat([t_real, t_fake])
        real, fake = critic_of(cast)(seen, t, cond).chunk(2)
        gan = critic_loss(real, fake)
        right = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        return self.adversary.critic_weight * gan, {"gan_critic": float(gan.detach()), "critic_right": float(right)}


def critic_of(cast: Cast) -> Critic:
    """Errors: `TypeError` where nobody judges."""
    if cast.critic is None:
        raise TypeError("an adversarial term was given a cast with no critic")
    return cast.critic


class CriticHead(nn.Module):
    """Middle features [B, C, h, w] of a U-Net -> patch logits [B, 1, h, w]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.layers(features)
        return out


class FakeWithCritic(nn.Module):
    """The fake U-Net and the head on its features: one player, since the critic's loss trains both (DMD2)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.head = CriticHead(unet.config.block_out_channels[-1], unet.config.norm_num_groups)

    def judge(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Logits of x_t; only the encoder half of the U-Net runs."""
        logits: Tensor = self.head(middle_features(self.unet, x, t, cond["ctx"]))
        return logits


def middle_features(unet: Any, x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
    """Output of `UNet2DConditionModel`'s middle block, by its own parts in its own order."""
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t.float().to(x.device)))
    ctx = unet.process_encoder_hidden_states(encoder_hidden_states=ctx, added_cond_kwargs=None)
    h = unet.conv_in(x)
    for block in unet.down_blocks:
        crosses = getattr(block, "has_cross_attention", False)
        h = block(h, emb, encoder_hidden_states=ctx)[0] if crosses else block(h, emb)[0]
    crosses = getattr(unet.mid_block, "has_cross_attention", False)
    out: Tensor = unet.mid_block(h, emb, encoder_hidden_states=ctx) if crosses else unet.mid_block(h, emb)
    return out
