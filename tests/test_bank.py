"""One frozen network with LoRA sets answers and trains as separate copies do, and is in memory once."""

import shutil

import pytest
import torch

from fewstep.models.bundle import load_bundle
from fewstep.models.lora import merge_loras
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.loop.loop import LoopSettings, train
from fewstep.trainers.networks.bank import Voice, can_share
from fewstep.trainers.networks.student import Student, build_student
from fewstep.trainers.pictures.data import LatentSource
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import find_recipe
from fewstep.trainers.runs import picture_networks as module
from fewstep.trainers.runs.distill import assemble, distill
from tiny import tiny_latents

STEPS = 6
SETTINGS = {
    "batch": 4, "bf16": False, "picture_every": 0, "checkpoint_every": 0, "steps": STEPS, "lr": 1e-2, "fake_lr": 1e-2,
    "rank": 2, "student_rank": 4,
}  # fmt: skip


def recipe_of(name="vsd", **settings):
    return configure(find_recipe(name), SETTINGS | settings)


def made(teacher, recipe):
    torch.manual_seed(0)
    learner, frozen = build_student(teacher, recipe.student, fold_scale=1.0), teacher.load("unet")
    return assemble(recipe, recipe.stages[0], teacher, frozen, learner), frozen


def by_name(module):
    """LoRA weights and the fake score's head, whatever their set is called."""
    found = {}
    for name, weight in module.named_parameters():
        name = name.replace("own.", "").replace("/", ".").replace(".default.", ".")
        if "lora_" in name or "head" in name:
            found[name] = weight
    return found


@pytest.fixture(scope="module")
def both(tiny_teacher, tmp_path_factory):
    """(shared, apart), and the teacher's network of each."""
    recipe, data = recipe_of(), tiny_latents(tiny_teacher)
    methods, teachers = [], []
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("shared", "apart"):
            if kind == "apart":
                patch.setattr(module, "can_share", lambda *networks: False)
            method, frozen = made(tiny_teacher, recipe)
            source = LatentSource(data, tiny_teacher.text_encoder(), 4, spec=tiny_teacher.spec)
            settings = LoopSettings(steps=STEPS, bf16=False, checkpoint_every=0)
            train(method, source, settings, tmp_path_factory.mktemp(kind))
            methods.append(method)
            teachers.append(frozen)
    return methods, teachers


def test_shared_weights_train_as_separate_copies(both):
    (shared, apart), _ = both
    for mine, theirs in zip(shared.players, apart.players, strict=True):
        assert mine.own_steps == theirs.own_steps > 0
        networks = [(mine.module, theirs.module)]
        networks += [(mine.averages[name], theirs.averages[name]) for name in mine.averages]
        for one, other in networks:
            found, wanted = by_name(one), by_name(other)
            assert found.keys() == wanted.keys() and any("lora_B" in name for name in found)
            assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in found)
            assert any(float(weight.detach().abs().max()) > 0 for name, weight in found.items() if "lora_B" in name)


def test_each_role_answers_as_its_own_network(both, tiny_teacher):
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([999.0, 259.0], dtype=torch.float64)
    cond = {"ctx": torch.randn(2, 24, 32)}
    answers = {}
    with torch.no_grad():
        for role in ("student", "teacher", "fake", "student", "kept", "teacher"):
            mine, theirs = (method.cast[role].raw(x, t, cond) for method in both[0])
            assert torch.allclose(mine, theirs, atol=1e-5), role
            answers[role] = mine
    assert not torch.allclose(answers["student"], answers["teacher"], atol=1e-5)
    assert not torch.allclose(answers["student"], answers["fake"], atol=1e-5)
    assert not torch.allclose(answers["student"], answers["kept"], atol=1e-6)


def held(method, frozen):
    """Bytes of all weights that a method and its teacher hold."""
    modules = [frozen, *(m for p in method.players for m in (p.module, *p.averages.values()))]
    outside = [m._outside[0].network for top in modules for m in top.modules() if isinstance(m, Voice)]
    found = {w.data_ptr(): w.nbytes for m in (*modules, *outside) for w in m.parameters()}
    return sum(found.values())


def test_the_base_is_held_once(both, tiny_teacher):
    base = sum(w.nbytes for w in tiny_teacher.load("unet").parameters())
    shared, apart = (held(*each) for each in zip(*both, strict=True))
    assert base < shared < 1.8 * base, "the base, three sets and the critic's head"
    assert apart - shared == pytest.approx(3 * base, rel=0.05), "student, its average and the fake score"


def test_only_the_same_base_is_shared(tiny_teacher):
    teacher = tiny_teacher.load("unet")
    lora = build_student(tiny_teacher, Student(lora_rank=2), fold_scale=1.0)
    assert can_share(teacher, lora)
    with torch.no_grad():
        lora.conv_in.base_layer.weight.add_(1.0) if hasattr(lora.conv_in, "base_layer") else lora.conv_in.weight.add_(1)
    assert not can_share(teacher, lora)
    assert not can_share(teacher, build_student(tiny_teacher, Student(), fold_scale=1.0))


@pytest.mark.parametrize("name", ["vsd", "swiftbrush", "snoopi"])
def test_a_shared_run_ends_in_a_bundle(name, tiny_teacher, tmp_path):
    """Its weights are the teacher's and the LoRA that lies beside them, of the rank that was asked for, as
    `fewstep import --lora` and diffusers read it."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    settings = {"checkpoint_every": 1, "fp16_weights": False}
    distill(recipe_of(name, **settings), tiny_teacher, tmp_path / "out", data=tiny_latents(tiny_teacher), device="cpu")
    bundle = load_bundle(tmp_path / "out")
    beside = bundle.root / "pytorch_lora_weights.safetensors"
    assert {w.shape[0] for name, w in load_file(beside).items() if name.endswith("lora_A.weight")} == {4}
    sold, teacher = bundle.load("unet").state_dict(), tmp_path / "teacher"
    shutil.copytree(tiny_teacher.root, teacher)
    merge_loras(teacher, [(beside, 1.0)])
    merged = UNet2DConditionModel.from_pretrained(teacher / "unet").state_dict()
    assert sold.keys() == merged.keys()
    for key, weight in merged.items():
        assert torch.allclose(weight, sold[key], atol=1e-5), key
    start = tiny_teacher.load("unet").state_dict()
    assert any(not torch.allclose(sold[key], start[key], atol=1e-4) for key in sold)
    kept = torch.load(tmp_path / "out.run" / name / "checkpoint.pt")["players"]
    assert all("lora_" in name or "head" in name for name in kept["student"]), "the base is not in a checkpoint"


def test_all_of_the_student_trains_where_no_rank_is_named():
    plain = configure(find_recipe("vsd"), {})
    assert plain.student == Student() and plain.fake.lora_rank == 16
    assert recipe_of().student.lora_rank == 4 and recipe_of().fake.lora_rank == 2
    for setting in ("rank", "student_rank"):
        with pytest.raises(RecipeError, match=rf"^{setting} is 0; LoRA has a rank of 1 or more"):
            recipe_of(**{setting: 0})
