"""Any mix of rows in an engine call: each picture equals its solo run of the dull loop.

60 random mixes on each of three tiny networks, of 3 to 5 requests each, drawn from 40: other step counts and grids,
guidance scales, ramps and kinds, ControlNet, picture prompts, negative prompts, LoRAs, strengths, masks, kept luminance
and block means, clips, samplers, a second model's rows. Which rows meet in a call is drawn, too. Latents agree within
5e-5 of their largest value: float32 sums come in another order in another batch.
"""

import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from test_adopted_attention import make_ip_adapter
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from fewstep.models.adopting import adopt_ip_adapter, adopt_negative
from fewstep.models.bundle import seal_bundle
from fewstep.models.lora import register_lora
from fewstep.models.net_negative import Negative
from fewstep.models.spec import Boundary
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineFailed
from fewstep.runtime.sampling.inflight import row_state
from fewstep.runtime.sampling.loop import admit
from fewstep.runtime.sampling.request import Control, Edit, GenerateRequest, Helper, ImagePrompt, Lora
from fewstep.runtime.sampling.served import serve
from fewstep.runtime.sampling.step import advance
from fewstep.runtime.sampling.text import Prompts
from fewstep.runtime.sampling.work import encode_pictures, encode_prompts, encode_texts, step_rows
from tiny import two_times

MIXES, POOL, BOUND = 60, 40, 5e-5
draw = np.random.default_rng(7)
PICTURES = [draw.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(3)]
MASKS = [np.where(draw.random((32, 32)) < 0.4, 255, 0).astype(np.uint8) for _ in range(2)]
ENCODERS = {"encoder": encode_pictures, "image-prompt": encode_prompts}
GRIDS = {1: (999.0,), 2: (999.0, 499.0), 4: (999.0, 759.0, 499.0, 259.0)}


@pytest.fixture(scope="module")
def tiny_two_times(tiny_teacher, tmp_path_factory):
    """A network that hears where each row lands: rows of other counts, samplers and strengths land elsewhere."""
    return two_times(tiny_teacher, tmp_path_factory.mktemp("told") / "student")


def everything(bundle, root):
    """A copy of a tiny bundle, its ControlNet kept, with an IP-Adapter, NAG and a LoRA put in."""
    shutil.copytree(bundle.root, root)
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=24,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(root.parent / "eye")
    unet = bundle.load("unet")
    save_file(make_ip_adapter(unet, "plain"), root.parent / "adapter.safetensors")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    state = {f"unet.{k}": v.contiguous() for k, v in get_peft_model_state_dict(unet).items()}
    save_file(state, root.parent / "ink.safetensors")
    adopt_ip_adapter(root, root.parent / "adapter.safetensors", root.parent / "eye")
    adopt_negative(root, Negative(method="nag"))
    register_lora(root, "ink", root.parent / "ink.safetensors")
    return seal_bundle(root, bundle.name, bundle.spec)


@pytest.fixture(scope="module", params=["teacher", "lcm", "two_times"])
def models(request, tmp_path_factory):
    """Models over one engine: the network under every sampler that it could be run with, and what helps them."""
    bundle = everything(request.getfixturevalue(f"tiny_{request.param}"), tmp_path_factory.mktemp("mixes") / "bundle")
    engine = TorchEngine(bundle)
    own = serve(bundle, engine, Prompts(bundle, 64))
    still = replace(bundle.spec, sampler="ddim", stochastic=False, boundary=None, grids=GRIDS)
    specs = {
        "ddim": still,
        "lcm": replace(still, sampler="lcm", stochastic=True, boundary=Boundary()),
        "tcd": replace(still, sampler="tcd", gamma=0.3, stochastic=True),
        "base": replace(still, grids=GRIDS),
        "up": replace(still, grids={3: (700.0, 350.0, 20.0)}),
    }
    return {name: replace(own, name=name, spec=spec, _plans={}) for name, spec in specs.items()}


def random_edit(rng, keep=True):
    kind = rng.choice(["plain", "mask", "grey", "coarse"] if keep else ["plain"])
    return Edit(
        image=rng.choice(PICTURES),
        strength=rng.choice([0.3, 0.6, 0.9, 1.0]),
        mask=rng.choice(MASKS) if kind == "mask" else None,
        keep=kind if kind in ("grey", "coarse") else None,
    )


