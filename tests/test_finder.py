"""What finds a scene's objects, and the reward that looks through it."""

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep.models.bundle import load_bundle
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.networks.rewards import picture_reward, with_prompts_for
from fewstep.trainers.networks.shown import ShowsObjects, counts_named, placed
from fewstep.trainers.pictures import finder, scenes
from fewstep.trainers.pictures.data import PROMPT, encode_scenes, tokenize
from fewstep.trainers.pictures.features import as_input
from fewstep.trainers.runs.distill import distill
from tiny import tiny_latents


@pytest.fixture(scope="module")
def net():
    return finder.load_finder()


@pytest.fixture(scope="module")
def samples():
    rng = random.Random(4321)
    return [scenes.sample(rng) for _ in range(200)]


@pytest.fixture(scope="module")
def pictures(samples):
    return torch.from_numpy(np.stack([np.asarray(scenes.render(s.scene)) for s in samples])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def teacher():
    return load_bundle("scenes-teacher")


def held_in(drawn):
    """What `finder.answers` has of scenes: [N, C] and [N, C, 2]."""
    held, centres = zip(*(finder.answers(scene) for scene in drawn), strict=True)
    return torch.stack(held), torch.stack(centres)


def test_the_shipped_weights_find_what_is_drawn(net, samples, pictures):
    found = net(as_input(pictures))
    held, centres = held_in([s.scene for s in samples])
    counts, said = found.counts(), finder.kinds_in(held)
    there = held < len(finder.KINDS)
    assert float((counts.argmax(2) == said).all(1).float().mean()) > 0.9
    assert float((found.centres - centres).abs()[there].mean()) < 1.5
    once = said == 1
    places = torch.zeros(*said.shape, 2).index_put_(
        (there.nonzero()[:, 0], held[there]), centres[there]
    )  # fmt: skip
    assert float((found.places() - places).abs()[once].median()) < 1.5


def test_more_of_the_same_than_any_caption_of_several_kinds_names_are_counted(net):
    rng = random.Random(99)
    drawn = [scenes.crowd(rng) for _ in range(300)]
    pictures = torch.from_numpy(np.stack([np.asarray(scenes.render(s)) for s in drawn])).permute(0, 3, 1, 2)
    wanted = finder.kinds_in(held_in(drawn)[0])
    mixed = ((wanted == 2).any(1) & ((wanted > 0).sum(1) > 1)).nonzero()[:, 0]
    said = net(as_input(pictures)).counts().argmax(2)
    assert len(mixed) > 30 and float((said[mixed] == wanted[mixed]).all(1).float().mean()) > 0.75


def test_answers_name_the_scene():
    things = tuple(
        scenes.SceneObject(shape, "blue", "small", x, 50.0, 7.0)
        for shape, x in (("ring", 10.0), ("star", 30.0), ("star", 50.0))
    )
    held, centres = finder.answers(scenes.Scene(things, "tan", ((0, 0, 0),) * 4))
    ring, star = (finder.KINDS.index(("blue", shape)) for shape in ("ring", "star"))
    assert {k: int(held[k]) for k in (held < len(finder.KINDS)).nonzero()[:, 0].tolist()} == {
        49: ring,
        51: star,
        54: star,
    }
    assert centres[51].tolist() == [30.0, 50.0]
    assert finder.kinds_in(held[None])[0, [ring, star]].tolist() == [1, 2]


def test_counts_are_those_of_independent_cells():
    torch.manual_seed(0)
    odds = torch.rand(6, dtype=torch.float64)
    held = torch.zeros(1, 6, len(finder.KINDS) + 1, dtype=torch.float64)
    held[0, :, 7], held[0, :, -1] = odds, 1.0 - odds
    wanted = torch.zeros(7, dtype=torch.float64)
    for here in itertools.product((0, 1), repeat=6):
        wanted[sum(here)] += math.prod(p if there else 1.0 - p for p, there in zip(odds.tolist(), here, strict=True))
    counts = finder.Found(held.log(), torch.zeros(1, 6, 2)).counts()[0]
    torch.testing.assert_close(counts[7], torch.cat([wanted[: finder.MOST], wanted[finder.MOST :].sum()[None]]))
    torch.testing.assert_close(counts[8], torch.eye(finder.MOST + 1, dtype=torch.float64)[0])


def test_training_can_be_repeated(teacher, tmp_path):
    said: list[str] = []
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        finder.train_finder(file, teacher=teacher, scenes_drawn=40, steps=2, batch=4, seed=seed, report=said.append)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert len(said) == 3 and "held-out" in said[0]


@pytest.fixture(scope="module")
def reward(teacher):
    return picture_reward("objects", teacher)


@pytest.fixture(scope="module")
def latents(teacher, pictures):
    with torch.inference_mode():
        return teacher.encoder()(as_input(pictures))


def prompts(teacher, texts):
    return {PROMPT: tokenize(teacher.tokenizer, list(texts))}


def test_a_scene_pleases_under_its_own_caption(reward, teacher, latents, samples):
    texts = [s.caption.text for s in samples]
    own, other = (
        reward(latents, prompts(teacher, said)).mean() for said in (texts, [*texts[1:], texts[0]])
    )  # fmt: skip
    assert float(own) > -2.0 and float(other) < float(own) - 8.0


def test_where_things_stand_counts(reward, teacher, latents, samples):
    two = [k for k, s in enumerate(samples) if s.caption.relation in ("left", "right")]
    turned = {" left ": " right ", " right ": " left "}
    texts, mirrored = [samples[k].caption.text for k in two], []
    for text in texts:
        word = next(word for word in turned if word in f" {text} ")
        mirrored.append(f" {text} ".replace(word, turned[word]).strip())
    own, other = (reward(latents[two], prompts(teacher, said)) for said in (texts, mirrored))
    assert len(two) > 10 and float((own > other).float().mean()) > 0.95


def test_a_step_is_judged_by_how_far_it_goes_along():
    kinds = [finder.KINDS.index(("red", shape)) for shape in ("ring", "star", "cross")]
    caption = scenes.read_caption("a red ring, a red star and a red cross in a row from left to right")
    held = torch.full((1, 3, len(finder.KINDS) + 1), -30.0)
    held[0, range(3), kinds] = 0.0
    found = finder.Found(held, torch.tensor([[[10.0, 30.0], [28.0, 33.0], [34.0, 20.0]]]))
    margins = torch.tensor([18.0 - 3.0, 6.0 - 13.0])
    wanted = torch.nn.functional.logsigmoid(margins / 6.0).mean()
    torch.testing.assert_close(placed(found, [caption])[0], wanted, rtol=1e-3, atol=1e-3)
    assert float(placed(found, [replace(caption, relation=None)])[0]) == 0.0
    assert counts_named(scenes.read_caption("two red rings"))[kinds].tolist() == [2, 0, 0]


def test_its_gradient_reaches_the_latents_and_no_weight(reward, teacher, latents, samples):
    x = latents[:4].clone().requires_grad_()
    reward(x, prompts(teacher, [s.caption.text for s in samples[1:5]])).sum().backward()
    assert bool(torch.isfinite(x.grad).all()) and float(x.grad.abs().max()) > 0.0
    assert isinstance(reward, ShowsObjects) and all(p.grad is None for p in reward.finder.parameters())


def test_a_prompt_of_something_else_is_refused(reward, teacher, latents):
    with pytest.raises(RecipeError, match=r"none of its own in the prompt 'a pink background'; .* another reward"):
        reward(latents[:1], prompts(teacher, ["a pink background"]))


def test_the_data_bring_their_prompts(tiny_teacher):
    data = tiny_latents(tiny_teacher)
    assert with_prompts_for("typical", data, tiny_teacher) is with_prompts_for(None, data, tiny_teacher) is data
    prompted = with_prompts_for("objects", data, tiny_teacher)
    assert prompted.feeds[PROMPT] is data.ids and prompted.empty[PROMPT] is data.empty["ids"]


def test_a_student_is_distilled_beside_it(teacher, tmp_path):
    settings = {"batch": 2, "steps": 2, "every": 1, "picture_every": 0, "checkpoint_every": 0, "bf16": False}
    asked = settings | {"reward": "objects", "reward_scale": 0.03, "misaligned": True}
    distill("dmd2", teacher, tmp_path / "out", asked, data=encode_scenes(teacher, 4), device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "out.run" / "dmd2" / "metrics.jsonl").read_text().splitlines()]
    assert [row["player"] for row in rows if "reward" in row] == ["student"] * 2
