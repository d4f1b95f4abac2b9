"""Bad input to train_net.py: one sentence that names it, status 2, no traceback, and no partially written files."""

import argparse
import contextlib
import errno
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from kd_d2.config import load_config, read_config
from kd_d2.data import register_coco_json
from kd_d2.engine import checks, evaluate_teacher, launch
from kd_d2.engine.checks import check_classes, check_datasets, check_device, check_expected_results
from kd_d2.engine.setup import set_float32_precision
from kd_d2.engine.trainer import KDTrainer
from kd_d2.errors import UserError, as_user_error
from kd_d2.files import write_text
from kd_d2.label_file import write_label_file
from kd_d2.modeling import building
from kd_d2.modeling.building import building_from
from kd_d2.teacher import Teacher

import pytest
import torch
from detectron2.config import defaults
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.modeling import build_model
from detectron2.utils.develop import create_dummy_class
from helpers import CLASSES, ROOT, TINY, Project, clean_process, make_coco, make_project, save_fixed_weights
from torch.multiprocessing import ProcessExitedException

# Files that may be in OUTPUT_DIR before training starts, each of them complete.
BEFORE_TRAINING = {".training.lock", "config.yaml", "log.txt", "metrics.json", "student.yaml", "versions.json"}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path, "retinanet")


@pytest.fixture
def refused(project: Project, capfd: pytest.CaptureFixture):
    """Return a function (arguments of train_net.py) -> message that checks what all bad inputs have in common."""

    def run(*args: object, config: Path | None = None) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            project.main(*args, config=config)
        out, err = capfd.readouterr()
        assert caught.value.code == 2
        assert "Traceback" not in out + err
        said = err.splitlines()[-1]
        assert said.startswith("error: ")
        assert err.count("error: ") == 1
        if project.output.is_dir():
            left = {p.name for p in project.output.iterdir()}
            assert left <= BEFORE_TRAINING
            assert ("config.yaml" in left) == ("student.yaml" in left)
        return said.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--num-gpus", -1], "--num-gpus is -1; with --num-machines 1 it must be at least 0."),
        (["--num-gpus", 0, "--num-machines", 2], "--num-gpus is 0; with --num-machines 2 it must be at least 1."),
        (["--num-machines", -1], "--num-machines is -1; it must be at least 1."),
        (["--machine-rank", 1], "--machine-rank is 1; it must be from 0 to below --num-machines 1."),
        (["--num-machines", 2, "--dist-url", "auto"], "--num-machines: several machines need --dist-url, such as tcp://HOST:PORT"),
        (["TEST.AUG.ENABLED", True], "TEST.AUG.ENABLED is True: test-time augmentation is not supported."),
        (
            ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler", "DATALOADER.RANDOM_SUBSET_RATIO", 0.01],
            "DATALOADER.RANDOM_SUBSET_RATIO is 0.01, which is less than one of the ",
        ),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(refused, arguments: list, sentence: str) -> None:
    assert refused(*arguments).startswith(sentence)


