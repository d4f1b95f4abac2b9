#!/usr/bin/env python
"""Check correctness and speed of kd_d2 on this machine's GPU: tests, kernels, training iterations and a profile.

    benchmarks/gpu_check.py [--output output/gpu-check] [--only STAGE ...] [--minutes 8]

No downloads are needed: data and weights are synthetic. A stage that exceeds its time limit is stopped, and the next
one starts. summary.md has the tables, and each stage has a log. The exit status is 1 if a stage failed.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FAILED_TO_END = 124
# test_gpu_tools.py has no CUDA tests, and needs kd_d2 installed.
CUDA_TESTS = ["-m", "slow or not slow", "-k", "cuda or gpu", "--ignore=tests/test_gpu_tools.py", "tests"]


@dataclass(frozen=True)
class Stage:
    """One stage of the check.

    Attributes:
        command: arguments of Python; {folder} is replaced with the output folder.
        seconds: time limit.
    """

    command: list[str]
    seconds: int


def _benchmark(program: str, *arguments: str) -> list[str]:
    return [str(HERE / program), *arguments]


def _step(pair: str, batch: int) -> list[str]:
    return _benchmark("step.py", "--pair", pair, "--batch", str(batch), "--rounds", "5", "--output", f"{{folder}}/step-{pair}-{batch}.json")  # fmt: skip


STAGES = {
    "environment": Stage(["-m", "detectron2.utils.collect_env"], 60),
    "tests": Stage(["-m", "pytest", "-q", *CUDA_TESTS], 180),
    **{
        name: Stage(_benchmark("losses.py", name, "--output", f"{{folder}}/{name}.json"), 90)
        for name in ("ssim", "icd", "soft-label")
    },
    "profile": Stage(
        _benchmark("profile_step.py", "--pair", "coco", "--batch", "8", "--methods", "StructuralKD", "ICD"), 90
    ),
    "step-coco-8": Stage(_step("coco", 8), 120),
    "step-coco-16": Stage(_step("coco", 16), 150),
    "step-coco-faster-rcnn-8": Stage(_step("coco-faster-rcnn", 8), 120),
}


def run_stage(stage: Stage, log: Path, deadline: float) -> int:
    """Run a stage, write its output to the log, and return its exit code."""
    command = [sys.executable, *(argument.format(folder=log.parent) for argument in stage.command)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(1.0, min(stage.seconds, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            return FAILED_TO_END
        finally:
            with contextlib.suppress(ProcessLookupError):  # none is left
                os.killpg(process.pid, signal.SIGKILL)  # including the processes that the stage started


def tables(log: Path) -> list[str]:
    """Return the Markdown tables of a log, each with the line above it."""
    lines = log.read_text(errors="replace").splitlines()
    kept = []
    for above, line in zip(["", *lines], lines):
        if line.startswith("|"):
            kept += [line] if above.startswith("|") else ["", above, "", line]
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu-check")
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of all stages together")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "PyTorch finds no GPU on this machine: check the output of nvidia-smi, and whether this PyTorch is a CUDA build."
        )
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    summary, failed = ["# GPU check", "", "| stage | result | s |", "|---|---|---|"], []
    details: list[str] = []
    for name in args.only:
        log, start = folder / f"{name}.log", time.monotonic()
        code = run_stage(STAGES[name], log, begin + 60 * args.minutes)
        result = {0: "passed", FAILED_TO_END: "stopped: out of time"}.get(code, f"failed with exit code {code}")
        failed += [name] if code else []
        print(f"{name}: {result}, {time.monotonic() - start:.0f} s, {log}", flush=True)
        summary.append(f"| {name} | {result} | {time.monotonic() - start:.0f} |")
        found = tables(log)
        details += ["", f"## {name}", *found] if found else []
    (folder / "summary.md").write_text("\n".join([*summary, *details, ""]))
    print(f"{folder / 'summary.md'} has the tables" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
