"""PPCL on transformers of several families: from an imported folder to a pruned student that is exported and served."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from live import serving
from test_probing import calm, shake

from fewstep.export import commands as export_commands
from fewstep.models.bundle import load_component
from fewstep.models.importing import import_folder
from fewstep.models.known import known
from fewstep.models.pipeline_folder import replace_weights
from fewstep.models.shapes import make_folder
from fewstep.runtime.commands import generate
from fewstep.runtime.service.local import Runtime
from fewstep.trainers.bench.commands import distill as command
from fewstep.trainers.errors import CheckpointError, RecipeError
from fewstep.trainers.networks.surgery import Run
from fewstep.trainers.runs import distill as module
from fewstep.trainers.runs.distill import distill
from fewstep.trainers.runs.settling import training_data

SHAPES = {"pixart": ("pixart-sigma-tiny", "pixart-sigma"), "sd3": ("sd3-tiny", "sd3"), "sana": ("sana-tiny", "sana")}
LAYERS, PLANTED = 6, Run("transformer_blocks", 1, 3)
LEFT = {"sana": 1e-7}  # a product of three weights where the others have two
FAST = {"batch": 4, "scenes": 12, "picture_every": 0, "checkpoint_every": 1, "bf16": False, "fp16_weights": False}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Name -> a bundle whose transformer has six layers, three in a row planted that do next to nothing; made once."""
    root, made = tmp_path_factory.mktemp("ppcl"), {}

    def get(name, *, planted=True):
        key = name if planted else f"{name}-plain"
        if key not in made:
            shape, checkpoint = SHAPES[name]
            folder = make_folder(shape, root / f"{key}-folder")
            network = load_component(folder, "transformer")
            torch.manual_seed(3)
            changes = {"num_layers": LAYERS}
            deeper = type(network).from_config({**network.config, **changes})
            if planted:
                calm(shake(deeper), (1, 2, 3), left=LEFT.get(name, 1e-3))
            replace_weights(folder / "transformer", deeper)
            answers = replace(known(checkpoint), steps=(1, 2, 4))
            made[key] = import_folder(folder, root / key, answers=answers, sizes=[(64, 64)])
        return made[key]

    return get


@pytest.fixture(scope="module")
def pruned(teachers, tmp_path_factory):
    root, made = tmp_path_factory.mktemp("pruned"), {}

    def get(name):
        if name not in made:
            made[name] = distill("ppcl", teachers(name), root / name, FAST | {"steps": 2}, device="cpu")
        return made[name]

    return get


@pytest.mark.parametrize("name", SHAPES)
def test_the_planted_run_goes_and_the_rest_stays(teachers, pruned, name):
    teacher, student = teachers(name), pruned(name)
    assert json.loads((student.root.with_name(name + ".run") / "runs.json").read_text()) == {"runs": [str(PLANTED)]}
    assert student.config("transformer")["num_layers"] == LAYERS - 2
    before, after = teacher.load("transformer").state_dict(), student.load("transformer").state_dict()
    places = {0: 0, 1: 2, 2: 4, 3: 5}
    changed = set()
    for key, weight in after.items():
        stack, _, rest = key.partition(".")
        if stack == "transformer_blocks":
            number, _, tail = rest.partition(".")
            key = f"{stack}.{places[int(number)]}.{tail}"
        if not torch.equal(weight, before[key]):
            changed.add(key.split(".")[1] if stack == "transformer_blocks" else key)
    assert changed == {"2"}, "the new layer alone trains, and began as the middle one of its run"


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_sampled_as_its_teacher(teachers, pruned, name):
    teacher, student = teachers(name), pruned(name)
    assert student.spec == replace(teacher.spec, recipe="ppcl", teacher=teacher.name)
    for file in ("scheduler/scheduler_config.json", "model_index.json"):
        assert json.loads((student.root / file).read_text()) == json.loads((teacher.root / file).read_text())
    pipeline = DiffusionPipeline.from_pretrained(student.root, local_files_only=True)
    assert pipeline.transformer.config.num_layers == LAYERS - 2


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_training_brings_the_new_layer_nearer(teachers, tmp_path, name):
    """Three layers that do count, in one: both ways of feeding learn, by the same loss."""
    run = "transformer_blocks.2-4"
    settings = FAST | {"steps": 40, "lr": 3e-3, "runs": [run], "checkpoint_every": 0}
    student = distill("ppcl", teachers(name, planted=False), tmp_path / name, settings, device="cpu")
    rows = [json.loads(line) for line in (tmp_path / f"{name}.run/ppcl/metrics.jsonl").read_text().splitlines()]
    assert student.config("transformer")["num_layers"] == LAYERS - 2 and len(rows) == 40
    for led in (0, 1):
        losses = [row["feature"] for row in rows if row["step"] % 2 == led]
        first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
        assert last < 0.8 * first, f"feature loss went from {first:.3f} to {last:.3f}"


def test_a_dry_run_names_the_runs(teachers, capsys):
    args = ["ppcl", "--teacher", str(teachers("pixart").root), "--dry-run", "--set", "scenes=12"]
    assert command(args) == 0
    found = json.loads(capsys.readouterr().out)
    player = found["estimate"]["players"]["student"]
    assert found["estimate"]["runs"] == [str(PLANTED)] and 0 < player["trained"] < player["parameters"] / 2


