"""Adversarial recipes: a short run of each on the plane and on pictures, critics on every family, refusals."""

from dataclasses import replace

import pytest
import torch
from test_transformers import NAMES as FAMILIES
from transformers import Dinov2Config, Dinov2Model

from fewstep.models.bundle import load_bundle
from fewstep.models.importing import import_folder
from fewstep.models.known import known
from fewstep.models.networks import as_network
from fewstep.models.shapes import make_folder
from fewstep.runtime.sampling.groups import read_group
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.service.local import Runtime
from fewstep.trainers.bench.recipes import Setup, on_plane
from fewstep.trainers.distribution.discriminator import Adversary, Deceive, Judge, apart
from fewstep.trainers.distribution.distribution import DistributionMatching
from fewstep.trainers.errors import DataError, RecipeError
from fewstep.trainers.networks.critics import CriticPlan, FakeWithCritic, blocks_of, picture_critic, taps
from fewstep.trainers.networks.student import Student, again
from fewstep.trainers.oracle.critics import ReadsRatio
from fewstep.trainers.parts.gan_losses import R1, Hinge, Relativistic
from fewstep.trainers.parts.noised_rollout import SampledTimes
from fewstep.trainers.parts.times import LcmGrids, UniformTimes
from fewstep.trainers.pictures.data import LatentSource, encode_scenes
from fewstep.trainers.pictures.parting import Cell, CellSource, embeddings
from fewstep.trainers.plane.plane import CLASSES, conditions, plane
from fewstep.trainers.plane.run import PlaneBudget, run_recipe, sample_points
from fewstep.trainers.recipes.adversarial import ADVERSARIAL, add, gdd
from fewstep.trainers.recipes.distribution import dmd2
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.runs.distill import distill
from tiny import tiny_latents

TINY = Setup(budget=PlaneBudget(steps=4, start_steps=4, batch=16, pairs=32), points=8)
FAST = {"batch": 4, "steps": 2, "picture_every": 0, "checkpoint_every": 0, "bf16": False}
NAMES = [*ADVERSARIAL, "sana-sprint"]


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_samples_on_the_plane(name, start):
    budget = replace(TINY.budget, steps=16 if name == "msd" else 4)  # its four students share them
    trained = run_recipe(on_plane(name, TINY), plane(), start, budget)
    cond, uncond = conditions(torch.arange(CLASSES))
    assert set(trained.spec.grids) == set(RECIPES[name]().steps)
    for steps in trained.spec.grids:
        points = sample_points(trained, cond, uncond, steps, seed=0)
        assert points.shape == (CLASSES, 2) and bool(torch.isfinite(points).all())
    kept, found = start.state_dict(), trained.net.state_dict()
    named = {k.removeprefix("nets.0."): w for k, w in found.items()}
    assert any(not torch.equal(w, kept[k]) for k, w in named.items() if k in kept)


@pytest.fixture(scope="module")
def pictures(tiny_teacher):
    return tiny_latents(tiny_teacher)


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_samples_pictures(name, tiny_teacher, pictures, tmp_path):
    extra = {"pairs": 5, "pair_steps": 2} if name == "ladd" else {}
    extra |= {"guidance_width": 32} if name == "sana-sprint" else {}
    extra |= {"every": 1} if name in ("asd", "ladd", "msd", "uni-dad") else {}
    extra |= {"students": 2} if name == "msd" else {}
    extra |= {"adapted": str(tiny_teacher.root)} if name == "uni-dad" else {}
    out = tmp_path / f"tiny-{name}"
    student = distill(name, tiny_teacher, out, FAST | extra, data=pictures, device="cpu")
    assert student.spec.recipe == name and student.spec.steps == RECIPES[name]().steps
    shown = out.with_name(out.name + ".run").glob("*/samples/step_*.png")
    assert list(shown), "its own bundle's sampler has drawn pictures"


