"""What tests of adopted components share: a copy with components put in, and diffusers' picture beside ours."""

import shutil
from dataclasses import replace

import numpy as np
import torch

from fewstep.export.graphs import role_graph
from fewstep.models.bundle import seal_bundle
from fewstep.runtime.sampling.loop import latent_shape, run_request
from fewstep.runtime.sampling.plan import compile_plan
from fewstep.runtime.sampling.request import GenerateRequest, resolve
from fewstep.runtime.sampling.rng import NoiseStream
from fewstep.runtime.sampling.text import Prompts
from fewstep.runtime.sampling.work import decode, embed

PROMPT = "a red cat, a big dog"
BOUND = 1 / 255
EDGE = np.zeros((32, 32, 3), np.uint8)
EDGE[8:24, 8:10], EDGE[8:10, 8:24] = 255, 200
EDGE_TENSOR = torch.from_numpy(EDGE / 255.0).permute(2, 0, 1)[None].float()


def adopted(bundle, to, *changes, **spec):
    """A copy of a bundle with components put in."""
    shutil.copytree(bundle.root, to)
    shutil.rmtree(to / "controlnet", ignore_errors=True)
    sources = [change(to) for change in changes]
    return seal_bundle(to, bundle.name, replace(bundle.spec, **spec), sources=sources)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline, steps, **settings):
    given = {"guidance_scale": 1.0, "output_type": "np", "height": 32, "width": 32, **settings}
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(5), num_inference_steps=steps, **given).images[0]


def ours(bundle, engine, steps, **settings):
    return (
        run_request(engine, bundle, GenerateRequest(prompt=PROMPT, seed=5, steps=steps, **settings)).pictures[0] / 255
    )


def by_hand(bundle, engine, role, steps, **feeds):
    """The dull loop over one role with further inputs [1, ...]."""
    request = resolve(GenerateRequest(prompt=PROMPT, seed=5, steps=steps), bundle.spec)
    plan, noise = compile_plan(request, bundle.spec), NoiseStream(5)
    (cond,) = embed(engine, Prompts(bundle, capacity=2), [PROMPT])
    x = noise.draw(latent_shape(request, bundle.spec))[None] * plan.start_scale
    for row in plan.rows:
        (f,) = engine.run(role, {"x": x, "t": torch.tensor([row.t]), "ctx": cond["ctx"][None], **feeds})
        x = row.a * x + row.b * f
        if row.c:
            x = x + row.c * noise.draw(tuple(x.shape[1:]))[None]
    return decode(engine, x)[0] / 255


def assert_same(picture, reference, plain):
    assert np.abs(picture - reference).max() <= BOUND
    assert np.abs(plain - reference).max() > 4 * BOUND, "what was put in made no difference"


def assert_exports(bundle, role):
    """Traced at a batch of 2, the same at 3: nothing in it is bound to the batch."""
    graph = role_graph(bundle, role)
    program = torch.export.export(
        graph.module, tuple(graph.feeds.values()), dynamic_shapes=(tuple(graph.axes[name] for name in graph.feeds),)
    )
    three = [torch.cat([value, value[:1]]) for value in graph.feeds.values()]
    with torch.no_grad():
        wanted, found = graph.module(*three), program.module()(*three)
    if isinstance(wanted, torch.Tensor):
        wanted, found = (wanted,), (found,)
    for one, two in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
