"""Bundles: what loads, what is refused and by which name, and that diffusers reads the same folder."""

import json
import pickle
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.models.bundle import Bundle, find_bundle, load_bundle, reseal, seal_bundle
from fewstep.models.errors import BundleError, SpecError
from fewstep.models.files import sha256_of
from fewstep.models.networks import ControlNet, Decoder, DenoiserNet, Encoder, TextEncoder
from fewstep.models.spec import QualityRow
from tiny import copy_bundle, tiny_spec


@pytest.fixture
def copy(tiny_lcm, tmp_path):
    return copy_bundle(tiny_lcm, tmp_path / "copy")


def edit(root, **changes):
    data = json.loads((root / "bundle.json").read_text())
    for name, value in changes.items():
        if value is None:
            del data[name]
        else:
            data[name] = value
    (root / "bundle.json").write_text(json.dumps(data))


def test_opens_what_was_sealed(tiny_lcm):
    bundle = load_bundle(tiny_lcm.root)
    assert isinstance(bundle, Bundle)
    assert (bundle.name, bundle.spec) == ("tiny-lcm", tiny_spec("lcm"))
    assert bundle.has("unet") and bundle.has("controlnet") and not bundle.has("text_encoder_2")
    assert bundle.weights_digest == tiny_lcm.weights_digest and len(bundle.weights_digest) == 64


def test_parts_load_ready_for_evaluation(tiny_lcm):
    kinds = {"denoiser_net": DenoiserNet, "controlnet": ControlNet, "decoder": Decoder, "encoder": Encoder}
    for name, kind in {**kinds, "text_encoder": TextEncoder}.items():
        part = getattr(tiny_lcm, name)()
        assert isinstance(part, kind) and not part.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in part.parameters())
    ids = tiny_lcm.tokenizer("a red circle", padding="max_length", max_length=24, return_tensors="pt").input_ids
    assert ids.shape == (1, 24)


def test_denoiser_runs_with_and_without_control(tiny_lcm):
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([999.0, 19.0])
    cond = {"ctx": torch.randn(2, 24, 32), "w": torch.tensor([3.0, 1.0]), "edge": torch.rand(2, 3, 32, 32)}
    plain, controlled = tiny_lcm.denoiser(), tiny_lcm.denoiser(control=True)
    assert (plain.path, plain.prediction) == (tiny_lcm.spec.path, "v")
    first = plain.raw(x, t, cond)
    assert first.shape == x.shape and bool(first.isfinite().all())
    assert not torch.equal(first, controlled.raw(x, t, cond)), "the ControlNet must be felt"
    off = {**cond, "control_scale": torch.zeros(2)}
    torch.testing.assert_close(controlled.raw(x, t, off), first)


def test_missing_bundle_json(tmp_path):
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        load_bundle(tmp_path)


def test_not_a_folder():
    with pytest.raises(BundleError, match="nowhere is not a folder; shipped bundles are"):
        find_bundle("nowhere")
    with pytest.raises(BundleError, match="not a folder"):
        find_bundle("../models/reference")


@pytest.mark.parametrize(("text", "named"), [("{", "not JSON"), ("[]", "must hold an object"), ('"x"', "an object")])
def test_broken_bundle_json(copy, text, named):
    (copy / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=named):
        load_bundle(copy)


@pytest.mark.parametrize("version", [2, 0, "1", 1.5])
def test_unknown_version(copy, version):
    edit(copy, version=version)
    with pytest.raises(BundleError, match="upgrade fewstep"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["name", "spec", "files"])
def test_missing_field(copy, name):
    edit(copy, **{name: None})
    with pytest.raises(BundleError, match=f"no field '{name}'"):
        load_bundle(copy)


@pytest.mark.parametrize("files", [[], {"unet/config.json": 3}, "all"])
def test_files_of_a_wrong_type(copy, files):
    edit(copy, files=files)
    with pytest.raises(BundleError, match="files"):
        load_bundle(copy)


def test_bad_spec_names_file_and_field(copy):
    data = json.loads((copy / "bundle.json").read_text())
    data["spec"]["sampler"] = "magic"
    (copy / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(SpecError, match=r"bundle\.json: spec\.sampler is 'magic'"):
        load_bundle(copy)


def test_missing_file(copy):
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"lacks vae/diffusion_pytorch_model\.safetensors"):
        load_bundle(copy)


def test_wrong_digest(copy):
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(BundleError, match=r"unet/config\.json changed"):
        load_bundle(copy)
    assert load_bundle(copy, check_digests=False).name == "tiny-lcm"


@pytest.mark.parametrize("name", ["unet/model.bin", "a.pt", "deep/er/b.pkl", "c.ckpt", "run.py", "lib.so", "D.PT"])
def test_code_is_refused(copy, name):
    path = copy / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(BundleError, match=f"{path.name} may hold code"):
        load_bundle(copy)
    with pytest.raises(BundleError, match="may hold code"):
        seal_bundle(copy, "x", tiny_spec("lcm"))


def test_unlisted_weights(copy):
    save_file({"a": torch.zeros(1)}, copy / "unet" / "extra.safetensors")
    with pytest.raises(BundleError, match=r"unet/extra\.safetensors is not listed"):
        load_bundle(copy)


def test_unlisted_weights_index(copy):
    """An index file would redirect loading to other weights."""
    (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(BundleError, match="is not listed"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "unet/../../outside.json"])
def test_path_escape(copy, name):
    (copy.parent / "outside.json").write_text("{}")
    data = json.loads((copy / "bundle.json").read_text())
    data["files"][name] = "0" * 64
    (copy / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="outside the bundle"):
        load_bundle(copy)


