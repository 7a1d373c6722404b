"""Planted faults in distribution matching (`test_oracle_mutants` plants them)."""

from mutants import Mutant

from fewstep.trainers.distribution import score_gap
from fewstep.trainers.loop import loop
from fewstep.trainers.loop.player import Player
from fewstep.trainers.parts import gan_losses, rollout


def noise_target(original):
    """eps taken for x0 in the fake's own loss."""

    def loss(fake, made, t, noise, cond, weight):
        x_t = made.at(fake.path, t, noise)
        return ((fake.x0(x_t, t, cond) - noise).square().flatten(1).mean(1) * weight(fake.path, t)).mean()

    return loss


def old_noise(original):
    """A rollout that keeps its first noise: the deterministic chain, where the student is sampled with fresh noise."""
    kept = {}

    def mixed(path, x0, t, noise):
        return original(path, x0, t, kept.setdefault(x0.shape, noise))

    return mixed


def averaging_every_step(original):
    """Averages follow the loop's steps, not the player's own."""

    def play(method, player, *args):
        out = original(method, player, *args)
        for other in method.players:
            if other is not player:
                other._average(0.5)
        return out

    return play


DMD = ("dmd2",)
DISTRIBUTION_MUTANTS: dict[str, Mutant] = {
    "surrogate: sign flipped": Mutant(score_gap, "carry", lambda g: lambda x, grad: g(x, -grad), DMD),
    "scores: real and fake swapped": Mutant(
        score_gap, "dmd_gradient", lambda g: lambda real, fake, *rest: g(fake, real, *rest), DMD
    ),
    "fake: trained on the noise": Mutant(score_gap, "denoising_loss", noise_target, DMD),
    "critic: data called fake": Mutant(gan_losses, "critic_loss", lambda g: lambda real, fake: g(fake, real), DMD),
    "critic: student pushed down": Mutant(gan_losses, "deceiver_loss", lambda g: lambda fake: g(-fake), DMD),
    "rollout: noise kept where it should be fresh": Mutant(rollout, "noised", old_noise, DMD),
    "players: the student acts every step": Mutant(Player, "acts", lambda g: lambda self, step: True, DMD),
    "players: averages step with the loop": Mutant(loop, "_play", averaging_every_step, DMD),
    "players: gradients reach everybody": Mutant(Player, "gradients", lambda g: lambda self, wanted: None, DMD),
}
