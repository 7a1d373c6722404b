"""The attribute reader is right on real renders, on worn ones, and says no to wrong pictures."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageFilter

from fewstep.trainers.pictures import compliance, scenes

PICTURES = 1000


def picture(scene: scenes.Scene, wear: np.random.Generator | None = None) -> np.ndarray:
    """The render; worn: slightly blurred, with noise of 6/255, worse than an autoencoder leaves it."""
    drawn = scenes.render(scene)
    if wear is None:
        return np.asarray(drawn)
    blurred = np.asarray(drawn.filter(ImageFilter.GaussianBlur(0.5)), dtype=np.float64)
    return (blurred + wear.normal(0, 6, blurred.shape)).round().clip(0, 255).astype(np.uint8)


def all_said(sample: scenes.Sample) -> scenes.Caption:
    """A caption that leaves nothing out."""
    claims = tuple(scenes.ObjectClaim(o.shape, o.colour, o.size) for o in sample.scene.objects)
    return scenes.Caption("", claims, sample.caption.relation, sample.scene.background)


@pytest.fixture(scope="module")
def samples():
    rng = random.Random(11)
    return [scenes.sample(rng) for _ in range(PICTURES)]


@pytest.mark.parametrize(("worn", "least"), [(False, 0.99), (True, 0.97)])
def test_every_attribute_is_read_from_real_renders(samples, worn, least):
    wear = np.random.default_rng(3) if worn else None
    total, right, strict = Counter(), Counter(), 0
    seen = {"shape": set(), "colour": set(), "size": set(), "background": set()}
    for sample in samples:
        verdict = compliance.check(picture(sample.scene, wear), all_said(sample))
        strict += verdict.strict
        for name, met in verdict.claims.items():
            total[name.split(".")[-1]] += 1
            right[name.split(".")[-1]] += met
        seen["background"].add(sample.scene.background)
        for thing in sample.scene.objects:
            for attribute in ("shape", "colour", "size"):
                seen[attribute].add(getattr(thing, attribute))
    accuracy = {name: right[name] / total[name] for name in total}
    assert {name: len(found) for name, found in seen.items()} == {"shape": 6, "colour": 8, "size": 2, "background": 5}
    assert set(accuracy) == {"count", "shape", "colour", "size", "relation", "background"}
    assert min(accuracy.values()) >= least, accuracy
    assert strict / PICTURES >= least


def test_positions_and_radii_are_read_to_half_a_pixel(samples):
    for sample in samples[:100]:
        found = compliance.read(picture(sample.scene)).objects
        for thing in sample.scene.objects:
            near = min(found, key=lambda f: abs(f.x - thing.x) + abs(f.y - thing.y))
            errors = [near.x - thing.x, near.y - thing.y, near.radius - thing.radius]
            assert max(map(abs, errors)) < 0.5, (thing, near)


def other(value: str, words, rng: random.Random) -> str:
    return rng.choice([w for w in words if w != value])


def altered(said: scenes.Caption, what: str, rng: random.Random) -> scenes.Caption | None:
    """The caption with one attribute made wrong; None where it says nothing of it."""
    k = rng.randrange(len(said.objects))
    claim = said.objects[k]
    words = {"shape": scenes.SHAPES, "colour": tuple(scenes.COLOURS), "size": tuple(scenes.RADII)}
    if what in words:
        new = replace(claim, **{what: other(getattr(claim, what), words[what], rng)})
        return replace(said, objects=(*said.objects[:k], new, *said.objects[k + 1 :]))
    if what == "background":
        return replace(said, background=other(said.background, scenes.BACKGROUNDS, rng))
    if what == "more":
        return replace(said, objects=(*said.objects, scenes.ObjectClaim("circle", "red")))
    if len(said.objects) == 1:
        return None
    if what == "fewer":
        return replace(said, objects=said.objects[:-1])
    if said.relation is None:
        return None
    unlike = {"row": ("column",), "column": ("row",)}.get(said.relation, scenes.RELATIONS[:4])
    return replace(said, relation=other(said.relation, unlike, rng))


@pytest.mark.parametrize("what", ["shape", "colour", "size", "background", "more", "fewer", "relation"])
def test_one_wrong_attribute_is_noticed(samples, what):
    rng = random.Random(what)
    tried = noticed = 0
    for sample in samples[:400]:
        caption = altered(all_said(sample), what, rng)
        if caption is None:
            continue
        verdict = compliance.check(picture(sample.scene), caption)
        tried += 1
        noticed += not verdict.strict
        assert verdict.strict == (verdict.score == 1)
    assert tried > 100
    assert noticed / tried >= 0.98


def test_captions_of_other_scenes_score_low(samples):
    scores = [compliance.check(picture(a.scene), b.caption).score for a, b in itertools.pairwise(samples[:200])]
    own = [compliance.check(picture(a.scene), a.caption).score for a in samples[:200]]
    assert np.mean(scores) < 0.45
    assert np.mean(own) > 0.99


def test_missing_objects_fail_their_claims():
    scene = scenes.Scene((scenes.SceneObject("circle", "red", "large", 32, 32, 11),), "gray", ((0, 0, 0), (0, 0, 0)))
    claims = (scenes.ObjectClaim("star", "blue"), scenes.ObjectClaim("circle", "red", "large"))
    verdict = compliance.check(picture(scene), scenes.Caption("", claims, "left", "gray"))
    assert verdict.claims == {
        "count": False, "1.shape": False, "1.colour": False, "2.shape": True, "2.colour": True, "2.size": True,
        "relation": False, "background": True,
    }  # fmt: skip
    assert verdict.score == pytest.approx(0.5)


def test_pictures_that_show_nothing_readable():
    caption = scenes.Caption("a red circle", (scenes.ObjectClaim("circle", "red"),))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    flat = np.full((64, 64, 3), 132, np.uint8)
    assert compliance.check(flat, caption).score == 0
    assert compliance.read(flat) == compliance.Reading((), "gray")
    assert not compliance.check(noise, caption).strict
    brown = np.full((64, 64, 3), (70, 40, 20), np.uint8)
    assert compliance.read(brown).background is None


def test_touching_objects_of_two_colours_are_told_apart():
    things = (
        scenes.SceneObject("square", "red", "small", 26, 32, 7),
        scenes.SceneObject("square", "blue", "small", 38, 32, 7),
    )
    reading = compliance.read(picture(scenes.Scene(things, "tan", ((0, 0, 0),) * 3)))
    assert sorted((o.shape, o.colour) for o in reading.objects) == [("square", "blue"), ("square", "red")]


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\[64, 64, 3\] uint8"):
        compliance.read(np.zeros((32, 32, 3), np.uint8))
