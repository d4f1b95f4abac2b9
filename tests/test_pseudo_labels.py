"""Training without annotations: the teacher's detections as ground truth, computed in each step or read from a file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_d2 import KDMetaArch, Teacher, UserError, load_config
from kd_d2.adapters import DetectorOutputs, build_adapter
from kd_d2.data import build_stream_loader, register_coco_json
from kd_d2.distillers import DeFeat
from kd_d2.distillers.icd.priors import compute_priors
from kd_d2.distillers.icd.queries import ObservedFakeInstances
from kd_d2.label_file import label_images
from kd_d2.pseudo_labels import PseudoLabels

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import Project, clean_process, make, make_project, run_command, save_fixed_weights, train

KINDS = ("retinanet", "fcos", "atss", "gfl", "fsaf", "reppoints", "faster", "mask", "cascade", "panoptic")
PSEUDO_LABELS = {"MODEL__KD__PSEUDO_LABELS__ENABLED": True, "MODEL__KD__PSEUDO_LABELS__SCORE_THRESH": 0.0}
LOW_THRESHOLDS = [
    part
    for node in ("RETINANET", "FSAF", "REPPOINTS", "ROI_HEADS")
    for part in (f"MODEL.{node}.SCORE_THRESH_TEST", 0.0)
]


def _sensitive(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model in eval mode, with detections of any score."""
    for module in model.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = 0.0
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_the_detectors_own(tiny_detector: Callable, make_inputs: Callable, kind: str) -> None:
    """Check boxes in input pixels, classes, scores, presence of masks, and features against separate forward passes."""
    model = _sensitive(tiny_detector(kind))
    batch = make_inputs()
    scaled = [{**x, "height": 3 * x["height"], "width": 2 * x["width"]} for x in batch]
    with torch.no_grad():
        expected = model([{"image": x["image"]} for x in batch])
        outputs = build_adapter(model).run(scaled, frozenset({"features", "detections"}))
        features = build_adapter(model).run(scaled, frozenset({"features"})).features
    assert any(len(x["instances"]) for x in expected)
    for found, own in zip(outputs.detections, expected, strict=True):
        own = own["instances"]
        assert found.image_size == own.image_size
        torch.testing.assert_close(found.pred_boxes.tensor, own.pred_boxes.tensor)
        torch.testing.assert_close(found.scores, own.scores)
        assert torch.equal(found.pred_classes, own.pred_classes)
        assert found.has("pred_masks") == own.has("pred_masks")
    for stride, level in features.items():
        torch.testing.assert_close(outputs.features[stride], level)


def test_dense_predictions_and_detections_come_from_one_run_of_the_head(
    tiny_detector: Callable, make_inputs: Callable
) -> None:
    """Check that requesting both runs the head once."""
    model = _sensitive(tiny_detector("retinanet"))
    calls: list[None] = []
    model.head.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        outputs = build_adapter(model).run(make_inputs(), frozenset({"dense", "detections"}))
    assert len(calls) == 1
    assert outputs.dense is not None
    assert outputs.detections is not None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["retinanet", "fcos", "atss", "gfl", "fsaf", "reppoints"])
