"""The built-in family: its vocabulary, its longest caption, and its sizes. Nothing is trained here."""

import itertools
import random

import pytest
import torch

from fewstep.trainers.pictures import family, scenes
from fewstep.trainers.pictures.scenes import ObjectClaim


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return family.build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_caption_word_is_one_token(tokenizer):
    for word in scenes.words():
        assert len(tokenizer.tokenize(word)) == 1, word
    assert tokenizer.tokenize("a large red star, left of two tiny rings") == [
        f"{word}</w>" for word in ["a", "large", "red", "star", ",", "left", "of", "two", "tiny", "rings"]
    ]


def test_unknown_words_fall_apart_and_come_back(tokenizer):
    ids = tokenizer("a zebra made of glass!").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "azebramadeofglass!"


def test_capitals_are_read_as_small_letters(tokenizer):
    assert tokenizer("A Red CIRCLE").input_ids == tokenizer("a red circle").input_ids


def longest_captions():
    """The wordiest caption of each form: all sizes said, three objects, every opening and ground by trying seeds."""
    claims = tuple(ObjectClaim(shape, "yellow", "large") for shape in ("circle", "triangle", "square"))
    for count, seed in itertools.product((1, 2, 3), range(150)):
        for relation in (None, *scenes.RELATIONS):
            yield scenes.describe(claims[:count], relation, "pink", random.Random(seed))


def test_longest_caption_fits(tokenizer):
    texts = sorted(set(longest_captions()), key=len)[-400:]
    longest = max(len(ids) for ids in tokenizer(texts).input_ids)
    assert 20 < longest <= family.TOKENS


def test_tokenizer_comes_back_from_disk(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path / "kept")
    again = AutoTokenizer.from_pretrained(tmp_path / "kept", local_files_only=True)
    text = "two small green rings on a tan background"
    assert again(text, padding="max_length").input_ids == tokenizer(text, padding="max_length").input_ids
    assert len(again(text, padding="max_length").input_ids) == family.TOKENS


def test_shapes_fit_together(tokenizer):
    text, unet = family.build_text_encoder(tokenizer).eval(), family.build_unet(time_cond_proj_dim=32).eval()
    vae = family.build_autoencoder().eval()
    ids = tokenizer(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        ctx = text(ids)[0]
        assert ctx.shape == (1, family.TOKENS, family.TEXT_WIDTH)
        latent = vae.encode(torch.zeros(1, 3, scenes.SIZE, scenes.SIZE)).latents
        assert latent.shape == (1, family.LATENT_CHANNELS, family.LATENT_SIZE, family.LATENT_SIZE)
        out = unet(latent, torch.tensor([500.0]), ctx, timestep_cond=torch.zeros(1, 32)).sample
        assert out.shape == latent.shape
        assert vae.decode(latent).sample.shape == (1, 3, scenes.SIZE, scenes.SIZE)
        edge = torch.zeros(1, 3, scenes.SIZE, scenes.SIZE)
        plain = family.build_unet()
        down, middle = family.build_controlnet(plain)(latent, torch.tensor([1.0]), ctx, edge, return_dict=False)
    assert middle.abs().max() == 0.0 and all(d.abs().max() == 0.0 for d in down), "a fresh ControlNet changes nothing"
    assert sum(p.numel() for p in plain.parameters()) < 5_000_000
