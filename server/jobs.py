"""Jobs of the native API: they go on when their caller leaves, and what became of them is kept for a while.

Each is pumped by one task from the runtime's events into a list, so that any number of readers may follow it, from the
first event on or from where they were cut off. Of the previews the last one of each picture is kept: who reads the
earlier events later finds them without.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import Refused

FINAL = ("finished", "failed")
_LEAST_BYTES = 1024
"""What a kept job counts for beside its pictures."""
NEWEST_S = 60.0
"""For how long the job that ended last is kept whatever its size, so that its caller can fetch what it made."""


@dataclass(frozen=True)
class Told:
    """One event for a caller: `progress`, `finished` or `failed`, and with which status a plain reply would say it."""

    name: str
    data: dict[str, Any]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        return self.name in FINAL

    @property
    def bytes(self) -> int:
        """About what keeping it takes: its pictures."""
        pictures = sum(len(picture["b64"]) for picture in self.data.get("pictures", ()))
        return pictures + len(self.data.get("preview_b64") or "")


@dataclass(eq=False)
class Entry:
    """One job. events: what was told of it so far. key: (owner, idempotency key); digest: of the body it began with.

    size: bytes of the pictures in `events`. previewed: by picture, the number of the event that has its preview.
    """

    id: str
    owner: str
    model: str
    created_unix_s: int
    key: tuple[str, str] | None = None
    digest: str = ""
    events: list[Told] = field(default_factory=list)
    size: int = 0
    previewed: dict[int, int] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1].final

    def status(self) -> dict[str, Any]:
        """What `GET /v1/jobs/{id}` says."""
        card = {"id": self.id, "object": "job", "model": self.model, "created": self.created_unix_s}
        if not self.events:
            return {**card, "status": "queued", "progress": None}
        last = self.events[-1]
        if not last.final:
            return {**card, "status": "running", "progress": last.data}
        if last.name == "finished":
            return {**card, "status": "finished", "result": last.data}
        cancelled = last.data["error"]["code"] == "cancelled"
        return {**card, "status": "cancelled" if cancelled else "failed", **last.data}

    async def outcome(self) -> Told:
        """The final event, waited for."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.ended)
        return self.events[-1]

    async def follow(self, after: int = -1) -> AsyncIterator[tuple[int, Told]]:
        """(number, event) of every event past number `after`; ends after the final one."""
        number = max(-1, after) + 1
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda: len(self.events) > number or self.ended)  # noqa: B023
            if number >= len(self.events):
                return
            for told in self.events[number:]:
                yield number, told
                number += 1

    async def add(self, told: Told) -> None:
        async with self.changed:
            if told.data.get("preview_b64"):
                self._forget_preview(told.data["picture"])
                self.previewed[told.data["picture"]] = len(self.events)
            self.size += told.bytes
            self.events.append(told)
            self.changed.notify_all()

    def _forget_preview(self, picture: int) -> None:
        if (number := self.previewed.get(picture)) is None:
            return
        told = self.events[number]
        self.size -= told.bytes
        rest = {name: value for name, value in told.data.items() if name != "preview_b64"}
        self.events[number] = replace(told, data=rest)


class Jobs:
    """The jobs of one server: those that run, and those that ended, up to `max_bytes` and `keep_s`; the one that ended
    last for `NEWEST_S` though it be larger.

    Used from the event loop only. How many run is bounded by the runtime's queue.
    """

    def __init__(self, max_bytes: int, keep_s: float) -> None:
        self._max_bytes, self._keep_s = max_bytes, keep_s
        self._entries: dict[str, Entry] = {}
        self._kept: OrderedDict[str, float] = OrderedDict()
        self._keys: dict[tuple[str, str], Entry] = {}
        self._pumps: set[asyncio.Task[None]] = set()
        self._bytes = 0

    def start(self, entry: Entry, events: AsyncIterator[Told]) -> None:
        """Begin to follow a job; `events` ends with a final one."""
        self._entries[entry.id] = entry
        if entry.key is not None:
            self._keys[entry.key] = entry
        pump = asyncio.create_task(self._pump(entry, events))
        self._pumps.add(pump)
        pump.add_done_callback(self._pumps.discard)

    def find(self, job_id: str, owner: str) -> Entry:
        """A job of this caller.

        Errors: `Refused` 404, for jobs of others too.
        """
        self._drop(time.monotonic())
        entry = self._entries.get(job_id)
        if entry is None or entry.owner != owner:
            raise Refused(404, "job_not_found", "there is no such job, or it is no longer kept", param="job_id")
        return entry

    def replay(self, key: tuple[str, str], digest: str) -> Entry | None:
        """The job that (owner, idempotency key) began, unless it failed: then the call may be made again.

        Errors: `Refused` 422 where it began with another body.
        """
        self._drop(time.monotonic())
        entry = self._keys.get(key)
        if entry is not None and entry.digest != digest:
            message = "this Idempotency-Key came with another body before; use a new key for a new request"
            raise Refused(422, "idempotency_key_reused", message, param="Idempotency-Key", x_should_retry="false")
        return entry

    def forget(self, entry: Entry) -> None:
        """Keep nothing of an ended job."""
        if self._kept.pop(entry.id, None) is not None:
            self._bytes -= entry.size
        self._entries.pop(entry.id, None)
        if entry.key is not None and self._keys.get(entry.key) is entry:
            del self._keys[entry.key]

    async def close(self) -> None:
        """End what still runs."""
        pumps = tuple(self._pumps)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, entry: Entry, events: AsyncIterator[Told]) -> None:
        async with contextlib.aclosing(events) as stream:  # type: ignore[type-var]
            async for told in stream:
                if told.name == "failed" and entry.key is not None:
                    self._keys.pop(entry.key, None)
                await entry.add(told)
        entry.size += _LEAST_BYTES
        now = time.monotonic()
        self._kept[entry.id] = now
        self._bytes += entry.size
        self._drop(now)

    def _drop(self, now_s: float) -> None:
        while self._kept:
            oldest, since_s = next(iter(self._kept.items()))
            kept_s = now_s - since_s
            fits = self._bytes <= self._max_bytes or (len(self._kept) == 1 and kept_s < NEWEST_S)
            if fits and kept_s < self._keep_s:
                return
            self.forget(self._entries[oldest])
