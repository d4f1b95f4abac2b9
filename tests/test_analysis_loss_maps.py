"""`kd-d2 analyze loss-maps`: where a distillation loss is large, from the training to the picture."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from kd_d2 import UserError
from kd_d2.adapters import DetectorOutputs
from kd_d2.analysis.examples import read_examples
from kd_d2.analysis.loss_maps import (
    LossMapAnalysis,
    LossMapRecorder,
    RunShare,
    draw_loss_maps,
    inside_boxes,
    mean_loss_maps,
    read_saved_examples,
    recording,
    save_examples,
)
from kd_d2.config import load_config
from kd_d2.data import register_coco_json
from kd_d2.distillers import DISTILLER_REGISTRY
from kd_d2.distillers.feature_imitation import FeatureImitation

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from helpers import (
    CLASSES,
    ROOT,
    Killed,
    Project,
    clean_process,
    detector_of,
    make,
    make_project,
    make_trainer,
    run_command,
    spec_of,
)

run = functools.partial(run_command, "analyze", "loss-maps")
KEYS = {
    "MODEL__KD__DISTILLERS": ("StructuralKD",),
    "MODEL__KD__STRUCTURAL__LOSS": "l1",
    "SEED": 5,
    "SOLVER__MAX_ITER": 4,
    "SOLVER__STEPS": (),
}


def _maps(run_folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {path.stem: dict(np.load(path)) for path in (run_folder / "loss_maps").glob("iteration_*.npz")}


def _total_losses(run_folder: Path) -> list[float]:
    rows = map(json.loads, (run_folder / "metrics.json").read_text().splitlines())
    return [row["total_loss"] for row in rows if "total_loss" in row]


def test_from_a_training_to_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check what is recorded and when, that recording changes neither losses nor statistics, and the picture of two runs."""
    project, output = make_project(tmp_path / "l1", **KEYS), tmp_path / "found"
    run("--model", f"l1={project.student}", "--output", output, "--images", 2, "--every", 2)
    maps = _maps(output / "l1")
    assert maps.keys() == {"iteration_0000002", "iteration_0000004"}
    noted = maps["iteration_0000004"]
    assert noted.keys() == {f"{image}/{stride}" for image in (0, 1) for stride in (8, 16, 32, 64, 128)}
    assert noted["0/8"].shape == (8, 12) and noted["1/8"].shape == (12, 8)  # 64 x 96 and 96 x 64 pixels
    assert all((level >= 0).all() and level.max() > 0 for level in noted.values())
    trained = _total_losses(output / "l1")

    both = ["--model", output / "l1", "--model", f"ssim={project.student}", "--output", output]
    run(*both, "--images", 2, "--every", 4, "--stride", 16, "MODEL.KD.STRUCTURAL.LOSS", "ssim")
    printed = capsys.readouterr().out
    assert printed.count("% of the loss lies in the objects' boxes, which cover") == 3
    data = LossMapAnalysis.load(str(output))
    assert {title: share.records for title, share in data.runs.items()} == {"l1": 2, "ssim": 1}
    assert all(0 < share.share_in_boxes < 1 for share in data.runs.values()) and 0 < data.box_area < 1
    drawn = cv2.imread(str(output / "loss_maps.png"))
    assert drawn.shape == (2 * 8 + 34 * 2 + 320 + 480, 3 * (480 + 8), 3)

    project.main()
    assert trained == pytest.approx(_total_losses(project.output), rel=1e-3)
    recorded, plain = (torch.load(folder / "model_final.pth")["model"] for folder in (output / "l1", project.output))
    means = [name for name in plain if name.endswith("running_mean")]
    assert len(means) > 0
    for name in means:
        torch.testing.assert_close(recorded[name], plain[name], rtol=1e-3, atol=1e-4)


