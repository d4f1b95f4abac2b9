"""Signals, timed checkpoints and locks: a stopped training loses nothing, and two trainings cannot share a folder."""

from __future__ import annotations

import argparse
import errno
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from kd_d2 import UserError
from kd_d2.checkpoint import KDCheckpointer, read_checkpoint
from kd_d2.engine import checkpoints, folder_lock, launch, lost_ranks, setup
from kd_d2.engine.folder_lock import lock_folder, unlock_folder
from kd_d2.engine.stop_request import StopRequest, TrainingStopped
from kd_d2.engine.trainer import KDTrainer
from kd_d2.files import atomic_write, link_or_copy, temporary_folder, write_text
from kd_d2.random_state import preserved_random_state
from kd_d2.signals import SIGNALS, exit_on_signals

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from helpers import Project, clean_process, fill_the_disk, make_project, make_trainer, run_command, run_train_net, train

SHORT = {
    "SEED": 7,
    "SOLVER__MAX_ITER": 8,
    "SOLVER__STEPS": (),
    "SOLVER__BASE_LR": 0.00002,
    "SOLVER__CHECKPOINT_PERIOD": 100,
}


class After(HookBase):
    """Calls a function after an iteration."""

    def __init__(self, iteration: int, function: Callable[[], object]):
        self.iteration = iteration
        self.function = function

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.function()


@pytest.fixture
def of_terminal() -> Iterator[None]:
    """Handle Ctrl-C as in a terminal, also if pytest runs in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def stop_in(project: Project, iteration: int, number: int = signal.SIGTERM, *opts: object) -> TrainingStopped:
    """Train until the signal, which is sent at the beginning of the given iteration; return the exception."""

    class Before(After):
        def before_step(self) -> None:
            super().after_step()

        def after_step(self) -> None:
            pass

    with pytest.raises(TrainingStopped) as stopped:
        train(project, *opts, hooks=(Before(iteration, send(number)),))
    return stopped.value


@pytest.fixture(scope="module")
def unbroken_losses(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """Return the losses of an uninterrupted training with the keys SHORT."""
    return train(make_project(tmp_path_factory.mktemp("unbroken"), **SHORT)).losses


@pytest.mark.usefixtures("of_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_loses_no_iteration(
    tmp_path: Path, number: int, unbroken_losses: dict[int, dict[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    """Check the exit status, the checkpoint of that iteration, and that resumed losses match an uninterrupted run's."""
    project = make_project(tmp_path / "stopped", **SHORT)
    handlers = [signal.getsignal(n) for n in SIGNALS]
    assert stop_in(project, 4, number).code == 128 + number
    assert handlers == [signal.getsignal(n) for n in SIGNALS]
    path = project.output / "model_latest.pth"
    assert read_checkpoint(str(path))["iteration"] == 4
    name = signal.Signals(number).name
    assert f"{name}: training stopped after iteration 4; --resume continues from {path}" in caplog.text
    resumed = train(project, resume=True)
    assert sorted(resumed.losses) == [5, 6, 7]
    for iteration, losses in resumed.losses.items():
        assert losses == pytest.approx(unbroken_losses[iteration], rel=1e-3), iteration
    assert (project.output / "last_checkpoint").read_text() == "model_final.pth"


def test_a_signal_after_an_evaluation(tmp_path: Path) -> None:
    """Check that the iteration is completed, as before one."""
    project = make_project(tmp_path, **SHORT, TEST__EVAL_PERIOD=2)
    stop_in(project, 2)
    assert read_checkpoint(str(project.output / "model_latest.pth"))["iteration"] == 2


def test_a_signal_in_the_last_iteration(tmp_path: Path) -> None:
    """Check that the final checkpoint is written and evaluation is left to the next run."""
    project = make_project(tmp_path, **SHORT)
    stop_in(project, 7)
    assert [path.name for path in project.output.glob("*.pth")] == ["model_final.pth"]
    run = train(project, resume=True)
    assert run.losses == {} and "bbox" in run.trainer._last_eval_results


class FailsAtTheEnd(HookBase):
    def after_train(self) -> None:
        raise RuntimeError("can't start new thread")


