"""The parts of distribution matching: the surrogate, the rollout's states, the critic on the fake network's encoder."""

import pytest
import torch
from torch import nn

from fewstep.models.analytic import exact, gaussian
from fewstep.models.denoiser import Denoiser
from fewstep.models.networks import as_network
from fewstep.models.paths import VP
from fewstep.trainers.distribution.discriminator import Adversary
from fewstep.trainers.distribution.scores import carry, denoising_loss, dmd_gradient
from fewstep.trainers.networks.critics import FakeWithCritic, read_blocks
from fewstep.trainers.parts.distances import unweighted
from fewstep.trainers.parts.gan_losses import critic_loss, deceiver_loss
from fewstep.trainers.parts.jumps import ToClean
from fewstep.trainers.parts.objective import Batch, Cast, Turn
from fewstep.trainers.parts.rollout import BackwardSimulation, Made
from fewstep.trainers.parts.times import LcmGrids, UniformTimes
from fewstep.trainers.recipes.distribution import dmd2

PATH = VP()


def turn(step=0, player="student"):
    return Turn.of(0, step, 100, player)


def test_surrogate_carries_its_gradient():
    x = torch.randn(4, 3, requires_grad=True)
    gradient = torch.randn(4, 3)
    carry(x, gradient).backward()
    assert torch.allclose(x.grad, gradient / 12, atol=1e-7)
    x.grad = None
    carry(x, torch.full((4, 3), torch.nan)).backward()
    assert torch.equal(x.grad, torch.zeros(4, 3))


def test_gradient_points_from_the_teacher_and_is_normalised_per_sample():
    real, fake = (exact(gaussian(torch.full((2,), m), 1.0), PATH, "v") for m in (0.0, 3.0))
    x = torch.full((2, 2), 3.0)
    x[1] = 30.0
    t = torch.full((2,), 700.0, dtype=torch.float64)
    cond = {"ctx": torch.zeros(2, 1)}
    g = dmd_gradient(real, fake, Made(x, x, t), t, torch.zeros(2, 2), cond)
    assert (g > 0).all()  # descending x - g moves the samples from the fake's mean 3 to the teacher's mean 0
    x_t = PATH.alpha(700.0) * x.double()
    mu_real, mu_fake = real.x0(x_t, t, cond), fake.x0(x_t, t, cond)
    for row in range(2):
        assert torch.allclose(g[row].double(), (mu_fake - mu_real)[row] / (x - mu_real)[row].abs().mean(), rtol=1e-4)


def test_fake_loss_is_zero_at_the_sample_and_detached():
    x = torch.randn(3, 2, requires_grad=True)
    perfect = Denoiser(lambda x_t, t, cond: x.detach(), PATH, "x0")
    t = torch.full((3,), 300.0, dtype=torch.float64)
    assert denoising_loss(perfect, Made(x, x, t), t, torch.randn(3, 2), {}, unweighted) == 0
    off = Denoiser(lambda x_t, t, cond: x_t * 0 + x.detach() + 2.0, PATH, "x0")
    loss = denoising_loss(off, Made(x, x, t), t, torch.randn(3, 2), {}, unweighted)
    assert float(loss) == pytest.approx(4.0) and not loss.requires_grad


class Recorder:
    """A denoiser that notes the times and states it was asked at; its clean estimate is `value`."""

    def __init__(self, value):
        self.value = value
        self.times, self.states, self.graded = [], [], []

    def __call__(self, x, t, cond):
        self.times.append(float(t[0]))
        self.states.append(x)
        self.graded.append(torch.is_grad_enabled())
        return torch.zeros_like(x) + self.value


def rollout(step, weights=()):
    value = torch.tensor(5.0, requires_grad=True)
    seen = Recorder(value)
    simulation = BackwardSimulation(LcmGrids((1, 2, 4)), weights, ToClean())
    made = simulation.make(Denoiser(seen, PATH, "x0"), Batch(torch.zeros(512, 8), {}, {}), turn(step))
    return seen, made.x0


