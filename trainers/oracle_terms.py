"""The oracle of distribution matching: every term and every rollout has checks of its own, found by its class.

A new term or rollout adds a file of checks and one line here; one that is not known fails.
"""

from collections.abc import Callable, Iterator
from typing import Any

from .adversarial import TeacherAim
from .also import Also
from .discriminator import Deceive, Judge
from .distribution import DistributionMatching
from .gan_losses import Softplus
from .oracle_adversary import critic_checks, deceive_checks, judge_checks
from .oracle_critics import aim_checks, also_checks, judge_parts, next_checks, noised_checks, walk_checks
from .oracle_distribution import denoise_checks, gap_checks, routing_checks
from .oracle_parts import rollout_checks
from .oracle_world import Check, holds
from .noised_rollout import NoisedRollout
from .recipe import Recipe
from .rollout import BackwardSimulation
from .score_gap import Denoise, ScoreGap
from .self_paced import BesideNext, WholeWalk

TERMS: dict[type, Callable[[Recipe, DistributionMatching, Any], Iterator[Check]]] = {
    Also: also_checks,
    BesideNext: next_checks,
    Deceive: deceive_checks,
    Denoise: denoise_checks,
    Judge: judge_checks,
    ScoreGap: gap_checks,
    TeacherAim: aim_checks,
}
ROLLOUTS: dict[type, Callable[[Recipe, Any], Iterator[Check]]] = {
    BackwardSimulation: rollout_checks,
    NoisedRollout: noised_checks,
    WholeWalk: walk_checks,
}


def checks(recipe: Recipe, objective: DistributionMatching) -> Iterator[Check]:
    """Those of its rollout, of each kind of term once, and of the whole."""
    suites: dict[type, Any] = {type(term): term for terms in objective.terms.values() for term in terms}
    unknown = [kind.__name__ for kind in suites if kind not in TERMS]
    unknown += [type(objective.rollout).__name__] if type(objective.rollout) not in ROLLOUTS else []
    yield holds(f"the suite knows every part{': not ' if unknown else ''}{', '.join(unknown)}", not unknown)
    if unknown:
        return
    for kind, term in suites.items():
        yield from TERMS[kind](recipe, objective, term)
    judges = [term for terms in objective.terms.values() for term in terms if hasattr(term, "adversary")]
    if judges:
        yield from critic_checks() if isinstance(judges[0].adversary.loss, Softplus) else ()
        yield from judge_parts(recipe, judges[0].adversary)
    yield from ROLLOUTS[type(objective.rollout)](recipe, objective.rollout)
    yield from routing_checks(objective)
