"""Calibration sees what the student's own sampling meets: its times, its guidance, its contexts, its latents."""

import torch

from fewstep.export.calibration import student_feeds
from fewstep.runtime.engine import TEXT
from fewstep.runtime.engines.torch_engine import TorchEngine

PROMPTS = ("a red ring", "two stars", "a cross", "blue square")


def test_times_are_those_of_the_students_grids(tiny_lcm):
    feeds = student_feeds(tiny_lcm, prompts=PROMPTS)
    grids = tiny_lcm.spec.grids
    times = [float(row["t"]) for row in (*feeds["denoiser"], *feeds["denoiser+control"])]
    assert sorted(times) == sorted(t for count in (1, 2, 4, 8) for t in grids[count])
    assert len(feeds["decoder"]) == len(feeds["encoder"]) == len(PROMPTS)
    assert all(value.shape[0] == 1 for rows in feeds.values() for row in rows for value in row.values())


def test_guidance_and_contexts_are_those_of_the_plans(tiny_lcm):
    feeds = student_feeds(tiny_lcm, prompts=PROMPTS * 3)
    spec = tiny_lcm.spec
    asked = {float(row["w"]) for row in feeds["denoiser"]}
    assert asked == {spec.guidance.default, *spec.guidance.range}
    (wanted,) = TorchEngine(tiny_lcm).run(TEXT, feeds[TEXT][0])
    assert torch.equal(feeds["denoiser"][0]["ctx"], wanted)


def test_latents_lie_on_the_way_from_noise_to_the_decoder(tiny_dmd2):
    feeds = student_feeds(tiny_dmd2, prompts=PROMPTS)
    last = {float(row["t"]): row["x"] for row in feeds["denoiser"]}
    assert last[999.0].std() > 0.9
    again = student_feeds(tiny_dmd2, prompts=PROMPTS)
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(feeds["denoiser"], again["denoiser"], strict=True))
    assert [row["latent"].shape for row in feeds["decoder"]] == [(1, 4, 16, 16)] * len(PROMPTS)


def test_both_sides_of_classifier_free_guidance_are_rows(tiny_teacher):
    feeds = student_feeds(tiny_teacher, prompts=PROMPTS[:1])
    assert len(feeds["denoiser"]) == 2 * 4
    assert not torch.equal(feeds["denoiser"][0]["ctx"], feeds["denoiser"][1]["ctx"])
