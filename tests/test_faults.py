"""Kills and faults: files on disk are complete, and training resumes with the losses of an uninterrupted run."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kd_d2 import UserError, load_config
from kd_d2.checkpoint import KDCheckpointer, checkpoint_files, read_checkpoint
from kd_d2.data.stream import MappedDataset
from kd_d2.engine import KDTrainer
from kd_d2.engine.failures import Failures
from kd_d2.engine.folder_lock import lock_folder, unlock_folder
from kd_d2.engine.step import NonFiniteLossError

import pytest
import torch
from detectron2.engine import HookBase
from helpers import KillAt, Project, fill_the_disk, make_project, make_trainer, run_train_net, train
from torch import Tensor

KILLS = 20
OFTEN = {
    "SEED": 7,
    "SOLVER__MAX_ITER": 4000,
    "SOLVER__STEPS": (),
    "SOLVER__BASE_LR": 0.00002,  # last digits on CPUs vary between runs; larger steps would amplify the differences
    "MODEL__KD__ICD__LR": 0.00001,
    "SOLVER__CHECKPOINT_PERIOD": 3,
    "MODEL__KD__DISTILLERS": ("StructuralKD", "ICD"),
    "MODEL__KD__ICD__DIM": 16,
    "MODEL__KD__ICD__NUM_HEADS": 2,
    "MODEL__KD__ICD__FFN_DIM": 32,
    "MODEL__KD__ICD__DETACH_STUDENT_ITERS": 4,
}


def _train_until_killed(project: Project) -> None:
    torch.set_num_threads(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1), os.dup2(devnull, 2)
    run_train_net("--config-file", project.student, "--resume")


def _whole_checkpoints(output: Path) -> list[int]:
    """Return the iterations of the folder's checkpoints; check that they and the other files are complete."""
    iterations = []
    for path in output.glob("*.pth"):
        content = read_checkpoint(str(path))
        assert content.keys() >= {"model", "distillers", "trainer", "iteration"}
        iterations.append(content["iteration"])
    tag = output / "last_checkpoint"
    assert not tag.exists() or (output / tag.read_text()).is_file()
    for name in ("student.yaml", "versions.json", "train.json"):
        path = output / name
        assert not path.exists() or path.read_text().endswith("\n")
    return sorted(iterations)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    """Check SIGKILL at random moments during startup, iterations and writing, and the losses after the last resume."""
    project = make_project(tmp_path / "killed", **OFTEN)
    draw = random.Random(0)
    startup, reached = None, []
    for _ in range(KILLS):
        process = multiprocessing.get_context("fork").Process(target=_train_until_killed, args=(project,))
        started = time.monotonic()
        process.start()
        if startup is None:
            while process.is_alive() and not list(project.output.glob("*.pth")):
                time.sleep(0.01)
            startup = time.monotonic() - started
        else:
            time.sleep(draw.uniform(0.02, 2) * startup)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if project.output.is_dir():
            reached.append(max(_whole_checkpoints(project.output), default=-1))
    assert reached == sorted(reached) and reached[-1] > 20
    last = reached[-1] + 1
    resumed = train(project, resume=True, hooks=(KillAt(last + 4),))
    assert min(resumed.losses) == last
    shutil.rmtree(project.output)
    unbroken = train(project, "SOLVER.CHECKPOINT_PERIOD", 10**6, hooks=(KillAt(last + 4),), seed=OFTEN["SEED"])
    for iteration, losses in resumed.losses.items():
        assert losses == pytest.approx(unbroken.losses[iteration], rel=5e-3), iteration


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


SAVED_EVERY_OTHER = {**OFTEN, "SOLVER__MAX_ITER": 8, "SOLVER__CHECKPOINT_PERIOD": 2}


@pytest.fixture(scope="module")
def undisturbed_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Return the student's weights after a training with the keys SAVED_EVERY_OTHER."""
    run = train(make_project(tmp_path_factory.mktemp("undisturbed"), **SAVED_EVERY_OTHER))
    return run.trainer.bare_model.student.state_dict()


