"""`fewstep bench storm`: thousands of requests submitted and cancelled while engines break, and what is left of them.

The engines are arithmetic that fails, spoils rows and dawdles at random, so the storm needs no weights and spends its
time in the runtime itself. It holds the runtime to its promises: every accepted request ends in exactly one final
event, those that finish have the pictures of the plain loop, nothing is left inside, and memory does not grow.
"""

import argparse
import gc
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..engine import Capabilities
from ..engines.fake_engine import FakeEngine, fake_bundle
from ..errors import EngineFailed, FewstepError
from ..sampling.events import Event, Failed, Finished, Result
from ..sampling.loop import run_request
from ..sampling.request import Edit, GenerateRequest, Helper, Limits
from ..service.config import RuntimeConfig
from ..service.local import Runtime
from ..service.ticket import Ticket

MODELS = ("student", "teacher", "spare")
IN_MEMORY = 2
CALLERS = 4
PATIENCE_S = 60.0
MOST_OBJECTS, MOST_BYTES = 2_000, 64 * 2**20
"""Growth from the first quarter of a storm to its end that counts as none: of objects, by what caches still take up;
of memory, by what the allocator keeps."""
SEEDS = 6
"""Pictures of so many seeds are compared with the plain loop's."""


class StormyEngine:
    """The arithmetic engine, of which a share `faults` of calls fails, spoils a row, or takes 2 ms longer."""

    def __init__(self, seed: int, faults: float) -> None:
        self._engine = FakeEngine(before=lambda call: self._engine.calls.clear())
        self._draw, self._faults = random.Random(seed), faults
        self.name = "stormy"
        self.capabilities: Capabilities = self._engine.capabilities
        self.close = self._engine.close

    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        kind = self._draw.choice(("fail", "nan", "slow")) if self._draw.random() < self._faults else "none"
        if kind == "fail":
            raise EngineFailed(f"the storm broke a call of {role!r}")
        if kind == "slow":
            time.sleep(0.002)
        out = self._engine.run(role, feeds)
        if kind == "nan":
            out[0][self._draw.randrange(out[0].shape[0])] = float("nan")
        return out


@dataclass(frozen=True)
class Storm:
    """What a storm left: counts of ends by name, and what should be nothing.

    lost: accepted requests without a final event. twice: with more than one, or with events after it. wrong: finished
    with other pictures than the plain loop's. left: requests still inside. objects_grown: live Python objects of the
    last quarter over those of the first; rss_grown_bytes: memory likewise.
    """

    requests: int
    ends: dict[str, int]
    rejected: int
    cancelled: int
    lost: int
    twice: int
    wrong: int
    compared: int
    left: int
    loads: int
    objects_grown: int
    rss_grown_bytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        flat = self.objects_grown <= MOST_OBJECTS and self.rss_grown_bytes <= MOST_BYTES
        return flat and not (self.lost or self.twice or self.wrong or self.left)


