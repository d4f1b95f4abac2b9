"""Execution of the unfinished cells of a sweep: each in its own process, several in parallel."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from ..checkpoint import checkpoint_files
from ..config import read_config
from ..errors import UserError
from ..files import read_json, write_json
from ..signals import deferred_signals, exit_on_signals
from ..text import printable
from ..typed_json import from_tree
from .matrix import Cell, Matrix
from .results import (
    METRICS,
    OTHER_TASKS,
    read_curves,
    read_metrics,
    read_multipliers,
    read_outcome,
    read_result,
    read_versions,
    result_path,
    training_cost,
    written_rows,
)
from .settings import (
    CHECKSUMS,
    EPOCHS,
    LENGTH,
    first_difference,
    measured_settings,
    of_evaluation,
    without_locations,
)


def program() -> tuple[str, ...]:
    """Return the command kd-d2, which searches the current folder for modules only if this process does."""
    searches_current_folder = {"", os.getcwd()} & {*sys.path}
    return (sys.executable, *([] if searches_current_folder else ["-P"]), "-m", "kd_d2")


PROGRAM = program()
logger = logging.getLogger(__name__)

SETTINGS = "sweep_settings.json"
"""The file in a training's folder with the settings that it was started with, see `measured_settings`."""

# Idle threads sleep. Spinning, the default of OpenMP runtimes, would occupy cores that other jobs need.
SLEEPING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


@dataclass
class Job:
    """One process: a training of one cell with one seed, or the evaluation of the teacher.

    Attributes:
        cell, seed: the cell and seed to measure.
        command: arguments of kd-d2.
        output: the OUTPUT_DIR.
        result: the JSON file that exists once the job has finished.
        settings: the keys that determine the result, see `measured_settings`.
        outcome: the file in `output` with the scores.
        gpu: the only GPU that the process sees, as in CUDA_VISIBLE_DEVICES; None for all.
    """

    cell: str
    seed: int
    command: list[str]
    output: str
    result: str
    settings: dict[str, Any]
    outcome: str = "train.json"
    process: subprocess.Popen | None = None
    lock: IO | None = None
    started: float = 0.0
    reported: int = -1
    metrics_size: int = 0
    gpu: str | None = None

    @property
    def name(self) -> str:
        return f"{self.cell} seed {self.seed}"


@exit_on_signals()
def run_jobs(jobs: list[Job], parallel: int, threads: int, gpus: Sequence[str] = ()) -> list[Job]:
    """Run every job that has no result yet, and write its result file if it succeeds.

    Jobs that another sweep is running are skipped. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C stop all jobs, each with a checkpoint.

    Args:
        parallel: number of parallel processes.
        threads: number of CPU threads per process.
        gpus: GPUs to distribute the processes over, one each; empty for all GPUs for each.

    Returns:
        The jobs that failed.

    Raises:
        UserError: a result or a checkpoint has different settings.
    """
    waiting = [job for job in jobs if not is_finished(job)]
    for job in waiting:
        _check_checkpoint(job)
    running: list[Job] = []
    failed: list[Job] = []
    logger.info(f"{len(jobs) - len(waiting)} of {len(jobs)} cells are already finished")
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                if not _claim(job):
                    logger.info(f"{job.name}: skipped, another process is training it in {job.output}")
                elif is_finished(job):  # by another sweep in the meantime
                    job.lock.close()
                else:
                    job.gpu = min(gpus, key=[other.gpu for other in running].count, default=None)
                    with deferred_signals():  # none may end this process before the job is in the list
                        running.append(_start(job, threads))
            time.sleep(0.5)
            for job in list(running):
                _report_progress(job)
                if job.process.poll() is not None:
                    running.remove(job)
                    with job.lock:
                        if not _finish(job):
                            failed.append(job)
    finally:
        for job in running:  # each writes a checkpoint
            job.process.terminate()
        for job in running:
            job.process.wait()
    return failed


