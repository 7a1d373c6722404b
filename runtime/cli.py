"""The `fewstep` command: a thin dispatcher. Each room owns its commands; a command's module is imported when called.

Commands are entry points of the group `fewstep.commands`, functions `(argv) -> exit code`. A name may have two words
(`bench latency`), written with a dash in the entry point.
"""

import os
import sys
from importlib.metadata import EntryPoint, entry_points

SUMMARIES = {
    "recipes": "list every recipe: family, paper, needs, step counts, status",
    "teacher": "train the built-in reference teacher family from nothing",
    "distill": "distil a teacher into a few-step student bundle",
    "finetune": "teach a few-step student your pictures or a LoRA, and measure what it keeps",
    "import": "turn a diffusers folder into a bundle",
    "export": "export a bundle to an engine and prove it equal",
    "engines": "which engines a bundle has, what they cost here and which one is taken",
    "verify": "check every engine of a bundle against torch",
    "generate": "make a picture from a prompt",
    "serve": "serve bundles over HTTP",
    "keys": "make, list and revoke the API keys of a server",
    "bench-latency": "latency per step count and of each network, beside peers",
    "bench-pictures": "what encoding a finished picture takes",
    "bench-gpu": "full-size shapes on one GPU, and how far from its limits",
    "bench-report": "the page of measured performance, from result files",
    "bench-load": "this server beside others under load, or traffic to a running one",
    "distill-tiny-decoder": "give a bundle a small decoder that draws what its own draws",
    "bench-compression": "size, operations, time and quality of compressed students",
    "bench-recipes": "every training recipe on one small teacher with one budget",
    "bench-scenes": "training recipes on the built-in teacher with one budget",
    "bench-finetune": "ways to fine-tune a few-step student, by style and compliance",
    "bench-control": "ControlNets of a few-step student, by edges and compliance",
    "bench-quality": "Frechet distance, prompt compliance and diversity per step count",
    "bench-storm": "thousands of requests while engines break",
    "folder": "a diffusers folder with random weights, to try and to time",
    "families": "try every family and write the table",
    "pictures": "models and step counts side by side on one sheet",
    "demo": "the whole loop on the built-in family",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 a check failed, 2 wrong use."""
    words = list(sys.argv[1:] if argv is None else argv)
    found = {point.name: point for point in entry_points(group="fewstep.commands")}
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(found))
        return 0
    for length in (2, 1):
        name = "-".join(words[:length])
        if len(words) >= length and name in found:
            return _call(found[name], words[length:])
    print(f"fewstep: no command {' '.join(words[:2])!r}; `fewstep --help` lists them", file=sys.stderr)
    return 2


def usage(found: dict[str, EntryPoint]) -> str:
    lines = ["usage: fewstep COMMAND ...", "", "commands:"]
    order = [n for n in SUMMARIES if n in found] + sorted(set(found) - set(SUMMARIES))
    lines += [f"  {name.replace('-', ' ', 1):<21}{SUMMARIES.get(name, '')}".rstrip() for name in order]
    lines += ["", "`fewstep COMMAND --help` explains one command, with an example."]
    return "\n".join(lines)


def _call(point: EntryPoint, argv: list[str]) -> int:
    from fewstep.models.errors import FewstepError

    try:
        return int(point.load()(argv) or 0)
    except FewstepError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output left, as `| head` does; nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("fewstep: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
