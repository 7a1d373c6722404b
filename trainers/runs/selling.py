"""What a recipe sells beside its student: further players, and the students of other parts of the conditions."""

from dataclasses import replace
from pathlib import Path

from fewstep.models.bundle import Bundle

from ..networks.partners import picture_partner
from ..networks.student import Student, build_student
from ..pictures.data import LatentSource
from ..pictures.parting import CellSource, write_group
from ..recipes.recipe import Recipe
from .student_bundle import write_student


def beside_of(out: Path, name: str) -> Path:
    """The folder of a further player's bundle."""
    return out.with_name(f"{out.name}-{name}")


def sell_beside(recipe: Recipe, teacher: Bundle, run: Path, out: Path) -> None:
    """The other players that a recipe sells, as the last stage left them, each in a bundle of its own."""
    from safetensors.torch import load_model

    for name, sampling in recipe.beside.items():
        network = picture_partner(name, recipe.name, teacher)
        load_model(network, run / recipe.stages[-1].name / f"{name}.safetensors")
        write_student(replace(recipe, sampling=sampling, student=Student()), teacher, network, beside_of(out, name))


def sell_parts(
    recipe: Recipe, teacher: Bundle, run: Path, out: Path, last: Bundle, source: LatentSource
) -> None:  # fmt: skip
    """The students of all parts of the conditions but the last, which is `out`'s, and the file that groups them."""
    from safetensors.torch import load_model

    stages = [stage for stage in recipe.stages if stage.cell is not None]
    students = []
    for stage in stages[:-1]:
        network = build_student(teacher, recipe.student, fold_scale=1.0)
        load_model(network, run / stage.name / "student.safetensors")
        students.append(write_student(recipe, teacher, network, beside_of(out, stage.name)))
    if stages and stages[-1].cell is not None:
        chosen = CellSource(source, stages[-1].cell).centroids
        write_group(out.with_name(out.name + ".group.json"), [*students, last], chosen)
