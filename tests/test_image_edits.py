"""OpenAI's edits by form, and streams with partial pictures, through the official client and by hand."""

import base64
import io
import socket
import struct
import zlib

import httpx
import numpy as np
import openai
import pytest
from live import Live, fake_server, until
from PIL import Image

from fewstep.runtime.errors import EngineFailed
from fewstep.runtime.sampling.events import Failed, Finished, Progress, Result, Timings
from fewstep.runtime.service.ticket import Ticket
from fewstep.server.routes_openai import partial_steps
from fewstep.server.settings import Settings
from fewstep.server.uploads import fitted, nearest_size

GREY = (120, 120, 120)


@pytest.fixture(scope="module")
def live():
    with fake_server(Settings(max_body_bytes=1_000_000)) as server:
        yield server


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def file(size: tuple[int, int] = (64, 64), form: str = "PNG", **pieces: object) -> bytes:
    """A grey picture; `clear`: the box of it that is transparent."""
    image = Image.new("RGBA" if "clear" in pieces else "RGB", size, GREY)
    if "clear" in pieces:
        image.paste((0, 0, 0, 0), pieces["clear"])
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


LEFT = (0, 0, 32, 64)


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def edit(live: Live, images: dict[str, bytes] | list, data: dict | None = None) -> httpx.Response:
    parts = list(images.items()) if isinstance(images, dict) else images
    files = [(name, ("a.png", content, "image/png")) for name, content in parts]
    return live.http.post("/v1/images/edits", data={"prompt": "a red circle", "seed": "3", **(data or {})}, files=files)


def made(reply: httpx.Response) -> np.ndarray:
    assert reply.status_code == 200, reply.text
    return pixels(reply.json()["data"][0]["b64_json"])


def test_the_client_edits_where_the_mask_is_transparent(client: openai.OpenAI):
    mask = ("mask.png", file(clear=LEFT), "image/png")
    image = ("image.png", file(), "image/png")
    reply = client.images.edit(image=image, mask=mask, prompt="a red circle", size="64x64", n=2, output_format="png")
    assert (reply.size, reply.output_format, len(reply.data)) == ("64x64", "png", 2)
    for item in reply.data:
        picture = pixels(item.b64_json)
        assert (picture[:, 32:] == 120).all(), "what the mask keeps is kept to the pixel"
        assert (picture[:, :32] != 120).any()


def test_the_client_streams_an_edit(client: openai.OpenAI):
    extra = {"seed": 3, "strength": 0.5}
    plain = client.images.edit(image=("a.png", file()), prompt="a red circle", extra_body=extra)
    stream = client.images.edit(image=[("a.png", file())], prompt="a red circle", stream=True, extra_body=extra)
    last = list(stream)[-1]
    assert last.type == "image_edit.completed" and last.b64_json == plain.data[0].b64_json


def test_open_webui_edits_one_picture_or_the_first_of_a_list(live: Live):
    """`routers/images.py`: text fields, then `image`, or `image[]` for a list, of any size and type."""
    fields = {"model": "fake", "n": "1", "size": "64x64", "background": "auto", "response_format": "b64_json"}
    assert edit(live, {"image": file((300, 200), "JPEG")}, fields).status_code == 200
    assert edit(live, {"image[]": file((300, 200), "WEBP")}, fields).status_code == 200


def test_a_picture_without_a_mask_is_painted_where_it_is_transparent(live: Live):
    picture = made(edit(live, {"image": file(clear=LEFT)}))
    assert (picture[:, 32:] == 120).all() and (picture[:, :32] != 120).any()
    assert (made(edit(live, {"image": file()})) != 120).any()


def test_input_fidelity_is_a_strength(live: Live):
    images = {"image": file()}
    close, free = (made(edit(live, images, {"input_fidelity": word})) for word in ("high", "low"))
    assert (close != free).any()
    assert (close == made(edit(live, images, {"strength": "0.5"}))).all()
    assert (free == made(edit(live, images))).all()


