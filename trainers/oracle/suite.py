"""The oracle suite: every registered recipe's mathematics against closed-form truth, before anything is trained.

    python -m fewstep.trainers.oracle            runs it and writes the evidence that `fewstep recipes` reads

A recipe joins by being registered in `trainers.recipes.registry.RECIPES`; its checks follow from the class of its
objective. An objective that the suite does not know fails. A new method adds a file of checks and one line to `SUITES`.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..distribution.distribution import DistributionMatching
from ..evidence import write_evidence
from ..objectives.avoiding import Avoiding
from ..objectives.backward import BackwardDistillation
from ..objectives.consistency import Consistency
from ..objectives.continuous import ContinuousConsistency
from ..objectives.distillation import KnowledgeDistillation
from ..objectives.flow_map import FlowMap
from ..objectives.from_noise import FromNoise
from ..objectives.guidance import GuidanceDistillation
from ..objectives.invertible import Invertible
from ..objectives.moments import MomentMatching
from ..objectives.progressive import ProgressiveHalving
from ..objectives.reflow import AnnealingReflow
from ..objectives.reward_guided import RewardGuided
from ..objectives.self_corrected import SelfCorrected
from ..objectives.straight import StraightTrajectory
from ..objectives.twin import TwinFlow
from ..objectives.variational import VariationalCoupling
from ..recipes.recipe import Recipe, RecipeFunction
from ..recipes.registry import RECIPES
from . import avoiding as oracle_avoiding
from . import backward as oracle_backward
from . import consistency as oracle_consistency
from . import continuous as oracle_continuous
from . import distillation as oracle_distillation
from . import flow as oracle_flow
from . import guidance as oracle_guidance
from . import invertible as oracle_invertible
from . import matching as oracle_matching
from . import players as oracle_players
from . import progressive as oracle_progressive
from . import reflow as oracle_reflow
from . import reward as oracle_reward
from . import search as oracle_search
from . import straight as oracle_straight
from . import terms as oracle_terms
from . import variational as oracle_variational
from .samplers import all_sampler_checks, sampling_checks
from .world import Check, holds

SUITES: dict[type, Callable[[Recipe, Any], Iterator[Check]]] = {
    AnnealingReflow: oracle_reflow.checks,
    Avoiding: oracle_avoiding.checks,
    BackwardDistillation: oracle_backward.checks,
    Consistency: oracle_consistency.checks,
    ContinuousConsistency: oracle_continuous.checks,
    DistributionMatching: oracle_terms.checks,
    FlowMap: oracle_flow.checks,
    FromNoise: oracle_flow.noise_checks,
    Invertible: oracle_invertible.checks,
    GuidanceDistillation: oracle_guidance.checks,
    KnowledgeDistillation: oracle_distillation.checks,
    MomentMatching: oracle_matching.checks,
    ProgressiveHalving: oracle_progressive.checks,
    SelfCorrected: oracle_straight.corrected_checks,
    RewardGuided: oracle_reward.guided_checks,
    StraightTrajectory: oracle_straight.checks,
    TwinFlow: oracle_matching.twin_checks,
    VariationalCoupling: oracle_variational.checks,
}


def check_recipe(recipe: Recipe) -> list[Check]:
    """Every check of one recipe."""
    return list(checks_of(recipe))


def checks_of(recipe: Recipe) -> Iterator[Check]:
    """One by one. A check that breaks instead of answering counts as failed, and the rest of its kind as not run."""
    suites = []
    for objective in [recipe.objective, *(() if type(recipe.objective) not in SUITES else _others(recipe))]:
        if type(objective) not in SUITES:
            yield holds(f"the suite knows {type(objective).__name__}", False)
            return
        suites.append(SUITES[type(objective)](recipe, objective))
    for part in (*suites, sampling_checks(recipe), oracle_players.checks(recipe), oracle_search.checks(recipe)):
        try:
            yield from part
        except Exception as error:  # whatever a wrong method raises is its failure, not the suite's
            yield holds(f"runs: {type(error).__name__}: {error}", False)


def _others(recipe: Recipe) -> list[Any]:
    """Objectives of earlier stages; no progressive rounds, since the suite of the last one sees all of them."""
    found: list[Any] = []
    for stage in recipe.stages[:-1]:
        if not isinstance(stage.objective, ProgressiveHalving) and stage.objective not in found:
            found.append(stage.objective)
    return found


def passed(checks: Sequence[Check]) -> bool:
    return bool(checks) and all(check.passed for check in checks)


def run_oracle(recipes: Mapping[str, RecipeFunction] = RECIPES) -> dict[str, list[Check]]:
    """All checks of the given recipes, by name."""
    return {name: check_recipe(function()) for name, function in recipes.items()}


def evidence_of(recipes: Mapping[str, list[Check]], samplers: Mapping[str, list[Check]]) -> dict[str, Any]:
    """The evidence file's content: a status and all numbers per recipe and per sampler."""

    def rows(found: Mapping[str, list[Check]]) -> dict[str, Any]:
        return {
            name: {"status": "passed" if passed(checks) else "failed", "checks": [c.to_json() for c in checks]}
            for name, checks in found.items()
        }

    return {"recipes": rows(recipes), "samplers": rows(samplers)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fewstep.trainers.oracle", description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="check, but write no evidence")
    args = parser.parse_args(argv)
    started = time.monotonic()
    recipes, samplers = run_oracle(), all_sampler_checks()
    named = {f"recipe {n}": c for n, c in recipes.items()} | {f"sampler {n}": c for n, c in samplers.items()}
    for name, checks in named.items():
        for check in checks:
            if not check.passed:
                print(f"{name}: {check.name}: {check.value:.3g} is not in [{check.low:.3g}, {check.high:.3g}]")
        print(f"{name:<26}{'passed' if passed(checks) else 'FAILED'}  {sum(c.passed for c in checks)}/{len(checks)}")
    print(f"{time.monotonic() - started:.1f} s")
    if not args.dry_run:
        print(f"wrote {write_evidence('oracle', evidence_of(recipes, samplers))}")
    return 0 if all(passed(checks) for checks in named.values()) else 1