def random_ask(rng, models):
    """(model's name, request): one method or several of those that go together."""
    name = rng.choice(["ddim", "lcm", "tcd"])
    guidance = models[name].spec.guidance
    cfg = guidance.mode == "cfg"
    settings = {"steps": rng.choice([1, 2, 4]), "seed": rng.randrange(10**6), "prompt": rng.choice(["a", "a cat", "b"])}
    settings["guidance"] = rng.choice([guidance.range[0], rng.uniform(*guidance.range) ** 0.5 + 0.5, guidance.default])
    if rng.random() < 0.2:
        settings |= {"steps": None, "times": tuple(sorted(rng.sample(range(100, 1000), 3), reverse=True))}
    if rng.random() < 0.2:
        settings |= {"clip": 1.5, "clip_quantile": rng.choice([None, 0.9])}
    if rng.random() < 0.2:
        settings["guidance_ramp"] = (0.4, 0.8)
    if rng.random() < 0.45:
        settings["edit"] = random_edit(rng)
    steer = rng.choice(["none", "none", "control", "image", "negative", "lora"])
    if steer == "control":
        end = rng.choice([0.5, 1.0])
        settings["control"] = Control(edge=rng.choice(PICTURES), scale=rng.uniform(0.2, 1.5), end=end)
    elif steer == "image":
        settings["image_prompt"] = ImagePrompt(image=rng.choice(PICTURES), scale=rng.uniform(0.2, 1.2))
    elif steer == "negative":
        settings |= {"negative_prompt": "b", "negative_mode": "nag", "negative_scale": rng.uniform(0.5, 4.0)}
        settings["guidance"] = 1.0 if cfg else settings["guidance"]
    elif steer == "lora":
        settings["loras"] = (Lora("ink", rng.uniform(-1.0, 1.0), *rng.choice(((0.0, 1.0), (0.0, 0.5), (0.5, 1.0)))),)
    helps = rng.choice(["none", "none", "pull", "first", "residual", "invert", "noise"])
    steps = settings["steps"] or 3
    if helps in ("pull", "first") and steps > 1:
        settings["helper"] = Helper(model="base", mode=helps)
    elif helps == "residual" and cfg and settings["guidance"] != 1.0 and "guidance_ramp" not in settings:
        settings |= {"residual": rng.choice(["self", "onetime"]), "residual_delta": 0.7}
    elif helps == "invert" and name == "ddim":
        settings |= {"invert": "up", "edit": random_edit(rng, keep=False)}
    elif helps == "noise" and name == "ddim" and "edit" not in settings:
        settings["noise_correction"] = True
    return name, GenerateRequest(**settings)


def begun(models, name, request):
    live = admit(models[name], request, models=models)
    for work in live.before:
        encode = ENCODERS.get(work.role, encode_texts)
        encode(live.parts[work.model].model, [live])
    return live


def alone(models, name, request):
    live = begun(models, name, request)
    canvas = live.canvases[0]
    for row in live.plan.rows:
        (error,) = step_rows(live.part(row).model, [(live, canvas)])
        assert error is None
    return canvas.x


@pytest.fixture(scope="module")
def pool(models):
    """Requests with their solo results."""
    rng = random.Random(11)
    asked = [random_ask(rng, models) for _ in range(POOL)]
    return [(name, request, alone(models, name, request)) for name, request in asked]


def test_every_row_of_a_random_mix_equals_its_solo_run(models, pool):
    engine, spec = models["ddim"].engine, models["ddim"].spec
    worst, sizes, kinds = 0.0, [], set()
    for seed in range(MIXES):
        rng = random.Random(seed)
        chosen = rng.sample(pool, rng.randint(3, 5))
        lives = [begun(models, name, request) for name, request, _ in chosen]
        while left := [live for live in lives if live.canvases[0].step < len(live.plan.rows)]:
            meeting = rng.sample(left, rng.randint((len(left) + 1) // 2, len(left)))
            states = [row_state(live, live.canvases[0]) for live in meeting]
            sizes.append(len(states))
            kinds |= {(state.row.role, state.row.pair) for state in states} if len(states) > 1 else set()
            for live, found in zip(meeting, advance(engine, states, spec), strict=True):
                assert not isinstance(found, EngineFailed)
                live.canvases[0].x, live.canvases[0].step = found, live.canvases[0].step + 1
        for live, (name, request, solo) in zip(lives, chosen, strict=True):
            error = ((live.canvases[0].x - solo).abs().max() / solo.abs().max()).item()
            assert error <= BOUND, f"mix {seed}: {name} {request} differs by {error:.1e}"
            worst = max(worst, error)
    assert worst > 0 and sum(size > 1 for size in sizes) > 2 * MIXES, "calls were shared"
    assert len({role for role, _ in kinds}) == 5, f"every graph met another: {kinds}"


def test_the_pool_is_as_mixed_as_it_says(pool):
    asked = [request for _, request, _ in pool]
    used = {name for name in ("edit", "control", "image_prompt", "negative_mode", "helper", "times", "clip")
            if any(getattr(request, name) for request in asked)}  # fmt: skip
    assert len(used) == 7 and {name for name, _, _ in pool} == {"ddim", "lcm", "tcd"}
    edits = [request.edit for request in asked if request.edit]
    assert any(edit.mask is not None for edit in edits) and {edit.keep for edit in edits} == {None, "grey", "coarse"}
    assert len({request.steps for request in asked}) == 4 and any(request.loras for request in asked)
