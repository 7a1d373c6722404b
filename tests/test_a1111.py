"""A1111's API: the calls of Open WebUI and SillyTavern as those programs send them, units, and whose job is whose."""

import base64
import io
import json
import threading
import time
from dataclasses import replace

import httpx
import pytest
from live import Live, fake_server, until
from PIL import Image

from fewstep.models.spec import Guidance, Spacing
from fewstep.runtime.engines.fake_engine import fake_spec
from fewstep.runtime.sampling.events import Progress
from fewstep.runtime.sampling.images import read_metadata
from fewstep.runtime.sampling.request import Lora
from fewstep.server.sessions import MAX_CALLERS, Running, Seat, Sessions
from fewstep.server.settings import Settings
from fewstep.server.wire_a1111 import A1111Body, a1111_job

TEACHER = {
    "sampler": "ddim",
    "grids": {},
    "spacing": Spacing(kind="trailing", max_steps=50),
    "stochastic": False,
    "boundary": None,
    "guidance": Guidance(mode="cfg", default=3.0, range=(1.0, 9.0)),
}


@pytest.fixture(scope="module")
def live():
    with fake_server() as server:
        yield server


def b64(size: tuple[int, int] = (64, 64), mode: str = "RGB", color: object = 255) -> str:
    file = io.BytesIO()
    Image.new(mode, size, color if mode != "RGB" else (color,) * 3).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def post(live: Live, route: str, **body: object) -> httpx.Response:
    return live.http.post(f"/sdapi/v1/{route}", json={"prompt": "a red circle", "seed": 3, **body})


def info(reply: httpx.Response) -> dict:
    assert reply.status_code == 200, reply.text
    return json.loads(reply.json()["info"])


def test_open_webui_sets_a_model_and_makes_a_picture():
    """`routers/images.py`, engine automatic1111: options are read, sent back changed, and a picture is asked for."""
    auth = {"authorization": "Basic " + base64.b64encode(b"user:secret").decode()}
    with fake_server(Settings(api_keys=("secret",))) as live, httpx.Client(base_url=live.url, headers=auth) as http:
        assert http.get("/sdapi/v1/options").status_code == 200  # the "verify connection" button
        models = http.get("/sdapi/v1/sd-models").json()
        assert [(model["title"], model["model_name"]) for model in models] == [("fake", "fake")]
        options = http.get("/sdapi/v1/options").json()
        options["sd_model_checkpoint"] = models[0]["title"]
        assert http.post("/sdapi/v1/options", json=options).status_code == 200
        body = {"prompt": "a red circle", "batch_size": 2, "width": 64, "height": 64, "steps": 50}
        reply = http.post("/sdapi/v1/txt2img", json={**body, "negative_prompt": "blurry"}).json()
        assert len(reply["images"]) == 2 and json.loads(reply["info"])["steps"] == 8
        assert Image.open(io.BytesIO(base64.b64decode(reply["images"][0]))).size == (64, 64)
        assert live.http.post("/sdapi/v1/txt2img", json=body).status_code == 401