def test_an_error_of_a_hook_after_one_of_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that the first error is reported, and that without it the second one is."""
    project = make_project(tmp_path, **SHORT)

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    with pytest.raises(UserError, match="Out of memory"):
        train(project, hooks=(After(0, fail), FailsAtTheEnd()))
    assert "FailsAtTheEnd also failed, after the error of the training: can't start new thread" in caplog.messages
    with pytest.raises(UserError, match="No more processes or threads"):
        train(project, "SOLVER.MAX_ITER", 1, hooks=(FailsAtTheEnd(),))


def test_metrics_that_a_full_disk_has_cut_off(tmp_path: Path) -> None:
    """Check that the rows of the next training begin on a line of their own."""
    project = make_project(tmp_path, **SHORT)
    project.output.mkdir()
    metrics = project.output / "metrics.json"
    for before, after in (("", ""), ('{"iter', '{"iter\n'), ('{"iter\n', '{"iter\n')):
        metrics.write_text(before)
        with clean_process():
            make_trainer(project)
        assert metrics.read_text() == after


def test_an_error_in_the_last_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that weights without a checkpoint are not evaluated."""
    monkeypatch.setattr(KDTrainer, "test", lambda *args: pytest.fail("evaluated"))

    def fail() -> None:
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        train(make_project(tmp_path, **SHORT, TEST__EVAL_PERIOD=8), hooks=(After(7, fail),))


def test_a_signal_in_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that evaluation ends at the next image, and that the iterations before it are in a checkpoint."""
    project = make_project(tmp_path, **SHORT, TEST__EVAL_PERIOD=3)
    build, seen = KDTrainer.build_test_loader, []

    def images(cfg, name):
        for number, batch in enumerate(build(cfg, name)):
            if number == 2:
                send(signal.SIGTERM)()
            seen.append(number)
            yield batch

    class Loader:
        def __init__(self, *args):
            self.args = args

        def __len__(self):
            return 6

        def __iter__(self):
            return images(*self.args)

    monkeypatch.setattr(KDTrainer, "build_test_loader", lambda *args: Loader(*args))
    with pytest.raises(TrainingStopped):
        train(project)
    assert seen == [0, 1, 2]
    assert read_checkpoint(str(project.output / "model_latest.pth"))["iteration"] == 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_signals_that_are_ignored_stop_nothing(number: int) -> None:
    """Check a closed terminal under nohup, and Ctrl-C in the background of a script."""
    child = os.fork()
    if child == 0:
        signal.signal(number, signal.SIG_IGN)
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            os._exit(stop.number)
    assert os.waitpid(child, 0)[1] == 0


def test_ranks_in_the_background_of_a_script_end_with_their_launcher() -> None:
    """Check that a rank does not ignore SIGINT, which it receives when its parent process dies."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            sys.modules[launch.__module__]._explaining_errors(lambda args: send(signal.SIGINT)(), argparse.Namespace())
        except KeyboardInterrupt:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_terminal_that_is_closed() -> None:
    """Check that the signal is recorded if standard error can no longer be written."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os._exit(stop.number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == signal.SIGHUP


def test_a_second_signal_ends_the_process_at_once() -> None:
    """Check that signals in quick succession count as one, and that a later one ends the process."""
    child = os.fork()
    if child == 0:
        with StopRequest() as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR1)
            if stop.number != signal.SIGUSR1:
                os._exit(1)
            stop._received -= 60
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            os._exit(2)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM


def test_a_second_signal_ends_the_first_process_of_a_container() -> None:
    """Check a process that signals with the default action do not end."""
    child = os.fork()
    if child == 0:
        stop = StopRequest()
        stop._receive(signal.SIGTERM, None)
        stop._received -= 60
        os.kill = lambda *args: None
        stop._receive(signal.SIGTERM, None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def test_signals_while_a_program_cleans_up() -> None:
    """Check that a second signal in quick succession does not interrupt it, and that Ctrl-C keeps its own exception."""
    cleaned, of_ctrl_c = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as left, exit_on_signals():
        assert signal.getsignal(signal.SIGINT) is of_ctrl_c
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)
    assert left.value.code == 128 + signal.SIGTERM and cleaned == [True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_leaves_no_temporary_folder(tmp_path: Path, number: int) -> None:
    child = os.fork()
    if child == 0:
        try:
            with temporary_folder(dir=tmp_path):
                os.kill(os.getpid(), number)
                time.sleep(5)
        except SystemExit as end:
            os._exit(end.code)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    assert not list(tmp_path.iterdir())


def test_a_training_in_another_thread() -> None:
    """Check that Python's refusal of signal handlers there is not an error."""
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: StopRequest().__enter__().number).result() == 0


