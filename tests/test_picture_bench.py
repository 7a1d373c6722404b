"""`fewstep bench pictures`: every encoder on the same pictures, sizes and ratios as they are."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from fewstep.runtime.bench import picture_bench
from fewstep.runtime.bench.picture_bench import ENCODERS, KINDS, bench_pictures, command, sample_picture, table


def test_every_encoder_is_timed_on_every_picture():
    report = bench_pictures(sides=(16, 32), repeats=2)
    assert report["kind"] == "pictures"
    cases = [(r["picture"], r["side"], r["encoder"]) for r in report["rows"]]
    assert cases == [(kind, side, name) for kind in KINDS for side in (16, 32) for name in ENCODERS]
    assert all(row["p50_ms"] > 0 for row in report["rows"])
    for row in report["rows"]:
        assert row["bytes"] == len(ENCODERS[row["encoder"]](sample_picture(row["picture"], row["side"])))


def test_lossless_encoders_keep_every_pixel():
    picture = sample_picture("photo", 40)
    for name, run in ENCODERS.items():
        back = np.array(Image.open(io.BytesIO(run(picture))).convert("RGB"))
        assert np.array_equal(back, picture) or "quality" in name, name


def test_a_photo_is_harder_to_pack_than_a_drawing_and_neither_is_flat():
    photo, drawing = (sample_picture(kind, 64) for kind in ("photo", "drawing"))
    assert photo.shape == drawing.shape == (64, 64, 3)
    pack = ENCODERS["png, level 6"]
    assert len(pack(photo)) > 4 * len(pack(drawing)) and drawing.std() > 20 and photo.std() > 20


def test_the_command_writes_and_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(picture_bench, "SIDES", (16,))
    monkeypatch.setitem(bench_pictures.__kwdefaults__, "sides", (16,))
    assert command(["--repeats", "1", "--json", str(tmp_path / "p.json")]) == 0
    report = json.loads((tmp_path / "p.json").read_text())
    shown = capsys.readouterr().out
    assert shown.strip() == table(report)
    assert shown.count("1.00x") >= len(KINDS) and report["command"] == "fewstep bench pictures --repeats 1"
    with pytest.raises(SystemExit):
        command(["--repeats", "0"])
    assert "--repeats: '0' is not a whole number of at least 1" in capsys.readouterr().err
