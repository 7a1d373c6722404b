"""Whether a fine-tuned student has the style it was shown and still has its steps: three measures, one verdict.

Style: what separates a model's pictures from the user's, prompt by prompt, in the features of
`trainers.pictures.features`; `gap` is the length of the mean difference, free of the spread that so few pictures have
by chance. The student's gap before is 0 of the way, that of the teacher which has the style is all of it. A style that
came as a LoRA, without pictures, is what the teacher with that LoRA draws.
Kept: compliance (`trainers.pictures.compliance`) with the prompts of the built-in scenes, as a share of the student's
own before. Diversity: how much the seeds of a prompt differ (`trainers.pictures.diversity`), as such a share too; a
student that draws every seed alike may well have the style and comply.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fewstep.models.bundle import Bundle

from ..errors import DataError
from ..pictures.data import read_metadata, read_picture, write_pictures
from ..pictures.features import extract, load_features
from ..pictures.quality import PromptSet, measure_bundle, sample_pictures

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
    """The least shares, at every step count. style: of the way. kept: of compliance before. diversity: of diversity
    before; well below 1, as pictures of one style differ less than those of none."""

    style: float = 0.5
    kept: float = 0.95
    diversity: float = 0.5


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """One model at one step count. diversity: 1.0 is that of real scenes. Gaps on the pictures it learned from and on
    others of that style (None: there are none). Shares, None for a model that is not judged: reached, of the way; kept,
    of compliance before; varied, of diversity before."""

    model: str
    steps: int
    compliance: float
    diversity: float
    gap: float
    gap_held_out: float | None
    reached: float | None = None
    reached_held_out: float | None = None
    kept: float | None = None
    varied: float | None = None

    def failures(self, limits: Limits) -> dict[str, str]:
        """Measure -> what is wrong with it; empty for a model that passes or is not judged."""
        reached = self.reached if self.reached_held_out is None else self.reached_held_out
        found = {
            "style": (reached, limits.style), "compliance": (self.kept, limits.kept),
            "diversity": (self.varied, limits.diversity),
        }  # fmt: skip
        return {
            name: f"{100 * left:.1f} %, and at least {100 * least:g} % is asked for"
            for name, (left, least) in found.items()
            if left is not None and not left >= least  # what is no number passes nothing
        }

    def passes(self, limits: Limits) -> bool:
        return not self.failures(limits)


def shown(folder: Path, size: tuple[int, int], first: int | None = None) -> Shown:
    """The first pictures of a folder, as of `size` (width, height); two or more, so that chance can be told.

    Errors: `DataError` for a folder that is not read as a user's pictures, or holds one.
    """
    rows = read_metadata(folder)[:first]
    if len(rows) < 2:
        raise DataError(f"{folder} holds {len(rows)} picture, and a gap is measured on 2 or more; give it more")
    pictures = np.stack([np.asarray(read_picture(path, *size)) for path, _ in rows])
    return Shown(tuple(text for _, text in rows), extract(load_features(), pictures))


def draw_folder(bundle: Bundle, texts: Sequence[str], folder: Path) -> Path:
    """A folder as a user's, of what the bundle draws: one picture of each text. A folder that is whole is left as is.

    Errors: `InvalidRequest` for a text that the bundle does not take.
    """
    if (folder / "metadata.jsonl").is_file():
        return folder
    # no seed that `model_gap` draws these texts by: a model's gap to itself is then between independent samples
    seeds = range(SEEDS * len(texts), (SEEDS + 1) * len(texts))
    drawn = sample_pictures(bundle, texts, seeds, _many(bundle), progress=True)
    return write_pictures(folder, zip(map(Image.fromarray, drawn), texts, strict=True))


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


@dataclass(frozen=True)
class Judge:
    """What stays the same for every student that is judged: what was before, and how far the teacher came."""

    own: Shown
    held_out: Shown | None
    prompts: PromptSet
    before: tuple[GateRow, ...]
    teacher: GateRow
    tuned: GateRow

    def rows(self, name: str, bundle: Bundle) -> list[GateRow]:
        """The student's rows, against those of before at the same step counts."""
        found = []
        for was in self.before:
            now = measure(name, bundle, was.steps, self.own, self.held_out, self.prompts)
            marks: dict[str, Any] = {
                "kept": share(was.compliance, now.compliance),
                "varied": share(was.diversity, now.diversity),
            }
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


def share(before: float, after: float) -> float:
    """What is left of it; of nothing, all."""
    return after / before if before else 1.0


def measure(
    name: str, bundle: Bundle, steps: int, own: Shown, held_out: Shown | None, prompts: PromptSet
) -> GateRow:  # fmt: skip
    """One model at one step count, not judged.

    Errors: `InvalidRequest` for steps or a prompt that the bundle does not take.
    """
    scenes = measure_bundle(bundle, steps, prompts).row
    return GateRow(
        model=name, steps=steps, compliance=scenes.compliance, diversity=scenes.diversity,
        gap=model_gap(bundle, steps, own),
        gap_held_out=None if held_out is None else model_gap(bundle, steps, held_out),
    )  # fmt: skip


def judge(
    student: Bundle, teacher: Bundle, tuned: Bundle, own: Shown, held_out: Shown | None, prompts: PromptSet,
    steps: Sequence[int],
) -> Judge:  # fmt: skip
    """Measure everything that a fine-tuned student is held against.

    Errors: those of `measure`.
    """
    before = tuple(measure(student.name, student, n, own, held_out, prompts) for n in steps)
    first = measure(teacher.name, teacher, _many(teacher), own, held_out, prompts)
    second = measure(f"{teacher.name}, tuned", tuned, _many(tuned), own, held_out, prompts)
    return Judge(own, held_out, prompts, before, first, second)


def _many(teacher: Bundle) -> int:
    """The steps that a teacher draws in."""
    return TEACHER_STEPS if teacher.spec.allows(TEACHER_STEPS) else max(teacher.spec.steps)


def table(rows: Sequence[GateRow], limits: Limits) -> str:
    """Markdown."""
    head = ("model", "steps", "gap", "held out", "style", "held out", "compliance", "kept", "diversity", "kept", "")
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 2) + " --- |"]
    for row in rows:
        failed = ", ".join(row.failures(limits))
        verdict = "" if row.reached is None else (f"FAILED: {failed}" if failed else "passed")
        cells = [row.model, str(row.steps), *map(_two, (row.gap, row.gap_held_out))]
        cells += [_percent(row.reached), _percent(row.reached_held_out)]
        cells += [f"{row.compliance:.3f}", _percent(row.kept), _two(row.diversity), _percent(row.varied)]
        lines.append("| " + " | ".join([*cells, verdict]) + " |")
    return "\n".join(lines)


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100.0 * value:.0f} %"