def test_images_in_which_the_loss_is_zero_do_not_count(tmp_path: Path) -> None:
    """Check two images, with a box on a half and on a quarter, and a map that is zero in the second or in both."""
    folder = tmp_path / "loss_maps"
    folder.mkdir()
    truth = {}
    for number, width in enumerate((8, 4)):
        truth[f"{number}/image"] = np.zeros((16, 16, 3), np.uint8)
        truth[f"{number}/boxes"] = np.array([[0, 0, width, 16]], np.float32)
        truth[f"{number}/labels"] = np.array([0])
    np.savez(folder / "examples.npz", classes=np.array(["red"]), **truth)
    tiny = np.full((2, 2), 1e-20)
    np.savez(folder / "iteration_0000001.npz", **{"0/8": tiny, "1/8": 0 * tiny, "0/4": 0 * tiny, "1/4": 0 * tiny})
    _, area, runs = draw_loss_maps({"one": str(tmp_path)}, 8)
    assert area == pytest.approx(0.375)
    assert runs["one"] == RunShare(1, pytest.approx(0.5), 1, pytest.approx(0.5))
    assert LossMapAnalysis(area, runs).sentences() == [
        "one: 50 % of the loss lies in the objects' boxes, which cover 50 % of the image (means over the images in which it "
        "is not zero: 1; 1 records of the training)."
    ]
    analysis = LossMapAnalysis(*draw_loss_maps({"one": str(tmp_path)}, 4)[1:])
    analysis.save(str(tmp_path / "found"))
    for found in (analysis, LossMapAnalysis.load(str(tmp_path / "found"))):
        assert found.sentences() == ["one: the loss is zero in every image (1 records of the training)."]
    of_old_file = LossMapAnalysis(0.375, {"one": RunShare(1, 0.5)})
    assert of_old_file.sentences()[0].endswith("cover 38 % of the image (means; 1 records of the training).")


def test_saved_examples(tmp_path: Path) -> None:
    """Check the images, boxes and classes that are drawn next to the maps of a finished training."""
    project = make_project(tmp_path)
    cfg, truth = load_config(str(project.student)), json.loads(project.annotations.read_text())["annotations"]
    (project.output / "loss_maps").mkdir(parents=True)
    with clean_process():
        register_coco_json(cfg)
        save_examples(read_examples(cfg, 2), cfg)
    found, names = read_saved_examples(str(project.output))
    assert names == list(CLASSES) and len(found) == 2
    for number, (image, objects) in enumerate(found):
        own = [a for a in truth if a["image_id"] == number + 1]
        file = project.annotations.parent / "images" / f"{number:03d}.png"
        np.testing.assert_array_equal(image, cv2.imread(str(file))[:, :, ::-1])
        assert objects.gt_classes.tolist() == [a["category_id"] - 1 for a in own]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        assert objects.gt_boxes.tensor.tolist() == corners


def test_records_are_averaged(tmp_path: Path) -> None:
    (tmp_path / "loss_maps").mkdir()
    for iteration, value in ((2, 1.0), (4, 6.0), (6, 2.0)):
        np.savez(tmp_path / "loss_maps" / f"iteration_{iteration:07d}.npz", **{"0/8": np.full((2, 3), value)})
    maps, records = mean_loss_maps(str(tmp_path))
    assert records == 3 and {name: level.tolist() for name, level in maps.items()} == {"0/8": [[3.0] * 3] * 2}


def test_pixels_inside_boxes() -> None:
    """Check two boxes, one of which begins outside the image of 6 x 8 pixels."""
    truth = Instances((6, 8), gt_boxes=Boxes(torch.tensor([[1.2, 0.0, 4.0, 1.6], [5.0, -3.0, 7.0, 5.0]])))
    expected = np.zeros((6, 8), bool)
    expected[0:2, 1:4] = expected[0:5, 5:7] = True
    np.testing.assert_array_equal(inside_boxes(truth), expected)


def test_the_same_images_with_other_boxes(tmp_path: Path) -> None:
    """Check two trainings, the second after an annotation changed."""
    for name, right in (("one", 8), ("other", 9)):
        folder = tmp_path / name / "loss_maps"
        folder.mkdir(parents=True)
        np.savez(folder / "iteration_0000001.npz", **{"0/8": np.ones((2, 2))})
        truth = {"0/boxes": np.array([[0, 0, right, 16]], np.float32), "0/labels": np.array([0])}
        np.savez(
            folder / "examples.npz", classes=np.array(["red"]), **{"0/image": np.zeros((16, 16, 3), np.uint8)}, **truth
        )
    with pytest.raises(UserError, match=r"other has different images than .*one\.$"):
        draw_loss_maps({name: str(tmp_path / name) for name in ("one", "other")}, 8)


