"""Checkpoints in their trainers' own layout, opened without a network; small, of the real key names."""

import re
import socket

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from fewstep.models.bundle import load_component
from fewstep.models.errors import BundleError
from fewstep.models.importing import import_folder
from fewstep.models.known import known
from fewstep.models.shapes import make_folder
from fewstep.models.single_file import open_single_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}


def unet_name(name, layers, attended):
    """diffusers' name -> the trainers', after diffusers' own convert_diffusers_to_original_sdxl.py, any depth."""
    for ours, theirs in UNET_TOP.items():
        if name.startswith(ours + "."):
            return name.replace(ours, theirs, 1)
    part, i, kind, j, rest = re.match(
        r"(down|up|mid)_blocks?\.(\d+)?\.?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    ).groups()
    i, j = int(i or 0), int(j)
    if kind == "resnets":
        first, _, last = rest.partition(".")
        rest = f"{RESNET[first]}.{last}"
    if part == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * j}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (i + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * i + layers}.{2 if attended(i) else 1}.{rest}"
    place = (layers + 1) * i + j
    where = f"input_blocks.{place + 1}" if part == "down" else f"output_blocks.{place}"
    return f"{where}.{int(kind == 'attentions')}.{rest}"


def vae_name(name, blocks):
    for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), ("group_norm", "norm")):
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def open_clip(state, prefix):
    out = {}
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            out[prefix + "text_projection"] = value.T.contiguous()
        elif layer := re.match(r"encoder\.layers\.(\d+)\.(.*)", name):
            block, rest = f"{prefix}transformer.resblocks.{layer[1]}.", layer[2]
            if match := re.match(r"self_attn\.([qkv])_proj\.(weight|bias)", rest):
                out.setdefault(f"{block}attn.in_proj_{match[2]}", {})[match[1]] = value
                continue
            for ours, theirs in (("self_attn", "attn"), ("layer_norm", "ln_"), ("fc1", "c_fc"), ("fc2", "c_proj")):
                rest = rest.replace(ours, theirs)
            out[block + rest] = value
        else:
            for ours, theirs in OPEN_CLIP.items():
                name = name.replace(ours, theirs)
            out[prefix + name] = value
    return {k: torch.cat([v[p] for p in "qkv"]) if isinstance(v, dict) else v for k, v in out.items()}


def checkpoint(folder, path, *, xl):
    """The folder's weights in one file, under the names of the trainers."""
    unet, vae = load_component(folder, "unet"), load_component(folder, "vae")

    def attended(i):
        return "CrossAttn" in unet.config.up_block_types[i]

    out = {
        "model.diffusion_model." + unet_name(name, unet.config.layers_per_block, attended): value
        for name, value in unet.state_dict().items()
    }
    for name, value in vae.state_dict().items():
        linear = "attentions" in name and "group_norm" not in name and value.ndim == 2
        theirs = vae_name(name, len(vae.config.block_out_channels))
        out["first_stage_model." + theirs] = value[:, :, None, None] if linear else value
    text = load_component(folder, "text_encoder").state_dict()
    prefix = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    out |= {f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in text.items()}
    if xl:
        out |= open_clip(load_component(folder, "text_encoder_2").state_dict(), "conditioner.embedders.1.model.")
    save_file({name: value.clone().contiguous() for name, value in out.items()}, path)
    return path


@pytest.fixture(scope="module", params=["sd15-tiny", "sdxl-tiny"])
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("single")
    folder = make_folder(request.param, root / "folder")
    file = checkpoint(folder, root / "model.safetensors", xl=request.param.startswith("sdxl"))
    return request.param.partition("-")[0], folder, file


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **settings):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_single_file_is_its_folder_again(case, tmp_path, no_network):
    """Settings from a folder without weights; every tensor to the bit, and then an import like any other."""
    name, folder, file = case
    config = tmp_path / "config"
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            (config / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (config / path.relative_to(folder)).write_bytes(path.read_bytes())
    out = open_single_file(file, tmp_path / "out", config)
    compared = 0
    for path in sorted(folder.rglob("*.safetensors")):
        wanted, found = load_file(path), load_file(out / path.relative_to(folder))
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            assert torch.equal(value, found[key]), key
            compared += 1
    assert compared > 100
    assert type(DiffusionPipeline.from_pretrained(out)).__name__.startswith("StableDiffusion")
    bundle = import_folder(out, tmp_path / "bundle", answers=known(name))
    assert bundle.family.name == ("sd" if name == "sd15" else name)
    assert not list(tmp_path.glob("*.opening"))


def test_another_base_is_refused(case, tmp_path, no_network):
    name, _, file = case
    other = make_folder("sdxl-tiny" if name == "sd15" else "sd15-tiny", tmp_path / "other")
    with pytest.raises(BundleError, match=r"model\.safetensors .*other.*the checkpoint's own base"):
        open_single_file(file, tmp_path / "out", other)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.opening"))


def test_a_file_that_lacks_weights_is_refused(case, tmp_path, no_network):
    _, folder, file = case
    tensors = load_file(file)
    word = next(name for name in tensors if "text_model.final_layer_norm.bias" in name)
    said = {"model.diffusion_model.out.2.bias": "it lacks weights of that base"}
    said[word] = r"lacks text_encoder\.(text_model\.)?final_layer_norm\.bias, which .*folder/text_encoder has"
    for missing, match in said.items():
        save_file({name: value for name, value in tensors.items() if name != missing}, tmp_path / "part.safetensors")
        with pytest.raises(BundleError, match=rf"part\.safetensors.*{match}"):
            open_single_file(tmp_path / "part.safetensors", tmp_path / "out", folder)
        assert not (tmp_path / "out").exists()


def test_bad_paths_are_refused(case, tmp_path):
    _, folder, file = case
    with pytest.raises(BundleError, match="is not a safetensors file; convert it"):
        open_single_file(tmp_path / "model.ckpt", tmp_path / "out", folder)
    with pytest.raises(BundleError, match=r"has no model_index\.json; name with --config"):
        open_single_file(file, tmp_path / "out", tmp_path)
    with pytest.raises(BundleError, match="exists already"):
        open_single_file(file, tmp_path, folder)
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match="cannot be read as safetensors"):
        open_single_file(tmp_path / "broken.safetensors", tmp_path / "out", folder)
