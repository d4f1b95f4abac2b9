"""Shared fixtures: tiny detectors, toy detectors with outputs that are easy to compute by hand, and their inputs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kd_d2 import add_kd_config

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

torch.set_num_threads(1)

NUM_CLASSES = 3

BASE: dict[str, Any] = {
    "MODEL": {
        "DEVICE": "cpu",
        "BACKBONE": {"NAME": "build_slim_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            "NORM": "BN",
            "STEM_OUT_CHANNELS": 4,
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        },
        "SLIM_RESNET": {"WIDTHS": (4, 6, 8, 10)},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 8},
    }
}
RETINANET: dict[str, Any] = {
    "MODEL": {
        "META_ARCHITECTURE": "RetinaNet",
        "BACKBONE": {"NAME": "build_retinanet_slim_resnet_fpn_backbone"},
        "RESNETS": {"OUT_FEATURES": ["res3", "res4", "res5"]},
        "FPN": {"IN_FEATURES": ["res3", "res4", "res5"]},
        "ANCHOR_GENERATOR": {"SIZES": [[16], [32], [64], [128], [256]]},
        "RETINANET": {"NUM_CLASSES": NUM_CLASSES, "NUM_CONVS": 1},
    }
}
REVERSED = {
    "MODEL": {
        "RETINANET": {"IN_FEATURES": ["p7", "p6", "p5", "p4", "p3"]},
        "ANCHOR_GENERATOR": {"SIZES": [[256], [128], [64], [32], [16]]},
    }
}


def _dense(name: str) -> dict[str, Any]:
    """Return the config of a dense detector of this package on the same backbone, with P6 and P7 computed from P5."""
    tree = {"META_ARCHITECTURE": name, name.upper(): {"NUM_CLASSES": NUM_CLASSES, "NUM_CONVS": 1, "NORM": ""}}
    levels = {"OUT_FEATURES": ["res3", "res4", "res5"]}, {"IN_FEATURES": ["res3", "res4", "res5"]}
    backbone = {"NAME": "build_dense_slim_resnet_fpn_backbone"}
    return {"MODEL": {**tree, "BACKBONE": backbone, "RESNETS": levels[0], "FPN": levels[1]}}


FASTER: dict[str, Any] = {
    "MODEL": {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32], [64], [128]]},
        "RPN": {
            "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "CONV_DIMS": [8],
            "PRE_NMS_TOPK_TRAIN": 50,
            "PRE_NMS_TOPK_TEST": 50,
            "POST_NMS_TOPK_TRAIN": 20,
            "POST_NMS_TOPK_TEST": 20,
            "BATCH_SIZE_PER_IMAGE": 32,
        },
        "ROI_HEADS": {
            "NAME": "StandardROIHeads",
            "IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "NUM_CLASSES": NUM_CLASSES,
            "BATCH_SIZE_PER_IMAGE": 16,
        },
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 16, "POOLER_RESOLUTION": 3},
    }
}
MASK: dict[str, Any] = {
    "MODEL": {
        "MASK_ON": True,
        "ROI_MASK_HEAD": {
            "NAME": "MaskRCNNConvUpsampleHead",
            "NUM_CONV": 1,
            "CONV_DIM": 8,
            "POOLER_RESOLUTION": 4,
        },
    }
}
CASCADE: dict[str, Any] = {
    "MODEL": {"ROI_HEADS": {"NAME": "CascadeROIHeads"}, "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": True}}
}
PANOPTIC: dict[str, Any] = {
    "MODEL": {
        "META_ARCHITECTURE": "PanopticFPN",
        "SEM_SEG_HEAD": {"NUM_CLASSES": 4, "CONVS_DIM": 8, "NORM": ""},
    }
}
TREES: dict[str, list[dict[str, Any]]] = {
    "retinanet": [RETINANET],
    "reversed retinanet": [RETINANET, REVERSED],
    "fcos": [_dense("FCOS")],
    "atss": [_dense("ATSS")],
    "gfl": [_dense("GFL")],
    "fsaf": [_dense("FSAF")],
    "reppoints": [_dense("RepPoints")],
    "faster": [FASTER],
    "mask": [FASTER, MASK],
    "cascade": [FASTER, CASCADE],
    "panoptic": [FASTER, MASK, PANOPTIC],
}


def _merged(*trees: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            result[key] = _merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def _tree(kind: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    return _merged(BASE, *TREES[kind], overrides or {})


def _cfg(kind: str, overrides: dict[str, Any] | None = None) -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(_tree(kind, overrides)))
    return cfg


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use temporary cache folders instead of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Only check the descriptor where files are synchronized with a disk, which no test can lose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
        yield


@pytest.fixture(scope="session", autouse=True)
def fast_yaml() -> Iterator[None]:
    """Write YAML, such as the configs of every training, with PyYAML's writer in C, which writes the same text."""
    writer = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "safe_dump", functools.partial(yaml.dump, Dumper=writer))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Undo `torch.set_num_threads` of a program that a test ran: the next tests would take more processor time."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def event_storage() -> Iterator[EventStorage]:
    """Yield an open event storage at iteration 0; set `.iter` to change the iteration."""
    with EventStorage(0) as storage:
        yield storage


