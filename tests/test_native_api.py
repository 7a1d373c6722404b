"""The native API: every knob, pictures that belong to their seeds, and progress as server-sent events."""

import base64
import io
import json

import numpy as np
import pytest
from live import Live, fake_server
from PIL import Image

from fewstep.models.spec import Guidance, Spacing
from fewstep.runtime.engines.fake_engine import Fault, fake_spec


@pytest.fixture(scope="module")
def live():
    with fake_server() as server:
        yield server


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def edge_b64(width: int = 64, height: int = 64) -> str:
    file = io.BytesIO()
    Image.new("1", (width, height), 1).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_reply_says_what_was_made_and_how_long_it_took(live: Live):
    reply = live.generate(steps=4, seed=11, n=2).json()
    assert [picture["seed"] for picture in reply["pictures"]] == reply["seeds"] == [11, 12]
    assert (reply["steps"], reply["nfe"], reply["guidance"], reply["model"]) == (4, 4, 3.0, "fake")
    assert (reply["format"], reply["width"], reply["height"]) == ("png", 64, 64)
    times = reply["timings"]
    assert set(times) == {"queue_s", "text_s", "denoise_s", "decode_s", "encode_s", "total_s", "predicted_s"}
    assert all(value >= 0 for value in times.values()) and times["total_s"] >= times["denoise_s"] > 0
    assert pixels(reply["pictures"][0]["b64"]).shape == (64, 64, 3)


def test_a_picture_belongs_to_its_seed(live: Live):
    first = live.generate(seed=5, n=2).json()["pictures"]
    again = live.generate(seed=6).json()["pictures"]
    assert (pixels(first[1]["b64"]) == pixels(again[0]["b64"])).all()
    assert (pixels(first[0]["b64"]) != pixels(first[1]["b64"])).any()


