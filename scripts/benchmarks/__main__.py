"""The command line of `scripts/bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from figure import Figure

from benchmarks import coldboot, decode, grammar, memory, policy, prefill, profile, scale, start, trace, train
from benchmarks.peers import Setting
from benchmarks.report import DOCS, publish, save, show

BENCHES: dict[str, Callable[[Setting], list[Figure]]] = {
    "start": start.run,
    "memory": memory.run,
    "coldboot": coldboot.run,
    "decode": decode.run,
    "profile": profile.run,
    "prefill": prefill.run,
    "scale": scale.run,
    "trace": trace.run,
    "policy": policy.run,
    "train": train.run,
    "grammar": grammar.run,
}
TITLES = {name: (bench.__globals__["__doc__"] or "").strip() for name, bench in BENCHES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure AdapterHub, beside peers and limits.")
    known = ", ".join(f"{name}" for name in BENCHES)
    parser.add_argument("which", nargs="*", help=f"{known}; default: all")
    parser.add_argument("--vllm", metavar="URL", help="a vLLM server on the same base, with run-time LoRA loading")
    parser.add_argument("--peft", action="store_true", help="also PEFT, in a process of its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    parser.add_argument("--publish", action="store_true", help="write docs/benchmarks.md")
    options = parser.parse_args()
    unknown = set(options.which) - BENCHES.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {known}")
    setting = Setting(options.vllm, options.peft, DOCS if options.publish else None)
    results = {}
    for name in options.which or BENCHES:
        results[name] = BENCHES[name](setting)
        show(name, results[name])
    if options.json:
        save(results, options.json)
    if options.publish:
        publish(results, TITLES)


if __name__ == "__main__":
    main()
