"""Every method's option is refused by name where the model, its graphs or another option makes it impossible."""

import dataclasses
import pathlib
import re
from dataclasses import replace

import numpy as np
import pytest

from fewstep.models.roles import DECODER, DENOISER, DENOISERS, ENCODER, ROLES, TEXT
from fewstep.models.spec import Guidance, Latent
from fewstep.runtime.engines.fake_engine import fake_spec
from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.request import Control, Edit, GenerateRequest, Helper, ImagePrompt, Lora, Offers, resolve
from fewstep.runtime.sampling.request_methods import NEGATIVE_SCALES, PULL_WEIGHT, REFINE

CFG = Guidance(mode="cfg", default=4.0, range=(1.0, 9.0))
LCM = fake_spec()
DDIM = fake_spec(sampler="ddim", stochastic=False, boundary=None, guidance=CFG)
PHASED = replace(DDIM, sampler="phased", phases=4)
FAR = replace(DDIM, latent=Latent(channels=4, factor=8, scale=2.0))
PICTURE = np.zeros((64, 64, 3), np.uint8)
MASK = np.full((64, 64), 255, np.uint8)
EDIT = Edit(image=PICTURE)
ALL = Offers(
    name="own", roles=frozenset((*ROLES, "denoiser+lora")), negative="nag", loras=("ink",),
    models={"own": LCM, "base": DDIM, "far": FAR},
)  # fmt: skip
NONE = Offers(name="own", roles=frozenset({TEXT, DENOISER, DECODER}), models={"own": LCM})


def ask(**settings):
    return GenerateRequest(**{"prompt": "a cat", **settings})


GOOD = [
    (LCM, {"edit": EDIT}),
    (LCM, {"edit": replace(EDIT, mask=MASK, strength=1)}),
    (LCM, {"edit": replace(EDIT, keep="coarse")}),
    (LCM, {"image_prompt": ImagePrompt(image=np.zeros((7, 300, 3), np.uint8))}),
    (LCM, {"times": (999.0, 600.0, 20)}),
    (LCM, {"clip": 1, "clip_quantile": 0.99}),
    (LCM, {"negative_mode": "nag", "negative_prompt": "blue"}),
    (DDIM, {"guidance_ramp": (0.5, 0.8)}),
    (DDIM, {"residual": "self"}),
    (DDIM, {"noise_correction": True, "previews": True}),
    (DDIM, {"invert": "base", "edit": replace(EDIT, prompt="a dog")}),
    (LCM, {"helper": Helper(model="base", mode="pull")}),
    (LCM, {"loras": (Lora("ink", 0.5),)}),
]


@pytest.mark.parametrize(("spec", "settings"), GOOD)
def test_possible_methods_pass(spec, settings):
    found = resolve(ask(**settings), spec, offers=ALL)
    assert found.prompt == "a cat" and all(getattr(found, name) for name in settings)


def test_what_was_left_open_is_decided():
    assert resolve(ask(), fake_spec(clip=2.0)).clip == 2.0
    assert resolve(ask(clip=1.0), fake_spec(clip=2.0)).clip == 1.0
    assert resolve(ask(times=(999.0, 500.0)), LCM).steps == 2
    asked = ask(negative_mode="nag", negative_prompt="blue")
    assert resolve(asked, LCM, offers=ALL).negative_scale == NEGATIVE_SCALES["nag"][0]
    pulled = resolve(ask(helper=Helper(model="base", mode="pull")), LCM, offers=ALL).helper
    assert (pulled.weight, pulled.guidance) == (PULL_WEIGHT, 4.0)
    refined = resolve(ask(helper=Helper(model="base", mode="refine", strength=0.5)), LCM, offers=ALL).helper
    assert (refined.steps, refined.strength, refined.threshold) == (REFINE["steps"], 0.5, REFINE["threshold"])
    assert resolve(ask(residual="self"), DDIM).residual_delta == 1.0


def test_a_plain_request_stays_the_same_object_in_all_but_what_was_open():
    assert resolve(ask(steps=2, guidance=3.0, width=64, height=64), LCM, offers=NONE) == ask(
        steps=2, guidance=3.0, width=64, height=64
    )


