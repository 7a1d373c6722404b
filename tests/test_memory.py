"""The estimate of a run's memory against what a fresh process then holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep.trainers.loop.memory import Memory, _continued, _Live

SCRIPT = Path(__file__).with_name("measure_memory.py")
BATCH = {"lcm": 32, "dmd2": 16, "dmd2 lora": 16}


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