def training_job(cell: Cell, seed: int, output: str, results: str, opts: list[Any], imports: Sequence[str] = ()) -> Job:
    """Create the job that trains a cell.

    Args:
        output: folder of all runs.
        results: folder of the JSON files of finished cells.
        opts: overrides, applied before those of the cell.
        imports: modules and files that the process imports first.
    """
    folder = os.path.join(output, cell.name, f"seed{seed}")
    opts = [*opts, *cell.opts]
    command = ["train", cell.config, "--resume", *_arguments(imports, opts), "SEED", str(seed), "OUTPUT_DIR", folder]
    return Job(
        cell.name, seed, command, folder, result_path(results, cell.name, seed), measured_settings(cell.config, opts)
    )


def teacher_evaluation(cell: Cell, output: str, results: str, opts: list[Any], imports: Sequence[str] = ()) -> Job:
    """Create the job that evaluates the teacher of a student's config; see `training_job`."""
    folder = os.path.join(output, "teacher")
    opts = [*opts, *cell.opts]
    command = ["eval", "--teacher-of", cell.config, *_arguments(imports, opts), "OUTPUT_DIR", folder]
    settings = of_evaluation(measured_settings(cell.config, opts))
    return Job("teacher", 0, command, folder, result_path(results, "teacher", 0), settings, "teacher.json")


def teacher_training(
    matrix: Matrix, output: str, results: str, opts: list[Any], imports: Sequence[str] = ()
) -> tuple[Job, list[Any]]:
    """Create the job that trains the teacher of the matrix, and the overrides that select it for the students.

    See `training_job`.
    """
    job = training_job(matrix.teacher, matrix.teacher.seeds[0], output, results, opts, imports)
    config, weights = (os.path.join(job.output, name) for name in ("student.yaml", "model_final.pth"))
    return job, ["MODEL.KD.TEACHER.CONFIG_FILE", config, "MODEL.KD.TEACHER.WEIGHTS", weights]


def _arguments(imports: Sequence[str], opts: list[Any]) -> list[str]:
    options = [option for name in imports for option in ("--import", name)]
    return [*options, *(o if isinstance(o, str) else _literal(o) for o in opts)]


def _literal(value: Any) -> str:
    """Return the Python literal of a value; that of an infinity is a number that is too large for a float."""
    return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)


def is_finished(job: Job) -> bool:
    """Return whether a job has a result.

    Raises:
        UserError: it was measured with different settings.
    """
    if not os.path.isfile(job.result):
        return False
    settings = read_result(job.result)["settings"]
    settings = settings if job.outcome == "train.json" else of_evaluation(settings)
    _check_settings(job, settings, f"{job.result} was measured", "the file, or choose another --results folder")
    return True


def _check_checkpoint(job: Job) -> None:
    """Raise a UserError if the job would resume a training with different settings, or files of other content."""
    config, written = os.path.join(job.output, "config.yaml"), os.path.join(job.output, SETTINGS)
    if job.outcome == "train.json" and os.path.isfile(config) and checkpoint_files(job.output):
        settings = without_locations(read_config(config))
        if os.path.isfile(written):
            started_with = from_tree(dict, read_json(written), written)
            kept = CHECKSUMS | (LENGTH if EPOCHS in started_with else set())
            settings = {key: value for key, value in settings.items() if key not in kept}
            settings |= {key: value for key, value in started_with.items() if key in kept}
        _check_settings(job, settings, f"{job.output} has a training", "the folder, or choose another --output")


def _check_settings(job: Job, before: dict[str, Any], what: str, where: str) -> None:
    difference = first_difference(before, job.settings)
    if difference:
        raise UserError(f"{what} with different settings ({difference}); move {where}.")