def test_a_sampler_is_checked_before_a_model_is_built(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that an evaluation ignores it."""
    monkeypatch.setattr(KDTrainer, "build_model", lambda cfg: pytest.fail("a model was built"))
    sampler = ("DATALOADER.SAMPLER_TRAIN", "Shuffler")
    assert refused(*sampler).startswith("DATALOADER.SAMPLER_TRAIN is 'Shuffler'")
    assert "TEST.EXPECTED_RESULTS" in refused("--eval-only", *sampler, "TEST.EXPECTED_RESULTS", [["bbox"]])


def test_a_test_set_without_annotations_needs_no_masks(tmp_path: Path) -> None:
    """Check a file as COCO's test-dev, which has images and categories alone."""
    tree = json.loads(make_coco(tmp_path).read_text())
    del tree["annotations"]
    (tmp_path / "test-dev.json").write_text(json.dumps(tree))
    with clean_process():
        register_coco_instances("test_dev", {}, str(tmp_path / "test-dev.json"), str(tmp_path / "images"))
        cfg = read_config("", ["DATASETS.TEST", ("test_dev",), "MODEL.MASK_ON", True])
        check_datasets(cfg, train=False)


def test_a_test_set_without_a_file_of_annotations_needs_no_masks(tmp_path: Path) -> None:
    """Check that a detector with masks can be evaluated on the boxes of Pascal VOC."""
    with clean_process():
        DatasetCatalog.register("boxes", list)
        MetadataCatalog.get("boxes").set(dirname=str(tmp_path), evaluator_type="pascal_voc", year=2007)
        check_datasets(read_config("", ["DATASETS.TEST", ("boxes",), "MODEL.MASK_ON", True]), train=False)


@pytest.mark.parametrize("year", [2010, None])
def test_pascal_voc_of_a_year_without_a_metric(tmp_path: Path, year: int | None) -> None:
    with clean_process():
        DatasetCatalog.register("boxes", list)
        MetadataCatalog.get("boxes").set(dirname=str(tmp_path), evaluator_type="pascal_voc", year=year)
        with pytest.raises(UserError, match=f"names boxes, a Pascal VOC dataset of the year {year}; register it with"):
            check_datasets(read_config("", ["DATASETS.TEST", ("boxes",)]), train=False)


def test_an_evaluation_without_a_dataset(refused) -> None:
    assert refused("--eval-only", "DATASETS.TEST", ()) == "DATASETS.TEST is empty: name a dataset."


def test_test_sets_that_another_program_registers(tmp_path: Path) -> None:
    """Check sets without annotation file for what the COCO evaluation needs: sizes, and masks for MODEL.MASK_ON."""
    path = make_coco(tmp_path)
    dicts = load_coco_json(str(path), str(tmp_path / "images"))
    with clean_process():
        DatasetCatalog.register("own", lambda: dicts)
        MetadataCatalog.get("own").set(thing_classes=list(CLASSES), evaluator_type="coco")
        cfg = read_config("", ["DATASETS.TEST", ("own",)])
        check_datasets(cfg, train=False)
        cfg.MODEL.MASK_ON = True
        file = dicts[0]["file_name"]
        with pytest.raises(UserError) as caught:
            check_datasets(cfg, train=False)
        assert str(caught.value).startswith(
            f"DATASETS.TEST names 'own', whose object in {file} has no segmentation, but MODEL.MASK_ON is True"
        )
        del dicts[0]["width"]
        with pytest.raises(UserError) as caught:
            check_datasets(cfg, train=False)
        assert str(caught.value) == (
            f"DATASETS.TEST names 'own', whose entry of {file} has no width and height, which the COCO evaluation needs."
        )


@pytest.mark.parametrize("is_lazy", [False, True])
@pytest.mark.parametrize("names", [CLASSES[::-1], ("bird", "fish", "snail")])
def test_classes_of_test_sets_that_another_program_registers(
    project: Project, refused, tmp_path: Path, names: tuple[str, ...], is_lazy: bool
) -> None:
    """Check another order and other names, also if Detectron2 has yet to read them from the file."""
    path = make_coco(tmp_path / "own", classes=names)
    with clean_process():
        register_coco_instances(
            "own", {} if is_lazy else {"thing_classes": list(names)}, str(path), str(path.parent / "images")
        )
        assert refused(*plain("DATASETS.TEST", ("own",))) == (
            f"The dataset own has the classes {', '.join(names)}, but the dataset {project.name} has {', '.join(CLASSES)}: the class "
            "indices of a registered dataset are not changed, so register both with the same classes in the same order."
        )


def test_two_datasets_of_one_name(project: Project, refused) -> None:
    entry = [project.name, str(project.annotations), str(project.annotations.parent / "images")]
    project.change(DATASETS__COCO_JSON=[entry, entry])
    assert refused() == f"DATASETS.COCO_JSON has several entries with the name {project.name!r}."


def plain(*opts: object) -> list[object]:
    return ["MODEL.META_ARCHITECTURE", "RetinaNet", *opts]


# ------------------------------------------------------------------------------------------------ the teacher


def test_missing_teacher_weights(project: Project, refused) -> None:
    """Check that the key and the path are named, and that no output folder is created."""
    gone = project.folder / "gone.pth"
    assert refused("MODEL.KD.TEACHER.WEIGHTS", gone) == f"MODEL.KD.TEACHER.WEIGHTS: there is no file {gone}."
    assert not project.output.exists()


def test_missing_teacher_config(project: Project, refused) -> None:
    """Check that the key and both searched paths are named, and that no output folder is created."""
    project.teacher.unlink()
    assert refused().startswith(
        f"MODEL.KD.TEACHER.CONFIG_FILE: there is no file {Path.cwd() / 'teacher.yaml'} or {project.teacher}, and no config "
    )
    assert not project.output.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_corrupt_teacher_weights(project: Project, refused, damage: str) -> None:
    """Check that the damaged file is named."""
    whole = project.teacher_weights.read_bytes()
    project.teacher_weights.write_bytes({"cut": whole[:20000], "empty": b"", "garbage": b"\xe4" * 5000}[damage])
    assert refused().startswith(
        f"Checkpoint {project.teacher_weights} is damaged or not a checkpoint: it cannot be read ("
    )


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_malicious_teacher_weights(project: Project, refused, suffix: str) -> None:
    """Check that weights that would run a command are refused, and that it is not run."""
    marker = project.folder / "executed"
    evil = functools.partial(os.system, f"touch '{marker}'")
    path = project.folder / f"evil.{suffix}"
    path.write_bytes(pickle.dumps({"model": evil})) if suffix == "pkl" else torch.save({"model": evil}, path)
    said = refused("MODEL.KD.TEACHER.WEIGHTS", path)
    assert said.startswith(
        f"Checkpoint {path} was not loaded: it holds more than tensors and plain data (functools.partial)"
    )
    assert not marker.exists()


def test_weights_of_another_detector(project: Project, refused, tmp_path: Path) -> None:
    """Check that weights that fill most of the teacher's parameters, or none, are refused."""
    other = make_project(tmp_path / "other", "faster-rcnn")
    assert refused("MODEL.KD.TEACHER.WEIGHTS", other.teacher_weights) == (
        f"{other.teacher_weights} fills 90 of 102 parameters of the teacher (RetinaNet); the first one not filled is "
        "backbone.top_block.p6.bias. Do its config and weights match?"
    )
    torch.save({"model": {"weight": torch.zeros(1)}}, project.teacher_weights)
    assert refused() == f"{project.teacher_weights} fills no parameter of RetinaNet: it is another model's checkpoint."


def test_weights_of_another_class_count(project: Project, refused) -> None:
    """Check that the tensor that does not fit is named with both shapes."""
    project.change_teacher(MODEL__RETINANET__NUM_CLASSES=5)
    assert refused() == (
        f"{project.teacher_weights} fills 100 of 102 parameters of the teacher (RetinaNet); the first one not filled is "
        "head.cls_score.bias (shape (27,) instead of (45,)). Do its config and weights match?"
    )


def test_starting_weights_for_a_teacher(project: Project, refused) -> None:
    """Check that weights of a backbone are not accepted as a trained teacher."""
    import torchvision

    torch.save(torchvision.models.resnet18(weights=None).state_dict(), project.teacher_weights)
    project.change_teacher(MODEL__SLIM_RESNET__WIDTHS=(64, 128, 256, 512), MODEL__RESNETS__STEM_OUT_CHANNELS=64)
    assert refused() == (
        f"{project.teacher_weights} has initial weights of a classifier, but the teacher must be a trained detector."
    )


def test_a_teacher_config_with_code(project: Project, refused) -> None:
    """Check that the teacher's YAML does not run code."""
    marker = project.folder / "executed"
    project.teacher.write_text(f'SEED: !!python/object/apply:os.mkdir ["{marker}"]\n')
    assert refused().startswith(f"Config file {project.teacher} is not plain yaml: ")
    assert not marker.exists()


# ---------------------------------------------------------------------------------------------------- the pair


@pytest.mark.parametrize(
    ("keys", "users"),
    [
        ({"DISTILLERS": ("FeatureImitation", "RankMimicking", "PFI")}, "RankMimicking and PFI"),
        ({"PSEUDO_LABELS__ENABLED": True}, "MODEL.KD.PSEUDO_LABELS"),
    ],
)
def test_class_counts_of_student_and_teacher(project: Project, refused, keys: dict, users: str) -> None:
    """Check that both detectors, both counts and what needs the classes are named."""
    project.change_teacher(MODEL__RETINANET__NUM_CLASSES=5)
    save_fixed_weights(project.teacher, project.teacher_weights)
    project.change(**{f"MODEL__KD__{key}": value for key, value in keys.items()})
    assert refused() == (
        f"The student (RetinaNet) has 3 classes and the teacher (RetinaNet) 5; they must be the same for {users}. Methods that "
        "compare only features allow different classes."
    )


@pytest.mark.parametrize("eval_only", [False, True])
def test_class_counts_of_data_and_model(project: Project, refused, eval_only: bool) -> None:
    """Check that dataset, model and both counts are named, in training of a plain model and in evaluation."""
    args = ["--eval-only", "MODEL.WEIGHTS", project.teacher_weights] if eval_only else plain()
    assert refused(*args, "MODEL.RETINANET.NUM_CLASSES", 4) == (
        f"The dataset {project.name} has 3 classes, but the model (RetinaNet) predicts 4: set MODEL.RETINANET.NUM_CLASSES "
        "accordingly."
    )


def test_class_counts_of_data_and_teacher(project: Project) -> None:
    """Check that the teacher's config is named if the teacher alone is evaluated."""
    project.change_teacher(MODEL__RETINANET__NUM_CLASSES=4)
    save_fixed_weights(project.teacher, project.teacher_weights)
    cfg = load_config(str(project.student))
    with clean_process():
        register_coco_json(cfg)
        with pytest.raises(UserError) as caught:
            evaluate_teacher(cfg, Teacher.from_config(cfg))
    assert str(caught.value) == (
        f"The dataset {project.name} has 3 classes, but the model (RetinaNet) predicts 4: set the number of classes in the "
        "teacher's config accordingly."
    )


def test_class_counts_of_test_sets(project: Project) -> None:
    """Check a test set with more classes than the training set."""
    more = make_coco(project.folder / "more", classes=("red", "green", "blue", "gray"))
    cfg = load_config(str(project.student))
    with clean_process():
        register_coco_json(cfg)
        check_classes(cfg, build_model(cfg))
        register_coco_instances("more", {}, str(more), str(more.parent / "images"))
        MetadataCatalog.get("more").thing_classes = ["red", "green", "blue", "gray"]
        cfg.DATASETS.TEST = (project.name, "more")
        with pytest.raises(UserError, match=r"^The dataset more has 4 classes, but the model \(RetinaNet\) "):
            check_classes(cfg, build_model(cfg))


def test_a_dropped_category_in_the_class_count(project: Project, refused) -> None:
    """Check that the placeholder of a Roboflow export, which Detectron2 counts, is named."""
    root = {"id": 0, "name": "colors", "supercategory": "none"}
    project.change_annotations(lambda tree: [c.update(supercategory="colors") for c in tree["categories"]])
    project.change_annotations(lambda tree: tree["categories"].insert(0, root))
    assert refused(*plain("MODEL.RETINANET.NUM_CLASSES", 4)).startswith(
        f"The dataset {project.name} has 3 classes (without the placeholder category 'colors'), but the model (RetinaNet) "
    )


@pytest.mark.parametrize(
    ("opts", "reason"),
    [
        (["MODEL.FPN.IN_FEATURES", ["res9"]], "KeyError: 'res9', which is in MODEL.FPN.IN_FEATURES."),
        (["MODEL.RETINANET.IN_FEATURES", ["p9"]], "KeyError: 'p9', which is in MODEL.RETINANET.IN_FEATURES."),
        (
            ["MODEL.RETINANET.IOU_THRESHOLDS", [-0.5, 0.5]],
            "AssertionError: assert thresholds[0] > 0 (matcher.py, line ",
        ),
        (["MODEL.FPN.OUT_CHANNELS", -4], "RuntimeError: Trying to create tensor with negative dimension -4"),
    ],
)
@pytest.mark.parametrize("distilled", [False, True])
def test_a_detector_that_cannot_be_built(refused, opts: list, reason: str, distilled: bool) -> None:
    sentence = refused(*opts) if distilled else refused(*plain(*opts))
    assert sentence.startswith(f"The detector cannot be built from MODEL: {reason}")


def test_operators_that_are_not_compiled() -> None:
    dummy = create_dummy_class("DeformConv", "detectron2._C", "detectron2 is not compiled successfully")
    with pytest.raises(UserError) as caught, building_from("MODEL"):
        dummy()
    assert str(caught.value) == (
        "The detector cannot be built from MODEL: Cannot import 'detectron2._C', therefore 'DeformConv' is not available: this Detectron2 has no "
        "compiled operators; install the official one (make setup DETECTRON2=source)."
    )


def test_a_teacher_that_cannot_be_built(project: Project, refused) -> None:
    project.change_teacher(MODEL__FPN__IN_FEATURES=["res9"])
    sentence = "The detector cannot be built from MODEL of the teacher's config {}: KeyError: 'res9', which is in MODEL.FPN.IN_FEATURES."
    assert refused() == sentence.format(project.teacher)


def test_names_that_are_not_registered(project: Project, refused) -> None:
    """Check that --import is named for a student, a plain detector, and a backbone of the teacher."""
    hint = "; if it is your own, import the file that registers it with --import."
    for opts in (["MODEL.KD.STUDENT", "Own"], ["MODEL.META_ARCHITECTURE", "Own"]):
        assert refused(*opts).endswith(hint)
    project.change_teacher(MODEL__BACKBONE__NAME="build_my_backbone")
    said = refused()
    assert "KeyError: " in said and "build_my_backbone" in said and said.endswith(hint)


def test_an_error_in_a_users_detector_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), building_from("MODEL"):
        {}["res9"]


