"""`fewstep families`: what each family of models can do here, tried and written into a table.

For each row a small folder of the real classes is made with random weights, imported, compared with diffusers' own
pipeline picture for picture, exported and compared with torch role by role, given to TensorRT's parser and builder, run
by OpenVINO, and served. Rows are kept as they are done, so that a stopped run goes on where it was.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.models.arguments import read_output
from fewstep.models.errors import FewstepError
from fewstep.models.files import write_whole
from fewstep.runtime.errors import EngineUnavailable

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle

PROMPT = "a red cat"
STEPS = (1, 2, 4)
BOUND = 1 / 255
LARGEST = 128
"""Pictures are at most this large a side: what is tried does not depend on it, and how long it takes does."""
COLUMNS = ("import", "exact", "onnx", "tensorrt", "openvino", "served")
ROWS: dict[str, tuple[str, str]] = {
    "SD 1.5": ("sd15-tiny", "sd15"),
    "SD 2.1": ("sd21-tiny", "sd21"),
    "SD-Turbo": ("sd-turbo-tiny", "sd-turbo"),
    "LCM": ("lcm-tiny", "lcm"),
    "SDXL": ("sdxl-tiny", "sdxl"),
    "SDXL-Turbo": ("sdxl-turbo-tiny", "sdxl-turbo"),
    "SDXL-Lightning": ("sdxl-tiny", "lightning-4"),
    "DMD2 on SDXL": ("sdxl-tiny", "dmd2-4"),
    "SSD-1B": ("ssd-tiny", "ssd-1b"),
    "PixArt-alpha": ("pixart-alpha-tiny", "pixart-alpha"),
    "PixArt-sigma": ("pixart-sigma-tiny", "pixart-sigma"),
    "SANA": ("sana-tiny", "sana"),
    "SANA-Sprint": ("sana-sprint-tiny", "sana-sprint"),
    "SD3 / 3.5": ("sd3-tiny", "sd3"),
    "FLUX.1 schnell": ("flux-schnell-tiny", "flux-schnell"),
    "FLUX.1 dev": ("flux-dev-tiny", "flux-dev"),
    "Z-Image-Turbo": ("z-image-tiny", "z-image-turbo"),
}
"""Row -> the shape of its folder (`fewstep.models.shapes`), and what it is imported as (`fewstep.models.known`)."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Whether a column holds for a row, and the figure or the reason."""

    ok: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class FamilyRow:
    name: str
    shape: str
    known: str
    versions: Mapping[str, str]
    seconds: float
    cells: Mapping[str, Cell] = field(default_factory=dict)


def try_family(name: str, tell: Callable[[str], None] | None = None) -> FamilyRow:
    """Make, import, compare, export and serve one row. What fails fills its cell; what depends on it is not tried."""
    from fewstep.models.families import find_family
    from fewstep.models.importing import import_folder
    from fewstep.models.known import known
    from fewstep.models.shapes import make_folder

    shape, answers = ROWS[name]
    tell = tell or (lambda part: None)
    begun = time.monotonic()
    cells: dict[str, Cell] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bundle: Any = None

        def imported() -> str:
            nonlocal bundle
            folder = make_folder(shape, Path(scratch) / "folder")
            width, height = (min(side, LARGEST) for side in find_family(folder).facts(folder).size)
            bundle = import_folder(folder, Path(scratch) / "bundle", answers=known(answers), sizes=[(width, height)])
            return f"{bundle.family.name}, {bundle.spec.sampler}"

        columns: dict[str, Callable[[], str]] = {
            "import": imported,
            "exact": lambda: exactness(bundle),
            "onnx": lambda: onnx_parity(bundle),
            "tensorrt": lambda: tensorrt_builds(bundle),
            "openvino": lambda: openvino_parity(bundle),
            "served": lambda: served(bundle),
        }
        for column, attempt in columns.items():
            tell(f"{name}: {column}")
            needs = "onnx" if column in ("tensorrt", "openvino", "served") else "import"
            if column != "import" and not (cells["import"].ok and cells.get(needs, cells["import"]).ok):
                cells[column] = Cell(ok=False, text=f"not tried: {needs} failed")
                continue
            cells[column] = _cell(attempt)
    seconds = round(time.monotonic() - begun, 1)
    return FamilyRow(name=name, shape=shape, known=answers, versions=_versions(), seconds=seconds, cells=cells)