def test_checkpoints_by_time(tmp_path: Path) -> None:
    """Check with an interval of almost 0 that every iteration has a checkpoint, which replaces the previous one."""
    project = make_project(tmp_path, **SHORT)
    seen = []

    def note() -> None:
        seen.append(read_checkpoint(str(project.output / "model_latest.pth"))["iteration"])

    train(project, "SOLVER.CHECKPOINT_MINUTES", 1e-9, hooks=(After(2, note), After(5, note)))
    assert seen == [2, 5]
    assert sorted(path.name for path in project.output.glob("*.pth")) == ["model_final.pth", "model_latest.pth"]


@pytest.mark.parametrize(("minutes", "expected"), [(2.0, [None, None, None, 3, 3]), (0.0, [None] * 5)])
def test_checkpoints_every_two_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, expected: list[int | None]
) -> None:
    """Check iterations at 0, 50, 100, 150 and 200 seconds: only the fourth is more than 120 after the last checkpoint.

    With 0 minutes, no checkpoint is written by time.
    """
    project, clock, seen = make_project(tmp_path, **SHORT), [0.0], []
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def note() -> None:
        path = project.output / "model_latest.pth"
        seen.append(read_checkpoint(str(path))["iteration"] if path.exists() else None)
        clock[0] += 50

    train(project, "SOLVER.CHECKPOINT_MINUTES", minutes, hooks=[After(iteration, note) for iteration in range(5)])
    assert seen == expected


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_last_checkpoints_are_kept(tmp_path: Path, asynchronous: bool) -> None:
    """Check a folder with checkpoints of an earlier, longer training, written when the clock was ahead."""
    project = make_project(tmp_path, **{**SHORT, "SOLVER__CHECKPOINT_PERIOD": 2})
    project.output.mkdir()
    ahead = time.time() + 3600
    for number in (0, 98, 99):
        path = project.output / f"model_{number:07d}.pth"
        path.touch()
        os.utime(path, (ahead, ahead))
    keys = "SOLVER.CHECKPOINTS_TO_KEEP", 2, "SOLVER.CHECKPOINT_ASYNC", asynchronous
    run = train(project, *keys)
    assert run.trainer.checkpointer.asynchronous == asynchronous
    names = ["model_0000005.pth", "model_0000007.pth", "model_final.pth"]
    assert sorted(path.name for path in project.output.glob("model*")) == names
    final = read_checkpoint(str(project.output / "model_final.pth"))["model"]
    for name, tensor in run.trainer.bare_model.student.state_dict().items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=0)


def test_the_best_checkpoint_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check with APs of 10, 30, NaN and 20 that the second one's is kept, also if training is resumed in between."""
    project = make_project(tmp_path, **SHORT, TEST__EVAL_PERIOD=2)
    aps = iter([10.0, 30.0, float("nan"), 20.0])
    monkeypatch.setattr(KDTrainer, "test", lambda *args: {"bbox": {"AP": next(aps)}})
    best = project.output / "model_best.pth"
    seen = []

    def note() -> None:
        seen.append(read_checkpoint(str(best))["iteration"])

    with pytest.raises(TrainingStopped):
        train(project, hooks=(After(1, note), After(3, note), After(3, send(signal.SIGTERM))))
    train(project, resume=True)
    note()
    assert seen == [1, 3, 3]
    assert json.loads((project.output / "model_best.json").read_text()) == {"AP": 30.0}