def test_link_out_of_the_bundle(copy):
    (copy.parent / "secret.json").write_text("{}")
    (copy / "linked.json").symlink_to(copy.parent / "secret.json")
    data = json.loads((copy / "bundle.json").read_text())
    data["files"]["linked.json"] = "0" * 64
    (copy / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="outside the bundle"):
        load_bundle(copy)


def test_engines_are_outside_the_seal(copy):
    (copy / "engines" / "onnx").mkdir(parents=True)
    (copy / "engines" / "onnx" / "denoiser.onnx").write_bytes(b"x")
    assert load_bundle(copy).name == "tiny-lcm"


def reweighted(copy, change):
    """Change the denoiser's weights and seal again, as a careless export would."""
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return seal_bundle(copy, "broken", tiny_spec("lcm"))


def test_missing_weights_fail_loudly(copy):
    bundle = reweighted(copy, lambda w: w.pop("conv_in.weight"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BundleError, match=r"missing keys \['conv_in\.weight'\]"):
            bundle.denoiser_net()


def test_unexpected_weights_fail_loudly(copy):
    bundle = reweighted(copy, lambda w: w.update(stray=torch.zeros(1)))
    with pytest.raises(BundleError, match=r"unexpected keys \['stray'\]"):
        bundle.denoiser_net()


def test_misshapen_weights_fail_loudly(copy):
    bundle = reweighted(copy, lambda w: w.update({"conv_in.bias": torch.zeros(3)}))
    with pytest.raises(BundleError, match="unet"):
        bundle.denoiser_net()


def test_missing_component(copy):
    shutil.rmtree(copy / "controlnet")
    bundle = seal_bundle(copy, "no-control", tiny_spec("lcm"))
    with pytest.raises(BundleError, match=r"no controlnet/config\.json"):
        bundle.controlnet()


def test_unknown_class(copy):
    config = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "os.system"}))
    bundle = seal_bundle(copy, "odd", tiny_spec("lcm"))
    with pytest.raises(BundleError, match=r"os\.system"):
        bundle.decoder()


def test_reseal_changes_the_spec_only(copy):
    row = QualityRow(steps=1, nfe=1, guidance=3.0, frechet=2.0, compliance=0.5, diversity=0.1, pictures=8)
    before = load_bundle(copy)
    after = reseal(before, quality=(row,))
    assert after.spec.quality == load_bundle(copy).spec.quality == (row,)
    assert after.weights_digest == before.weights_digest


def test_digest_follows_the_weights(copy, tiny_lcm):
    bundle = reweighted(copy, lambda w: w["conv_in.bias"].add_(1.0))
    assert bundle.weights_digest != tiny_lcm.weights_digest


@pytest.mark.parametrize("kind", ["teacher", "lcm", "dmd2"])
def test_diffusers_reads_the_same_folder(kind, request):
    import diffusers

    bundle = request.getfixturevalue(f"tiny_{kind}")
    name = {"lcm": "LatentConsistencyModelPipeline"}.get(kind, "StableDiffusionPipeline")
    pipe = getattr(diffusers, name).from_pretrained(bundle.root, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    ours = bundle.denoiser_net().unet.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in pipe.unet.state_dict().items())
    picture = pipe("a red circle", num_inference_steps=1, height=32, width=32, output_type="np").images
    assert picture.shape == (1, 32, 32, 3)


def test_sealing_forgets_where_a_component_was_loaded_from(tiny_teacher, tmp_path):
    folder = copy_bundle(tiny_teacher, tmp_path / "copy")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/somebody/unet"}))
    sealed = seal_bundle(folder, "copy", tiny_teacher.spec)
    assert "somebody" not in (folder / "unet" / "config.json").read_text()
    assert sealed.load("unet").config.block_out_channels == tiny_teacher.load("unet").config.block_out_channels


def test_sealing_takes_every_digest_once(copy, monkeypatch):
    """At 2 to 7 GB a second look takes as long as the first."""
    seen = []
    monkeypatch.setattr("fewstep.models.bundle.sha256_of", lambda path: seen.append(path) or sha256_of(path))
    listed = json.loads((copy / "bundle.json").read_text())["files"]
    assert seal_bundle(copy, "tiny-lcm", tiny_spec("lcm")).spec == tiny_spec("lcm")
    assert sorted(path.relative_to(copy).as_posix() for path in seen) == sorted(listed)


def test_resealing_keeps_the_digests_of_weights_and_takes_those_of_golden_cases(copy, monkeypatch):
    """Weights that were damaged meanwhile are not sealed as if they were whole."""
    bundle, before = load_bundle(copy), json.loads((copy / "bundle.json").read_text())["files"]
    (copy / "golden").mkdir()
    case = copy / "golden" / "new.safetensors"
    case.write_bytes(b"a case")
    seen = []
    monkeypatch.setattr("fewstep.models.bundle.sha256_of", lambda path: seen.append(path) or sha256_of(path))
    reseal(bundle)
    after = json.loads((copy / "bundle.json").read_text())["files"]
    assert seen == [case] and after == {**before, "golden/new.safetensors": sha256_of(case)}
    (copy / "unet" / "config.json").write_text("{}")
    reseal(bundle)
    with pytest.raises(BundleError, match=r"unet/config\.json changed since the bundle was sealed"):
        load_bundle(copy)


def test_a_seal_that_is_interrupted_leaves_the_old_one(copy, monkeypatch):
    before = (copy / "bundle.json").read_bytes()

    def killed(file):
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.models.files.os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        reseal(load_bundle(copy), golden=())
    assert (copy / "bundle.json").read_bytes() == before and not list(copy.glob("bundle.json.*"))
