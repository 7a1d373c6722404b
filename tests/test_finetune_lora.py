"""A few-step student that takes a LoRA of its teacher: one tuned teacher whatever file it came from, both ways, the
gate without pictures, what is refused."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from fewstep.models.bundle import load_bundle
from fewstep.trainers.errors import CheckpointError, RecipeError
from fewstep.trainers.pictures import quality
from fewstep.trainers.pictures.data import read_metadata
from fewstep.trainers.runs.finetune import by_carrying, command, finetune, pictures_of, with_lora

FAST = {"batch": 2, "steps": 2, "rank": 2, "picture_every": 0, "checkpoint_every": 0, "bf16": False, "others": 0.0}
DRAWN = 4


@pytest.fixture
def few_drawn(monkeypatch, short_prompts):
    """Few pictures, of captions that the tiny bundles take."""
    found = quality.draw_prompts(8)
    few = quality.PromptSet(found.captions[:DRAWN], found.real, 0)
    monkeypatch.setattr(quality, "draw_prompts", lambda prompts, seed=0: few)


def layers_of(network, targets, rank=2):
    """A random LoRA under PEFT's names, and what it adds to each weight."""
    torch.manual_seed(3)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
    found = get_peft_model_state_dict(network, adapter_name="default")
    layers = {name.rsplit(".lora_", 1)[0] for name in found}
    change = {
        f"{layer}.weight": found[f"{layer}.lora_B.weight"].flatten(1) @ found[f"{layer}.lora_A.weight"].flatten(1)
        for layer in layers
    }
    return found, change


@pytest.fixture(scope="module")
def loras(tiny_teacher, tmp_path_factory):
    """style: the U-Net and the text encoder, as diffusers saves it. kohya: the U-Net, under kohya's names, alpha half
    of the rank. With what each adds to the U-Net's weights."""
    folder = tmp_path_factory.mktemp("loras")
    layers, change = layers_of(tiny_teacher.load("unet"), ["to_q", "to_v", "ff.net.2"])
    words, said = layers_of(tiny_teacher.load("text_encoder"), ["q_proj", "v_proj"])
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, text_encoder_lora_layers=words)
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "style.safetensors")
    named = {}
    for name, value in layers.items():
        layer, part = name.removesuffix(".weight").rsplit(".lora_", 1)
        flat = "lora_unet_" + layer.replace(".", "_")
        named[f"{flat}.lora_{'down' if part == 'A' else 'up'}.weight"] = value
        named[f"{flat}.alpha"] = torch.tensor(1.0)
    save_file(named, folder / "kohya.safetensors")
    half = {name: value / 2 for name, value in change.items()}
    return {"style": (folder / "style.safetensors", change, said), "kohya": (folder / "kohya.safetensors", half, {})}


def apart(bundle, start, component="unet"):
    """Weight -> what was added to it, of those that changed."""
    mine, was = (each.load(component).state_dict() for each in (bundle, start))
    return {name: value - was[name] for name, value in mine.items() if not torch.equal(value, was[name])}


def is_change(found, wanted):
    assert set(found) >= set(wanted) and wanted
    for name, value in found.items():
        assert torch.allclose(value, wanted.get(name, torch.zeros_like(value)), atol=2e-3), name


@pytest.mark.parametrize("kind", ["style", "kohya"])
def test_a_lora_is_carried_into_the_student_with_no_pictures(loras, kind, tiny_lcm, tiny_teacher, tmp_path):
    file, change, _ = loras[kind]
    made, tuned = by_carrying(tiny_lcm, None, tiny_teacher, tmp_path / "mine", lora=file)
    assert tuned.root.name == "mine-teacher" and tuned.spec.guidance == tiny_teacher.spec.guidance
    is_change(apart(tuned, tiny_teacher), change)
    is_change(apart(made, tiny_lcm), change)
    assert made.spec.grids == tiny_lcm.spec.grids and load_bundle(made.root).spec == made.spec
    for bundle in (made, tuned):
        assert (bundle.root / "pytorch_lora_weights.safetensors").read_bytes() == file.read_bytes()
    assert json.loads((tuned.root / "bundle.json").read_text())["sources"][0]["file"] == file.name
    assert not (tmp_path / "mine-teacher.run" / "drawn").exists()  # nobody has asked for pictures


def test_what_it_changes_in_the_text_encoder_is_carried_too(loras, tiny_lcm, tiny_teacher, tmp_path):
    file, _, said = loras["style"]
    made, _ = by_carrying(tiny_lcm, None, tiny_teacher, tmp_path / "mine", lora=file)
    found = apart(made, tiny_lcm, "text_encoder")
    inner = {name.removeprefix("text_model."): value for name, value in said.items()}
    assert found and inner, "it changes the text encoder"
    is_change({name.removeprefix("text_model."): value for name, value in found.items()}, inner)


