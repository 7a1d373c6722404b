"""API keys: what a key file holds of them, and who a given key belongs to.

A file keeps, per key, a name, a salt and the salted hash; the key itself is shown once, when it is made. Keys are 256
random bits, so one round of BLAKE2b is as hard to invert as a slow password hash, and a request costs microseconds.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from fewstep.runtime.errors import FewstepError

_log = logging.getLogger("fewstep.server")
_LOOK_S = 1.0
"""How long a change of the key file may go unseen."""
PREFIX = "fs-"
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


class BadKeys(FewstepError):
    """A key file or a key's settings cannot be used; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One caller. rate_per_s: requests per second on average, `burst` of them at once; None is unbounded.

    share: part of the server's queue that its requests may hold, (0, 1]. admin: may load and unload models.
    salt, hash: hexadecimal; `hash` is BLAKE2b-256 of the key under the salt. created_unix_s: when it was made.
    """

    name: str
    salt: str
    hash: str
    rate_per_s: float | None = None
    burst: int = 10
    share: float = 1.0
    admin: bool = False
    created_unix_s: int = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise BadKeys(f"a key's name is {self.name!r}; use 1 to 64 letters, digits, '.', '_' and '-'")
        if self.rate_per_s is not None and not 0.0 < self.rate_per_s <= 1e6:
            raise BadKeys(f"rate_per_s of key {self.name!r} is {self.rate_per_s}; use above 0, or leave it out")
        if not 1 <= self.burst <= 1_000_000:
            raise BadKeys(f"burst of key {self.name!r} is {self.burst}; use 1 to 1000000 requests")
        if not 0.0 < self.share <= 1.0:
            raise BadKeys(f"share of key {self.name!r} is {self.share}; use above 0, at most 1 (the whole queue)")

    def matches(self, given: bytes) -> bool:
        return secrets.compare_digest(_hashed(given, self.salt), self.hash)


def make_key(name: str, **settings: object) -> tuple[str, Key]:
    """(the key, to be shown once; what is kept of it). `settings` are fields of `Key`.

    Errors: `BadKeys` naming the field.
    """
    text = PREFIX + secrets.token_urlsafe(32)
    return text, keep(text, Key(name=name, salt="", hash="", created_unix_s=int(time.time()), **settings))  # type: ignore[arg-type]


def keep(text: str, key: Key) -> Key:
    """`key` with the hash of `text` under a salt of its own."""
    salt = secrets.token_hex(16)
    return replace(key, salt=salt, hash=_hashed(text.encode(), salt))


def _hashed(given: bytes, salt: str) -> str:
    return hashlib.blake2b(given, digest_size=32, key=bytes.fromhex(salt)).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file; none where it does not exist.

    Errors: `BadKeys` with the file and what is wrong in it.
    """
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise BadKeys(f"{path} cannot be read as a key file ({error}); make one with: fewstep keys add NAME") from error
    entries = raw.get("keys") if isinstance(raw, dict) else None
    if not isinstance(entries, list):
        raise BadKeys(f'{path} must hold {{"keys": [...]}}; make one with: fewstep keys add NAME')
    return tuple(_read_entry(path, entry) for entry in entries)


def _read_entry(path: Path, entry: object) -> Key:
    known = {field.name: field for field in fields(Key)}
    kinds = {"rate_per_s": (int, float, type(None)), "burst": (int,), "share": (int, float), "admin": (bool,)}
    if not isinstance(entry, dict) or not {"name", "salt", "hash"} <= set(entry):
        raise BadKeys(f"{path} has an entry without name, salt and hash; make it anew with: fewstep keys add NAME")
    for field, value in entry.items():
        if field not in known:
            raise BadKeys(f"{path}, key {entry['name']!r}: there is no field {field!r}; known are {', '.join(known)}")
        expected = kinds.get(field, (int,) if field == "created_unix_s" else (str,))
        if not isinstance(value, expected) or (isinstance(value, bool) and field != "admin"):
            raise BadKeys(f"{path}, key {entry['name']!r}: {field} is {value!r}, of the wrong kind; correct it")
    if not all(re.fullmatch(r"(?:[0-9a-f]{2}){16,64}", entry[field]) for field in ("salt", "hash")):
        raise BadKeys(f"{path}, key {entry['name']!r}: salt and hash must be hexadecimal, 16 to 64 bytes; revoke it")
    return Key(**entry)


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Write the file whole or not at all, readable by its owner only.

    Errors: `BadKeys` where it cannot be written.
    """
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(json.dumps({"keys": [asdict(key) for key in keys]}, indent=1) + "\n")
        beside.replace(path)
    except OSError as error:
        raise BadKeys(f"{path} cannot be written ({error.strerror}); choose another --file") from error


class KeyRing:
    """Whose key is this. Reads the file anew when it changes, so that a revoked key stops working within a second.

    plain: keys that the operator gave in clear, named by their place; kept as hashes too. With neither file nor
    plain keys the ring is open: nobody needs a key.

    Errors: `BadKeys` where the file cannot be used at the start; later such a file is logged, and the keys stay.
    """

    def __init__(self, plain: Sequence[str] = (), path: Path | None = None) -> None:
        self.open = not plain and path is None
        self._plain = tuple(keep(text, Key(name=f"key-{n}", salt="", hash="")) for n, text in enumerate(plain, 1))
        self._path = path
        self._stamp = _stamp(path)
        self._looked_s = time.monotonic()
        self.keys = self._plain + (read_keys(path) if path else ())

    def find(self, given: str) -> Key | None:
        """The key's entry. Every entry is compared: how long it takes says nothing of which one is near."""
        self._refresh()
        matching = [key for key in self.keys if key.matches(given.encode("utf-8", "surrogateescape"))]
        return matching[0] if matching else None

    def _refresh(self) -> None:
        if self._path is None or time.monotonic() - self._looked_s < _LOOK_S:
            return
        self._looked_s = time.monotonic()
        if (stamp := _stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self.keys = self._plain + read_keys(self._path)
        except BadKeys as error:
            _log.error("the key file changed and cannot be used, the keys stay as they were: %s", error)


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    """What changes whenever the file does."""
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)