@pytest.mark.parametrize(
    "damage", [_cut, lambda path: path.write_bytes(b""), Path.unlink], ids=["truncated", "empty", "missing"]
)
def test_a_damaged_last_checkpoint(tmp_path: Path, damage, undisturbed_weights: dict[str, Tensor]) -> None:
    """Check that the previous checkpoint is used, that the log says so, and that weights match an undisturbed run's."""
    project = make_project(tmp_path / "damaged", **SAVED_EVERY_OTHER)
    train(project, hooks=(KillAt(5),))
    damage(project.output / "model_0000005.pth")
    run_train_net("--config-file", project.student, "--resume")
    log = (project.output / "log.txt").read_text()
    assert "model_0000005.pth" in log and "Trying the previous checkpoint." in log
    assert f"Resuming from {project.output / 'model_0000003.pth'}" in log
    resumed = read_checkpoint(str(project.output / "model_final.pth"))["model"]
    for name, tensor in undisturbed_weights.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change", [Path.unlink, lambda path: path.write_bytes(b"\xff\xfe")], ids=["missing", "no text"]
)
def test_a_lost_name_of_the_last_checkpoint(tmp_path: Path, change: Callable) -> None:
    """Check that the newest checkpoint is resumed, not the training begun again, without a usable `last_checkpoint`."""
    project = make_project(tmp_path, **{**OFTEN, "SOLVER__MAX_ITER": 6, "SOLVER__CHECKPOINT_PERIOD": 2})
    train(project, hooks=(KillAt(4),))
    change(project.output / "last_checkpoint")
    assert min(train(project, resume=True).losses) == 4


