"""Weight selection: which channels of which layers are selected, that the selected network is the one inside the wide one,
and features compared with the selected channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd_d2.config import load_config
from kd_d2.distillers import DISTILLER_REGISTRY
from kd_d2.inheritance import COMPONENTS, inherit
from kd_d2.weight_selection import select_weights

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import detector_of, make_project
from torch import nn

pytestmark = pytest.mark.unit


def state(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_evenly_spaced_channels_by_hand() -> None:
    """Check two layers of 4 and 6 hidden channels, of which 0, 1, 3 and 4 are selected."""
    narrow = state(first=(4, 2), bias=(4,), second=(3, 4))
    wide = state(first=(6, 2), bias=(6,), second=(3, 6))
    selected = select_weights(narrow, wide)
    kept = [0, 1, 3, 4]
    assert torch.equal(selected["first"], wide["first"][kept])
    assert torch.equal(selected["bias"], wide["bias"][kept])
    assert torch.equal(selected["second"], wide["second"][:, kept])


def test_flattened_maps_keep_whole_channels() -> None:
    """Check a linear layer that reads 2 or 4 maps of 3 cells: cells 0 to 2 and 6 to 8, those of maps 0 and 2."""
    narrow, wide = state(conv=(2, 1, 1, 1), linear=(5, 6)), state(conv=(4, 1, 1, 1), linear=(5, 12))
    assert torch.equal(select_weights(narrow, wide)["linear"], wide["linear"][:, [0, 1, 2, 6, 7, 8]])


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ({"hidden": (2, 2), "score": (3, 2)}, {"hidden": (4, 4), "score": (5, 4)}),  # classes
        ({"hidden": (2, 2), "score": (3, 2, 1, 1)}, {"hidden": (4, 4), "score": (3, 4, 3, 3)}),  # kernel size
        ({"hidden": (1, 1), "score": (2, 1, 1, 1)}, {"hidden": (3, 3), "score": (2, 3, 3, 3)}),  # the same sizes
        ({"hidden": (2, 2), "score": (3, 2)}, {"hidden": (4, 4), "score": (3, 4, 1, 1)}),  # kind of layer
        ({"hidden": (2, 2), "score": (3, 3)}, {"hidden": (4, 4), "score": (3, 5)}),  # inputs from elsewhere
        ({"hidden": (4, 4), "score": (3, 4)}, {"hidden": (2, 2), "score": (3, 2)}),  # wider
        ({"hidden": (2, 2), "score": (6, 2)}, {"hidden": (4, 4), "score": (12, 4)}),  # queries, keys and values
        (
            {"hidden": (2, 2), "score": (3, 4, 1, 1)},
            {"hidden": (4, 4), "score": (3, 8, 1, 1)},
        ),  # maps are not flattened
    ],
)
def test_what_is_not_selected(narrow: dict[str, tuple[int, ...]], wide: dict[str, tuple[int, ...]]) -> None:
    offered = state(**wide)
    assert select_weights(state(**narrow), offered)["score"] is offered["score"]


NARROW: dict[str, Any] = {"MODEL": {"REPPOINTS": {"SCORE_THRESH_TEST": 0.0}}}
WIDE: dict[str, Any] = {
    "MODEL": {
        **NARROW["MODEL"],
        "SLIM_RESNET": {"WIDTHS": (6, 10, 12, 14)},
        "RESNETS": {"STEM_OUT_CHANNELS": 6},
        "FPN": {"OUT_CHANNELS": 12},
        "RPN": {"CONV_DIMS": [12]},
        "ROI_BOX_HEAD": {"FC_DIM": 20},
        "ROI_MASK_HEAD": {"CONV_DIM": 12},
        "SEM_SEG_HEAD": {"CONVS_DIM": 12},
    }
}
CELLS = {"roi_heads.box_head.fc1.weight": 9}
"""Cells of the flattened maps that a layer reads."""


def embed(narrow: nn.Module, wide: nn.Module) -> None:
    """Give a wide model the weights of a narrow one at evenly spaced channels, and zeros elsewhere."""
    ours = narrow.state_dict()
    for name, tensor in wide.state_dict().items():
        if tensor.shape == ours[name].shape:
            tensor.copy_(ours[name])
            continue
        positions = []
        for dimension, (n, N) in enumerate(zip(ours[name].shape, tensor.shape, strict=True)):
            cells = CELLS.get(name, 1) if dimension == 1 else 1
            kept = [channel * (N // cells) // (n // cells) for channel in range(n // cells)]
            positions.append(torch.tensor([channel * cells + cell for channel in kept for cell in range(cells)]))
        tensor.fill_(1 if name.endswith("running_var") else 0)
        tensor[torch.meshgrid(*positions, indexing="ij")] = ours[name]


@pytest.mark.parametrize(
    "kind", ["retinanet", "fcos", "atss", "gfl", "fsaf", "reppoints", "faster", "mask", "cascade", "panoptic"]
)
@torch.no_grad()
def test_the_selected_network_is_the_one_inside_the_wide_one(
    tiny_detector: Callable[..., nn.Module], make_inputs: Callable[..., list[dict]], kind: str
) -> None:
    """Check that a student that is hidden in the teacher, whose other channels are zero, has the teacher's detections."""
    hidden, teacher, student = tiny_detector(kind, NARROW, 1), tiny_detector(kind, WIDE), tiny_detector(kind, NARROW)
    for tensor in hidden.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.add_(torch.rand_like(tensor) / 10)  # norms and biases that differ between channels
    embed(hidden, teacher)
    fit = inherit(student, teacher, COMPONENTS)
    assert not fit.misfits and not fit.missing
    inputs = make_inputs()
    ours, theirs = (model.eval()(inputs) for model in (student, teacher))
    for our, their in zip(ours, theirs, strict=True):
        assert len(our["instances"]) > 0
        for field, value in our["instances"].get_fields().items():
            a, b = (getattr(x, "tensor", x) for x in (value, their["instances"].get(field)))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class WithNeck(nn.Module):
    """A bottom-up network of one block with the layers named, whose outputs a lateral layer reads, and a layer after it."""

    def __init__(self, layers: tuple[str, ...], channels: int, neck: int):
        super().__init__()
        block = nn.ModuleDict({name: nn.Conv2d(channels, channels, 1) for name in layers})
        self.backbone = nn.Module()
        self.backbone.bottom_up = nn.ModuleDict({"res2": nn.ModuleList([block])})
        self.backbone.lateral, self.backbone.output = nn.Conv2d(channels, neck, 1), nn.Conv2d(neck, neck, 3)


