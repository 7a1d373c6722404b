"""A second time in networks, bundles and rows: silent at first, heard after, stated, refused where it does not fit."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from fewstep.export.graphs import random_feeds
from fewstep.models.altered import ALTERATIONS, library_of, remade
from fewstep.models.bundle import load_bundle, load_component
from fewstep.models.errors import BundleError, SpecError
from fewstep.models.families import find_family
from fewstep.models.importing import Answers, import_folder
from fewstep.models.linear_attention import LinearAttention, linearise
from fewstep.models.networks import as_network
from fewstep.models.paths import VP, RectifiedFlow, told_time
from fewstep.models.second_time import SecondTime, TwoTimes, add_second_time
from fewstep.models.shapes import make_folder
from fewstep.models.spec import Guidance, SamplerSpec
from fewstep.runtime.engines.compiled_engine import Rounded
from fewstep.runtime.engines.fake_engine import FakeEngine, fake_spec
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.plan import compile_plan
from fewstep.runtime.sampling.request import GenerateRequest, resolve
from fewstep.runtime.sampling.samplers import updates
from fewstep.trainers.parts.tangent import Difference, Jvp
from tiny import copy_bundle, two_times

DITS = ["pixart-sigma-tiny", "sana-tiny", "sana-sprint-tiny", "sd3-tiny", "flux-dev-tiny", "z-image-tiny"]


@pytest.fixture(scope="module")
def told(tiny_teacher, tmp_path_factory):
    return two_times(tiny_teacher, tmp_path_factory.mktemp("told") / "student")


def answer(bundle, s, role="denoiser"):
    feeds = random_feeds(bundle, role, batch=3, size=bundle.spec.sizes[0], seed=0)
    net = bundle.network(role)
    if s is not None:
        feeds["s"] = torch.tensor(s)
    with torch.no_grad():
        return net(*(feeds[name] for name in net.inputs))


@pytest.mark.parametrize("shape", DITS)
def test_a_new_second_time_changes_no_transformer_until_it_has_weights(shape, tmp_path):
    root = make_folder(shape, tmp_path / shape)
    family = find_family(root)
    network = load_component(root, family.folder)
    plain = family.denoiser(network, False).eval()
    config, draw = network.config, torch.Generator().manual_seed(0)
    feeds = _feeds(plain.inputs, config, draw)
    with torch.no_grad():
        before = plain(*feeds)
        net = family.denoiser(add_second_time(network, 1.0), False).eval()
        assert net.inputs == (*plain.inputs, "s") and net.outputs == plain.outputs
        assert torch.equal(net(*feeds, torch.tensor([3.0, 500.0])), before)
        nn.init.normal_(next(p for p in net.modules() if isinstance(p, SecondTime)).project.weight)
        here, there = (net(*feeds, torch.tensor([3.0, s])) for s in (500.0, 900.0))
    assert not torch.allclose(here[1], before[1], atol=1e-4), "it is heard"
    assert not torch.allclose(here[1], there[1], atol=1e-4) and torch.equal(here[0], there[0]), "each row hears its own"


def _feeds(inputs, config, draw):
    width = config.get("caption_channels") or config.get("joint_attention_dim") or config.get("cap_feat_dim")
    pooled = config.get("pooled_projection_dim") or 8
    known = {
        "x": torch.randn(2, 16, 8, 8, generator=draw), "t": torch.tensor([0.9, 0.5]),
        "ctx": torch.randn(2, 6, width, generator=draw), "ctx_mask": torch.ones(2, 6), "w": torch.tensor([3.0, 4.0]),
        "pooled": torch.randn(2, pooled, generator=draw), "size_ids": torch.tensor([[64.0, 64.0, 1.0]] * 2),
    }  # fmt: skip
    packed = 4 if "axes_dims_rope" in config and "guidance_embeds" in config else 1  # FLUX takes blocks of 2x2
    known["x"] = known["x"][:, : config["in_channels"] // packed]
    return [known[name] for name in inputs]


def test_every_graph_of_a_unet_hears_it_and_clean_data_is_a_number(told, tiny_teacher):
    assert told.network("denoiser").inputs == ("x", "t", "ctx", "s")
    assert told.network("denoiser+control").inputs[-1] == "s" and told.network("controlnet").inputs[-1] == "scale"
    for role in ("denoiser", "denoiser+control"):
        near, far = (answer(told, [0.0, 0.0, s], role) for s in (0.0, 700.0))
        assert torch.allclose(near[:2], far[:2], atol=1e-6) and not torch.allclose(near[2], far[2], atol=1e-3)
    assert torch.equal(answer(told, [-math.inf] * 3), answer(told, [-1.0] * 3)), "as training and serving say clean"
    assert not torch.allclose(answer(told, [-1.0] * 3), answer(told, [0.0] * 3), atol=1e-5)
    assert [told_time(VP(), t) for t in (None, 259.0)] == [-1.0, 259.0] and told_time(RectifiedFlow(), None) == 0.0


def test_it_survives_copies_and_refuses_to_be_left_out(told):
    network = told.load("unet")
    twin = copy.deepcopy(network)
    nn.init.zeros_(twin.time_embedding.second_time.project.weight)
    x, t, cond = torch.randn(1, 4, 16, 16), torch.tensor([500.0]), {"ctx": torch.randn(1, 24, 32)}
    one, other = (as_network(told.family.denoiser(unet, False).eval()) for unet in (network, twin))
    with torch.no_grad():
        s = torch.tensor([100.0], dtype=torch.float64)
        assert not torch.allclose(one(x, t, {**cond, "s": s}), other(x, t, {**cond, "s": s}), atol=1e-4)
    with pytest.raises(ValueError, match="pass s"):
        one(x, t, cond)
    with pytest.raises(RuntimeError, match="second time was called without"):
        network(x, t, cond["ctx"])
    again = remade(type(network), network.config)
    assert list(again.state_dict()) == list(network.state_dict())


def test_with_linear_attention_too(told):
    network = linearise(told.load("unet"))
    changed = {name for name in network.config if name.startswith("fewstep_")}
    assert library_of(network.config) == "fewstep.models.linear_attention" and set(ALTERATIONS) >= changed
    again = remade(type(network), network.config)
    assert any(isinstance(part, LinearAttention) for part in again.modules())
    assert isinstance(told.family.denoiser(again, False), TwoTimes)


def test_the_bundle_states_it(told, tiny_teacher, tmp_path):
    assert load_bundle(told.root).spec.second_time and not tiny_teacher.spec.second_time
    data = told.spec.to_json()
    assert data.pop("second_time") is True and not SamplerSpec.from_json(data).second_time, "old specs stay readable"
    folder = copy_bundle(told, tmp_path / "lost")
    _edit(folder / "bundle.json", lambda data: data["spec"].pop("second_time"))
    with pytest.raises(BundleError, match=r"second_time is False, and unet/config\.json has .*fewstep_second_time"):
        load_bundle(folder)
    folder = copy_bundle(tiny_teacher, tmp_path / "claimed")
    _edit(folder / "bundle.json", lambda data: data["spec"].update(second_time=True))
    with pytest.raises(BundleError, match=r"spec\.second_time is True, and unet/config\.json lacks"):
        load_bundle(folder)
    with pytest.raises(SpecError, match="second_time is true, and the 'dpmpp-2m' sampler"):
        replace(told.spec, sampler="dpmpp-2m")


@pytest.mark.parametrize("value", [0, -1.0, True, "yes"])
def test_a_scale_that_is_none_is_refused(told, tmp_path, value):
    folder = copy_bundle(told, tmp_path / "bad")
    _edit(folder / "unet" / "config.json", lambda config: config.update(fewstep_second_time=value))
    with pytest.raises(BundleError, match=r"config\.json: fewstep_second_time is .*a number above 0"):
        load_bundle(folder, check_digests=False).load("unet")


def test_a_class_that_embeds_time_otherwise_is_refused():
    with pytest.raises(BundleError, match="Linear embeds its time in a way that takes no second one"):
        add_second_time(nn.Linear(2, 2), 1.0)


def test_a_folder_with_a_second_time_is_imported_as_such(told, tmp_path):
    source = copy_bundle(told, tmp_path / "source")
    (source / "bundle.json").unlink()
    answers = Answers(steps=(1, 2), guidance=Guidance(mode="none"))
    bundle = import_folder(source, tmp_path / "bundle", answers=answers)
    assert bundle.spec.second_time and bundle.network("denoiser").inputs[-1] == "s"


def test_each_row_says_where_its_step_lands():
    grids = {2: (999.0, 499.0), 4: (999.0, 759.0, 499.0, 259.0)}
    fixed = {"grids": grids, "boundary": None, "guidance": Guidance(mode="none"), "second_time": True}
    chain = fake_spec(**fixed, sampler="ddim", stochastic=False)
    lands = {
        "ddim": [759.0, 499.0, 259.0, -1.0],
        "tcd": [math.floor(0.7 * t) for t in (759.0, 499.0, 259.0)] + [-1.0],
        "lcm": [-1.0] * 4,
    }
    for sampler, wanted in lands.items():
        hopping = {"gamma": 0.3} if sampler == "tcd" else {}
        spec = replace(chain, sampler=sampler, stochastic=sampler != "ddim", **hopping)
        request = resolve(GenerateRequest(prompt="-", steps=4), spec)
        assert [row.s for row in compile_plan(request, spec).rows] == wanted, sampler
    ends_noisy = replace(chain, final_alpha_one=False)
    request = resolve(GenerateRequest(prompt="-", steps=2), ends_noisy)
    assert [row.s for row in compile_plan(request, ends_noisy).rows] == [499.0, 0.0]


def test_engines_say_whether_they_take_it_and_are_fed_it(told, tiny_teacher):
    assert TorchEngine(told).capabilities.takes_s and not TorchEngine(tiny_teacher).capabilities.takes_s
    assert FakeEngine(fake_spec(second_time=True)).capabilities.takes_s and not FakeEngine().capabilities.takes_s
    feeds = random_feeds(told, "denoiser", batch=4, size=(32, 32), seed=1)
    pairs = {(t, told_time(VP(), u.lands)) for t, u in updates(told.spec, 8)}
    assert set(zip(feeds["t"].tolist(), feeds["s"].tolist(), strict=True)) <= pairs, "as its sampler asks"


def test_rounding_a_network_does_not_round_its_times(told):
    feeds = random_feeds(told, "denoiser", batch=2, size=(32, 32), seed=2)
    exact, rounded = told.denoiser_net(), Rounded(told.denoiser_net())
    with torch.no_grad():
        for s in (998.0, 999.0):  # one number in bfloat16
            given = [{**feeds, "s": torch.tensor([s, 3.0])}[name] for name in exact.inputs]
            wanted = exact(*given)
            assert (rounded(*given) - wanted).norm() < 0.03 * wanted.norm()
        second = next(part for part in rounded.modules() if isinstance(part, SecondTime))
        second.call.s = torch.tensor([998.0, 999.0])
        one, other = second()
    assert one.dtype == torch.bfloat16 and not torch.equal(one, other)


def test_diffusers_refuses_the_folder(told, tmp_path):
    folder = copy_bundle(told, tmp_path / "student")
    library = library_of(told.config("unet"))
    _edit(folder / "model_index.json", lambda index: index.update(unet=[library, "UNet2DConditionModel"]))
    with pytest.raises(ValueError, match="second_time` has no class"):
        DiffusionPipeline.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_exact_tangent_of_a_unet_is_that_of_differences(told, layout):
    """Through attention and norms, in both layouts; in the first time and, as flow maps from noise ask, the second."""
    net = told.denoiser_net().to(memory_format=layout)
    x, ctx = torch.randn(2, 4, 16, 16), torch.randn(2, 24, 32)
    t = torch.tensor([900.0, 500.0], dtype=torch.float64)
    curves = (lambda x, t: net(x, t.float(), ctx, t - 100.0), lambda x, s: net(x, torch.full((2,), 900.0), ctx, s))
    for curve in curves:
        exact = Jvp()(curve, x, t, 0.3 * torch.ones_like(x), 10.0 * torch.ones_like(t))
        close = Difference(0.01)(curve, x, t, 0.3 * torch.ones_like(x), 10.0 * torch.ones_like(t))
        assert exact.norm() > 1.0 and (exact - close).norm() < 0.01 * exact.norm()


def _edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
