"""Host synchronization in a training step: the host waits for a GPU only in known places, each with its reason."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from kd_d2.adapters import Positives
from kd_d2.adapters.anchors import grid_anchors
from kd_d2.engine.optimizers import build_optimizers
from kd_d2.engine.step import DistillationStep
from kd_d2.losses import fused_ssim
from kd_d2.losses.gaussian import _cached_blur_matrix, blur_matrix
from kd_d2.teacher import Teacher
from kd_d2.transfer import instances_on_device, on_device

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import BitMasks, Boxes, Instances, RotatedBoxes
from detectron2.utils.events import EventStorage
from helpers import META_ARCHITECTURES, make_project, make_trainer, methods_of
from simulated_gpu import GPU, GpuTensor, SimulatedGpu, move_to_gpu

SMALL_ICD = {"MODEL__KD__ICD__DIM": 16, "MODEL__KD__ICD__NUM_HEADS": 2, "MODEL__KD__ICD__FFN_DIM": 32}
KNOWN = {
    ("assignment.py", "of"): "the positions of the positives; their number is needed for everything at them",
    ("dense.py", "losses"): "Detectron2's RetinaNet",
    ("fcos.py", "losses"): "Detectron2's FCOS and fvcore's IoU loss",
    ("atss.py", "losses"): "torchvision's IoU loss, once a batch",
    ("gfl.py", "losses"): "torchvision's IoU loss, once a batch",
    ("rcnn.py", "run"): "Detectron2's R-CNN samples proposals",
    ("rcnn.py", "_propose"): "Detectron2's RPN",
    ("rcnn.py", "_class_logits"): "Detectron2's RoI pooler assigns levels",
    ("gid.py", "select_instances"): "the NMS",
    ("gid.py", "_features"): "how many instances each level has",
    ("gaussian.py", "_new_blur_matrix"): "copied once for each size of a map",
}
"""Reasons for waiting, by file and function of kd_d2."""
AFTER_TEACHER = {("gaussian.py", "_new_blur_matrix"), ("gid.py", "select_instances"), ("gid.py", "_features")}
"""Places where methods of dense detectors wait for the teacher's outputs."""


