"""LoRAs mixed row by row: equal to merging them, for every row of a mixed call by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from beside_diffusers import adopted, assert_exports
from fewstep.models import commands
from fewstep.models.bundle import load_bundle
from fewstep.models.errors import BundleError
from fewstep.models.lora import merge_loras, register_lora
from fewstep.models.shapes import make_folder
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.plan import compile_plan
from fewstep.runtime.sampling.request import GenerateRequest, Lora
from fewstep.runtime.service.local import Runtime

TARGETS = {"ink": ["to_q", "to_k", "to_v", "to_out.0"], "oil": ["to_q", "conv1", "proj_in"]}


@pytest.fixture(scope="module")
def files(tiny_dmd2, tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    for seed, (name, targets) in enumerate(TARGETS.items()):
        torch.manual_seed(seed)
        unet = tiny_dmd2.load("unet")
        unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
        for key, parameter in unet.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        state = {f"unet.{key}": value.contiguous() for key, value in get_peft_model_state_dict(unet).items()}
        save_file(state, root / f"{name}.safetensors")
    return root


@pytest.fixture(scope="module")
def bundle(tiny_dmd2, files, tmp_path_factory):
    put = [lambda root, name=name: register_lora(root, name, files / f"{name}.safetensors") for name in TARGETS]
    return adopted(tiny_dmd2, tmp_path_factory.mktemp("rows") / "bundle", *put)


def ask(*loras, **settings):
    return GenerateRequest(
        **{"prompt": "a red cat", "seed": 3, "steps": 2, "loras": tuple(Lora(*lora) for lora in loras), **settings}
    )


@pytest.fixture(scope="module")
def engine(bundle):
    return TorchEngine(bundle)


def last_latent(bundle, engine, request):
    seen = []
    run_request(engine, bundle, request, watch=lambda _, k, x: seen.append(x))
    return seen[-1]


@pytest.mark.parametrize("mix", [(("ink", 0.8),), (("ink", 0.5), ("oil", -1.2)), (("oil", 1.0),)])
def test_mixed_by_row_equals_merged(tiny_dmd2, bundle, engine, files, tmp_path, mix):
    merged = adopted(
        tiny_dmd2, tmp_path / "merged",
        lambda root: merge_loras(root, [(files / f"{name}.safetensors", weight) for name, weight in mix])[0],
    )  # fmt: skip
    wanted = last_latent(merged, TorchEngine(merged), ask())
    found, plain = last_latent(bundle, engine, ask(*mix)), last_latent(bundle, engine, ask())
    assert torch.allclose(found, wanted, atol=1e-4) and (plain - wanted).abs().max() > 0.05


def test_no_weight_is_the_plain_network_to_the_bit(bundle, engine):
    draw = torch.Generator().manual_seed(0)
    feeds = {"x": torch.randn(2, 4, 16, 16, generator=draw), "t": torch.tensor([999.0, 499.0])}
    feeds["ctx"] = torch.randn(2, 24, 32, generator=draw)
    (plain,) = engine.run("denoiser", feeds)
    (none,) = engine.run("denoiser+lora", {**feeds, "lora_scale": torch.zeros(2, 2)})
    (some,) = engine.run("denoiser+lora", {**feeds, "lora_scale": torch.tensor([[0.0, 0.0], [1.0, 0.5]])})
    assert torch.equal(none, plain)
    assert torch.allclose(some[0], plain[0], atol=1e-6) and (some[1] - plain[1]).abs().max() > 1e-3


def test_rows_of_other_mixes_share_a_call_and_stay_as_alone(bundle, engine):
    requests = [ask(("ink", 1.0)), ask(), ask(("oil", 0.7), ("ink", -0.3), seed=4), ask(("ink", 1.0), seed=5, steps=4)]
    alone = [run_request(engine, bundle, request).pictures[0] for request in requests]
    with Runtime([bundle], engines={bundle.name: engine}) as runtime:
        tickets = [runtime.submit(request) for request in requests]
        together = [ticket.result(60).pictures[0] for ticket in tickets]
    for one, two in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - two).max() <= 1


def test_the_graph_exports(bundle):
    assert_exports(bundle, "denoiser+lora")


def test_unknown_names_and_bundles_without_are_refused(tiny_dmd2, bundle, engine):
    with pytest.raises(InvalidRequest, match="registered are ink, oil"):
        run_request(engine, bundle, ask(("chalk", 1.0)))
    with pytest.raises(InvalidRequest, match="needs LoRAs that its engine mixes"):
        run_request(TorchEngine(tiny_dmd2), tiny_dmd2, ask(("ink", 1.0)))


def test_what_cannot_be_mixed_by_row_is_refused(bundle, files, tmp_path):
    with pytest.raises(BundleError, match="'ink' is taken"):
        register_lora(bundle.root, "ink", files / "ink.safetensors")
    with pytest.raises(BundleError, match="letters"):
        register_lora(bundle.root, "../x", files / "ink.safetensors")
    save_file({"text_encoder.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "words.safetensors")
    with pytest.raises(BundleError, match="by row only the U-Net"):
        register_lora(bundle.root, "words", tmp_path / "words.safetensors")


def test_the_import_command_registers_them(tmp_path):
    folder = make_folder("sd15-tiny", tmp_path / "folder")
    torch.manual_seed(0)
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    state = {f"unet.{k}": v.contiguous() for k, v in get_peft_model_state_dict(unet).items()}
    save_file(state, tmp_path / "style.safetensors")
    common = [str(folder), "--as", "sd-turbo", "--out", str(tmp_path / "b")]
    assert commands.import_([*common, "--row-lora", f"style={tmp_path / 'style.safetensors'}"]) == 0
    assert load_bundle(tmp_path / "b").lora_names == ("style",)
    with pytest.raises(SystemExit):
        commands.import_([*common, "--row-lora", "style"])


def test_each_lora_acts_in_its_part_of_the_steps_alone(bundle, engine):
    """Two steps: the first with ink, the second with oil; the same as changing the whole mix between the steps."""
    steps = []
    request = ask(("ink", 1.0, 0.0, 0.5), ("oil", 0.7, 0.5, 1.0))
    run_request(engine, bundle, request, watch=lambda _, k, x: steps.append(x))
    first = []
    run_request(engine, bundle, ask(("ink", 1.0)), watch=lambda _, k, x: first.append(x))
    assert torch.equal(steps[1], first[1]) and not torch.equal(steps[2], first[2])
    rows = compile_plan(replace(request, guidance=1.0), bundle.spec).rows
    assert [row.loras for row in rows] == [(("ink", 1.0),), (("oil", 0.7),)]