BAD = [
    (LCM, {"edit": PICTURE}, "edit", "Edit"),
    (LCM, {"edit": Edit(image=np.zeros((64, 32, 3), np.uint8))}, "edit.image", "(64, 64, 3)"),
    (LCM, {"edit": Edit(image=PICTURE.astype(float))}, "edit.image", "float64"),
    (LCM, {"edit": replace(EDIT, strength=0.0)}, "edit.strength", "above 0 to 1"),
    (LCM, {"edit": replace(EDIT, strength=True)}, "edit.strength", "number"),
    (LCM, {"edit": replace(EDIT, mask=PICTURE)}, "edit.mask", "(64, 64)"),
    (LCM, {"edit": replace(EDIT, mask=0 * MASK)}, "edit.mask", "0 everywhere"),
    (LCM, {"edit": replace(EDIT, mask=MASK, keep="grey")}, "edit.keep", "leave one out"),
    (LCM, {"edit": replace(EDIT, keep="hue")}, "edit.keep", "'grey' or 'coarse'"),
    (LCM, {"edit": replace(EDIT, prompt="a dog")}, "edit.prompt", "invert"),
    (LCM, {"image_prompt": ImagePrompt(image=MASK)}, "image_prompt.image", "(any, any, 3)"),
    (LCM, {"image_prompt": ImagePrompt(image=PICTURE, scale=3.0)}, "image_prompt.scale", "0 to 2"),
    (LCM, {"image_prompt": ImagePrompt(image=PICTURE), "control": Control(edge=PICTURE)}, "image_prompt", "graph each"),
    (LCM, {"times": ()}, "times", "list of numbers"),
    (LCM, {"times": (400.0, 500.0)}, "times", "fall strictly"),
    (LCM, {"times": (1000.0,)}, "times", "at most 999"),
    (LCM, {"times": (999.0, float("nan"))}, "times", "fall strictly"),
    (LCM, {"times": (999.0,), "steps": 2}, "steps", "times has 1"),
    (PHASED, {"times": (999.0,)}, "times", "fixed"),
    (LCM, {"clip": 0.0}, "clip", "above 0"),
    (LCM, {"clip_quantile": 0.9}, "clip_quantile", "needs clip"),
    (LCM, {"clip": 1.0, "clip_quantile": 1.1}, "clip_quantile", "above 0 to 1"),
    (LCM, {"guidance_ramp": (0.9, 0.5)}, "guidance_ramp", "above tau2"),
    (LCM, {"guidance_ramp": 0.5}, "guidance_ramp", "two numbers"),
    (replace(LCM, guidance=Guidance(mode="none")), {"guidance_ramp": (0.1, 0.2)}, "guidance_ramp", "distilled away"),
    (LCM, {"negative_mode": "nasa", "negative_prompt": "blue"}, "negative_mode", "has 'nag'"),
    (LCM, {"negative_mode": "away", "negative_prompt": "blue"}, "negative_mode", "'nasa' or 'nag'"),
    (LCM, {"negative_mode": "nag"}, "negative_mode", "needs a negative_prompt"),
    (LCM, {"negative_scale": 1.0}, "negative_scale", "say 'nasa' or 'nag'"),
    (LCM, {"negative_mode": "nag", "negative_prompt": "blue", "negative_scale": 99.0}, "negative_scale", "0 to 20"),
    (DDIM, {"negative_mode": "nag", "negative_prompt": "blue"}, "negative_mode", "set it to 1"),
    (LCM, {"residual": "self"}, "residual", "not used here"),
    (DDIM, {"residual": "twice"}, "residual", "'self' or 'onetime'"),
    (DDIM, {"residual_delta": 0.5}, "residual_delta", "belongs to residual"),
    (DDIM, {"residual": "self", "negative_prompt": "blue"}, "negative_prompt", "onetime"),
    (LCM, {"noise_correction": True}, "noise_correction", "'lcm' has none"),
    (LCM, {"noise_correction": 1}, "noise_correction", "true or false"),
    (DDIM, {"noise_correction": True, "edit": EDIT}, "noise_correction", "pure noise"),
    (DDIM, {"previews": "yes"}, "previews", "true or false"),
    (DDIM, {"invert": "base"}, "invert", "edit.image"),
    (LCM, {"invert": "base", "edit": EDIT}, "invert", "deterministic"),
    (DDIM, {"invert": "who", "edit": EDIT}, "invert", "base, far"),
    (DDIM, {"invert": "base", "edit": replace(EDIT, mask=MASK)}, "invert", "neither"),
    (LCM, {"helper": Helper(model="base", mode="push")}, "helper.mode", "'pull' or 'first' or 'refine'"),
    (LCM, {"helper": Helper(model="base", mode="pull", steps=3)}, "helper.steps", "belongs to mode 'refine'"),
    (LCM, {"helper": Helper(model="own", mode="pull")}, "helper.model", "base, far"),
    (LCM, {"helper": Helper(model="far", mode="first")}, "helper.model", "latent"),
    (LCM, {"helper": Helper(model="base", mode="pull", weight=2.0)}, "helper.weight", "0 to 1"),
    (LCM, {"helper": Helper(model="base", mode="pull", guidance=99.0)}, "helper.guidance", "1 to 9"),
    (LCM, {"helper": Helper(model="base", mode="pull"), "steps": 1}, "helper", "2 steps or more"),
    (LCM, {"helper": Helper(model="base", mode="refine", steps=3)}, "helper.steps", "not made for"),
    (LCM, {"loras": (Lora("oil"),)}, "loras", "registered are ink"),
    (LCM, {"loras": ("ink",)}, "loras", "`Lora` values"),
    (LCM, {"loras": (("ink", 1.0),)}, "loras", "`Lora` values"),
    (LCM, {"loras": (Lora("ink", start=0.5, end=0.5),)}, "loras.ink.start", "start must be below end"),
    (LCM, {"loras": (Lora("ink", end=1.5),)}, "loras.ink.end", "0 to 1"),
    (LCM, {"loras": (Lora("ink"), Lora("ink", 0.5))}, "loras", "once"),
    (LCM, {"loras": (Lora("ink", 9.0),)}, "loras.ink", "-4 to 4"),
]


