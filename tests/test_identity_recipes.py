"""Score identities, Langevin steps, mixtures, a ratio alone, embeddings, forgetting: short runs, half precision,
refusals."""

import dataclasses
import json

import pytest
import torch

from fewstep.models.paths import VP
from fewstep.trainers.bench.recipes import Setup, aimed_at, on_plane
from fewstep.trainers.distribution import score_identity
from fewstep.trainers.distribution.also import Also
from fewstep.trainers.distribution.embedding import EmbeddingLoss
from fewstep.trainers.distribution.expectation import Langevin
from fewstep.trainers.distribution.forgetting import Forgetting, Swap
from fewstep.trainers.distribution.mixture_scores import Shares
from fewstep.trainers.distribution.score_gap import Denoise
from fewstep.trainers.distribution.score_identity import DIVERGENCES, RatioWeight
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.networks.student import Student, fake_of
from fewstep.trainers.oracle.suite import check_recipe
from fewstep.trainers.parts.laws import LogNormal
from fewstep.trainers.parts.objective import Cast, Turn
from fewstep.trainers.pictures import plot
from fewstep.trainers.plane.net import plane_student
from fewstep.trainers.plane.plane import CLASSES, PlaneSource, conditions, plane
from fewstep.trainers.plane.run import PlaneBudget, run_recipe, sample_points
from fewstep.trainers.plane.sources import ForgettingPoints, class_of
from fewstep.trainers.recipes.consistency import cd
from fewstep.trainers.recipes.identity import FAKE_TIMES, GAP_TIMES, IDENTITY, sfd, sid, sid_few_step, sim, uni_instruct
from fewstep.trainers.recipes.mixture import MIXTURE, embedding_loss
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.recipes.score import diff_instruct, dmd
from fewstep.trainers.runs.distill import distill
from fewstep.trainers.runs.forgetting_data import ForgettingSource
from tiny import tiny_latents

TINY = Setup(budget=PlaneBudget(steps=4, start_steps=4, batch=16, pairs=32), points=8)
FAST = {"batch": 4, "steps": 2, "picture_every": 0, "checkpoint_every": 0, "bf16": False}
NAMES = [*IDENTITY, *MIXTURE]
FEW = ("sid-few-step", "embedding-loss")


@pytest.mark.parametrize("recipe", [sid, sid_few_step, sim, uni_instruct])
def test_scores_are_compared_where_the_fake_learns_once_levels_are_asked_for(recipe):
    terms = recipe(gap_mean=-1.0, gap_std=0.5).objective.terms
    assert terms["student"][0].times == terms["fake"][0].times == LogNormal(-1.0, 0.5)
    even = recipe().objective.terms
    assert even["student"][0].times == GAP_TIMES and even["fake"][0].times == FAKE_TIMES


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in NAMES),
        ("sid", {"sida": True}),
        ("sid", {"fake_guidance": 2.0, "guidance": 2.0}),
        ("sid-few-step", {"mode": "zero-cfg"}),
        ("sid-few-step", {"mode": "anti-cfg"}),
        ("sim", {"distance": "squared"}),
        ("uni-instruct", {"divergence": "js", "released": True}),
        ("embedding-loss", {"kernel": "linear"}),
        ("embedding-loss", {"base": "diff-instruct"}),
        ("embedding-loss", {"base": "cd"}),
    ],
)
def test_each_trains_and_samples_on_the_plane(name, settings, start):
    recipe = configure(RECIPES[name], settings) if settings else on_plane(name, TINY)
    trained = run_recipe(recipe, plane(), start, TINY.budget)
    cond, uncond = conditions(torch.arange(CLASSES))
    several = (1, 2, 4, 8) if settings.get("base") == "cd" else (1, 2, 4)
    assert tuple(trained.spec.grids) == (several if name in FEW else (1,))
    for steps in trained.spec.grids:
        points = sample_points(trained, cond, uncond, steps, seed=0)
        assert points.shape == (CLASSES, 2) and bool(torch.isfinite(points).all())
    kept = start.state_dict()
    assert any(not torch.equal(w, kept[k]) for k, w in trained.net.state_dict().items() if k in kept)


def test_the_student_is_sold_from_the_time_it_trains_at():
    assert RECIPES["sid"]().sampling.grids.of(VP())[1] == (624.0,)
    grids = RECIPES["sid-few-step"]().sampling.grids.of(VP())
    assert grids[4] == (624.0, 468.0, 312.0, 156.0) and grids[2] == (624.0, 312.0)


def test_few_step_sid_tells_its_fake_the_step_only_where_asked():
    untold, told = sid_few_step(), sid_few_step(told=True)
    assert (untold.objective.told, untold.fake.second_time) == (False, False)
    assert (told.objective.told, told.fake.second_time) == (True, True)
    assert on_plane("sid-few-step", TINY).objective.told and RECIPES["embedding-loss"]().objective.told


