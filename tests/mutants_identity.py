"""Planted faults in score identities, Langevin steps, mixtures of scores, ratios, embeddings and forgetting."""

from dataclasses import replace

import torch
from mutants import Mutant

from fewstep.trainers.distribution import (
    density_ratio,
    embedding,
    expectation,
    forgetting,
    mixture_scores,
    score_identity,
)
from fewstep.trainers.distribution.expectation import Expectation, Student
from fewstep.trainers.distribution.mixture_scores import Shares


def still(which):
    """No gradient through one of the networks."""

    def faulty(original):
        def estimates(nets, x_t, t, cond):
            found = list(original(nets, x_t, t, cond))
            found[which] = found[which].detach()
            return tuple(found)

        return estimates

    return faulty


def still_state(original):
    """The noised sample is cut off: only the explicit x learns, as in DMD."""
    return lambda nets, x_t, t, cond: original(nets, x_t.detach(), t, cond)


def other_alpha(original):
    """(mu_real - x) taken for (mu_fake - x), which is alpha - 1."""
    return lambda x, real, fake, alpha, force, weights: original(x, real, fake, alpha - 1.0, force, weights)


def still_weight(original):
    """The weight's own part of the gradient is forgotten: h in place of h - dh/dl."""

    def weigh(self, logit):
        h, _ = original(self, logit)
        return h, h

    return weigh


def inverted(original):
    """q / p for p / q."""
    return lambda self, logit: original(self, -logit)


def by_batch(original):
    return lambda x, real: original(x, real).mean().expand(len(x))


def all_noise(original):
    """No noise cancellation: the aim keeps what was drawn."""

    def correct(self, *args):
        z, e, _ = original(self, *args)
        return z, e, e

    return correct


def still_start(original):
    """z has no drift by the scores."""

    def pulled(self, z):
        return original(self, z)[0], lambda v: torch.zeros_like(v)

    return pulled


def unscaled_share(original):
    """lam without the share: sigmoid(l)."""
    return lambda real, fake, ratio, a: original(real, fake, ratio, torch.full_like(a, 0.5))


def raw_length(original):
    """The gap as it is, which is small for a small a."""
    return lambda x, none, some, whole: (none - some) / (x - whole).abs().mean(1, keepdim=True)


def with_pairs(original):
    """The biased statistic: each row is compared with itself too, where a kernel is 1."""
    return lambda x, y, told, kernel: original(x, y, told, kernel) + 2.0 / len(x)


def kept_everywhere(original):
    """Nothing counts as forgotten."""
    return lambda batch: torch.zeros(len(batch.x0), dtype=torch.bool)


def unasked(original):
    """Student and fake score are asked for the other concept too."""
    return lambda net, cond, share: net


IDENTITY = ("sid", "sid-few-step", "sim", "uni-instruct", "sfd")
IDENTITY_MUTANTS: dict[str, Mutant] = {
    "identity: no gradient through the teacher": Mutant(score_identity, "estimates", still(0), IDENTITY),
    "identity: no gradient through the fake": Mutant(score_identity, "estimates", still(1), ("sid", "sim")),
    "identity: the noised sample is cut off": Mutant(score_identity, "estimates", still_state, ("sid", "uni-instruct")),
    "identity: real and fake swapped": Mutant(
        score_identity, "estimates", lambda g: lambda *args: g(*args)[::-1], ("sid", "sid-few-step", "sfd")
    ),
    "identity: alpha off by one": Mutant(score_identity, "identity_loss", other_alpha, ("sid", "sim")),
    "identity: normalised by the batch": Mutant(score_identity, "size_of", by_batch, ("sid",)),
    "identity: the fake asked as the teacher is": Mutant(
        score_identity, "guided", lambda g: lambda net, uncond, w: g(net, uncond, w.clamp(min=1.0) * 0.0 + 1.0),
        ("sid", "sid-few-step"),
    ),
    "divergence: the weight's own gradient is left out": Mutant(
        score_identity.RatioWeight, "__call__", still_weight, ("uni-instruct",)
    ),
    "divergence: the ratio inverted": Mutant(score_identity.RatioWeight, "__call__", inverted, ("uni-instruct",)),
    "langevin: noise kept in the aim": Mutant(Expectation, "correct", all_noise, ("emd",)),
    "langevin: the scores do not move the start": Mutant(Student, "pulled", still_start, ("emd",)),
    "langevin: teacher and fake swapped": Mutant(
        expectation, "score_gap", lambda g: lambda nets, *rest: g(nets[::-1], *rest), ("emd",)
    ),
    "mixture: length left to the share": Mutant(mixture_scores, "amortised_gradient", raw_length, ("smt",)),
    "mixture: away from the mixture": Mutant(
        mixture_scores, "amortised_gradient", lambda g: lambda x, none, some, whole: -g(x, none, some, whole), ("smt",)
    ),
    "mixture: samples and data weighed the wrong way": Mutant(
        mixture_scores, "both_sides",
        lambda g: lambda estimate, a, *rest: g(estimate, 1.0 - a, *rest), ("smt", "smd"),
    ),
    "mixture: the share left out of the ratio": Mutant(mixture_scores, "mixed", unscaled_share, ("smd",)),
    "mixture: shares of the ends alone": Mutant(
        Shares, "draw", lambda g: lambda self, count, turn: g(replace(self, ends=1.0), count, turn), ("smt",)
    ),
    "ratio: the student runs from the data": Mutant(
        density_ratio, "log_ratio", lambda g: lambda *args: -g(*args), ("ratio-one-step",)
    ),
    "embedding: rows compared with themselves": Mutant(embedding, "discrepancy", with_pairs, ("embedding-loss",)),
    "embedding: samples pushed from the data": Mutant(
        embedding, "discrepancy", lambda g: lambda *args: -g(*args), ("embedding-loss",)
    ),
    "forgetting: nothing counts as forgotten": Mutant(forgetting, "forgotten", kept_everywhere, ("sfd",)),
    "forgetting: all are asked for the other concept": Mutant(forgetting, "asked", unasked, ("sfd",)),
    "forgetting: forgotten rows count as the others": Mutant(
        forgetting, "counted", lambda g: lambda x, share: x, ("sfd",)
    ),
}  # fmt: skip