def test_the_best_of_a_new_training_in_an_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a higher AP of an earlier training never counts, and that the evaluation after the end does."""
    project = make_project(tmp_path, **SHORT, TEST__EVAL_PERIOD=4)
    project.output.mkdir()
    (project.output / "model_best.json").write_text('{"AP": 90.0}')
    stop_in(project, 1)  # before the first evaluation
    aps = iter([10.0, 20.0])
    monkeypatch.setattr(KDTrainer, "test", lambda *args: {"bbox": {"AP": next(aps)}})
    train(project, resume=True)
    assert json.loads((project.output / "model_best.json").read_text()) == {"AP": 20.0}
    assert read_checkpoint(str(project.output / "model_best.pth"))["iteration"] == 7


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_first_of_equally_good_checkpoints_is_kept(tmp_path: Path, asynchronous: bool) -> None:
    """Check also checkpoints that are still being written after their evaluation."""

    class Slow(KDCheckpointer):
        def _write(self, data: dict, path: str) -> None:
            time.sleep(0.05)
            super()._write(data, path)

    checkpointer = Slow(torch.nn.Linear(2, 2), str(tmp_path))
    checkpointer.asynchronous = asynchronous
    results: dict = {}
    hook = checkpoints.BestCheckpoint(checkpointer, lambda: results)
    for number, ap in enumerate((20.0, 30.0, 30.0, 10.0)):
        checkpointer.save("model_latest", iteration=number)
        results = {"bbox": {"AP": ap}}
        hook.after_step()
    checkpointer.wait()
    assert read_checkpoint(str(tmp_path / "model_best.pth"))["iteration"] == 1


def test_the_first_test_set_decides_which_checkpoint_is_the_best(tmp_path: Path) -> None:
    checkpointer = KDCheckpointer(torch.nn.Linear(2, 2), str(tmp_path))
    results: dict = {}
    hook = checkpoints.BestCheckpoint(checkpointer, lambda: results)
    for number, (first, second) in enumerate(((20.0, 40.0), (30.0, 10.0), (10.0, 50.0))):
        checkpointer.save("model_latest", iteration=number)
        results = {"z": {"bbox": {"AP": first}}, "a": {"bbox": {"AP": second}}}
        hook.after_step()
    assert read_checkpoint(str(tmp_path / "model_best.pth"))["iteration"] == 1


@pytest.mark.parametrize(("metric", "best"), [("segm/AP", 1), ("bbox/AP50", 2), ("bbox/AP-a/b", 0), ("f1", 3)])
def test_the_metric_of_the_best_checkpoint(tmp_path: Path, metric: str, best: int) -> None:
    """Check metrics of boxes, masks, a class and an evaluator of one's own, and what a resumed training remembers."""
    checkpointer = KDCheckpointer(torch.nn.Linear(2, 2), str(tmp_path))
    numbers: list[tuple[float, ...]] = [(1, 1, 9, 1), (2, 9, 8, 2), (9, 2, 7, 3), (8, 3, 6, 9)]
    results: dict = {}
    hook = checkpoints.BestCheckpoint(checkpointer, lambda: results, metric)
    for iteration, (ap50, mask, of_class, f1) in enumerate(numbers):
        checkpointer.save("model_latest", iteration=iteration)
        results = {"bbox": {"AP": 0.0, "AP50": ap50, "AP-a/b": of_class}, "segm": {"AP": mask}, "f1": f1}
        hook.after_step()
    assert read_checkpoint(str(tmp_path / "model_best.pth"))["iteration"] == best
    assert json.loads((tmp_path / "model_best.json").read_text()) == {metric: 9.0}
    for resumed, remembered in ((metric, 9.0), ("bbox/AP", -math.inf)):
        other = checkpoints.BestCheckpoint(checkpointer, lambda: results, resumed)
        other.load_state_dict(hook.state_dict())
        other.trainer = SimpleNamespace(start_iter=3)
        assert other.best == remembered
        other.before_train()
        assert other.best == remembered
    other.load_state_dict({"best": 5.0})  # of a checkpoint that was written before there were other metrics
    assert other.best == 5.0


def test_a_metric_that_the_evaluation_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = KDCheckpointer(torch.nn.Linear(2, 2), str(tmp_path))
    evaluations = [{"f1": 0.5, "ap": 0.25}, {"bbox": 0.5}, {"bbox": {"AP": None, "APs": 2.0, "AP-cat": 3.0}}]
    for results in evaluations:
        checkpoints.BestCheckpoint(checkpointer, lambda results=results: results).after_step()
    assert not list(tmp_path.iterdir())
    start = "model_best.pth is not written: TEST.BEST_METRIC is 'bbox/AP', but the evaluation gives "
    assert caplog.messages == [f"{start}f1, ap.", f"{start}bbox.", f"{start}bbox/AP, bbox/APs."]


def test_an_ap_that_is_not_a_number_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    results: dict = {}
    hook = checkpoints.BestCheckpoint(KDCheckpointer(torch.nn.Linear(2, 2), str(tmp_path)), lambda: results)
    for _ in range(2):
        results = {"bbox": {"AP": float("nan")}}
        hook.after_step()
    expected = "model_best.pth is not written while AP is NaN, as it is without objects in the test set."
    assert caplog.messages == [expected] and not list(tmp_path.iterdir())


