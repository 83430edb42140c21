"""Checks and measures the same engine on a GPU: `scripts/gpu_check`.

First Triton's kernels against fp32 loops and autograd, and graphs against eager steps; then the answers and the
training of tiny models of several families against PEFT; then kernels, cold boot, decode and training on random bases
of Qwen2.5-0.5B's and Llama-3.1-8B's shape, beside the limits of the device and beside PEFT, all in one run. Ends with
status 1 if anything is not as it must be. With `--device cpu --quick` it runs anywhere, the kernels in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

STARTED = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script itself")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="it leaves out repetitions to end within these; default: %(default)g"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write it as a page of Markdown")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, as torch and peft may do
    import torch
    from gpu.clock import Clock
    from gpu.report import Report, versions
    from gpu.run import SHARES, run

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu --quick runs the same on a CPU")
    warnings.filterwarnings("ignore", category=FutureWarning)
    report = Report(device, options.quick, Clock(SHARES, 60 * options.minutes, STARTED))
    print(f"On {report.where}; {versions()}\n", flush=True)

    def write() -> None:
        if options.json:
            report.write_json(options.json)
        if options.markdown:
            report.write_markdown(options.markdown)

    run(report, write)
    write()  # with the time that the last section took
    verdict = "All is well" if report.ok else "Something is WRONG"
    print(f"\n{report.time_table()}\n\n{verdict} on {report.where}; {report.clock.elapsed:.0f} s")
    raise SystemExit(not report.ok)


if __name__ == "__main__":
    main()
