"""A run writes over an earlier student and its run alone; partners go on from where an earlier run left them."""

import json
import shutil

import pytest
import torch

from fewstep.trainers.errors import CheckpointError, RecipeError
from fewstep.trainers.loop.checkpoint import load_checkpoint
from fewstep.trainers.runs.distill import distill
from fewstep.trainers.runs.finetune import by_carrying, carried, finetune
from fewstep.trainers.runs.teacher import TeacherSettings, train_teacher
from fewstep.trainers.runs.tiny_decoder import distill_decoder
from tiny import tiny_latents

FAST = {"batch": 2, "steps": 2, "picture_every": 0, "checkpoint_every": 0, "bf16": False}
CONTROL = FAST | {"scenes": 4}


@pytest.fixture(scope="module")
def data(tiny_teacher):
    return tiny_latents(tiny_teacher)


def pictures(folder):
    """A folder of a user's pictures, which is refused before it is read."""
    folder.mkdir()
    return folder


WRITERS = {
    "a student": lambda s, t, tmp, out: distill("lcm", t, out, FAST | {"guidance_width": 32}, device="cpu"),
    "a ControlNet": lambda s, t, tmp, out: distill("jdm", t, out, CONTROL | {"init": str(s.root)}, device="cpu"),
    "a tuned student": lambda s, t, tmp, out: finetune(s, pictures(tmp / "p"), t, out, FAST, device="cpu"),
    "a carried LoRA": lambda s, t, tmp, out: by_carrying(s, pictures(tmp / "p"), t, out, FAST, device="cpu"),
    "a LoRA carried by hand": lambda s, t, tmp, out: carried(s, t, t, out),
    "a tiny decoder": lambda s, t, tmp, out: distill_decoder(s, out, device="cpu"),
    "a teacher": lambda s, t, tmp, out: train_teacher(out, TeacherSettings(), device="cpu"),
}


@pytest.mark.parametrize("place", ["mine", "mine.run"])
@pytest.mark.parametrize("what", WRITERS)
def test_a_folder_of_something_else_is_refused_before_anything_is_trained(
    what, place, tiny_lcm, tiny_teacher, tmp_path
):
    diary = tmp_path / place / "diary.txt"
    diary.parent.mkdir()
    diary.write_text("Dear diary")
    with pytest.raises(RecipeError, match=f"{place} exists and holds no (bundle|config).json; choose another --out"):
        WRITERS[what](tiny_lcm, tiny_teacher, tmp_path, tmp_path / "mine")
    assert diary.read_text() == "Dear diary"


def test_a_file_in_the_place_of_a_run_is_refused(tiny_teacher, tmp_path):
    (tmp_path / "mine.run").write_text("a file")
    with pytest.raises(RecipeError, match=r"mine\.run exists and holds no config\.json"):
        WRITERS["a student"](None, tiny_teacher, tmp_path, tmp_path / "mine")


@pytest.mark.parametrize("what", [name for name in WRITERS if name not in ("a tuned student", "a teacher")])
def test_what_a_run_reads_is_never_written_over(what, tiny_lcm, tiny_teacher, tmp_path):
    read = tiny_teacher if what == "a student" else tiny_lcm
    with pytest.raises(RecipeError, match="which the run reads; give the student another folder"):
        WRITERS[what](tiny_lcm, tiny_teacher, tmp_path, read.root)
    assert (read.root / "bundle.json").is_file()


def test_a_controlnets_run_is_kept_with_its_configuration(tiny_lcm, tiny_teacher, tmp_path):
    settings, out = CONTROL | {"init": str(tiny_lcm.root), "accumulate": 2}, tmp_path / "control"
    with pytest.raises(CheckpointError, match="holds no run; leave out --resume"):
        distill("control-student", tiny_teacher, out, settings, device="cpu", resume=True)
    distill("control-student", tiny_teacher, out, settings, device="cpu")
    told = json.loads((tmp_path / "control.run" / "config.json").read_text())
    assert told["name"] == "control-student" and told["run"]["scenes"] == 4
    with pytest.raises(CheckpointError, match="differs from this configuration"):
        distill("control-student", tiny_teacher, out, settings | {"lr": 0.5}, device="cpu", resume=True)
    rows = (tmp_path / "control.run" / "control-student" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel": "fsdp"}, "in one process; leave out parallel"),
        ({"picture_every": 10}, "picture_every is 10, and jdm draws no pictures"),
        ({"latents": "kept.safetensors"}, "latents is 'kept.safetensors', and jdm draws scenes"),
        ({"accumulate": 3}, "set batch to 3"),
    ],
)
def test_settings_that_a_controlnets_run_has_no_use_for_are_refused(
    settings, message, tiny_lcm, tiny_teacher, tmp_path
):
    asked = CONTROL | {"init": str(tiny_lcm.root)} | settings
    with pytest.raises(RecipeError, match=message):
        distill("jdm", tiny_teacher, tmp_path / "out", asked, device="cpu")
    assert not list(tmp_path.iterdir())


def test_partners_begin_as_an_earlier_run_left_them(tiny_teacher, data, tmp_path):
    settings = FAST | {"every": 1, "fp16_weights": False}
    first = distill("dmd2", tiny_teacher, tmp_path / "first", settings, data=data, device="cpu")
    further = settings | {"init": str(first.root), "partners": str(tmp_path / "first.run"), "lr": 0.0, "fake_lr": 0.0}
    second = distill("dmd2", tiny_teacher, tmp_path / "second", further, data=data, device="cpu")
    was, now = (load_checkpoint(tmp_path / f"{n}.run" / "dmd2" / "checkpoint.pt") for n in ("first", "second"))
    held = [name for name in was["players"]["fake"] if name.startswith("module.")]
    assert held and all(torch.equal(was["players"]["fake"][n], now["players"]["fake"][n]) for n in held)
    assert now["own_steps"] == {"student": 2, "fake": 4}, "the fake's moments go on, the student's begin anew"
    for mine, theirs in zip(second.load("unet").parameters(), first.load("unet").parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_partners_that_are_not_there_are_refused(tiny_teacher, data, tmp_path):
    def run(recipe, **settings):
        return distill(recipe, tiny_teacher, tmp_path / recipe, FAST | settings, data=data, device="cpu")

    with pytest.raises(RecipeError, match="in lcm the student trains alone; leave it out"):
        run("lcm", guidance_width=32, partners=str(tmp_path))
    with pytest.raises(RecipeError, match=r"holds no run of 'dmd2'; name the OUT\.run"):
        run("dmd2", partners=str(tmp_path))
    run("dmd2")
    with pytest.raises(RecipeError, match="writes anew; choose another --out"):
        run("dmd2", partners=str(tmp_path / "dmd2.run"))
    assert (tmp_path / "dmd2.run" / "dmd2" / "checkpoint.pt").is_file()
    with pytest.raises(RecipeError, match="which the run reads; give the student another folder"):
        run("dmd2", init=str(tmp_path / "dmd2"))
    shutil.rmtree(tmp_path / "dmd2.run")
    run("lcm-lora", rank=2)
    (tmp_path / "lcm-lora.run" / "lcm-lora").rename(tmp_path / "lcm-lora.run" / "dmd2")
    with pytest.raises(RecipeError, match="trained student, and no fake; leave it out"):
        run("dmd2", partners=str(tmp_path / "lcm-lora.run"))