@pytest.mark.parametrize("detector", META_ARCHITECTURES)
def test_a_training_step_waits_in_known_places_alone(
    tmp_path: Path, detector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check forward and backward pass of every method that supports the detector; the teacher's pass never waits.

    Losses and gradients of methods are queued while the GPU computes the teacher's outputs: the detection losses of dense
    detectors wait before the teacher is started. GID selects instances after it, and the host needs their number.
    """
    project = make_project(tmp_path, detector, MODEL__KD__DISTILLERS=tuple(methods_of(detector)), **SMALL_ICD)
    trainer = make_trainer(project)
    trainer.resume_or_load(resume=False)
    model, batch = trainer.bare_model.train(), next(iter(trainer._trainer.data_loader))
    expected = model.teacher(batch, frozenset({"features"})).features
    monkeypatch.setattr(fused_ssim, "_triton_kernels", lambda device: None)
    for module in (model, model.teacher.model):
        move_to_gpu(module)
    before, run = set(), Teacher.__call__

    def start_teacher(*args):
        before.update(step.places)
        step.places.clear()
        return run(*args)

    with EventStorage(), SimulatedGpu() as step, monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", start_teacher)
        losses = model(batch)
        sum(losses.values()).backward()
    assert all(isinstance(loss, GpuTensor) for loss in losses.values())
    assert before and before <= KNOWN.keys()
    if detector == "faster-rcnn":
        assert step.places <= KNOWN.keys()
    else:
        assert ("assignment.py", "of") in before
        assert step.places <= AFTER_TEACHER
    images = [{"image": GpuTensor(x["image"])} for x in batch]
    with SimulatedGpu() as pass_of_teacher:
        outputs = model.teacher(images, frozenset({"features"} if detector == "faster-rcnn" else {"features", "dense"}))
    assert not pass_of_teacher.places
    for stride, level in outputs.features.items():
        torch.testing.assert_close(level.inner, expected[stride])


def test_an_iteration_waits_once_more(tmp_path: Path) -> None:
    """Check that optimizers, and a balance when it does not measure, add no wait; logging and checking losses does."""
    balance = {"MODEL__KD__BALANCE__ENABLED": True, "MODEL__KD__BALANCE__LEVELS": True}
    methods = (
        "FeatureImitation",
        "ICD",
    )  # ICD has its own optimizer
    project = make_project(tmp_path, "retinanet", MODEL__KD__DISTILLERS=methods, **SMALL_ICD, **balance)
    trainer = make_trainer(project, "SOLVER.CLIP_GRADIENTS.ENABLED", False)
    trainer.resume_or_load(resume=False)
    model, batch = trainer.bare_model.train(), next(iter(trainer._trainer.data_loader))
    for module in (model, model.teacher.model):
        move_to_gpu(module)
    step = DistillationStep(model, *build_optimizers(trainer.cfg, model))
    step._data_loader_iter_obj = itertools.repeat(batch)
    places = []
    with EventStorage(2) as storage:
        for step.iter in (2, 3):
            with SimulatedGpu() as gpu:
                step.run_step()
            places.append(gpu.places)
            storage.step()
    assert ("balance.py", "_measure") in places[0] - places[1]
    clipping = ("optimizers.py", "step")  # waits only on CPUs, where a list of tensors is multiplied one by one
    assert places[1] - KNOWN.keys() == {("step.py", "_record"), clipping}


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda: Positives.of(GpuTensor(torch.tensor([[0, -1, 2]]))), True),
        (lambda: blur_matrix(9, 3, 1.0, torch.float32, GPU), True),
        (lambda: on_device([1, 2], GPU) + GpuTensor(torch.ones(2)), False),
        (lambda: Positives(*on_device([[0, 0, 0]] * 3, GPU)).pick([GpuTensor(torch.ones(1, 2, 3))]), False),
    ],
    ids=["data-dependent size", "blocking copy", "non-blocking copy", "integer indices"],
)
def test_what_waits_is_seen(call: Callable, waits: bool) -> None:
    _cached_blur_matrix.cache_clear()
    with SimulatedGpu() as gpu:
        call()
    _cached_blur_matrix.cache_clear()
    assert bool(gpu.places) == waits


def test_instances_are_copied_without_waiting() -> None:
    """Check boxes, classes and masks, and fields without a device."""
    instances = Instances((4, 6), gt_boxes=Boxes([[0.0, 1.0, 2.0, 3.0]]), gt_classes=torch.tensor([2]))
    instances.gt_masks, instances.names = BitMasks(torch.ones(1, 4, 6)), ["a"]
    copies = instances_on_device(instances, torch.device("cpu"))
    assert copies.image_size == (4, 6) and copies.names == ["a"]
    assert copies.gt_masks.tensor.all() and copies.gt_classes.tolist() == [2]
    rotated = Instances((4, 6), gt_boxes=RotatedBoxes([[2.0, 1.0, 2.0, 1.0, 30.0]]))
    assert isinstance(instances_on_device(rotated, torch.device("cpu")).gt_boxes, RotatedBoxes)
    del instances._fields["gt_masks"]
    with SimulatedGpu() as gpu:
        copies = instances_on_device(instances, GPU)
    assert not gpu.places
    assert copies.gt_boxes.device == copies.gt_classes.device == GPU
    assert copies.gt_boxes.tensor.inner.tolist() == [[0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_anchors_are_the_generators(offset: float) -> None:
    """Check levels that are not square, and several sizes and aspect ratios of anchors."""
    generator = DefaultAnchorGenerator(
        sizes=[[8, 10], [16]], aspect_ratios=[[0.5, 1.0], [2.0]], strides=[8, 16], offset=offset
    )
    maps = [torch.zeros(1, 1, 3, 5), torch.zeros(1, 1, 2, 3)]
    for found, expected in zip(grid_anchors(generator, maps), generator(maps), strict=True):
        assert torch.equal(found.tensor, expected.tensor)