@pytest.fixture
def tiny_tree() -> Callable[..., dict[str, Any]]:
    """Return a function (kind, overrides) -> config of a tiny detector as nested dictionaries, for writing as YAML."""
    return _tree


@pytest.fixture
def tiny_cfg() -> Callable[..., CfgNode]:
    """Return a function (kind, overrides) -> config of a tiny detector; kinds are the keys of TREES."""
    return _cfg


@pytest.fixture
def tiny_detector() -> Callable[..., nn.Module]:
    """Return a function (kind, overrides, seed) -> 3-class detector of a few thousand parameters, in training mode."""

    def build(kind: str, overrides: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return build_model(_cfg(kind, overrides)).train()

    return build


@pytest.fixture
def make_inputs() -> Callable[..., list[dict]]:
    """Return a function that builds a training batch of noise images with random boxes, `counts` of them per image."""

    def build(
        sizes: Sequence[tuple[int, int]] = ((64, 80), (56, 96)),
        counts: Sequence[int] = (3, 2),
        seed: int = 0,
        masks: bool = False,
        sem_seg: bool = False,
    ) -> list[dict]:
        generator = torch.Generator().manual_seed(seed)
        inputs = []
        for (height, width), count in zip(sizes, counts, strict=True):
            image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
            corners = torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.5, height * 0.5])
            extent = 8 + torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.4, height * 0.4])
            instances = Instances((height, width))
            instances.gt_boxes = Boxes(torch.cat([corners, corners + extent], 1))
            instances.gt_classes = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
            if masks:
                instances.gt_masks = BitMasks(torch.rand(count, height, width, generator=generator) > 0.5)
            item = {"image": image, "instances": instances, "height": height, "width": width}
            if sem_seg:
                item["sem_seg"] = torch.randint(0, 4, (height, width), generator=generator)
            inputs.append(item)
        return inputs

    return build


class ToyBackbone(Backbone):
    """Returns every stride-th pixel of the input times `scale`, and records its inputs in `seen`."""

    def __init__(self, scale: float, strides: Sequence[int], divisibility: int, constraints: dict[str, int]):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.strides = strides
        self.divisibility = divisibility
        self.constraints = constraints
        self.seen: list[Tensor] = []

    @property
    def size_divisibility(self) -> int:
        return self.divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self.constraints

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"stride{s}": ShapeSpec(channels=3, stride=s) for s in self.strides}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.seen.append(images.detach().clone())
        return {f"stride{s}": self.scale * images[..., ::s, ::s] for s in self.strides}


class ToyHead(nn.Module):
    """Adds 1 to the features."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [x + 1 for x in features]


class ToyDetector(DenseDetector):
    """Detector whose `loss_toy` and score of its one box are the first level's mean of scale * normalized pixel + 1."""

    def __init__(
        self,
        scale: float = 1.0,
        strides: Sequence[int] = (4, 8),
        divisibility: int = 0,
        constraints: dict[str, int] | None = None,
        pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
        num_classes: int = NUM_CLASSES,
    ):
        backbone = ToyBackbone(scale, strides, divisibility, constraints or {})
        super().__init__(backbone, ToyHead(), pixel_mean=pixel_mean, pixel_std=(1.0, 1.0, 1.0))
        self.num_classes = num_classes

    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, Tensor]:
        return {"loss_toy": predictions[0].mean()}

    def forward_inference(self, images, features, predictions) -> list[Instances]:
        results = []
        for size, prediction in zip(images.image_sizes, predictions[0], strict=True):
            result = Instances(size)
            result.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
            result.scores = prediction.mean().reshape(1)
            results.append(result)
        return results


@pytest.fixture
def toy_detector() -> type[ToyDetector]:
    return ToyDetector


@pytest.fixture
def constant_inputs() -> Callable[..., list[dict]]:
    """Return a function (per-channel values, size) -> batch of one image with constant channels and no objects."""

    def build(values: Sequence[float] = (3.0, 3.0, 3.0), size: tuple[int, int] = (16, 16)) -> list[dict]:
        image = torch.tensor(values).view(3, 1, 1).expand(3, *size).clone()
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.zeros(0, 4))
        instances.gt_classes = torch.zeros(0, dtype=torch.int64)
        return [{"image": image, "instances": instances, "height": size[0], "width": size[1]}]

    return build