SILLY_TAVERN = {
    "url": "http://localhost:8000",
    "auth": "",
    "prompt": "a red circle",
    "negative_prompt": "lowres, bad anatomy",
    "sampler_name": "lcm",
    "scheduler": "automatic",
    "steps": 20,
    "cfg_scale": 7,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1.5,
    "seed": -1,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "clip_skip": 1,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": ""},
    "override_settings_restore_afterwards": True,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
"""What its extension sends to its own backend, which hands it on whole."""


def test_silly_tavern_connects_chooses_a_model_and_draws(live: Live):
    """`src/endpoints/stable-diffusion.js`: ping, lists for its menus, set-model with its waiting, generate."""
    assert live.http.get("/sdapi/v1/options").status_code == 200
    for route, key in (("samplers", "name"), ("schedulers", "name"), ("upscalers", "name"), ("sd-models", "title")):
        assert all(item[key] for item in live.http.get(f"/sdapi/v1/{route}").json()), route
    assert live.http.get("/sdapi/v1/latent-upscale-modes").json() == []
    assert isinstance(live.http.get("/sdapi/v1/sd-vae").json(), list)
    assert live.http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "fake"}).status_code == 200
    idle = live.http.get("/sdapi/v1/progress").json()
    assert idle["progress"] == 0.0 and idle["state"]["job_count"] == 0
    assert live.http.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "fake"
    assert "forge_preset" not in live.http.get("/sdapi/v1/options").json()
    reply = live.http.post("/sdapi/v1/txt2img", json=SILLY_TAVERN)
    said = info(reply)
    assert len(reply.json()["images"]) == 1 and (said["steps"], said["cfg_scale"], said["sampler_name"]) == (
        8,
        7,
        "lcm",
    )
    notes = "\n".join(said["notes"])
    assert "not 20" in notes and "negative_prompt is not heard" in notes and "hr_scale" in notes


def test_silly_tavern_closing_ends_its_own_job_and_no_other():
    """It aborts its request and posts an interrupt, in whichever order they arrive; its other job goes on."""
    with fake_server(delay_s=0.1) as live, httpx.Client(base_url=live.url, timeout=20) as http:
        other = threading.Thread(target=lambda: kept.append(post(live, "txt2img", steps=8)))
        kept: list[httpx.Response] = []
        with pytest.raises(httpx.ReadTimeout):
            http.post("/sdapi/v1/txt2img", json={"prompt": "leaves", "steps": 8}, timeout=0.3)
        until(lambda: live.runtime.metrics().live == 0)
        other.start()
        until(lambda: live.runtime.metrics().live == 1)
        assert live.http.post("/sdapi/v1/interrupt").json() == {}
        other.join()
        assert kept[0].status_code == 200
        assert live.runtime.metrics().failed == {"Cancelled": 1}


def test_progress_and_interrupt_are_the_callers_own():
    keys = ("one", "two")
    with fake_server(Settings(api_keys=keys), delay_s=0.1) as live:
        one, two = (httpx.Client(base_url=live.url, auth=("user", key), timeout=20) for key in keys)
        replies: list[httpx.Response] = []
        body = {"prompt": "a", "steps": 8, "force_task_id": "mine"}
        making = threading.Thread(target=lambda: replies.append(one.post("/sdapi/v1/txt2img", json=body)))
        with one, two:
            making.start()
            until(lambda: one.get("/sdapi/v1/progress").json()["state"]["sampling_step"] >= 2)
            seen = one.get("/sdapi/v1/progress", params={"task_id": "mine"}).json()
            assert 0 < seen["progress"] < 1 and seen["eta_relative"] > 0 and seen["state"]["job_count"] == 1
            assert one.get("/sdapi/v1/progress", params={"task_id": "no"}).json()["state"]["job_count"] == 0
            assert two.get("/sdapi/v1/progress").json()["progress"] == 0.0
            two.post("/sdapi/v1/interrupt")
            one.post("/sdapi/v1/interrupt", params={"task_id": "another"})
            assert live.runtime.metrics().live == 1
            one.post("/sdapi/v1/interrupt")
            making.join()
        assert replies[0].status_code == 499 and replies[0].json()["error"] == "cancelled"


def test_a_chosen_model_is_the_callers_own():
    with fake_server(Settings(api_keys=("one", "two"))) as live:
        one, two = (httpx.Client(base_url=live.url, auth=("user", key)) for key in ("one", "two"))
        with one, two:
            assert one.post("/sdapi/v1/options", json={"live_previews_enable": True}).status_code == 200
            assert one.get("/sdapi/v1/options").json()["live_previews_enable"] is True
            assert two.get("/sdapi/v1/options").json()["live_previews_enable"] is False