def exactness(bundle: "Bundle") -> str:
    """The largest difference from diffusers' pipeline at 1, 2 and 4 steps, in 255ths; 0.5 is our rounding to bytes."""
    import numpy as np
    import torch

    from fewstep.runtime.bench.diffusers_pipeline import call_settings, can_sample, hushed, open_pipeline
    from fewstep.runtime.engines.torch_engine import TorchEngine
    from fewstep.runtime.sampling.loop import run_request
    from fewstep.runtime.sampling.request import GenerateRequest

    pipeline, engine = open_pipeline(bundle), TorchEngine(bundle)
    worst, counts = 0.0, [n for n in STEPS if bundle.spec.allows(n) and can_sample(pipeline, n)]
    for steps in counts:
        ours = run_request(engine, bundle, GenerateRequest(prompt=PROMPT, seed=3, steps=steps)).pictures[0] / 255
        with hushed():
            generator = torch.Generator("cpu").manual_seed(3)
            settings = call_settings(bundle, pipeline, steps)
            theirs = pipeline(PROMPT, generator=generator, output_type="np", **settings).images[0]
        if np.std(theirs) < 0.01:
            raise EngineUnavailable("the picture is flat: nothing is compared")
        worst = max(worst, float(np.abs(ours - theirs).max()))
    text = f"{worst * 255:.2f}/255 at {', '.join(map(str, counts))}"
    if worst > BOUND:
        raise EngineUnavailable(f"differs: {text}")
    return text


def onnx_parity(bundle: "Bundle") -> str:
    """Export every role and verify: the worst role's error, and that of the golden cases."""
    from .golden import make_golden
    from .onnx import export_onnx

    make_golden(bundle)
    fresh = _reopened(bundle)
    export_onnx(fresh)
    return _parity(fresh, "onnx")


def openvino_parity(bundle: "Bundle") -> str:
    from .openvino import export_openvino

    fresh = _reopened(bundle)
    export_openvino(fresh)
    return _parity(fresh, "openvino")


def tensorrt_builds(bundle: "Bundle") -> str:
    from .tensorrt import parses_and_builds

    found = parses_and_builds(_reopened(bundle))
    if bad := {role: said for role, said in found.items() if said is not None}:
        raise EngineUnavailable("; ".join(f"{role}: {said}" for role, said in bad.items()))
    return f"{len(found)} roles built"


def served(bundle: "Bundle") -> str:
    """Three pictures at once by the scheduled runtime over the exported engine, each as the dull loop makes it."""
    import numpy as np

    from fewstep.runtime.engines.registry import open_engine
    from fewstep.runtime.sampling.loop import run_request
    from fewstep.runtime.sampling.request import GenerateRequest
    from fewstep.runtime.service.local import Runtime

    fresh = _reopened(bundle)
    engine = open_engine(fresh, "onnx")
    steps = max(n for n in STEPS if fresh.spec.allows(n))
    requests = [GenerateRequest(prompt=PROMPT, seed=seed, steps=steps) for seed in (1, 2, 3)]
    alone = [run_request(engine, fresh, request).pictures[0] for request in requests]
    with Runtime([fresh], engines={fresh.name: engine}) as runtime:
        together = [ticket.result().pictures[0] for ticket in [runtime.submit(request) for request in requests]]
    engine.close()
    worst = max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(alone, together, strict=True))
    if worst > 1:
        raise EngineUnavailable(f"batched pictures differ by {worst}/255 from single ones")
    return f"{len(requests)} at once, {worst}/255"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """docs/families.md of rows as the JSON file has them."""
    done = {row["name"]: row for row in rows}
    lines = [
        "# Families",
        "",
        "What each family of models does here. Written by `fewstep families`, which makes a small folder of the real",
        "classes with random weights for each row and tries everything on it; figures are of that run.",
        "",
        "- import: family and sampler that `fewstep import DIR --as NAME` found",
        "- exact: the largest difference from diffusers' own pipeline, same seed, torch fp32, in 255ths of a pixel's",
        "  range, and the step counts compared; 0.5 is the rounding to bytes",
        "- onnx, openvino: the worst role's relative error against torch, and the golden cases' after their last step",
        "- tensorrt: roles that TensorRT's parser and builder accept, built without a GPU; nothing was run by it",
        "- served: requests batched together by the runtime over the ONNX engine, against the same requests alone",
        "",
        "| family | `--as` | " + " | ".join(COLUMNS) + " |",
        "| --- " * (len(COLUMNS) + 2) + "|",
    ]
    for name, (_, known) in ROWS.items():
        cells = done[name]["cells"] if name in done else {}
        shown = [_shown(cells.get(column)) for column in COLUMNS]
        lines.append(f"| {name} | `{known}` | " + " | ".join(shown) + " |")
    versions = {json.dumps(row["versions"], sort_keys=True) for row in rows}
    for text in sorted(versions):
        lines += ["", "Made with " + ", ".join(f"{k} {v}" for k, v in json.loads(text).items()) + "."]
    return "\n".join(lines) + "\n"