def storm(requests: int, *, seed: int = 0, faults: float = 0.02, cancels: float = 0.5) -> Storm:
    """Submit so many requests from several threads, cancel a share of them, and count how each ended.

    The models do not fit in memory together, and one is unloaded and loaded again meanwhile.
    """
    begun = time.monotonic()
    config = RuntimeConfig(memory_budget_bytes=IN_MEMORY, calibration_budget_s=0.0)
    makers = {name: (lambda name=name: StormyEngine(hash_of(seed, name), faults)) for name in MODELS}
    bundles = [fake_bundle(name) for name in MODELS]
    scorer = lambda prompt, picture: float(picture.mean()) / 255.0  # noqa: E731
    runtime = Runtime(
        bundles, engines=makers, config=config, weigh=lambda _: 1, scorer=scorer, limits=Limits(max_queue=64)
    )
    seen = _Seen(_Truth())
    quarters = 4
    marks: list[tuple[int, int]] = []
    for quarter in range(quarters):
        count = requests * (quarter + 1) // quarters - requests * quarter // quarters
        share = [count // CALLERS + (k < count % CALLERS) for k in range(CALLERS)]
        with ThreadPoolExecutor(CALLERS) as pool:
            draws = [random.Random(hash_of(seed, f"{quarter}.{k}")) for k in range(CALLERS)]
            for done in [pool.submit(_call, runtime, seen, n, d, cancels) for n, d in zip(share, draws, strict=True)]:
                done.result()
        runtime.unload("spare")
        runtime.load(fake_bundle("spare"), makers["spare"])
        marks.append(_memory())
    runtime.close(drain_s=PATIENCE_S)
    found = runtime.metrics()
    first, last = marks[0], marks[-1]
    return Storm(
        requests=requests,
        ends=dict(seen.ends),
        rejected=seen.rejected,
        cancelled=seen.cancelled,
        lost=seen.lost + found.accepted - found.finished - sum(found.failed.values()),
        twice=seen.twice,
        wrong=seen.wrong,
        compared=seen.compared,
        left=found.live,
        loads=found.load_s.count,
        objects_grown=last[0] - first[0],
        rss_grown_bytes=last[1] - first[1],
        seconds=time.monotonic() - begun,
    )


def hash_of(seed: int, name: str) -> int:
    """A seed of one's own, the same in every process."""
    return random.Random(f"{seed} {name}").getrandbits(48)


class _Truth:
    """The plain loop's pictures of the requests that are compared, made once each."""

    def __init__(self) -> None:
        self._known: dict[GenerateRequest, Result] = {}
        self._lock = threading.Lock()

    def same(self, request: GenerateRequest, result: Result) -> bool:
        with self._lock:
            if request not in self._known:
                self._known[request] = run_request(FakeEngine(), fake_bundle(), request)
            known = self._known[request]
        return all(np.array_equal(a, b) for a, b in zip(result.pictures, known.pictures, strict=True))


class _Seen:
    """How requests ended, counted as they end, so that nothing of them is kept."""

    def __init__(self, truth: _Truth) -> None:
        self.ends: Counter[str] = Counter()
        self.rejected = self.cancelled = self.lost = self.twice = self.wrong = self.compared = 0
        self._truth = truth
        self._lock = threading.Lock()

    def watch(self, request: GenerateRequest, ticket: Ticket, heard: list[Event]) -> None:
        """Wait for a ticket's end, and look at what was heard of it."""
        try:
            ticket.result(PATIENCE_S)
        except TimeoutError:
            with self._lock:
                self.lost += 1
            return
        except FewstepError:
            pass
        for _ in ticket.events():  # listeners have heard all that comes here
            pass
        finals = [event for event in heard if isinstance(event, Finished | Failed)]
        last = finals[-1]
        result = last.result if isinstance(last, Finished) else None
        name = "Finished" if isinstance(last, Finished) else type(last.error).__name__
        compared = result is not None and request.helper is None and request.edit is None
        plain = replace(request, deadline_s=None, priority=0, previews=False)
        right = result is None or not compared or self._truth.same(plain, result)
        with self._lock:
            self.ends[name] += 1
            self.twice += len(finals) != 1 or heard[-1] is not finals[0]
            self.compared += compared
            self.wrong += not right

    def refused(self) -> None:
        with self._lock:
            self.rejected += 1

    def stopped(self) -> None:
        with self._lock:
            self.cancelled += 1


def _call(runtime: Runtime, seen: _Seen, count: int, draw: random.Random, cancels: float) -> None:
    """One caller: bursts of requests, some cancelled at once, some later, some left alone; then the ends of all."""
    open_: list[tuple[GenerateRequest, Ticket, list[Event]]] = []
    for number in range(count):
        request, model = _request(draw)
        try:
            ticket = runtime.submit(request, model)
        except FewstepError:
            seen.refused()
        else:
            heard: list[Event] = []
            ticket.listen(heard.append)
            open_.append((request, ticket, heard))
        if open_ and draw.random() < cancels and runtime.cancel(draw.choice(open_)[1].id):
            seen.stopped()
        if len(open_) >= 16 or number == count - 1:
            for each in open_:
                seen.watch(*each)
            open_.clear()


def _request(draw: random.Random) -> tuple[GenerateRequest, str]:
    """Requests of every kind that the arithmetic engine can serve, most of them plain."""
    model = draw.choice(MODELS)
    settings: dict[str, Any] = {
        "prompt": draw.choice(("a cat", "a dog", "two cats")),
        "seed": draw.randrange(SEEDS),
        "steps": draw.choice((1, 1, 2, 4)),
        "n": draw.choice((1, 1, 1, 2)),
    }
    kind = draw.choice(("plain",) * 5 + ("edit", "pull", "refine", "previews", "deadline"))
    if kind == "edit":
        settings["edit"] = Edit(image=np.full((64, 64, 3), draw.randrange(256), np.uint8), strength=0.5)
    elif kind == "pull":
        settings |= {"steps": 2, "helper": Helper(model="teacher", mode="pull", weight=0.3)}
    elif kind == "refine":
        settings["helper"] = Helper(model="teacher", mode="refine", steps=2, strength=0.5, threshold=0.5)
    elif kind == "previews":
        settings["previews"] = True
    elif kind == "deadline":
        settings |= {"deadline_s": draw.choice((0.005, 0.05, 5.0)), "priority": draw.randint(-2, 2)}
    return GenerateRequest(**settings), model


def _memory() -> tuple[int, int]:
    """(live Python objects, resident bytes)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return len(gc.get_objects()), pages * 4096


def command(argv: list[str]) -> int:
    """Exit codes: 0 every promise was kept, 1 one was broken, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="fewstep bench storm",
        description=(__doc__ or "").split("\n\n")[0].partition(": ")[2],
        epilog="example:\n  fewstep bench storm --requests 10000 --json storm.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--faults", type=float, default=0.02, help="share of engine calls that go wrong (%(default)s)")
    parser.add_argument("--cancels", type=float, default=0.5, help="share of requests that are cancelled (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of requests, faults and cancellations (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the counts to this file")
    args = parser.parse_args(argv)
    if args.requests < 4 or not 0.0 <= args.faults <= 1.0 or not 0.0 <= args.cancels <= 1.0:
        parser.error("--requests must be 4 or more, --faults and --cancels 0 to 1")
    found = storm(args.requests, seed=args.seed, faults=args.faults, cancels=args.cancels)
    for name, value in asdict(found).items():
        print(f"{name:>16}  {value}")
    if args.json:
        args.json.write_text(json.dumps({**asdict(found), "ok": found.ok}, indent=1) + "\n")
    print("every promise was kept" if found.ok else "a promise was broken", file=sys.stderr)
    return 0 if found.ok else 1
