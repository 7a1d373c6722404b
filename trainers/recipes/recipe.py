"""A recipe is a function that returns a whole run as a frozen value, named after its paper.

Its parameters are what `--set key=value` may change; everything that follows from them (grids, stages, the sampling
contract) is derived inside the function, so no setting can contradict another.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any

from fewstep.models.paths import Path
from fewstep.models.spec import Boundary

from ..distribution.forgetting import Swap
from ..errors import RecipeError
from ..loop.checkpoint_search import Search
from ..loop.player import PlayerSettings
from ..networks.critics import VISION, CriticPlan
from ..networks.student import Student
from ..parts.objective import Objective
from ..parts.pairs import Pairs
from ..parts.times import Grids
from ..pictures.blending import Blend
from ..pictures.parting import Cell


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method needs beside a student. student: it tunes one that has few steps already and keeps its contract."""

    teacher: bool = True
    data: bool = True
    critic: bool = False
    student: bool = False


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the student is sold: the fields of its `SamplerSpec` that training decides.

    sampler, stochastic, guidance, boundary, gamma, phases: as in the spec. grids: the rule that makes its time grids on
    a path.
    """

    sampler: str
    grids: Grids
    stochastic: bool
    guidance_mode: str
    guidance_default: float
    guidance_range: tuple[float, float]
    boundary: Boundary | None = None
    gamma: float | None = None
    phases: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One optimisation from start to end. `teacher` and `start` name who they are: "teacher", "init" or "previous".

    A start may also be "noise", random weights; a teacher "start", the student as the stage begins.

    "init" is the bundle that `--set init=DIR` names, and the teacher where none is named; as a teacher it is whole, as
    a start it is what the recipe's student makes of it. `player_settings` has an entry for each of the objective's
    players. `average` names the student's running average that is kept, None for its weights themselves. `pairs`: it
    learns from samples of its teacher with their noise (`trainers.parts.pairs`), not from the data. `search`: its
    student is the best combination of checkpoints saved on the way (`trainers.loop.checkpoint_search`). `forget`: what
    is taught in place of a concept (`trainers.distribution.forgetting`). `student`: what it makes of its start, where
    that is not the recipe's. `blend`: its batches hold samples of an old domain too (`trainers.pictures.blending`).
    `cell`: the part of the conditions that its student is for; each such stage's student is sold
    (`trainers.pictures.parting`).
    """

    name: str
    objective: Objective
    player_settings: Mapping[str, PlayerSettings]
    steps: int
    teacher: str = "teacher"
    start: str = "init"
    average: str | None = "kept"
    pairs: Pairs | None = None
    search: Search | None = None
    forget: Swap | None = None
    student: Student | None = None
    blend: Blend | None = None
    cell: Cell | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every run has, whatever its method.

    data: a folder of one's own pictures; None draws `scenes` samples of the built-in set. latents: a file that keeps
    the encoded data between runs. init: a bundle to start from in place of the teacher. partners: an earlier
    run's folder (`OUT.run`), where this run's fake score and critic go on from. batch: of all processes and
    passes together; accumulate: passes that each process takes its share in; parallel: "ddp" or "fsdp", what several
    processes hold (`trainers.loop.ranks`).
    """

    batch: int = 64
    seed: int = 0
    bf16: bool = True
    scenes: int = 16384
    data: str | None = None
    latents: str | None = None
    init: str | None = None
    partners: str | None = None
    checkpoint_every: int = 500
    picture_every: int = 250
    max_bad_steps: int = 20
    fp16_weights: bool = True
    accumulate: int = 1
    parallel: str = "ddp"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole configuration. `stages` run in order; most methods have one. `sampling` None: sampled as its teacher.

    path: what its student lives on, None for whatever its teacher does. beside: further players that are sold, each in
    a bundle of its own beside the student's, and how they are sampled. fake: what is done to the teacher's network to
    make the fake score's, LoRA for one. critic: what an adversary's critic looks at, None for the middle of the fake
    score. adapted: a bundle of a teacher that was fine-tuned on the new domain (`trainers.distribution.adaptation`).
    reward: who judges samples, a name or a folder of `trainers.networks.rewards`, None for nobody.
    """

    name: str
    family: str
    paper: str
    needs: Needs
    student: Student
    stages: tuple[Stage, ...]
    sampling: Sampling | None
    path: Path | None = None
    beside: Mapping[str, Sampling] = field(default_factory=dict)
    fake: Student = field(default_factory=Student)
    critic: CriticPlan | None = None
    adapted: str | None = None
    reward: str | None = None
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        if idle := [stage for stage in self.stages if stage.steps < 1]:
            raise RecipeError(
                f"stage {idle[0].name!r} of {self.name} has {idle[0].steps} steps; set steps to "
                f"{len(self.stages)} or more"
            )
        told = [stage for stage in self.stages if getattr(stage.objective, "two_times", False)]
        if told and not self.student.second_time:
            raise RecipeError(
                f"stage {told[0].name!r} of {self.name} ({type(told[0].objective).__name__}) tells its student where a "
                "jump lands, and the student takes one time; give it Student(second_time=True), or a jump that is not "
                "told, such as DdimJump"
            )
        for stage in self.stages:
            if (stage.student or self.student).second_time and stage not in told:
                raise RecipeError(
                    f"the student of {self.name} takes a second time, and stage {stage.name!r} "
                    f"({type(stage.objective).__name__}) never tells it one; leave second_time out, or give it a jump "
                    "that is told"
                )
            _check_critic(self.name, self.critic, stage.objective)
        if any(getattr(stage.objective, "told", False) is True for stage in self.stages) and not self.fake.second_time:
            raise RecipeError(
                f"{self.name} tells its fake score at which time a step began, and the fake takes one time; give it "
                "fake=Student(second_time=True), or leave told out"
            )

    @property
    def objective(self) -> Objective:
        """The objective of the last stage, which is the method's own."""
        return self.stages[-1].objective

    @property
    def steps(self) -> tuple[int, ...]:
        """The step counts of its students; empty where they are the teacher's."""
        return self.sampling.grids.counts if self.sampling is not None else ()


