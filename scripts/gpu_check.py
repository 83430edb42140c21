"""Checks and measures the same engine on a GPU, on its torch path: `scripts/gpu_check`.

First the answers and the training of tiny models of several families against PEFT; then cold boot, decode and training
on a random base of Qwen2.5-0.5B's shape, beside the limits of the device and beside PEFT, all in one run. Ends with
status 1 if anything is not as it must be. With `--device cpu --quick` it runs anywhere, in under a minute.
"""

from __future__ import annotations

import argparse
import time
import traceback
import warnings
from pathlib import Path

import torch
from gpu.checks import checks
from gpu.figures import measure
from gpu.limits import measure_limits
from gpu.report import Check, Report, versions


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"), help="default: cuda:0")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script itself")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write it as a page of Markdown")
    options = parser.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu --quick runs the same on a CPU")
    warnings.filterwarnings("ignore", category=FutureWarning)
    report, started = Report(options.device, options.quick), time.perf_counter()
    print(f"On {report.where}; {versions()}\n", flush=True)
    run(report)
    if options.json:
        report.write_json(options.json)
    if options.markdown:
        report.write_markdown(options.markdown)
    verdict = "All is well" if report.ok else "Something is WRONG"
    print(f"\n{verdict} on {report.where}; {time.perf_counter() - started:.0f} s")
    raise SystemExit(not report.ok)


def run(report: Report) -> None:
    device, quick = report.device, report.quick
    for name, check in checks(device, quick):
        try:
            report.add(check(name))
        except Exception as error:
            report.add(broken(name, error))
    try:
        limits = measure_limits(device, quick)
        report.show("Limits of the device", limits.figures)
        for title, section in measure(device, limits, quick):
            report.show(title, section())
    except Exception as error:
        report.add(broken("figures", error))


def broken(name: str, error: Exception) -> Check:
    traceback.print_exception(error)
    return Check(name, False, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