def test_dense_predictions_are_the_same_beside_detections(
    kind: str, memory_format: torch.memory_format, tiny_detector: Callable, make_inputs: Callable
) -> None:
    """Check that logits and quality remain logits, although Detectron2's inference modifies them in place."""
    adapter = build_adapter(_sensitive(tiny_detector(kind)).to(memory_format=memory_format))
    with torch.no_grad():
        alone, beside = (
            adapter.run(make_inputs(), frozenset(want)).dense for want in (["dense"], ["dense", "detections"])
        )
    for name in ("logits", "box_regression", "quality"):
        expected = getattr(alone, name) or {}
        for stride, level in expected.items():
            assert torch.equal(getattr(beside, name)[stride], level), (name, stride)


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "gfl", "faster"])
def test_labels_are_float32_under_autocast(tiny_detector: Callable, make_inputs: Callable, kind: str) -> None:
    """Check that boxes are decoded in float32 under mixed precision: not all are representable in bfloat16."""
    model, batch = _sensitive(tiny_detector(kind)), make_inputs()
    adapter = build_adapter(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = adapter.run(batch, frozenset({"detections"}))
    targets = PseudoLabels(0.0)(batch, outputs)
    assert all(target.gt_boxes.tensor.dtype == torch.float32 for target in targets)
    boxes = torch.cat([target.gt_boxes.tensor for target in targets])
    assert len(boxes)
    assert (boxes != boxes.bfloat16().float()).any()


def _detections(scores: list[float], **more: Any) -> DetectorOutputs:
    count = len(scores)
    boxes = Boxes(torch.arange(4.0 * count).view(count, 4))
    found = Instances((8, 9), pred_boxes=boxes, scores=torch.tensor(scores), pred_classes=torch.arange(count), **more)
    return DetectorOutputs(images=None, features={}, detections=[found])


def test_detections_above_the_score_become_ground_truth() -> None:
    """Check the threshold, which is exclusive, boxes, classes, masks, and an image without any detection above it."""
    masks = torch.rand(3, 8, 9) > 0.5
    (target,) = PseudoLabels(0.5)([], _detections([0.9, 0.5, 0.51], pred_masks=masks))
    assert target.image_size == (8, 9)
    assert target.gt_classes.tolist() == [0, 2]
    assert target.gt_boxes.tensor.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert isinstance(target.gt_masks, BitMasks)
    assert torch.equal(target.gt_masks.tensor, masks[[0, 2]])
    (target,) = PseudoLabels(0.95)([], _detections([0.9, 0.5, 0.51]))
    assert len(target) == 0
    assert target.get_fields().keys() == {"gt_boxes", "gt_classes"}


@pytest.mark.parametrize("kind", ["retinanet", "faster", "mask"])
def test_losses_are_those_of_the_teachers_detections(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage, kind: str
) -> None:
    """Check that a student without annotations has the same losses as with these detections as its annotations."""
    teacher = _sensitive(tiny_detector(kind, seed=1))
    batch = [{k: v for k, v in x.items() if k != "instances"} for x in make_inputs()]
    with torch.no_grad():
        detected = [x["instances"] for x in teacher([{"image": x["image"]} for x in batch])]
    threshold = torch.cat([x.scores for x in detected]).median().item()
    student = tiny_detector(kind)
    model = KDMetaArch(student=student, teacher=Teacher(teacher), distillers={}, labels=PseudoLabels(threshold))
    torch.manual_seed(7)
    losses = model(batch)
    labelled = []
    for entry, found in zip(batch, detected, strict=True):
        found = found[found.scores > threshold]
        target = Instances(found.image_size, gt_boxes=found.pred_boxes, gt_classes=found.pred_classes)
        if kind == "mask":
            target.gt_masks = BitMasks(found.pred_masks)
        labelled.append({**entry, "instances": target})
    assert sum(len(x["instances"]) for x in labelled) > 2
    student = tiny_detector(kind)
    torch.manual_seed(7)
    expected = student(labelled)
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)


def test_masks_need_a_teacher_that_predicts_them(tiny_detector: Callable) -> None:
    """Check that pairs that do not fit are refused before training, naming the student."""
    teacher = Teacher(tiny_detector("faster"))
    with pytest.raises(UserError, match=r"student \(GeneralizedRCNN\) is trained on masks, which the teacher"):
        KDMetaArch(student=tiny_detector("mask"), teacher=teacher, distillers={}, labels=PseudoLabels(0.3))
    keypoints = {"MODEL": {"KEYPOINT_ON": True}}
    with pytest.raises(UserError, match=r"student \(GeneralizedRCNN\) is also trained on keypoints"):
        KDMetaArch(student=tiny_detector("faster", keypoints), teacher=teacher, distillers={}, labels=PseudoLabels(0.3))