def test_no_common_stride(project: Project, refused) -> None:
    """Check that the strides of both detectors are named."""
    project.change_teacher(
        MODEL__BACKBONE__NAME="build_slim_resnet_backbone",
        MODEL__RESNETS__OUT_FEATURES=["res2"],
        MODEL__RETINANET__IN_FEATURES=["res2"],
        MODEL__ANCHOR_GENERATOR__SIZES=[[16, 20, 25]],
    )
    save_fixed_weights(project.teacher, project.teacher_weights)
    assert refused() == (
        "The student (RetinaNet, strides [8, 16, 32, 64, 128]) and the teacher (RetinaNet, strides [4]) have no feature level of "
        "the same stride."
    )


@pytest.mark.parametrize("distiller", [("FeatureImitation", "FEATURE_IMITATION"), ("StructuralKD", "STRUCTURAL")])
def test_other_channels_without_adaptation(project: Project, refused, distiller: tuple[str, str]) -> None:
    """Check that stride, channels and the remedy are named."""
    name, node = distiller
    assert refused("MODEL.FPN.OUT_CHANNELS", 24, "MODEL.KD.DISTILLERS", (name,)) == (
        f"MODEL.KD.{node}.ADAPTATION is 'none', but at stride 8 the student has 24 channels and the teacher 16: set it to '1x1'."
    )


def test_nothing_to_inherit(project: Project, refused) -> None:
    """Check that inheriting is refused if no weight would be copied."""
    other = {"MODEL.FPN.OUT_CHANNELS": 24, "MODEL.FPN.NORM": "", "MODEL.KD.DISTILLERS": ()}
    opts = [part for pair in other.items() for part in pair]
    assert refused("MODEL.KD.INHERIT.ENABLED", True, *opts) == (
        "MODEL.KD.INHERIT: no weight of the teacher's neck and head (RetinaNet) fits the student (RetinaNet) by name and shape."
    )


# ---------------------------------------------------------------------------------------------------- the data


def _no_images(tree: dict) -> None:
    tree["images"], tree["annotations"] = [], []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_no_images, " has no images."),
        (lambda tree: tree.pop("categories"), " is not a COCO annotation file: it needs the lists "),
        (
            lambda tree: tree["annotations"][1].update(bbox=[1, 2, 3]),
            ": the annotation with id 2 has the bbox [1, 2, 3]; it",
        ),
        (
            lambda tree: tree["images"][1].update(id=1),
            ": the id 1 occurs more than once in its images; annotations refer to it, so ids must be unique.",
        ),
        (lambda tree: tree["images"][1].update(file_name="gone.png"), ": 1 of 6 images are not in "),
    ],
)
def test_annotation_files(project: Project, refused, change, expected: str) -> None:
    """Check that the file and its error are named, with and without a teacher."""
    project.change_annotations(change)
    for opts in ([], plain()):
        assert refused(*opts).startswith(f"{project.annotations}{expected}")


def test_an_annotation_file_that_is_no_json(project: Project, refused) -> None:
    project.annotations.write_text("xml")
    assert refused() == (f"{project.annotations} is not readable json: Expecting value: line 1 column 1 (char 0).")


def test_a_set_of_which_nothing_is_left(project: Project, refused) -> None:
    """Check that a dataset whose images are all filtered out is refused before training."""
    project.change_annotations(lambda tree: tree.update(annotations=[]))
    assert refused("DATALOADER.FILTER_EMPTY_ANNOTATIONS", True) == (
        f"DATASETS.TRAIN {project.name} cannot be trained on: No valid data found in {project.name}."
    )


