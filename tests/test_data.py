"""Encoded data: scenes and a user's pictures, batches as a function of the step, and errors that name the file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.trainers.errors import DataError
from fewstep.trainers.pictures.data import (
    Latents,
    LatentSource,
    encode_folder,
    encode_scenes,
    load_latents,
    read_metadata,
    read_picture,
    save_latents,
    to_pixels,
    tokenize,
)


def folder_of(tmp_path, rows, pictures=("a.png", "b.png")):
    for i, name in enumerate(pictures):
        Image.new("RGB", (50, 40), (255, 40 * i, 0)).save(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


GOOD = [json.dumps({"file_name": "a.png", "text": "a red"}), "", json.dumps({"file_name": "b.png", "text": "b"})]


def test_scenes_are_encoded_as_the_denoiser_sees_them(tiny_teacher):
    data = encode_scenes(tiny_teacher, 5, seed=3, phrasings=2)
    assert data.latents.shape == (5, 4, 32, 32) and data.ids.shape == (5, 2, 24) and len(data) == 5
    again = encode_scenes(tiny_teacher, 5, seed=3, phrasings=2)
    assert torch.equal(data.latents, again.latents) and torch.equal(data.ids, again.ids)
    assert not torch.equal(data.latents, encode_scenes(tiny_teacher, 5, seed=4).latents)
    raw = tiny_teacher.load("vae").encode(torch.zeros(1, 3, 64, 64)).latents
    assert torch.allclose(tiny_teacher.encoder()(torch.zeros(1, 3, 64, 64)), raw * 1.3)


def test_own_pictures_are_cut_to_the_teachers_size(tiny_teacher, tmp_path):
    data = encode_folder(tiny_teacher, folder_of(tmp_path, GOOD))
    assert data.latents.shape == (2, 4, 16, 16) and data.ids.shape == (2, 1, 24)
    assert torch.equal(data.ids[0, 0], tokenize(tiny_teacher.tokenizer, ["a red"])[0])


def test_batches_are_a_function_of_the_step(tiny_teacher):
    latents = torch.arange(10.0)[:, None, None, None].expand(10, 4, 2, 2).contiguous()
    ids = tokenize(tiny_teacher.tokenizer, list("abcdefghij"))[:, None]
    data = Latents(latents, {"ids": ids}, {"ids": tokenize(tiny_teacher.tokenizer, [""])[0]})
    text = tiny_teacher.text_encoder()
    source, other = LatentSource(data, text, 6, seed=1), LatentSource(data, text, 6, seed=1)
    source.batch(0)
    a, b = source.batch(7), other.batch(7)
    assert torch.equal(a.x0, b.x0) and torch.equal(a.cond["ctx"], b.cond["ctx"])
    assert not torch.equal(a.x0, source.batch(8).x0)
    assert not torch.equal(a.x0, LatentSource(data, text, 6, seed=2).batch(7).x0)
    rows = a.x0[:, 0, 0, 0].long()
    assert torch.allclose(a.cond["ctx"], text(ids[rows, 0].long()), atol=1e-6)
    assert torch.allclose(a.uncond["ctx"][3], text(data.empty["ids"].long()[None])[0], atol=1e-6)
    assert a.x0.shape == (6, 4, 2, 2) and not a.cond["ctx"].requires_grad


def test_an_empty_set_is_refused(tiny_teacher):
    empty = Latents(torch.zeros(0, 4, 2, 2), {"ids": torch.zeros(0, 1, 24)}, {"ids": torch.zeros(24)})
    with pytest.raises(DataError, match="empty"):
        LatentSource(empty, tiny_teacher.text_encoder(), 2)


def test_latents_are_kept_in_a_file(tmp_path):
    feeds = {name: k * torch.ones(3, 1, 4 + k, dtype=torch.int32) for k, name in enumerate(("ids", "mask", "ids_2"))}
    data = Latents(torch.randn(3, 2).half(), feeds, {name: value[0, 0] + 7 for name, value in feeds.items()})
    save_latents(tmp_path / "x" / "latents.safetensors", data)
    found = load_latents(tmp_path / "x" / "latents.safetensors")
    assert torch.equal(found.latents, data.latents) and torch.equal(found.ids, data.ids)
    for mine, theirs in ((found.feeds, data.feeds), (found.empty, data.empty)):
        assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    for name in ("bad.safetensors", "none.safetensors"):
        with pytest.raises(DataError, match=name):
            load_latents(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "no text field 'file_name'"),
        ('{"file_name": "a.png"}', "no text field 'text'"),
        ('{"file_name": "a.png", "text": 3}', "no text field 'text'"),
        ('{"file_name": "c.png", "text": "c"}', "'c.png', which does not exist"),
        ('{"file_name": "../../etc/passwd", "text": "c"}', "lies outside"),
        ("", "is empty"),
    ],
)
def test_metadata_errors_name_the_line(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_metadata(folder_of(tmp_path, [row]))


def test_a_folder_without_metadata_says_what_to_write(tmp_path):
    with pytest.raises(DataError, match="file_name"):
        read_metadata(tmp_path)


def test_a_file_that_is_no_picture(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        read_picture(tmp_path / "a.png", 8, 8)


def test_pictures_are_cut_from_the_middle_and_scaled(tmp_path):
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    cut = read_picture(tmp_path / "wide.png", 10, 10)
    assert cut.size == (10, 10) and np.asarray(cut).min() == 255
    values = to_pixels(cut)
    assert values.shape == (3, 10, 10) and float(values.min()) == 1.0
