"""What an operator decides: read once from the environment, frozen afterwards."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fewstep.runtime.errors import FewstepError

PREFIX = "FEWSTEP_"


class BadSetting(FewstepError):
    """A setting cannot be used; the message has its name, its value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every field is read from `FEWSTEP_<NAME>`; flags of `fewstep serve` win over the environment.

    api_keys: comma-separated; key_file: keys made by `fewstep keys`, with limits each. With either, every call but
    health, metrics and the page needs `Authorization: Bearer KEY`. origins: pages elsewhere that may call from a
    browser, as in "https://host:port". log: "quiet", "text" or "json"; traces: "off" or "otlp". models_dir: the
    folder whose bundles an admin key may load by name. groups: JSON files of models served as one. scorer:
    "module:function", which says of a prompt and a picture how good it is, for requests whose helper refines.
    memory_bytes: what the models in memory may take together, as their weights are counted; 0 is no bound.
    stored_bytes and stored_s bound the pictures kept for `response_format: "url"`. drain_delay_s: how long /ready
    says no before the port closes, so that a load balancer notices; drain_s: how long running requests may then
    take. max_live: live sessions open at once. c2pa_chain, c2pa_key: PEM files that sign each picture
    (`server/provenance.py`); the time of signing is attested by c2pa_timestamp_url, where one is given.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    engine: str = "auto"
    allow_unproven: bool = False
    max_queue: int = 256
    max_n: int = 10
    api_keys: tuple[str, ...] = ()
    key_file: str = ""
    origins: tuple[str, ...] = ()
    log: str = "quiet"
    traces: str = "off"
    models_dir: str = ""
    groups: tuple[str, ...] = ()
    scorer: str = ""
    memory_bytes: int = 0
    max_body_bytes: int = 32 * 2**20
    encode_threads: int = 2
    max_live: int = 64
    stored_bytes: int = 64 * 2**20
    stored_s: float = 3600.0
    drain_delay_s: float = 0.0
    drain_s: float = 30.0
    c2pa_chain: str = ""
    c2pa_key: str = ""
    c2pa_algorithm: str = "es256"
    c2pa_timestamp_url: str = ""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise BadSetting(f"{PREFIX}{name.upper()} is {value}; use {low} to {high}")
        for name, known in _CHOICES:
            if getattr(self, name) not in known:
                raise BadSetting(f"{PREFIX}{name.upper()} is {getattr(self, name)!r}; use one of {', '.join(known)}")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise BadSetting(f"{PREFIX}ORIGINS has {origin!r}; write scheme, host and port, as https://host:8443")

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> "Settings":
        """Read the FEWSTEP_ variables; one that looks like a mistyped setting is refused.

        Errors: `BadSetting` with the variable, its value and what is allowed.
        """
        known = {PREFIX + f.name.upper(): f for f in fields(Settings)}
        values: dict[str, Any] = {}
        for key, text in environment.items():
            if key in known:
                values[known[key].name] = _read(key, text, known[key].default)
            elif key.startswith(PREFIX) and (close := difflib.get_close_matches(key, known, n=1, cutoff=0.75)):
                raise BadSetting(f"{key} is set, but there is no such setting; did you mean {close[0]}?")
        return Settings(**values)


_SWITCH = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off"), False)}
_C2PA = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")
_CHOICES = (("c2pa_algorithm", _C2PA), ("log", ("quiet", "text", "json")), ("traces", ("off", "otlp")))
_ORIGIN = re.compile(r"https?://[^/\s,]+")
_RANGES = (
    ("port", 0, 65535),
    ("max_queue", 1, 1_000_000),
    ("max_n", 1, 1000),
    ("memory_bytes", 0, 2**50),
    ("max_body_bytes", 1024, 2**30),
    ("encode_threads", 1, 64),
    ("max_live", 0, 100_000),
    ("stored_bytes", 0, 2**40),
    ("stored_s", 1, 7 * 86400),
    ("drain_delay_s", 0, 3600),
    ("drain_s", 0, 3600),
)


def _read(key: str, text: str, default: Any) -> Any:
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if isinstance(default, bool):
        if text.strip().lower() not in _SWITCH:
            raise BadSetting(f"{key} is {text!r}; use 1, true, yes or on, or 0, false, no or off")
        return _SWITCH[text.strip().lower()]
    if isinstance(default, str):
        if not text.strip():
            raise BadSetting(f"{key} is empty; give it a value or unset it")
        return text.strip()
    kind = type(default)
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadSetting(f"{key} is {text!r}; it must be a {'whole number' if kind is int else 'number of seconds'}")
    return value
