#!/usr/bin/env python
"""Train the cells of a sweep on one GPU, many in parallel, for a given number of minutes; run it again to continue.

    benchmarks/gpu_evidence.py [--sweep configs/evidence/long-matrix.yaml] [--name long-gpu] [--minutes 9] [--jobs N]
        [--cells NAME ...] [--seeds N ...] [KEY VALUE ...]

Small trainings leave most of a GPU idle. With NVIDIA's Multi-Process Service (MPS), their kernels run concurrently. It
is started for this program only, if available. When the time is up, every training writes a checkpoint and stops.
Finished cells are in projects/evidence/NAME; most of those in projects/evidence/long were measured on a CPU.
The overrides set the data and weights, as in projects/results.md.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kd_d2.cli.overrides import split_overrides
from kd_d2.cores import available_cores
from kd_d2.errors import UserError
from kd_d2.files import temporary_folder

ROOT = Path(__file__).resolve().parent.parent
MPS = "nvidia-cuda-mps-control"
ON_A_GPU = ["MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "False"]
GRACE_SECONDS = 60  # for checkpoints


@contextlib.contextmanager
def multi_process_service() -> Iterator[dict[str, str]]:
    """Start MPS and yield the environment variables to use it; if it does not start, say so and yield none."""
    program = shutil.which(MPS)
    with temporary_folder() as folder:
        environment = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        variables = {**os.environ, **environment}
        if program is None or subprocess.run([program, "-d"], env=variables).returncode:
            print(
                f"{MPS} is missing or does not start: trainings will take turns on the GPU, several times slower.",
                flush=True,
            )
            yield {}
            return
        try:
            yield environment
        finally:
            subprocess.run([program], input="quit\n", text=True, env=variables)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", default="configs/evidence/long-matrix.yaml")
    parser.add_argument("--name", default="long-gpu", help="name of the folders of runs and results")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, available_cores() // 2),
        help="number of parallel trainings (default half the cores)",
    )
    parser.add_argument("--cells", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", default=[])
    try:
        options, overrides = split_overrides(sys.argv[1:])
    except UserError as error:
        parser.error(str(error))
    args = parser.parse_args(options)
    command = [sys.executable, "-m", "kd_d2", "sweep", args.sweep, "--output", f"output/evidence-{args.name}"]
    command += [
        "--results",
        f"projects/evidence/{args.name}",
        "--report",
        f"output/report-{args.name}",
        "--jobs",
        str(args.jobs),
    ]
    for option, values in (("--cells", args.cells), ("--seeds", args.seeds)):
        command += [option, *values] if values else []
    with multi_process_service() as environment:
        sweep = subprocess.Popen(
            [*command, *ON_A_GPU, *overrides],
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            return sweep.wait(60 * args.minutes)
        except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):
            print("Every training writes a checkpoint and stops.", flush=True)
            sweep.send_signal(signal.SIGTERM)
            try:
                sweep.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"Trainings did not stop within {GRACE_SECONDS} s and are killed.", flush=True)
                os.killpg(sweep.pid, signal.SIGKILL)
                sweep.wait()
            return 0


if __name__ == "__main__":
    sys.exit(main())