def _check_critic(name: str, plan: CriticPlan | None, objective: Objective) -> None:
    """Errors: `RecipeError` where the critic's weights would never learn, or it is shown what it cannot see."""
    terms: Mapping[str, Any] = getattr(objective, "terms", {})
    judges = {p: term.adversary for p, own in terms.items() for term in own if hasattr(term, "adversary")}
    told = "the middle of the fake score" if plan is None else f"{plan.features!r} features"
    player = "fake" if plan is None else plan.player
    if wrong := sorted(set(judges) - {"student", player}):
        raise RecipeError(
            f"{name}: the player {wrong[0]!r} learns to judge, and a critic of {told} is the player {player!r}; give "
            f"the Judge to {player!r}, or the recipe another critic"
        )
    if judges and player not in terms:
        raise RecipeError(f"{name}: a critic of {told} is the player {player!r}, which has no terms; give it a Judge")
    asks = plan is not None and plan.step
    if judges and asks != all(own.told for own in judges.values()):
        says = "critic asks for the step's time and its adversary does not tell" if asks else "adversary tells it alone"
        raise RecipeError(f"{name}: its {says}; set both CriticPlan.step and Adversary.told, or neither")
    if plan is not None and plan.features == VISION and any(own.times is not None for own in judges.values()):
        raise RecipeError(f"{name}: a vision network looks at clean pictures; give its adversary times=None")


RecipeFunction = Callable[..., Recipe]


def configure(function: RecipeFunction, settings: Mapping[str, Any]) -> Recipe:
    """Call a recipe with changed settings; those of `Run` are replaced in its result, and those of a reward beside its
    own loss (`trainers.distribution.rewarding`) added to it.

    Errors: `RecipeError` naming an unknown setting with its nearest neighbour, a value of the wrong type, or a setting
    that has no effect beside the others.
    """
    own = inspect.signature(function).parameters
    from .pleasing import Beside, pleasing

    common = {f.name: f.type for part in (Run, Beside) for f in fields(part)}
    known = {**common, **{name: parameter.annotation for name, parameter in own.items()}}
    mine: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise RecipeError(f"{function.__name__} has no setting {name!r}; {hint}It has {', '.join(sorted(known))}")
        (mine if name in own else shared)[name] = check_setting(name, known[name], value)
    beside = {f.name: shared.pop(f.name) for f in fields(Beside) if f.name in shared}
    recipe = function(**mine)
    _refuse_idle(function, mine, own, recipe)
    if "scenes" in shared and shared.get("data") is not None:
        raise RecipeError(f"scenes is {shared['scenes']}, and data names the pictures that are learned; leave one out")
    recipe = replace(recipe, run=replace(recipe.run, **shared))
    return pleasing(recipe, Beside(**beside)) if beside else recipe


def _refuse_idle(
    function: RecipeFunction, given: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], recipe: Recipe
) -> None:
    """Errors: `RecipeError` for a setting without which the recipe is the same, though its default is another."""
    for name, value in given.items():
        if value == parameters[name].default:
            continue
        try:
            without = function(**{other: kept for other, kept in given.items() if other != name})
        except RecipeError:
            continue  # the others need it
        if without == recipe:
            raise RecipeError(
                f"{name} is {value!r} and changes nothing of {recipe.name} as its other settings are; leave it out, or "
                f"change what it belongs to (docs/methods.md)"
            )


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value` -> (key, value); the value is JSON where it parses, else text.

    Errors: `RecipeError` where there is no `=`.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set takes key=value, not {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def check_setting(name: str, hint: Any, value: Any) -> Any:
    """The value as its annotated type: int, float, bool, str, tuple of one of these, or None where allowed."""
    text = hint if isinstance(hint, str) else getattr(hint, "__name__", None) or str(hint)
    text = text if not hasattr(hint, "__args__") else str(hint)
    if value is None and "None" in text:
        return None
    kinds = {"bool": bool, "int": int, "float": float, "str": str}
    item = next((kind for word, kind in kinds.items() if word in text), None)
    if text.startswith("tuple"):
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_as(name, item, v) for v in values)
    return _as(name, item, value)


def _as(name: str, kind: Any, value: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is None or type(value) is not kind:
        raise RecipeError(f"{name} is {value!r}; it must be {getattr(kind, '__name__', 'a known type')}")
    return value


def describe(value: Any, *, whole: bool = True) -> Any:
    """A configuration as plain JSON: every dataclass with its class and fields, every function by its name.

    whole: also the fields that are as by default.
    """
    if is_dataclass(value) and not isinstance(value, type):
        told = [f.name for f in fields(value) if whole or is_given(f, getattr(value, f.name))]
        return {"part": type(value).__name__, **{name: describe(getattr(value, name), whole=whole) for name in told}}
    if isinstance(value, Mapping):
        return {str(key): describe(item, whole=whole) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item, whole=whole) for item in value]
    return getattr(value, "__name__", value)


def is_given(f: Field[Any], value: Any) -> bool:
    """Whether a dataclass's field holds another value than its default."""
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    return bool(default is MISSING or value != default)
