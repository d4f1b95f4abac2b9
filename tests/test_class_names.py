"""Class names are stored in checkpoints, and models and data are matched by them."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from kd_d2.adapters import build_adapter
from kd_d2.checkpoint import CLASS_NAMES, KDCheckpointer, read_checkpoint
from kd_d2.class_names import (
    ClassCount,
    class_count_key,
    match_classes,
    names_in_checkpoint,
    names_in_data,
    warn_of_unknown_order,
)
from kd_d2.config import load_config
from kd_d2.data import register_coco_json
from kd_d2.data.coco_json import ClassOrder
from kd_d2.engine.trainer import load_initial_weights
from kd_d2.errors import UserError
from kd_d2.modeling import RepPoints
from kd_d2.predictor import read_categories
from kd_d2.teacher import Teacher

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, RetinaNet, build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from helpers import (
    META_ARCHITECTURES,
    Project,
    clean_process,
    fixed_weights,
    make_project,
    make_trainer,
    run_train_net,
    save_fixed_weights,
)
from torch import nn

OWN = ClassOrder(("red", "green", "blue"), "model.pth")
OTHER = ClassOrder(("blue", "red", "green"), "val.json")


def _write_in_other_order(tree: dict) -> None:
    """Change the ids of the classes to those of OTHER, with the same data."""
    id_of = {name: number for number, name in enumerate(OTHER.names, 1)}
    name_of = {category["id"]: category["name"] for category in tree["categories"]}
    tree["categories"] = [{"id": id_of[name], "name": name} for name in OTHER.names]
    for annotation in tree["annotations"]:
        annotation["category_id"] = id_of[name_of[annotation["category_id"]]]


@pytest.mark.parametrize(
    "detector", sorted(META_ARCHITECTURES.keys() - {"reppoints"})
)  # with equal scores, any of which may be kept
def test_a_reordered_model_finds_the_same_under_other_numbers(tmp_path: Path, detector: str) -> None:
    """Check that boxes and scores are the same before and after, and that each class has the index of its name."""
    torch.manual_seed(0)
    model = build_model(load_config(str(make_project(tmp_path, detector).teacher))).eval()
    fixed_weights(model)
    _make_it_detect(model.state_dict())
    batch = [{"image": torch.rand(3, 64, 96) * 255, "height": 64, "width": 96}]
    before = _named(model, batch, OWN)
    assert len({name for name, *_ in before}) > 1
    match_classes(model, "the model", OWN, OTHER)
    assert _named(model, batch, OTHER) == before


def test_reordered_reppoints_give_the_same_logits_in_another_order(tiny_detector: Callable) -> None:
    """Check the head's predictions, since its detections have equal scores, any of which may be kept."""
    model = tiny_detector("reppoints").eval()
    images = [{"image": torch.rand(3, 64, 96) * 255, "height": 64, "width": 96}]
    with torch.no_grad():
        before = build_adapter(model).run(images, frozenset({"dense"})).dense
        match_classes(model, "the model", OWN, OTHER)
        after = build_adapter(model).run(images, frozenset({"dense"})).dense
    order = [OWN.names.index(name) for name in OTHER.names]
    for stride, logits in before.logits.items():
        assert not torch.equal(after.logits[stride], logits)
        # Some processors sum a convolution's channels in another order.
        torch.testing.assert_close(after.logits[stride], logits[..., order], atol=1e-5, rtol=0)
        assert torch.equal(after.box_regression[stride], before.box_regression[stride])


class HeadWithPriors(RetinaNetHead):
    """Adds a learned number of each class to its logits."""

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        logits, deltas = super().forward(features)
        return [level + self.priors for level in logits], deltas


def test_a_head_of_ones_own_cannot_be_reordered(tiny_detector: Callable) -> None:
    """Check a head with other weights per class, and one whose last layer is not a convolution."""
    expected = "The class order of RetinaNet differs from that of the data, and it is not known which of its weights"
    model = tiny_detector("retinanet")
    model.head.__class__ = HeadWithPriors
    with pytest.raises(UserError, match=expected):
        match_classes(model, "the model", OWN, OTHER)
    model = tiny_detector("retinanet")
    model.head.cls_score = nn.Sequential(model.head.cls_score)
    with pytest.raises(UserError, match=expected):
        match_classes(model, "the model", OWN, OTHER)


