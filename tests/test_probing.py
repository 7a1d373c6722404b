"""Which runs of layers one layer may replace, on layers whose linearity is planted."""

import pytest
import torch
from test_surgery import answer, pixart, sana, sd3, unet
from torch import nn

from fewstep.trainers.errors import RecipeError
from fewstep.trainers.networks.probing import (
    Probe,
    _end_of_run,
    affine_fit,
    alignments,
    cka,
    find_runs,
    fit_probes,
    layer_states,
    linear_runs,
)
from fewstep.trainers.networks.surgery import Run, layer_twins, layers_after, replace_runs
from fewstep.trainers.networks.watch import lead, stage_pairs, watch_both


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layer(nn.Module):
    def __init__(self, width, bent):
        super().__init__()
        self.map, self.bent = nn.Linear(width, width), bent

    def forward(self, x):
        x = x + self.map(x)
        return torch.sin(9 * x) if self.bent else x


class Row(nn.Module):
    def __init__(self, *bent, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(width, b) for b in bent)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def states_of(row, count=600):
    x = noise(2, count // 2, 6)
    return layer_states(row.layers, lambda: row(x)), x


def runs_of(states, least=0.95, rise=0.01):
    return linear_runs(states, fit_probes(states), least=least, rise=rise)


def test_states_are_what_stands_between_layers():
    row = Row(True, False)
    states, x = states_of(row)
    assert [set(state) for state in states] == [{"picture"}] * 3
    assert torch.equal(states[0]["picture"], x.flatten(0, 1))
    assert torch.allclose(states[2]["picture"], row(x).flatten(0, 1))
    few = layer_states(row.layers, lambda: (row(x), row(x)), most=60)
    assert few[1]["picture"].shape == (120, 6), "sixty of each call"


def test_the_planted_run_is_found():
    states, _ = states_of(Row(True, False, False, False, True, True))
    assert runs_of(states) == [(1, 3)]
    assert layers_after(6, runs_of(states)) == (0, 2, 4, 5)
    two, _ = states_of(Row(False, False, True, False, False, False))
    assert runs_of(two) == [(0, 1), (3, 5)]


def test_alignment_is_one_along_linear_layers_and_falls_where_they_end():
    states, _ = states_of(Row(False, False, False, True))
    aligned = alignments(states, fit_probes(states), 0, 4)
    assert aligned[:3] == pytest.approx([1.0] * 3, abs=1e-6) and aligned[3] < 0.5


def test_a_run_ends_where_the_fall_grows():
    """Alignment that falls by 0.02 a layer goes on for ever; by 0.02, 0.02, then 0.06 it ends before the third."""

    def ends(aligned, rise=0.01, least=0.5):
        return _end_of_run(aligned, least, rise)

    assert ends([0.98, 0.96, 0.94, 0.92]) == 3
    assert ends([0.98, 0.96, 0.90, 0.89]) == 1
    assert ends([0.98, 0.96, 0.90, 0.89], rise=0.05) == 3
    assert ends([0.98, 0.96, 0.94, 0.92], least=0.95) == 1
    assert ends([0.4, 0.4]) == -1


def test_few_tokens_do_not_look_linear():
    x = noise(80, 30)
    y = torch.sin(50 * noise(80, 30, seed=2))
    guess = affine_fit(x, y)(x)
    assert cka(guess[::2], y[::2]) > 0.8 > 0.6 > cka(guess[1::2], y[1::2])


def test_alignment_does_not_see_turns_and_scales():
    x = noise(200, 4).double()
    turn, _ = torch.linalg.qr(noise(4, 4).double())
    assert cka(x, 3 * x @ turn + 1) == pytest.approx(1.0)
    assert cka(x, noise(200, 4, seed=5)) < 0.1


@torch.no_grad()
def calm(network, layers, left=0.0):
    """Make what these layers add nothing, or as little as is `left`."""
    for k in layers:
        for name, weight in network.transformer_blocks[k].named_parameters():
            if any(f".{end}." in f".{name}" for end in OUTPUTS):
                weight.mul_(left)
    return network


OUTPUTS = ("to_out.0", "to_add_out", "ff.net.2", "ff_context.net.2", "conv_point")


def shake(network):
    """Make every layer's feed-forward part count, and more than those before it, so that none is near linear."""
    with torch.no_grad():
        for k, block in enumerate(network.transformer_blocks):
            for name, weight in block.named_parameters():
                if weight.ndim > 1 and ("ff.net" in name or "ff_context.net" in name or "conv_" in name):
                    weight.mul_(20.0 * 2.0**k)
    return network


def wide(network):
    """Many tokens: a probe of 16 channels needs more than two pictures of 8x8."""
    return lambda: [answer(network, noise(2, 4, 8, 8, seed=k)) for k in range(24)]


@pytest.mark.parametrize("make", [pixart, sana, sd3])
def test_layers_that_do_nothing_are_a_run(make):
    network = calm(shake(make(8)), (2, 3, 4))
    runs = find_runs(network, wide(network), Probe(least=0.97))
    assert runs == (Run("transformer_blocks", 2, 4),)
    smaller = replace_runs(network, [Run("transformer_blocks", 2, 4)]).eval()
    assert smaller.config.num_layers == 6
    if make is not sd3:  # which of its layers attend twice depends on their number
        assert torch.allclose(answer(smaller), answer(network), atol=1e-4, rtol=1e-3)


def test_no_run_is_an_error_with_the_best_pair():
    network = shake(pixart(3))
    with pytest.raises(RecipeError, match=r"best pair is aligned by 0\.\d+, and least is 1\.5"):
        find_runs(network, wide(network), Probe(least=1.5))


@pytest.mark.parametrize(
    ("make", "runs", "message"),
    [
        (pixart, ("transformer_blocks.1-9",), r"this PixArtTransformer2DModel has transformer_blocks\.0-5"),
        (pixart, ("layers.1-2",), "runs holds layers.1-2"),
        (pixart, ("transformer_blocks.1-3", "transformer_blocks.3-4"), "overlap; a layer can go once"),
        (sd3, ("transformer_blocks.4-5",), "SD3's last layer is special"),
        (unet, (), "UNet2DConditionModel has no stack of like layers"),
    ],
)
def test_runs_that_are_not_there_are_refused(make, runs, message):
    with pytest.raises(RecipeError, match=message):
        replace_runs(make(), [Run.read(run) for run in runs])


@pytest.mark.parametrize("text", ["3-5", "blocks.5-3", "blocks.3", "blocks.3-3", "a b.1-2"])
def test_runs_are_written_as_stack_and_ends(text):
    assert str(Run.read("transformer_blocks.3-5")) == "transformer_blocks.3-5"
    with pytest.raises(RecipeError, match=r"STACK\.FIRST-LAST"):
        Run.read(text)


def test_the_new_layers_know_their_runs():
    runs = [Run("a", 4, 6), Run("a", 1, 2), Run("b", 0, 1)]
    assert layer_twins(runs) == {"a.1": runs[1], "a.3": runs[0], "b.0": runs[2]}


@pytest.mark.parametrize("make", [pixart, sana, sd3])
def test_a_layer_sees_what_its_run_saw_while_it_is_led(make):
    """Both streams of each: the teacher's before the run while led, the student's own else."""
    larger = make()
    runs = [Run("transformer_blocks", 1, 3)]
    smaller = replace_runs(larger, runs).eval()
    with torch.no_grad():
        for weight in smaller.transformer_blocks[0].parameters():
            weight.add_(0.3 * noise(*weight.shape))
    pairs = stage_pairs(smaller, larger, runs)
    assert list(pairs) == ["transformer_blocks.1"]
    seen, led = watch_both(smaller, larger, pairs), lead(smaller, larger, pairs)
    answer(larger)
    streams = {"transformer_blocks.1", *(("transformer_blocks.1 text",) if make is sd3 else ())}
    assert set(seen["teacher"]) == streams
    found = {}
    for on in (True, False):
        led.on = on
        answer(smaller)
        found[on] = dict(seen["student"])
    plain = replace_runs(larger, runs).eval()  # its first layer is the larger one's, so its new layer sees the same
    wanted = watch_both(plain, larger, pairs)["student"]
    answer(plain)
    for name in streams:
        torch.testing.assert_close(found[True][name], wanted[name])
        assert not torch.allclose(found[False][name], wanted[name], atol=1e-3)
