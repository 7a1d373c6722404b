"""The oracle of distribution matching: every term and every rollout has checks of its own, found by its class.

A new term or rollout adds a file of checks and one line here; one that is not known fails.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..distribution.adaptation import TaughtBy
from ..distribution.adversarial import TeacherAim
from ..distribution.also import Also
from ..distribution.control_terms import Follow
from ..distribution.density_ratio import ClimbRatio
from ..distribution.discriminator import Deceive, Judge
from ..distribution.distribution import DistributionMatching
from ..distribution.embedding import EmbeddingLoss
from ..distribution.expectation import Expectation
from ..distribution.faithful import Faithful
from ..distribution.forgetting import Forgetting
from ..distribution.mixture_scores import AmortisedGap, DenoiseMixture, FitRatio, RatioGap
from ..distribution.preference import DenoisePreferred, PairedLikelihood, PreferenceGap, PreferredPairs
from ..distribution.rewarding import Agree, Favour, Rewarded
from ..distribution.score_gap import Denoise, ScoreGap
from ..distribution.score_identity import ScoreIdentity
from ..distribution.self_paced import BesideNext, DrawnWalk
from ..distribution.stabiliser import GuidanceAlone, MeanVariance
from ..parts.chain import Chain
from ..parts.gan_losses import Softplus
from ..parts.noised_rollout import NoisedRollout
from ..parts.rollout import BackwardSimulation
from ..parts.times import StartedGrids
from ..recipes.recipe import Recipe
from . import preference as oracle_preference
from . import reward as oracle_reward
from .adversary import critic_checks, deceive_checks, judge_checks
from .beside import aim_checks, also_checks, cell_checks, next_checks, noised_checks, taught_checks, walk_checks
from .control import follow_checks
from .critics import judge_parts
from .distribution import denoise_checks, gap_checks, routing_checks
from .identity import forgetting_checks, identity_checks
from .mixture import (
    amortised_checks,
    climb_checks,
    embedding_checks,
    expectation_checks,
    fit_checks,
    mixture_denoise_checks,
    ratio_gap_checks,
)
from .parts import rollout_checks
from .segments import SCORE_ROLLOUTS, SCORE_TERMS
from .stabiliser import guidance_alone_checks, mean_variance_checks
from .world import Check, holds

TERMS: dict[type, Callable[[Recipe, DistributionMatching, Any], Iterator[Check]]] = {
    TaughtBy: taught_checks,
    Also: also_checks,
    BesideNext: next_checks,
    Agree: oracle_reward.agree_checks,
    Deceive: deceive_checks,
    DenoisePreferred: oracle_preference.denoise_checks,
    Faithful: oracle_preference.faithful_checks,
    Favour: oracle_reward.favour_checks,
    PairedLikelihood: oracle_preference.likelihood_checks,
    PreferenceGap: oracle_preference.gap_checks,
    PreferredPairs: oracle_preference.pairs_checks,
    Follow: follow_checks,
    Rewarded: oracle_reward.rewarded_checks,
    Denoise: denoise_checks,
    Judge: judge_checks,
    **SCORE_TERMS,
    ScoreGap: gap_checks,
    TeacherAim: aim_checks,
    AmortisedGap: amortised_checks,
    ClimbRatio: climb_checks,
    DenoiseMixture: mixture_denoise_checks,
    EmbeddingLoss: embedding_checks,
    Expectation: expectation_checks,
    FitRatio: fit_checks,
    Forgetting: forgetting_checks,
    GuidanceAlone: guidance_alone_checks,
    MeanVariance: mean_variance_checks,
    RatioGap: ratio_gap_checks,
    ScoreIdentity: identity_checks,
}
ROLLOUTS: dict[type, Callable[[Recipe, Any], Iterator[Check]]] = {
    Chain: oracle_preference.chain_checks,
    BackwardSimulation: rollout_checks,
    **SCORE_ROLLOUTS,
    NoisedRollout: noised_checks,
    DrawnWalk: walk_checks,
}


def from_the_start(objective: DistributionMatching) -> DistributionMatching:
    """The objective, its walks begun at the noisiest time: pure noise has the law of no other time, and exact students
    and fake scores are those of the right law."""
    grids = getattr(objective.rollout, "grids", None)
    if not isinstance(grids, StartedGrids):
        return objective
    return replace(objective, rollout=replace(objective.rollout, grids=replace(grids, start=1.0)))  # type: ignore[type-var]


def checks(recipe: Recipe, objective: DistributionMatching) -> Iterator[Check]:
    """Those of its rollout, of each kind of term once, with a term inside another's, and of the whole."""
    every = [term for terms in objective.terms.values() for term in terms]
    suites: dict[Any, Any] = {(type(term), type(getattr(term, "term", None))): term for term in every}
    unknown = [kind.__name__ for kind, _ in suites if kind not in TERMS]
    unknown += [type(objective.rollout).__name__] if type(objective.rollout) not in ROLLOUTS else []
    yield holds(f"the suite knows every part{': not ' if unknown else ''}{', '.join(unknown)}", not unknown)
    if unknown:
        return
    level = from_the_start(objective)
    for (kind, _), term in suites.items():
        yield from TERMS[kind](recipe, level, term)
    judges = [term for terms in objective.terms.values() for term in terms if hasattr(term, "adversary")]
    if judges:
        yield from critic_checks() if isinstance(judges[0].adversary.loss, Softplus) else ()
        yield from judge_parts(recipe, judges[0].adversary)
    yield from cell_checks(recipe)
    yield from ROLLOUTS[type(objective.rollout)](recipe, objective.rollout)
    yield from routing_checks(objective)
