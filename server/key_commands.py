"""`fewstep keys`: make, list and revoke the API keys of a key file."""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .keys import Key, make_key, read_keys, write_keys

_EXAMPLE = """example:
  fewstep keys add alice --rate 5 --burst 20 --share 0.25
  FEWSTEP_KEY_FILE=fewstep-keys.json fewstep serve scenes-lcm

The key is printed once; the file keeps its salted hash. A running server sees a change within a second."""
DEFAULT_FILE = "fewstep-keys.json"


def command(argv: list[str]) -> int:
    """Exit codes: 0 done, 1 there is no such key, or there is one already, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="fewstep keys",
        description="Make, list and revoke the API keys that a server takes.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="add | list | revoke")
    add = actions.add_parser("add", help="make a key and print it")
    add.add_argument("name", help="who it is for: letters, digits, '.', '_' and '-'")
    add.add_argument("--rate", type=float, metavar="PER_S", help="requests per second (unbounded)")
    add.add_argument("--burst", type=int, default=10, help="requests at once before the rate holds (%(default)s)")
    add.add_argument("--share", type=float, default=1.0, help="part of the queue it may fill (%(default)s: all)")
    add.add_argument("--admin", action="store_true", help="it may load and unload models")
    listing = actions.add_parser("list", help="names and limits of the keys")
    listing.add_argument("--json", action="store_true", help="as JSON, without salts and hashes")
    revoke = actions.add_parser("revoke", help="make a key useless")
    revoke.add_argument("name")
    file = Path(os.environ.get("FEWSTEP_KEY_FILE", "").strip() or DEFAULT_FILE)
    for action in (add, listing, revoke):
        action.add_argument("--file", type=Path, default=file, help="the key file (FEWSTEP_KEY_FILE, or %(default)s)")
    args = parser.parse_args(argv)
    keys = read_keys(args.file)
    if args.action == "list":
        print(_listed(keys, as_json=args.json))
        return 0
    known = any(key.name == args.name for key in keys)
    if known is (args.action == "add"):
        remedy = "revoke it first" if known else "`fewstep keys list` shows those that are"
        print(
            f"fewstep keys: {args.name!r} is {'already' if known else 'not'} in {args.file}; {remedy}", file=sys.stderr
        )
        return 1
    if args.action == "revoke":
        write_keys(args.file, [key for key in keys if key.name != args.name])
        return 0
    text, key = make_key(args.name, rate_per_s=args.rate, burst=args.burst, share=args.share, admin=args.admin)
    write_keys(args.file, [*keys, key])
    print(text)
    return 0


def _listed(keys: tuple[Key, ...], *, as_json: bool) -> str:
    if as_json:
        secret = {"salt", "hash"}
        return json.dumps(
            {"keys": [{k: v for k, v in asdict(key).items() if k not in secret} for key in keys]}, indent=1
        )
    lines = [f"{'name':<24} {'per s':>8} {'burst':>6} {'share':>6}  {'made':<10}  admin"]
    for key in keys:
        rate = "-" if key.rate_per_s is None else f"{key.rate_per_s:g}"
        made = time.strftime("%Y-%m-%d", time.gmtime(key.created_unix_s))
        lines.append(f"{key.name:<24} {rate:>8} {key.burst:>6} {key.share:>6g}  {made}  {'yes' if key.admin else 'no'}")
    return "\n".join(lines)