def test_the_best_checkpoint_is_kept_if_the_training_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a checkpoint that was the best in an evaluation after which no other was written."""
    project = make_project(tmp_path, **SHORT, TEST__EVAL_PERIOD=2)
    aps = iter([10.0, 30.0, 20.0, 20.0])
    monkeypatch.setattr(KDTrainer, "test", lambda *args: {"bbox": {"AP": next(aps)}})

    def kill() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(project, hooks=(After(3, kill),))
    train(project, resume=True)
    assert read_checkpoint(str(project.output / "model_best.pth"))["iteration"] == 3


def test_an_asynchronous_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the next call raises a UserError, and that last_checkpoint names the previous checkpoint."""
    checkpointer = KDCheckpointer(torch.nn.Linear(2, 2), str(tmp_path))
    checkpointer.asynchronous = True
    checkpointer.save("model_0000000", iteration=0)
    checkpointer.wait()
    fill_the_disk(monkeypatch, tmp_path / "model_0000001.pth")
    checkpointer.save("model_0000001", iteration=1)
    with pytest.raises(UserError, match=r"model_0000001\.pth cannot be written"):
        checkpointer.wait()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000000.pth"


def test_the_last_asynchronous_write_of_a_training_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path, **SHORT)
    project.output.mkdir()
    fill_the_disk(monkeypatch, project.output / "model_final.pth")
    with pytest.raises(UserError, match=r"model_final\.pth cannot be written"):
        train(project, "SOLVER.CHECKPOINT_ASYNC", True)


