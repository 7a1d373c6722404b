"""Which parts can go, on networks where the answer is known."""

import pytest
import torch
from test_surgery import answer as transformed
from test_surgery import pixart, sd3, unet
from torch import nn

from fewstep.trainers.errors import RecipeError
from fewstep.trainers.pruning import (
    layer_inputs,
    linear_fit,
    linear_intervals,
    passing,
    ranked_cut,
    removal_scores,
    unet_removals,
)
from fewstep.trainers.surgery import Cut, cut_unet, keep_layers, layers_after


def silent(block):
    """Make residual branches of a U-Net block add nothing."""
    for name, weight in block.named_parameters():
        if name.split(".")[-2] in ("conv2", "proj_out"):
            nn.init.zeros_(weight)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def answers(network):
    x, t, ctx = noise(2, 4, 8, 8), torch.tensor([999.0, 10.0]), noise(2, 5, 16)
    return lambda: network(x, t, ctx).sample


def test_an_identity_ranks_first():
    network = unet()
    silent(network.mid_block)
    scores = removal_scores(answers(network), {n: r for n, (_, r) in unet_removals(network).items()})
    first, *others = scores
    assert first == "middle" and scores["middle"] < 1e-6
    assert others and all(scores[name] > 1e-3 for name in others)
    cut, found = ranked_cut(network, answers(network), 1)
    assert cut == Cut(middle=False) and found == scores


def test_what_ranks_first_can_really_go():
    """The score is the change of the network that is cut, where the cut leaves the other weights where they are."""
    network = unet()
    silent(network.mid_block)
    whole = answers(network)()
    without = answers(cut_unet(network, Cut(middle=False)).eval())()
    assert torch.allclose(whole, without, atol=1e-5)


def test_removals_leave_the_network_as_it_was():
    network = unet()
    before = answers(network)()
    removal_scores(answers(network), {n: r for n, (_, r) in unet_removals(network).items()})
    assert torch.equal(answers(network)(), before)


def test_several_parts_go_at_once():
    network = unet()
    parts = unet_removals(network)
    assert set(parts) == {"middle", "stage 0", "stage 1", "stage 2"}
    cut, scores = ranked_cut(network, answers(network), 4)
    assert cut == Cut(middle=False, layers=(1, 1, 1)) and list(scores.values()) == sorted(scores.values())
    with pytest.raises(RecipeError, match="remove is 5; this U-Net has 4"):
        ranked_cut(network, answers(network), 5)


@pytest.mark.parametrize("make", [pixart, sd3])
def test_an_idle_transformer_layer_ranks_first(make):
    network = make()
    layer = network.transformer_blocks[3]
    for name, weight in layer.named_parameters():
        if ".to_out." in name or ".to_add_out." in name or ".ff.net.2." in f".{name}" or "ff_context.net.2" in name:
            nn.init.zeros_(weight)
    parts = {str(k): passing(block) for k, block in enumerate(network.transformer_blocks[:5])}
    scores = removal_scores(lambda: transformed(network), parts)
    assert next(iter(scores)) == "3" and scores["3"] < 1e-6 < min(v for k, v in scores.items() if k != "3")
    without = keep_layers(network, (0, 1, 2, 4, 5)).eval()
    if make is pixart:  # SD3 counts the layers that attend twice
        assert torch.allclose(transformed(without), transformed(network), atol=1e-5)


class Layers(nn.Module):
    """Layers 0, 4 and 5 are not linear; 1 to 3 are, as one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, hidden_states):
        x = hidden_states
        for k, layer in enumerate(self.layers):
            x = layer(x)
            if k in (0, 4, 5):
                x = torch.sin(9 * x)
        return x


def test_the_linear_interval_is_found():
    network, x = Layers(), noise(400, 6)
    entered = layer_inputs(network.layers, lambda: network(x))
    assert len(entered) == 7 and torch.equal(entered[0], x)
    states = [*entered[:-1], network(x)]  # the hooks see a layer's own output, the sine stands outside it
    states = [s.detach() for s in states]
    assert linear_intervals(states) == [(1, 3)]
    assert layers_after(6, linear_intervals(states)) == (0, 2, 4, 5)


def test_a_run_ends_where_the_fit_drops():
    x = noise(400, 4).double()
    bent = x + 0.25 * torch.sin(5 * x)
    states = [x, 2 * x + 1, x @ noise(4, 4).double(), bent, bent.exp()]
    assert linear_fit(states[0], states[2]) == pytest.approx(1.0, abs=1e-6)
    assert 0.9 < linear_fit(x, bent) < 0.99
    assert linear_intervals(states, least=0.8, drop=0.01) == [(0, 1)]
    assert linear_intervals(states, least=0.8, drop=0.2) == [(0, 2)]


def test_few_tokens_do_not_look_linear():
    assert linear_fit(noise(40, 30), torch.sin(50 * noise(40, 30))) < 0.5