def test_without_a_seed_one_is_drawn_and_returned(live: Live):
    seeds = {live.generate(steps=1).json()["seeds"][0] for _ in range(4)}
    assert len(seeds) > 1 and all(0 <= seed < 2**32 for seed in seeds)
    seed = seeds.pop()
    first, second = (live.generate(steps=1, seed=seed).json()["pictures"][0]["b64"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("knob", [{"guidance": 7.5}, {"steps": 2}, {"prompt": "other"}, {"control": {}}])
def test_every_knob_changes_the_picture(live: Live, knob: dict):
    if "control" in knob:
        knob = {"control": {"image_b64": edge_b64(), "scale": 1.5}}
    plain, changed = live.generate(seed=3), live.generate(seed=3, **knob)
    assert changed.status_code == 200, changed.text
    assert (pixels(plain.json()["pictures"][0]["b64"]) != pixels(changed.json()["pictures"][0]["b64"])).any()


def test_control_outside_its_steps_changes_nothing(live: Live):
    plain = live.generate(seed=3).json()["pictures"][0]["b64"]
    control = {"image_b64": "data:image/png;base64," + edge_b64(), "start": 0.9, "end": 1.0}
    off = live.generate(seed=3, control=control).json()["pictures"][0]["b64"]
    assert (pixels(plain) == pixels(off)).all()


@pytest.mark.parametrize(
    ("width", "height", "part"), [(100, 64, "100x64"), (32, 64, "(64, 32, 3)"), (9000, 9000, "4096")]
)
def test_a_control_picture_of_another_size_is_refused(live: Live, width: int, height: int, part: str):
    reply = live.generate(control={"image_b64": edge_b64(width, height)})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "control.image_b64"
    assert part in reply.json()["error"]["message"]


@pytest.mark.parametrize(("form", "level"), [("png", 9), ("jpeg", 30), ("webp", 60), ("png", None)])
def test_formats_and_levels(live: Live, form: str, level: int | None):
    reply = live.generate(seed=1, format=form, **({} if level is None else {"level": level})).json()
    picture = Image.open(io.BytesIO(base64.b64decode(reply["pictures"][0]["b64"])))
    assert (picture.format, picture.size, reply["format"]) == (form.upper(), (64, 64), form)


def test_a_jpeg_of_lower_level_is_smaller(live: Live):
    sizes = [len(live.generate(seed=1, format="jpeg", level=q).json()["pictures"][0]["b64"]) for q in (5, 95)]
    assert sizes[0] < sizes[1]


def test_a_png_carries_the_request_that_made_it(live: Live):
    reply = live.generate(prompt="a red circle", seed=9, steps=2).json()
    text = Image.open(io.BytesIO(base64.b64decode(reply["pictures"][0]["b64"]))).text
    assert (text["prompt"], text["seed"], text["steps"], text["model"]) == ("a red circle", "9", "2", "fake")


def stream(live: Live, **body) -> list[tuple[str, dict]]:
    headers = {"Accept": "text/event-stream"}
    with live.http.stream("POST", "/v1/generate", json={"prompt": "a red circle", **body}, headers=headers) as reply:
        if reply.status_code != 200:
            reply.read()
            return [("refused", reply.json())]
        assert reply.headers["content-type"].startswith("text/event-stream")
        frames = "".join(reply.iter_text()).split("\n\n")
    assert frames.pop() == ""
    lines = [frame.split("\n") for frame in frames]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


def test_progress_comes_step_by_step_and_the_picture_last(live: Live):
    events = stream(live, steps=4, seed=2, n=2)
    assert [name for name, _ in events[:-1]] == ["progress"] * 8
    for picture in (0, 1):
        steps = [data["step"] for name, data in events if name == "progress" and data["picture"] == picture]
        assert steps == [1, 2, 3, 4]
    name, reply = events[-1]
    assert name == "finished"
    plain = live.generate(steps=4, seed=2, n=2).json()
    assert [p["b64"] for p in reply["pictures"]] == [p["b64"] for p in plain["pictures"]]


def test_progress_carries_previews_where_they_are_asked_for(live: Live):
    shown = [data for name, data in stream(live, steps=4, previews=True) if name == "progress"]
    assert [pixels(data["preview_b64"]).shape[2] for data in shown] == [3] * 4
    assert all("preview_b64" not in data for name, data in stream(live, steps=4) if name == "progress")


def test_a_stream_of_a_bad_request_is_refused_before_it_begins(live: Live):
    ((name, body),) = stream(live, steps=3)
    assert name == "refused" and body["error"]["param"] == "steps"


def test_a_failing_stream_ends_in_the_envelope():
    with fake_server(faults={("decoder", k): Fault("fail") for k in range(2, 99)}) as live:
        while live.generate(steps=1).status_code == 200:
            pass
        name, body = stream(live, steps=2)[-1]
        assert name == "failed"
        assert set(body["error"]) == {"message", "type", "param", "code"} and body["error"]["code"] == "engine_failed"


def test_info_tells_clients_what_a_model_allows(live: Live):
    reply = live.http.get("/v1/info").json()
    (model,) = reply["models"]
    assert (model["name"], model["engine"], model["control"]) == ("fake", "fake", True)
    assert (model["steps"], model["max_steps"], model["default_steps"]) == ([1, 2, 4, 8], None, 4)
    assert model["sizes"] == [[64, 64]]
    assert (model["edit"], model["image_prompt"], model["negative_mode"], model["loras"]) == (True, False, None, [])
    assert model["spec"]["guidance"] == {"mode": "embedded", "default": 3.0, "range": [1.0, 8.0], "zero_empty": False}
    assert reply["limits"]["max_n"] == 10


def test_a_teacher_takes_any_steps_and_a_negative_prompt():
    spec = fake_spec(
        sampler="ddim",
        grids={},
        spacing=Spacing(kind="trailing", max_steps=50),
        stochastic=False,
        boundary=None,
        guidance=Guidance(mode="cfg", default=3.0, range=(1.0, 9.0)),
    )
    with fake_server(spec=spec) as live:
        assert live.http.get("/v1/info").json()["models"][0]["max_steps"] == 50
        reply = live.generate(steps=7, negative_prompt="blue").json()
        assert (reply["steps"], reply["nfe"]) == (7, 14)
        refused = live.images(quality="high")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "quality"
