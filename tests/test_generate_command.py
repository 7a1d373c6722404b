import json

import numpy as np
import pytest
from PIL import Image

from fewstep.runtime.commands import generate
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineUnavailable, InvalidRequest
from fewstep.runtime.sampling.infotext import read_infotext
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import Control, GenerateRequest


def test_it_writes_the_dull_loops_picture_and_says_what_it_did(tiny_lcm, tmp_path, capsys):
    out = tmp_path / "cat.png"
    assert (
        generate([str(tiny_lcm.root), "a cat", "--steps", "2", "--seed", "3", "--guidance", "2", "--out", str(out)])
        == 0
    )
    expected = run_request(
        TorchEngine(tiny_lcm), tiny_lcm, GenerateRequest(prompt="a cat", steps=2, seed=3, guidance=2.0)
    )
    image = Image.open(out)
    assert np.array_equal(np.array(image), expected.pictures[0])
    text = image.text.pop("parameters")
    assert image.text == {"prompt": "a cat", "model": "tiny-lcm", "steps": "2", "guidance": "2", "seed": "3"}
    found = read_infotext(text)
    assert {name: found[name] for name in ("Prompt", "Steps", "Sampler", "CFG scale", "Seed", "Size", "Model")} == {
        "Prompt": "a cat", "Steps": "2", "Sampler": "lcm", "CFG scale": "2", "Seed": "3", "Size": "32x32",
        "Model": "tiny-lcm",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "cat.png  seed 3" in said and "tiny-lcm on torch: 2 steps, guidance 2" in said and " ms (text " in said


def test_several_pictures_and_json(tiny_teacher, tmp_path, capsys):
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(tmp_path / "edge.png")
    arguments = [str(tiny_teacher.root), "a cat", "--steps", "1", "--seed", "5", "--n", "2", "--negative", "dog"]
    arguments += ["--control", str(tmp_path / "edge.png"), "--control-scale", "0.5"]
    assert generate([*arguments, "--out", str(tmp_path / "p.jpg"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == [str(tmp_path / "p-1.jpg"), str(tmp_path / "p-2.jpg")]
    assert (report["seeds"], report["engine"], report["nfe"], report["notes"]) == ([5, 6], "torch", 2, [])
    assert set(report["timings"]) == {
        "queue_s",
        "text_s",
        "denoise_s",
        "decode_s",
        "total_s",
        "predicted_s",
        "encode_s",
    }
    edge = np.repeat((np.eye(32, dtype=np.uint8) * 255)[:, :, None], 3, axis=2)
    request = GenerateRequest(
        prompt="a cat", negative_prompt="dog", steps=1, seed=5, control=Control(edge=edge, scale=0.5)
    )
    expected = run_request(TorchEngine(tiny_teacher), tiny_teacher, request).pictures[0]
    assert np.abs(np.array(Image.open(report["files"][0])).astype(int) - expected).mean() < 10


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["--out", "x.bmp"], InvalidRequest, "must be one of .png"),
        (["--out", "nowhere/x.png"], InvalidRequest, "does not exist"),
        (["--out", "x.png", "--steps", "3"], InvalidRequest, "steps is 3"),
        (["--out", "x.png", "--control", "none.png"], InvalidRequest, "No such file"),
        (["--out", "x.png", "--control-scale", "1"], InvalidRequest, "needs --control"),
        (["--out", "x.png", "--engine", "warp"], EngineUnavailable, "'warp' is unknown"),
    ],
)
def test_wrong_use_is_refused(tiny_lcm, tmp_path, monkeypatch, arguments, error, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        generate([str(tiny_lcm.root), "a cat", *arguments])
    assert list(tmp_path.iterdir()) == []


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        generate(["--help"])
    assert caught.value.code == 0
    assert "example: fewstep generate scenes-lcm" in capsys.readouterr().out
