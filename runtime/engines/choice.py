"""Which engine is best here: verified, made from these weights, and measured on this machine to cost the least.

Costs are measured when an engine was verified (`fewstep export`, `fewstep verify`) and lie in its manifest with the
machine they are true for: processor, cores, threads, device and versions of packages. On another machine they are no
costs at all.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fewstep.models.arguments import read_count
from fewstep.models.bundle import Bundle, load_bundle
from fewstep.models.roles import picture_role, picture_steps
from fewstep.models.spec import SamplerSpec

from ..engine import DECODER, DECODER_TINY, DENOISER, TEXT
from ..errors import EngineUnavailable
from ..sampling.request import spec_steps
from .built import NATIVE, built_here
from .manifest import Manifest, export_command, exported_kinds, read_manifest, write_manifest
from .registry import KINDS, installed

if TYPE_CHECKING:
    from ..engine import Engine

SIZES = (1, 4)
REPEATS = 20
BUDGET_S = 3.0
"""For all measurements of one engine, after the first call of each."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One engine of a bundle, for the choice. `why` says in words what `usable` and `cost_s` rest on.

    verified: equal to torch within the tolerance of its precision. fresh: made from the present weights. executed: it
    ran where it is meant to; only engines of `Kind.must_have_run` can lack that. cost_s: seconds of one picture in the
    bundle's default number of steps, where measured on this machine; costs_s: the same by step count.
    """

    kind: str
    usable: bool
    why: str
    cost_s: float | None = None
    costs_s: Mapping[int, float] = field(default_factory=dict)
    verified: bool = False
    fresh: bool = False
    executed: bool = False


def explain(bundle: Bundle, *, threads: int | None = None) -> tuple[Candidate, ...]:
    """Every engine of a bundle, torch among them, in the order in which "auto" would take them; unusable ones last,
    among them those of native code that was not built here, which are opened by name only.

    Measured ones come first, by cost. Where nothing was measured on this machine, verified float32 exports come before
    torch, and engines of lower precision after it.
    """
    machine = fingerprint(threads)
    found = [_candidate(bundle, kind, machine) for kind in ("torch", *exported_kinds(bundle))]
    return tuple(sorted(found, key=_rank))


def fingerprint(threads: int | None = None) -> dict[str, Any]:
    """What a cost depends on beside the engine: the machine, the threads of a call (None: torch's count), versions."""
    from .measurement import machine_facts

    facts = {name: value for name, value in machine_facts().items() if name not in ("system", "python", "date")}
    return facts if threads is None else {**facts, "threads": threads}


def measure_costs(engine: "Engine", bundle: Bundle, *, threads: int | None = None) -> dict[str, Any]:
    """For `Manifest.costs`: seconds of an engine's calls as serving makes them, by role and rows, and the machine.

    The fastest of several calls counts: what else the machine does only adds. They are few where one takes long. A
    `picture` role is listed where one call of it ends before the calls that it replaces, as serving takes it then.

    Errors: `EngineFailed`.
    """
    import torch

    from ..sampling.served import Served
    from ..sampling.text import Prompts
    from .calibrate import role_calls, saved_s
    from .measurement import device_wait

    device = engine.capabilities.device
    settle, share_s = device_wait(device), BUDGET_S / 6
    roles: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        calls = role_calls(Served(bundle.name, bundle.spec, engine, Prompts(bundle, capacity=1)))
        sizes = dict.fromkeys((TEXT, DENOISER, DECODER), sorted({*SIZES, rows_per_step(bundle.spec)}))
        whole = [role for role in filter(picture_steps, calls) if saved_s(calls, role, share_s, time.perf_counter) > 0]
        sizes |= {role: [1] for role in calls if role == DECODER_TINY or role in whole}
        for role, counts in sizes.items():
            roles[role] = {}
            for size in counts:
                taken = fastest_s(lambda r=role, n=size: (calls[r](n), settle()), share_s, time.perf_counter)  # type: ignore[misc]
                roles[role][str(size)] = taken
                if taken * 4 > BUDGET_S:
                    break
    return {"machine": fingerprint(threads), "device": device, "roles": roles}


def record_costs(bundle: Bundle, kind: str, costs: Mapping[str, Any]) -> None:
    """Write costs into an engine's manifest; torch, which has no files, gets a manifest for them alone.

    Errors: `EngineUnavailable` where there is no manifest or it cannot be written.
    """
    if kind == "torch":
        manifest = Manifest(
            engine="torch", precision="fp32", opset=0, roles={}, weights_digest=bundle.weights_digest, producers={}
        )
    else:
        manifest = read_manifest(bundle, kind)
    try:
        write_manifest(bundle, replace(manifest, costs=dict(costs)))
    except OSError as error:
        raise EngineUnavailable(f"{bundle.root} cannot be written ({error}); use a copy that you own") from error


def fastest_s(call: Callable[[], object], budget_s: float, clock: Callable[[], float]) -> float:
    """The least seconds of a few calls, after one to warm up; fewer where they would not fit the budget."""
    call()
    begun, best = clock(), float("inf")
    for _ in range(REPEATS):
        start = clock()
        call()
        now = clock()
        best = min(best, now - start)
        if now - begun + best > budget_s:
            break
    return best


def picture_cost_s(costs: Mapping[str, Any], spec: SamplerSpec, steps: int) -> float | None:
    """Seconds of one picture by measured costs, in the calls that serving makes; None where one of them is missing."""
    roles = costs.get("roles", {})
    if (whole := roles.get(picture_role(steps))) is not None:
        return float(whole["1"])
    rows = str(rows_per_step(spec))
    decoding = roles.get(spec.decoder_role(steps)) or roles.get(DECODER, {})
    parts = (roles.get(TEXT, {}).get("1"), roles.get(DENOISER, {}).get(rows), decoding.get("1"))
    if not all(isinstance(part, int | float) for part in parts):
        return None
    text_s, step_s, decoder_s = parts
    return float(text_s + steps * step_s + decoder_s)


def rows_per_step(spec: SamplerSpec) -> int:
    return 2 if spec.guidance.mode == "cfg" else 1


def _candidate(bundle: Bundle, kind: str, machine: Mapping[str, Any]) -> Candidate:
    try:
        manifest: Manifest | None = read_manifest(bundle, kind)
    except EngineUnavailable as error:
        if kind != "torch":
            return Candidate(kind=kind, usable=False, why=str(error))
        manifest = None
    fresh = manifest is not None and manifest.weights_digest == bundle.weights_digest
    costs = manifest.costs if manifest is not None and fresh and manifest.costs.get("machine") == machine else {}
    steps = spec_steps(None, bundle.spec)
    found = {n: picture_cost_s(costs, bundle.spec, n) for n in sorted({*bundle.spec.steps, steps})}
    costs_s = {n: cost for n, cost in found.items() if cost is not None}
    if kind == "torch":
        candidate = Candidate(kind=kind, usable=True, why="", verified=True, fresh=True, executed=True)
    else:
        assert manifest is not None
        known = KINDS.get(manifest.engine)
        executed = known is None or not known.must_have_run or manifest.executed_on is not None
        fault = _fault(bundle, manifest, fresh, executed)
        candidate = Candidate(
            kind=kind, usable=fault is None, why=fault or "", verified=manifest.verified, fresh=fresh, executed=executed
        )
    cost = costs_s.get(steps)
    if candidate.usable and cost is not None:
        candidate = replace(candidate, why=f"measured here: {1e3 * cost:.1f} ms for a picture of {steps} steps")
    elif candidate.usable:
        candidate = replace(
            candidate, why=f"not measured on this machine; `fewstep verify {bundle.root}` measures every engine"
        )
    return replace(candidate, cost_s=cost, costs_s=costs_s)


def _fault(bundle: Bundle, manifest: Manifest, fresh: bool, executed: bool) -> str | None:
    """Why an engine cannot be taken, with the remedy."""
    kind = KINDS.get(manifest.engine)
    if kind is None:
        return f"this release cannot open the engine {manifest.engine!r}"
    if not fresh:
        return f"made from other weights; run `{export_command(bundle, manifest.engine)}`"
    if not executed:
        return f"never ran on the device that it was built for; run `fewstep verify {bundle.root}` there"
    if not manifest.verified:
        return f"not verified; run `fewstep verify {bundle.root}`"
    if not installed(kind.package):
        return f"the package {kind.package} is not installed"
    if kind.cuda and not _sees_cuda():
        return "needs a CUDA device, and torch sees none"
    if kind.compiles:
        return f"compiles for minutes when it is opened: name it, --engine {manifest.engine}"
    if manifest.engine in NATIVE and not built_here(manifest):
        return f"native code that was not built here: if you trust who made it, name it, --engine {manifest.engine}"
    return None


def _rank(candidate: Candidate) -> tuple[Any, ...]:
    exported32 = candidate.kind != "torch" and not candidate.kind.endswith(("bf16", "fp16", "fp8", "int8"))
    tier = 0 if candidate.cost_s is not None else 1 if exported32 else 2 if candidate.kind == "torch" else 3
    order = list(KINDS).index(candidate.kind) if candidate.kind in KINDS else len(KINDS)
    return (not candidate.usable, tier, candidate.cost_s or 0.0, order)


def _sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def command(argv: Sequence[str]) -> int:
    """`fewstep engines`."""
    parser = argparse.ArgumentParser(
        prog="fewstep engines",
        description="The engines of a bundle: which are verified, what they cost on this machine per picture and step "
        "count, and which one 'auto' takes.",
        epilog="example: fewstep engines scenes-lcm --threads 1",
    )
    parser.add_argument("bundle", metavar="DIR", help="a bundle folder, or a shipped bundle's short name")
    parser.add_argument(
        "--threads", type=read_count, metavar="N", help="CPU threads of a call; default: torch's choice"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    args = parser.parse_args(argv)
    bundle = load_bundle(args.bundle)
    candidates = explain(bundle, threads=args.threads)
    chosen = next(candidate.kind for candidate in candidates if candidate.usable)
    if args.json:
        print(json.dumps({"bundle": bundle.name, "auto": chosen, "engines": [asdict(c) for c in candidates]}, indent=1))
        return 0
    steps = sorted({*bundle.spec.steps, spec_steps(None, bundle.spec)})
    print(f"{'engine':<30} {'state':<22} {'ms at steps: ' + ', '.join(map(str, steps)):<34} why")
    for candidate in candidates:
        times = "  ".join(f"{1e3 * candidate.costs_s[n]:.1f}" if n in candidate.costs_s else "-" for n in steps)
        name = f"{candidate.kind}{' (auto)' if candidate.kind == chosen else ''}"
        print(f"{name:<30} {_state(candidate):<22} {times:<34} {candidate.why}")
    return 0


def _state(candidate: Candidate) -> str:
    said = ["verified" if candidate.verified else "unverified"]
    said += [] if candidate.fresh else ["stale"]
    said += [] if candidate.executed else ["never executed"]
    return ", ".join(said)
