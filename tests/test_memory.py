"""The estimate of a run's memory against what a fresh process then holds, and who is counted in it."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.trainers.loop.memory import Memory, _continued, _Live, modules_in, weight_bytes
from fewstep.trainers.networks.critics import vision_network
from fewstep.trainers.networks.student import load_denoiser
from fewstep.trainers.pictures.features import load_features
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.runs.budget import assembled, estimate
from tiny import copy_bundle

SCRIPT = Path(__file__).with_name("measure_memory.py")
BATCH = {"lcm": 32, "dmd2": 16, "dmd2 lora": 16, "jdm init=scenes-lcm": 16}


@pytest.mark.parametrize("recipe", list(BATCH))
def test_the_estimate_is_within_15_percent_of_the_peak(recipe):
    name, *lora = recipe.split()
    # glibc would keep small freed blocks; what is freed is to be seen as free
    env = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(SCRIPT), name, str(BATCH[recipe]), *lora]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.85 < found["estimate"] / found["peak"] < 1.15, found
    assert found["step"] > 0.3 * found["estimate"], "what a step adds is a large part of it"


def test_live_bytes_follow_what_is_made_and_freed():
    base = torch.zeros(1000)
    with _Live() as live:
        a = base + 1
        b = a.view(10, 100)
        c = a * 2
        assert live.now == 8000, "a view is no further memory"
        del a, c
        assert live.now == 4000 and b.sum() == 1000
        base.add_(1)
        del b
    assert live.now == 0 and max(live.series) == 8000


def test_the_peak_moves_with_the_batch():
    small, large = [0, 10, 100, 5], [0, 20, 101, 5]
    assert _continued([(1, small), (2, large)], 2) == 101
    assert _continued([(1, small), (2, large)], 64) == 10 + 63 * 10, "what grows fastest is the peak of a large batch"
    assert _continued([(2, small)], 4) == 200
    assert str(Memory(2**20, 2**21, 2**22)) == (
        "memory per process: 7 MiB (weights and averages 1 MiB, optimiser 2 MiB, a step at its peak 4 MiB)"
    )


class Holder(nn.Module):
    """A network that keeps another where it is none of its submodules."""

    def __init__(self, outside):
        super().__init__()
        self.own, self._outside = nn.Linear(2, 2), (outside,)

    def judge(self):
        return self._outside[0]


def test_networks_are_found_wherever_they_are_held():
    first, second, third, last = (nn.Linear(4, 4, bias=False) for _ in range(4))
    last.weight = first.weight  # shared
    held, ring, gone = Holder(first), [last], None
    ring.append(ring)

    def ask(network=second):
        return third, network, ring, gone  # noqa: F821 - it has no value

    del gone  # a function may close over a name that has no value
    found = list(modules_in({"judge": held.judge, "ask": partial(ask)}))
    assert {id(m) for m in found} == {id(m) for m in (held, held.own, first, second, third, last)}
    assert len(found) == 6 and list(modules_in("nobody", 3, None, torch.zeros(2), nn)) == []
    assert weight_bytes(held.judge, partial(ask)) == 4 * (6 + 3 * 16)


def own_bytes(*networks):
    """Of weights and buffers that these say they have."""
    kept = {w.data_ptr(): w.nbytes for net in networks for w in (*net.parameters(), *net.buffers())}
    return sum(kept.values())


HELD = {
    "uni-dad": lambda teacher: own_bytes(load_denoiser(teacher)),
    "add": lambda teacher: own_bytes(teacher.decoder(), vision_network(None)),
    "gdd": lambda teacher: own_bytes(teacher.decoder(), vision_network(None)),
    "rg-lcd": lambda teacher: own_bytes(teacher.decoder(), load_features()),
    "ladd": lambda teacher: 0,
}
"""Recipe -> bytes of what it holds beside its players and its teacher; a critic on the teacher has nothing."""
SETTINGS = {"rg-lcd": {"reward": "typical"}}


@pytest.mark.parametrize("name", HELD)
def test_whoever_judges_or_teaches_beside_is_counted_once(name, tiny_teacher, tmp_path):
    settings = {"adapted": str(copy_bundle(tiny_teacher, tmp_path / "adapted"))} if name == "uni-dad" else {}
    recipe = configure(RECIPES[name], {"batch": 2, "scenes": 4, **settings, **SETTINGS.get(name, {})})
    method, frozen = assembled(recipe, tiny_teacher)
    players = [net for player in method.players for net in (player.module, *player.averages.values())]
    known = own_bytes(*players, frozen)
    assert weight_bytes(method, frozen) - known == HELD[name](tiny_teacher)
    told = estimate(recipe, tiny_teacher.root)
    moments = sum(8 * player["trained"] for player in told["players"].values())
    beside = own_bytes(tiny_teacher.text_encoder(), tiny_teacher.decoder())  # the text's, and the run's pictures'
    assert told["bytes"] == known + HELD[name](tiny_teacher) + beside + moments + told["step_bytes"]
