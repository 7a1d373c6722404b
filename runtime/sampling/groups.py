"""Several models served as one, under a name of their own: students by condition, or experts by noise interval.

Multi-student distillation (MSD, Song et al. 2024) gives each part of the condition space a student: the prompt alone
decides, by listed words or by the nearest centroid of its text embedding. Experts (Phased DMD, Fan et al. 2025; DCM, Lv
et al. 2025) share one sampler: the time of a row decides. Which model that is, is data: given in code, or read from a
JSON file beside the bundles. No torch here.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from fewstep.models.spec import SamplerSpec

from ..errors import BundleError
from .plan import Plan


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model and its part of the conditions: prompts with these words, or with embeddings nearest to this centroid."""

    model: str
    words: tuple[str, ...] = ()
    centroid: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Expert:
    """A model and the end of its noise interval: it takes the rows with t >= `down_to` that none before it takes."""

    model: str
    down_to: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Group:
    """Either `students` or `experts`. The first of them answers for what the group allows (steps, sizes, guidance).

    reader: the served model whose text embedding is compared with the centroids; the first student's where None.
    """

    name: str
    students: tuple[Student, ...] = ()
    experts: tuple[Expert, ...] = ()
    reader: str | None = None

    def __post_init__(self) -> None:
        if bool(self.students) == bool(self.experts):
            raise BundleError(f"group {self.name!r} needs students or experts, and not both")
        if self.reader is not None and not self.by_centroid:
            raise BundleError(f"group {self.name!r} names a reader, but its students have no centroids: leave it out")
        sizes = {len(student.centroid) for student in self.students}
        if len(sizes) > 1 or any(bool(s.words) == bool(s.centroid) for s in self.students[1:]):
            raise BundleError(f"group {self.name!r}: give every student a centroid of one length, or each its words")
        ends = [expert.down_to for expert in self.experts]
        if ends and (any(a <= b for a, b in pairwise(ends)) or ends[-1] > 0.0):
            raise BundleError(f"group {self.name!r}: down_to is {ends}; it must fall from expert to expert, to 0")

    @property
    def models(self) -> tuple[str, ...]:
        """The models that take part, the one that answers for the group first."""
        return tuple(dict.fromkeys([*(s.model for s in self.students), *(e.model for e in self.experts)]))

    @property
    def by_centroid(self) -> bool:
        return bool(self.students) and bool(self.students[0].centroid)

    @property
    def reads_with(self) -> str:
        """The model whose text embedding decides."""
        return self.reader or self.models[0]

    def by_words(self, prompt: str) -> str:
        """The student most of whose words the prompt has; the first of equals, the first of all where none has any."""
        said = set(re.findall(r"[^\W_]+", prompt.lower()))
        found = [len(said.intersection(word.lower() for word in student.words)) for student in self.students]
        return self.students[found.index(max(found))].model

    def nearest(self, embedding: Sequence[float]) -> str:
        """The student whose centroid is nearest to a text embedding, by Euclidean distance; the first of equals.

        Errors: `BundleError` where the embedding has another length.
        """
        wanted = len(self.students[0].centroid)
        if len(embedding) != wanted:
            raise BundleError(
                f"group {self.name!r}: centroids have {wanted} numbers, {self.reads_with!r} embeds in {len(embedding)}"
            )
        far = [math.dist(embedding, student.centroid) for student in self.students]
        return self.students[far.index(min(far))].model

    def assign(self, plan: Plan) -> Plan:
        """A plan of the first expert's with each row given to the expert of its time."""
        own = self.models[0]
        rows = []
        for row in plan.rows:
            model = next(expert.model for expert in self.experts if row.t >= expert.down_to)
            rows.append(row if model == own or row.model is not None else replace(row, model=model))
        return replace(plan, rows=tuple(rows))

    def check(self, specs: Mapping[str, SamplerSpec]) -> None:
        """Errors: `BundleError` where a model is not served, or experts are not of one path, prediction and latent."""
        for name in (*self.models, self.reads_with):
            if name not in specs:
                raise BundleError(f"group {self.name!r} needs the model {name!r}; served are {', '.join(specs)}")
        for field in ("path", "prediction", "latent", "sizes") if self.experts else ("sizes",):
            found = {name: getattr(specs[name], field) for name in self.models}
            if any(value != found[self.models[0]] for value in found.values()):
                raise BundleError(f"group {self.name!r}: its models differ in {field}: {found}")


def read_group(path: str | Path) -> Group:
    """A group from a JSON file: the fields of `Group`, `Student` and `Expert` by their names.

    Errors: `BundleError` naming the file and what is wrong in it.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as a group: {error}") from error
    try:
        parts = {
            "students": tuple(_part(Student, part) for part in found.get("students", ())),
            "experts": tuple(_part(Expert, part) for part in found.get("experts", ())),
        }
        group: Group = _part(Group, {**found, **parts})
    except (AttributeError, TypeError, KeyError) as error:
        raise BundleError(f"{path} is not a group: {error}") from error
    return group


def _part(kind: type, found: Mapping[str, Any]) -> Any:
    known = {field.name for field in fields(kind)}
    if stray := sorted(set(found) - known):
        raise TypeError(f"{stray[0]!r} is not a field of {kind.__name__}; known are {', '.join(sorted(known))}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    for name, value in values.items():
        numbers = name in ("centroid", "down_to")
        for each in value if isinstance(value, tuple) else (value,):
            if name not in ("students", "experts") and not isinstance(each, (int, float) if numbers else str):
                raise TypeError(f"{name} has {each!r}; it must be {'numbers' if numbers else 'text'}")
    return kind(**values)
