"""`python -m dae_fast`: info, hash and bench. The first two need nothing but the package itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from .info import info, noise_hash

CLONE = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dae_fast", description="Fused kernels for diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="show versions, backends, and what is missing and why")
    commands.add_parser("hash", help="print the SHA-256 of the noise's first 2^24 normals, the same on every machine")
    commands.add_parser("bench", add_help=False, help="measure every op beside eager torch, torch.compile and others")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "bench":
        return bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if chosen.command == "hash":
        print(noise_hash())
    else:
        facts = info()
        width = max(map(len, facts))
        print("\n".join(f"{name:{width}}  {value}" for name, value in facts.items()))
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Run the suite of a clone, or the one that a wheel carries."""
    in_clone = (CLONE / "benchmarks" / "suite.py").exists()
    if in_clone:
        sys.path.insert(0, str(CLONE))
    try:
        suite = import_module("benchmarks.__main__" if in_clone else "dae_fast.benchmarks.__main__")
    except ModuleNotFoundError as error:
        print(f"bench: {error}: `pip install 'dae-fast[cli]'` brings what it needs", file=sys.stderr)
        return 2
    suite.app(arguments, prog_name="python -m dae_fast bench")  # exits
    return 0


if __name__ == "__main__":
    sys.exit(main())
