"""Whether a fine-tuned student has the style it was shown and still has its steps: two measures, one verdict.

Style: what separates a model's pictures from the user's, prompt by prompt, in the features of
`trainers.pictures.features`; `gap` is the length of the mean difference, free of the spread that so few pictures have
by chance. The student's gap before is 0 of the way, that of the teacher fine-tuned on the same pictures is all of it.
Kept: compliance (`trainers.pictures.compliance`) with the prompts of the built-in scenes, as a share of the student's
own before.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fewstep.models.bundle import Bundle

from ..pictures.compliance import check
from ..pictures.data import read_metadata, read_picture
from ..pictures.features import extract, load_features
from ..pictures.quality import as_scene, sample_pictures
from ..pictures.scenes import Caption

TEACHER_STEPS = 10
SEEDS = 3
"""Samples of each of the user's prompts."""


@dataclass(frozen=True)
class Shown:
    """A user's pictures: their prompts, and their features [N, 64]."""

    texts: tuple[str, ...]
    features: Tensor


@dataclass(frozen=True, kw_only=True)
class Limits:
    """style: the least share of the way, at every step count. kept: the least share of compliance."""

    style: float = 0.5
    kept: float = 0.95


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """One model at one step count. Gaps on the pictures it learned from and on others of that style (None: there are
    none); reached: shares of the way, None for a model that is not judged."""

    model: str
    steps: int
    compliance: float
    gap: float
    gap_held_out: float | None
    reached: float | None = None
    reached_held_out: float | None = None
    kept: float | None = None

    def passes(self, limits: Limits) -> bool:
        if self.reached is None or self.kept is None:
            return True
        judged = self.reached if self.reached_held_out is None else self.reached_held_out
        return judged >= limits.style and self.kept >= limits.kept


def shown(folder: Path, size: tuple[int, int], first: int | None = None) -> Shown:
    """Errors: `DataError` for a folder that is not read as a user's pictures."""
    rows = read_metadata(folder)[:first]
    pictures = np.stack([np.asarray(read_picture(path, *size)) for path, _ in rows])
    return Shown(tuple(text for _, text in rows), extract(load_features(), pictures))


def gap(made: Tensor, real: Tensor) -> float:
    """Length of the mean of `made - real`, [N, D] each, prompt by prompt; what chance adds to its square is taken off.

    E|mean d|^2 = |E d|^2 + tr(cov d) / N, so that two samples of one law have a gap about 0.
    """
    apart = made.double() - real.double()
    square = apart.mean(0).square().sum() - apart.var(0).sum() / len(apart)
    return float(square.clamp(min=0.0).sqrt())


def model_gap(bundle: Bundle, steps: int, pictures: Shown, seed: int = 0) -> float:
    """The gap of a bundle's samples of the same prompts, `SEEDS` of each."""
    texts = [text for text in pictures.texts for _ in range(SEEDS)]
    made = extract(load_features(), sample_pictures(bundle, texts, range(seed, seed + len(texts)), steps))
    return gap(made.reshape(len(pictures.texts), SEEDS, -1).mean(1), pictures.features)


def compliance(bundle: Bundle, steps: int, captions: Sequence[Caption], seed: int = 0) -> float:
    """Mean share of claims met."""
    texts = [caption.text for caption in captions]
    made: NDArray[np.uint8] = sample_pictures(bundle, texts, range(seed, seed + len(texts)), steps)
    return float(
        np.mean([check(as_scene(picture), caption).score for picture, caption in zip(made, captions, strict=True)])
    )


@dataclass(frozen=True)
class Judge:
    """What stays the same for every student that is judged: what was before, and how far the teacher came."""

    own: Shown
    held_out: Shown | None
    captions: tuple[Caption, ...]
    before: tuple[GateRow, ...]
    teacher: GateRow
    tuned: GateRow

    def rows(self, name: str, bundle: Bundle) -> list[GateRow]:
        """The student's rows, against those of before at the same step counts."""
        found = []
        for was in self.before:
            now = measure(name, bundle, was.steps, self.own, self.held_out, self.captions)
            marks: dict[str, Any] = {"kept": now.compliance / was.compliance if was.compliance else 1.0}
            marks["reached"] = way(was.gap, now.gap, self.tuned.gap)
            if was.gap_held_out is not None and now.gap_held_out is not None and self.tuned.gap_held_out is not None:
                marks["reached_held_out"] = way(was.gap_held_out, now.gap_held_out, self.tuned.gap_held_out)
            found.append(GateRow(**{**asdict(now), **marks}))
        return found


def report_rows(judged: Judge, students: dict[str, Bundle], limits: Limits) -> tuple[list[GateRow], bool]:
    """(all rows, whether every student passes at every step count)."""
    rows = [judged.teacher, judged.tuned, *judged.before]
    after = [row for name, bundle in students.items() for row in judged.rows(name, bundle)]
    return [*rows, *after], all(row.passes(limits) for row in after)


def way(before: float, after: float, teacher: float) -> float:
    """`(before - after) / (before - teacher)`; where the teacher came no nearer than the student was, 0."""
    return (before - after) / (before - teacher) if before > teacher else 0.0


def measure(
    name: str, bundle: Bundle, steps: int, own: Shown, held_out: Shown | None, captions: Sequence[Caption]
) -> GateRow:
    return GateRow(
        model=name, steps=steps, compliance=compliance(bundle, steps, captions), gap=model_gap(bundle, steps, own),
        gap_held_out=None if held_out is None else model_gap(bundle, steps, held_out),
    )  # fmt: skip


def judge(
    student: Bundle, teacher: Bundle, tuned: Bundle, own: Shown, held_out: Shown | None, captions: Sequence[Caption],
    steps: Sequence[int],
) -> Judge:  # fmt: skip
    """Measure everything that a fine-tuned student is held against."""
    before = tuple(measure(student.name, student, n, own, held_out, captions) for n in steps)
    many = TEACHER_STEPS if teacher.spec.allows(TEACHER_STEPS) else max(teacher.spec.steps)
    first = measure(teacher.name, teacher, many, own, held_out, captions)
    second = measure(f"{teacher.name}, tuned", tuned, many, own, held_out, captions)
    return Judge(own, held_out, tuple(captions), before, first, second)


def table(rows: Sequence[GateRow], limits: Limits) -> str:
    """Markdown."""
    head = ("model", "steps", "gap", "held out", "style", "held out", "compliance", "kept", "")
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 2) + " --- |"]
    for row in rows:
        verdict = "" if row.reached is None else ("passed" if row.passes(limits) else "FAILED")
        cells = [row.model, str(row.steps), *map(_two, (row.gap, row.gap_held_out))]
        cells += [_percent(row.reached), _percent(row.reached_held_out), f"{row.compliance:.3f}", _percent(row.kept)]
        lines.append("| " + " | ".join([*cells, verdict]) + " |")
    return "\n".join(lines)


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100.0 * value:.0f} %"