def test_a_teacher_hears_a_negative_prompt_and_any_step_count():
    with fake_server(spec=fake_spec(**TEACHER)) as live:
        said = info(post(live, "txt2img", steps=20, cfg_scale=7, negative_prompt="blurry"))
        assert (said["steps"], said["cfg_scale"], said["negative_prompt"], said["notes"]) == (20, 7.0, "blurry", [])
        assert info(post(live, "txt2img", steps=150, cfg_scale=30))["steps"] == 50


def test_a_negative_prompt_goes_to_the_attention_of_a_model_that_hears_it_there(live: Live):
    models = live.runtime.models
    hears = replace(models["fake"], offers=replace(models["fake"].offers, negative="nag"))
    call = a1111_job(A1111Body(prompt="a", negative_prompt="blurry"), None, {"fake": hears})
    assert (call.job.request.negative_mode, call.job.request.negative_prompt, call.notes) == ("nag", "blurry", ())
    deaf = a1111_job(A1111Body(prompt="a", negative_prompt="blurry"), None, models)
    assert deaf.job.request.negative_prompt is None and "not heard" in deaf.notes[0]


def test_loras_in_a_prompt_are_loras(live: Live):
    call = a1111_job(A1111Body(prompt="a cat <lora:ink:0.8> <lora:old:-1>"), None, live.runtime.models)
    assert (call.job.request.prompt, call.job.request.loras) == ("a cat", (Lora("ink", 0.8), Lora("old", -1.0)))
    assert live.http.get("/sdapi/v1/loras").json() == []


def test_seeds_repeat_and_a_batch_counts_up(live: Live):
    first = post(live, "txt2img", batch_size=2, n_iter=2)
    assert info(first)["all_seeds"] == [3, 4, 5, 6]
    pictures = first.json()["images"]
    assert post(live, "txt2img", seed=5).json()["images"][0] == pictures[2]
    assert post(live, "txt2img", send_images=False).json()["images"] == []


def test_pictures_carry_their_parameters_and_give_them_back(live: Live):
    for form in ("png", "jpg", "webp"):
        settings = {"samples_format": form}
        image = post(live, "txt2img", steps=4, override_settings=settings).json()["images"][0]
        found = live.http.post("/sdapi/v1/png-info", json={"image": image}).json()
        assert found["parameters"]["Prompt"] == "a red circle" and found["parameters"]["Seed"] == "3"
        assert found["info"] == read_metadata(base64.b64decode(image))["parameters"]
    for said in ("2024", "[1]", "null"):  # another program's description
        file, exif = io.BytesIO(), Image.Exif()
        exif[0x010E] = said
        Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
        image = base64.b64encode(file.getvalue()).decode()
        found = live.http.post("/sdapi/v1/png-info", json={"image": image})
        assert (found.status_code, found.json()) == (200, {"info": "", "items": {}, "parameters": {}})
    assert live.http.post("/sdapi/v1/png-info", json={"image": b64()}).json() == {
        "info": "",
        "items": {},
        "parameters": {},
    }


def unit(**changes: object) -> dict:
    return {
        "controlnet": {"args": [{"enabled": True, "module": "none", "model": "control", "image": b64(), **changes}]}
    }


def test_a_unit_is_a_control_picture(live: Live):
    plain = post(live, "txt2img").json()["images"]
    followed = post(live, "txt2img", alwayson_scripts=unit(weight=1.5)).json()["images"]
    native = live.generate(seed=3, control={"image_b64": b64(), "scale": 1.5}).json()["pictures"][0]["b64"]
    assert followed == [native] and followed != plain
    words = {"resize_mode": "Crop and Resize", "control_mode": "Balanced", "model": "None", "module": None}
    for same in ({"image": b64((100, 64))}, {"image": {"image": b64(), "mask": None}}, {"processor_res": 512}, words):
        assert post(live, "txt2img", alwayson_scripts=unit(weight=1.5, **same)).json()["images"] == followed
    alias = {"ControlNet": {"args": [{"input_image": b64(), "weight": 1.5, "guidance": 1.0, "lowvram": True}]}}
    assert post(live, "txt2img", alwayson_scripts=alias).json()["images"] == followed
    for off in ({"enabled": False}, {"guidance_start": 0.9, "weight": 1.5}):
        assert post(live, "txt2img", alwayson_scripts=unit(**off)).json()["images"] == plain


