"""Linear self-attention: its formula, its cost, and the folder that says it."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch.utils.flop_counter import FlopCounterMode

from fewstep.models.bundle import load_bundle, seal_bundle
from fewstep.models.errors import BundleError
from fewstep.models.linear_attention import FIELD, LinearAttention, linearise
from tiny import copy_bundle


def attention():
    torch.manual_seed(0)
    attn = Attention(query_dim=8, heads=2, dim_head=4).eval()
    attn.set_processor(LinearAttention(8))
    for weight in attn.processor.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return attn


def test_the_formula_token_by_token():
    attn, x = attention(), torch.randn(2, 5, 8)
    with torch.no_grad():
        ours = attn(x)
        p = attn.processor
        q, k, v = attn.to_q(x + p.q(x)), attn.to_k(x + p.k(x)), attn.to_v(x)
        out = torch.zeros(2, 5, 8)
        for b, h, i in np.ndindex(2, 2, 5):
            part = slice(4 * h, 4 * h + 4)
            f = torch.nn.functional.elu(q[b, i, part]) + 1
            keys = torch.nn.functional.elu(k[b, :, part]) + 1
            out[b, i, part] = (keys @ f / 5) @ v[b, :, part] / (f @ keys.mean(0) + 1e-4)
        assert torch.allclose(ours, attn.to_out[0](out), atol=1e-5)


def test_the_cost_grows_with_the_tokens():
    counts = []
    for tokens in (64, 128):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            attention()(torch.randn(1, tokens, 8))
        counts.append(counter.get_total_flops())
    assert counts[1] == 2 * counts[0]


def test_it_stands_for_self_attention_only():
    with pytest.raises(ValueError, match="self-attention over tokens"):
        attention()(torch.randn(1, 5, 8), encoder_hidden_states=torch.randn(1, 3, 8))


@pytest.fixture(scope="module")
def linear(tiny_lcm, tmp_path_factory):
    folder = copy_bundle(tiny_lcm, tmp_path_factory.mktemp("linear") / "lcm")
    unet = linearise(tiny_lcm.load("unet"))
    for module in unet.modules():
        if isinstance(module, LinearAttention):
            torch.nn.init.normal_(module.q[-1].weight)
    unet.save_pretrained(folder / "unet")
    return seal_bundle(folder, "linear", tiny_lcm.spec), unet


FEEDS = (torch.randn(2, 4, 16, 16), torch.tensor([999.0, 259.0]), torch.randn(2, 24, 32), torch.tensor([2.0, 3.0]))


def test_a_bundle_says_it_and_comes_back(linear, tiny_lcm):
    bundle, unet = linear
    assert bundle.config("unet")[FIELD] == "linear"
    again = bundle.load("unet")
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in unet.state_dict().items()}
    with torch.no_grad():
        ours, theirs = bundle.denoiser_net()(*FEEDS), tiny_lcm.denoiser_net()(*FEEDS)
    assert torch.isfinite(ours).all() and not torch.allclose(ours, theirs, atol=1e-3)
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


def test_another_word_and_lost_weights_are_refused(linear, tmp_path):
    folder = copy_bundle(linear[0], tmp_path / "broken")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {FIELD: "cubic"}))
    with pytest.raises(BundleError, match="fewstep_attention is 'cubic'; it must be 'linear' or absent"):
        load_bundle(folder, check_digests=False).load("unet")
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [16, 40]}))
    with pytest.raises(BundleError, match="cannot be loaded"):
        load_bundle(folder, check_digests=False).load("unet")


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch's exporter, of itself
def test_its_graph_is_the_same_network(tmp_path):
    """Exported alone, with a free number of tokens: plain products, no attention operator."""
    ort, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    attn, file = attention(), tmp_path / "linear.onnx"
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    torch.onnx.export(
        attn, (torch.randn(2, 16, 8),), file, input_names=["x"], dynamo=True, opset_version=20, verbose=False,
        dynamic_shapes={"hidden_states": {1: tokens}},
    )  # fmt: skip
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert "MatMul" in kinds and "Softmax" not in kinds
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (16, 100):
        x = torch.randn(2, count, 8)
        with torch.no_grad():
            want = attn(x).numpy()
        assert np.allclose(session.run(None, {"x": x.numpy()})[0], want, atol=1e-5)


def test_diffusers_refuses_the_folder_rather_than_run_softmax(tiny_teacher, tmp_path):
    from fewstep.trainers.recipes.recipe import configure
    from fewstep.trainers.recipes.registry import RECIPES
    from fewstep.trainers.runs.student_bundle import write_student

    recipe = configure(RECIPES["linfusion"], {})
    bundle = write_student(recipe, tiny_teacher, linearise(tiny_teacher.load("unet")), tmp_path / "student")
    with pytest.raises(ValueError, match="linear_attention` has no class"):
        DiffusionPipeline.from_pretrained(bundle.root, local_files_only=True)
