"""A training step costs what its networks' evaluations cost: what the loop and an objective add is under 5 percent.

Measured on consistency distillation of the built-in family's denoiser (3 million weights, batches of 64), by the
processor's time, so that other work on the machine counts little. Everything but the networks' own forward and backward
passes is overhead: batches, draws, the path's arithmetic, the loss, the optimiser, the averages, the log.
"""

import itertools
import statistics
import time

import torch

from fewstep.models.denoiser import Denoiser
from fewstep.models.networks import as_network
from fewstep.models.paths import VP
from fewstep.trainers.loop.loop import LoopSettings, train
from fewstep.trainers.loop.method import Assembled
from fewstep.trainers.loop.player import Player
from fewstep.trainers.parts.objective import Batch, Cast
from fewstep.trainers.pictures.family import LATENT_CHANNELS, LATENT_SIZE, TEXT_WIDTH, TOKENS, build_unet
from fewstep.trainers.recipes.consistency import cd

LIMIT = 0.05
STEPS, BATCH = 3, 64


class Clock:
    """Seconds within the networks. A backward pass counts from where the network's output gets its gradient."""

    def __init__(self):
        self.inside, self.began = 0.0, None

    def watch(self, denoiser):
        def net(x, t, cond):
            begun = time.process_time()
            out = denoiser.net(x, t, cond)
            self.inside += time.process_time() - begun
            if out.requires_grad:
                out.register_hook(self.mark)
            return out

        return Denoiser(net, denoiser.path, denoiser.prediction)

    def mark(self, gradient):
        self.began = time.process_time()

    def backward(self, tensor, plain=torch.Tensor.backward):
        plain(tensor)
        self.inside += time.process_time() - self.began


class Source:
    def batch(self, step):
        rng = torch.Generator().manual_seed(step)
        x0 = torch.randn(BATCH, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=rng)
        words = torch.randn(BATCH, TOKENS, TEXT_WIDTH, generator=rng)
        return Batch(x0, {"ctx": words}, {"ctx": torch.zeros_like(words)})


def denoiser_of(unet):
    from fewstep.models.families import FAMILIES

    network = FAMILIES["UNet2DConditionModel"](dict(unet.config)).denoiser(unet, False)
    return Denoiser(as_network(network), VP(), "v")


def test_a_step_is_its_networks_evaluations(tmp_path, monkeypatch):
    stage, clock = cd().stages[-1], Clock()
    torch.manual_seed(0)
    student = Player("student", build_unet(), stage.player_settings["student"])
    roles = {"student": student.module, "teacher": build_unet().requires_grad_(False), **student.averages}
    cast = Cast({role: clock.watch(denoiser_of(unet)) for role, unet in roles.items()})
    monkeypatch.setattr(torch.Tensor, "backward", lambda tensor: clock.backward(tensor))
    seen = []
    train(
        Assembled(stage.objective, cast, (student,)), Source(),
        LoopSettings(steps=STEPS, bf16=False, checkpoint_every=0, picture_every=1), tmp_path,
        on_picture=lambda step: seen.append((time.process_time(), clock.inside)),
    )  # fmt: skip
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(seen)]  # but the first, which warms up
    overhead = statistics.median(whole / inside - 1.0 for whole, inside in steps)
    print(f"cd: {steps[0][0]:.3f} s a step, {overhead:.2%} over its networks' evaluations")
    assert 0.0 < overhead < LIMIT
