"""`fewstep bench compression`: what smaller networks cost and what they lose, beside the student they came from.

For each bundle: weights and operations of the denoiser and the decoder that it draws with, the time of both in torch,
and compliance and Frechet distance per step count, on the same prompts and seeds. A bundle with a tiny
decoder gets a second row, drawn with that.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.models.bundle import Bundle, load_bundle
from fewstep.runtime.engine import DECODER, DENOISER

from ..pictures.data import Latents, LatentSource, read_texts
from ..pictures.quality import Measured, draw_prompts, measure_bundle, step_counts
from ..runs.tiny_decoder import COMPONENT, with_tiny_decoder

BATCH = 4
"""Pictures of a timed call: at one, half of the time is Python's."""
COMPLIANCE_BUDGET, FRECHET_BUDGET = 0.01, 0.3
"""How much a tiny decoder may lose at a step count before it is not to be the default there."""


def compare(
    bundles: Sequence[Bundle], steps: Sequence[int], *, prompts: int = 256, seed: int = 0, repeats: int = 30,
    progress: bool = False, before: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The report as plain JSON: {"prompts", "seed", "threads", "rows": [...]}.

    before: an earlier report, whose quality figures are taken where weights, prompts and seed are the same.
    """
    known = _known(before, prompts, seed)
    prompt_set = draw_prompts(prompts, seed)
    with tempfile.TemporaryDirectory() as folder:
        everyone: list[tuple[Bundle, Bundle | None]] = []
        for k, bundle in enumerate(bundles):
            everyone.append((bundle, None))
            if bundle.has(COMPONENT):
                everyone.append((with_tiny_decoder(bundle, Path(folder) / str(k)), bundle))
        networks = {}
        for k, (one, _) in enumerate(everyone):
            for role in (DENOISER, DECODER):
                network = one.network(role)
                networks[f"{k}:{role}"] = network, _feeds(one, role, network)
        seconds = _interleaved(networks, repeats)
        rows: list[dict[str, Any]] = []
        for k, (one, whole) in enumerate(everyone):
            found = dict(known.get(one.weights_digest, {}))
            for n in steps:
                if str(n) not in found and one.spec.allows(n):
                    found[str(n)] = _quality(measure_bundle(one, n, prompt_set, progress=progress))
            costs = {}
            for role in (DENOISER, DECODER):
                key = f"{k}:{role}"
                costs[role] = {"seconds": seconds[key], **_size(*networks[key])}
            quality = {str(n): found[str(n)] for n in steps if str(n) in found}
            named = {"model": one.name, "recipe": one.spec.recipe, "digest": one.weights_digest}
            rows.append({**named, **costs, "quality": quality})
            if whole is not None:
                rows[-1] |= {"verdict": verdict(rows[-1]["quality"], rows[-2]["quality"])}
    return {"prompts": prompts, "seed": seed, "threads": torch.get_num_threads(), "rows": rows}


def verdict(tiny: dict[str, Any], full: dict[str, Any]) -> dict[str, bool]:
    """Per step count, whether a tiny decoder keeps within both budgets of the larger one."""
    return {
        n: full[n]["compliance"] - tiny[n]["compliance"] <= COMPLIANCE_BUDGET
        and tiny[n]["frechet"] - full[n]["frechet"] <= FRECHET_BUDGET
        for n in tiny
    }


def _known(before: dict[str, Any] | None, prompts: int, seed: int) -> dict[str, Any]:
    """Weights' digest -> quality per step count."""
    if before is None or (before["prompts"], before["seed"]) != (prompts, seed):
        return {}
    return {row["digest"]: row["quality"] for row in before["rows"]}


def _quality(one: Measured) -> dict[str, float]:
    row = one.row
    return {
        "guidance": row.guidance, "frechet": row.frechet, "compliance": row.compliance, "strict": one.strict,
        "diversity": row.diversity,
    }  # fmt: skip


def _feeds(bundle: Bundle, role: str, network: Any) -> dict[str, torch.Tensor]:
    """Inputs of `BATCH` pictures, of noise; what they hold does not change the time."""
    spec, draw = bundle.spec, torch.Generator().manual_seed(0)
    (width, height), factor = spec.sizes[0], spec.latent.factor
    latent = torch.randn(BATCH, spec.latent.channels, height // factor, width // factor, generator=draw)
    if role == DECODER:
        return {"latent": latent}
    texts = read_texts(bundle.tokenizers(), spec, ["a red circle"] * BATCH)
    data = Latents(latent, {name: value[:, None] for name, value in texts.items()}, {n: v[0] for n, v in texts.items()})
    rows = torch.arange(BATCH)
    given = LatentSource(data, bundle.text_encoder(), BATCH, spec=spec).gather(torch.stack([rows, 0 * rows], dim=1))
    known = {**given.cond, "x": latent, "t": torch.full((BATCH,), float(spec.path.start))}
    return {name: known[name] for name in network.inputs}


def _size(network: Any, feeds: dict[str, torch.Tensor]) -> dict[str, int]:
    """Weights of what runs (a decoder without its encoder), and operations of one picture."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = next(iter(feeds.values())).shape[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*feeds.values())
    part: nn.Module = network.vae.decoder if hasattr(network, "vae") else network
    weights = sum(p.numel() for p in part.parameters())
    return {"weights": weights, "operations": int(counter.get_total_flops()) // batch}


def _interleaved(networks: dict[str, tuple[nn.Module, dict[str, torch.Tensor]]], repeats: int) -> dict[str, float]:
    """Least seconds of one call of each, in turns, so that a busy moment of the machine falls on all."""
    best = dict.fromkeys(networks, float("inf"))
    with torch.inference_mode():
        for _ in range(repeats + 2):
            for name, (network, feeds) in networks.items():
                begun = time.perf_counter()
                network(*feeds.values())
                best[name] = min(best[name], time.perf_counter() - begun)
    return {name: round(value, 6) for name, value in best.items()}


def table(report: dict[str, Any]) -> str:
    """Rows as a Markdown table; milliseconds, and Frechet distance and compliance at each step count."""
    steps = list(report["rows"][0]["quality"])
    head = ["model", "recipe", "M weights", "MFLOP", "ms", "decoder MFLOP", "decoder ms"]
    head += [f"Frechet @{n}" for n in steps] + [f"compliance @{n}" for n in steps]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for row in report["rows"]:
        net, decoder, quality = row[DENOISER], row[DECODER], row["quality"]
        cells = [row["model"], row["recipe"], f"{net['weights'] / 1e6:.2f}", f"{net['operations'] / 1e6:.0f}"]
        cells += [
            f"{1e3 * net['seconds']:.2f}",
            f"{decoder['operations'] / 1e6:.0f}",
            f"{1e3 * decoder['seconds']:.2f}",
        ]
        for name, form in (("frechet", "{:.2f}"), ("compliance", "{:.3f}")):
            cells += [form.format(quality[n][name]) if n in quality else "" for n in steps]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(report: dict[str, Any], call: str) -> str:
    """`docs/compression.md`: the table with how it was made, and what each tiny decoder's figures decide."""
    lines = [
        "# Smaller students: what they cost and what they lose", "",
        f"Made by `{call}`: {report['prompts']} prompts, seed {report['seed']}, one picture",
        "each. *MFLOP* are floating-point operations of one call per picture. *ms* is the least time of a call on",
        f"{BATCH} pictures in eager torch, float32, {report['threads']} thread, all rows taken in turns; the denoiser",
        "is called once per step, the decoder once per picture. *Frechet* and *compliance* are those of",
        "`fewstep bench quality`.", "", table(report), "",
    ]  # fmt: skip
    for row in report["rows"]:
        for n, kept in row.get("verdict", {}).items():
            said = "keeps within" if kept else "exceeds"
            lines.append(
                f"- {row['model']} at {n} step{'s' if n != '1' else ''}: the tiny decoder {said} the budget of "
                f"{COMPLIANCE_BUDGET} compliance and {FRECHET_BUDGET} Frechet against the larger one."
            )
    return "\n".join(lines).rstrip() + "\n"


def command(argv: list[str]) -> int:
    """`fewstep bench compression`."""
    parser = argparse.ArgumentParser(
        prog="fewstep bench compression",
        description="Size, operations, time and quality of compressed students and tiny decoders, side by side.",
        epilog="example: fewstep bench compression scenes-lcm runs/edge runs/tiny --out docs/compression.md",
    )
    parser.add_argument("bundles", nargs="+", metavar="DIR", help="bundles; the first is what the others came from")
    parser.add_argument("--steps", type=step_counts, default=[1, 2, 4], help="step counts (default: 1,2,4)")
    parser.add_argument("--prompts", type=int, default=256, help="captions, one picture each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of captions and pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="F.md", help="write the page here, and the figures to F.json")
    parser.add_argument("--note", type=Path, help="a Markdown file to put at the page's end: how the rows were trained")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    bundles = [load_bundle(where) for where in args.bundles]
    figures = args.out.with_suffix(".json") if args.out else None
    before = json.loads(figures.read_text()) if figures and figures.is_file() else None
    report = compare(
        bundles, args.steps, prompts=args.prompts, seed=args.seed, progress=not args.quiet, before=before
    )  # fmt: skip
    print(table(report))
    if args.out and figures:
        call = "fewstep bench compression " + " ".join(Path(where).name for where in args.bundles)
        text = page(report, f"{call} --prompts {args.prompts}") + ("\n" + args.note.read_text() if args.note else "")
        args.out.write_text(text)
        figures.write_text(json.dumps(report, indent=1) + "\n")
    return 0
