"""Students that are told where their jumps land, from the recipe to the server: trained, exported, verified, served."""

import inspect
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from live import serving

from fewstep.export import commands as exporting
from fewstep.export.graphs import random_feeds
from fewstep.models.spec import Guidance
from fewstep.runtime.commands import generate
from fewstep.runtime.engines.manifest import read_manifest
from fewstep.runtime.engines.registry import open_engine
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineFailed
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import Edit, GenerateRequest
from fewstep.runtime.service.local import Runtime
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.networks.student import Student, build_student
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.runs.distill import distill
from tiny import make_tiny_bundle, through_onnx, tiny_latents, two_times

FAST = {"batch": 4, "steps": 2, "lr": 0.01, "picture_every": 0, "checkpoint_every": 1, "bf16": False}
NAMES = [name for name, recipe in RECIPES.items() if recipe().student.second_time]
EXPORTED = ("meanflow", "ctm")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_tiny_bundle(tmp_path_factory.mktemp("plain") / "teacher", control=False)


@pytest.fixture(scope="module")
def data(teacher):
    return tiny_latents(teacher)


@pytest.fixture(scope="module")
def students(teacher, data, tmp_path_factory):
    """A recipe's name -> its student, trained when first asked for."""
    root = tmp_path_factory.mktemp("told")

    def train(name):
        few = {"pairs": 4, "pair_steps": 2} if "pairs" in inspect.signature(RECIPES[name]).parameters else {}
        return distill(name, teacher, root / name, FAST | few, data=data, device="cpu")

    return cache(train)


