"""A folder of the real classes with a LoRA and a ControlNet put in: controlled and plain rows share one engine call."""

import json

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from fewstep.models import commands
from fewstep.models.bundle import load_bundle
from fewstep.models.errors import BundleError
from fewstep.models.importing import Additions, import_folder
from fewstep.models.known import known
from fewstep.models.shapes import make_folder
from fewstep.runtime.engine import DENOISER_CONTROL
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import admit, run_request
from fewstep.runtime.sampling.request import Control, GenerateRequest
from fewstep.runtime.sampling.served import Served
from fewstep.runtime.sampling.text import Prompts
from fewstep.runtime.sampling.work import decode_rows, encode_texts, step_rows
from fewstep.runtime.service.local import Runtime

PROMPT = "a red cat"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(diffusers folder, LoRA file, ControlNet folder)."""
    root = tmp_path_factory.mktemp("parts")
    folder = make_folder("sd15-tiny", root / "folder")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    with torch.no_grad():
        for layer in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
            layer.weight.normal_(std=0.2)
    net.save_pretrained(root / "controlnet")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "conv1"]))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    state = {f"unet.{name}": value.contiguous() for name, value in get_peft_model_state_dict(unet).items()}
    save_file(state, root / "style.safetensors")
    return folder, root / "style.safetensors", root / "controlnet"


@pytest.fixture(scope="module")
def bundle(parts, tmp_path_factory):
    folder, lora, controlnet = parts
    additions = Additions(loras=((lora, 0.8),), controlnet=controlnet)
    return import_folder(
        folder, tmp_path_factory.mktemp("mixed") / "bundle", answers=known("sd-turbo"), additions=additions
    )


def edges():
    edge = np.zeros((32, 32, 3), np.uint8)
    edge[8:24, 8:10], edge[8:10, 8:24] = 255, 200
    return edge


def requests():
    plain = GenerateRequest(prompt=PROMPT, seed=1, steps=2)
    steered = GenerateRequest(prompt=PROMPT, seed=1, steps=2, control=Control(edge=edges(), scale=1.2))
    late = GenerateRequest(prompt="a big dog", seed=5, steps=4, control=Control(edge=edges(), start=0.5))
    return [plain, steered, late, GenerateRequest(prompt="a big dog", seed=5, steps=4)]


def test_what_was_put_in_is_kept_and_felt(parts, bundle, tmp_path):
    folder, lora, _ = parts
    plain = import_folder(folder, tmp_path / "plain", answers=known("sd-turbo"))
    sources = json.loads((bundle.root / "bundle.json").read_text())["sources"]
    assert [source["kind"] for source in sources] == ["lora", "controlnet"]
    assert sources[0]["weight"] == 0.8 and sources[0]["file"] == lora.name
    one, two = (run_request(TorchEngine(b), b, requests()[0]).pictures[0].astype(int) for b in (plain, bundle))
    assert np.abs(one - two).max() > 8, "the LoRA made no difference"


def test_controlled_and_plain_rows_in_one_call_equal_each_alone(bundle):
    engine = TorchEngine(bundle)
    calls = []
    run = engine.run
    engine.run = lambda role, feeds: calls.append((role, len(next(iter(feeds.values()))))) or run(role, feeds)
    model = Served(bundle.name, bundle.spec, engine, Prompts(bundle, capacity=8))
    lives = [admit(model, request) for request in requests()]
    encode_texts(model, lives)
    done = set()
    while len(done) < len(lives):
        rows = [(live, live.canvases[0]) for k, live in enumerate(lives) if k not in done]
        assert step_rows(model, rows) == [None] * len(rows)
        done = {k for k, live in enumerate(lives) if live.canvases[0].step == len(live.plan.rows)}
    assert (DENOISER_CONTROL, 4) in calls, "one call held all four rows"
    assert decode_rows(model, [(live, live.canvases[0]) for live in lives]) == [None] * 4
    alone = [run_request(TorchEngine(bundle), bundle, request).pictures[0].astype(int) for request in requests()]
    for live, picture in zip(lives, alone, strict=True):
        assert np.abs(live.canvases[0].picture.astype(int) - picture).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 8 and np.abs(alone[2] - alone[3]).max() > 4


def test_the_runtime_serves_them_together(bundle):
    alone = [run_request(TorchEngine(bundle), bundle, request).pictures[0].astype(int) for request in requests()]
    with Runtime([bundle], engine="torch") as runtime:
        tickets = [runtime.submit(request) for request in requests()]
        together = [ticket.result().pictures[0].astype(int) for ticket in tickets]
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(alone, together, strict=True))


def test_the_command_takes_parts_and_refuses_half_of_them(parts, tmp_path):
    folder, lora, controlnet = parts
    common = [str(folder), "--as", "sd-turbo", "--out"]
    added = ["--lora", f"{lora}=0.5", "--controlnet", str(controlnet)]
    assert commands.import_([*common, str(tmp_path / "b"), *added]) == 0
    assert load_bundle(tmp_path / "b").has("controlnet")
    with pytest.raises(BundleError, match="say both --ip-adapter and --image-encoder"):
        commands.import_([*common, str(tmp_path / "c"), "--ip-adapter", str(lora)])
    with pytest.raises(BundleError, match="say --controlnet too"):
        commands.import_([*common, str(tmp_path / "c"), "--control-kinds", "pose,depth"])
    assert not (tmp_path / "c").exists()