@pytest.mark.parametrize("layers", [("conv1", "conv2"), ("conv1", "conv2", "conv3")])
def test_layers_that_read_other_blocks_are_not_selected(layers: tuple[str, ...]) -> None:
    """Check a neck whose bottom-up network cannot be inherited: only what does not read it is."""
    student, teacher = WithNeck(("conv1", "conv2"), 4, 2), WithNeck(layers, 8, 4)
    student.backbone.bottom_up.stem = nn.Conv2d(3, 4, 1)
    teacher.backbone.bottom_up.stem = nn.Conv2d(3, 8, 1)
    fit = inherit(student, teacher, ("bottom_up", "neck"))
    same_blocks = layers == ("conv1", "conv2")
    assert ("backbone.lateral.weight" in fit.filled) == same_blocks
    assert ("backbone.bottom_up.res2.0.conv1.weight" in fit.filled) == same_blocks
    assert {"backbone.output.weight", "backbone.bottom_up.stem.weight"} <= {*fit.filled}


@pytest.mark.parametrize(("norm", "is_warned"), [("FrozenBN", True), ("BN", False)])
def test_frozen_statistics_of_wider_layers(
    tiny_detector: Callable[..., nn.Module], caplog: pytest.LogCaptureFixture, norm: str, is_warned: bool
) -> None:
    narrow = {"MODEL": {"RESNETS": {"NORM": norm}}}
    inherit(tiny_detector("retinanet", narrow), tiny_detector("retinanet", WIDE), COMPONENTS)
    warned = "layers are FrozenBN, with the statistics of the teacher's wider layers; the first one is backbone.bottom_up.stem."
    assert (warned in caplog.text) is is_warned


ADAPTED = sorted(
    {name for name, method in DISTILLER_REGISTRY if hasattr(method.Config, "adaptation")} - {"ICD", "MasKD", "FreeKD"}
)
"""Methods with the key ADAPTATION, except those whose attention or masks depend on all channels."""


@pytest.mark.parametrize("method", ADAPTED)
def test_features_are_compared_with_the_selected_channels(
    tmp_path: Path, make_inputs: Callable[..., list[dict]], event_storage: EventStorage, method: str
) -> None:
    """Check that the losses of 16 student channels depend on channels 0, 1, 3, 4, 6, ... of the teacher's 24, and on no others."""
    torch.manual_seed(0)
    project = make_project(tmp_path, detector_of(method), MODEL__KD__DISTILLERS=(method,))
    teacher = build_model(load_config(str(project.change_teacher(MODEL__FPN__OUT_CHANNELS=24))))
    torch.save({"model": teacher.state_dict()}, project.teacher_weights)
    node = DISTILLER_REGISTRY.get(method).CONFIG_NODE
    cfg = load_config(str(project.student), [f"MODEL.KD.{node}.ADAPTATION", "select"])
    model = build_model(cfg).train()
    distiller, calls = model.distillers[method], []
    distiller.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    model(make_inputs())
    ours, theirs, targets = calls[0]

    def losses(*changed: int) -> dict[str, float]:
        """Compute the losses after these channels of the teacher have changed."""
        torch.manual_seed(0)
        features = {stride: x.clone() for stride, x in theirs.features.items()}
        for maps in features.values():
            maps[:, changed] = torch.randn_like(maps[:, changed])
        torch.manual_seed(0)  # for random masks
        found = distiller(ours, replace(theirs, features=features), targets)
        return {name: loss.item() for name, loss in found.items()}

    selected = [channel for channel in range(24) if channel % 3 != 2]
    others = [channel for channel in range(24) if channel % 3 == 2]
    assert losses() == losses(*others)
    assert losses() != losses(*selected)


@pytest.mark.parametrize(
    ("keys", "channels", "is_selected"),
    [
        ({}, 24, True),
        ({"MODULES": "('bottom_up','head')"}, 24, False),
        ({"WEIGHT_SELECTION": "False"}, 24, False),
        ({"ENABLED": "False"}, 24, False),
        ({}, 8, False),
    ],
)
def test_the_adaptation_of_a_student_that_inherits_its_neck(
    tmp_path: Path, keys: dict[str, str], channels: int, is_selected: bool
) -> None:
    """Check the default of a method for a student of 16 channels."""
    project = make_project(tmp_path, MODEL__KD__DISTILLERS=("PKD",), MODEL__KD__INHERIT__ENABLED=True)
    teacher = build_model(load_config(str(project.change_teacher(MODEL__FPN__OUT_CHANNELS=channels))))
    torch.save({"model": teacher.state_dict()}, project.teacher_weights)
    opts = [x for key, value in keys.items() for x in (f"MODEL.KD.INHERIT.{key}", value)]
    adaptation = build_model(load_config(str(project.student), opts)).distillers["PKD"].adaptation
    assert bool(adaptation.selections) is is_selected
    assert bool(adaptation.layers) is not is_selected
