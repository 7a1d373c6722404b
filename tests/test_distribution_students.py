"""Students of distribution recipes go the way of any bundle: trained, exported, verified, served."""

import json
from functools import cache

import numpy as np
import pytest
from live import serving

from fewstep.runtime.commands import generate
from fewstep.runtime.engines.manifest import read_manifest
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.service.local import Runtime
from fewstep.trainers.runs.distill import distill
from tiny import make_tiny_bundle, through_onnx, tiny_latents

FAST = {"batch": 4, "steps": 2, "lr": 0.01, "picture_every": 0, "checkpoint_every": 1, "bf16": False}
NAMES = ("dmd2", "sid", "tdm")
"""A score gap with a critic and fresh noise between steps; a score identity of one step; a deterministic student."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    root = tmp_path_factory.mktemp("sold")
    teacher = make_tiny_bundle(root / "teacher", control=False)
    data = tiny_latents(teacher)
    return cache(lambda name: through_onnx(distill(name, teacher, root / name, FAST, data=data, device="cpu")))


@pytest.mark.parametrize("name", NAMES)
def test_every_step_count_it_was_trained_for_is_exported_and_proven(exported, name, tmp_path, capsys):
    bundle = exported(name)
    assert bundle.spec.recipe == name and read_manifest(bundle, "onnx").verified
    capsys.readouterr()  # what export and verify said
    for steps in bundle.spec.grids:
        command = [str(bundle.root), "a red circle", "--engine", "onnx", "--steps", str(steps), "--seed", "5", "--json"]
        assert generate([*command, "--out", str(tmp_path / f"{steps}.png")]) == 0
        assert json.loads(capsys.readouterr().out)["engine"] == "onnx"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_served_as_it_samples_alone(exported, name):
    bundle = exported(name)
    counts = sorted(bundle.spec.grids)
    asks = [GenerateRequest(prompt="a red circle", seed=k, steps=steps) for k, steps in enumerate(counts)]
    alone = [run_request(TorchEngine(bundle), bundle, ask).pictures[0].astype(int) for ask in asks]
    with Runtime([bundle], engine="onnx") as runtime:
        together = [t.result().pictures[0].astype(int) for t in [runtime.submit(ask) for ask in asks]]
        assert all(np.abs(a - b).max() <= 1 for a, b in zip(alone, together, strict=True))
        with serving(runtime) as live:
            assert live.generate(seed=2, steps=counts[-1]).status_code == 200