def test_odd_boxes_are_reported_and_training_goes_on(project: Project) -> None:
    """Check that boxes outside their image or without area are counted in the log, and that training finishes."""
    boxes = [[-30, -5, 400, 20], [5, 5, 0, 9], [500, 500, 9, 9], [40, 40, -9, -9]]

    def change(tree: dict) -> None:
        for annotation, box in zip(tree["annotations"], boxes, strict=False):
            annotation["bbox"] = box

    project.change_annotations(change)
    results = project.main()
    assert "bbox" in results
    text = (project.output / "log.txt").read_text()
    assert f"WARNING: {project.annotations}: boxes without area dropped (2; the first: annotation with id 2" in text
    assert (
        f"WARNING: {project.annotations}: boxes outside their image dropped (1; the first: annotation with id 3" in text
    )
    assert f"WARNING: {project.name}: 1 boxes extend beyond their image; training clips them." in text
    assert (project.output / "model_final.pth").exists()


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["DATASETS.TRAIN", ()], "DATASETS.TRAIN is empty: name a dataset."),
        (
            ["DATASETS.TRAIN", ("nothing",)],
            "DATASETS.TRAIN names 'nothing', which is neither one of Detectron2's datasets nor an entry of DATASETS.COCO_JSON "
            "(NAME).",
        ),
        (
            ["DATASETS.TEST", ("voc_2007_test",)],
            "DATASETS.TEST names 'voc_2007_test', whose files do not exist (datasets/VOC2007); the environment variable "
            "DETECTRON2_DATASETS names the folder that holds Detectron2's built-in datasets.",
        ),
        (
            ["DATASETS.COCO_JSON", "('a', 'b', 'c')"],
            "DATASETS.COCO_JSON must be a list of lists, [[name, annotations.json, image folder], ...]; one entry is 'a'.",
        ),
        (["SOLVER.IMS_PER_BATCH", 0], "SOLVER.IMS_PER_BATCH is 0; it must be a multiple of 1 (processes)."),
        (
            ["DATALOADER.SAMPLER_TRAIN", "Shuffler"],
            "DATALOADER.SAMPLER_TRAIN is 'Shuffler'; it must be 'TrainingSampler', 'RepeatFactorTrainingSampler', "
            "'RandomSubsetTrainingSampler', 'WeightedTrainingSampler' or 'WeightedCategoryTrainingSampler'.",
        ),
    ],
)
def test_data_keys(project: Project, refused, monkeypatch, opts: list, expected: str) -> None:
    """Check the messages for missing datasets and invalid settings of the data loader."""
    monkeypatch.chdir(project.folder)
    assert refused(*opts) == expected.replace("NAME", project.name)


def test_rotated_boxes(refused) -> None:
    for key, value in (
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
        ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlignRotated"),
    ):
        assert refused(key, value) == f"{key} is {value}: rotated boxes are not supported."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["bbox"], "one entry is 'bbox'."),
        ([["bbox", "AP", 1.0]], "one entry is ['bbox', 'AP', 1.0]."),
        ([["bbox", "AP", "1", 1]], "one entry is ['bbox', 'AP', '1', 1]."),
        ([["bbox", "AP", 1, "1"]], "one entry is ['bbox', 'AP', 1, '1']."),
        ([["bbox", 50, 1, 1]], "one entry is ['bbox', 50, 1, 1]."),
        ([["bbox", "AP", 1, 1]], "TEST.EXPECTED_RESULTS are the results of one dataset, but DATASETS.TEST names 0."),
    ],
)
def test_results_that_cannot_be_expected(refused, value: list, expected: str) -> None:
    assert refused("TEST.EXPECTED_RESULTS", value, "DATASETS.TEST", ()).endswith(expected)


def test_results_of_two_datasets_cannot_be_expected() -> None:
    cfg = read_config("", ["TEST.EXPECTED_RESULTS", [["bbox", "AP", 1, 1]], "DATASETS.TEST", ("a",)])
    check_expected_results(cfg)
    cfg.DATASETS.TEST = ("a", "b")
    with pytest.raises(UserError, match=r"are the results of one dataset, but DATASETS\.TEST names 2\.$"):
        check_expected_results(cfg)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("AP50", "TEST.BEST_METRIC is 'AP50'; name the task too, such as 'bbox/AP50'."),
        ("segm/AP", "TEST.BEST_METRIC is 'segm/AP', but MODEL.MASK_ON is False."),
        ("keypoints/AP", "TEST.BEST_METRIC is 'keypoints/AP', but MODEL.KEYPOINT_ON is False."),
    ],
)
def test_metrics_that_the_evaluation_cannot_have(refused, metric: str, expected: str) -> None:
    assert refused("TEST.BEST_METRIC", metric) == expected


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("bbox/AP57", "it has bbox/AP, bbox/AP50, bbox/AP75, bbox/APs, bbox/APm, bbox/APl, bbox/AP-CLASS."),
        ("bbox/AP-pink", "it has bbox/AP-red, bbox/AP-green, bbox/AP-blue."),
    ],
)
def test_metrics_with_a_typing_error(refused, project: Project, metric: str, expected: str) -> None:
    start = f"TEST.BEST_METRIC is '{metric}', which the evaluation of {project.name} does not have; "
    assert refused("TEST.BEST_METRIC", metric, "TEST.EVAL_PERIOD", 2) == start + expected


def test_tasks_with_a_typing_error(refused, project: Project) -> None:
    assert refused("TEST.BEST_METRIC", "boxes/AP", "TEST.EVAL_PERIOD", 2) == (
        f"TEST.BEST_METRIC is 'boxes/AP', which the evaluation of {project.name} does not have: its tasks are bbox, segm, "
        "keypoints, box_proposals."
    )