def test_shares_of_a_uniform_loss_and_of_one_elsewhere(tmp_path: Path) -> None:
    """Check a box on the left quarter of an image, and a second training whose loss lies at the right side."""
    truth = {"0/boxes": np.array([[0, 0, 8, 32]], np.float32), "0/labels": np.array([0])}
    uniform, right = np.ones((4, 4)), np.zeros((4, 4))
    right[:, 3] = 1.0
    for name, level in (("one", uniform), ("other", right)):
        folder = tmp_path / name / "loss_maps"
        folder.mkdir(parents=True)
        np.savez(folder / "iteration_0000001.npz", **{"0/8": level})
        image = np.zeros((32, 32, 3), np.uint8)
        np.savez(folder / "examples.npz", classes=np.array(["red"]), **{"0/image": image}, **truth)
    _, area, runs = draw_loss_maps({name: str(tmp_path / name) for name in ("one", "other")}, 8)
    assert area == 0.25 and runs == {"one": RunShare(1, 0.25, 1, 0.25), "other": RunShare(1, 0.0, 1, 0.25)}


@pytest.mark.parametrize(
    ("iterations", "every", "expected"), [(4, None, 1), (79, None, 1), (400, None, 10), (400, 7, 7)]
)
def test_how_often_maps_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iterations: int, every: int | None, expected: int
) -> None:
    """Check about forty records of a training, unless --every is given."""
    cfg, seen = load_config(str(make_project(tmp_path, **{**KEYS, "SOLVER__MAX_ITER": iterations}).student)), []
    adapter = SimpleNamespace(spec=SimpleNamespace(shapes={8: None}))

    def stop(model: SimpleNamespace, examples: list, every: int, output: str) -> None:
        seen.append(every)
        raise Killed

    monkeypatch.setattr(recording, "setup", lambda args: cfg)
    monkeypatch.setattr(recording, "read_examples", lambda cfg, count: [])
    monkeypatch.setattr(
        recording, "KDTrainer", lambda cfg: SimpleNamespace(bare_model=SimpleNamespace(adapter=adapter))
    )
    monkeypatch.setattr(recording, "LossMapRecorder", stop)
    with pytest.raises(Killed):
        recording.train_with_loss_maps(
            SimpleNamespace(imports=(), title="one", images=1, every=every, stride=8, resume=False)
        )
    assert seen == [expected]


@pytest.mark.parametrize("method", sorted(set(dict(DISTILLER_REGISTRY)) - {"StructuralKD"}))
def test_every_method_has_loss_maps(tmp_path: Path, method: str) -> None:
    """Check that recording does not change the training, and that maps are finite, nonnegative and not all zero."""
    keys = {
        **KEYS,
        "MODEL__KD__DISTILLERS": (method,),
        "MODEL__KD__ICD__DETACH_STUDENT_ITERS": 1,
        "SOLVER__MAX_ITER": 2,
    }
    detector = detector_of(method)
    project = make_project(tmp_path, detector, **keys)
    run("--model", project.student, "--output", tmp_path, "--images", 2, "--every", 1)
    maps = _maps(tmp_path / "student")["iteration_0000002"]
    strides = (4, 8, 16, 32, 64) if detector == "faster-rcnn" else (8, 16, 32, 64, 128)
    assert maps.keys() == {f"{image}/{stride}" for image in (0, 1) for stride in strides}
    assert all((level >= 0).all() and np.isfinite(level).all() for level in maps.values())
    assert any(level.max() > 0 for level in maps.values())
    project.main("DATASETS.TEST", ())
    assert _total_losses(tmp_path / "student") == pytest.approx(_total_losses(project.output), rel=1e-3)


def test_recording_draws_no_random_numbers_from_the_training(tmp_path: Path) -> None:
    """Check MGD, whose masks are random."""
    project = make_project(tmp_path, **{**KEYS, "MODEL__KD__DISTILLERS": ("MGD",)})
    with clean_process():
        trainer = make_trainer(project)
        trainer.resume_or_load(resume=False)
        recorder = LossMapRecorder(trainer.bare_model, read_examples(trainer.cfg, 1), 1, trainer.cfg.OUTPUT_DIR)
        recorder.trainer = SimpleNamespace(iter=3)
        before = torch.get_rng_state()
        maps = recorder.record()
    assert torch.equal(torch.get_rng_state(), before) and maps["0/8"].max() > 0