def test_a_cut_run_resumes_to_the_same_student(teachers, pruned, tmp_path, monkeypatch):
    out, real = tmp_path / "student", module.train

    def cut(method, source, loop, folder, **kwargs):
        if not kwargs["resume"]:
            real(method, source, replace(loop, steps=1), folder, **kwargs)
            raise KeyboardInterrupt
        return real(method, source, loop, folder, **kwargs)

    monkeypatch.setattr(module, "train", cut)
    settings = FAST | {"steps": 2}
    with pytest.raises(KeyboardInterrupt):
        distill("ppcl", teachers("pixart"), out, settings, device="cpu")
    resumed = distill("ppcl", teachers("pixart"), out, settings, device="cpu", resume=True)
    assert resumed.load("transformer").state_dict().keys() == pruned("pixart").load("transformer").state_dict().keys()
    weights = pruned("pixart").load("transformer").state_dict()
    assert all(torch.equal(weights[k], w) for k, w in resumed.load("transformer").state_dict().items())
    (tmp_path / "student.run/runs.json").write_text('{"runs": ["nonsense"]}')
    with pytest.raises(CheckpointError, match=r"runs\.json holds no runs"):
        distill("ppcl", teachers("pixart"), out, settings, device="cpu", resume=True)


def test_the_pruned_student_is_exported_verified_and_served(pruned, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    root = pruned("pixart").root
    assert export_commands.export([str(root), "--engine", "onnx", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["component"]: row for row in report["engines"] if row["engine"] == "onnx"}
    assert report["ok"] and rows["denoiser"]["max_relative_error"] < 1e-4
    picture = tmp_path / "cat.png"
    assert generate([str(root), "a cat", "--steps", "2", "--seed", "1", "--engine", "onnx", "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    with Runtime([root], engine="onnx") as runtime, serving(runtime) as server:
        answer = server.images(model="pixart", size="64x64", n=1)
        assert answer.status_code == 200 and answer.json()["data"]


@pytest.mark.parametrize("recipe", ["lcm", "bk-sdm", "vdmini", "slim", "linfusion"])
def test_what_is_for_unets_is_refused(teachers, tmp_path, recipe):
    with pytest.raises(RecipeError, match="U-Net"):
        distill(recipe, teachers("pixart"), tmp_path / "out", FAST | {"steps": 2}, device="cpu")


def test_what_cannot_be_pruned_or_sold_is_refused(teachers, tiny_teacher, tmp_path):
    with pytest.raises(RecipeError, match="UNet2DConditionModel has no stack of like layers"):
        distill("ppcl", tiny_teacher, tmp_path / "out", FAST, device="cpu")
    with pytest.raises(RecipeError, match="name that bundle with --teacher"):
        distill("ppcl", teachers("pixart"), tmp_path / "out", FAST | {"init": "x"}, device="cpu")
    with pytest.raises(RecipeError, match="'flow': use ppcl"):
        distill("progressive", teachers("sd3"), tmp_path / "out", FAST, device="cpu")
    with pytest.raises(RecipeError, match=r"this PixArtTransformer2DModel has transformer_blocks\.0-5"):
        distill("ppcl", teachers("pixart"), tmp_path / "out", FAST | {"runs": ["transformer_blocks.5-6"]}, device="cpu")
    with pytest.raises(RecipeError, match="no LoRA to PixArtTransformer2DModel"):
        distill("lcm-lora", teachers("pixart"), tmp_path / "out", FAST | {"rank": 2}, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_few_step_student_of_a_pruned_transformer(teachers, pruned, tmp_path):
    """What works on any network works on transformers, and begins from the pruned one."""
    settings = FAST | {"steps": 1, "init": str(pruned("pixart").root), "start_steps": 4, "final_steps": 2}
    student = distill("progressive", teachers("pixart"), tmp_path / "few", settings, device="cpu")
    assert student.family.name == "pixart" and student.config("transformer")["num_layers"] == LAYERS - 2
    assert student.spec.text == teachers("pixart").spec.text and student.spec.guidance.mode == "none"
    pipeline = DiffusionPipeline.from_pretrained(student.root, local_files_only=True)
    assert type(pipeline).__name__ == "PixArtSigmaPipeline"
    for steps, times in student.spec.grids.items():
        pipeline.scheduler.set_timesteps(steps)
        assert pipeline.scheduler.timesteps.tolist() == list(times)


def test_conditions_are_those_of_the_family(teachers):
    """Text of several encoders, and for SANA the prompt with its instruction and the empty one without."""
    from fewstep.trainers.pictures.data import LatentSource
    from fewstep.trainers.recipes.recipe import configure
    from fewstep.trainers.recipes.registry import RECIPES

    for name, inputs in (("sd3", {"ctx", "pooled"}), ("sana", {"ctx", "ctx_mask"})):
        teacher = teachers(name)
        data = training_data(configure(RECIPES["ppcl"], {"scenes": 3}), teacher)
        batch = LatentSource(data, teacher.text_encoder(), 2, spec=teacher.spec).batch(0)
        assert set(batch.cond) == set(batch.uncond) == inputs
        assert not torch.allclose(batch.cond["ctx"], batch.uncond["ctx"])
    assert float(batch.uncond["ctx_mask"].sum(1)[0]) < float(batch.cond["ctx_mask"].sum(1)[0]) <= 300