@pytest.mark.parametrize(("kind", "agnostic"), [("mask", False), ("mask", True), ("cascade", True)])
def test_reordered_box_and_mask_heads_find_the_same(tiny_detector: Callable, kind: str, agnostic: bool) -> None:
    """Check boxes, scores and masks of class-specific and class-agnostic heads."""
    heads = {
        "ROI_HEADS": {"SCORE_THRESH_TEST": 0.0},
        "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": agnostic},
        "ROI_MASK_HEAD": {"CLS_AGNOSTIC_MASK": agnostic},
    }
    model = tiny_detector(kind, {"MODEL": heads}).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("cls_score.bias"):
            tensor.copy_(torch.linspace(-0.2, 0.2, len(tensor)))
        elif name.endswith(("bbox_pred.weight", "mask_head.predictor.weight")):
            tensor *= 5  # initialized too small to tell classes apart
    batch = [{"image": torch.rand(3, 64, 96) * 255, "height": 64, "width": 96}]
    before = _named(model, batch, OWN)
    assert len({name for name, *_ in before}) > 1
    match_classes(model, "the model", OWN, OTHER)
    assert _named(model, batch, OTHER) == before


def _make_it_detect(weights: dict[str, torch.Tensor]) -> None:
    """Change the weights to give scores near 0.5, different by class, and boxes that do not fill the whole image."""
    for name, tensor in weights.items():
        if "cls_score.weight" in name or "bbox_pred.weight" in name:
            tensor *= 0.03
        if "cls_score.bias" in name:
            tensor.copy_(torch.linspace(-0.2, 0.2, len(tensor)))


def _named(model: nn.Module, batch: list[dict], classes: ClassOrder) -> list[tuple]:
    with torch.no_grad():
        found = model(batch)[0]["instances"]
    boxes = (found.pred_boxes.tensor * 100).round().tolist()
    scores = (found.scores * 10_000).round().tolist()
    sizes = found.pred_masks.flatten(1).sum(1).tolist() if found.has("pred_masks") else [0] * len(found)
    return sorted(zip((classes.names[c] for c in found.pred_classes), scores, map(tuple, boxes), sizes, strict=True))


def test_unequal_classes_are_refused() -> None:
    """Check the message, and that nothing happens if an order is unknown or the same."""
    model = nn.Linear(1, 1)
    match_classes(model, "the teacher", None, OTHER)
    match_classes(model, "the teacher", OWN, ClassOrder(OWN.names, "elsewhere"))
    with pytest.raises(UserError) as caught:
        match_classes(model, "the teacher", OWN, ClassOrder(("red", "green", "purple"), "val.json"))
    assert str(caught.value) == (
        "The classes of the teacher (model.pth) are not those of val.json: it lacks 'purple' and also has 'blue'; rename them "
        "in the annotations, or use a model with the same classes."
    )


def test_names_in_a_checkpoint(tmp_path: Path) -> None:
    """Check a round trip, saved synchronously and asynchronously, and files without names or with unusable ones."""
    for asynchronous in (False, True):
        checkpointer = KDCheckpointer(nn.Linear(2, 2), str(tmp_path))
        checkpointer.class_names, checkpointer.asynchronous = list(OWN.names), asynchronous
        checkpointer.save("run #2")
        checkpointer.wait()
        path = str(tmp_path / "run #2.pth")
        for query in ("", "?matching_heuristics=True"):
            assert names_in_checkpoint(path + query) == ClassOrder(OWN.names, path)
        Path(path).unlink()
    torch.save({"model": {}, CLASS_NAMES: [1, 2]}, tmp_path / "numbers.pth")
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04")
    for name in ("numbers.pth", "damaged.pth", "gone.pth", "model.pkl"):
        assert names_in_checkpoint(str(tmp_path / name)) is None


def test_a_checkpoint_without_names_has_the_classes_of_the_training_data(tmp_path: Path) -> None:
    """Check the names in the order of the training data, with the ids of test data that have another order."""
    project = make_project(tmp_path)
    tree = json.loads(project.annotations.read_text())
    _write_in_other_order(tree)
    (tmp_path / "val.json").write_text(json.dumps(tree))
    images = str(project.annotations.parent / "images")
    files = [[project.name, str(project.annotations), images], ["val", str(tmp_path / "val.json"), images]]
    weights = ["MODEL.WEIGHTS", str(project.teacher_weights)]
    cfg = load_config(str(project.student), [*weights, "DATASETS.COCO_JSON", files, "DATASETS.TEST", ["val"]])
    found = [(category.id, category.name) for category in read_categories(cfg, 3)]
    assert found == [(2, "red"), (3, "green"), (1, "blue")]


