"""Which parts can go, on networks where the answer is known."""

import pytest
import torch
from test_surgery import answer as transformed
from test_surgery import pixart, sd3, unet
from torch import nn

from fewstep.trainers.errors import RecipeError
from fewstep.trainers.networks.pruning import passing, ranked_cut, removal_scores, unet_removals
from fewstep.trainers.networks.surgery import Cut, cut_unet, keep_layers


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