def test_a_link_to_a_checkpoint_and_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that what the old link links to is kept, repeated links, which leave no file, and a file system without links."""
    old, new, target = tmp_path / "old", tmp_path / "new", tmp_path / "target"
    old.write_text("old")
    new.write_text("new")
    os.link(old, target)
    for _ in range(2):
        link_or_copy(str(new), str(target))
    assert {*tmp_path.iterdir()} == {old, new, target}
    assert target.samefile(new) and old.read_text() == "old"

    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(str(old), str(target))
    assert target.read_text() == "old" and not target.samefile(old)
    assert new.read_text() == "new"


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Check that the last one to finish replaces the file, and that its leftovers are deleted if they are old."""
    path = tmp_path / "result.json"
    old, new, other = (
        tmp_path / f"{name}.partial" for name in ("result.json.0123abcd", "result.json.4567cdef", "mine")
    )
    for file in (old, new, other):
        file.touch()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    with atomic_write(str(path)) as first:
        first.write("first")
        write_text(str(path), "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert {*tmp_path.iterdir()} == {path, new, other}


@pytest.mark.parametrize("name", ["a" * 255, "\u00e4" * 127])
def test_the_longest_names(tmp_path: Path, name: str) -> None:
    write_text(str(tmp_path / name), "content")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_checkpoints_that_a_killed_training_has_not_completed_are_deleted(tmp_path: Path) -> None:
    project = make_project(tmp_path, **SHORT)
    project.output.mkdir()
    (project.output / "model_0000003.pth.0123abcd.partial").touch()
    (project.output / "model_0000004.pth.partial").touch()  # of an earlier version
    (project.output / "model_0000003.pth.part").touch()
    run_train_net("--config-file", project.student, "DATASETS.TEST", "()")
    assert [path.name for path in project.output.glob("*.part*")] == ["model_0000003.pth.part"]


def test_an_asynchronous_write_has_the_weights_of_its_iteration(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    checkpointer = KDCheckpointer(model, str(tmp_path))
    checkpointer.asynchronous = True
    before = model.weight.detach().clone()
    checkpointer.save("model")
    model.weight.data.zero_()
    checkpointer.wait()
    assert torch.equal(read_checkpoint(str(tmp_path / "model.pth"))["model"]["weight"], before)


def test_a_folder_that_another_training_uses(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Check the message in another process, that one process may lock twice, and that a lock ends with its process."""
    project = make_project(tmp_path, **SHORT)
    project.output.mkdir()
    lock_folder(str(project.output))
    lock_folder(str(project.output))
    command = ("train", project.student, "SOLVER.MAX_ITER", 1)
    refused = multiprocessing.get_context("fork").Process(target=run_command, args=command)
    refused.start()
    refused.join()
    assert refused.exitcode == 2
    assert re.search(
        rf"^error: OUTPUT_DIR {re.escape(str(project.output))} is in use by another training \(process {os.getpid()} on \S+\); choose another folder",
        capfd.readouterr().err,
        re.MULTILINE,
    )
    assert not (project.output / "config.yaml").exists()
    unlock_folder(str(project.output))
    child = os.fork()
    if child == 0:
        lock_folder(str(project.output))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    lock_folder(str(project.output))
    unlock_folder(str(project.output))


def test_a_finished_training_unlocks_its_folder(tmp_path: Path) -> None:
    project = make_project(tmp_path, SOLVER__MAX_ITER=1, SOLVER__STEPS=(), DATASETS__TEST=())
    project.main()
    child = os.fork()
    if child == 0:
        try:
            lock_folder(str(project.output))
        except UserError:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_an_evaluation_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the last checkpoint of a training that is running can be evaluated in its folder."""
    project = make_project(tmp_path)
    monkeypatch.setattr(sys.modules[setup.__module__], "lock_folder", lambda folder: pytest.fail("locked"))
    assert "bbox" in project.main("--eval-only", "MODEL.WEIGHTS", project.teacher_weights)


def test_a_folder_that_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", refuse)
    lock_folder(str(tmp_path))
    unlock_folder(str(tmp_path))
    assert caplog.messages == [
        f"OUTPUT_DIR {tmp_path} cannot be locked (No locks available): make sure that no other training uses it."
    ]


def test_the_log_says_that_the_folder_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path, **SHORT)

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", refuse)
    args = argparse.Namespace(
        config_file=str(project.student), opts=[], resume=False, eval_only=False, eval_teacher=False
    )
    with clean_process(), preserved_random_state():
        setup(args)
    unlock_folder(str(project.output))
    assert f"OUTPUT_DIR {project.output} cannot be locked" in (project.output / "log.txt").read_text()


def test_ctrl_c_before_a_training(tmp_path: Path) -> None:
    """Check that one word is printed, and no traceback."""
    process = subprocess.Popen(
        # A program that a shell starts in the background ignores Ctrl-C, and so do its child processes.
        [sys.executable, "-c", "from kd_d2.cli import main; import signal, time, kd_d2.cli.config as c; "
         "signal.signal(signal.SIGINT, signal.default_int_handler); "
         "c.run = lambda a: (print('here', flush=True), time.sleep(30)); main(['config', 'list'])"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and error == "interrupted\n"


def _started(project: Project, *options: str) -> subprocess.Popen:
    """Start a training in two processes with output in the file `log`, and wait for its first iterations."""
    program = [sys.executable, "-m", "kd_d2", "train", str(project.student), "--num-gpus", "2"]
    command = [*program, *options, "MODEL.DEVICE", "cpu"]
    with open(project.folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = project.output / "metrics.json"
    while process.poll() is None and not (metrics.exists() and "iteration" in metrics.read_text()):
        time.sleep(0.1)
    assert process.poll() is None, (project.folder / "log").read_text()
    return process


def _ranks(process: subprocess.Popen) -> list[int]:
    """Return the process ids of the ranks: all children except helpers of multiprocessing."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


LONG = {**SHORT, "SOLVER__MAX_ITER": 100_000}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["parent", "one rank"])
def test_two_ranks_stop_together(tmp_path: Path, target: str) -> None:
    """Check that a signal to the program or to one rank stops both, and that the checkpoint has the state of both."""
    process = _started(make_project(tmp_path, **LONG))
    os.kill(process.pid if target == "parent" else _ranks(process)[1], signal.SIGTERM)
    status, log = process.wait(timeout=60), (tmp_path / "log").read_text()
    assert status == 128 + signal.SIGTERM, log
    found = re.search(r"SIGTERM: training stopped after iteration (\d+)", log)
    checkpoint = read_checkpoint(str(tmp_path / "output" / "model_latest.pth"))
    assert checkpoint["iteration"] == int(found[1])
    assert len(checkpoint["trainer"]["other_workers"]) == 1
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other(tmp_path: Path) -> None:
    process = _started(make_project(tmp_path, **LONG))
    os.kill(_ranks(process)[1], signal.SIGKILL)
    assert process.wait(timeout=120) == 2
    log = (tmp_path / "log").read_text()
    assert "error: Rank 1 was killed (SIGKILL), most likely because it ran out of memory" in log
    assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_the_other(tmp_path: Path, rank: int) -> None:
    """Check one rank stopped by SIGSTOP: after --rank-timeout the other one names it, and the program ends."""
    process = _started(make_project(tmp_path, **LONG), "--rank-timeout", "0.1")
    os.kill(_ranks(process)[rank], signal.SIGSTOP)
    assert process.wait(timeout=180) == 2
    log = (tmp_path / "log").read_text()
    assert re.search(
        rf"^error: Rank {rank} no longer responds \(killed, out of memory, or no progress within --rank-timeout\); rank {1 - rank} "
        r"stops too \(Timed out waiting 6000ms for recv operation to complete\); there is no checkpoint yet\.$",
        log,
        re.MULTILINE,
    )
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_rank_without_memory_ends_the_other(tmp_path: Path) -> None:
    """Check two ranks started by torchrun, one of which runs out of memory."""
    project = make_project(tmp_path, **LONG)
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, torch\nfrom kd_d2.cli import main\nfrom kd_d2.engine import KDTrainer\n"
        "step = KDTrainer.run_step\n"
        "def greedy(self):\n"
        "    if os.environ['RANK'] == '1' and self.iter == 3: torch.zeros(2**50)\n"
        "    step(self)\n"
        "KDTrainer.run_step = greedy\n"
        f"main(['train', {str(project.student)!r}, 'MODEL.DEVICE', 'cpu'])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 1
    assert "error: Out of memory (" in done.stderr
    assert "error: Rank 1 no longer responds" in done.stderr or "SIGTERM: stopping" in done.stderr


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_the_training_is_the_same(tmp_path: Path) -> None:
    """Check that after a kill of one of two ranks between checkpoints the final weights are those of a normal run."""
    found = []
    for name in ("undisturbed", "killed"):
        project = make_project(tmp_path / name, **{**SHORT, "SOLVER__CHECKPOINT_PERIOD": 3})
        script, mark = tmp_path / name / "rank.py", tmp_path / name / "mark"
        if name == "undisturbed":
            mark.touch()
        script.write_text(
            "import os, signal\nfrom kd_d2.cli import main\nfrom kd_d2.engine import KDTrainer\n"
            "step = KDTrainer.run_step\n"
            "def killed_once(self):\n"
            f"    if os.environ['RANK'] == '1' and self.iter == 5 and not os.path.exists({str(mark)!r}):\n"
            f"        open({str(mark)!r}, 'w').close()\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    step(self)\n"
            "KDTrainer.run_step = killed_once\n"
            f"main(['train', {str(project.student)!r}, '--resume', 'MODEL.DEVICE', 'cpu'])\n"
        )
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*torchrun, "--max-restarts", "1", str(script)],
            capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("Resuming from" in done.stderr + done.stdout) == (name == "killed")
        found.append(read_checkpoint(str(project.output / "model_final.pth")))
    whole, restarted = found
    assert whole["iteration"] == restarted["iteration"] == 7
    torch.testing.assert_close(restarted["model"], whole["model"])


NCCL_ERROR = (
    "NCCL error in: /a/b.cpp:1, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.29.7\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \nLast error:\n"
)
NCCL_HINTS = (
    "give the container more /dev/shm, free memory on the GPU, or see the log that NCCL writes with NCCL_DEBUG=INFO"
)


@pytest.mark.parametrize(("message", "silent", "expected"), [
    ("[/a/b.cc:1] Timed out waiting 60ms for recv. See", [1], "Rank 1 no longer responds (killed, out of memory, or no progress "
     "within --rank-timeout); rank 0 stops too (Timed out waiting 60ms for recv)"),
    (f"{NCCL_ERROR}Error while creating /dev/shm/nccl-1, error: No space left on device (28)", [],
     f"NCCL failed on rank 0 (Error while creating /dev/shm/nccl-1, error: No space left on device (28)): {NCCL_HINTS}"),
    (f"{NCCL_ERROR}Connection closed", [1], "Rank 1 no longer responds (killed, out of memory, or no progress within --rank-timeout); "
     "rank 0 stops too (Connection closed)"),
    (NCCL_ERROR, [], "NCCL failed on rank 0 (ncclSystemError: System call (e.g. socket, malloc) or external library call failed or "
     f"device error): {NCCL_HINTS}"),
    ("a mistake of ours", [1], None),
])  # fmt: skip
def test_sentences_of_lost_ranks(
    monkeypatch: pytest.MonkeyPatch, message: str, silent: list[int], expected: str | None
) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(lost_ranks, "ranks_that_are_silent", lambda: silent)
    assert lost_ranks.explain_lost_ranks(RuntimeError(message)) == expected
