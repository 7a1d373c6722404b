"""Planted faults in the search among saved checkpoints, and in guidance away from a drawn prompt."""

from dataclasses import replace

import torch
from mutants import Mutant

from fewstep.trainers.loop import checkpoint_search
from fewstep.trainers.loop.checkpoint_search import Search
from fewstep.trainers.objectives.avoiding import Avoiding
from fewstep.trainers.oracle import search as oracle_search
from fewstep.trainers.parts.laws import WholePhase


def unbalanced(original):
    """Coefficients that do not sum to 1."""

    def crossed(a, b, spread, rng):
        child = original(a, b, spread, rng)
        child[-1] += 0.1
        return child

    return crossed


def convex(original):
    """Only what lies between the parents."""

    def crossed(a, b, spread, rng):
        share = torch.rand((), generator=rng, dtype=torch.float64)
        return share * a + (1.0 - share) * b

    return crossed


def told_another(original):
    """The student is told of another prompt than the teacher was guided away from."""

    def told(self, batch, turn):
        made = original(self, batch, turn)
        return replace(made, cond={**made.cond, "neg_ctx": made.cond["neg_ctx"].roll(1, 0)})

    return told


def away_from_itself(original):
    """Rows may avoid their own prompt."""

    def told(self, batch, turn):
        made = original(self, batch, turn)
        own = torch.where(made.uncond["ctx"] == 0.0, made.uncond["ctx"], batch.cond["ctx"])
        return replace(made, uncond={**made.uncond, "ctx": own}, cond={**made.cond, "neg_ctx": own})

    return told


ADAPTED_MUTANTS: dict[str, Mutant] = {
    "avoided: another than is told": Mutant(Avoiding, "told", told_another, ("speedupnet",)),
    "avoided: one's own prompt": Mutant(Avoiding, "told", away_from_itself, ("speedupnet",)),
    "avoided: always the empty prompt": Mutant(
        Avoiding, "told", lambda g: lambda self, batch, turn: g(replace(self, empty=1.1), batch, turn), ("speedupnet",)
    ),
    "pairs: half of the phase": Mutant(
        WholePhase,
        "draw",
        lambda g: (
            lambda self, path, count, turn: (lambda t, s: (t, 0.5 * (t + s.clamp(min=0.0))))(
                *g(self, path, count, turn)
            )
        ),
        ("speedupnet",),
    ),
    "search: sums other than 1": Mutant(checkpoint_search, "crossed", unbalanced, ("lcsc",)),
    "search: nothing beyond the averages": Mutant(checkpoint_search, "crossed", convex, ("lcsc",)),
    "search: the last checkpoint is not among the first": Mutant(
        checkpoint_search, "average_coefficients", lambda g: lambda count, decay: g(count, max(decay, 0.2)), ("lcsc",)
    ),
    "averages: begun at the last": Mutant(
        oracle_search, "average_coefficients", lambda g: lambda count, decay: g(count, decay).flip(0), ("lcsc",)
    ),
    "combination: in reverse order": Mutant(
        oracle_search, "combined", lambda g: lambda saved, alpha: g(saved, alpha.flip(0)), ("lcsc",)
    ),
    "saved: over the whole stage": Mutant(
        Search, "place", lambda g: lambda self, progress: min(self.saved - 1, int(progress * self.saved)), ("lcsc",)
    ),
}