def command(argv: Sequence[str]) -> int:
    """`fewstep families`. Exit code 1 where a cell failed."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="fewstep families",
        description="Try every family on a small folder of its real classes, and write the table. Some minutes a row.",
        epilog="example: fewstep families --out docs/families.md --only 'SD 1.5' LCM",
    )
    parser.add_argument(
        "--out", type=read_output, required=True, metavar="FILE", help="the table; its data beside it, .json"
    )
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), metavar="ROW", help="these rows anew, others as kept")
    parser.add_argument("--again", action="store_true", help="try rows anew that the data has already")
    args = parser.parse_args(argv)
    data = args.out.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(data.read_text()) if data.is_file() else []
    kept = {row["name"] for row in rows}
    wanted = args.only or [name for name in ROWS if args.again or name not in kept]
    for name in wanted:
        row = asdict(try_family(name, tell=lambda part: print(part, flush=True)))
        rows = [*(r for r in rows if r["name"] != name), row]
        rows.sort(key=lambda r: list(ROWS).index(r["name"]))
        write_whole(data, (json.dumps(rows, indent=1) + "\n").encode())
        write_whole(args.out, markdown(rows).encode())
    failed = [f"{r['name']}: {c}" for r in rows for c in COLUMNS if not r["cells"][c]["ok"]]
    print(f"{args.out}: {len(rows)} of {len(ROWS)} rows" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _cell(attempt: Callable[[], str]) -> Cell:
    try:
        return Cell(ok=True, text=attempt())
    except FewstepError as error:
        return Cell(ok=False, text=str(error))
    except Exception as error:  # diffusers, an exporter or a runtime: the row goes on to say what it was
        return Cell(ok=False, text=f"{type(error).__name__}: {error}")


def _shown(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    text = cell["text"].replace("|", "/").replace("\n", " ")
    return text if cell["ok"] else f"**no**: {text[:160]}"


def _reopened(bundle: "Bundle") -> "Bundle":
    """The bundle as it is on disk now: golden cases reseal it."""
    from fewstep.models.bundle import load_bundle

    return load_bundle(bundle.root)


def _parity(bundle: "Bundle", kind: str) -> str:
    from .verify import verify

    report = verify(bundle, kinds=(kind,))
    rows = [row for row in report.engines if row.engine == kind]
    if bad := [row for row in rows if not row.ok]:
        raise EngineUnavailable("; ".join(f"{r.component}: {r.note or r.max_relative_error}" for r in bad))
    golden = [r.max_relative_error or 0.0 for r in rows if r.component.startswith("golden:")]
    roles = [r.max_relative_error or 0.0 for r in rows if not r.component.startswith("golden:")]
    return f"{max(roles):.0e} of {len(roles)} roles, {max(golden, default=0.0):.0e} golden"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "diffusers", "transformers", "onnxruntime", "openvino", "tensorrt-rtx"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