@pytest.fixture(scope="module")
def exported(students):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")

    return cache(lambda name: through_onnx(students(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_student_learns_its_second_time_and_says_so(students, teacher, name):
    bundle = students(name)
    assert bundle.spec.second_time and bundle.spec.recipe == name and bundle.spec.teacher == teacher.name
    network = bundle.load("unet")
    assert network.config["fewstep_second_time"] == 1.0
    assert network.time_embedding.second_time.project.weight.abs().max() > 1e-4, "zero where it began"
    index = json.loads((bundle.root / "model_index.json").read_text())
    assert index["unet"] == ["fewstep.models.second_time", "UNet2DConditionModel"]


def test_what_does_not_fit_a_second_time_is_refused(students, teacher, data, tmp_path):
    told = students("ctm")
    with pytest.raises(RecipeError, match=rf"{told.name!r} is told where .*distilled from, {teacher.name!r}"):
        distill("lcm", told, tmp_path / "a", FAST, data=data)
    with pytest.raises(RecipeError, match="this recipe's student would lose"):
        build_student(told, Student(), fold_scale=1.0)
    with pytest.raises(RecipeError, match="a second time and LoRA"):
        build_student(teacher, Student(second_time=True, lora_rank=2), fold_scale=1.0)
    with pytest.raises(RecipeError, match=r"'ctm' of ctm \(Consistency\) tells its student .* takes one time"):
        replace(RECIPES["ctm"](), student=Student())
    with pytest.raises(RecipeError, match=r"student of lcm takes a second time, and stage 'lcm' .* never tells it one"):
        replace(RECIPES["lcm"](), student=Student(second_time=True))
    again = build_student(told, Student(second_time=True), fold_scale=1.0)
    assert list(again.state_dict()) == list(told.load("unet").state_dict()), "a start may have it already"


@pytest.mark.parametrize("name", EXPORTED)
def test_its_graph_takes_the_second_time(exported, name, tmp_path, capsys):
    bundle = exported(name)
    manifest = read_manifest(bundle, "onnx")
    assert manifest.verified and [p.name for p in manifest.roles["denoiser"].inputs] == ["x", "t", "ctx", "s"]
    engine, torch_engine = open_engine(bundle, "onnx"), TorchEngine(bundle)
    assert engine.capabilities.takes_s and engine.name == "onnx"
    feeds = random_feeds(bundle, "denoiser", batch=2, size=(32, 32), seed=3)
    (there,), (here,) = engine.run("denoiser", feeds), torch_engine.run("denoiser", feeds)
    (elsewhere,) = engine.run("denoiser", {**feeds, "s": torch.tensor([-1.0, 700.0])})
    assert torch.allclose(there, here, atol=1e-4) and (elsewhere - there).abs().max() > 1e-3, "s is heard in the graph"
    with pytest.raises(EngineFailed):
        engine.run("denoiser", {name: value for name, value in feeds.items() if name != "s"})
    capsys.readouterr()  # what export and verify said
    command = [str(bundle.root), "a red circle", "--engine", "onnx", "--steps", "2", "--seed", "5", "--json"]
    assert generate([*command, "--out", str(tmp_path / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out)["engine"] == "onnx"


def test_openvino_and_tensorrt_take_the_same_graph(exported):
    pytest.importorskip("openvino")
    pytest.importorskip("tensorrt_rtx")
    from fewstep.export.tensorrt import parses_and_builds

    bundle = exported("ctm")
    assert parses_and_builds(bundle, ("denoiser",)) == {"denoiser": None}
    assert exporting.export([str(bundle.root), "--engine", "openvino"]) == 0
    engine = open_engine(bundle, "openvino")
    assert engine.capabilities.takes_s and engine.name == "openvino"
    feeds = random_feeds(bundle, "denoiser", batch=1, size=(32, 32), seed=4)
    for s in (-1.0, 499.0):
        at = {**feeds, "s": torch.tensor([s])}
        (there,), (here,) = engine.run("denoiser", at), TorchEngine(bundle).run("denoiser", at)
        assert torch.allclose(there, here, atol=1e-4)


def asks():
    grey = np.full((32, 32, 3), 128, np.uint8)
    own = [GenerateRequest(prompt="a red circle", seed=k, steps=steps) for k, steps in enumerate((1, 2, 4, 4))]
    return [*own, GenerateRequest(prompt="b", seed=9, steps=4, edit=Edit(image=grey, strength=0.6))]


@pytest.mark.parametrize("name", EXPORTED)
def test_it_is_served_beside_rows_of_other_counts(exported, name):
    bundle = exported(name)
    alone = [run_request(TorchEngine(bundle), bundle, ask).pictures[0].astype(int) for ask in asks()]
    with Runtime([bundle], engine="onnx") as runtime:
        tickets = [runtime.submit(ask) for ask in asks()]
        together = [ticket.result().pictures[0].astype(int) for ticket in tickets]
        assert all(np.abs(a - b).max() <= 1 for a, b in zip(alone, together, strict=True))
        with serving(runtime) as live:
            assert live.generate(seed=2, steps=4).status_code == 200
            assert live.images(size="32x32", n=2).status_code == 200


def test_one_graph_of_all_steps_is_told_every_landing(teacher, tmp_path):
    bundle = two_times(
        teacher, tmp_path / "told", spacing=None, grids={2: (999.0, 499.0)}, guidance=Guidance(mode="none")
    )
    feeds = random_feeds(bundle, "picture-2", batch=2, size=(32, 32), seed=0)
    assert feeds["s"].tolist() == [[499.0, -1.0]] * 2
    network = bundle.network("picture-2")
    assert network.inputs[-5:] == ("t", "s", "a", "b", "z")
    with torch.no_grad():
        whole = network(*(feeds[name] for name in network.inputs))
        ctx = bundle.text_encoder()(feeds["ids"])
        denoiser, x = bundle.denoiser_net(), feeds["x"]
        for k in range(2):
            f = denoiser(x, feeds["t"][:, k], ctx, feeds["s"][:, k])
            x = feeds["a"][:, k, None, None, None] * x + feeds["b"][:, k, None, None, None] * f
            x = x + feeds["z"][:, 0] if k == 0 else x
        assert torch.allclose(whole, bundle.decoder()(x), atol=1e-4)
