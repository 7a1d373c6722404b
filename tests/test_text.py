import gc
import weakref
from unittest.mock import Mock

import pytest
from transformers import CLIPTokenizer

from fewstep.models.spec import TextInput
from fewstep.runtime.engines.fake_engine import FakeTokenizer, fake_bundle
from fewstep.runtime.errors import BundleError, InvalidRequest
from fewstep.runtime.sampling.text import Bare, Cache, Prompts, known_words, tokenise


def word_tokenizer(extra=0):
    """A CLIP tokenizer that knows "red" and "cat" as words, letters for the rest, and `extra` filler tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    vocab = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges)]
    vocab += [f"filler{k}" for k in range(extra)] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=merges, model_max_length=10)


def test_ids_are_diffusers_ids():
    tokenizer = word_tokenizer()
    ids = tokenizer("red cat", padding="max_length", max_length=10, truncation=True).input_ids
    assert tokenise([tokenizer], "red cat").feeds == {"ids": tuple(ids)}
    assert len(tokenise([tokenizer], "").feeds["ids"]) == 10


def test_an_over_long_prompt_is_refused_with_both_counts():
    with pytest.raises(InvalidRequest, match=r"negative_prompt has 14 tokens; this model reads at most 10") as caught:
        tokenise([word_tokenizer()], "abcdefghijkl", "negative_prompt")
    assert caught.value.field == "negative_prompt"


def test_words_outside_a_small_vocabulary_are_named_once():
    known = [known_words(word_tokenizer())]
    assert tokenise([word_tokenizer()], "Red cat", known=known).notes == ()
    noted = ("not in this model's vocabulary: ox, up",)
    assert tokenise([word_tokenizer()], "red ox, ox up", known=known).notes == noted
    two = tokenise([word_tokenizer()] * 2, "red ox, ox up", texts=[TextInput()] * 2, known=known * 2)
    assert two.notes == noted, "said once"


def test_byte_pair_and_letter_vocabularies_do_not_warn(tiny_teacher):
    assert known_words(word_tokenizer(extra=5000)) is None
    assert known_words(tiny_teacher.tokenizer) is None
    assert tokenise([FakeTokenizer()], "red ox", known=[known_words(FakeTokenizer())]).notes == ()


def test_a_tokenizer_without_a_length_is_the_bundles_fault():
    tokenizer = FakeTokenizer()
    tokenizer.model_max_length = int(1e30)
    with pytest.raises(BundleError, match="model_max_length"):
        tokenise([tokenizer], "red")


def test_the_cache_keeps_the_latest_used_and_counts():
    cache = Cache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
    assert (cache.hits, cache.misses) == (3, 1)
    assert cache.peek("b") is None and cache.peek("a") == 1
    assert (cache.hits, cache.misses) == (3, 1)


def test_a_cache_of_none_keeps_nothing():
    cache = Cache(0)
    cache.put("a", 1)
    assert cache.get("a") is None


def test_prompts_tokenise_once():
    tokenizer = Mock(wraps=FakeTokenizer(), model_max_length=32)
    bundle = fake_bundle()
    bundle.tokenizer = tokenizer
    prompts = Prompts(bundle, 4)
    assert prompts.tokens("red cat") is prompts.tokens("red cat")
    assert tokenizer.call_count == 1


def test_prompts_read_a_vocabulary_once_and_note_what_is_not_in_it(monkeypatch):
    reads, vocabulary = [], CLIPTokenizer.get_vocab
    monkeypatch.setattr(CLIPTokenizer, "get_vocab", lambda self: reads.append(self) or vocabulary(self))
    prompts = Prompts(of_words(word_tokenizer()), 4)
    assert [prompts.tokens(text).notes for text in ("red cat", "red ox")] == [
        (),
        ("not in this model's vocabulary: ox",),
    ]
    assert len(reads) == 1


def test_a_model_that_is_unloaded_takes_its_tokenizer_along():
    tokenizer = word_tokenizer()
    kept, prompts = weakref.ref(tokenizer), Prompts(of_words(tokenizer), 4)
    assert prompts.tokens("red ox").notes
    del prompts, tokenizer
    gc.collect()
    assert kept() is None


def of_words(tokenizer):
    bundle = fake_bundle()
    bundle.tokenizer = tokenizer
    return bundle


def test_each_tokenizer_reads_the_prompt_its_own_way():
    texts = (
        TextInput(length=6, cut=True),
        TextInput(tokenizer="tokenizer_2", length=8, mask=True, prefix="ca", lower=True),
    )
    tokens = tokenise([word_tokenizer(), word_tokenizer()], " Red cat red cat", texts=texts).feeds
    one, two = word_tokenizer(), word_tokenizer()
    assert tokens["ids"] == tuple(one(" Red cat red cat", max_length=6, truncation=True).input_ids)
    expected = two("cared cat red cat", padding="max_length", max_length=8)
    assert tokens["ids_2"] == tuple(expected.input_ids)
    assert tokens["mask_2"] == tuple(expected.attention_mask) and 0 in tokens["mask_2"]


def test_a_bare_text_is_read_without_what_stands_around_prompts():
    texts = (TextInput(length=10, mask=True, prefix="re", suffix=" d", keep=4),)

    def read(prompt):
        return tokenise([word_tokenizer()], prompt, "negative_prompt", texts).feeds

    tokenizer = word_tokenizer()
    prompt, negative = read("d cat"), read(Bare("d"))
    assert prompt["ids"] == tuple(tokenizer("red cat d", padding="max_length", max_length=10).input_ids)
    assert prompt["keep"] == (0, 7, 8, 9)
    assert negative["ids"] == tuple(tokenizer("d", padding="max_length", max_length=10).input_ids)
    assert negative["keep"] == (0, 1, 2, 3) and sum(negative["mask"]) == 3
    with pytest.raises(InvalidRequest, match=r"negative_prompt has 5 tokens; this model reads at most 4"):
        read(Bare("abc"))


def test_a_bare_text_is_not_the_prompt_of_the_same_words():
    kept = {"cat": 1, Bare("cat"): 2}
    assert (kept["cat"], kept[Bare("cat")]) == (1, 2)
    assert Bare("cat") != "cat" and Bare("cat") == Bare("cat") and not Bare("")
