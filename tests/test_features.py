"""The feature network: its shipped weights, what they see, and that training them can be repeated."""

import random

import numpy as np
import pytest
import torch

from fewstep.trainers.pictures import features, scenes


@pytest.fixture(scope="module")
def net():
    return features.load_features()


@pytest.fixture(scope="module")
def samples():
    rng = random.Random(77)
    return [scenes.sample(rng) for _ in range(600)]


@pytest.fixture(scope="module")
def seen(net, samples):
    return features.extract(net, np.stack([np.asarray(scenes.render(s.scene)) for s in samples]))


def test_shipped_weights_are_small(net):
    assert features.WEIGHTS.stat().st_size < 300_000
    assert not any(p.requires_grad for p in net.parameters())


def test_features_are_standard_on_real_scenes(seen):
    assert seen.shape == (600, features.FEATURES)
    assert seen.mean(0).abs().max() < 0.25
    assert seen.std(0).min() > 0.8 and seen.std(0).max() < 1.2


@pytest.mark.parametrize(
    ("name", "answer", "least"),
    [
        ("background", lambda s: list(scenes.BACKGROUNDS).index(s.scene.background), 0.9),
        ("count", lambda s: len(s.scene.objects) - 1, 0.95),
        ("a red object", lambda s: int(any(o.colour == "red" for o in s.scene.objects)), 0.95),
        ("a ring", lambda s: int(any(o.shape == "ring" for o in s.scene.objects)), 0.95),
        ("left half", lambda s: int(np.mean([o.x for o in s.scene.objects]) < 32), 0.78),
    ],
)
def test_a_linear_probe_reads_scenes(samples, seen, name, answer, least):
    wanted = torch.tensor([answer(s) for s in samples])
    inputs = torch.cat([seen, torch.ones(len(seen), 1)], dim=1).double()
    targets = torch.nn.functional.one_hot(wanted).double()
    ridge = inputs[:400].T @ inputs[:400] + 2 * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(ridge, inputs[:400].T @ targets[:400])
    right = ((inputs[400:] @ weights).argmax(1) == wanted[400:]).double().mean()
    assert right >= least, f"{name}: {right:.3f}"


def test_other_sizes_are_resized(net):
    scene = scenes.sample(random.Random(5)).scene
    picture = scenes.render(scene)
    big = np.asarray(picture.resize((128, 128), 0))
    small, large = (features.extract(net, p[None]) for p in (np.asarray(picture), big))
    assert (small - large).norm() < 0.35 * small.norm()


def test_a_picture_does_not_depend_on_its_batch(net, samples):
    pictures = np.stack([np.asarray(scenes.render(s.scene)) for s in samples[:9]])
    torch.testing.assert_close(
        features.extract(net, pictures, batch=9), features.extract(net, pictures, batch=2), rtol=1e-4, atol=1e-4
    )


def test_answers_name_the_scene():
    things = (
        scenes.SceneObject("ring", "blue", "small", 10, 50, 7),
        scenes.SceneObject("star", "red", "large", 45, 20, 11),
    )
    answers = features.scene_answers(scenes.Scene(things, "tan", ((0, 0, 0),) * 3))
    assert answers.shape == (5 + 3 + 48 + 12 + 16 + 24 + 32,)
    assert answers[:8].tolist() == [0, 0, 0, 1, 0, 0, 1, 0]
    pairs = answers[8:56].reshape(6, 8)
    assert pairs.nonzero().tolist() == [[3, 0], [5, 2]]
    assert answers[68:84].reshape(4, 4).nonzero().tolist() == [[1, 2], [3, 0]]


def test_training_can_be_repeated(tmp_path):
    said: list[str] = []
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        features.train_features(file, scenes_drawn=64, steps=3, batch=8, seed=seed, report=said.append)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()
    assert len(said) == 6 and "held-out" in said[0]
