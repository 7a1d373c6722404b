"""Prompts to token ids and to cached text embeddings. No torch here; an embedding is whatever the engine gave."""

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .errors import BundleError, InvalidRequest

SMALL_VOCABULARY = 5000
"""Below this a vocabulary is a list of known words; above, byte-pair pieces are how every word is written."""

T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """A tokenised prompt, padded to the model's length, and what the user should know about it."""

    ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


def tokenise(tokenizer: Any, prompt: str, field: str = "prompt") -> Tokens:
    """Token ids as diffusers feeds them: padded to `model_max_length`, never cut.

    Errors: `InvalidRequest` where the prompt has more tokens than the model reads.
    """
    longest = int(tokenizer.model_max_length)
    if longest > 100_000:  # transformers' stand-in for "not set"
        raise BundleError("tokenizer/tokenizer_config.json has no model_max_length; set the text encoder's length")
    ids = tokenizer(prompt, padding="max_length", max_length=longest, truncation=False)["input_ids"]
    if len(ids) > longest:
        raise InvalidRequest(field, f"{field} has {len(ids)} tokens; this model reads at most {longest}: shorten it")
    unknown = unknown_words(tokenizer, prompt)
    notes = (f"not in this model's vocabulary: {', '.join(unknown)}",) if unknown else ()
    return Tokens(tuple(ids), notes)


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words that a small word vocabulary lacks, in order, each once; none where the vocabulary is not one of words."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) >= SMALL_VOCABULARY or not any(len(token) > 1 + len("</w>") for token in _ends(vocabulary)):
        return []
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    return list(dict.fromkeys(word for word in words if word + "</w>" not in vocabulary))


def _ends(vocabulary: dict[str, int]) -> list[str]:
    return [token for token in vocabulary if token.endswith("</w>")]


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
    """A model's tokenizer and the embeddings of its recent prompts; the empty prompt is one of them.

    `tokens` may be called from any thread; the tokenizer itself is used by one at a time.
    """

    def __init__(self, tokenizer: Any, capacity: int) -> None:
        self.embeddings: Cache[Any] = Cache(capacity)
        self._tokenizer = tokenizer
        self._tokens: Cache[Tokens] = Cache(capacity)
        self._lock = threading.Lock()

    def tokens(self, prompt: str, field: str = "prompt") -> Tokens:
        found = self._tokens.get(prompt)
        if found is None:
            with self._lock:
                found = tokenise(self._tokenizer, prompt, field)
            self._tokens.put(prompt, found)
        return found