def test_units_are_discovered(live: Live):
    assert live.http.get("/controlnet/version").json()["version"] >= 2
    assert live.http.get("/controlnet/model_list").json() == {"model_list": ["control"]}
    assert live.http.get("/controlnet/module_list").json()["module_list"] == ["none"]


def test_img2img_begins_from_a_picture_and_paints_where_the_mask_is_white(live: Live):
    left = Image.new("L", (64, 64))
    left.paste(255, (0, 0, 32, 64))
    file = io.BytesIO()
    left.save(file, "PNG")
    mask = base64.b64encode(file.getvalue()).decode()
    grey = {"init_images": ["data:image/png;base64," + b64(color=120)], "mask_blur": 0}
    image = post(live, "img2img", **grey, mask=mask).json()["images"][0]
    made = Image.open(io.BytesIO(base64.b64decode(image)))
    assert {made.getpixel((x, 40)) for x in range(32, 64)} == {(120, 120, 120)}
    assert {made.getpixel((x, 40)) for x in range(32)} != {(120, 120, 120)}
    turned = post(live, "img2img", **grey, mask=mask, inpainting_mask_invert=1).json()["images"][0]
    assert Image.open(io.BytesIO(base64.b64decode(turned))).getpixel((4, 40)) == (120, 120, 120)
    reply = post(live, "img2img", init_images=[b64((200, 100), color=120)], denoising_strength=0.4, resize_mode=2)
    assert info(reply)["denoising_strength"] == 0.4 and reply.json()["parameters"]["init_images"] is None
    assert info(post(live, "img2img", **grey, denoising_strength=1.0, include_init_images=True))["steps"] == 4


WRONG = [
    ("txt2img", {"prompt": ""}, 422, "prompt", "empty"),
    ("txt2img", {"width": 512, "height": 512}, 422, "width", "64x64"),
    ("txt2img", {"enable_hr": True}, 422, "enable_hr", "second pass"),
    ("txt2img", {"script_name": "x/y/z plot"}, 422, "script_name", "no scripts"),
    ("txt2img", {"seed": "many"}, 422, "seed", "integer"),
    ("txt2img", {"seed": -2}, 422, "seed", "seed is -2"),
    ("txt2img", {"batch_size": 0}, 422, "batch_size", "1 or more"),
    ("txt2img", {"batch_size": 11}, 422, "batch_size", "1 to 10"),
    ("txt2img", {"prompt": "\ud800"}, 422, "prompt", "Unicode"),
    ("txt2img", {"prompt": "a <lora:x:1.2.3>"}, 422, "prompt", "number"),
    ("txt2img", {"prompt": "a <lora:none:0.5>"}, 422, "prompt", "LoRA"),
    ("txt2img", {"override_settings": {"sd_model_checkpoint": "v1-5"}}, 404, "sd_model_checkpoint", "fake"),
    ("txt2img", {"override_settings": {"samples_format": "avif"}}, 422, "samples_format", "png"),
    ("txt2img", {"alwayson_scripts": {"ADetailer": {"args": []}}}, 422, "alwayson_scripts", "not found"),
    ("txt2img", {"alwayson_scripts": {"controlnet": []}}, 422, "alwayson_scripts", "no args"),
    ("txt2img", {"alwayson_scripts": unit(image="%%")}, 422, "controlnet.args.0.image", "base64"),
    ("txt2img", {"alwayson_scripts": unit(image=None)}, 422, "controlnet.args.0.image", "missing"),
    ("txt2img", {"alwayson_scripts": unit(module="canny")}, 422, "controlnet.args.0.module", "trace"),
    ("txt2img", {"alwayson_scripts": unit(model="depth [x]")}, 422, "controlnet.args.0.model", "control"),
    ("txt2img", {"alwayson_scripts": unit(weight="much")}, 422, "controlnet.args.0.weight", "number"),
    ("txt2img", {"alwayson_scripts": unit(control_mode=1)}, 422, "controlnet.args.0.control_mode", "balanced"),
    ("txt2img", {"alwayson_scripts": unit(resize_mode=7)}, 422, "controlnet.args.0.resize_mode", "crop"),
    ("img2img", {}, 422, "init_images", "0 pictures"),
    ("img2img", {"init_images": ["http://localhost/x.png"]}, 422, "init_images", "fetches none"),
    ("img2img", {"init_images": [b64()], "mask": "AAAA"}, 422, "mask", "PNG"),
    ("img2img", {"init_images": [b64()], "mask": b64(color=0)}, 422, "mask", "keeps the whole picture"),
    ("img2img", {"init_images": [b64()], "denoising_strength": 0}, 422, "denoising_strength", "above 0"),
    ("img2img", {"init_images": [b64()], "resize_mode": 3}, 422, "resize_mode", "0 (resize)"),
    ("options", {"sd_model_checkpoint": "v1-5"}, 404, "sd_model_checkpoint", "fake"),
    ("options", {"sd_vae": "other"}, 422, "sd_vae", "fixed here"),
]