@pytest.mark.parametrize("name", ["sid", "sim", "uni-instruct", "emd", "smd"])
def test_half_precision_gives_the_same_direction(name, start):
    recipe = RECIPES[name]()
    nets = {role: plane_student(start, Student(), path=VP(), seed=0) for role in ("student", "fake")}
    for k, net in enumerate(nets.values()):
        rng = torch.Generator().manual_seed(k)
        for weight in net.parameters():
            weight.data += 0.02 * torch.randn(weight.shape, generator=rng)
    nets["fake"].requires_grad_(False)
    roles = {role: net.denoiser() for role, net in nets.items()}
    roles["teacher"] = plane_student(start, Student(), path=VP(), seed=0).requires_grad_(False).denoiser()
    cast = Cast(roles, lambda x, t, cond: x.float().mean(1))
    batch = PlaneSource(plane(), 512).batch(0)
    found = []
    for half in (False, True):
        nets["student"].zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            recipe.objective.loss("student", cast, batch, Turn.of(0, 0, 10, "student"))[0].backward()
        found.append(torch.cat([w.grad.flatten() for w in nets["student"].parameters()]))
    assert bool(torch.isfinite(found[1]).all())
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.97


def test_divergences_agree_where_the_laws_do():
    zero = torch.zeros(4)
    for name in DIVERGENCES:
        h, whole = RatioWeight(name)(zero)
        assert torch.allclose(h, torch.ones(4)) and whole.shape == (4,)
    fallen, _ = RatioWeight("kl", by_mean=False, released=True)(torch.tensor([-2.0, 2.0]))
    assert fallen[0] > fallen[1], "the released form falls where the ratio grows"


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: sid_few_step(mode="cfg"), "no mode 'cfg'; choose one of zero-cfg"),
        (lambda: sid_few_step(mode="anti-cfg", anti=0.5), "anti is 0.5"),
        (lambda: sim(distance="cosine"), "no distance 'cosine'"),
        (lambda: sim(c=0.0), "c is 0.0"),
        (lambda: uni_instruct(divergence="tv"), "no divergence 'tv'; choose one of rkl"),
        (lambda: sfd(forget="red", override="red"), "two different words"),
        (lambda: sfd(weight=0.0), "weight is 0.0"),
        (lambda: Langevin(steps=0), "go nowhere"),
        (lambda: Shares(1.5), "ends is 1.5"),
        (lambda: embedding_loss(kernel="cubic"), "kernel is 'cubic'"),
        (lambda: embedding_loss(networks=0), "see nothing"),
        (lambda: embedding_loss(base="dmd2"), "base is 'dmd2'; choose one of dmd, diff-instruct, cd"),
        (lambda: class_of("mauve"), "the plane has no class 'mauve'; its classes are red"),
        (
            lambda: Forgetting(dataclasses.replace(sid().objective.terms["student"][0], fake_guidance=2.0), 1.0),
            "no room for a forgotten concept",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_remedy(make, wrong):
    with pytest.raises(RecipeError, match=wrong):
        make()


def test_the_planes_forgotten_class_is_taught_the_other_and_measured_by_it():
    source = ForgettingPoints(PlaneSource(plane(), 64), Swap("red", "blue"))
    batch = source.batch(0)
    asked, taught = batch.cond["label"].argmax(1), batch.taught["label"].argmax(1)
    assert torch.equal(taught, torch.where(asked == 0, 1, asked)) and bool((asked == 0).any())
    labels = torch.arange(CLASSES).repeat_interleave(2)
    given, aim = aimed_at(sfd(), labels, labels[:, None].float())
    assert given.tolist() == [1, 1, 1, 1, 2, 2, 3, 3] and torch.equal(aim[:, 0].long(), given)


def test_a_forgetful_fake_is_trained_on_the_prompts_as_they_are():
    term = sfd().objective.terms["fake"][0]
    assert isinstance(term.term, Denoise) and "teacher" not in term.roles
    assert sfd().objective.guidance.low == 3.0


BASES = {"dmd": dmd, "diff-instruct": diff_instruct, "cd": cd}


@pytest.mark.parametrize("base", BASES)
def test_the_embedding_loss_stands_beside_the_base_s_own_objective(base):
    alone, recipe = BASES[base](), embedding_loss(base=base, **{"lr": 3e-4} if base == "cd" else {"gap_mean": 0.5})
    own, term = recipe.objective.terms["student"]
    assert isinstance(term, EmbeddingLoss)
    if base == "cd":
        assert own == Also(alone.objective) and recipe.sampling == alone.sampling
        assert recipe.stages[0].player_settings == alone.stages[0].player_settings
        of_a_fake = {"fake_lr": 1.0, "start": 0.5, "grid_weights": (1.0,), "gap_mean": -1.0}
        assert recipe == embedding_loss(base=base, lr=3e-4, **of_a_fake), "it has none"
    else:
        terms = alone.objective.terms
        assert own == terms["student"][0] and recipe.objective.terms["fake"] == terms["fake"]


@pytest.mark.parametrize("base", BASES)
def test_with_each_base_the_embedding_loss_moves_the_student(base, start):
    """By the samples alone; and with the weight 0 the base's gradient is left."""
    found = {}
    for weight in (0.0, 1.0, 2.0):
        objective = embedding_loss(base=base, weight=weight).objective
        nets = {role: plane_student(start, Student(), path=VP(), seed=0) for role in objective.roles}
        for role in set(nets) - {"student"}:
            nets[role].requires_grad_(False)
        batch = PlaneSource(plane(), 64).batch(0)
        cast = Cast({role: net.denoiser() for role, net in nets.items()})
        loss, metrics = objective.loss("student", cast, batch, Turn.of(0, 0, 10, "student"))
        loss.backward()
        assert metrics["embedding"] > 0.0
        found[weight] = torch.cat([w.grad.flatten() for w in nets["student"].parameters() if w.grad is not None])
    once, twice = found[1.0] - found[0.0], found[2.0] - found[0.0]
    assert float(once.norm()) > 1e-4 and torch.allclose(twice, 2.0 * once, atol=1e-5)


@pytest.mark.parametrize("base", ["diff-instruct", "cd"])
def test_the_oracle_knows_the_other_bases(base, monkeypatch):
    monkeypatch.setattr(plot, "plot_losses", lambda log, picture: None)
    checks = check_recipe(embedding_loss(base=base))
    assert [(c.name, c.value, c.low, c.high) for c in checks if not c.passed] == []
    assert sum(c.name.startswith("embedding: ") for c in checks) == 10


@pytest.fixture(scope="module")
def pictures(tiny_teacher):
    return tiny_latents(tiny_teacher)


@pytest.mark.parametrize("base", ["diff-instruct", "cd"])
def test_each_base_of_the_embedding_loss_trains_on_pictures(base, tiny_teacher, pictures, tmp_path):
    out = tmp_path / base
    settings = FAST | {"base": base}
    student = distill("embedding-loss", tiny_teacher, out, settings, data=pictures, device="cpu")
    assert student.spec.steps == embedding_loss(base=base).steps
    rows = [json.loads(row) for row in next((tmp_path / f"{base}.run").rglob("metrics.jsonl")).read_text().splitlines()]
    assert sum("embedding" in row for row in rows) == 2
    new, old = student.load("unet").state_dict(), tiny_teacher.load("unet").state_dict()
    assert list(new) == list(old) and any(not torch.equal(new[k], old[k]) for k in old)


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_samples_pictures(name, tiny_teacher, pictures, tmp_path):
    extra = {"forget": word_of(tiny_teacher, pictures)} if name == "sfd" else {"bf16": name == "sid"}
    out = tmp_path / f"tiny-{name}"
    student = distill(name, tiny_teacher, out, FAST | extra, data=pictures, device="cpu")
    assert student.spec.recipe == name and student.spec.steps == RECIPES[name]().steps
    shown = out.with_name(out.name + ".run") / name / "samples"
    assert list(shown.glob("step_*.png")), "its own bundle's sampler has drawn pictures"


def word_of(teacher, data):
    return teacher.tokenizers()[0].batch_decode(data.ids[:1, 0].long(), skip_special_tokens=True)[0].split()[0]


def test_prompts_with_the_word_are_taught_with_the_other(tiny_teacher, pictures):
    from fewstep.models.bundle import load_bundle
    from fewstep.trainers.pictures.data import LatentSource

    teacher = load_bundle(tiny_teacher) if isinstance(tiny_teacher, str) else tiny_teacher
    source = LatentSource(pictures, teacher.text_encoder(), 8, spec=teacher.spec)
    word = word_of(teacher, pictures)
    forgetful = ForgettingSource(source, Swap(word, "blue"), teacher)
    batch = forgetful.batch(0)
    rows, phrasing = source.choose(0).unbind(1)
    gone = forgetful.gone[rows, phrasing]
    assert bool(gone.any()) and torch.equal(batch.cond["ctx"], source.batch(0).cond["ctx"])
    moved = (batch.taught["ctx"] != batch.cond["ctx"]).flatten(1).any(1)
    assert torch.equal(moved, gone)
    forgetful.gone &= False
    none = forgetful.batch(0)
    assert all(torch.equal(none.taught[name], none.cond[name]) for name in none.cond), "a part without it is told too"
    with pytest.raises(RecipeError, match="has the word 'zebra', so there is nothing to forget; set forget"):
        ForgettingSource(source, Swap("zebra", "blue"), teacher)


def test_a_fake_score_that_takes_a_scalar_is_a_unet():
    with pytest.raises(RecipeError, match="takes a scalar, and the teacher is a Linear"):
        fake_of(torch.nn.Linear(2, 2), Student(guidance_width=8), VP())


def test_the_normaliser_has_no_gradient():
    x = torch.ones(2, 3, requires_grad=True)
    assert not score_identity.size_of(x, torch.zeros(2, 3)).requires_grad