def test_teachers_whose_detections_are_no_labels(tiny_detector: Callable) -> None:
    """Check a teacher that predicts no instances, and a panoptic one with other classes, without masks for the student."""

    def refused(student: str, teacher: str, **keys: object) -> str:
        with pytest.raises(UserError) as caught:
            models = tiny_detector(student), Teacher(tiny_detector(teacher, {"MODEL": keys}))
            KDMetaArch(student=models[0], teacher=models[1], distillers={}, labels=PseudoLabels(0.3))
        return str(caught.value)

    for name in ("SemanticSegmentor", "ProposalNetwork"):
        expected = f"MODEL.KD.PSEUDO_LABELS needs detections, which the teacher ({name}) does not have."
        assert refused("retinanet", "panoptic", META_ARCHITECTURE=name) == expected
    other = refused("retinanet", "panoptic", ROI_HEADS={"NUM_CLASSES": 9})
    assert other.startswith("The student (RetinaNet) has 3 classes and the teacher (PanopticFPN) 9")
    assert "student (PanopticFPN) is trained on masks, which the teacher" in refused("panoptic", "faster")


ROTATED = {
    "PROPOSAL_GENERATOR": {"NAME": "RRPN"},
    "ANCHOR_GENERATOR": {"NAME": "RotatedAnchorGenerator"},
    "RPN": {"BBOX_REG_WEIGHTS": (1.0,) * 5},
    "ROI_HEADS": {"NAME": "RROIHeads"},
    "ROI_BOX_HEAD": {"POOLER_TYPE": "ROIAlignRotated", "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0, 1.0)},
}
"""Keys of MODEL of an R-CNN with rotated boxes."""


def test_teachers_that_cannot_detect(tiny_detector: Callable) -> None:
    """Check rotated boxes and semantic segmentation; the proposals of an RPN can be evaluated."""

    def refused(kind: str, **keys: object) -> str:
        with pytest.raises(UserError) as caught:
            Teacher(tiny_detector(kind, {"MODEL": keys})).check_detects()
        return str(caught.value)

    rotated = "cannot detect: its MODEL.PROPOSAL_GENERATOR.NAME is RRPN, whose rotated boxes are not supported."
    assert refused("faster", **ROTATED) == f"The teacher (GeneralizedRCNN) {rotated}"
    assert (
        refused("faster", **ROTATED, META_ARCHITECTURE="ProposalNetwork") == f"The teacher (ProposalNetwork) {rotated}"
    )
    expected = "The teacher (SemanticSegmentor) cannot detect: it predicts only semantic segmentation."
    assert refused("panoptic", META_ARCHITECTURE="SemanticSegmentor") == expected
    Teacher(tiny_detector("faster", {"MODEL": {"META_ARCHITECTURE": "ProposalNetwork"}})).check_detects()
    assert Teacher(tiny_detector("faster", {"MODEL": ROTATED})).spec.provides >= {"features"}
    assert "detections" not in Teacher(tiny_detector("faster", {"MODEL": ROTATED})).spec.provides


def test_labels_without_effect_on_the_student(tiny_detector: Callable) -> None:
    """Check a SemanticSegmentor, which is not trained on objects, alone and with a method that uses them."""
    student = tiny_detector("panoptic", {"MODEL": {"META_ARCHITECTURE": "SemanticSegmentor"}})
    teacher = Teacher(tiny_detector("faster"))
    models = {"student": student, "teacher": teacher, "labels": PseudoLabels(0.3)}
    with pytest.raises(UserError) as caught:
        KDMetaArch(distillers={}, **models)
    assert str(caught.value) == (
        "MODEL.KD.PSEUDO_LABELS has no effect: the student (SemanticSegmentor) is trained on semantic segmentation, and no method of "
        "MODEL.KD.DISTILLERS uses objects."
    )
    KDMetaArch(distillers={"DeFeat": make(DeFeat, build_adapter(student).spec, teacher.spec)}, **models)


def _without_annotations(project: Project) -> None:
    """Remove annotations and classes from the training set; another dataset has the annotated images for testing."""
    annotated = project.annotations.read_text()
    (project.annotations.parent / "annotated.json").write_text(annotated)
    project.annotations.write_text(json.dumps({"images": json.loads(annotated)["images"]}))
    test = f"{project.name}_test"
    project.change(
        DATASETS__COCO_JSON=[
            [project.name, "data/annotations.json", "data/images"],
            [test, "data/annotated.json", "data/images"],
        ],
        DATASETS__TEST=(test,),
        MODEL__KD__TEACHER__OPTS=LOW_THRESHOLDS,
        **PSEUDO_LABELS,
    )


ICD_KEYS = {"MODEL__KD__ICD__DIM": 16, "MODEL__KD__ICD__NUM_HEADS": 2, "MODEL__KD__ICD__FFN_DIM": 32}


@pytest.mark.parametrize("detector", ["retinanet", "faster-rcnn", "fsaf", "reppoints"])
@pytest.mark.parametrize("distillers", [(), ("ICD", "StructuralKD")])
def test_images_without_annotations_train(tmp_path: Path, detector: str, distillers: tuple[str, ...]) -> None:
    """Check a complete run on a file with only images, with only detection losses and with methods that use targets."""
    project = make_project(tmp_path, detector, MODEL__KD__DISTILLERS=distillers, SOLVER__MAX_ITER=2, **ICD_KEYS)
    _without_annotations(project)
    project.main()
    assert json.loads((project.output / "train.json").read_text())["bbox"].keys() >= {"AP", "AP50"}
    losses = json.loads((project.output / "metrics.json").read_text().splitlines()[0])
    assert losses[{"fsaf": "loss_fsaf_box", "reppoints": "loss_reppoints_refine"}.get(detector, "loss_box_reg")] > 0
    assert ("loss_icd_aux_box" in losses) == bool(distillers)


def test_annotations_that_are_there_are_not_looked_at(tmp_path: Path) -> None:
    """Check that wrong boxes and classes in the file change nothing; only images for testing need correct ones."""
    losses = []
    for number in (0, 1):
        project = make_project(tmp_path / str(number), MODEL__KD__DISTILLERS=(), SOLVER__MAX_ITER=2)
        project.change(DATASETS__TEST=(), MODEL__KD__TEACHER__OPTS=LOW_THRESHOLDS, SEED=3, **PSEUDO_LABELS)
        if number:
            project.change_annotations(
                lambda tree: [a.update(bbox="nowhere", category_id=77) for a in tree["annotations"]]
            )
        losses.append(train(project).losses)
    assert losses[0].keys() == {0, 1}
    for iteration, of_iteration in losses[0].items():
        assert losses[1][iteration] == pytest.approx(of_iteration, rel=1e-4)


def test_annotations_of_a_set_that_is_also_tested_on_do_not_reach_the_training(tmp_path: Path) -> None:
    """Check that batches have only images, although evaluation reads the same file with its annotations."""
    project = make_project(tmp_path, **PSEUDO_LABELS)
    with clean_process():
        cfg = load_config(str(project.student))
        register_coco_json(cfg)
        batch = next(iter(build_stream_loader(cfg, seed=0)))
        assert all("image" in entry and not entry.keys() & {"instances", "annotations"} for entry in batch)
        assert any(entry["annotations"] for entry in DatasetCatalog.get(project.name))


def test_sampling_by_class_frequency_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Check the message of a sampler that needs annotations."""
    project = make_project(tmp_path, DATALOADER__SAMPLER_TRAIN="RepeatFactorTrainingSampler", **PSEUDO_LABELS)
    project.change(MODEL__KD__TEACHER__OPTS=LOW_THRESHOLDS)
    with pytest.raises(SystemExit):
        project.main()
    assert "RepeatFactorTrainingSampler needs annotations, but MODEL.KD.PSEUDO_LABELS ignores" in capfd.readouterr().err


def test_class_statistics_are_learned_from_what_is_seen() -> None:
    """Check counts, means and deviations against those of the same boxes at once, and rare and unseen classes."""
    random = np.random.RandomState(0)
    classes = np.concatenate([np.zeros(40, int), np.full(15, 2), [1] * 3])
    sizes = random.uniform(0.1, 0.6, (len(classes), 2))
    fakes = ObservedFakeInstances(4)
    height, width = 50, 80
    for part in np.array_split(np.arange(len(classes)), 5):
        extent = torch.from_numpy(sizes[part]).float() * torch.tensor([width, height])
        target = Instances((height, width), gt_boxes=Boxes(torch.cat([torch.full_like(extent, 2.0), 2 + extent], 1)))
        target.gt_classes = torch.from_numpy(classes[part])
        empty = Instances((20, 20), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))
        fakes.observe([empty, target], [(20, 20), (height, width)])
    # The initial state counts as two boxes of half an instance each: 0.1 and 0.3, with mean 0.2 and deviation 0.1.
    first = np.repeat([[0.1, 0.1], [0.3, 0.3]], 4, axis=0)
    counts, means, deviations = compute_priors(classes, sizes, 4)
    assert fakes.counts.tolist() == [41, 4, 16, 1]
    expected = np.append(sizes[classes == 0], [[0.2, 0.2]], 0)
    torch.testing.assert_close(fakes.mean_sizes[0], torch.from_numpy(expected.mean(0)).float())
    pooled = (sizes.sum(0) + first.sum(0) / 2) / (len(sizes) + 4)
    for rare in (1, 3):
        torch.testing.assert_close(fakes.mean_sizes[rare], torch.from_numpy(pooled).float())
    torch.testing.assert_close(fakes.deviations[0], deviations[0], rtol=0.1, atol=0)
    torch.testing.assert_close(fakes.cumulative, torch.tensor([41, 45, 61, 62]) / 62)
    boxes, drawn = fakes.sample(300)
    assert boxes.isfinite().all()
    assert set(drawn.tolist()) >= {0, 2}


def test_labels_made_ahead(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check the file of the teacher's detections in each image, and that the printed overrides train on it.

    The sampler needs annotations, which only the training on the file has.
    """
    sampler = {"DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler"}
    project = make_project(tmp_path, MODEL__KD__TEACHER__OPTS=LOW_THRESHOLDS, **PSEUDO_LABELS, **sampler)
    path = tmp_path / "labels.json"
    run_command("pseudo-label", project.student, "--output", path, "--score-thresh", 0.011)
    tree = json.loads(path.read_text())
    assert [(i["id"], i["file_name"]) for i in tree["images"]] == [(n + 1, f"{n:03d}.png") for n in range(6)]
    assert [c["name"] for c in tree["categories"]] == ["red", "green", "blue"]
    assert tree["annotations"]
    for annotation in tree["annotations"]:
        assert annotation["score"] > 0.011
        assert annotation["area"] == pytest.approx(annotation["bbox"][2] * annotation["bbox"][3])
        assert 1 <= annotation["category_id"] <= 3
    printed = capsys.readouterr().out
    assert f"{len(tree['annotations'])} annotations of 6 images: {path}" in printed
    overrides = shlex.split(printed.splitlines()[-1])
    name = f"{project.name}_by_teacher"
    cfg = load_config(str(project.student), overrides)
    assert [entry[0] for entry in cfg.DATASETS.COCO_JSON] == [project.name, name]
    assert cfg.DATASETS.COCO_JSON[1][1:] == [str(path), str(tmp_path / "data" / "images")]
    assert ((name,), (project.name,)) == (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    # Training reads the file: changing its boxes changes the losses.
    losses = train(project, *overrides, "SOLVER.MAX_ITER", 1).losses[0]
    for annotation in tree["annotations"]:
        annotation["bbox"] = [0, 0, 9, 9]
    path.write_text(json.dumps(tree))
    assert train(project, *overrides, "SOLVER.MAX_ITER", 1).losses[0]["loss_cls"] != pytest.approx(losses["loss_cls"])


@pytest.mark.parametrize(
    "changes",
    [
        {"categories": []},
        {"categories": [{"id": 3, "name": "red"}, {"id": 5, "name": "green"}, {"id": 4, "name": "blue"}]},
    ],
)
def test_labels_have_the_classes_of_the_first_set(tmp_path: Path, changes: dict[str, list]) -> None:
    """Check labels of images whose file has no classes, or has them in another order."""
    project = make_project(tmp_path, MODEL__KD__TEACHER__OPTS=LOW_THRESHOLDS, **PSEUDO_LABELS)
    tree = json.loads(project.annotations.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"images": tree["images"], **changes}))
    files = [[project.name, str(project.annotations), str(tmp_path / "data/images")]]
    files.append(["other", str(other), str(tmp_path / "data/images")])
    found = []
    for name, json_file in ((project.name, tmp_path / "a.json"), ("other", tmp_path / "b.json")):
        options = ("--output", json_file, "--dataset", name, "--score-thresh", 0.011)
        keys = ("DATASETS.COCO_JSON", files, "DATASETS.TRAIN", (project.name, "other"))
        run_command("pseudo-label", project.student, *options, *keys)
        found.append(json.loads(json_file.read_text()))
    assert found[0] == found[1]


