"""Eight bits where they pay: each role of a bundle gets the fastest treatment that stays within a stated error.

What may be done to a role, and how, is a `Kit` of one engine (`quantise_openvino`, `quantise_onnx`). Calibrated
treatments see the feeds of the student's own sampling; a part of those, which calibration never saw, and the random
inputs of `verify` measure the error. Times are of one call of one row, all treatments in turn in this process, so only
their ratios mean anything.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.models.bundle import Bundle
from fewstep.runtime.engines.budget import Budget
from fewstep.runtime.engines.manifest import Graph, Manifest, checked_files, engine_folder, over_graphs, write_manifest
from fewstep.runtime.errors import EngineUnavailable

from .calibration import PROMPTS, Rows, student_feeds
from .onnx import export_onnx, usable_onnx
from .parity import SAME, Apart, apart
from .verify import PEAK, TOLERANCE, random_rows

Run = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
Progress = Callable[[str], None]
AUTO = "auto"
HELD_OUT = 4
"""Every fourth row measures; the others calibrate."""
REPEATS = 15
WORTH = 0.97
"""A treatment must take less than this part of another's time to be chosen over it in spite of a larger error."""


_UNSTATED = Budget()


@dataclass(frozen=True, kw_only=True)
class Source:
    """One role before quantisation: its ONNX file and manifest entry, the student's rows, and others to measure on."""

    role: str
    file: Path
    graph: Graph
    rows: Rows
    probes: Rows = ()


@dataclass(frozen=True, kw_only=True)
class Kit:
    """How one engine quantises.

    untouched: treatments that run the ONNX file as it is, the exact one first. made: mode -> the treatments it stands
    for. make(source, treatment, folder): writes the quantised graph there and gives its manifest entry. open(graph,
    file, treatment): what runs it, on feeds of a batch of one. producers: packages whose versions are noted.
    """

    engine: str
    untouched: tuple[str, ...]
    made: Mapping[str, tuple[str, ...]]
    make: Callable[[Source, str, Path], Graph]
    open: Callable[[Graph, Path, str], Run]
    producers: Callable[[], dict[str, str]]

    @property
    def kind(self) -> str:
        return f"{self.engine}-int8"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One treatment of one role, measured. speed: the exact treatment's time over this one's."""

    treatment: str
    graph: Graph
    relative_error: float
    peak_error: float
    speed: float
    size_bytes: int


def quantise(
    bundle: Bundle,
    kit: Kit,
    *,
    mode: str = AUTO,
    treatments: Mapping[str, str] | None = None,
    prompts: Sequence[str] = PROMPTS,
    budget: Budget = _UNSTATED,
    progress: Progress | None = None,
) -> Manifest:
    """Write `<bundle>/engines/<engine>-int8/`, unverified, exporting to ONNX first where needed.

    mode: "auto" measures every treatment of every role and keeps the fastest within the budget's error (`TOLERANCE` of
    int8 where it states none); another mode of the kit is forced upon every role that can be calibrated. treatments:
    role -> treatment, forced. The folder is replaced in one move once it is whole.

    Errors: `EngineUnavailable` for an unknown mode, role or treatment, or a folder that cannot be written.
    """
    tell = progress or (lambda part: None)
    forced = dict(treatments or {})
    _check(bundle, kit, mode, forced)
    onnx = usable_onnx(bundle) or export_onnx(bundle, progress=tell)
    files = checked_files(bundle, onnx)
    feeds = student_feeds(bundle, prompts=prompts)
    allowed = budget.error or TOLERANCE["int8"]
    chosen: dict[str, Trial] = {}
    trials: dict[str, list[dict[str, Any]]] = {}
    with _whole_folder(bundle, kit.kind) as folder:
        for role, graph in onnx.roles.items():
            tell(f"{kit.kind} {role}")
            rows = feeds.get(role, ())
            source = Source(role=role, file=files[role], graph=graph, rows=rows, probes=random_rows(bundle, role))
            names = _candidates(kit, mode, forced.get(role), calibrated=bool(source.rows))
            found = measure(kit, source, names, folder)
            wanted = found if mode == AUTO and role not in forced else found[-1:]
            chosen[role] = choose(wanted, Apart(allowed, allowed * PEAK))
            trials[role] = [{k: v for k, v in asdict(trial).items() if k != "graph"} for trial in found]
        kept = {role: trial.graph for role, trial in chosen.items()}
        _sweep(folder, kept)
        manifest = over_graphs(
            onnx,
            kit.kind,
            precision="int8",
            roles=kept,
            treatments={role: trial.treatment for role, trial in chosen.items()},
            budget=budget.stated,
            build={"mode": mode, "trials": trials, "calibration": _described(feeds, prompts)},
            producers={**onnx.producers, **kit.producers()},
        )
    write_manifest(bundle, manifest)
    return manifest


def measure(kit: Kit, source: Source, treatments: Sequence[str], folder: Path) -> list[Trial]:
    """Make and measure treatments of one role; the first is the exact one. Unmeasured where the role has no rows."""
    graphs, opened = {}, {}
    for name in treatments:
        graphs[name] = _graph(kit, source, name, folder)
        file = (folder / graphs[name].file).resolve()
        opened[name] = kit.open(graphs[name], file, name)
    sizes = {name: _size(folder, graph) for name, graph in graphs.items()}
    held = (*source.rows[::HELD_OUT], *source.probes)
    if not source.rows:
        return [_unmeasured(name, graphs[name], sizes[name]) for name in treatments]
    wanted = [[out.clone() for out in opened[treatments[0]](row)] for row in held]
    errors = dict.fromkeys(treatments, SAME)
    for name in treatments:
        for row, exact in zip(held, wanted, strict=True):
            errors[name] |= apart(opened[name](row), exact)
    times = fastest_s({name: opened[name] for name in treatments}, held[0])
    return [
        Trial(
            treatment=name,
            graph=graphs[name],
            relative_error=errors[name].relative,
            peak_error=errors[name].peak,
            speed=round(times[treatments[0]] / times[name], 3),
            size_bytes=sizes[name],
        )
        for name in treatments
    ]


def choose(trials: Sequence[Trial], allowed: Apart) -> Trial:
    """The fastest trial within the bounds; of two about equally fast the more exact. A single trial is taken as it is:
    it was asked for, and `verify` holds it to the budget."""
    if len(trials) == 1:
        return trials[0]
    within = [t for t in trials if t.relative_error <= allowed.relative and t.peak_error <= allowed.peak]
    best = min(within, key=lambda t: t.relative_error)
    for trial in sorted(within, key=lambda t: t.relative_error):
        if best.speed < WORTH * trial.speed:
            best = trial
    return best


def fastest_s(calls: Mapping[str, Run], row: Mapping[str, Tensor]) -> dict[str, float]:
    """The least seconds of one call of each, taken in turn: what else the machine does only adds."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(REPEATS):
        for name, call in calls.items():
            begun_s = time.perf_counter()
            call(row)
            least[name] = min(least[name], time.perf_counter() - begun_s)
    return least