@pytest.mark.parametrize(("spec", "settings", "field", "said"), BAD)
def test_impossible_methods_are_refused_by_name(spec, settings, field, said):
    with pytest.raises(InvalidRequest) as caught:
        resolve(ask(**settings), spec, offers=ALL)
    assert caught.value.field == field and said in str(caught.value)


LACKING = [
    ({"edit": EDIT}, "edit", "an encoder"),
    ({"image_prompt": ImagePrompt(image=PICTURE)}, "image_prompt", "an IP-Adapter"),
    ({"negative_mode": "nag", "negative_prompt": "blue"}, "negative_mode", "a graph for negative prompts"),
    ({"control": Control(edge=PICTURE)}, "control", "a ControlNet or an adapter"),
    ({"loras": (Lora("ink"),)}, "loras", "LoRAs"),
    ({"helper": Helper(model="base", mode="pull")}, "helper.model", "(none)"),
]


@pytest.mark.parametrize(("settings", "field", "said"), LACKING)
def test_what_the_bundle_has_no_graph_for_is_refused(settings, field, said):
    with pytest.raises(InvalidRequest, match=r"model 'own'|other models here are") as caught:
        resolve(ask(**settings), LCM, offers=NONE)
    assert caught.value.field == field and said in str(caught.value)
    assert ENCODER not in NONE.roles and set(NONE.roles) & set(DENOISERS) == {DENOISER}


def test_the_page_of_methods_names_every_option_and_only_tests_that_are_there():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "inference.md").read_text()
    plain = {"prompt", "negative_prompt", "steps", "seed", "guidance", "n", "width", "height", "priority", "deadline_s"}
    plain |= {"previews", "negative_scale", "residual_delta", "helper"}
    for field in dataclasses.fields(GenerateRequest):
        assert field.name in plain or f"`{field.name}" in page, field.name
    for mode in ("pull", "first", "refine"):
        assert f'`helper.mode = "{mode}"`' in page
    tests = set(re.findall(r"`(test_\w+)`", page))
    assert len(tests) > 8 and all((pathlib.Path(__file__).parent / f"{name}.py").is_file() for name in tests)