def test_annotations_of_the_config_stay(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Check that a dataset's own file, also one behind a link or of an unused dataset, is refused as output."""
    project = make_project(tmp_path)
    link, unused = tmp_path / "link.json", tmp_path / "unused.json"
    link.symlink_to(project.annotations)
    unused.write_text("unused")
    entries = [[project.name, str(project.annotations), str(project.annotations.parent / "images")]]
    entries.append(["unused", str(unused), str(tmp_path)])
    before = project.annotations.read_text()
    for output in (link, unused):
        with pytest.raises(SystemExit):
            run_command("pseudo-label", project.student, "--output", output, "DATASETS.COCO_JSON", entries)
        sentence = (
            f"error: --output: {output} is an annotation file of the config; choose another path, or remove it first."
        )
        assert capfd.readouterr().err.splitlines()[-1] == sentence
    assert (project.annotations.read_text(), unused.read_text()) == (before, "unused")


def test_a_teacher_that_leaves_out_what_would_count(
    tmp_path: Path, tiny_detector: Callable, capfd: pytest.CaptureFixture
) -> None:
    """Check that one- and two-stage teachers whose threshold is too high are refused, also by the command."""
    for kind in ("retinanet", "faster", "cascade"):
        with pytest.raises(UserError, match=r"has none below 0.05; lower its SCORE_THRESH_TEST"):
            KDMetaArch(
                student=tiny_detector("retinanet"),
                teacher=Teacher(tiny_detector(kind)),
                distillers={},
                labels=PseudoLabels(0.04),
            )
        PseudoLabels(0.05).check_threshold(build_adapter(tiny_detector(kind)).spec)
    project = make_project(tmp_path)
    with pytest.raises(SystemExit):
        run_command("pseudo-label", project.student, "--output", tmp_path / "labels.json", "--score-thresh", 0.01)
    error = capfd.readouterr().err
    assert re.search(r"error: .*need teacher detections down to score 0.01 .* has none below 0.05", error)


def test_labels_are_of_scaled_images(tiny_detector: Callable, make_inputs: Callable) -> None:
    """Check that boxes are in pixels of the image on disk, and file names are relative to the images' common folder."""
    model = _sensitive(tiny_detector("mask"))
    batch = make_inputs(((64, 80),), (1,))
    batch[0].update(height=128, width=160, file_name="/data/a/b/1.png")
    other = [{**batch[0], "file_name": "/data/a/c/2.png"}]
    tree, folder = label_images(model, [batch, other], "abc", 0.0)
    assert folder == "/data/a"
    assert [i["file_name"] for i in tree["images"]] == ["b/1.png", "c/2.png"]
    assert [c["name"] for c in tree["categories"]] == ["a", "b", "c"]
    own = model(batch)[0]["instances"]
    boxes = np.array([a["bbox"] for a in tree["annotations"] if a["image_id"] == 1])
    np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], own.pred_boxes.tensor[:, 2:].detach().numpy(), rtol=1e-5)
    assert {"segmentation", "score"} <= tree["annotations"][0].keys()