def _check(bundle: Bundle, kit: Kit, mode: str, forced: Mapping[str, str]) -> None:
    if mode not in (AUTO, *kit.made):
        raise EngineUnavailable(f"--mode is {mode!r}; {kit.kind} has {', '.join((AUTO, *kit.made))}")
    known = (*kit.untouched, *(name for names in kit.made.values() for name in names))
    for role, treatment in forced.items():
        if role not in bundle.roles:
            raise EngineUnavailable(
                f"--treatments names {role!r}; {bundle.root} has the roles {', '.join(bundle.roles)}"
            )
        if treatment not in known:
            raise EngineUnavailable(f"--treatments gives {role} {treatment!r}; {kit.kind} has {', '.join(known)}")


def _candidates(kit: Kit, mode: str, forced: str | None, *, calibrated: bool) -> tuple[str, ...]:
    """The exact treatment first, as the measure of the others."""
    exact = kit.untouched[0]
    if forced is not None:
        return tuple(dict.fromkeys((exact, forced)))
    if not calibrated:
        return (exact,)
    if mode == AUTO:
        return (*kit.untouched, *(name for names in kit.made.values() for name in names))
    return (exact, *kit.made[mode])


def _graph(kit: Kit, source: Source, treatment: str, folder: Path) -> Graph:
    if treatment in kit.untouched:
        return replace(source.graph, file=f"../onnx/{source.graph.file}")
    calibration = tuple(row for k, row in enumerate(source.rows) if k % HELD_OUT) or source.rows
    if not calibration:
        raise EngineUnavailable(f"{source.role} cannot be made {treatment!r}: this bundle's sampling never calls it")
    return kit.make(replace(source, rows=calibration), treatment, folder)


def _unmeasured(treatment: str, graph: Graph, size_bytes: int) -> Trial:
    return Trial(treatment=treatment, graph=graph, relative_error=0.0, peak_error=0.0, speed=1.0, size_bytes=size_bytes)


def _size(folder: Path, graph: Graph) -> int:
    path = folder / graph.file
    data = path.with_name(path.name + ".data")
    return path.stat().st_size + (data.stat().st_size if graph.data_sha256 else 0)


def _described(feeds: Mapping[str, Rows], prompts: Sequence[str]) -> dict[str, Any]:
    times = sorted({float(row["t"]) for row in feeds.get("denoiser", ())}, reverse=True)
    return {"prompts": len(prompts), "times": times, "rows": {role: len(rows) for role, rows in feeds.items()}}


@contextmanager
def _whole_folder(bundle: Bundle, kind: str) -> Iterator[Path]:
    """A folder beside the engine's own, which takes its place when all went well and is gone when not."""
    final = engine_folder(bundle, kind)
    folder = final.with_name(f".{kind}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
    except OSError as error:
        raise EngineUnavailable(f"{final} cannot be written ({error}); export a copy of the bundle you own") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(folder: Path, kept: Mapping[str, Graph]) -> None:
    """Remove the files of treatments that were not chosen."""
    names = {graph.file for graph in kept.values()} | {f"{graph.file}.data" for graph in kept.values()}
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