def test_a_checkpoint_whose_names_are_not_those_of_the_data(tmp_path: Path) -> None:
    """Check names in another order, and a test set that lacks one; other numbers of names than classes do not count."""
    project = make_project(tmp_path)
    tree = json.loads(project.annotations.read_text())
    tree["categories"] = [{"id": 5, "name": "red"}, {"id": 6, "name": "blue"}]
    (tmp_path / "val.json").write_text(json.dumps(tree))
    torch.save({"model": {}, CLASS_NAMES: list(OTHER.names)}, tmp_path / "other.pth")
    images = str(project.annotations.parent / "images")
    files = [[project.name, str(project.annotations), images], ["val", str(tmp_path / "val.json"), images]]
    weights = ["MODEL.WEIGHTS", str(tmp_path / "other.pth")]
    cfg = load_config(str(project.student), [*weights, "DATASETS.COCO_JSON", files, "DATASETS.TEST", ["val"]])
    found = {count: [(c.id, c.name) for c in read_categories(cfg, count)] for count in (2, 3)}
    assert found == {2: [(5, "red"), (6, "blue")], 3: [(3, "blue"), (1, "red"), (2, "green")]}


def test_starting_weights_with_their_classes_in_another_order(tmp_path: Path) -> None:
    """Check that the classes of the head are those of the training data."""
    project = make_project(tmp_path)
    content = read_checkpoint(str(project.teacher_weights))
    bias = torch.arange(27.0)  # of nine anchors with three classes
    content["model"]["head.cls_score.bias"] = bias
    torch.save({**content, CLASS_NAMES: list(OTHER.names)}, tmp_path / "other.pth")
    with clean_process():
        trainer = make_trainer(project, "MODEL.WEIGHTS", tmp_path / "other.pth")
        load_initial_weights(trainer.cfg, trainer.bare_model)
    found = trainer.bare_model.student.head.cls_score.bias.view(9, 3)
    assert found.tolist() == bias.view(9, 3)[:, [1, 2, 0]].tolist()


