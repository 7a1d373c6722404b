"""`fewstep export` and `fewstep verify`."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .quantise_options import MEASURES

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle

    from .verify import Report

_OPTION = "option_"
"""Before the names of engine options among the parsed arguments."""


def export(argv: Sequence[str]) -> int:
    """Make an engine of a bundle and prove it equal to torch. Exit code 1 where it is not."""
    from .exporters import check_choice, kind_of, make_engine

    args = _export_parser().parse_args(argv)
    options = {name.removeprefix(_OPTION): value for name, value in vars(args).items() if name.startswith(_OPTION)}
    check_choice(args.engine, args.precision, options)
    from fewstep.models.bundle import load_bundle

    from .golden import golden_steps, make_golden
    from .verify import verify as check

    bundle = load_bundle(args.bundle)
    if args.new_golden or not bundle.spec.golden:
        count = len(golden_steps(bundle.spec)) + bundle.has("controlnet")
        with _bar(count, "golden cases") as tell:
            bundle = make_golden(bundle, progress=tell)
    with _bar(len(bundle.roles), "export") as tell:
        manifest = make_engine(bundle, args.engine, precision=args.precision, progress=tell, **options)
    kinds = () if manifest is None else (kind_of(args.engine, args.precision),)
    with _bar(_comparisons(bundle, kinds), "verify") as tell:
        report = check(bundle, kinds=kinds, progress=tell)
    _print_report(report, as_json=args.json)
    return 0 if report.ok else 1


def verify(argv: Sequence[str]) -> int:
    """Compare every engine of a bundle with torch. Exit code 1 where one is out of tolerance."""
    parser = _parser(
        "fewstep verify",
        "Compare every exported engine of a bundle with torch: each network on random inputs, and whole golden cases "
        "with the drift after each step. Exit code 1 where one is out of tolerance.",
        "fewstep verify scenes-lcm --json",
    )
    for name, said in MEASURES.items():
        parser.add_argument(f"--budget-{name}", type=float, metavar="X", help=f"of every engine, from now on: {said}")
    args = parser.parse_args(argv)
    from fewstep.models.bundle import load_bundle
    from fewstep.runtime.engines.budget import Budget
    from fewstep.runtime.engines.manifest import exported_kinds

    from .verify import verify as check

    bundle = load_bundle(args.bundle)
    with _bar(_comparisons(bundle, exported_kinds(bundle)), "verify") as tell:
        budget = Budget(**{name: getattr(args, f"budget_{name}") for name in MEASURES})
        report = check(bundle, budget=budget, progress=tell)
    _print_report(report, as_json=args.json)
    return 0 if report.ok else 1


def _export_parser() -> argparse.ArgumentParser:
    from .exporters import EXPORTERS, all_options, precisions_of
    from .option import flag

    parser = _parser(
        "fewstep export",
        "Make an engine of a bundle, in <bundle>/engines/, and prove it equal to torch. The engine 'torch' needs no "
        "export: this makes the bundle's golden cases and checks them.",
        "fewstep export scenes-lcm --engine openvino --precision bf16",
    )
    parser.add_argument("--engine", choices=tuple(EXPORTERS), default="onnx", help="default: onnx (ONNX Runtime)")
    precisions = tuple(dict.fromkeys(p for engine in EXPORTERS for p in precisions_of(engine)))
    able = "; ".join(f"{e}: {', '.join(precisions_of(e))}" for e in EXPORTERS if len(precisions_of(e)) > 1)
    parser.add_argument("--precision", choices=precisions, default="fp32", help=f"default: fp32; {able}")
    parser.add_argument(
        "--new-golden", action="store_true", help="make the golden cases anew, as torch gives them here"
    )
    group = parser.add_argument_group("options of some engines")
    for name, (option, engines) in all_options().items():
        said = f"{', '.join(engines)}: {option.help}"
        group.add_argument(
            flag(name),
            dest=_OPTION + name,
            type=option.read,
            metavar=option.metavar,
            default=argparse.SUPPRESS,
            help=said,
        )
    return parser


def _parser(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=f"example: {example}")
    parser.add_argument("bundle", metavar="DIR", help="a bundle folder, or a shipped bundle's short name")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _comparisons(bundle: "Bundle", kinds: Sequence[str]) -> int:
    """How many parts `verify` will name."""
    cases = len(bundle.spec.golden)
    return cases + len(kinds) * (cases + len(bundle.roles))


@contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error that is told what begins; silent where nobody watches."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="part", disable=None) as bar:
        begun = False

        def tell(part: str) -> None:
            nonlocal begun
            bar.update(int(begun))
            bar.set_postfix_str(part)
            begun = True

        yield tell
        bar.update(int(begun))
        bar.leave = begun  # nothing was to be done: the empty bar goes


def _print_report(report: "Report", *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
        return
    print(
        f"{'engine':<14} {'component':<24} {'error':>8} {'allowed':>8} {'peak':>8} {'allowed':>8}       drift per step"
    )
    for row in report.engines:
        error, peak, most = (_short(e) for e in (row.max_relative_error, row.max_peak_error, row.peak_tolerance))
        drift = ["-" if d is None else f"{d:.0e}" for d in row.drift]
        if len(drift) > 8:
            drift[4:-3] = ["..."]
        said = row.note or " ".join(drift)
        mark = "ok" if row.ok else "FAIL"
        figures = f"{error:>8} {row.tolerance:>8.0e} {peak:>8} {most:>8}"
        print(f"{row.engine:<14} {row.component:<24} {figures} {mark:>5} {said}".rstrip())
    for note in report.notes:
        print(note)
    print(f"{report.bundle}: {'all engines agree with torch' if report.ok else 'NOT equal: see FAIL above'}")


def _short(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"