def _claim(job: Job) -> bool:
    """Lock the job's folder until its process and this one have ended; return False if it is already locked."""
    os.makedirs(job.output, exist_ok=True)
    job.lock = open(os.path.join(job.output, ".lock"), "w")  # noqa: SIM115
    try:
        fcntl.flock(job.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        job.lock.close()
        return False
    except OSError as error:  # from a file system without locks
        logger.warning(f"{job.output} cannot be locked ({error.strerror}): make sure that no other sweep uses it.")
    return True


def _start(job: Job, threads: int) -> Job:
    environment = {
        **SLEEPING_THREADS,
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        **({} if job.gpu is None else {"CUDA_VISIBLE_DEVICES": job.gpu}),
    }
    if job.outcome == "train.json":
        write_json(os.path.join(job.output, SETTINGS), job.settings)
    with open(os.path.join(job.output, "process.log"), "ab") as log:
        job.process = subprocess.Popen(
            [*PROGRAM, *job.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[job.lock.fileno()],
        )
    job.started = time.time()
    where = "" if job.gpu is None else f" on GPU {job.gpu}"
    logger.info(f"{job.name}: started{where}, log in {job.output}/process.log")
    return job


def _report_progress(job: Job) -> None:
    """Log a line for every tenth of the training."""
    path = os.path.join(job.output, METRICS)
    if not os.path.isfile(path) or os.path.getmtime(path) < job.started or os.path.getsize(path) == job.metrics_size:
        return
    job.metrics_size = os.path.getsize(path)
    written = [row for row in written_rows(job.output) if "total_loss" in row]
    if not written:
        return
    last = written[-1]["iteration"] + 1
    tenth = 10 * last // read_config(os.path.join(job.output, "config.yaml")).SOLVER.MAX_ITER
    if tenth > job.reported:
        job.reported = tenth
        minutes = (time.time() - job.started) / 60
        logger.info(f"{job.name}: iteration {last}, loss {written[-1]['total_loss']:.3f}, {minutes:.1f} min")


def _scores(outcome: dict[str, Any]) -> dict[str, float | None]:
    """Return the scores of boxes, except those of classes, and the AP of masks and keypoints; None without objects."""
    others = {column: outcome[task].get("AP") for column, task in OTHER_TASKS.items() if task in outcome}
    return {name: score for name, score in outcome["bbox"].items() if not name.startswith("AP-")} | others


def _last_line(path: str) -> str:
    """Return the last line of a log that is not empty, which ends the message of an error."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = deque((line.strip() for line in file if line.strip()), maxlen=1)
    return printable("".join(lines))


def _finish(job: Job) -> bool:
    """Write the result of a job whose process has ended; return False if it has failed."""
    minutes = (time.time() - job.started) / 60
    if job.process.returncode != 0:
        log = os.path.join(job.output, "process.log")
        reason = f" ({_last_line(log)})" if job.process.returncode > 0 else ""  # a killed process gives none
        logger.info(f"{job.name}: FAILED with exit status {job.process.returncode}{reason}, see {log}")
        return False
    try:
        outcome = read_outcome(os.path.join(job.output, job.outcome))
    except UserError as error:
        logger.info(f"{job.name}: FAILED: {error}")
        return False
    metrics = read_metrics(job.output)
    seconds, memory = training_cost(metrics)
    result = {
        "cell": job.cell,
        "seed": job.seed,
        "scores": {name: None if score is None else round(score, 4) for name, score in _scores(outcome).items()},
        "seconds_per_iteration": None if seconds is None else round(seconds, 4),
        "peak_memory_mib": memory,
        "multipliers": read_multipliers(metrics),
        "curves": read_curves(metrics),
        "settings": job.settings,
        "versions": read_versions(job.output),
    }
    os.makedirs(os.path.dirname(job.result), exist_ok=True)
    write_json(job.result, result, indent=None)
    ap = result["scores"].get("AP")
    has_ap = ap is not None and not math.isnan(ap)
    found = f"AP {ap:.2f}" if has_ap else "without AP, since the test set has no objects that count"
    logger.info(f"{job.name}: finished after {minutes:.1f} min, {found}")
    return True
