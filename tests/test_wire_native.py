"""The native body: the size is one of the model's before a picture is unpacked within it."""

import numpy as np
import pytest

from fewstep.runtime.engines.fake_engine import fake_spec
from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.images import MAX_PIXELS
from fewstep.runtime.service.local import Model
from fewstep.server import wire_native
from fewstep.server.wire_native import GenerateBody, generate_job

STEERED = ({"control": {"image_b64": "AAAA"}}, {"edit": {"image_b64": "AAAA", "mask_b64": "AAAA"}})


def served(*sizes: tuple[int, int]) -> dict[str, Model]:
    return {"fake": Model("fake", fake_spec(sizes=sizes), "fake", True)}


@pytest.fixture
def bounds(monkeypatch):
    """The bounds within which pictures were unpacked."""
    found = []

    def unpacked(_text, _field, max_pixels=MAX_PIXELS):
        found.append(max_pixels)
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(wire_native, "picture", unpacked)
    monkeypatch.setattr(wire_native, "grey", unpacked)
    return found


@pytest.mark.parametrize("steered", STEERED)
@pytest.mark.parametrize(
    ("size", "blamed"),
    [
        ({"width": -5}, "width"),
        ({"width": 0}, "width"),
        ({"width": -5, "height": -5}, "width"),
        ({"width": 10**6, "height": 10**6}, "width"),
        ({"width": 64, "height": 10**9}, "height"),
        ({"height": 0}, "height"),
        ({"width": 96, "height": 64}, "width"),
        ({"height": 96}, "height"),
    ],
)
def test_a_size_that_is_none_of_the_models_is_refused_before_pictures_are_unpacked(bounds, steered, size, blamed):
    with pytest.raises(InvalidRequest, match="this model makes 64x64, 96x96") as caught:
        generate_job(GenerateBody(prompt="a", **size, **steered), served((64, 64), (96, 96)))
    assert caught.value.field == blamed and str(caught.value).startswith(f"{blamed} is {size[blamed]}: ")
    assert bounds == []


@pytest.mark.parametrize("steered", STEERED)
def test_pictures_are_unpacked_within_the_size_asked_for_and_what_any_may_have(bounds, steered):
    generate_job(GenerateBody(prompt="a", width=96, height=96, **steered), served((64, 64), (96, 96)))
    generate_job(GenerateBody(prompt="a", **steered), served((64, 64), (96, 96)))
    generate_job(GenerateBody(prompt="a", **steered), served((8192, 8192)))
    assert sorted(set(bounds)) == [64 * 64, 96 * 96, MAX_PIXELS]
