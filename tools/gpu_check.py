"""Everything that only a GPU can show, in one command: tests, fidelity, and each figure beside what the
machine can do.

    python -m tools.gpu_check                      # all parts; a table, and gpu_check.json and gpu_check.md
    python -m tools.gpu_check --parts rates decode

Needs no argument and no network, and no more than eight minutes. Each part is a process of its own with a
time limit, so that one which fails costs its own rows only. Weights are random: speed does not depend on
their values.

environment  GPU, driver, versions, peer access, MPS
rates        device-to-device copy (bytes read plus written), bf16 matrix products
checkpoints  random ones of the 2B and 7B shapes
decode       steps of both shapes, as graphs and eager, beside weights + KV over the copy rate
server       the whole server, 32 users with three pictures each, then three turns; beside transformers
prefill      2k and 8k tokens of the 7B shape beside the matmul rate
isolation    P99 ITL of streams while pictures are encoded on the same GPU, by turns and by MPS
attention    Triton's decode attention beside the copy rate, and beside FlashAttention-3 where it is installed
experts      the experts' kernels at decode steps of a 30B-A3B, beside the copy rate
grouped      quantised weights (int4, int8, FP8 in blocks), linear layers and experts, beside dense ones
delta        layers with linear attention, of Qwen3.5's 0.8B: beside torch, and beside the copy rate
fidelity     logits of random models in bf16, beside transformers in bf16; both against float32
tests        every test marked `gpu`, in the time that is left
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tools import gpu_delta, gpu_grouped, gpu_parts
from tools.gpu_parts import Machine, Row

TOTAL_S = 480.0
PARTS: dict[str, tuple[Callable[[Machine], Iterator[Row]], float]] = {  # and the most seconds for each
    "environment": (gpu_parts.environment, 20), "rates": (gpu_parts.rates, 30),
    "checkpoints": (gpu_parts.checkpoints, 60),
    "decode": (gpu_parts.decode, 90), "server": (gpu_parts.server, 80), "prefill": (gpu_parts.prefill, 40),
    "isolation": (gpu_parts.isolation, 80), "attention": (gpu_parts.attention, 40),
    "experts": (gpu_parts.experts, 30), "grouped": (gpu_grouped.grouped, 60),
    "towers": (gpu_parts.towers, 50),
    "delta": (gpu_delta.delta, 60), "fidelity": (gpu_parts.fidelity, 60),
    "tests": (gpu_parts.tests, 200),
}  # fmt: skip
USUAL_RATES = {"copy": 3.0e12, "matmul": 7.9e14}  # an H100's, where this machine's were not measured


def run_part(name: str, folder: Path, is_small: bool) -> None:
    """In this process.

    `folder` gets the rows, as they are found; it holds checkpoints, and the rates once they are known.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    known, result = folder / "rates.json", folder / f"{name}.rows.json"
    machine = Machine(
        folder, json.loads(known.read_text()) if known.exists() else USUAL_RATES.copy(), device, is_small
    )
    rows: list[dict[str, Any]] = []
    can_run = device.type == "cuda" or name == "environment" or is_small
    for row in PARTS[name][0](machine) if can_run else [Row(name, "not run: no GPU")]:
        rows.append(row._asdict())
        result.write_text(json.dumps(rows))
    known.write_text(json.dumps(machine.rates))


def run_all(names: Sequence[str], out: Path, is_small: bool) -> int:
    """Writes the files; returns 1 when a part failed."""
    report: dict[str, Any] = {}
    end = time.monotonic() + TOTAL_S
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for name in names:
            start = time.monotonic()
            report[name] = _in_process(name, Path(folder), is_small, min(PARTS[name][1], end - start))
            report[name]["seconds"] = round(time.monotonic() - start, 1)
            print(
                f"{name}: {report[name]['error'] or 'done'} ({report[name]['seconds']} s)",
                file=sys.stderr,
                flush=True,
            )
            (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
            (out / "gpu_check.md").write_text(as_markdown(report))
    print(as_markdown(report))
    return int(any(part["error"] for part in report.values()))


def _in_process(name: str, folder: Path, is_small: bool, limit_s: float) -> dict[str, Any]:
    """What the part found, however it ended."""
    if limit_s <= 0:
        return {"rows": [], "error": "not run: no time was left"}
    command = [
        sys.executable,
        "-m",
        "tools.gpu_check",
        "--part",
        name,
        "--folder",
        str(folder),
        *(["--small"] if is_small else []),
    ]
    error = ""
    # A session of its own: what the part has started ends with it.
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, words = process.communicate(timeout=limit_s)
            if process.returncode:
                error = (words.strip() or f"code {process.returncode}").splitlines()[-1][:500]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, words = process.communicate()
            error = f"not done within {limit_s:.0f} s"
        with contextlib.suppress(ProcessLookupError):  # what a part that broke has started
            os.killpg(process.pid, signal.SIGKILL)
    result = folder / f"{name}.rows.json"
    return {
        "rows": json.loads(result.read_text()) if result.exists() else [],
        "error": error,
        "stderr": words[-4000:] if error else "",
    }


def as_markdown(report: dict[str, Any]) -> str:
    lines = ["| what | figure | share | wanted | against | |", "| --- | --- | --- | --- | --- | --- |"]
    for name, part in report.items():
        for row in (Row(**fields) for fields in part["rows"]):
            share = "" if row.share is None else f"{row.share:.2f}"
            wanted = "" if row.wanted is None else f"{'≥' if row.wanted > 0 else '≤'} {abs(row.wanted):g}"
            lines.append(f"| {row.what} | {row.value} | {share} | {wanted} | {row.against} | {row.verdict} |")
        if part["error"]:
            lines.append(f"| {name} | failed: {part['error']} | | | | |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the files")
    parser.add_argument(
        "--small",
        action="store_true",
        help="tiny sizes, and where there is no GPU the CPU: to try the command itself",
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is None:
        return run_all(args.parts, args.out, args.small)
    run_part(args.part, args.folder, args.small)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