def test_rollout_walks_the_sampler_and_grades_only_the_last_step():
    walks = set()
    for step in range(60):
        seen, out = rollout(step)
        walks.add(tuple(seen.times))
        assert seen.graded == [False] * (len(seen.times) - 1) + [True]
        assert out.requires_grad and float(out.detach().mean()) == 5.0
        assert abs(float(seen.states[0].mean())) < 0.2 and float(seen.states[0].std()) == pytest.approx(1.0, abs=0.1)
        for t, state in zip(seen.times[1:], seen.states[1:], strict=True):
            assert float(state.mean()) == pytest.approx(5.0 * PATH.alpha(t), abs=0.2)
            assert float(state.std()) == pytest.approx(PATH.sigma(t), abs=0.1)
    four = (999.0, 759.0, 499.0, 259.0)
    assert walks == {four[:1], four[:2], four[:3], four, (999.0, 499.0)}


def test_rollout_weights_choose_the_grid():
    assert {len(rollout(step, (1.0, 0.0, 0.0))[0].times) for step in range(10)} == {1}


def test_rollout_without_gradient():
    simulation = BackwardSimulation(LcmGrids((2,)), (), ToClean())
    seen = Recorder(torch.tensor(1.0, requires_grad=True))
    with torch.no_grad():
        made = simulation.make(Denoiser(seen, PATH, "x0"), Batch(torch.zeros(2, 3), {}, {}), turn())
    assert not made.x0.requires_grad and not any(seen.graded)


def test_gan_losses_at_zero_and_their_directions():
    zero = torch.zeros(3)
    assert float(critic_loss(zero, zero)) == pytest.approx(2 * 0.693147, abs=1e-5)
    assert float(deceiver_loss(zero)) == pytest.approx(0.693147, abs=1e-5)
    assert critic_loss(zero + 1, zero - 1) < critic_loss(zero, zero) < critic_loss(zero - 1, zero + 1)
    assert deceiver_loss(zero + 1) < deceiver_loss(zero)


def test_critic_reads_the_middle_of_the_fake_network(tiny_teacher):
    unet = tiny_teacher.load("unet")
    x, t, ctx = torch.randn(2, 4, 16, 16), torch.tensor([10.0, 900.0]), torch.randn(2, 24, 32)
    caught = []
    hook = unet.mid_block.register_forward_hook(lambda module, args, out: caught.append(out))
    unet(x, t, ctx)
    hook.remove()
    run = as_network(tiny_teacher.family.denoiser(unet, False))
    found = read_blocks(unet, ["mid_block"], lambda: run(x, t, {"ctx": ctx}))
    assert torch.equal(found[0], caught[0])
    fake = FakeWithCritic(unet.requires_grad_(True), run)
    logits = fake.judge(x, t, {"ctx": ctx})
    assert logits.shape == (2, 1, 8, 8)
    logits.sum().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0 and unet.conv_out.weight.grad is None


def cast(student):
    affine = nn.Linear(3, 1)
    roles = {
        "student": Denoiser(lambda x, t, cond: student(x), PATH, "x0"),
        "teacher": exact(gaussian(torch.zeros(3), 1.0), PATH, "v"),
        "fake": exact(gaussian(torch.ones(3), 1.0), PATH, "v"),
    }
    return Cast(roles, lambda x, t, cond: affine(x.float())), affine


def test_each_turn_reaches_its_own_weights_only():
    objective = dmd2().objective
    student = nn.Linear(3, 3)
    batch = Batch(torch.randn(8, 3), {"ctx": torch.zeros(8, 1)}, {"ctx": torch.zeros(8, 1)})
    roles, head = cast(student)
    total, metrics = objective.loss("student", roles, batch, turn())
    assert {"dmd_gradient", "gan_student"} <= set(metrics)
    grads = torch.autograd.grad(total, [*student.parameters()])
    assert all(g.abs().sum() > 0 for g in grads)
    total, metrics = objective.loss("fake", roles, batch, turn(player="fake"))
    assert {"denoising", "gan_critic", "critic_right"} <= set(metrics)
    grads = torch.autograd.grad(total, [*student.parameters(), *head.parameters()], allow_unused=True)
    assert grads[0] is None and grads[1] is None and grads[2].abs().sum() > 0


def test_share_of_the_batch_that_is_judged():
    adversary = Adversary(student_weight=1.0, critic_weight=1.0, times=UniformTimes(), share=0.5)
    assert adversary.rows(8) == slice(0, 4) and adversary.rows(1) == slice(0, 1)
