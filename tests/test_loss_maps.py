"""tools/loss_maps.py: where the loss falls during a training, from the training to the picture."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

from kd_d2.adapters import DetectorOutputs
from kd_d2.distillers import DISTILLER_REGISTRY
from kd_d2.distillers.feature_imitation import FeatureImitation
from kd_d2.engine.loss_maps import LossMapRecorder
from kd_d2.evaluation.examples import read_examples

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import ImageList
from detectron2.utils import comm
from helpers import ROOT, Project, clean_process, detector_of, make, make_project, make_trainer, run_program, spec_of

PROGRAM = ROOT / "tools" / "loss_maps.py"
KEYS = {
    "MODEL__KD__DISTILLERS": ("StructuralKD",),
    "MODEL__KD__STRUCTURAL__LOSS": "l1",
    "SEED": 5,
    "SOLVER__MAX_ITER": 4,
    "SOLVER__STEPS": (),
}


@pytest.fixture
def run() -> Callable[..., None]:
    """Run the program as from a command line, in this process."""

    return functools.partial(run_program, PROGRAM)


def _maps(project: Project) -> dict[str, dict[str, np.ndarray]]:
    return {path.stem: dict(np.load(path)) for path in (project.output / "loss_maps").glob("iteration_*.npz")}


def _total_losses(project: Project) -> list[float]:
    rows = map(json.loads, (project.output / "metrics.json").read_text().splitlines())
    return [row["total_loss"] for row in rows if "total_loss" in row]


def test_from_a_training_to_the_picture(tmp_path: Path, run: Callable, capsys: pytest.CaptureFixture) -> None:
    """Check what is noted and when, that the training is as without, and the sheet of two runs."""
    project = make_project(tmp_path / "l1", **KEYS)
    run("train", "--config-file", project.student, "--images", 2, "--every", 2)
    maps = _maps(project)
    assert maps.keys() == {"iteration_0000002", "iteration_0000004"}
    noted = maps["iteration_0000004"]
    assert noted.keys() == {f"{image}/{stride}" for image in (0, 1) for stride in (8, 16, 32, 64, 128)}
    assert noted["0/8"].shape == (8, 12) and noted["1/8"].shape == (12, 8)  # 64 x 96 and 96 x 64 pixels
    assert all((level >= 0).all() and level.max() > 0 for level in noted.values())
    trained = _total_losses(project)

    other = make_project(tmp_path / "ssim", **{**KEYS, "MODEL__KD__STRUCTURAL__LOSS": "ssim"})
    run("train", "--config-file", other.student, "--images", 2, "--every", 4)
    picture = tmp_path / "sheet.png"
    run("draw", project.output, other.output, "--output", picture, "--stride", 16)
    printed = capsys.readouterr().out
    assert f"{project.output}: 2 moments of the training" in printed
    assert f"{other.output}: 1 moments of the training" in printed
    assert "% of the loss lies in the objects' boxes, which cover" in printed
    drawn = cv2.imread(str(picture))
    assert drawn.shape == (2 * 8 + 34 * 2 + 320 + 480, 3 * (480 + 8), 3)

    plain = make_project(tmp_path / "plain", **KEYS)
    plain.main()
    assert trained == pytest.approx(_total_losses(plain), rel=1e-3)


@pytest.mark.parametrize("method", sorted(set(dict(DISTILLER_REGISTRY)) - {"StructuralKD"}))
def test_every_method_tells_where_it_pulls(tmp_path: Path, run: Callable, method: str) -> None:
    """Check that the training is as without the notes, and that the pull is somewhere, in no image's padding alone."""
    keys = {
        **KEYS,
        "MODEL__KD__DISTILLERS": (method,),
        "MODEL__KD__ICD__DETACH_STUDENT_ITERS": 1,
        "SOLVER__MAX_ITER": 2,
    }
    detector = detector_of(method)
    project, plain = (make_project(tmp_path / name, detector, **keys) for name in ("noted", "plain"))
    run("train", "--config-file", project.student, "--images", 2, "--every", 1)
    maps = _maps(project)["iteration_0000002"]
    strides = (4, 8, 16, 32, 64) if detector == "faster-rcnn" else (8, 16, 32, 64, 128)
    assert maps.keys() == {f"{image}/{stride}" for image in (0, 1) for stride in strides}
    assert all((level >= 0).all() and np.isfinite(level).all() for level in maps.values())
    assert any(level.max() > 0 for level in maps.values())
    plain.main()
    assert _total_losses(project) == pytest.approx(_total_losses(plain), rel=1e-3)


