"""Planted faults in rewards and preferences (`test_oracle_mutants` plants them)."""

from dataclasses import replace

from mutants import Mutant

from fewstep.models.denoiser import expand
from fewstep.trainers.distribution import faithful, preference, rewarding
from fewstep.trainers.distribution.faithful import Faithful
from fewstep.trainers.distribution.preference import DenoisePreferred, PairedLikelihood, PreferenceGap
from fewstep.trainers.distribution.rewarding import Favour
from fewstep.trainers.loop.player import Player
from fewstep.trainers.objectives import reward_guided
from fewstep.trainers.parts import chain
from fewstep.trainers.parts.chain import Chain
from fewstep.trainers.parts.rollout import Made


def without_gradient(original):
    """The reward is asked of samples that are cut off."""
    return lambda cast, name: lambda x, cond: original(cast, name)(x.detach() + 0.0 * x, cond)


def one_noise(original):
    """Every step is noised alike."""
    kept = {}
    return lambda path, x0, t, noise: original(path, x0, t, kept.setdefault(noise.shape, noise))


def of_gradient(kind):
    return lambda original: lambda self, *given: original(replace(self, gradient=kind), *given)


def unscaled_likelihood(original):
    """The signal is not weakened by alpha."""
    return lambda path, x0, x_s, s: original(path, x0 / expand(path.alpha(s), x0), x_s, s)


def summed_likelihood(original):
    return lambda path, x0, x_s, s: original(path, x0, x_s, s) * x0[0].numel()


def cancelled(original):
    """The released code: what was noised less what was not, in which the sample has no derivative."""
    return lambda x, gradient: ((x + 0.1 - x) * gradient).mean()


def winners_for_all(original):
    def loss(self, made, cast, batch, turn):
        winner, _ = preference.sides(made, preference.preferred(made, cast, batch))
        return original(self, Made(winner.repeat(2, 1, 1), made.x, made.t), cast, batch, turn)

    return loss


def last_step_free(original):
    def loss(self, made, cast, batch, turn):
        *before, last = made.before or (made,)
        return original(self, replace(last, before=tuple(before)), cast, batch, turn)

    return loss


def other_divergence(name, other):
    return lambda original: {**original, name: other}


RG, ROCM, PSO, DPO = ("rg-lcd",), ("rocm",), ("pso",), ("distillation-dpo",)
REWARD_MUTANTS: dict[str, Mutant] = {
    "reward: pushed down": Mutant(
        Favour, "loss", lambda g: lambda self, *rest: g(replace(self, scale=-self.scale), *rest), ROCM
    ),
    "reward: no gradient, in a term": Mutant(rewarding, "reward_of", without_gradient, ROCM),
    "reward: no gradient, beside consistency": Mutant(reward_guided, "reward_of", without_gradient, RG),
    "reward: asked in its proxy's place": Mutant(
        reward_guided, "reward_of", lambda g: lambda cast, name: g(cast, "reward"), RG
    ),
    "proxy: learns the opposite order": Mutant(rewarding, "softplus", lambda g: lambda x: g(-x), RG),
    "proxy: gradients reach everybody": Mutant(Player, "gradients", lambda g: lambda self, wanted: None, RG),
    "chain: one noise for all steps": Mutant(chain, "noised", one_noise, (*ROCM, *PSO)),
    "chain: gradient of the last step alone": Mutant(Chain, "make", of_gradient("last"), ROCM),
    "chain: gradient through held inputs": Mutant(Chain, "make", of_gradient("whole"), PSO),
    "likelihood: alpha left out": Mutant(preference, "log_likelihood", unscaled_likelihood, PSO),
    "likelihood: summed over elements": Mutant(preference, "log_likelihood", summed_likelihood, PSO),
    "preference: the worse walk is preferred": Mutant(
        preference, "preferred", lambda g: lambda *given: -g(*given), (*PSO, *DPO)
    ),
    "PSO: clip left out": Mutant(
        PairedLikelihood, "margin", lambda g: lambda self, *rest: g(replace(self, clip=0.99), *rest), PSO
    ),
    "DPO: x cancels": Mutant(preference, "carry", cancelled, DPO),
    "DPO: teacher and its opponent swapped": Mutant(
        preference, "preference_gradient", lambda g: lambda real, fake, *rest: g(fake, real, *rest), DPO
    ),
    "DPO: losers moved the other way": Mutant(
        PreferenceGap, "loss", lambda g: lambda self, *rest: g(replace(self, lose=-self.lose), *rest), DPO
    ),
    "DPO: down the odds of winning": Mutant(
        PreferenceGap, "loss", lambda g: lambda self, *rest: g(replace(self, prefer=-self.prefer), *rest), DPO
    ),
    "DPO: scores not told where the step began": Mutant(
        preference, "told_where", lambda g: lambda made, cond, count: dict(cond), DPO
    ),
    "DPO: both networks learn winners": Mutant(DenoisePreferred, "loss", winners_for_all, DPO),
    "divergence: KL twice as large": Mutant(
        faithful, "DIVERGENCES", other_divergence("kl", faithful.fisher), ROCM
    ),
    "divergence: Hellinger of another width": Mutant(
        faithful, "DIVERGENCES", other_divergence("hellinger", lambda d: faithful.hellinger(2.0 * d)), ROCM
    ),
    "divergence: one side of Jensen-Shannon": Mutant(
        faithful, "DIVERGENCES", other_divergence("js", faithful.kl), ROCM
    ),
    "divergence: the last step is free": Mutant(Faithful, "loss", last_step_free, ROCM),
}  # fmt: skip
