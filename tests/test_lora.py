"""Merged LoRAs against diffusers' own pipeline with the same files loaded and weighted, picture for picture."""

import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fewstep.models.bundle import seal_bundle
from fewstep.models.errors import BundleError
from fewstep.models.lora import merge_loras
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import GenerateRequest

PROMPT = "a red cat, a big dog"
BOUND = 1 / 255
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj"]


@pytest.fixture(scope="module")
def files(tiny_dmd2, tmp_path_factory):
    """first: U-Net and text encoder by PEFT, with settings. kohya: U-Net and text encoder in kohya's names, alphas."""
    folder = tmp_path_factory.mktemp("loras")
    first = layers_of(tiny_dmd2.load("unet"), UNET_LAYERS, rank=4, seed=1)
    words = layers_of(tiny_dmd2.load("text_encoder"), ["q_proj", "v_proj", "fc1"], rank=2, seed=2)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=first, text_encoder_lora_layers=words)
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "first.safetensors")
    second = layers_of(tiny_dmd2.load("unet"), ["to_q", "to_v", "conv2"], rank=3, seed=3)
    every = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # as kohya trains them
    more = layers_of(tiny_dmd2.load("text_encoder"), every, rank=2, seed=4)
    save_file(
        {**kohya_names(second, "lora_unet_", alpha=1.5), **kohya_names(more, "lora_te_text_model_", alpha=2.0)},
        folder / "kohya.safetensors",
    )
    return folder


def layers_of(model, targets, *, rank, seed):
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
    return get_peft_model_state_dict(model, adapter_name="default")


def kohya_names(state, prefix, *, alpha):
    out = {}
    for name, value in state.items():
        layer, part, _ = name.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.").rsplit(".", 2)
        flat = prefix + layer.replace(".", "_")
        out[f"{flat}.{part}.weight"] = value
        out[f"{flat}.alpha"] = torch.tensor(alpha)
    return out


def copied(bundle, to):
    shutil.copytree(bundle.root, to)
    return to


def pictures(root, bundle, steps=(1, 4)):
    made = seal_bundle(root, bundle.name, bundle.spec)
    engine = TorchEngine(made)
    return [run_request(engine, made, GenerateRequest(prompt=PROMPT, seed=5, steps=n)).pictures[0] / 255 for n in steps]


def references(bundle, loras, steps=(1, 4)):
    pipe = StableDiffusionPipeline.from_pretrained(bundle.root)
    pipe.set_progress_bar_config(disable=True)
    for k, (path, _) in enumerate(loras):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"a{k}")
    pipe.set_adapters([f"a{k}" for k in range(len(loras))], [weight for _, weight in loras])
    settings = {"guidance_scale": 1.0, "output_type": "np", "height": 32, "width": 32}
    return [
        pipe(PROMPT, generator=torch.Generator().manual_seed(5), num_inference_steps=n, **settings).images[0]
        for n in steps
    ]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of diffusers' pipeline with two LoRAs
@pytest.mark.parametrize(
    "wanted", [[("first", 1.0)], [("kohya", 0.7)], [("first", 0.8), ("kohya", -0.5)]], ids=["peft", "kohya", "both"]
)
def test_merged_is_diffusers_with_the_loras_loaded(tiny_dmd2, files, tmp_path, wanted):
    loras = [(files / f"{name}.safetensors", weight) for name, weight in wanted]
    root = copied(tiny_dmd2, tmp_path / "merged")
    sources = merge_loras(root, loras)
    plain = pictures(copied(tiny_dmd2, tmp_path / "plain"), tiny_dmd2)
    for ours, theirs, before in zip(pictures(root, tiny_dmd2), references(tiny_dmd2, loras), plain, strict=True):
        assert np.abs(ours - theirs).max() <= BOUND
        assert np.abs(before - theirs).max() > 4 * BOUND, "the LoRA made no difference"
    for source, (path, weight) in zip(sources, loras, strict=True):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert source == {"kind": "lora", "file": path.name, "sha256": digest, "weight": weight}


def test_settings_in_a_file_are_read(tiny_dmd2, files, tmp_path):
    """lora_alpha 8 of rank 4 in the file's metadata doubles the LoRA, as diffusers reads it."""
    unet = tiny_dmd2.load("unet")
    torch.manual_seed(6)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    unet.add_adapter(config)
    state = get_peft_model_state_dict(unet, adapter_name="default")
    settings = {**config.to_dict(), "target_modules": ["to_q", "to_v"]}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata={**settings, "peft_type": "LORA"}
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    root = copied(tiny_dmd2, tmp_path / "merged")
    merge_loras(root, [(file, 1.0)])
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    before, after = (
        load_file(r / "unet/diffusion_pytorch_model.safetensors")[layer + ".weight"] for r in (tiny_dmd2.root, root)
    )
    torch.testing.assert_close(
        after - before, 2 * state[layer + ".lora_B.weight"] @ state[layer + ".lora_A.weight"], rtol=1e-3, atol=1e-5
    )


def test_hard_links_to_the_source_stay_whole(tiny_dmd2, files, tmp_path):
    root = tmp_path / "linked"
    shutil.copytree(tiny_dmd2.root, root, copy_function=os.link)
    before = {p: p.read_bytes() for p in tiny_dmd2.root.rglob("*") if p.is_file()}
    merge_loras(root, [(files / "first.safetensors", 1.0)])
    assert {p: p.read_bytes() for p in tiny_dmd2.root.rglob("*") if p.is_file()} == before
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (root / weights).read_bytes() != before[tiny_dmd2.root / weights]
    assert not list(root.rglob("adapter_*")), "nothing of PEFT is left beside the weights"