def test_an_edit_is_the_native_edit(live: Live):
    body = {"image_b64": base64.b64encode(file()).decode(), "strength": 0.6}
    native = live.generate(seed=3, edit=body).json()["pictures"][0]["b64"]
    assert (made(edit(live, {"image": file()}, {"strength": "0.6"})) == pixels(native)).all()
    assert (pixels(native) != pixels(live.generate(seed=3).json()["pictures"][0]["b64"])).any()


def test_links_jpegs_and_extensions_go_through_a_form(live: Live):
    data = {"response_format": "url", "output_format": "jpeg", "output_compression": "40", "num_inference_steps": "2"}
    data["strength"] = "1"
    reply = edit(live, {"image": file()}, data).json()
    assert live.http.get(reply["data"][0]["url"]).headers["content-type"] == "image/jpeg"
    assert (reply["steps"], reply["seeds"]) == (2, [3])


def bomb(side: int) -> bytes:
    """A PNG of some hundred bytes that claims side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


WRONG = [
    ({"image": b"hello"}, {}, "image", "not a PNG"),
    ({"image": b""}, {}, "image", "not a PNG"),
    ({"image": file()[:100]}, {}, "image", "damaged"),
    ({"image[]": bomb(5000)}, {}, "image[]", "at most 16777216 pixels"),
    ({"image": bomb(60_000)}, {}, "image", "pixels"),
    ({"image": file(), "mask": file((32, 32), clear=(0, 0, 9, 9))}, {}, "mask", "32x32 and 64x64"),
    ({"image": file(), "mask": file()}, {}, "mask", "opaque all over"),
    ({"image": file(), "mask": bomb(9000)}, {}, "mask", "pixels"),
    ({"image": file()}, {"size": "63x64"}, "size", "64x64"),
    ({"image": file()}, {"size": "99999x99999"}, "size", "64x64"),
    ({"image": file()}, {"strength": "0"}, "strength", "above 0"),
    ({"image": file()}, {"strength": "nan"}, "strength", "above 0"),
    ({"image": file()}, {"strength": "0.4", "input_fidelity": "low"}, "input_fidelity", "send one"),
    ({"image": file()}, {"keep": "colour"}, "keep", "'grey'"),
    ({"image": file()}, {"n": "two"}, "n", "integer"),
    ({"image": file()}, {"prompt": ""}, "prompt", "empty"),
    ({"image": file()}, {"input_fidelty": "low"}, "input_fidelty", "did you mean input_fidelity?"),
    ({"image": file()}, {"mask": "AAAA"}, "mask", "sent as text"),
    ({"image": file(), "prompt": b"a"}, {}, "prompt", "sent as a file"),
    ({"image": file()}, {"partial_images": "2"}, "partial_images", "send stream"),
    ({"image": file()}, {"background": "transparent"}, "background", "opaque"),
]


@pytest.mark.parametrize(("images", "data", "param", "part"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_form_is_refused_by_name(live: Live, images: dict, data: dict, param: str, part: str):
    reply = edit(live, images, data)
    error = reply.json()["error"]
    assert reply.status_code == 400, reply.text
    assert error["param"] == param and part in error["message"]


def test_a_second_picture_needs_a_model_that_reads_it(live: Live):
    reply = edit(live, [("image[]", file()), ("image[]", file())])
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "image[]")
    reply = edit(live, [("image[]", file())] * 3)
    assert reply.status_code == 400 and "3 pictures" in reply.json()["error"]["message"]


def test_what_is_no_form_is_refused(live: Live):
    post = live.http.post
    bare = post("/v1/images/edits", files={"prompt": (None, "a")})
    assert (bare.status_code, bare.json()["error"]["param"]) == (400, "image")
    assert post("/v1/images/edits", json={"prompt": "a"}).json()["error"]["code"] == "invalid_type"
    headers = {"Content-Type": "multipart/form-data"}
    assert post("/v1/images/edits", content=b"x", headers=headers).status_code == 400
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert post("/v1/images/edits", content=b"--b\r\nnonsense", headers=headers).status_code == 400
    assert edit(live, [("image", b"x")] * 40).status_code == 400
    huge = edit(live, {"image": bytes(2_000_000)})
    assert (huge.status_code, huge.json()["error"]["code"]) == (413, "body_too_large")
    assert live.http.get("/health").status_code == 200


def test_partial_pictures_are_spread_over_the_steps():
    assert [sorted(partial_steps(4, n)) for n in range(4)] == [[], [2], [2, 3], [1, 2, 3]]
    assert sorted(partial_steps(1, 3)) == [1] and sorted(partial_steps(2, 3)) == [1, 2]
    assert sorted(partial_steps(30, 2)) == [10, 20]


def told(live: Live, monkeypatch: pytest.MonkeyPatch, last: object) -> None:
    """Let the runtime tell four steps of two pictures with previews, and then `last`."""

    def submit(request, model, *, reply_s=0.0):
        ticket = Ticket("told")
        for step in range(1, 5):
            for number in range(2):
                preview = np.full((8, 8, 3), 50 * step, np.uint8) if request.previews else None
                ticket.publish(Progress("told", number, step, 4, preview))
        ticket.publish(last)
        return ticket

    monkeypatch.setattr(live.runtime, "submit", submit)


@pytest.mark.parametrize(
    ("route", "kind"),
    [("/v1/images/edits", "multipart/form-data; boundary=x"), ("/v1/images/generations", "application/json")],
)
def test_a_caller_who_leaves_while_it_sends_is_no_fault_of_the_server(route: str, kind: str, caplog):
    with fake_server() as live:
        client = socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])))
        head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 5000\r\n\r\n"
        client.sendall(head.encode() + b"--x\r\n")
        client.close()
        counted = f'fewstep_http_responses_total{{route="{route}",status='
        until(lambda: counted in live.http.get("/metrics").text)
        assert counted + '"400"} 1.0' in live.http.get("/metrics").text
    assert "unforeseen" not in caplog.text


def test_the_client_gets_partial_pictures(live: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch):
    pictures = tuple(np.full((64, 64, 3), value, np.uint8) for value in (10, 20))
    result = Result(pictures, (1, 2), 4, 3.0, 4, "fake", (), Timings(0.0, 0.0, 0.0, 0.0, 0.0))
    told(live, monkeypatch, Finished("told", result))
    events = list(client.images.generate(prompt="a", n=2, stream=True, partial_images=3, output_format="webp"))
    partial, final = events[:-2], events[-2:]
    assert [(event.picture, event.partial_image_index) for event in partial] == [
        (p, i) for i in range(3) for p in (0, 1)
    ]
    assert {event.type for event in partial} == {"image_generation.partial_image"}
    assert {event.size for event in partial} == {"64x64"} and {event.output_format for event in partial} == {"webp"}
    assert [pixels(event.b64_json).shape for event in partial] == [(64, 64, 3)] * 6
    assert [int(pixels(event.b64_json)[0, 0, 0]) // 45 for event in partial] == [1, 1, 2, 2, 3, 3]
    assert [(event.type, event.picture, event.seed) for event in final] == [
        ("image_generation.completed", 0, 1),
        ("image_generation.completed", 1, 2),
    ]


def test_a_stream_that_fails_says_so_as_the_client_expects(live: Live, client: openai.OpenAI, monkeypatch):
    told(live, monkeypatch, Failed("told", EngineFailed("it broke")))
    with pytest.raises(openai.APIError, match="it broke"):
        list(client.images.generate(prompt="a", stream=True))


def test_pictures_are_made_to_fit():
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 200
    assert (fitted(wide, 20, 20) == 200).all()
    assert fitted(wide, 20, 20, "stretch")[10, 0, 0] < 50
    filled = fitted(wide, 40, 40, "fill")
    assert filled.shape == (40, 40, 3) and (filled[:10] == 0).all() and (filled[12:28, 12:28] == 200).all()
    assert fitted(wide[:, :, 0], 20, 20).shape == (20, 20) and fitted(wide, 40, 20) is wide
    sizes = [(64, 64), (96, 48), (48, 96), (128, 64)]
    assert nearest_size(wide, sizes) == (96, 48) and nearest_size(np.zeros((30, 31, 3)), sizes) == (64, 64)
    assert nearest_size(np.zeros((100, 200, 3)), sizes) == (128, 64)