def test_pull_of_feature_imitation_by_hand() -> None:
    """Check weight 6 times the mean of two levels' mean squared errors: 6 / 2 * 2 / N * |s - t| at a position."""
    distiller = make(FeatureImitation, spec_of({4: 2, 8: 2}), weight=6.0)
    target = {4: torch.zeros(1, 2, 2, 2), 8: torch.zeros(1, 2, 1, 1)}
    features = {4: torch.zeros(1, 2, 2, 2), 8: torch.ones(1, 2, 1, 1)}
    features[4][0, :, 0, 1] = torch.tensor([3.0, 4.0])
    images = ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)])
    student = DetectorOutputs(images, {stride: level.requires_grad_() for stride, level in features.items()})
    maps = distiller.loss_maps(student, DetectorOutputs(images, target), [])
    torch.testing.assert_close(maps[4], torch.tensor([[[0.0, 6 / 8 * 5], [0.0, 0.0]]]))
    torch.testing.assert_close(maps[8], torch.tensor([[[6 / 2 * 2**0.5]]]))


def test_a_resumed_training_keeps_its_records_and_a_new_one_removes_them(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    project = make_project(tmp_path, **KEYS)
    common = ["--model", project.student, "--output", tmp_path, "--images", 1]
    run(*common, "--every", 1, "SOLVER.MAX_ITER", 2)
    first = _maps(tmp_path / "student")
    for other in ([2], [1, "INPUT.MIN_SIZE_TEST", 48]):
        with pytest.raises(SystemExit):
            run(*common[:-1], *other[:1], "--every", 2, "--resume", "SOLVER.MAX_ITER", 4, *other[1:])
        assert f"--resume: {tmp_path / 'student'} has loss maps of other images or image" in capfd.readouterr().err
        assert _maps(tmp_path / "student").keys() == first.keys()
    run(*common, "--every", 2, "--resume", "SOLVER.MAX_ITER", 4)
    both = _maps(tmp_path / "student")
    assert both.keys() == {f"iteration_{n:07d}" for n in (1, 2, 4)}
    np.testing.assert_array_equal(both["iteration_0000001"]["0/8"], first["iteration_0000001"]["0/8"])
    run(*common, "--every", 4)
    assert _maps(tmp_path / "student").keys() == {"iteration_0000004"}


def test_the_iteration_in_which_a_signal_stops_the_training_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path, **KEYS)
    common = ["--model", project.student, "--output", tmp_path, "--images", 1, "--every", 2]
    with monkeypatch.context() as patch:
        patch.setattr(
            LossMapRecorder, "before_step", lambda hook: hook.trainer.iter == 1 and signal.raise_signal(signal.SIGTERM)
        )
        with pytest.raises(SystemExit) as stopped:
            run(*common)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert _maps(tmp_path / "student").keys() == {"iteration_0000002"}


def _record_as_one_of_two(rank: int, project: Project) -> None:
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


def test_two_processes_record_together(tmp_path: Path) -> None:
    """Check losses that are normalized over all processes: no process blocks the other, and only one writes."""
    keys = {**KEYS, "MODEL__KD__DISTILLERS": ("PFI",), "SOLVER__IMS_PER_BATCH": 2, "SOLVER__MAX_ITER": 2}
    project = make_project(tmp_path, "fsaf", **keys, MODEL__KD__PFI__MASK="positives")
    torch.multiprocessing.start_processes(_record_as_one_of_two, nprocs=2, args=(project,), start_method="fork")
    assert _maps(project.output).keys() == {"iteration_0000001", "iteration_0000002"}


@pytest.mark.parametrize(
    ("keys", "arguments", "expected"),
    [
        (
            {"MODEL__KD__DISTILLERS": ("FeatureImitation", "PFI")},
            [],
            "must name one method, whose loss is recorded; it names Feat",
        ),
        ({"MODEL__META_ARCHITECTURE": "RetinaNet"}, [], "--model student must be the config of a distillation"),
        ({}, ["--every", 0], "--every is 0; it must be at least 1"),
        ({}, ["--images", 0], "--images is 0; it must be at least 1"),
        ({}, ["--every", 5], "--every is 5, but SOLVER.MAX_ITER is 4: nothing would be recorded."),
        ({}, ["--stride", 4], "--model student has no level of stride 4; its strides are [8, 16, 32, 64, 128]."),
    ],
)
def test_what_cannot_be_recorded(
    tmp_path: Path, capfd: pytest.CaptureFixture, keys: dict, arguments: list, expected: str
) -> None:
    project = make_project(tmp_path, **{**KEYS, **keys})
    with pytest.raises(SystemExit):
        run("--model", project.student, "--output", tmp_path / "found", *arguments)
    assert expected in capfd.readouterr().err
    assert not (tmp_path / "found" / "student" / "model_final.pth").exists()