def test_checkpoints_of_the_same_second_are_ordered_by_name(tmp_path: Path) -> None:
    """Check the order on a file system that stores whole seconds."""
    names = [f"model_{n:07d}.pth" for n in (3, 11, 7)] + ["model_final.pth"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    assert checkpoint_files(str(tmp_path)) == [str(tmp_path / names[i]) for i in (3, 1, 2, 0)]


def test_every_checkpoint_damaged(tmp_path: Path) -> None:
    project = make_project(tmp_path, **{**OFTEN, "SOLVER__MAX_ITER": 4, "SOLVER__CHECKPOINT_PERIOD": 2})
    train(project)
    for path in project.output.glob("*.pth"):
        _cut(path)
    with pytest.raises(UserError, match=r"model_final\.pth is damaged or not a checkpoint"):
        train(project, resume=True)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a second checkpoint on a device without space: one sentence, the first one intact, no other model files."""
    project = make_project(tmp_path, **{**OFTEN, "SOLVER__MAX_ITER": 6})
    project.output.mkdir()
    fill_the_disk(monkeypatch, project.output / "model_0000005.pth")
    with pytest.raises(
        UserError,
        match=r"Checkpoint .*model_0000005\.pth cannot be written \(No space left on device\); checkpoints already written are intact",
    ):
        train(project)
    assert sorted(path.name for path in project.output.glob("model*")) == ["model_0000002.pth"]
    assert _whole_checkpoints(project.output) == [2]
    assert (project.output / "last_checkpoint").read_text() == "model_0000002.pth"


@contextlib.contextmanager
def _files_up_to(size: int) -> Iterator[None]:
    """Limit the size of the files that this process writes within this context."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_before_the_first_checkpoint(tmp_path: Path) -> None:
    """Check the message for a file of which a part is written."""
    checkpointer = KDCheckpointer(torch.nn.Linear(1000, 1000), str(tmp_path))
    with _files_up_to(300_000), pytest.raises(UserError) as caught:
        checkpointer.save("model_0000000")
    path = tmp_path / "model_0000000.pth"
    assert str(caught.value) == f"Checkpoint {path} cannot be written (File too large); there is no checkpoint yet."


def test_a_disk_that_is_full_for_the_log(tmp_path: Path) -> None:
    project = make_project(tmp_path, **{**OFTEN, "SOLVER__MAX_ITER": 3})
    trainer = make_trainer(project)
    trainer.resume_or_load(resume=False)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer._hooks[0].after_step = full
    with pytest.raises(UserError, match=r"The disk of OUTPUT_DIR is full \(No space left on device\)"):
        trainer.train()


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end(tmp_path: Path) -> None:
    """Check that log lines that were not written cause no further message at exit."""
    project = make_project(tmp_path)
    project.output.mkdir()
    (project.output / "log.txt").symlink_to("/dev/full")
    command = [sys.executable, "-m", "kd_d2", "eval", "--model", str(project.student), str(project.teacher_weights)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "No space left on device" not in done.stderr, done.stderr


def test_a_disk_that_is_full_for_the_lock(tmp_path: Path) -> None:
    with _files_up_to(0), pytest.raises(OSError, match="File too large") as caught:
        lock_folder(str(tmp_path))
    unlock_folder(str(tmp_path))
    assert caught.value.filename == str(tmp_path / ".training.lock")


def test_a_data_worker_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that killing the process that reads the training data gives one sentence, and that --resume continues."""
    project = make_project(tmp_path, **{**OFTEN, "SOLVER__MAX_ITER": 8, "DATALOADER__NUM_WORKERS": 1})
    read = MappedDataset.__getitem__

    def read_until_killed(self: MappedDataset, where: tuple[int, int]) -> dict:
        if where[0] == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, where)

    monkeypatch.setattr(MappedDataset, "__getitem__", read_until_killed)
    with pytest.raises(UserError, match=r"A data loading process (died|failed) .*lower DATALOADER\.NUM_WORKERS"):
        train(project)
    assert _whole_checkpoints(project.output)
    monkeypatch.setattr(MappedDataset, "__getitem__", read)
    assert max(train(project, resume=True).losses) == 7


def _end_of(project: Project, *opts: object) -> tuple[int | None, list[str]]:
    """Train in a separate process, and return its exit status and the lines that it prints."""

    def run() -> None:
        torch.set_num_threads(1)
        with open(project.folder / "printed", "w", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            run_train_net("--config-file", project.student, *opts)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    said = (project.folder / "printed").read_text()
    process.kill()
    assert "Traceback" not in said, said
    return process.exitcode, said.splitlines()


class _After(HookBase):
    def __init__(self, iteration: int, action: Callable[[], object]):
        self.iteration, self.action = iteration, action

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.action()


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Return a function (iteration, action); later trainings run the action after the iteration, before other hooks."""
    build = KDTrainer.build_hooks

    def call(iteration: int, action: Callable[[], object]) -> None:
        monkeypatch.setattr(KDTrainer, "build_hooks", lambda self: [_After(iteration, action), *build(self)])

    return call


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanishes(tmp_path: Path, after: Callable, workers: int) -> None:
    """Check the message, the checkpoint that it names, and that the program ends, with or without data workers."""
    project = make_project(tmp_path, **OFTEN, DATALOADER__NUM_WORKERS=workers)
    gone = project.annotations.parent / "images" / "004.png"
    after(3, gone.unlink)
    status, lines = _end_of(project)
    assert status == 2
    last = project.output / (project.output / "last_checkpoint").read_text()
    assert (
        lines[-1]
        == f"error: The image {gone} cannot be used: No such file or directory; --resume continues from {last}."
    )


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "lose", [shutil.rmtree, lambda output: output.rename(f"{output}-moved")], ids=["removed", "moved"]
)
def test_an_output_folder_that_is_lost(tmp_path: Path, after: Callable, lose: Callable, asynchronous: bool) -> None:
    """Check that the training so far is saved in a new folder, and that --resume continues from there."""
    project = make_project(tmp_path, **OFTEN, SOLVER__CHECKPOINT_ASYNC=asynchronous)
    after(3, lambda: lose(project.output))
    status, lines = _end_of(project)
    assert status == 2
    assert lines[-1] == (
        f"error: OUTPUT_DIR {project.output} was removed or replaced during training; training stops, and --resume continues from "
        f"{project.output / 'model_latest.pth'}."
    )
    assert _whole_checkpoints(project.output) == [5]
    assert min(train(project, resume=True, hooks=(KillAt(6),)).losses) == 6


def test_a_file_in_place_of_the_output_folder(tmp_path: Path, after: Callable) -> None:
    project = make_project(tmp_path, **OFTEN)
    after(3, lambda: (project.output.rename(tmp_path / "moved"), project.output.write_text("")))
    status, lines = _end_of(project)
    assert status == 2
    assert lines[-1] == f"error: OUTPUT_DIR {project.output} no longer exists; there is no checkpoint yet."


def test_an_output_folder_that_becomes_read_only(
    tmp_path: Path, after: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path, **OFTEN)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    after(3, lambda: monkeypatch.setattr("kd_d2.files.open", refuse, raising=False))
    status, lines = _end_of(project)
    assert status == 2
    path = project.output / "model_0000005.pth"
    sentence = f"Checkpoint {path} cannot be written (Read-only file system); checkpoints already written are intact."
    assert lines[-1] == f"error: {sentence}"
    assert _whole_checkpoints(project.output) == [2]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")])  # fmt: skip
def test_memory_that_runs_out(tmp_path: Path, after: Callable, error: Exception) -> None:
    def fail() -> None:
        raise error

    after(3, fail)
    project = make_project(tmp_path, **OFTEN)
    reason = str(error).rstrip(".") or "MemoryError"
    last = project.output / "model_0000002.pth"
    with pytest.raises(UserError) as caught:
        train(project)
    assert str(caught.value) == (
        f"Out of memory ({reason}): raise SOLVER.GRADIENT_ACCUMULATION_STEPS, or lower SOLVER.IMS_PER_BATCH or the image sizes in INPUT; --resume "
        f"continues from {last}."
    )


def test_an_r_cnn_that_diverges(tmp_path: Path, after: Callable) -> None:
    def fail() -> None:
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")

    after(3, fail)
    project = make_project(tmp_path, **OFTEN)
    status, lines = _end_of(project)
    assert status == 2
    assert lines[-1] == (
        "error: Predicted boxes or scores contain Inf/NaN. Training has diverged: lower SOLVER.BASE_LR; "
        f"--resume continues from {project.output / 'model_0000002.pth'}."
    )


@pytest.mark.parametrize("clips", [False, True])
def test_the_end_of_a_training_in_the_folder_of_another(tmp_path: Path, clips: bool) -> None:
    """Check which checkpoint is named before and after the first one, and that enabled clipping is not advised."""
    cfg = load_config("configs/tiny/retinanet-student.yaml")
    cfg.OUTPUT_DIR, cfg.SOLVER.CLIP_GRADIENTS.ENABLED = str(tmp_path), clips
    old, new = tmp_path / "model_final.pth", tmp_path / "model_0000009.pth"
    old.touch()
    (tmp_path / "last_checkpoint").write_text(old.name)
    started, resumed = Failures(cfg, resumed=False), Failures(cfg, resumed=True)
    error = NonFiniteLossError("In iteration 2 the loss x is nan")
    advice = f"{error}: lower SOLVER.BASE_LR{'' if clips else ' or set SOLVER.CLIP_GRADIENTS.ENABLED True'}; "
    assert str(resumed.explain(error)) == f"{advice}--resume continues from {old}."
    assert str(started.explain(error)) == f"{advice}the checkpoints in {tmp_path} are from an earlier training."
    new.touch()
    (tmp_path / "last_checkpoint").write_text(new.name)
    assert str(started.explain(error)) == f"{advice}--resume continues from {new}."
    (tmp_path / "last_checkpoint").write_text(old.name)
    os.utime(old, (5, 5))  # replaced by one of the same name
    assert str(started.explain(error)) == f"{advice}--resume continues from {old}."


def test_a_loss_that_is_not_finite_in_the_first_iteration(tmp_path: Path) -> None:
    """Check that no lower learning rate is advised, which has had no effect yet."""
    cfg = load_config("configs/tiny/retinanet-student.yaml")
    cfg.OUTPUT_DIR = str(tmp_path)
    error = NonFiniteLossError("In iteration 0 the loss x is nan", in_first_iteration=True)
    assert str(Failures(cfg, resumed=False).explain(error)) == (
        "In iteration 0 the loss x is nan: no parameter has been updated yet, so check the initial weights (MODEL.WEIGHTS), the teacher's "
        "weights, and the code of methods of your own; there is no checkpoint yet."
    )


def test_a_new_training_that_fails_in_an_old_folder(tmp_path: Path, after: Callable) -> None:
    def fail() -> None:
        raise MemoryError

    after(0, fail)
    project = make_project(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS=())
    project.output.mkdir()
    (project.output / "model_final.pth").touch()
    with pytest.raises(UserError, match=rf"; the checkpoints in {project.output} are from an earlier training\.$"):
        train(project)


def test_an_output_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config("configs/tiny/retinanet-student.yaml")
    cfg.OUTPUT_DIR = str(tmp_path)
    error = PermissionError(errno.EACCES, "Permission denied")
    failures = Failures(cfg, resumed=False)
    assert failures.explain(error) is None
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert str(failures.explain(error)) == (
        f"OUTPUT_DIR {tmp_path} is no longer writable (Permission denied); there is no checkpoint yet."
    )


def test_a_batch_norm_of_a_single_value(tmp_path: Path) -> None:
    project = make_project(tmp_path, SOLVER__IMS_PER_BATCH=1, INPUT__MIN_SIZE_TRAIN=(20,))
    with pytest.raises(UserError) as caught:
        train(project)
    assert str(caught.value) == (
        "A batch norm layer got a single value per channel, of one image: use more images per process and accumulation step, "
        "larger images, or another norm, such as FrozenBN or GN; there is no checkpoint yet."
    )


def test_data_that_a_lost_process_had_sent(tmp_path: Path, after: Callable) -> None:
    class Descriptor:
        def detach(self) -> None:
            raise EOFError

    after(3, lambda: torch.multiprocessing.reductions.rebuild_storage_fd(torch.UntypedStorage, Descriptor(), 8))
    project = make_project(tmp_path, SOLVER__CHECKPOINT_PERIOD=3, SOLVER__MAX_ITER=6)
    with pytest.raises(UserError) as caught:
        train(project)
    assert str(caught.value) == (
        "A data loading process failed (EOFError): see its error above; if there is none, it was killed, most likely because the machine "
        "ran out of memory: lower DATALOADER.NUM_WORKERS; "
        f"--resume continues from {project.output / 'model_0000002.pth'}."
    )


def test_an_unusable_image_is_skipped_where_the_config_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check that the image is named in the log and training continues, and that it ends training without the key."""
    project = make_project(tmp_path, **{**OFTEN, "SOLVER__MAX_ITER": 6})
    broken = project.annotations.parent / "images" / "004.png"
    broken.write_text("no image")
    with pytest.raises(UserError, match=r"The image .*004\.png cannot be used"):
        train(project)
    shutil.rmtree(project.output)
    with pytest.raises(SystemExit):  # the test set has it too, where it is not replaced
        run_train_net("--config-file", project.student, "DATALOADER.SKIP_UNUSABLE_IMAGES", True)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: The image {broken} cannot be used: ")
    assert f"{broken} cannot be used" in (project.output / "log.txt").read_text()
    assert max(_whole_checkpoints(project.output)) == 5


def test_a_hundred_unusable_images_in_a_row_end_it(tmp_path: Path) -> None:
    project = make_project(tmp_path, **OFTEN)
    for path in (project.annotations.parent / "images").iterdir():
        path.write_text("no image")
    with pytest.raises(UserError, match="100 training images in a row cannot be used"):
        train(project, "DATALOADER.SKIP_UNUSABLE_IMAGES", True)