def test_pull_of_feature_imitation_by_hand() -> None:
    """weight 6 times the mean of two levels' mean squared errors: at a position 6 / 2 * 2 / N * |s - t|."""
    distiller = make(FeatureImitation, spec_of({4: 2, 8: 2}), weight=6.0)
    target = {4: torch.zeros(1, 2, 2, 2), 8: torch.zeros(1, 2, 1, 1)}
    features = {4: torch.zeros(1, 2, 2, 2), 8: torch.ones(1, 2, 1, 1)}
    features[4][0, :, 0, 1] = torch.tensor([3.0, 4.0])
    images = ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)])
    student = DetectorOutputs(images, {stride: level.requires_grad_() for stride, level in features.items()})
    maps = distiller.loss_maps(student, DetectorOutputs(images, target), [])
    torch.testing.assert_close(maps[4], torch.tensor([[[0.0, 6 / 8 * 5], [0.0, 0.0]]]))
    torch.testing.assert_close(maps[8], torch.tensor([[[6 / 2 * 2**0.5]]]))


def test_a_resumed_training_goes_on_noting_and_a_new_one_begins_anew(tmp_path: Path, run: Callable) -> None:
    project = make_project(tmp_path, **KEYS)
    run("train", "--config-file", project.student, "--images", 1, "--every", 1, "SOLVER.MAX_ITER", 2)
    first = _maps(project)
    run("train", "--config-file", project.student, "--images", 1, "--every", 2, "--resume", "SOLVER.MAX_ITER", 4)
    both = _maps(project)
    assert both.keys() == {f"iteration_{n:07d}" for n in (1, 2, 4)}
    np.testing.assert_array_equal(both["iteration_0000001"]["0/8"], first["iteration_0000001"]["0/8"])
    run("train", "--config-file", project.student, "--images", 1, "--every", 4)
    assert _maps(project).keys() == {"iteration_0000004"}


def _note_as_one_of_two(rank: int, project: Project) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{project.folder}/store", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    with clean_process():
        trainer = make_trainer(project)
        trainer.resume_or_load(resume=False)
        examples = read_examples(trainer.cfg, 1)
        trainer.register_hooks([LossMapRecorder(trainer.bare_model, examples, 1, trainer.cfg.OUTPUT_DIR)])
        trainer.train()
    torch.distributed.destroy_process_group()


def test_two_processes_note_together(tmp_path: Path) -> None:
    """Check a detector and a method whose losses count over all processes: nothing waits for the other, and one writes."""
    keys = {**KEYS, "MODEL__KD__DISTILLERS": ("PFI",), "SOLVER__IMS_PER_BATCH": 2, "SOLVER__MAX_ITER": 2}
    project = make_project(tmp_path, "fsaf", **keys, MODEL__KD__PFI__MASK="positives")
    torch.multiprocessing.start_processes(_note_as_one_of_two, nprocs=2, args=(project,), start_method="fork")
    assert _maps(project).keys() == {"iteration_0000001", "iteration_0000002"}


@pytest.mark.parametrize(
    ("keys", "arguments", "expected"),
    [
        (
            {"MODEL__KD__DISTILLERS": ("FeatureImitation", "PFI")},
            [],
            "must name one method, whose loss is to be seen; it names Feat",
        ),
        ({"MODEL__META_ARCHITECTURE": "RetinaNet"}, [], "must be the config of a distillation"),
        ({}, ["--every", 0], "--every is 0 and --images 8; both must be at least 1"),
    ],
)
def test_what_cannot_be_noted(
    tmp_path: Path, run: Callable, capfd: pytest.CaptureFixture, keys: dict, arguments: list, expected: str
) -> None:
    project = make_project(tmp_path, **{**KEYS, **keys})
    with pytest.raises(SystemExit):
        run("train", "--config-file", project.student, *arguments)
    assert expected in capfd.readouterr().err


def test_what_cannot_be_drawn(tmp_path: Path, run: Callable, capfd: pytest.CaptureFixture) -> None:
    """Check a run that noted nothing, a level that is not there, and runs of other images."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit):
        run("draw", empty, "--output", tmp_path / "x.png")
    assert f"{empty} has no loss_maps: train it by tools/loss_maps.py train." in capfd.readouterr().err
    projects = [make_project(tmp_path / str(n), **{**KEYS, "SOLVER__MAX_ITER": 1}) for n in (1, 2)]
    for count, project in enumerate(projects, 1):
        run("train", "--config-file", project.student, "--images", count, "--every", 1)
    with pytest.raises(SystemExit):
        run("draw", projects[0].output, "--output", tmp_path / "x.png", "--stride", 4)
    assert "no level of stride 4; its strides are [8, 16, 32, 64, 128]" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        run("draw", *(p.output for p in projects), "--output", tmp_path / "x.png")
    assert f"{projects[1].output} has other images than {projects[0].output}" in capfd.readouterr().err
