"""The plane: its teacher is exact on every path, its network starts alike on all, its scores tell right from wrong."""

import math
from dataclasses import replace

import pytest
import torch

from fewstep.models.analytic import posterior
from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.networks.student import Student
from fewstep.trainers.parts.transitions import guided
from fewstep.trainers.plane.net import PlaneNet, plane_student
from fewstep.trainers.plane.plane import CLASSES, PlaneSource, conditions, plane, reference_points, teacher_points
from fewstep.trainers.plane.scores import score, sliced_distance

PATHS = (VP(), EDM(), RectifiedFlow(), TrigFlow())
DATA = plane()


def labels_of(count):
    return torch.arange(CLASSES).repeat_interleave(count)


def test_the_data_have_mean_0_and_deviation_1():
    points = DATA.even(4000, torch.Generator().manual_seed(0))
    assert points.mean(0).abs().max() < 0.02 and (points.std(0) - 1.0).abs().max() < 0.02
    assert torch.allclose(DATA.shares.sum(1), torch.ones(CLASSES + 1, dtype=torch.float64))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
def test_the_teacher_answers_the_mean_of_the_data_given_a_noisy_point(path):
    """Against weighted draws of the data; the class's own, and of all classes where none is asked for."""
    draws = DATA.draw(torch.full((200_000,), 1), torch.Generator().manual_seed(0))
    every = DATA.draw(torch.arange(200_000) % CLASSES, torch.Generator().manual_seed(1))
    t = torch.tensor([path.time(0.5)], dtype=torch.float64)
    x = torch.tensor([[0.3, 0.4]], dtype=torch.float64) * float(path.alpha(t))
    cond, uncond = conditions(torch.tensor([1]))
    for points, side in ((draws, cond), (every, uncond)):
        apart = (x - path.alpha(t)[:, None] * points) / path.sigma(t)[:, None]
        weight = torch.softmax(-0.5 * apart.square().sum(1), 0)
        wanted = (weight[:, None] * points).sum(0)
        assert (DATA.teacher(path).x0(x, t, side)[0] - wanted).abs().max() < 0.02


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
def test_the_teacher_is_the_mixture_s_own_posterior(path):
    """Its arithmetic is laid out for speed; what it answers is `models.analytic`'s."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % CLASSES
    t = path.end + (path.start - path.end) * torch.rand(400, generator=rng, dtype=torch.float64)
    x = path.alpha(t)[:, None] * DATA.draw(labels, rng) + path.sigma(t)[:, None] * torch.randn(400, 2, generator=rng)
    for side in conditions(labels):
        wanted = posterior(DATA.of(side["label"]), x, path.alpha(t), path.sigma(t))
        found = DATA.posterior(side["label"], x, path.alpha(t), path.sigma(t))
        assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(found, wanted, strict=True))


def test_a_teacher_whose_scales_are_all_1_is_asked_once():
    asked = []
    teacher = DATA.teacher(VP())
    watched = replace(teacher, net=lambda x, t, cond: asked.append(len(x)) or teacher.net(x, t, cond))
    cond, uncond = conditions(torch.tensor([0, 1]))
    x, t = torch.zeros(2, 2), torch.full((2,), 500.0, dtype=torch.float64)
    plain, other = (guided(watched, uncond, torch.tensor(w)).raw(x, t, cond) for w in ([1.0, 1.0], [1.0, 2.0]))
    assert asked == [2, 4] and torch.equal(plain, teacher.raw(x, t, cond)) and torch.allclose(plain[0], other[0])


def test_batches_depend_on_seed_and_step_alone():
    source = PlaneSource(DATA, 32, seed=3)
    first, again, other = source.batch(5), PlaneSource(DATA, 32, seed=3).batch(5), source.batch(6)
    assert torch.equal(first.x0, again.x0) and torch.equal(first.cond["label"], again.cond["label"])
    assert not torch.equal(first.x0, other.x0)
    assert torch.equal(first.cond["label"].sum(1), torch.ones(32)) and not first.uncond["label"].any()


def test_one_body_gives_the_same_estimates_on_every_path():
    torch.manual_seed(0)
    nets = [PlaneNet(path) for path in PATHS]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    cond, _ = conditions(torch.tensor([0, 3]))
    unit = torch.tensor([[0.5, -1.0], [2.0, 0.1]], dtype=torch.float64)
    found = []
    for net, path in zip(nets, PATHS, strict=True):
        t = torch.full((2,), path.time(0.7), dtype=torch.float64)
        size = (path.alpha(t) ** 2 + path.sigma(t) ** 2).sqrt()[:, None]
        found.append(net.denoiser().x0(unit * size, t, cond))
    assert all(torch.allclose(one, found[0], atol=1e-5) for one in found[1:])


def test_fresh_inputs_change_nothing_and_then_learn():
    torch.manual_seed(0)
    start = PlaneNet(VP())
    net = plane_student(start, Student(guidance_width=8, second_time=True), path=VP(), seed=0)
    cond, _ = conditions(torch.tensor([0, 1]))
    x, t = torch.randn(2, 2), torch.full((2,), 500.0, dtype=torch.float64)
    told = {**cond, "w": torch.tensor([1.0, 6.0]), "s": torch.tensor([-math.inf, 20.0], dtype=torch.float64)}
    assert torch.equal(net(x, t, told), start(x, t, cond))
    net(x, t, told).square().sum().backward()
    assert net.scale.weight.grad.abs().max() > 0 and net.second.weight.grad.abs().max() > 0


def test_lora_trains_alone():
    net = plane_student(PlaneNet(VP()), Student(lora_rank=2), path=VP(), seed=0)
    assert {name.split(".")[-3] for name, w in net.named_parameters() if w.requires_grad} == {"lora_A", "lora_B"}


def test_surgery_of_pictures_networks_is_refused():
    with pytest.raises(RecipeError, match="no blocks to change"):
        plane_student(PlaneNet(VP()), Student(remove=2), path=VP(), seed=0)


def test_more_steps_of_the_teacher_are_nearer_guided_or_not():
    labels = labels_of(512)
    for w in (1.0, 2.0):
        aim = reference_points(DATA, labels, w, seed=1, steps=40)
        found = [score(DATA, teacher_points(DATA, labels, w, n, seed=5), aim, labels).swd for n in (1, 4, 40)]
        assert found[0] > 1.5 * found[1] > 1.5**2 * found[2]


def test_scores_of_points_that_are_right_moved_missing_or_not_numbers():
    labels = labels_of(1000)
    aim = reference_points(DATA, labels, 1.0, seed=1)
    right = score(DATA, reference_points(DATA, labels, 1.0, seed=2), aim, labels)
    assert right.swd < 0.03 and right.coverage == 1.0 and right.weight_error < 0.01
    moved = score(DATA, aim + torch.tensor([0.3, 0.0]), aim, labels)
    assert moved.swd == pytest.approx(0.3 * 2 / math.pi, rel=0.05)  # the mean of |cos| over directions
    one = DATA.data.means[[0, 3, 8, 12]][labels]
    assert score(DATA, one, aim, labels).coverage == 0.25
    assert score(DATA, aim * math.nan, aim, labels).swd == math.inf


def test_sliced_distance_of_two_points():
    a, b = torch.tensor([[0.0, 0.0]]).double(), torch.tensor([[3.0, 4.0]]).double()
    assert sliced_distance(a, b) == pytest.approx(5.0 * 2 / math.pi, rel=0.01)
