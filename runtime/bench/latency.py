"""`fewstep bench latency`: prompt to PNG bytes and each network alone, per engine, batch and steps, beside peers.

Fair means here: the same weights, prompt, guidance and size, one process, one thread count, contestants taking turns
(A B C A B C ...), every prompt new so that no text embedding is reused, the same PNG encoder.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.models.arguments import read_count, read_counts, read_output

from ..engines.measurement import WARM_UP, machine_facts, percentiles, take_turns
from ..errors import EngineUnavailable, InvalidRequest
from .contestants import STAGES, Contestant, Sample, bench_runtime, runtime_contestant
from .diffusers_pipeline import pipeline_name
from .peers import DIFFUSERS, PEERS, Peer

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle

    from ..engine import Engine

STEPS = (1, 2, 4, 8, 25)
Tell = Callable[[str], None]


def bench_latency(
    bundle: "Bundle",
    *,
    engines: Sequence[str],
    steps: Sequence[int] = STEPS,
    batches: Sequence[int] = (1,),
    peers: Sequence[str] = (),
    components: bool = True,
    repeats: int = 20,
    threads: int | None = None,
    progress: Tell | None = None,
) -> dict[str, Any]:
    """The report as `--json` writes it. diffusers in eager float32 is always a peer: ratios are to it.

    Step counts that the bundle does not allow and peers that cannot run it are left out and named in `skipped`.

    Errors: `EngineUnavailable` where an engine cannot be had; `InvalidRequest` where no step count is left.
    """
    import torch

    from ..engines.registry import open_engine

    allowed = [n for n in steps if bundle.spec.allows(n)]
    if not allowed:
        raise InvalidRequest("steps", f"steps are {list(steps)}; {bundle.name} allows {list(bundle.spec.steps)}")
    if threads is not None:
        torch.set_num_threads(threads)
    tell = progress or (lambda part: None)
    skipped: list[dict[str, Any]] = [
        {"steps": n, "why": "not allowed by the bundle"} for n in steps if n not in allowed
    ]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ready = _open_peers(bundle, peers, threads, work, skipped)
        opened: dict[str, Engine] = {}
        for kind in engines:
            opened[kind] = open_engine(bundle, kind, threads=threads)
            stack.callback(opened[kind].close)
        contestants: dict[str, Contestant] = {name: peer.run for name, peer in ready.items()}
        for kind, engine in opened.items():
            runtime = stack.enter_context(bench_runtime(bundle, engine, threads))
            contestants[kind] = runtime_contestant(runtime)
        rows, peer_rows = _end_to_end(contestants, tuple(ready), allowed, batches, repeats, tell)
        alone = _components(bundle, opened, batches, repeats, threads, tell) if components else {}
    return {
        "kind": "latency",
        "machine": machine_facts(),
        "bundle": bundle.name,
        "weights_digest": bundle.weights_digest,
        "size": list(bundle.spec.sizes[0]),
        "guidance": bundle.spec.guidance.default,
        "measured": f"prompt to PNG bytes, new prompts, {repeats} interleaved turns, one encoder for all",
        "diffusers_pipeline": pipeline_name(bundle),
        "rows": rows,
        "diffusers": [row for row in peer_rows if row["engine"] == DIFFUSERS],
        "peers": [row for row in peer_rows if row["engine"] != DIFFUSERS],
        "peer_notes": {name: list(peer.notes) for name, peer in ready.items() if peer.notes},
        **alone,
        "skipped": skipped,
    }


def command(argv: Sequence[str]) -> int:
    """`fewstep bench latency`."""
    args = _parser().parse_args(argv)
    from tqdm import tqdm

    from fewstep.models.bundle import load_bundle

    from .latency_page import page
    from .latency_report import check_plot, plot, table

    if args.plot is not None:
        check_plot()
    bundle = load_bundle(args.bundle)
    engines = args.engines or ready_engines(bundle)
    peers = {DIFFUSERS, *args.peers}
    turns = sum(bundle.spec.allows(n) for n in args.steps) * len(args.batch)
    with tqdm(total=turns * (len(engines) + len(peers)) * (args.repeats + WARM_UP), unit="turn", disable=None) as bar:

        def tell(part: str) -> None:
            bar.set_postfix_str(part)
            bar.update()

        report = bench_latency(
            bundle,
            engines=engines,
            steps=args.steps,
            batches=args.batch,
            peers=args.peers,
            components=not args.no_components,
            repeats=args.repeats,
            threads=args.threads,
            progress=tell,
        )
    report["command"] = " ".join(["fewstep bench latency", bundle.name, *_settings(args)])
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot is not None:
        plot(report, args.plot)
    if args.html is not None:
        args.html.write_text(page(report))
    return 0


def ready_engines(bundle: "Bundle") -> tuple[str, ...]:
    """torch, and every exported engine that is verified for these weights."""
    from ..engines.manifest import exported_kinds
    from ..engines.registry import usable_export

    return ("torch", *(kind for kind in exported_kinds(bundle) if usable_export(bundle, kind)))


def _open_peers(
    bundle: "Bundle", names: Sequence[str], threads: int | None, work: Path, skipped: list[dict[str, Any]]
) -> dict[str, Peer]:
    """diffusers first and in any case, then the peers asked for that can run the bundle."""
    ready = {DIFFUSERS: PEERS[DIFFUSERS](bundle, threads, work)}
    for name in names:
        if name in ready:
            continue
        try:
            ready[name] = PEERS[name](bundle, threads, work)
        except EngineUnavailable as error:
            skipped.append({"peer": name, "why": str(error)})
    return ready


def _end_to_end(
    contestants: Mapping[str, Contestant],
    peers: Sequence[str],
    steps: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    tell: Tell,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of our engines and rows of the peers, for every step count and batch size."""
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for count in steps:
        for batch in batches:
            calls = {name: _on_new_prompts(run, count, batch) for name, run in contestants.items()}
            samples = take_turns(calls, repeats, lambda name, n=count: tell(f"{n} steps, {name}"))  # type: ignore[misc]
            medians = {name: statistics.median(s.total_s for s in samples[name]) for name in samples}
            for name, found in samples.items():
                row = {"engine": name, "steps": count, "batch": batch, **percentiles([s.total_s for s in found], batch)}
                row["vs_diffusers"] = round(medians[DIFFUSERS] / medians[name], 3)
                if name in peers:
                    theirs.append(row)
                    continue
                row["vs"] = {peer: round(medians[peer] / medians[name], 3) for peer in peers}
                ours.append(row | _inside(found, samples[DIFFUSERS]))
    return ours, theirs