def test_images_that_cannot_be_labelled(
    tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Check that a file without an image stops the command at once, and that it is left out where the config says so,
    as is one whose pixels are damaged."""
    project = make_project(tmp_path, MODEL__KD__TEACHER__OPTS=LOW_THRESHOLDS, **PSEUDO_LABELS)
    project.change(DATASETS__TEST=())
    images, path = project.annotations.parent / "images", tmp_path / "labels.json"
    (images / "004.png").write_text("no image")
    with pytest.raises(SystemExit):
        run_command("pseudo-label", project.student, "--output", path)
    error = capfd.readouterr().err
    assert error.splitlines()[-1].startswith(f"error: The image {images / '004.png'} cannot be used: its format")
    assert "image/s" not in error
    content = bytearray((images / "001.png").read_bytes())
    content[len(content) // 2] ^= 255
    (images / "001.png").write_bytes(content)
    skip = ("DATALOADER.SKIP_UNUSABLE_IMAGES", True)
    run_command("pseudo-label", project.student, "--output", path, *skip)
    tree = json.loads(path.read_text())
    assert [image["file_name"] for image in tree["images"]] == ["000.png", "002.png", "003.png", "005.png"]
    assert {annotation["image_id"] for annotation in tree["annotations"]} <= {1, 2, 3, 4}
    for name in ("001.png", "004.png"):
        assert f"The image {images / name} cannot be used: " in caplog.text
    for image in images.iterdir():
        image.write_text("no image")
    with pytest.raises(SystemExit):
        run_command("pseudo-label", project.student, "--output", path, *skip)
    assert capfd.readouterr().err.endswith("error: None of the images can be used, so nothing is labelled.\n")


def test_masks_made_ahead(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Check that the printed overrides train on a teacher's masks, and that a teacher without masks is refused."""
    project = make_project(tmp_path, "faster-rcnn", MODEL__KD__TEACHER__OPTS=LOW_THRESHOLDS)
    tree = json.loads(project.annotations.read_text())
    for annotation in tree["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
    project.annotations.write_text(json.dumps(tree))
    head = {"MODEL__ROI_MASK_HEAD__NUM_CONV": 1, "MODEL__ROI_MASK_HEAD__CONV_DIM": 8}
    project.change(MODEL__MASK_ON=True, **head)
    path = tmp_path / "labels.json"
    with pytest.raises(SystemExit):
        run_command("pseudo-label", project.student, "--output", path)
    assert capfd.readouterr().err.splitlines()[-1] == (
        "error: MODEL.MASK_ON is True, but the teacher (GeneralizedRCNN) predicts no masks: set it to False to label boxes only."
    )
    project.change_teacher(MODEL__MASK_ON=True, **head)
    save_fixed_weights(project.teacher, project.teacher_weights, seed=1)
    run_command("pseudo-label", project.student, "--output", path, "--score-thresh", 0.0)
    overrides = shlex.split(capfd.readouterr().out.splitlines()[-1])
    assert overrides[-2:] == ["INPUT.MASK_FORMAT", "bitmask"]
    assert train(project, *overrides, "SOLVER.MAX_ITER", 1).losses[0]["loss_mask"] > 0


@pytest.mark.parametrize(
    ("keys", "options", "expected"),
    [
        ({"MODEL__META_ARCHITECTURE": "RetinaNet"}, (), "must be the config of a distillation"),
        ({"MODEL__KEYPOINT_ON": True}, (), "MODEL.KEYPOINT_ON is True, but pseudo-labels are boxes and masks only"),
        ({}, ("--dataset", "other"), "--dataset 'other' is not in DATASETS.TRAIN: tiny_"),
        ({}, ("--score-thresh", 1.0), "--score-thresh is 1.0; it must be from 0 to below 1"),
        ({}, ("--output", "/proc/none/labels.json"), "--output /proc/none cannot be written"),
        ({}, ("--output", "/proc"), "--output /proc is a folder; name a file."),
    ],
)
def test_wrong_arguments_of_the_command(
    tmp_path: Path, capfd: pytest.CaptureFixture, keys: dict, options: tuple, expected: str
) -> None:
    project = make_project(tmp_path, **keys)
    with pytest.raises(SystemExit) as ended:
        run_command("pseudo-label", project.student, "--output", tmp_path / "labels.json", *options)
    assert ended.value.code == 2
    assert expected in capfd.readouterr().err.splitlines()[-1]
