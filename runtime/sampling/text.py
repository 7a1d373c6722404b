"""Prompts to token ids and to cached text embeddings. No torch here; an embedding is whatever the engine gave."""

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fewstep.models.bundle import Bundle
from fewstep.models.spec import TextInput

from ..errors import BundleError, InvalidRequest

SMALL_VOCABULARY = 5000
"""Below this a vocabulary is a list of known words; above, byte-pair pieces are how every word is written."""

T = TypeVar("T")


class Bare(str):
    """A negative prompt that is read without the prefix and suffix: not the same text as a prompt of the same words."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bare) and str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


@dataclass(frozen=True)
class Tokens:
    """A tokenised prompt: what the text role is fed (`ids`, `ids_2`, `mask`, ...), padded, and what the user should
    know about it."""

    feeds: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()


def tokenise(
    tokenizers: Sequence[Any],
    prompt: str,
    field: str = "prompt",
    texts: Sequence[TextInput] = (TextInput(),),
    known: Sequence[frozenset[str] | None] = (),
) -> Tokens:
    """Token ids as diffusers feeds them, for each tokenizer as its `TextInput` says.

    known: `known_words` of each tokenizer; words that are not among them are noted.

    Errors: `InvalidRequest` where the prompt has more tokens than the model reads.
    """
    feeds: dict[str, tuple[int, ...]] = {}
    for k, (tokenizer, text) in enumerate(zip(tokenizers, texts, strict=True), start=1):
        suffix = "" if k == 1 else f"_{k}"
        out = _padded(tokenizer, text, prompt, field)
        feeds[f"ids{suffix}"] = tuple(out["input_ids"])
        if text.mask:
            feeds[f"mask{suffix}"] = tuple(out["attention_mask"])
        if text.keep is not None:
            feeds[f"keep{suffix}"] = kept_places(len(out["input_ids"]), text.keep, isinstance(prompt, Bare))
    missed = [", ".join(unknown) for words in known if (unknown := unknown_words(words, prompt))]
    return Tokens(feeds, tuple(f"not in this model's vocabulary: {words}" for words in dict.fromkeys(missed)))


def _padded(tokenizer: Any, text: TextInput, prompt: str, field: str) -> Mapping[str, list[int]]:
    longest = int(text.length or tokenizer.model_max_length)
    if longest > 100_000:  # transformers' stand-in for "not set"
        raise BundleError(
            f"{text.tokenizer}/tokenizer_config.json has no model_max_length; set the text encoder's length"
        )
    bare = isinstance(prompt, Bare) and text.keep is not None
    prefix, suffix, room = ("", "", text.keep or longest) if bare else (text.prefix, text.suffix, longest)
    written = prefix + (prompt.lower().strip() if text.lower else str(prompt)) + suffix
    ids = _ids(tokenizer, written, longest if text.cut else None)
    if len(ids) > room:
        raise InvalidRequest(field, f"{field} has {len(ids)} tokens; this model reads at most {room}: shorten it")
    rest = longest - len(ids)
    return {"input_ids": [*ids, *[tokenizer.pad_token_id] * rest], "attention_mask": [1] * len(ids) + [0] * rest}


def _ids(tokenizer: Any, text: str, longest: int | None) -> Sequence[int]:
    """A text's token ids with the marks of its beginning and end, cut to `longest`.

    By the tokenizer's own Rust half where it has one: transformers' way there costs as much as a small layer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or longest is not None:
        found: Sequence[int] = tokenizer(text, truncation=longest is not None, max_length=longest)["input_ids"]
        return found
    backend.no_padding()
    backend.no_truncation()
    ids: Sequence[int] = backend.encode(text).ids
    return ids


def kept_places(length: int, keep: int, bare: bool = False) -> tuple[int, ...]:
    """Which of `length` tokens the network sees: the first and the last `keep - 1`, or of a bare text the first."""
    return tuple(range(keep)) if bare else (0, *range(length - keep + 1, length))


def unknown_words(known: frozenset[str] | None, prompt: str) -> list[str]:
    """Words that are not among the known ones, in order, each once; none where every word can be written."""
    if known is None:
        return []
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    return list(dict.fromkeys(word for word in words if word not in known))


def known_words(tokenizer: Any) -> frozenset[str] | None:
    """The words of a small word vocabulary; None where the vocabulary is large, or not one of words."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) >= SMALL_VOCABULARY:
        return None
    words = frozenset(token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>"))
    return words if any(len(word) > 1 for word in words) else None


class Cache(Generic[T]):
    """Least recently used values by prompt, with counters; safe to use from several threads."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, prompt: str) -> T | None:
        with self._lock:
            if prompt not in self._kept:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(prompt)
            return self._kept[prompt]

    def peek(self, prompt: str) -> T | None:
        """As `get`, without counting or refreshing."""
        with self._lock:
            return self._kept.get(prompt)

    def put(self, prompt: str, value: T) -> None:
        with self._lock:
            self._kept[prompt] = value
            self._kept.move_to_end(prompt)
            while len(self._kept) > self.capacity:
                self._kept.popitem(last=False)


class Prompts:
    """A model's tokenizers and the embeddings of its recent prompts; the empty prompt is one of them.

    `tokens` may be called from any thread; the tokenizers themselves are used by one at a time.
    """

    def __init__(self, bundle: Bundle, capacity: int) -> None:
        self.embeddings: Cache[Any] = Cache(capacity)
        self._tokenizers = bundle.tokenizers()
        self._texts = bundle.spec.text
        self._known = [known_words(tokenizer) for tokenizer in self._tokenizers]  # once: it reads every token
        self._tokens: Cache[Tokens] = Cache(capacity)
        self._lock = threading.Lock()

    def tokens(self, prompt: str, field: str = "prompt") -> Tokens:
        found = self._tokens.get(prompt)
        if found is None:
            with self._lock:
                found = tokenise(self._tokenizers, prompt, field, self._texts, self._known)
            self._tokens.put(prompt, found)
        return found