def test_keypoints_and_masks_that_the_data_lack(refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check datasets in DATASETS.COCO_JSON, one registered by a program, and one whose reader is not installed."""
    assert refused("MODEL.KEYPOINT_ON", True).endswith(
        "whose keypoints have no names, but MODEL.KEYPOINT_ON is True: set it to False, or list the names as 'keypoints' in the categories "
        "of its annotation file (of a dataset registered in a file for --import, set keypoint_names and keypoint_flip_map in its metadata)."
    )
    assert refused("MODEL.MASK_ON", True).endswith(
        "has no segmentation, which MODEL.MASK_ON needs; set MODEL.MASK_ON False to train on boxes only."
    )
    path = make_coco(tmp_path / "others")
    register_coco_instances("without_masks", {}, str(path), str(path.parent / "images"))
    monkeypatch.setattr(MetadataCatalog.get("without_masks"), "thing_classes", list(CLASSES), raising=False)
    try:
        key = "DATASETS.TEST", ("without_masks",), "DATASETS.TRAIN", ("without_masks",)
        assert refused("MODEL.MASK_ON", True, *key) == (
            "DATASETS.TEST names 'without_masks', whose annotation 1 has no segmentation, but MODEL.MASK_ON is True; set it to False to "
            "train and evaluate only boxes."
        )
        said = refused("MODEL.MASK_ON", True, *key[2:], "DATASETS.TEST", ())
        assert said.startswith(
            f"DATASETS.TRAIN without_masks: an object of {path.parent / 'images' / '000.png'} has no segmentation"
        )
    finally:
        DatasetCatalog.remove("without_masks")
        MetadataCatalog.remove("without_masks")
    monkeypatch.setitem(sys.modules, "lvis", None)
    sentence = "names 'lvis_v1_val', which needs the package lvis: pip install lvis"
    assert refused("DATASETS.TRAIN", ("lvis_v1_val",), "DATASETS.TEST", ()) == f"DATASETS.TRAIN {sentence}"
    assert refused("DATASETS.TEST", ("lvis_v1_val",)) == f"DATASETS.TEST {sentence}"
    monkeypatch.setattr("kd_d2.engine.checks._check_files", lambda *args: None)
    assert refused("DATASETS.TEST", ("lvis_v1_val",)) == f"DATASETS.TEST {sentence.replace(chr(39), '')}"
    assert refused("DATASETS.TEST", ("cityscapes_fine_sem_seg_val",)).endswith("is not coco, pascal_voc or lvis.")


@pytest.mark.parametrize("detector", ["PanopticFPN", "SemanticSegmentor"])
def test_semantic_segmentation_that_the_data_lack(project: Project, refused, detector: str) -> None:
    """Also check what is said about evaluations, which ignore semantic segmentation."""
    project.change(_BASE_=str(TINY / "faster-rcnn-student.yaml"), MODEL__META_ARCHITECTURE=detector)
    assert refused("DATASETS.TEST", ()).startswith(f"DATASETS.TRAIN {project.name}: {project.annotations.parent / 'images' / '000.png'} has no "
        f"semantic segmentation (sem_seg_file_name), which {detector} is trained on; ")  # fmt: skip
    said = refused()
    if detector == "SemanticSegmentor":
        assert said == (
            "DATASETS.TEST is not empty, but a SemanticSegmentor predicts no boxes or masks, and nothing else is evaluated; set it to ()."
        )
    else:
        assert "PanopticFPN is evaluated on boxes and masks only" in (project.output / "log.txt").read_text()


def test_a_broken_image_stops_the_training_in_a_sentence(project: Project, capfd: pytest.CaptureFixture) -> None:
    """Check that a file that turns out during training not to be an image is named."""
    broken = project.annotations.parent / "images" / "003.png"
    broken.write_text("no image")
    with pytest.raises(SystemExit) as caught:
        project.main("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 50)
    out, err = capfd.readouterr()
    assert caught.value.code == 2
    assert "Traceback" not in out + err
    assert err.splitlines()[-1].startswith(f"error: The image {broken} cannot be used: ")


# ------------------------------------------------------------------------------------------- keys and environment


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["MODEL.KD.DISTILLERS", "('IDC',)"], "MODEL.KD.DISTILLERS names the unknown method 'IDC'; available: "),
        (
            ["MODEL.KD.STRUCTURAL.WEIHGT", 1],
            "the command line: there is no config key MODEL.KD.STRUCTURAL.WEIHGT. Did you mean MODEL.KD.STRUCTURAL.WEIGHT?",
        ),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu', which PyTorch does not know"),
        (
            ["MODEL.DEVICE", "hpu"],
            "MODEL.DEVICE is 'hpu', which PyTorch cannot use here; it is usually 'cuda' or 'cpu'.",
        ),
        (
            ["MODEL.DEVICE", "meta"],
            "MODEL.DEVICE is 'meta', which PyTorch cannot use here; it is usually 'cuda' or 'cpu'.",
        ),
        (
            ["SOLVER.MAX_ITER", 3],
            "Invalid learning rate schedule: SOLVER.LR_SCHEDULER_NAME 'WarmupMultiStepLR', SOLVER.STEPS (3,) and SOLVER.MAX_ITER "
            "3: Milestone must be smaller",
        ),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"],
            "SOLVER.LR_SCHEDULER_NAME is 'WarmupStepWithFixedGammaLR'; it must be 'WarmupMultiStepLR' or 'WarmupCosineLR'.",
        ),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR", 0.1, "SOLVER.BASE_LR_END", 0.2],
            "SOLVER.BASE_LR_END is 0.2; for WarmupCosineLR it must be between 0 and SOLVER.BASE_LR 0.1.",
        ),
        (["SOLVER.STEPS", ("a",)], "Invalid learning rate schedule: SOLVER.LR_SCHEDULER_NAME 'WarmupMultiStepLR', "),
        (["SOLVER.WARMUP_ITERS", -1], "SOLVER.WARMUP_ITERS is -1; it must be a number at least 0."),
        (plain("SOLVER.MAX_ITER", 0), "SOLVER.MAX_ITER is 0; it must be a number at least 1."),
        (["SOLVER.MOMENTUM", -0.1], "SOLVER.MOMENTUM is -0.1; it must be a number at least 0."),
        (["SOLVER.WEIGHT_DECAY", -1], "SOLVER.WEIGHT_DECAY is -1.0; it must be a number at least 0."),
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD is 0; it must be a number at least 1."),
        (
            ["SOLVER.RESCALE_INTERVAL", True, "SOLVER.WARMUP_ITERS", 4],
            "SOLVER.WARMUP_ITERS is 4; with SOLVER.RESCALE_INTERVAL True it must be below SOLVER.MAX_ITER 4.",
        ),
        (["DATALOADER.REPEAT_THRESHOLD", -0.1], "DATALOADER.REPEAT_THRESHOLD is -0.1; it must be a number at least 0."),
        (
            ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0],
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE is 0.0; it must be a number above 0.",
        ),
        (["SOLVER.BASE_LR", -1.0], "SOLVER.BASE_LR is -1.0; it must be a number at least 0."),
        (["DATALOADER.NUM_WORKERS", -1], "DATALOADER.NUM_WORKERS is -1; it must be a number at least 0."),
        (["SEED", 1, "--resume"], "the command line: the option --resume must come before the KEY VALUE overrides."),
    ],
)
def test_keys(project: Project, refused, opts: list, expected: str) -> None:
    assert refused(*opts).startswith(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(project: Project, refused, capfd: pytest.CaptureFixture) -> None:
    """Check the messages for a device and for processes that need a GPU; the default device does not need one."""
    assert refused("MODEL.DEVICE", "cuda") == (
        "MODEL.DEVICE is 'cuda', but this machine has no usable GPU; set it to 'cpu'."
    )
    assert refused("--num-gpus", 2) == (
        "--num-gpus is 2, but this machine has 0 usable GPUs; to run on CPUs, hide the GPUs, if any, and set MODEL.DEVICE to cpu "
        "on the command line."
    )
    project.change(MODEL__DEVICE="cuda")  # as in the defaults and in dumped configs
    assert "bbox" in project.main("SOLVER.MAX_ITER", 1)
    assert capfd.readouterr().out.count("MODEL.DEVICE is 'cuda', but PyTorch finds no usable GPU") == 1


@pytest.mark.parametrize(("cuda", "has_driver", "reason"), [
    (None, True, " (this PyTorch is built without CUDA)"),
    ("13.0", True, " (there is an NVIDIA driver, but it is too old for this PyTorch, which is built for CUDA 13.0, or the GPUs are hidden)"),
    ("13.0", False, ""),
])  # fmt: skip
def test_why_a_gpu_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None, has_driver: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(checks, "NVIDIA_DRIVER", (str(tmp_path / "none"), *([str(tmp_path)] * has_driver)))
    assert checks.missing_gpu_advice("cpu", "cpu") is None
    assert checks.missing_gpu_advice("cuda", "cpu") == (
        f"MODEL.DEVICE is 'cuda', but PyTorch finds no usable GPU{reason}: running on the CPU; MODEL.DEVICE cpu silences this warning."
    )


def test_why_a_gpu_of_amd_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert checks.missing_gpu_advice("cuda", "cpu").startswith(
        "MODEL.DEVICE is 'cuda', but PyTorch finds no usable GPU: running on the CPU; "
    )


def test_why_another_device_is_not_used() -> None:
    assert checks.missing_gpu_advice("mps", "cpu") == (
        "MODEL.DEVICE is 'mps', which PyTorch cannot use here: running on the CPU; MODEL.DEVICE cpu silences this warning."
    )


@pytest.mark.parametrize(
    ("device", "enabled", "dtype", "capability", "advice"),
    [
        ("cpu", True, "float16", "AVX512", "set it to 'bfloat16'"),
        ("cpu", True, "bfloat16", "AVX512", None),
        ("cpu", True, "bfloat16", "DEFAULT", None),
        ("cpu", True, "float16", "AVX2", "set SOLVER.AMP.ENABLED to False"),
        ("cpu", True, "bfloat16", "AVX2", "set SOLVER.AMP.ENABLED to False"),
        ("cpu", False, "float16", "AVX2", None),
        ("cuda", True, "float16", "AVX2", None),
    ],
)
def test_mixed_precision_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str, enabled: bool, dtype: str, capability: str, advice: str | None
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cfg = load_config(str(TINY / "retinanet-student.yaml")).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = device, enabled, dtype
    found = checks.autocast_advice(cfg)
    assert (found is None) if advice is None else advice in found


def test_an_unknown_precision(monkeypatch: pytest.MonkeyPatch, refused) -> None:
    monkeypatch.setitem(defaults._C, "FLOAT32_PRECISION", "")  # as in the official Detectron2
    assert refused("FLOAT32_PRECISION", "tf32") == (
        "FLOAT32_PRECISION is 'tf32'; it must be one of 'highest', 'high', 'medium', or '' to change nothing."
    )


@pytest.mark.parametrize(("device", "precision", "expected"), [
    ("cuda", "highest", (["highest"], False)),
    ("cuda", "high", (["high"], True)),
    ("cuda", "", ([], None)),
    ("cuda", None, ([], None)),
    ("cpu", "high", ([], None)),
])  # fmt: skip
def test_float32_precision(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: str | None, expected: tuple[list[str], bool | None]
) -> None:
    """Check matrix products and convolutions, as in Detectron2; None is a Detectron2 without the key."""
    cfg = read_config(None, ["MODEL.DEVICE", device])
    cfg.pop("FLOAT32_PRECISION", None)
    if precision is not None:
        cfg.FLOAT32_PRECISION = precision
    called = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", called.append)
    monkeypatch.setattr(torch.backends, "cudnn", argparse.Namespace(allow_tf32=None))
    set_float32_precision(cfg)
    assert (called, torch.backends.cudnn.allow_tf32) == expected


@pytest.mark.parametrize(
    ("device", "processes", "expected"),
    [
        ("cuda:0", 2, "MODEL.DEVICE is 'cuda:0', but each of the 2 processes needs its own GPU: set it to 'cuda'."),
        ("cuda:2", 1, "MODEL.DEVICE is 'cuda:2', but this machine has 2 usable GPUs, numbered from 0."),
        (
            "cpu",
            2,
            "MODEL.DEVICE is 'cpu', but 2 processes on a machine with GPUs communicate with NCCL, which needs them: ",
        ),
        ("cuda", 2, None),
        ("cuda:1", 1, None),
        ("cpu", 1, None),
    ],
)
def test_a_device_that_does_not_suit_the_processes(
    monkeypatch: pytest.MonkeyPatch, device: str, processes: int, expected: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    cfg = read_config(None, ["MODEL.DEVICE", device])
    with pytest.raises(UserError) if expected else contextlib.nullcontext() as caught:
        check_device(cfg, processes)
    assert caught is None or str(caught.value).startswith(expected)
    assert used == ([torch.device(device)] if device == "cuda:1" else [])


def test_more_processes_of_torchrun_than_gpus(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    variables = {"WORLD_SIZE": 3, "RANK": 2, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 3, "MASTER_ADDR": "localhost"}
    for name, value in (variables | {"MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as caught:
        launch(lambda args: None, argparse.Namespace(rank_timeout=1))
    assert caught.value.code == 2
    assert capfd.readouterr().err == (
        "error: LOCAL_RANK is 2, but this machine has 2 usable GPUs: start at most one process per GPU.\n"
    )


def test_an_output_folder_that_cannot_be_written(project: Project, refused) -> None:
    """Check that a path below a file is named, with the operating system's error."""
    below = project.student / "output"
    assert refused("OUTPUT_DIR", below) == f"OUTPUT_DIR {below} cannot be written: Not a directory."


def test_an_output_folder_that_is_not_utf8(project: Project, refused) -> None:
    """Check that it is refused before TensorBoard fails on it, which is after 20 iterations."""
    folder = project.student.parent / os.fsdecode(b"stra\xdfe")
    message = (
        f"OUTPUT_DIR {project.student.parent}/stra\\udcdfe is not UTF-8, which the logs of TensorBoard need: rename the"
    )
    assert refused("OUTPUT_DIR", folder).startswith(message)
    assert not folder.exists()


def test_evaluation_without_weights(project: Project, refused) -> None:
    """Check the messages of --eval-only without a checkpoint, and with one of another model."""
    assert refused("--eval-only") == "MODEL.WEIGHTS is empty: name the checkpoint to evaluate."
    torch.save({"model": {"weight": torch.zeros(1)}}, project.teacher_weights)
    assert refused("--eval-only", "MODEL.WEIGHTS", project.teacher_weights) == (
        f"{project.teacher_weights} fills no parameter of RetinaNet: it is another model's checkpoint."
    )


@pytest.mark.parametrize("options", [["--eval-teacher"], ["--eval-only", "--eval-teacher"]])
def test_evaluating_the_teacher_of_a_plain_model(refused, options: list[str]) -> None:
    """Check that a model without a teacher is refused before training."""
    assert refused(*options, *plain()) == "MODEL.META_ARCHITECTURE RetinaNet has no teacher."


def test_resuming_what_cannot_be_resumed(project: Project, capfd: pytest.CaptureFixture) -> None:
    """Check the message for each way in which the last checkpoint does not fit this training; the file is unchanged."""
    project.change(SOLVER__STEPS=())
    project.main(*plain("SOLVER.MAX_ITER", 2))
    file, tag = project.output / "model_final.pth", project.output / "last_checkpoint"
    good = file.read_bytes()

    def resume(*opts: object) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            project.main("--resume", *opts)
        out, err = capfd.readouterr()
        assert caught.value.code == 2
        assert "Traceback" not in out + err
        return err.splitlines()[-1].removeprefix("error: ")

    other_config = f"--resume: {file} does not fit a training with this config ("
    assert resume(*plain("MODEL.FPN.OUT_CHANNELS", 24)) == (
        f"{other_config}backbone.fpn_lateral3.weight does not fit); resume with the config that it was started with, or train "
        "in another OUTPUT_DIR."
    )
    assert resume("MODEL.KD.FEATURE_IMITATION.ADAPTATION", "1x1").startswith(other_config)
    assert resume(*plain("MODEL.FPN.NORM", "")).startswith(other_config)
    assert file.read_bytes() == good

    torch.save({"model": torch.load(file, weights_only=True)["model"]}, file)
    assert resume(*plain()).startswith(
        f"{other_config}it holds only weights); resume with the config that it was started with"
    )
    file.write_bytes(good[:3000])
    assert resume(*plain()).startswith(f"Checkpoint {file} is damaged or not a checkpoint: it cannot be read (")
    tag.write_text("gone.pth")
    assert resume(*plain()) == f"There is no checkpoint {project.output / 'gone.pth'}."
    tag.write_text("model_final.pth")
    file.write_bytes(good)
    assert "bbox" in project.main("--resume", *plain("SOLVER.MAX_ITER", 3))


def test_a_refused_training_leaves_the_configs_of_a_finished_one(project: Project, capfd) -> None:
    """Check the files that `--model RUN` reads after refused trainings, and that the next training replaces them."""
    project.change(SOLVER__STEPS=(), SOLVER__MAX_ITER=1, DATASETS__TEST=())
    project.main(*plain())
    names = ("config.yaml", "student.yaml", "versions.json")
    before = {name: (project.output / name).read_bytes() for name in names}
    for args in (
        plain("MODEL.RETINANET.NUM_CLASSES", 5),
        plain("MODEL.WEIGHTS", project.annotations),
        ["--resume", *plain("SOLVER.OPTIMIZER", "AdamW", "SOLVER.MAX_ITER", 2)],
    ):
        with pytest.raises(SystemExit):
            project.main(*args)
        assert {name: (project.output / name).read_bytes() for name in names} == before
    project.main("--resume", *plain("SOLVER.MAX_ITER", 2))
    assert read_config(str(project.output / "config.yaml")).SOLVER.MAX_ITER == 2


def test_precomputed_proposals(tmp_path: Path, refused) -> None:
    """Check a student, and a teacher that makes labels, alone or in a training, or is evaluated."""
    key = "MODEL.PROPOSAL_GENERATOR.NAME"
    assert refused(key, "PrecomputedProposals") == (
        f"{key} is PrecomputedProposals: precomputed proposals are not supported; set it to 'RPN'."
    )
    project = make_project(tmp_path / "other", "faster-rcnn")
    project.change_teacher(MODEL__PROPOSAL_GENERATOR__NAME="PrecomputedProposals")
    expected = (
        f"The teacher (GeneralizedRCNN) cannot detect: its {key} is PrecomputedProposals, which are not supported."
    )
    assert refused("MODEL.KD.PSEUDO_LABELS.ENABLED", True, config=project.student) == expected
    cfg = load_config(str(project.student))
    with clean_process(), pytest.raises(UserError) as caught:
        register_coco_json(cfg)
        evaluate_teacher(cfg, Teacher.from_config(cfg))
    assert str(caught.value) == expected
    with clean_process(), pytest.raises(UserError) as caught:
        write_label_file(cfg, str(tmp_path / "labels.json"))
    assert str(caught.value) == expected


def test_files_of_proposals_are_not_read(project: Project, refused) -> None:
    """Check that a pickle that would run a command is refused, with its key, and never loaded."""
    marker = project.folder / "was_run"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch '{marker}'",)

    proposals = project.folder / "proposals.pkl"
    proposals.write_bytes(pickle.dumps(Malicious()))
    for key in ("TRAIN", "TEST"):
        sentence = refused("MODEL.LOAD_PROPOSALS", True, f"DATASETS.PROPOSAL_FILES_{key}", (str(proposals),))
        assert sentence == (
            "MODEL.LOAD_PROPOSALS is True: precomputed proposals are not supported, since they are pickle files, which can run code when they are loaded."
        )
    assert not marker.exists()


# -------------------------------------------------------------------------------------------- how programs end


def _refuse(args: object) -> None:
    raise UserError("KEY is wrong.")


def _fail(args: object) -> None:
    raise ValueError("a mistake of ours")


def _spawned(main, num_gpus: int, *rest: object, args: tuple) -> None:
    torch.multiprocessing.start_processes(_in_child, nprocs=2, args=(main, args), start_method="fork")


def _in_child(rank: int, main, args: tuple) -> None:
    main(*args)


class _Arguments:
    num_gpus, num_machines, machine_rank, dist_url, rank_timeout, opts = 1, 1, 0, "auto", 30, ()


@pytest.mark.parametrize("processes", [1, 2])
def test_sentences_of_one_and_of_several_processes(capfd, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """Check that a UserError ends the program with its message and status 2, and that other errors are raised."""
    module = sys.modules[launch.__module__]
    if processes == 2:
        monkeypatch.setattr(module, "detectron2_launch", _spawned)
    with pytest.raises(SystemExit) as caught:
        launch(_refuse, _Arguments())
    assert caught.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1] == "error: KEY is wrong."
    with pytest.raises(Exception, match="a mistake of ours"):
        launch(_fail, _Arguments())


@pytest.mark.parametrize(("code", "status", "sentence"), [
    (-signal.SIGKILL, 2, "error: Rank 1 was killed (SIGKILL), most likely because it ran out of memory; the other ranks were terminated too."),
    (-signal.SIGABRT, 2, "error: Rank 1 aborted (SIGABRT), as NCCL does when another rank does not respond within --rank-timeout; see its last "
     "lines above."),
    (-signal.SIGTERM, 128 + signal.SIGTERM, None),
    (3, 3, None),
])  # fmt: skip
def test_a_process_that_ends(
    capfd, monkeypatch: pytest.MonkeyPatch, code: int, status: int, sentence: str | None
) -> None:
    def end(*args: object) -> None:
        raise ProcessExitedException("", error_index=1, error_pid=7, exit_code=code)

    monkeypatch.setattr(sys.modules[launch.__module__], "detectron2_launch", end)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = _Arguments()
    arguments.num_gpus = 2
    with pytest.raises(SystemExit) as caught:
        launch(_fail, arguments)
    assert caught.value.code == status
    assert capfd.readouterr().err.splitlines()[-1:] == ([sentence] if sentence else [])


@pytest.mark.parametrize(
    ("present", "opts", "minutes", "sentence"),
    [
        (2, [], 0.5, None),
        (0, ["MODEL.DEVICE", "cpu"], 0.5, None),
        (0, ["MODEL.DEVICE", "cuda"], 0.5, "error: --num-gpus is 2, but this machine has 0 usable GPUs; "),
        (1, ["MODEL.DEVICE", "cpu"], 0.5, "error: --num-gpus is 2, but this machine has 1 usable GPUs; "),
        (2, [], 0, "error: --rank-timeout is 0; it must be a number above 0."),
    ],
)
def test_processes_that_are_launched(
    capfd, monkeypatch: pytest.MonkeyPatch, present: int, opts: list[str], minutes: float, sentence: str | None
) -> None:
    called = []
    monkeypatch.setattr(sys.modules[launch.__module__], "detectron2_launch", lambda *args: called.append(args[1:]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    arguments = _Arguments()
    arguments.num_gpus, arguments.opts, arguments.rank_timeout = 2, opts, minutes
    with pytest.raises(SystemExit) if sentence else contextlib.nullcontext():
        launch(_fail, arguments)
    assert called == ([] if sentence else [(2, 1, 0, "auto", (_fail, arguments), timedelta(seconds=30))])
    assert capfd.readouterr().err.startswith(sentence or "")


def test_machines_with_one_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(sys.modules[launch.__module__], "detectron2_launch", lambda *args: called.append(args[1:]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    arguments = _Arguments()
    arguments.num_machines, arguments.machine_rank, arguments.dist_url = 3, 2, "tcp://host:1"
    launch(_fail, arguments)
    assert called == [(1, 3, 2, "tcp://host:1", (_fail, arguments), timedelta(minutes=30))]


def _fill_the_disk(args: object) -> None:
    write_text("/dev/full", "text")


def _use_the_file_of_another_user(args: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", "output/log.txt")


def _write_where_nothing_is_written(args: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system", "output/log.txt")


def _run_out_of_memory(args: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\n  more")


def _lose_a_worker(args: object) -> None:
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


def _lose_a_worker_after_its_error(args: object) -> None:
    of_handler = RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details are lost")
    raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from of_handler


def _open_too_many_files(args: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


def _share_too_many_tensors(args: object) -> None:
    raise RuntimeError("unable to open shared memory object </torch_7> in read-write mode: Too many open files (24)")


def _find_no_temporary_folder(args: object) -> None:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")


def _start_too_many_processes(args: object) -> None:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def _start_too_many_threads(args: object) -> None:
    raise RuntimeError("can't start new thread")


def _receive_from_a_lost_worker(args: object) -> None:
    class Descriptor:
        def detach(self) -> None:
            raise EOFError

    torch.multiprocessing.reductions.rebuild_storage_fd(torch.UntypedStorage, Descriptor(), 8)


FEWER = "raise the limit (ulimit -u, or the number of processes of the container or job), or lower DATALOADER.NUM_WORKERS and OMP_NUM_THREADS."


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("main", "sentence"), [
    (_fill_the_disk, "/dev/full cannot be written: No space left on device."),
    (_use_the_file_of_another_user, "output/log.txt cannot be accessed: Permission denied."),
    (_write_where_nothing_is_written, "output/log.txt cannot be written: Read-only file system."),
    (_run_out_of_memory, "Out of memory (CUDA out of memory. Tried to allocate 20 GiB): free memory, or lower the image sizes in INPUT, such as "
     "INPUT.MIN_SIZE_TEST."),
    (_lose_a_worker, "A data loading process died (DataLoader worker (pid 7) is killed by signal: Killed), most likely because it ran out of "
     "memory: lower DATALOADER.NUM_WORKERS."),
    (_lose_a_worker_after_its_error, "A data loading process failed (DataLoader worker (pid(s) 7) exited unexpectedly): see its error above."),
    (_open_too_many_files, "Too many open files ([Errno 24] Too many open files): raise the limit (ulimit -n, at most ulimit -Hn), or use fewer "
     "data loading processes or smaller batches."),
    (_share_too_many_tensors, "Too many open files (unable to open shared memory object </torch_7> in read-write mode: Too many open files (24)): "
     "raise the limit (ulimit -n, at most ulimit -Hn), or use fewer data loading processes or smaller batches."),
    (_find_no_temporary_folder, "No folder for temporary files is writable ([Errno 2] No usable temporary directory found in ['/tmp']): free "
     "space in one of them, or set TMPDIR to another."),
    (_start_too_many_processes, f"No more processes or threads can be started ([Errno 11] Resource temporarily unavailable): {FEWER}"),
    (_start_too_many_threads, f"No more processes or threads can be started (can't start new thread): {FEWER}"),
    (_receive_from_a_lost_worker, "A data loading process failed (EOFError): see its error above; if there is none, it was killed, most likely because the machine ran out "
     "of memory: lower DATALOADER.NUM_WORKERS."),
])  # fmt: skip
def test_sentences_of_a_system_without_space_permission_or_memory(
    capfd, monkeypatch: pytest.MonkeyPatch, main: Callable, sentence: str, processes: int
) -> None:
    if processes == 2:
        monkeypatch.setattr(sys.modules[launch.__module__], "detectron2_launch", _spawned)
    with pytest.raises(SystemExit) as caught:
        launch(main, _Arguments())
    assert caught.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"error: {sentence}"


def test_an_environment_that_cannot_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a training without data loading processes starts if no other process can."""
    module = sys.modules[set_float32_precision.__module__]
    monkeypatch.setattr(module, "collect_env_info", lambda: _start_too_many_processes(None))
    assert module._environment() == "unknown ([Errno 11] Resource temporarily unavailable)"


LESS_MEMORY = "free memory, or lower the image sizes in INPUT, such as INPUT.MIN_SIZE_TEST."
OTHER_PROGRAMS = f"look with nvidia-smi or rocm-smi for other programs on the GPU; otherwise {LESS_MEMORY}"


@pytest.mark.parametrize(("error", "sentence"), [
    (torch.AcceleratorError("CUDA error: out of memory\nmore"),
     f"Out of memory (CUDA error: out of memory): {OTHER_PROGRAMS}"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
     f"Out of memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`): {OTHER_PROGRAMS}"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
     f"Out of memory (cuDNN error: CUDNN_STATUS_ALLOC_FAILED): {OTHER_PROGRAMS}"),
    (RuntimeError("HIP error: hipErrorOutOfMemory"), f"Out of memory (HIP error: hipErrorOutOfMemory): {OTHER_PROGRAMS}"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)."),
     f"Out of memory (MPS backend out of memory (MPS allocated: 17 GB)): {LESS_MEMORY}"),
])  # fmt: skip
def test_sentences_of_a_gpu_that_is_full_while_the_detector_is_built(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    monkeypatch.setattr(building, "PACKAGES", {*building.PACKAGES, __name__})
    with pytest.raises(type(error)) as caught, building_from("MODEL"):
        raise error
    assert str(as_user_error(caught.value)) == sentence


def test_world_size_without_torchrun(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check WORLD_SIZE in the environment without the other variables of torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as caught:
        launch(_fail, _Arguments())
    assert caught.value.code == 2
    assert capfd.readouterr().err.startswith("error: WORLD_SIZE is set in the environment, but not RANK, LOCAL_RANK")


def test_world_size_that_is_no_number(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a text, and that an empty one counts as unset."""
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(SystemExit):
        launch(_fail, _Arguments())
    assert capfd.readouterr().err.startswith(
        "error: The environment variable WORLD_SIZE is 'abc'; it must be the number"
    )
    monkeypatch.setenv("WORLD_SIZE", "")
    with pytest.raises(ValueError, match="a mistake of ours"):
        launch(_fail, _Arguments())


@pytest.mark.slow
def test_what_a_user_sees(project: Project) -> None:
    """Check in a separate process: status 2, the message as the last line, and no traceback."""
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(project.student)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for opts, expected in (
        (
            ["MODEL.KD.STUDENT", "Retina"],
            "error: MODEL.KD.STUDENT is 'Retina'; it must be the name of a registered detector",
        ),
        (
            ["MODEL.KD.TEACHER.WEIGHTS", str(project.annotations)],
            f"error: Checkpoint {project.annotations} is damaged or no",
        ),
    ):
        done = subprocess.run([*command, *opts], env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(expected)
        assert "Traceback" not in done.stdout + done.stderr


def test_the_program_itself_is_what_these_tests_run(project: Project) -> None:
    """Check that a good project trains, so that the errors above are due to what each test changes."""
    results = project.main()
    assert json.loads((project.output / "train.json").read_text()).keys() >= {"bbox"}
    assert "AP" in results["bbox"]
