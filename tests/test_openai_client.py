"""The official `openai` client against a running server: pictures, models, and its own error classes."""

import base64
import io

import openai
import pytest
from live import fake_server, serving
from PIL import Image

from fewstep.runtime.service.local import Runtime
from fewstep.server.settings import Settings


@pytest.fixture(scope="module")
def live(tiny_lcm):
    """A real (tiny) bundle on torch behind the server."""
    with Runtime([tiny_lcm], engine="torch") as runtime, serving(runtime, Settings(api_keys=("secret",))) as server:
        yield server


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="secret", max_retries=0) as client:
        yield client


def open_picture(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_a_picture(client: openai.OpenAI):
    reply = client.images.generate(model="tiny-lcm", prompt="a red circle", size="32x32", n=2)
    assert reply.created > 0 and reply.size == "32x32" and reply.output_format == "png"
    assert [open_picture(item.b64_json).size for item in reply.data] == [(32, 32), (32, 32)]
    assert reply.data[0].b64_json != reply.data[1].b64_json


def test_extensions_go_in_extra_body_and_seeds_repeat(client: openai.OpenAI):
    extra = {"num_inference_steps": 2, "guidance_scale": 4.0, "seed": 7}
    first, again = (client.images.generate(prompt="a red circle", extra_body=extra) for _ in range(2))
    assert first.data[0].b64_json == again.data[0].b64_json
    assert (first.steps, first.guidance, first.seeds) == (2, 4.0, [7])
    raw = client.images.with_raw_response.generate(prompt="a red circle", extra_body=extra)
    assert raw.headers["x-fewstep-seed"] == "7"


@pytest.mark.parametrize(("quality", "steps"), [("low", 1), ("medium", 4), ("auto", 4), ("high", 8), ("hd", 8)])
def test_quality_is_a_step_count(client: openai.OpenAI, quality: str, steps: int):
    assert client.images.generate(prompt="a", quality=quality).steps == steps


def test_what_other_clients_send_along_is_accepted(client: openai.OpenAI):
    reply = client.images.generate(
        prompt="a", user="someone", background="auto", moderation="auto", style="natural", size="auto", stream=False
    )
    assert len(reply.data) == 1 and reply.background == "opaque"


def test_jpeg_with_compression(client: openai.OpenAI):
    reply = client.images.generate(prompt="a", output_format="jpeg", output_compression=40)
    assert reply.output_format == "jpeg" and open_picture(reply.data[0].b64_json).format == "JPEG"


def test_links(client: openai.OpenAI, live):
    url = client.images.generate(prompt="a", response_format="url", output_format="webp").data[0].url
    assert open_picture(base64.b64encode(live.http.get(url).content).decode()).format == "WEBP"


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny-lcm"]
    assert client.models.retrieve("tiny-lcm").owned_by == "fewstep"


def test_a_bad_request_keeps_its_param_and_code(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", size="1024x1024")
    assert (caught.value.param, caught.value.code) == ("size", "invalid_value")
    assert "32x32" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", extra_body={"stepss": 3})
    assert (caught.value.param, caught.value.code) == ("stepss", "unknown_parameter")


def test_a_stream_ends_in_the_picture_that_a_plain_call_makes(client: openai.OpenAI):
    extra = {"seed": 7, "num_inference_steps": 4}
    plain = client.images.generate(prompt="a red circle", extra_body=extra)
    with client.images.generate(prompt="a red circle", stream=True, partial_images=2, extra_body=extra) as stream:
        events = list(stream)
    last = events[-1]
    assert last.type == "image_generation.completed" and last.b64_json == plain.data[0].b64_json
    assert (last.size, last.output_format, last.background, last.quality) == ("32x32", "png", "opaque", "auto")
    assert last.usage.total_tokens == 0 and last.created_at > 0
    assert [event.type for event in events[:-1]] == ["image_generation.partial_image"] * 2
    assert [open_picture(event.b64_json).size for event in events] == [(32, 32)] * 3


def test_error_classes(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a", model="gpt-image-1")
    assert caught.value.code == "model_not_found"
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_the_clients_own_retry_outlasts_an_overload():
    """The first answer is 429 with Retry-After; the client waits as told and gets its picture."""
    from fewstep.runtime.errors import Overloaded

    with fake_server() as live, openai.OpenAI(base_url=live.url + "/v1", api_key="any", max_retries=1) as client:
        accept, asked = live.runtime.submit, []

        def busy_once(*arguments, **beside):
            asked.append(1)
            if len(asked) == 1:
                raise Overloaded("full", retry_after_s=0.2)
            return accept(*arguments, **beside)

        live.runtime.submit = busy_once
        assert len(client.images.generate(prompt="a").data) == 1
        assert len(asked) == 2