def _on_new_prompts(run: Contestant, steps: int, batch: int) -> Callable[[int], Sample]:
    """Prompts told apart by letters: a tokenizer may know no digits, and GenAI breaks on what it does not know."""
    return lambda turn: run(f"a red circle {_word(steps)} {_word(turn)}", turn, steps, batch)


def _word(number: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def _inside(ours: Sequence[Sample], theirs: Sequence[Sample]) -> dict[str, Any]:
    """Where the time went, and how far the pictures are from diffusers'."""
    stages = {stage: statistics.fmean(s.stages_s[stage] for s in ours) for stage in STAGES}
    whole = sum(stages.values())
    return {
        "share": {stage: round(seconds / whole, 4) for stage, seconds in stages.items()},
        "overhead_ms": round(statistics.median(s.stages_s["overhead"] for s in ours) * 1e3, 3),
        "max_difference_from_diffusers": max(_difference(a, b) for a, b in zip(ours, theirs, strict=True)),
    }


def _difference(ours: Sample, theirs: Sample) -> int:
    """Largest difference of a pixel of the two pictures, of 255."""
    return int(abs(ours.picture.astype(int) - theirs.picture.astype(int)).max())


def _components(
    bundle: "Bundle",
    engines: Mapping[str, "Engine"],
    batches: Sequence[int],
    repeats: int,
    threads: int | None,
    tell: Tell,
) -> dict[str, Any]:
    """Each network alone, and the peak of this machine that its speed is a fraction of."""
    from ..engines.torch_engine import TorchEngine
    from .components import Peaks, component_rows, operations_per_role, record_feeds

    oracle = engines.get("torch") or TorchEngine(bundle, threads=threads)
    feeds = record_feeds(oracle, bundle)
    operations = operations_per_role(oracle, feeds)
    if "torch" not in engines:
        oracle.close()
    peaks = Peaks({kind: engine.capabilities.device for kind, engine in engines.items()})
    rows = component_rows(engines, feeds, operations, peaks, batches=batches, repeats=repeats, tell=tell)
    return {"peak_gflop_per_s": peaks.best, "components": rows}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fewstep bench latency",
        description="Latency from prompt to PNG bytes and of each network alone, per engine, batch and step count, "
        "beside peers on the same weights in the same process, taking turns.",
        epilog="example: fewstep bench latency scenes-lcm --engines torch,onnx --steps 1,4 --peers openvino-genai "
        "--threads 1 --json latency.json --html latency.html",
    )
    add = parser.add_argument
    add("bundle", metavar="DIR", help="a bundle folder, or a shipped bundle's short name")
    add("--engines", type=_engines, help="comma-separated; default: torch and every verified engine")
    add("--steps", type=read_counts, default=STEPS, help="comma-separated; default: 1,2,4,8,25")
    add("--batch", type=read_counts, default=(1,), help="pictures per request, comma-separated; default: 1")
    add(
        "--peers",
        type=_peers,
        default=(),
        help=f"beside diffusers, which is always one: {', '.join(PEERS)}; the compiled one takes minutes to warm up",
    )
    add("--repeats", type=read_count, default=20, help="turns measured per step count and batch; default: 20")
    add("--threads", type=read_count, help="CPU threads of every contestant; default: torch's choice")
    add("--no-components", action="store_true", help="leave out the networks alone")
    add("--json", type=read_output, metavar="FILE", help="write the report there")
    add("--plot", type=read_output, metavar="FILE", help="write a picture of the report there (PNG, SVG, PDF)")
    add("--html", type=read_output, metavar="FILE", help="write the report there as one page with its plots")
    return parser


def _settings(args: argparse.Namespace) -> list[str]:
    """The settings that shape the figures, as they were said."""
    said = []
    for name in ("engines", "steps", "batch", "peers"):
        if getattr(args, name):
            said += [f"--{name}", ",".join(map(str, getattr(args, name)))]
    if args.threads is not None:
        said += ["--threads", str(args.threads)]
    return [*said, "--repeats", str(args.repeats)]


def _engines(text: str) -> tuple[str, ...]:
    from ..engines.registry import KINDS

    return _known(text, tuple(KINDS), "engine")


def _peers(text: str) -> tuple[str, ...]:
    return _known(text, tuple(PEERS), "peer")


def _known(text: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    """Names between commas, each once, all of them known."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no {what}; use {', '.join(known)}")
    return names
