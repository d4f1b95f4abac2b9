"""SOLVER.EPOCHS: iterations from images, in trainings and in the commands that read their configs."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from kd_d2 import UserError
from kd_d2.analysis.models import load_distillations
from kd_d2.checkpoint import read_checkpoint
from kd_d2.config import load_config, read_config
from kd_d2.data import register_coco_json, resolve_epochs
from kd_d2.data.epochs import in_iterations
from kd_d2.data_check import check_sets, schedule_of_config, sets_of_config
from kd_d2.sweep import runner
from kd_d2.sweep.matrix import Cell
from kd_d2.sweep.runner import run_jobs, training_job

import pytest
from detectron2.config import CfgNode
from helpers import Project, clean_process, make_coco, make_project, make_trainer, merged, train, write_yaml

SHORT = {"DATASETS__TEST": (), "SOLVER__STEPS": (), "SOLVER__WARMUP_ITERS": 0}


def length(cfg: CfgNode) -> tuple[float | None, int, tuple[int, ...]]:
    return cfg.SOLVER.EPOCHS, cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS)


def opts_of(**keys: object) -> list[object]:
    return [part for key, value in keys.items() for part in (key.replace("__", "."), value)]


@pytest.fixture
def clean() -> Iterator[None]:
    with clean_process():
        yield


# ------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "max_iter", "steps", "expected"),
    [
        (12, 2700, 8, 180000, (120000, 160000), (4050, (2700, 3600))),
        (12, 2700, 8, 12, (8, 11), (4050, (2700, 3712))),  # 11 / 12 of 4050 is 3712.5, rounded to even
        (0.5, 100, 8, 90, (60, 80), (6, (4, 5))),  # 6.25 iterations
        (1, 7, 4, 12, (), (2, ())),  # 1.75 iterations
        (0.001, 6, 2, 10, (), (1, ())),
        (2, 10.5, 2, 10, (5,), (10, (5,))),  # 10.5 images are those of a sampler, on average
        (3, 6, 2, 4, (5,), (9, (11,))),  # a step after the end stays there
    ],
)
def test_iterations_by_hand(
    epochs: float, images: float, batch: int, max_iter: int, steps: tuple[int, ...], expected: tuple
) -> None:
    keys = {"IMS_PER_BATCH": batch, "MAX_ITER": max_iter, "STEPS": steps}
    cfg = load_config("", opts_of(**{f"SOLVER__{key}": value for key, value in keys.items()}))
    cfg.freeze()
    resolved = in_iterations(cfg, epochs, images)
    assert length(resolved) == (None, *expected) and resolved.is_frozen()
    assert length(cfg) == (None, max_iter, steps)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("MAX_ITER", 0, "SOLVER.MAX_ITER is 0; it must be a number at least 1."),
        ("IMS_PER_BATCH", 0, "SOLVER.IMS_PER_BATCH is 0; it must be a number at least 1."),
        ("STEPS", ("a",), "SOLVER.STEPS is ('a',); it must be a list of iterations."),
    ],
)
def test_schedules_without_a_scale(key: str, value: object, sentence: str) -> None:
    cfg = load_config("", [f"SOLVER.{key}", value])
    with pytest.raises(UserError) as caught:
        in_iterations(cfg, 1, 6)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("value", [0, -1, "0.0", math.nan, math.inf, True, "twelve", 2e6])
def test_values_that_are_no_length(value: object) -> None:
    with pytest.raises(
        UserError, match=r"^SOLVER\.EPOCHS is .*; it must be None or a number above 0 and at most 1000000\.$"
    ):
        load_config("", ["SOLVER.EPOCHS", value])


# ------------------------------------------------------------------------------------- images of an epoch


def _crowd_alone(tree: dict) -> None:
    """Let the second of the six images have only crowds. The third one has no objects."""
    for annotation in tree["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == 2)


FILTERED = {"DATALOADER__FILTER_EMPTY_ANNOTATIONS": True}
PSEUDO = {"MODEL__KD__PSEUDO_LABELS__ENABLED": True, "MODEL__KD__DISTILLERS": ()}


@pytest.mark.parametrize(
    ("keys", "images"),
    [
        ({}, 6),
        (FILTERED, 4),
        (FILTERED | PSEUDO, 6),
        ({"DATALOADER__SAMPLER_TRAIN": "RandomSubsetTrainingSampler", "DATALOADER__RANDOM_SUBSET_RATIO": 0.5}, 3),
        ({"SOLVER__GRADIENT_ACCUMULATION_STEPS": 2}, 6),
    ],
    ids=["all", "filtered", "pseudo-labels", "subset", "accumulation"],
)
def test_images_of_a_training_and_of_data_check(tmp_path: Path, clean: None, keys: dict, images: int) -> None:
    """Check 10 epochs in batches of 2: 5 iterations for each image, in both."""
    project = make_project(tmp_path, SOLVER__EPOCHS=10, **keys)
    project.change_annotations(_crowd_alone)
    cfg = load_config(str(project.student))
    register_coco_json(cfg)
    assert length(resolve_epochs(cfg)) == (None, 5 * images, (round(0.75 * 5 * images),))
    check = check_sets(sets_of_config(str(project.student), ["DATASETS.TEST", ()])[0])
    text = schedule_of_config(str(project.student), ["DATASETS.TEST", ()], check)
    assert text.startswith(
        f"SOLVER.EPOCHS 10 of {images} training images with batches of 2: SOLVER.MAX_ITER {5 * images}, "
    )


def test_images_with_keypoints(tmp_path: Path, clean: None) -> None:
    """Check that images with fewer visible keypoints than MIN_KEYPOINTS_PER_IMAGE do not count."""
    project = make_project(
        tmp_path,
        "faster-rcnn",
        SOLVER__EPOCHS=10,
        MODEL__KEYPOINT_ON=True,
        MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS=1,
        MODEL__ROI_KEYPOINT_HEAD__MIN_KEYPOINTS_PER_IMAGE=2,
        INPUT__RANDOM_FLIP="none",
    )

    def one_point_per_object(tree: dict) -> None:
        for category in tree["categories"]:
            category["keypoints"] = ["nose"]
        for annotation in tree["annotations"]:
            annotation["keypoints"] = [annotation["bbox"][0] + 1, annotation["bbox"][1] + 1, 2]

    project.change_annotations(one_point_per_object)  # of 1, 2, 0, 1, 2, 3 objects
    cfg = load_config(str(project.student))
    register_coco_json(cfg)
    assert resolve_epochs(cfg).SOLVER.MAX_ITER == 15
    check = check_sets(sets_of_config(str(project.student), ["DATASETS.TEST", ()])[0])
    assert " of 3 training images " in schedule_of_config(str(project.student), ["DATASETS.TEST", ()], check)


@pytest.mark.parametrize(
    ("sampler", "images"),
    [("TrainingSampler", 12), ("WeightedTrainingSampler", 30), ("RepeatFactorTrainingSampler", 14)],
)
def test_images_that_are_repeated(tmp_path: Path, clean: None, sampler: str, images: int) -> None:
    """Check two sets, the first one four times, and a class in 2 of 12 images: each sqrt((2 / 3) / (1 / 6)) = 2 times."""
    entries = []
    for role, seed in (("a", 0), ("b", 3)):
        path = make_coco(tmp_path / role, 6, seed=seed)
        entries.append([f"epochs_{role}_{sampler}", str(path), str(path.parent / "images")])
        tree = Project(tmp_path, path, path, path, path, role)
        tree.change_annotations(lambda tree, role=role: _one_object_each(tree, rare=2 if role == "a" else 0))
    keys = {
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "DATASETS.COCO_JSON": entries,
        "DATASETS.TRAIN": [name for name, _, _ in entries],
        "DATASETS.TEST": (),
        "DATALOADER.SAMPLER_TRAIN": sampler,
        "DATALOADER.REPEAT_THRESHOLD": 2 / 3,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.EPOCHS": 10,
        "SOLVER.WARMUP_ITERS": 0,
    }
    if sampler == "WeightedTrainingSampler":
        keys["DATASETS.TRAIN_REPEAT_FACTOR"] = [[entries[0][0], 4.0]]
    opts = [part for pair in keys.items() for part in pair]
    cfg = load_config("", opts)
    register_coco_json(cfg)
    assert 5 * images == resolve_epochs(cfg).SOLVER.MAX_ITER
    file = str(write_yaml(tmp_path / "all.yaml", merged(*({k: v} for k, v in _nested(keys).items()))))
    text = schedule_of_config(file, [], check_sets(sets_of_config(file, [])[0]))
    assert f" of {images} training images " in text


def _one_object_each(tree: dict, rare: int) -> None:
    """Give every image one object, of the third class in the first `rare` images and else of the first class."""
    tree["annotations"] = [
        {
            "id": n,
            "image_id": n,
            "category_id": 3 if n <= rare else 1,
            "bbox": [5, 5, 20, 20],
            "area": 400,
            "iscrowd": 0,
        }
        for n in range(1, 7)
    ]


def _nested(keys: dict[str, object]) -> dict:
    tree: dict = {}
    for key, value in keys.items():
        node, _, leaf = key.partition(".")
        tree.setdefault(node, {})[leaf] = value
    return tree


def test_a_set_without_images(tmp_path: Path, clean: None) -> None:
    project = make_project(tmp_path, SOLVER__EPOCHS=1, **FILTERED, MODEL__META_ARCHITECTURE="RetinaNet")
    project.change_annotations(lambda tree: tree["annotations"].clear())
    cfg = load_config(str(project.student))
    register_coco_json(cfg)
    with pytest.raises(UserError, match=f"^DATASETS.TRAIN {project.name} cannot be trained on: No valid data found"):
        resolve_epochs(cfg)


# ------------------------------------------------------------------------------------------------- conflicts


def test_which_key_wins(tmp_path: Path) -> None:
    """Check that a length set after EPOCHS is refused, and so are steps whose scale is elsewhere, unless EPOCHS is None."""
    base = write_yaml(tmp_path / "base.yaml", {"SOLVER": {"MAX_ITER": 90, "STEPS": [60, 80]}})
    mine = write_yaml(tmp_path / "my.yaml", {"_BASE_": "base.yaml", "SOLVER": {"EPOCHS": 12}})
    both = write_yaml(tmp_path / "both.yaml", {"_BASE_": "my.yaml", "SOLVER": {"MAX_ITER": 12, "STEPS": [8, 11]}})
    assert length(load_config(str(mine))) == (12, 90, (60, 80))
    assert length(load_config(str(base), ["SOLVER.EPOCHS", 2, "SOLVER.MAX_ITER", 12, "SOLVER.STEPS", (8,)])) == (
        2,
        12,
        (8,),
    )
    assert length(load_config(str(mine), ["SOLVER.STEPS", ()])) == (12, 90, ())
    assert length(load_config(str(mine), ["SOLVER.EPOCHS", None, "SOLVER.MAX_ITER", 10])) == (None, 10, (60, 80))
    assert length(load_config(str(base), ["SOLVER.STEPS", (9,)])) == (None, 90, (9,))
    for file, opts, sentence in (
        (mine, ["SOLVER.MAX_ITER", "10"], f"SOLVER.MAX_ITER comes from the command line, but SOLVER.EPOCHS 12 from {mine} determines"),
        (both, [], f"SOLVER.MAX_ITER comes from {both}, but SOLVER.EPOCHS 12 from {mine} determines"),
        (base, ["SOLVER.EPOCHS", "6", "SOLVER.STEPS", "(40,)"], "SOLVER.STEPS comes from the command line, but not SOLVER.MAX_ITER, of which"),
        (mine, ["SOLVER.STEPS", "(40,)"], "SOLVER.STEPS comes from the command line, but not SOLVER.MAX_ITER, of which"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            load_config(str(file), opts)
        assert str(caught.value).startswith(sentence)


def test_a_warm_up_that_does_not_end(tmp_path: Path, clean: None) -> None:
    project = make_project(tmp_path, SOLVER__EPOCHS=2, SOLVER__WARMUP_ITERS=6)
    sentence = (
        "SOLVER.WARMUP_ITERS is 6, but SOLVER.EPOCHS 2 is a training of 6 iterations, which would never reach SOLVER.BASE_LR: lower "
        "SOLVER.WARMUP_ITERS, or raise SOLVER.EPOCHS."
    )
    with pytest.raises(SystemExit):
        project.main()
    assert not list(project.output.glob("*.pth"))
    with pytest.raises(UserError) as caught:
        make_trainer(project)
    assert str(caught.value) == sentence
    check = check_sets(sets_of_config(str(project.student), [])[0])
    assert schedule_of_config(str(project.student), [], check).endswith(f"\n{sentence}")
    assert resolve_epochs(load_config(str(project.student), ["SOLVER.WARMUP_ITERS", 5])).SOLVER.MAX_ITER == 6


@pytest.mark.parametrize(("steps", "scaled"), [((74, 80), (5, 5)), ((3,), (0,)), ((88,), (6,))])
def test_steps_on_one_iteration(tmp_path: Path, clean: None, steps: tuple[int, ...], scaled: tuple[int, ...]) -> None:
    solver = {"SOLVER__EPOCHS": 2, "SOLVER__MAX_ITER": 90, "SOLVER__STEPS": steps, "SOLVER__WARMUP_ITERS": 0}
    project = make_project(tmp_path, **solver)
    sentence = (
        f"SOLVER.EPOCHS 2 is a training of 6 iterations, in which SOLVER.STEPS would be {scaled}; they must be different iterations between "
        "0 and 6: raise SOLVER.EPOCHS, or set SOLVER.STEPS to fewer steps or to ()."
    )
    with pytest.raises(UserError) as caught:
        make_trainer(project)
    assert str(caught.value) == sentence
    check = check_sets(sets_of_config(str(project.student), [])[0])
    assert schedule_of_config(str(project.student), [], check).endswith(f"\n{sentence}")
    cosine = load_config(str(project.student), ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"])
    assert resolve_epochs(cosine).SOLVER.MAX_ITER == 6  # it has no steps


def test_the_start_of_a_method(tmp_path: Path, clean: None) -> None:
    """Check that it is compared with the iterations of EPOCHS, not with the MAX_ITER that gives the steps their scale."""
    project = make_project(tmp_path, SOLVER__EPOCHS=12, SOLVER__MAX_ITER=12, SOLVER__STEPS=(8, 11))
    cfg = load_config(str(project.student), ["MODEL.KD.FEATURE_IMITATION.START_ITER", 20])
    register_coco_json(cfg)
    resolved = resolve_epochs(cfg)
    assert length(resolved) == (None, 36, (24, 33))
    assert resolved.MODEL.KD.FEATURE_IMITATION.START_ITER == 20
    cfg = load_config(str(project.student), ["MODEL.KD.FEATURE_IMITATION.START_ITER", 36])
    with pytest.raises(
        UserError, match=r"START_ITER is 36, but training ends at SOLVER\.MAX_ITER 36: it would never run"
    ):
        resolve_epochs(cfg)


# ------------------------------------------------------------------------------------------------- trainings


def test_a_training_its_config_and_its_extension(tmp_path: Path) -> None:
    """Check 3 epochs of 6 images in batches of 4, the config that is written, one trained from it, and --resume with 4."""
    project = make_project(tmp_path, **SHORT | {"SOLVER__STEPS": (3,)}, SOLVER__EPOCHS=3, SOLVER__IMS_PER_BATCH=4)
    project.main("SEED", 1)
    written = read_config(str(project.output / "config.yaml"))
    assert length(written) == (None, 4, (3,))  # 4.5 iterations
    assert read_config(str(project.output / "student.yaml")).SOLVER.MAX_ITER == 4
    assert read_checkpoint(str(project.output / "model_final.pth"))["iteration"] == 3
    log = (project.output / "log.txt").read_text()
    assert "SOLVER.EPOCHS 3 of 6 training images with batches of 4: SOLVER.MAX_ITER 4, SOLVER.STEPS (3,)\n" in log
    shutil.copy(project.output / "config.yaml", tmp_path / "again.yaml")
    project.main("OUTPUT_DIR", tmp_path / "again", config=tmp_path / "again.yaml")
    again = read_config(str(tmp_path / "again" / "config.yaml"))
    again.OUTPUT_DIR = written.OUTPUT_DIR
    assert again == written
    project.main("--resume", "SEED", 1, "SOLVER.EPOCHS", 4)
    assert length(read_config(str(project.output / "config.yaml"))) == (None, 6, (4,))
    assert read_checkpoint(str(project.output / "model_final.pth"))["iteration"] == 5
    assert "SOLVER.MAX_ITER 4, now 6" in (project.output / "log.txt").read_text()


def test_resuming_has_the_losses_of_an_uninterrupted_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = {"SOLVER__EPOCHS": 1.4, "SOLVER__CHECKPOINT_PERIOD": 2, "SEED": 1, **SHORT}  # 4.2 iterations
    unbroken = train(make_project(tmp_path / "unbroken", **keys))
    project = make_project(tmp_path / "broken", **keys)
    train(project, "SOLVER.EPOCHS", 0.7)  # 2.1 iterations
    resumed = train(project, resume=True)
    assert sorted(resumed.losses) == [2, 3]
    assert resumed.losses[3] == pytest.approx(unbroken.losses[3], rel=1e-3)
    assert "the checkpoint was written with: SOLVER.MAX_ITER 2, now 4." in caplog.text
    caplog.clear()
    train(project, resume=True)
    assert "the checkpoint was written with" not in caplog.text


def test_epochs_with_fewer_processes_than_the_config_is_for(tmp_path: Path) -> None:
    """Check that two epochs of 6 images are 3 batches of 4 for two processes, and 6 batches of 2 for one."""
    project = make_project(tmp_path, **SHORT, SOLVER__EPOCHS=2, SOLVER__IMS_PER_BATCH=4, SOLVER__REFERENCE_WORLD_SIZE=2)
    with clean_process():
        trainer = make_trainer(project)
    assert (trainer.max_iter, trainer.cfg.SOLVER.IMS_PER_BATCH, trainer.cfg.SOLVER.EPOCHS) == (6, 2, None)


def test_evaluations_and_checkpoints_beyond_the_end(tmp_path: Path) -> None:
    """Check that periods longer than the training mean one evaluation and one checkpoint at its end."""
    project = make_project(
        tmp_path,
        SOLVER__EPOCHS=0.4,
        SOLVER__STEPS=(),
        SOLVER__WARMUP_ITERS=0,
        SOLVER__CHECKPOINT_PERIOD=500,
        TEST__EVAL_PERIOD=500,
    )
    assert "bbox" in project.main()
    assert {path.name for path in project.output.glob("*.pth")} == {"model_final.pth", "model_best.pth"}


def test_analyses_of_a_training(tmp_path: Path, clean: None) -> None:
    """Check that an analysis that reads training data has the iterations of the training."""
    project = make_project(tmp_path, SOLVER__EPOCHS=10)
    (distillation,) = load_distillations([str(project.student)], train=True)
    assert distillation.cfg.SOLVER.MAX_ITER == 30


# ------------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_resumes_only_the_same_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a training whose config has the iterations: the sweep goes on with the same keys, and refuses others."""
    project = make_project(tmp_path, SOLVER__EPOCHS=10)
    monkeypatch.setattr(runner, "PROGRAM", ("false",))

    def job(*opts: object) -> runner.Job:
        cell = Cell("cell", "cell", str(project.student), opts)
        return training_job(cell, 0, str(tmp_path / "runs"), str(tmp_path / "results"), [])

    (failed,) = run_jobs([job()], 1, 1)
    cfg = load_config(str(project.student))
    with clean_process():
        register_coco_json(cfg)
        (Path(failed.output) / "config.yaml").write_text(resolve_epochs(cfg).dump())
    (Path(failed.output) / "last_checkpoint").write_text("model_final.pth")
    assert len(run_jobs([job()], 1, 1)) == 1  # it was started, and failed
    for opts, difference in (
        (["SOLVER.EPOCHS", 11], "SOLVER.EPOCHS: 10 then, 11 now"),
        (["SOLVER.EPOCHS", None], "SOLVER.EPOCHS: 10 then, default now"),
        (["SOLVER.GAMMA", 0.2], "SOLVER.GAMMA: default then, 0.2 now"),
        (["SOLVER.MAX_ITER", 8, "SOLVER.STEPS", (7,), "SOLVER.EPOCHS", 10], "SOLVER.MAX_ITER: 4 then, 8 now"),
    ):
        with pytest.raises(UserError) as caught:
            run_jobs([job(*opts)], 1, 1)
        assert f"({difference})" in str(caught.value)


def test_progress_is_that_of_the_iterations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that a tenth of the training is one of the iterations in its config."""
    caplog.set_level(logging.INFO, "kd_d2")
    write_yaml(tmp_path / "config.yaml", {"SOLVER": {"MAX_ITER": 100}})
    job = runner.Job("cell", 0, [], str(tmp_path), "", {"SOLVER.EPOCHS": 12, "SOLVER.MAX_ITER": 12})
    for iterations, lines in ((7, 1), (8, 1), (12, 2)):
        (tmp_path / "metrics.json").write_text(
            "\n" * iterations + f'{{"iteration": {iterations}, "total_loss": 1.0}}\n'
        )
        runner._report_progress(job)
        assert len(caplog.messages) == lines
