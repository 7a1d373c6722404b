"""The methods on the built-in family, where pictures mean something: each moves them the way that it says."""

import numpy as np
import pytest

from fewstep.models.bundle import REFERENCE, load_bundle
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import Control, Edit, GenerateRequest, Helper
from fewstep.runtime.sampling.served import serve
from fewstep.runtime.sampling.text import Prompts

PROMPT = "a large red circle on a blue background"


@pytest.fixture(scope="module")
def family():
    opened = {}
    for name in ("scenes-teacher", "scenes-lcm"):
        bundle = load_bundle(REFERENCE / name, check_digests=False)
        opened[name] = bundle, TorchEngine(bundle)
    return opened


@pytest.fixture(scope="module")
def models(family):
    return {name: serve(bundle, engine, Prompts(bundle, 16)) for name, (bundle, engine) in family.items()}


def made(family, models, name="scenes-lcm", **settings):
    bundle, engine = family[name]
    request = GenerateRequest(**{"prompt": PROMPT, "seed": 3, "steps": 4, **settings})
    return run_request(engine, bundle, request, prompts=models[name].prompts, models=models)


@pytest.fixture(scope="module")
def scene(family, models):
    return made(family, models, prompt="a small green square on a white background").pictures[0]


def off(one, other):
    return float(np.abs(one.astype(float) - other).mean())


def test_the_weaker_the_edit_the_more_of_the_picture_is_left(family, models, scene):
    found = [made(family, models, edit=Edit(image=scene, strength=s)) for s in (0.25, 0.5, 0.75)]
    distances = [off(result.pictures[0], scene) for result in found]
    assert distances == sorted(distances) and distances[0] < 0.5 * distances[-1], distances
    assert [result.steps for result in found] == [1, 2, 3]


def test_what_lies_outside_the_mask_is_the_scene_and_inside_the_prompt_rules(family, models, scene):
    mask = np.zeros((64, 64), np.uint8)
    mask[12:52, 12:52] = 255
    redness = []
    for colour in ("red", "green"):
        asked = {"prompt": f"a large {colour} circle", "edit": Edit(image=scene, mask=mask, strength=1.0)}
        found = made(family, models, **asked).pictures[0]
        assert np.array_equal(found[mask == 0], scene[mask == 0])
        middle = found[20:44, 20:44].reshape(-1, 3).astype(float).mean(axis=0)
        redness.append(middle[0] - middle[1])
    assert redness[0] > redness[1] + 15, redness


def test_a_grey_scene_is_coloured_as_the_prompt_says(family, models):
    truth = made(family, models).pictures[0]
    grey = np.repeat((truth @ [0.2989, 0.587, 0.114])[..., None], 3, axis=-1).round().astype(np.uint8)
    found = made(family, models, edit=Edit(image=grey, keep="grey", strength=1.0)).pictures[0]
    luminance = [picture @ np.array([0.2989, 0.587, 0.114]) / 0.9999 for picture in (found, grey)]
    assert np.abs(luminance[0] - luminance[1]).max() <= 1.0
    assert off(found, truth) < 0.8 * off(grey, truth), "the colours come back"


def test_a_coarse_scene_is_sharpened_with_its_means_kept(family, models):
    truth = made(family, models).pictures[0]
    means = truth.reshape(8, 8, 8, 8, 3).astype(float).mean(axis=(1, 3))
    coarse = np.repeat(np.repeat(means.round(), 8, axis=0), 8, axis=1).astype(np.uint8)
    found = made(family, models, edit=Edit(image=coarse, keep="coarse", strength=1.0)).pictures[0]
    kept = found.reshape(8, 8, 8, 8, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(kept - means).max() <= 1.5
    assert off(found, truth) < off(coarse, truth)


def test_the_teacher_helps_the_student(family, models):
    plain = made(family, models)
    pulled = made(family, models, helper=Helper(model="scenes-teacher", mode="pull", weight=0.3))
    first = made(family, models, helper=Helper(model="scenes-teacher", mode="first"))
    assert (plain.nfe, pulled.nfe, first.nfe) == (4, 6, 5)
    assert off(pulled.pictures[0], plain.pictures[0]) > 0.2 and off(first.pictures[0], plain.pictures[0]) > 0.2
    still = made(family, models, helper=Helper(model="scenes-teacher", mode="pull", weight=0.0))
    assert np.array_equal(still.pictures[0], plain.pictures[0])


def test_the_base_models_first_step_brings_back_its_diversity(family, models):
    """Spread over ten seeds: the student's is lowest, the hybrid's within a tenth of the base's."""

    def spread(name="scenes-lcm", **settings):
        pictures = made(family, models, name, prompt="a red circle", n=10, **settings).pictures
        return np.stack(pictures).astype(float).std(axis=0).mean()

    base, student = spread("scenes-teacher", steps=10), spread()
    hybrid = spread(helper=Helper(model="scenes-teacher", mode="first"))
    assert student < hybrid and abs(hybrid - base) < 0.1 * base, (student, hybrid, base)


def test_guidance_only_where_the_ramp_has_it_costs_what_it_is(family, models):
    teacher = {"name": "scenes-teacher", "steps": 8, "guidance": 4.0}
    whole, part, none = (made(family, models, **teacher, guidance_ramp=r) for r in (None, (0.5, 0.5), (0.0, 0.0)))
    assert (whole.nfe, none.nfe) == (16, 8) and none.nfe < part.nfe < whole.nfe
    once = made(family, models, **teacher, residual="onetime")
    assert once.nfe == 9 and off(once.pictures[0], none.pictures[0]) > 0.2


def test_edges_lead_an_edit_too(family, models, scene):
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[20:44, 20:22] = edge[20:44, 42:44] = edge[20:22, 20:44] = edge[42:44, 20:44] = 255
    teacher = {"name": "scenes-teacher", "steps": 6, "edit": Edit(image=scene, strength=0.9)}
    plain, led = (made(family, models, **teacher, control=c).pictures[0] for c in (None, Control(edge=edge)))
    assert off(plain, led) > 1.0