@pytest.mark.parametrize(("route", "body", "status", "field", "part"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_by_name(live: Live, route: str, body: dict, status: int, field: str, part: str):
    sent = body if route == "options" else {"prompt": "a red circle", **body}
    reply = live.http.post(f"/sdapi/v1/{route}", content=json.dumps(sent), headers={"Content-Type": "application/json"})
    error = reply.json()
    assert reply.status_code == status, reply.text
    assert set(error) == {"error", "detail", "body", "errors"}
    assert error["body"].endswith(field) and part in error["detail"]


def test_an_interrupt_means_one_job():
    seat, early, late = Seat(), Running("t1", "a", 1), Running("t2", "b", 1)
    seat.running = [early, late]
    assert seat.current(None) is early and seat.current("b") is late and seat.current("c") is None
    seat.left(Running("t0", "", 1), now_s=10.0)
    assert seat.interrupt(None, now_s=11.0) is None, "it meant the job whose caller hung up"
    assert seat.interrupt(None, now_s=11.0) is early
    seat.left(Running("t0", "", 1), now_s=10.0)
    assert seat.interrupt("b", now_s=11.0) is late, "a named job is meant whatever happened before"
    seat.left(Running("t0", "", 1), now_s=10.0)
    assert seat.interrupt(None, now_s=16.0) is early
    seat.left(early, now_s=20.0)
    assert seat.interrupt(None, now_s=20.0) is early, "an interrupted job's end is no hanging up"


def test_progress_grows_to_one_and_says_when():
    run = Running("t", "", pictures=2)
    assert run.progress == 0.01 and run.eta_s(time.monotonic()) == 0.0
    shares = []
    for step in (1, 2):
        for picture in (0, 1):
            run.note(Progress("t", picture, step, 2))
            shares.append(run.progress)
    assert shares == [0.25, 0.5, 0.75, 1.0] and run.eta_s(run.begun_s + 5.0) == 0.0


def test_callers_are_forgotten_but_not_while_their_job_runs():
    sessions = Sessions()
    busy = sessions.of("busy")
    busy.running.append(Running("t", "", 1))
    for number in range(MAX_CALLERS + 50):
        sessions.of(f"caller {number}").model = "other"
    assert sessions.of("busy") is busy
    assert sessions.of("caller 0").model is None
