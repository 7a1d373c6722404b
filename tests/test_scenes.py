"""The scenes data set: what a caption says is true of its picture, and there is enough to say."""

import itertools
import math
import random

import numpy as np
import pytest
from PIL import Image

from fewstep.trainers.pictures import scenes
from fewstep.trainers.pictures.scenes import BACKGROUNDS, COLOURS, RADII, RELATIONS, SHAPES, SIZE, ObjectClaim

COUNT = 300


@pytest.fixture(scope="module")
def samples():
    rng = random.Random(7)
    return [scenes.sample(rng) for _ in range(COUNT)]


def nearest(colour, palette):
    return min(palette, key=lambda name: sum((a - b) ** 2 for a, b in zip(palette[name], colour, strict=True)))


def test_the_same_seed_draws_the_same(samples):
    rng = random.Random(7)
    again = [scenes.sample(rng) for _ in range(COUNT)]
    assert again == samples
    assert scenes.render(again[3].scene).tobytes() == scenes.render(samples[3].scene).tobytes()
    assert scenes.sample(random.Random(8)) != samples[0]


def test_claims_are_true_of_the_scene(samples):
    for item in samples:
        drawn, claimed = item.scene.objects, item.caption.objects
        assert len(drawn) == len(claimed)
        for thing, claim in zip(drawn, claimed, strict=True):
            assert (thing.shape, thing.colour) == (claim.shape, claim.colour)
            assert claim.size in (None, thing.size)
            low, high = RADII[thing.size]
            assert low <= thing.radius <= high
        assert item.caption.background in (None, item.scene.background)
        assert scenes.holds(item.caption.relation, [(o.x, o.y) for o in drawn])


def test_claims_are_true_of_the_pixels(samples):
    for item in samples[:120]:
        pixels = np.asarray(scenes.render(item.scene))
        assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
        masks = [np.asarray(m) > 0 for m in scenes.masks(item.scene)]
        for thing, mask in zip(item.scene.objects, masks, strict=True):
            inner = mask & (pixels != pixels[0, 0]).any(axis=2)
            assert nearest(np.median(pixels[inner], axis=0), COLOURS) == thing.colour
        empty = pixels[~np.any(masks, axis=0)]
        assert nearest(np.median(empty, axis=0), BACKGROUNDS) == item.scene.background


def test_masks_are_apart_inside_and_centred(samples):
    for item in samples[:120]:
        masks = [np.asarray(m) for m in scenes.masks(item.scene)]
        assert len(masks) == len(item.scene.objects)
        for thing, mask in zip(item.scene.objects, masks, strict=True):
            assert set(np.unique(mask)) == {0, 255}
            assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
            y, x = np.nonzero(mask)
            assert abs((x.min() + x.max() + 1) / 2 - thing.x) < 1.5
            assert abs((y.min() + y.max() + 1) / 2 - thing.y) < 2.5
            assert x.max() - x.min() + 1 <= 2.3 * thing.radius + 1
        for a, b in itertools.combinations(masks, 2):
            assert not (a & b).any(), "objects must not overlap"


def test_edges_are_outlines_of_the_masks(samples):
    for item in samples[:60]:
        edge = np.asarray(scenes.edges(item.scene))
        assert edge.shape == (SIZE, SIZE, 3) and set(np.unique(edge)) == {0, 255}
        covered = np.any([np.asarray(m) > 0 for m in scenes.masks(item.scene)], axis=0)
        drawn = edge[..., 0] > 0
        assert (drawn <= covered).all(), "an outline lies on its object"
        assert 0 < drawn.sum() < covered.sum()
        deep = covered.copy()
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            deep &= np.roll(covered, (dy, dx), axis=(0, 1))
        assert not (drawn & deep).any(), "an outline is one pixel wide"


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_look_different(shape):
    """Each shape's mask fills another share of its box or centre, so a reader can tell them apart."""

    def features(name):
        thing = scenes.SceneObject(name, "red", "large", 32.0, 32.0, 11.0)
        mask = np.asarray(scenes.masks(scenes.Scene((thing,), "gray", ((0, 0, 0),) * 2))[0]) > 0
        y, x = np.nonzero(mask)
        box = mask[y.min() : y.max() + 1, x.min() : x.max() + 1]
        half = box.shape[0] // 2
        return np.array([box.mean(), box[:half].mean() - box[half:].mean(), mask[30:34, 30:34].mean()])

    mine = features(shape)
    assert all(np.abs(mine - features(other)).max() > 0.05 for other in SHAPES if other != shape)