def test_weight_zero_changes_nothing(tiny_dmd2, files, tmp_path):
    root = copied(tiny_dmd2, tmp_path / "zero")
    merge_loras(root, [(files / "kohya.safetensors", 0.0)])
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(tiny_dmd2.root / name), load_file(root / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_lora_of_a_transformer(tmp_path):
    """SANA's class and names; the merged weights are W + w B A."""
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    net = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    root = tmp_path / "sana"
    net.save_pretrained(root / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    state = layers_of(net, ["attn1.to_q", "attn2.to_out.0"], rank=2, seed=1)
    SanaPipeline.save_lora_weights(tmp_path, transformer_lora_layers=state)
    before = load_file(root / "transformer/diffusion_pytorch_model.safetensors")
    merge_loras(root, [(tmp_path / "pytorch_lora_weights.safetensors", 0.5)])
    after = load_file(root / "transformer/diffusion_pytorch_model.safetensors")
    layer = "transformer_blocks.0.attn2.to_out.0"
    change = 0.5 * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
    torch.testing.assert_close(after[f"{layer}.weight"] - before[f"{layer}.weight"], change, rtol=1e-3, atol=1e-6)
    assert [k for k in before if not torch.equal(before[k], after[k])] == [
        f"transformer_blocks.0.{k}.weight" for k in ("attn1.to_q", "attn2.to_out.0")
    ]


class TestRefused:
    def refusal(self, bundle, tmp_path, lora):
        """What merging says; nothing of the folder may change."""
        root = copied(bundle, tmp_path / "refused")
        before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
        with pytest.raises(BundleError) as caught:
            merge_loras(root, [lora])
        assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
        return str(caught.value)

    def test_another_base(self, tiny_dmd2, tmp_path):
        """A wider prompt, as a LoRA of SDXL on SD 1.5: the layer and the shapes of both sides."""
        config = {**tiny_dmd2.config("unet"), "cross_attention_dim": 48}
        other = UNet2DConditionModel.from_config(config)
        state = layers_of(other, ["attn2.to_k"], rank=2, seed=0)
        StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
        file = tmp_path / "pytorch_lora_weights.safetensors"
        layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
        match = rf"{layer} is 48 wide \(in\), and .*unet has 32 \(shapes \(2, 48\) and \(16, 32\)\).*import the base"
        assert re.search(match, self.refusal(tiny_dmd2, tmp_path, (file, 1.0)))

    def test_layers_that_are_not_there(self, tiny_dmd2, tmp_path):
        file = tmp_path / "deep.safetensors"
        shapes = {"A": (2, 16), "B": (16, 2)}
        name = "unet.down_blocks.7.attentions.0.to_q"
        save_file({f"{name}.lora_{k}.weight": torch.zeros(s) for k, s in shapes.items()}, file)
        assert re.search(rf"changes {name}, which .*unet does not have", self.refusal(tiny_dmd2, tmp_path, (file, 1.0)))

    def test_components_that_are_not_there(self, tiny_dmd2, tmp_path):
        file = tmp_path / "flux.safetensors"
        save_file({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 16)}, file)
        assert re.search("transformer.blocks.0.*has unet, text_encoder", self.refusal(tiny_dmd2, tmp_path, (file, 1.0)))

    @pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
    def test_pickles(self, tiny_dmd2, tmp_path, suffix):
        file = tmp_path / f"lora{suffix}"
        file.write_bytes(b"x")
        assert "not a safetensors file; convert it" in self.refusal(tiny_dmd2, tmp_path, (file, 1.0))

    def test_a_file_that_is_no_lora(self, tiny_dmd2, tmp_path):
        weights = tiny_dmd2.root / "unet/diffusion_pytorch_model.safetensors"
        assert re.search(
            "changes '.*', and .* has unet, text_encoder", self.refusal(tiny_dmd2, tmp_path, (weights, 1.0))
        )

    def test_names_that_diffusers_does_not_read(self, tiny_dmd2, tmp_path):
        """Its reader of kohya's text encoders knows them only with their output projections."""
        file = tmp_path / "half.safetensors"
        name = "lora_te_text_model_encoder_layers_0_self_attn_k_proj.lora_"
        save_file({f"{name}down.weight": torch.zeros(2, 32), f"{name}up.weight": torch.zeros(32, 2)}, file)
        assert "names for text_encoder that diffusers does not read" in self.refusal(tiny_dmd2, tmp_path, (file, 1.0))

    def test_other_adapters(self, tiny_dmd2, tmp_path):
        file = tmp_path / "loha.safetensors"
        save_file({"lora_unet_conv_in.hada_w1_a": torch.zeros(2, 2)}, file)
        assert "is a LoHa, not a LoRA" in self.refusal(tiny_dmd2, tmp_path, (file, 1.0))

    def test_broken_missing_and_unweighted(self, tiny_dmd2, files, tmp_path):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"{}")
        assert "cannot be read as safetensors" in self.refusal(tiny_dmd2, tmp_path / "1", (broken, 1.0))
        assert "does not exist" in self.refusal(tiny_dmd2, tmp_path / "2", (tmp_path / "no.safetensors", 1.0))
        assert "weight of first" in self.refusal(tiny_dmd2, tmp_path / "3", (files / "first.safetensors", float("nan")))

    def test_pipelines_without_loras(self, tiny_dmd2, files, tmp_path):
        root = copied(tiny_dmd2, tmp_path / "pixart")
        index = json.loads((root / "model_index.json").read_text())
        (root / "model_index.json").write_text(json.dumps({**index, "_class_name": "PixArtAlphaPipeline"}))
        with pytest.raises(BundleError, match="diffusers has no LoRA for it"):
            merge_loras(root, [(files / "first.safetensors", 1.0)])