def test_errors_in_a_program_of_ones_own(tmp_path: Path) -> None:
    """Check that an error of the training is raised, as by other analyses, instead of ending the process."""
    project = make_project(tmp_path, **KEYS)
    models = LossMapAnalysis.read_models([str(project.student)], [])
    with clean_process(), pytest.raises(UserError, match="--every is 5, but"):
        LossMapAnalysis.run(models, str(tmp_path / "found"), every=5)


def test_what_cannot_be_drawn(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Check a run without records, a level that does not exist, and runs with different images."""
    project = make_project(tmp_path / "project", **{**KEYS, "SOLVER__MAX_ITER": 1})
    project.main()
    with pytest.raises(SystemExit):
        run("--model", project.output, "--output", tmp_path / "found")
    assert (
        f"{project.output} has no loss_maps: name the config, and kd-d2 analyze loss-maps trains"
        in capfd.readouterr().err
    )
    common = ["--output", tmp_path]
    for count in (1, 2):
        run("--model", f"{count}={project.student}", *common, "--images", count, "--every", 1)
    with pytest.raises(SystemExit):
        run("--model", f"new={project.student}", "--model", tmp_path / "1", *common, "--stride", 4)
    assert not (tmp_path / "new").exists()
    assert "no level of stride 4; its strides are [8, 16, 32, 64, 128]" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        run("--model", tmp_path / "1", "--model", tmp_path / "2", *common)
    assert f"{tmp_path / '2'} has different images than {tmp_path / '1'}" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        run("--model", project.student, project.output / "model_final.pth", *common)
    assert (
        "error: --model student: kd-d2 analyze loss-maps takes a config, which it trains, without weights, or the output "
        "folder of such a training."
    ) in capfd.readouterr().err
    run("--model", f"small={project.student}", *common, "--images", 1, "--every", 1, "INPUT.MIN_SIZE_TEST", 48)
    with pytest.raises(SystemExit):
        run("--model", tmp_path / "1", "--model", tmp_path / "small", *common)
    assert f"{tmp_path / 'small'} has different images than {tmp_path / '1'}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("titles", "keys", "sentence"),
    [
        (("ssim 8", "ssim-8"), {}, "--model: several titles give the folder name 'ssim-8'; choose other titles."),
        (("ssim",), {"DATASETS__TEST": ()}, "DATASETS.TEST is empty: name a dataset, whose images are drawn."),
    ],
)
def test_trainings_that_cannot_be_drawn(
    tmp_path: Path, capfd: pytest.CaptureFixture, titles: tuple[str, ...], keys: dict, sentence: str
) -> None:
    project = make_project(tmp_path, **KEYS, **keys)
    models = [x for title in titles for x in ("--model", f"{title}={project.student}")]
    with pytest.raises(SystemExit):
        run(*models, "--output", tmp_path / "found")
    assert f"error: {sentence}" in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_know_a_method_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my_recorded_method.py"
    path.write_text(
        "from kd_d2.distillers import DISTILLER_REGISTRY, PKD\n\n\n"
        "@DISTILLER_REGISTRY.register()\nclass Recorded(PKD):\n    CONFIG_NODE = 'RECORDED'\n"
    )
    project = make_project(tmp_path, **{**KEYS, "MODEL__KD__DISTILLERS": ("Recorded",), "SOLVER__IMS_PER_BATCH": 2})
    program = [sys.executable, "-m", "kd_d2", "analyze", "--import", path, "loss-maps", "--model", project.student]
    options = ["--output", tmp_path / "out", "--images", "1", "--every", "4", "--num-gpus", "2", "MODEL.DEVICE", "cpu"]
    done = subprocess.run(list(map(str, program + options)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert _maps(tmp_path / "out" / "student").keys() == {"iteration_0000004"}