def test_students_of_parts_are_sold_with_their_group(tiny_teacher, pictures, tmp_path):
    settings = FAST | {"students": 2, "every": 1}
    last = distill("msd", tiny_teacher, tmp_path / "out", settings, data=pictures, device="cpu")
    file = tmp_path / "out.group.json"
    group = read_group(file)
    assert group.models == ("out-part-1", "out") and group.by_centroid and last.name == "out"
    first = load_bundle(tmp_path / "out-part-1")
    weights = [bundle.load("unet").state_dict() for bundle in (first, last)]
    assert any(not torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    source = LatentSource(pictures, tiny_teacher.text_encoder(), 4, spec=tiny_teacher.spec)
    cells = [CellSource(source, Cell(k, 2)) for k in range(2)]
    rows = [{tuple(row) for row in cell.members.tolist()} for cell in cells]
    assert not rows[0] & rows[1] and len(rows[0] | rows[1]) == 4, "no prompt is left out, none is in both"
    for cell, name in zip(cells, group.models, strict=True):
        found = {group.nearest(point.tolist()) for point in embeddings(source)[cell.members[:, 0]]}
        assert found == {name}
    with pytest.raises(DataError, match="4 different prompts, too few for 5 students"):
        distill("msd", tiny_teacher, tmp_path / "no", FAST | {"students": 5}, data=pictures, device="cpu")
    with Runtime([first.root, last.root], engine="torch", groups=[file]) as runtime:
        found = runtime.generate(GenerateRequest(prompt="a red circle", steps=1), model=group.name)
        assert found.pictures[0].shape == (32, 32, 3)


def test_one_part_is_one_student():
    alone = RECIPES["msd"](students=1)
    assert [stage.cell for stage in alone.stages] == [None]
    with pytest.raises(RecipeError, match="students is 0"):
        RECIPES["msd"](students=0)


def test_uni_dad_asks_for_its_second_teacher(tiny_teacher, pictures, tmp_path):
    with pytest.raises(RecipeError, match="--set adapted=DIR, or set target=0"):
        distill("uni-dad", tiny_teacher, tmp_path / "out", FAST | {"every": 1}, data=pictures, device="cpu")
    alone = RECIPES["uni-dad"](target=0.0)
    assert "adapted" not in alone.objective.roles


def test_gdd_i_keeps_convolutions_and_projections(tiny_teacher, pictures, tmp_path):
    student = distill("gdd-i", tiny_teacher, tmp_path / "out", FAST | {"steps": 4}, data=pictures, device="cpu")
    before, after = (bundle.load("unet").state_dict() for bundle in (tiny_teacher, student))
    blocks = [name for name in before if "block" in name]
    masked = [name for name in blocks if "conv" in name or "proj" in name]
    # the bundle holds half precision: weights that stayed are equal to the rounded ones
    assert masked and all(torch.equal(before[name].half(), after[name].half()) for name in masked)
    assert any(not torch.equal(before[name].half(), after[name].half()) for name in set(blocks) - set(masked))
    mask = again(tiny_teacher.load("unet"), Student(frozen=("conv", "proj")))
    trained = sum(w.numel() for w in mask.parameters() if w.requires_grad) / sum(w.numel() for w in mask.parameters())
    assert 0.0 < trained < 0.7


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(shape):
        if shape not in made:
            folder = make_folder(shape, root / shape)
            answers = replace(known(FAMILIES[shape]), steps=(1, 2, 4))
            made[shape] = import_folder(folder, root / f"{shape}-bundle", answers=answers, sizes=[(64, 64)])
        return made[shape]

    return get


def asked(bundle):
    """(x, t, condition) as the bundle's denoiser takes them, of two captions of its own."""
    data = encode_scenes(bundle, 2, seed=0)
    source = LatentSource(data, bundle.text_encoder(), 2, spec=bundle.spec)
    batch = source.gather(torch.zeros(2, 2, dtype=torch.long))
    path = bundle.spec.path
    return batch.x0, torch.full((2,), 0.5 * (path.start + path.end), dtype=torch.float64), batch.cond


@pytest.mark.parametrize("shape", ["pixart-alpha-tiny", "sana-tiny", "sd3-tiny", "flux-schnell-tiny", "z-image-tiny"])
def test_critics_read_transformers(families, shape):
    bundle = families(shape)
    x, t, cond = asked(bundle)
    network = bundle.load(bundle.family.folder).requires_grad_(False)
    run = as_network(bundle.family.denoiser(network, False))
    for plan in (CriticPlan(features="teacher", depths=(0.0, 1.0)), CriticPlan(features="teacher", text=True)):
        critic = picture_critic(plan, bundle, network, run)
        seen = x.clone().requires_grad_()
        logits = critic.judge(seen, t, cond)
        assert logits.ndim == 2 and len(logits) == 2
        logits.mean().backward()
        assert float(seen.grad.abs().sum()) > 0.0 and all(w.grad is None for w in network.parameters())
        assert any(w.grad is not None for w in critic.parameters())
    for plan in (CriticPlan(), CriticPlan(features="fake-encoder")):
        fake = FakeWithCritic(again(network, Student()), None, plan)
        fake._outside = (as_network(bundle.family.denoiser(fake.network, False)),)
        fake.judge(x, t, cond).mean().backward()
        learned = [name for name, weight in fake.named_parameters() if weight.grad is not None]
        assert any(name.startswith("network.") for name in learned)
        last = blocks_of(fake.network)[-1]
        assert not any(name.startswith(f"network.{last}.") for name in learned), "only up to the middle is run"


def test_a_unets_blocks_in_their_order(tiny_teacher):
    unet = tiny_teacher.load("unet")
    assert blocks_of(unet) == ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    assert taps(unet, (0.5,)) == ("mid_block",) and taps(unet, ()) == blocks_of(unet)


def test_dino_on_decoded_pictures(tiny_teacher, pictures, tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    settings = FAST | {"vision": str(tmp_path / "dino")}
    student = distill("add", tiny_teacher, tmp_path / "out", settings, data=pictures, device="cpu")
    assert load_bundle(student.root).spec.recipe == "add"
    with pytest.raises(RecipeError, match=r"holds no config\.json of a Dinov2Model"):
        distill("add", tiny_teacher, tmp_path / "no", FAST | {"vision": str(tmp_path)}, data=pictures, device="cpu")


def test_neighbours_differ_in_what_they_show_and_not_in_the_time_they_are_told():
    """Misaligned pairs beside a student whose fake is told a time: its `s` is one number a row."""
    cond = {"ctx": torch.tensor([1.0, 1.0, 2.0])[:, None, None].expand(3, 4, 5), "s": torch.tensor([0.0, 500.0, 500.0])}
    assert apart(cond).tolist() == [True, False, True]
    assert apart({"w": torch.tensor([1.0, 1.0, 2.0])}).tolist() == [True, False, True]


def test_the_weight_of_0_leaves_scm(start):
    from fewstep.trainers.recipes.continuous import sana_sprint

    alone = sana_sprint(gan=0.0)
    assert alone.objective.players == ("student",) and not alone.needs.critic
    assert sana_sprint().objective.players == ("student", "critic")


ADVERSARY = Adversary(student_weight=1.0, critic_weight=1.0, times=UniformTimes())


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: CriticPlan(features="pixels"), "features are 'pixels'; known are"),
        (lambda: CriticPlan(network="dino"), "leave network out"),
        (lambda: CriticPlan(depths=(2.0,)), "shares of the way"),
        (lambda: CriticPlan(features="fake-encoder", depths=()), "reads one block"),
        (lambda: CriticPlan(features="vision", by_steps=True), "no head for each step count"),
        (lambda: R1(1.0, on="logits"), "R1 is on 'logits'"),
        (lambda: replace(ADVERSARY, loss=Relativistic(), misaligned=True), "use Softplus or Hinge"),
        (lambda: SampledTimes(LcmGrids((1, 2, 4)), (1.0, 2.0)), "2 weights for the 4 times"),
        (lambda: replace(dmd2(), critic=CriticPlan(features="teacher")), "'fake' learns to judge, and a critic of"),
        (lambda: replace(gdd(), critic=None), "'critic' learns to judge, and a critic of the middle of the fake"),
        (lambda: replace(add(), stages=noisy(add())), "a vision network looks at clean pictures"),
        (lambda: ratio(Hinge()), "ReadsRatio reads log.*not with Hinge; give the adversary Softplus"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(make, wrong):
    with pytest.raises(RecipeError, match=wrong):
        make()


def noisy(recipe):
    objective = recipe.objective
    told = replace(ADVERSARY, told=True)
    terms = {"student": (Deceive(told),), "critic": (Judge(told),)}
    return (replace(recipe.stages[0], objective=replace(objective, terms=terms)),)


def ratio(loss):
    terms = {"student": (ReadsRatio(),), "fake": (Judge(replace(ADVERSARY, loss=loss)),)}
    return DistributionMatching(rollout=dmd2().objective.rollout, terms=terms)