def test_names_in_data_of_training_and_evaluation() -> None:
    """Check that a first training set that is not in DATASETS.COCO_JSON counts only in training."""
    cfg = load_config("tiny/retinanet-student", needs_data=False)
    cfg.DATASETS.COCO_JSON, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [["own", "", ""]], ("built_in",), ("own",)
    with clean_process():
        for name, classes in (("built_in", OTHER), ("own", OWN)):
            MetadataCatalog.get(name).thing_classes = list(classes.names)
        assert names_in_data(cfg) == ClassOrder(OWN.names, "the dataset own")
        assert names_in_data(cfg, train=True) == ClassOrder(OTHER.names, "the dataset built_in")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return a project after one iteration of training."""
    project = make_project(tmp_path_factory.mktemp("project"), SOLVER__MAX_ITER=1, SOLVER__CHECKPOINT_PERIOD=1)
    project.main()
    return project


def test_training_writes_the_names(trained: Project, tmp_path: Path) -> None:
    """Check the checkpoint and student.yaml, and that predictions have the names without the data."""
    final = trained.output / "model_final.pth"
    assert read_checkpoint(str(final))[CLASS_NAMES] == list(OWN.names)
    student = (trained.output / "student.yaml").read_text()
    assert json.loads(student.splitlines()[0].removeprefix("# class_names: ")) == list(OWN.names)
    cfg = load_config(str(trained.student), ["MODEL.WEIGHTS", str(final), "DATASETS.TRAIN", "()"], student_only=True)
    cfg.DATASETS.COCO_JSON, cfg.DATASETS.TEST = [], ()
    assert [category.name for category in read_categories(cfg, 3)] == list(OWN.names)


def test_evaluation_and_resuming_with_data_in_another_order(trained: Project) -> None:
    """Check that evaluation gives the same results, and that a resumed training keeps its order of classes."""
    final = trained.output / "model_final.pth"
    content = read_checkpoint(str(final))
    _make_it_detect(content["model"])
    torch.save(content, trained.folder / "detects.pth")
    wanted, found = _evaluate(trained)
    assert {name for name, *_ in found} == {*OWN.names}
    original = trained.annotations.read_text()
    try:
        trained.change_annotations(_write_in_other_order)
        assert _evaluate(trained) == (wanted, found)
        trained.main("--resume", "SOLVER.MAX_ITER", 2)
        assert read_checkpoint(str(final))[CLASS_NAMES] == list(OWN.names)
        other = shutil.copytree(trained.output, trained.folder / "other")
        trained.main("OUTPUT_DIR", other)  # a new training in an old folder has the order of the data
        assert read_checkpoint(str(other / final.name))[CLASS_NAMES] == list(OTHER.names)
    finally:
        trained.annotations.write_text(original)


def _evaluate(project: Project) -> tuple[str, list[tuple]]:
    """Return results, as text since they contain NaN, and detections with class names from the annotation file."""
    results = project.main("--eval-only", "MODEL.WEIGHTS", project.folder / "detects.pth")
    name_of = {c["id"]: c["name"] for c in json.loads(project.annotations.read_text())["categories"]}
    found = json.loads((project.output / "inference" / "coco_instances_results.json").read_text())
    rows = ((name_of[d["category_id"]], d["image_id"], round(d["score"], 4), *map(round, d["bbox"])) for d in found)
    return str(sorted(results["bbox"].items())), sorted(rows)


def test_resuming_with_other_classes(trained: Project) -> None:
    original = trained.annotations.read_text()
    try:
        trained.change_annotations(lambda tree: tree["categories"][2].update(name="purple"))
        with clean_process(), pytest.raises(UserError) as caught:
            make_trainer(trained).resume_or_load(resume=True)
    finally:
        trained.annotations.write_text(original)
    assert str(caught.value) == (
        f"--resume: {trained.output / 'model_final.pth'} was trained with the classes red, green, blue, but the dataset "
        f"{trained.name} has red, green, purple; resume with the data that it was started with, or train in another OUTPUT_DIR."
    )


def test_a_teacher_with_its_classes_in_another_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a teacher with class names in its checkpoint is reordered, or refused before training starts."""
    project = make_project(tmp_path, SOLVER__MAX_ITER=1)
    weights = read_checkpoint(str(project.teacher_weights))
    torch.save({**weights, CLASS_NAMES: list(OTHER.names)}, project.teacher_weights)
    project.main()
    assert "The classes of the teacher are reordered to match" in (project.output / "log.txt").read_text()
    torch.save({**weights, CLASS_NAMES: ["red", "green", "purple"]}, project.teacher_weights)
    with pytest.raises(SystemExit):
        run_train_net("--config-file", project.student, "OUTPUT_DIR", tmp_path / "second")
    assert "The classes of the teacher (" in capsys.readouterr().err


def test_a_teacher_without_class_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check the warning that its order is assumed, and that it is reordered if OPTS names its training data."""
    project = make_project(tmp_path)
    tree = json.loads(project.annotations.read_text())
    _write_in_other_order(tree)
    (tmp_path / "other.json").write_text(json.dumps(tree))
    named = ["DATASETS.COCO_JSON", [["other", "other.json", "images"]], "DATASETS.TRAIN", ["other"]]
    logs = []
    with clean_process(), caplog.at_level("INFO", "kd_d2"):
        register_coco_json(load_config(str(project.student)))
        for opts in ([], named):
            Teacher.from_config(load_config(str(project.student), ["MODEL.KD.TEACHER.OPTS", opts]))
            logs.append(caplog.text)
            caplog.clear()
    assumed = f"The class order of the teacher is unknown; it is assumed to be that of the dataset {project.name} (red, green, blue)"
    assert assumed in logs[0] and "MODEL.KD.TEACHER.OPTS" in logs[0] and "reordered" not in logs[0]
    assert "The classes of the teacher are reordered to match" in logs[1] and "unknown" not in logs[1]


@pytest.mark.parametrize("name", ["ProposalNetwork", "SemanticSegmentor"])
def test_models_that_do_not_classify_objects(tiny_detector: Callable, name: str) -> None:
    """Check that neither other names nor another order concern them."""
    model = tiny_detector("panoptic", {"MODEL": {"META_ARCHITECTURE": name}})
    before = copy.deepcopy(model.state_dict())
    for own in (OTHER, ClassOrder(("purple",), "model.pth")):
        match_classes(model, "the model", own, OWN)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_teacher_that_does_not_classify_objects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that nothing is said about its classes, whether or not its checkpoint has the names of its data."""
    project = make_project(tmp_path, "faster-rcnn")
    project.change_teacher(MODEL__META_ARCHITECTURE="ProposalNetwork")
    model = save_fixed_weights(project.teacher, project.teacher_weights)
    cfg = load_config(str(project.student))
    with clean_process(), caplog.at_level("INFO", "kd_d2"):
        register_coco_json(cfg)
        for names in ({}, {CLASS_NAMES: ["purple"]}):
            torch.save({"model": model.state_dict(), **names}, project.teacher_weights)
            Teacher.from_config(cfg)
    assert "order" not in caplog.text