def test_over_a_hundred_thousand_captions_counted():
    """Claims of two different objects alone: every pair, said sizes, relation and background."""
    single = [ObjectClaim(s, c, z) for s in SHAPES for c in COLOURS for z in (None, *RADII)]
    pairs = sum((a.shape, a.colour) != (b.shape, b.colour) for a, b in itertools.product(single, repeat=2))
    grounds = 1 + len(BACKGROUNDS)
    assert pairs * len((None, *RELATIONS[:4])) * grounds > 100_000
    texts = {
        scenes.describe((a, b), relation, ground, random.Random(0))
        for a in single[::4] for b in single[1::4] if (a.shape, a.colour) != (b.shape, b.colour)
        for relation in RELATIONS[:4] for ground in (*BACKGROUNDS, None)
    }  # fmt: skip
    distinct = sum((a.shape, a.colour) != (b.shape, b.colour) for a in single[::4] for b in single[1::4])
    assert len(texts) == distinct * 4 * grounds, "different claims must read differently"


def test_a_hundred_thousand_captions_drawn_directly():
    """Distinct texts met while drawing claims alone (no placement, so it takes seconds)."""
    rng, seen, draws = random.Random(0), set(), 0
    while len(seen) <= 100_000:
        claims = scenes._choose_objects(rng.choice((1, 2, 3)), rng)
        relation = scenes._choose_relation(claims, rng)
        said = scenes._unsay_sizes(claims, rng)
        seen.add(scenes.describe(said, relation, rng.choice((None, *BACKGROUNDS)), rng))
        draws += 1
        assert draws < 200_000, "captions repeat too often"


def test_crowds_repeat_themselves_and_stay_apart():
    rng = random.Random(3)
    crowds = [scenes.crowd(rng).objects for _ in range(400)]
    assert {len(objects) for objects in crowds} == set(range(6))
    mixed = [
        objects for objects in crowds if 1 < len({(o.shape, o.colour) for o in objects}) < len(objects)
    ]  # fmt: skip
    assert len(mixed) > 40, "twice the same beside another kind, which no caption speaks of"
    for objects in crowds:
        for a, b in itertools.combinations(objects, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
        assert all(min(o.x, o.y, SIZE - o.x, SIZE - o.y) > o.radius for o in objects)


def test_a_caption_can_be_read_back():
    rng = random.Random(11)
    for caption in (scenes.sample(rng).caption for _ in range(3_000)):
        assert scenes.read_caption(caption.text) == caption


def test_words_of_something_else_are_passed_over():
    said = scenes.read_caption("A photo of my cat beside Two Small Red rings, over a mint wall")
    assert said.objects == (ObjectClaim("ring", "red", "small"),) * 2
    assert said.relation is None and said.background == "mint"
    assert not scenes.read_caption("a cat").objects


def test_captions_use_known_words_in_many_ways(samples):
    known = set(scenes.words())
    used = set()
    for item in samples:
        parts = item.caption.text.replace(",", " , ").split()
        assert set(parts) <= known, item.caption.text
        used.update(parts)
        for claim in item.caption.objects:
            assert claim.colour in parts
            assert claim.shape in parts or scenes.plural(claim.shape) in parts
    assert len(used) > 0.9 * len(known)
    assert len({item.caption.text for item in samples}) > 0.95 * COUNT


def test_all_counts_relations_and_values_occur(samples):
    assert {len(item.scene.objects) for item in samples} == {1, 2, 3}
    assert {item.caption.relation for item in samples} == {None, *RELATIONS}
    assert {o.colour for item in samples for o in item.scene.objects} == set(COLOURS)
    assert {o.shape for item in samples for o in item.scene.objects} == set(SHAPES)
    assert {item.scene.background for item in samples} == set(BACKGROUNDS)


@pytest.mark.parametrize(
    ("relation", "centres", "answer"),
    [
        ("left", [(10, 30), (50, 32)], True),
        ("left", [(50, 30), (10, 32)], False),
        ("right", [(50, 30), (10, 32)], True),
        ("above", [(30, 10), (32, 50)], True),
        ("above", [(10, 30), (50, 32)], False),
        ("below", [(30, 50), (32, 10)], True),
        ("row", [(10, 30), (30, 31), (50, 30)], True),
        ("row", [(10, 30), (50, 31), (30, 30)], False),
        ("column", [(30, 10), (31, 30), (30, 50)], True),
        ("column", [(10, 30), (30, 31), (50, 30)], False),
        (None, [(1, 1), (1, 1)], True),
    ],
)
def test_relations(relation, centres, answer):
    assert scenes.holds(relation, centres) is answer


def test_jitter_stays_within_a_byte():
    thing = scenes.SceneObject("circle", "white", "small", 32.0, 32.0, 7.0)
    picture = scenes.render(scenes.Scene((thing,), "gray", ((6, 6, 6), (-6, -6, -6))))
    assert isinstance(picture, Image.Image)
    assert picture.getpixel((32, 32)) == (255, 255, 255)
    assert picture.getpixel((1, 1)) == (126, 126, 126)