def test_distilled_it_learns_from_what_the_teacher_with_the_lora_draws(
    loras, tiny_lcm, tiny_teacher, tmp_path, few_drawn
):
    file, change, _ = loras["kohya"]
    out = tmp_path / "mine"
    made, tuned = finetune(tiny_lcm, None, tiny_teacher, out, FAST, lora=file, device="cpu")
    is_change(apart(tuned, tiny_teacher), change)
    assert made.spec.recipe == "finetune-student" and made.spec.teacher == tiny_teacher.name
    assert apart(made, tiny_lcm) and (made.root / "pytorch_lora_weights.safetensors").is_file()
    drawn = pictures_of(tuned, None, {})
    assert drawn == tmp_path / "mine-teacher.run" / "drawn" and len(read_metadata(drawn)) == DRAWN
    told = json.loads((tmp_path / "mine.run" / "config.json").read_text())
    assert told["run"]["data"] == str(drawn) and [stage["name"] for stage in told["stages"]] == ["distil"]
    again, _ = finetune(tiny_lcm, None, tiny_teacher, out, FAST, lora=file, device="cpu", resume=True)
    assert not apart(again, made)
    with pytest.raises(CheckpointError, match="differs from this configuration"):
        finetune(tiny_lcm, None, tiny_teacher, out, FAST, lora=loras["style"][0], device="cpu", resume=True)


def test_pictures_of_the_style_may_stand_in_place_of_drawn_ones(loras, tiny_teacher, tmp_path, few_drawn):
    tuned = with_lora(tiny_teacher, loras["kohya"][0], tmp_path / "tuned")
    drawn = pictures_of(tuned, None, {})
    theirs = shutil.copytree(drawn, tmp_path / "theirs")
    before = (drawn / "000.png").stat().st_mtime_ns
    assert pictures_of(tuned, None, {}) == drawn and (drawn / "000.png").stat().st_mtime_ns == before
    assert pictures_of(tuned, None, {"data": str(theirs)}) == theirs == pictures_of(tuned, theirs, {})


@pytest.mark.parametrize("way", ["carried", "distilled"])
def test_the_command_judges_a_lora_by_what_its_teacher_draws(
    way, loras, tiny_lcm, tiny_teacher, tmp_path, capsys, few_drawn
):
    out, report = tmp_path / "mine", tmp_path / "gate.json"
    words = [str(tiny_lcm.root), "--lora", str(loras["style"][0]), "--teacher", str(tiny_teacher.root), "--way", way]
    words += ["--out", str(out), "--steps", "1", "--json", str(report), "--device", "cpu"]
    words += [word for n, v in FAST.items() if way == "distilled" for word in ("--set", f"{n}={json.dumps(v)}")]
    assert command([*words, "--style=-1e9", "--kept=0", "--diversity=0"]) == 0
    found = json.loads(report.read_text())
    assert found["drawn"] and found["target"] == str(tmp_path / "mine-teacher.run" / "drawn")
    rows = {row["model"]: row for row in found["rows"]}
    assert rows["tiny-teacher, tuned"]["gap"] < rows["tiny-teacher"]["gap"]
    if way == "carried":
        assert rows["mine"]["gap"] < rows["tiny-lcm"]["gap"] and rows["mine"]["reached"] > 0
    assert "which mine-teacher drew" in capsys.readouterr().out


def test_what_cannot_be_taken_is_refused_and_leaves_nothing(loras, tiny_lcm, tiny_teacher, tmp_path):
    file = loras["kohya"][0]
    odd, text, out = tmp_path / "odd.safetensors", tmp_path / "text.safetensors", tmp_path / "mine"
    save_file(
        {"unet.nowhere.to_q.lora_A.weight": torch.ones(2, 32), "unet.nowhere.to_q.lora_B.weight": torch.ones(32, 2)},
        odd,
    )
    text.write_text("no tensors")
    for way in (by_carrying, finetune):
        for lora, said in (
            (odd, r"odd\.safetensors' ?.*'tiny-teacher' cannot take it: .*unet\.nowhere\.to_q.*take a LoRA that was"),
            (text, r"lora is .*text\.safetensors', and the teacher 'tiny-teacher' cannot take it"),
            (tmp_path / "none.safetensors", r"lora is .*none\.safetensors'"),
        ):
            with pytest.raises(RecipeError, match=said):
                way(tiny_lcm, None, tiny_teacher, out, {}, lora=lora, device="cpu")
        with pytest.raises(RecipeError, match="pictures and lora are both left out; name a folder"):
            way(tiny_lcm, None, tiny_teacher, out, {}, device="cpu")
        with pytest.raises(RecipeError, match=r"lora is .*kohya\.safetensors', and the style comes from one of them"):
            way(tiny_lcm, tmp_path, tiny_teacher, out, {}, lora=file, device="cpu")
        with pytest.raises(RecipeError, match="tune_steps is set, and nothing is trained by it with lora"):
            way(tiny_lcm, None, tiny_teacher, out, {"tune_steps": 3}, lora=file, device="cpu")
    assert not list(tmp_path.glob("mine*"))