def test_training_data_of_a_teacher_that_do_not_tell_its_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Check that data in OPTS are read or refused, and that data in the teacher's own config are read or passed over."""
    project = make_project(tmp_path)
    tree = json.loads(project.annotations.read_text())
    _write_in_other_order(tree)
    categories = tree["categories"]
    renamed = [{**category, "name": category["name"].upper()} for category in categories]
    for name, entries in (("few", categories), ("renamed", renamed), ("empty", [])):
        content = {"images": [], "annotations": [], "categories": entries}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "alone.json").write_text(json.dumps({"categories": categories}))

    def load(name: str, train: str = "its") -> str:
        data = {"DATASETS.COCO_JSON": [["its", f"{name}.json", "images"]], "DATASETS.TRAIN": [train]}
        opts = [item for pair in data.items() for item in pair]
        caplog.clear()
        Teacher.from_config(load_config(str(project.student), ["MODEL.KD.TEACHER.OPTS", opts]))
        return caplog.text

    with clean_process(), caplog.at_level("INFO", "kd_d2"):
        register_coco_json(load_config(str(project.student)))
        for name in ("few", "alone"):
            assert "The classes of the teacher are reordered to match" in load(name)
        for arguments, reason in (
            (("gone",), r"MODEL.KD.TEACHER.OPTS: DATASETS.COCO_JSON \(its\): there is no file .*gone.json"),
            (("renamed",), r"The classes of the teacher \(.*renamed.json\) are not those of .* lacks .* also has"),
            (("empty",), "MODEL.KD.TEACHER.OPTS: .*empty.json has no categories"),
            (("few", "other"), r"OPTS: DATASETS.TRAIN \(other\) names no entry of DATASETS.COCO_JSON \(its\)"),
        ):
            with pytest.raises(UserError, match=reason):
                load(*arguments)
        for name, reason in (("gone", "there is no file"), ("renamed", "are not those of the dataset")):
            project.change_teacher(DATASETS__COCO_JSON=[["its", f"{name}.json", "images"]], DATASETS__TRAIN=("its",))
            caplog.clear()
            Teacher.from_config(load_config(str(project.student)))
            assert "does not determine its class order" in caplog.text and reason in caplog.text
            assert "The class order of the teacher is unknown" in caplog.text


def test_no_warning_for_one_class(caplog: pytest.LogCaptureFixture) -> None:
    """Check that the only possible order is not called unknown."""
    warn_of_unknown_order("the teacher", ClassOrder(("red",), "val.json"), "name its data")
    assert not caplog.text


def test_the_key_of_the_number_of_classes() -> None:
    """Check known detectors, subclasses of them, and a detector of another kind."""
    cfg = load_config("tiny/retinanet-student", needs_data=False)
    known = {
        RetinaNet: "RETINANET",
        type("MyRetinaNet", (RetinaNet,), {}): "RETINANET",
        RepPoints: "REPPOINTS",
        GeneralizedRCNN: "ROI_HEADS",
        PanopticFPN: "ROI_HEADS",
    }
    for detector, node in known.items():
        assert class_count_key(cfg, detector) == f"MODEL.{node}.NUM_CLASSES"
    own = type("OneLevelDetector", (DenseDetector,), {})
    assert class_count_key(cfg, own) is None
    assert class_count_key(cfg, lambda cfg: RetinaNet(cfg)) is None
    assert ClassCount(4, own.__name__, None).difference("val", 3) == (
        "The dataset val has 3 classes, but the model (OneLevelDetector) predicts 4: set its number of classes accordingly."
    )
    assert ClassCount(3, own.__name__, None).difference("val", 3) is None
