"""Base class of the detector adapters, and selection of the adapter for a model."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import torch
from detectron2.layers import ShapeSpec, move_device_like
from detectron2.modeling.meta_arch import ProposalNetwork, SemanticSegmentor
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..errors import UserError
from .outputs import DetectorOutputs, DetectorSpec

DETECTOR_ADAPTER_REGISTRY = Registry("DETECTOR_ADAPTER")
DETECTOR_ADAPTER_REGISTRY.__doc__ = """
Registry of adapters. Each is called with the model and supports models of its `model_class`; `build_adapter` selects
the one whose `model_class` comes first in the model's method resolution order.
"""

WITHOUT_OBJECT_CLASSES = ProposalNetwork | SemanticSegmentor
"""Detectron2's models that do not classify objects."""


class DetectorAdapter:
    """Runs one family of detectors through its public components, without modifying the detector.

    Class attributes:
        model_class: the supported detector class.
        composes: methods of that class that the adapter replaces. A subclass of `model_class` that overrides one of
            them is not supported by this adapter, because the override would be ignored.
        family: "one-stage", "two-stage" or "other".
        provides: parts that can be requested from `run`.
    """

    model_class: ClassVar[type[nn.Module]]
    composes: ClassVar[tuple[str, ...]] = ()
    family: ClassVar[str]
    provides: ClassVar[frozenset[str]]
    num_bins: int | None = None
    tower_channels: tuple[int, ...] | None = None

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Return whether this adapter can run the model, whose class is a subclass of `model_class`."""
        return all(getattr(type(model), method) is getattr(cls.model_class, method) for method in cls.composes)

    def __init__(self, model: nn.Module):
        self.model = model
        backbone = model.backbone
        self.size_divisibility = max(
            backbone.padding_constraints.get("size_divisibility", backbone.size_divisibility), 1
        )
        self.square_size = backbone.padding_constraints.get("square_size", 0)
        self._stride_of = {name: shape.stride for name, shape in self.neck_shapes().items()}

    @property
    def spec(self) -> DetectorSpec:
        """The detector's `DetectorSpec`. Raises a UserError if it provides distributions without `num_bins`."""
        if "distributions" in self.provides and self.num_bins is None:
            raise UserError(
                f"{type(self).__name__} provides distributions of box sides, but does not set `num_bins`, their number of bins."
            )
        return DetectorSpec(
            name=type(self.model).__name__,
            family=self.family,
            shapes={shape.stride: shape for shape in self.neck_shapes().values()},
            num_classes=self.num_classes,
            cell_anchors=self.cell_anchors(),
            provides=self.provides,
            score_threshold=self.score_threshold,
            num_bins=self.num_bins,
            tower_channels=self.tower_channels,
            has_adapter=type(self) is not BackboneAdapter,
        )

    @property
    def num_classes(self) -> int | None:
        return getattr(getattr(self.model, "roi_heads", self.model), "num_classes", None)

    @property
    def score_threshold(self) -> float | None:
        return getattr(self.model, "test_score_thresh", None)

    @property
    def parts_of_instances(self) -> frozenset[str]:
        """What RoI heads are trained on and detect in addition to boxes: "masks", "keypoints"."""
        heads = getattr(self.model, "roi_heads", None)
        switches = {"masks": "mask_on", "keypoints": "keypoint_on"}
        return frozenset(part for part, switch in switches.items() if getattr(heads, switch, False))

    def cell_anchors(self) -> dict[int, Tensor] | None:
        return None

    def neck_shapes(self) -> dict[str, ShapeSpec]:
        """Return the neck outputs by name, ordered by stride. Of two with the same stride, keep the deeper one."""
        shapes = sorted(self.model.backbone.output_shape().items(), key=lambda item: item[1].stride)
        deepest = {shape.stride: (name, shape) for name, shape in shapes}
        return dict(deepest.values())

    def reorder_classes(self, order: list[int]) -> None:
        """Reorder the model's weights in place so that class index i takes the meaning of index order[i].

        Raises:
            UserError: it is not known which weights of this model belong to which class.
        """
        raise UserError(
            f"The class order of {type(self.model).__name__} differs from that of the data, and it is not known which of its "
            "weights belong to which class; number the category ids of the data in the model's order."
        )

    def pad_to(self, size_divisibility: int, square_size: int = 0) -> None:
        """Set the padding: to multiples of `size_divisibility` pixels, or to squares of side `square_size` if not 0."""
        self.size_divisibility = size_divisibility
        self.square_size = square_size

    def run(
        self, batched_inputs: list[dict], want: frozenset[str], targets: list[Instances] | None = None
    ) -> DetectorOutputs:
        """Run one forward pass.

        Args:
            batched_inputs: Detectron2's input dictionaries, with images in the detector's channel order.
            want: parts to return in addition to the images and the losses. Other parts are computed only if the
                losses need them.
            targets: ground truth of each image on the detector's device; None to skip the losses.
        """
        raise NotImplementedError

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalize the images as the detector does, and pad them (see `pad_to`)."""
        self.check_sizes(batched_inputs)
        model = self.model
        images = [move_device_like(x["image"], model.pixel_mean) for x in batched_inputs]
        return ImageList.from_tensors(
            [(image - model.pixel_mean) / model.pixel_std for image in images],
            padding_constraints={"size_divisibility": self.size_divisibility, "square_size": self.square_size},
        )

    def check_sizes(self, batched_inputs: list[dict]) -> None:
        """Raise a UserError if an image is larger than the squares to which images are padded."""
        if not self.square_size:
            return
        height, width = (max(sides) for sides in zip(*(x["image"].shape[-2:] for x in batched_inputs), strict=True))
        if max(height, width) > self.square_size:
            raise UserError(
                f"Images are padded to squares of {self.square_size} pixels (square_pad of a backbone), but one has a side of "
                f"{max(height, width)}: set INPUT.MAX_SIZE_TRAIN and INPUT.MAX_SIZE_TEST to at most {self.square_size}."
            )

    def in_input_pixels(self, results: list[Instances], images: ImageList) -> list[Instances]:
        """Convert a head's results to final detections: clip boxes to the image, drop empty ones, paste the masks."""
        return [detector_postprocess(r, *size) for r, size in zip(results, images.image_sizes, strict=True)]

    def by_stride(self, features: dict[str, Tensor]) -> dict[int, Tensor]:
        """Return the outputs of the backbone by stride."""
        return {stride: features[name] for name, stride in self._stride_of.items()}


@DETECTOR_ADAPTER_REGISTRY.register()
class BackboneAdapter(DetectorAdapter):
    """Fallback for any model with a `backbone`: runs the model unchanged and captures the backbone's outputs."""

    model_class = nn.Module
    family = "other"

    @property
    def provides(self) -> frozenset[str]:
        if isinstance(self.model, WITHOUT_OBJECT_CLASSES):
            return frozenset({"features", "targets"})
        return frozenset({"features", "detections", "targets"}) | self.parts_of_instances

    def __init__(self, model: nn.Module):
        if not callable(getattr(getattr(model, "backbone", None), "output_shape", None)):
            raise UserError(f"{type(model).__name__} has no Detectron2 backbone to take features from.")
        super().__init__(model)

    def pad_to(self, size_divisibility: int, square_size: int = 0) -> None:
        if (size_divisibility, square_size) != (self.size_divisibility, self.square_size):
            needed = f"squares of {square_size}" if square_size else f"multiples of {size_divisibility}"
            raise UserError(
                f"{type(self.model).__name__} pads its images to multiples of {self.size_divisibility} pixels, but its "
                f"partner needs {needed}: if the detector does so, state it as `size_divisibility` or `padding_constraints` of its "
                "backbone; only detectors with their own adapter can change their padding."
            )

    def run(
        self, batched_inputs: list[dict], want: frozenset[str], targets: list[Instances] | None = None
    ) -> DetectorOutputs:
        seen: list[tuple[Tensor, dict[str, Tensor]]] = []
        runs_on = targets is not None or "detections" in want

        def capture(backbone: nn.Module, args: tuple, named_args: dict, features: dict[str, Tensor]) -> None:
            seen.append((next(iter((*args, *named_args.values()))), features))
            if not runs_on:
                raise _FeaturesRead

        results = None
        with (
            self.model.backbone.register_forward_hook(capture, with_kwargs=True),
            contextlib.suppress(_FeaturesRead),
        ):
            results = self.model(batched_inputs if targets is not None else list(map(unscaled, batched_inputs)))
        if len(seen) != 1:
            raise RuntimeError(
                f"{type(self.model).__name__} called its backbone {len(seen)} times in one forward pass; exactly one was expected"
            )
        tensor, features = seen[0]
        sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        outputs = DetectorOutputs(ImageList(tensor, sizes), self.by_stride(features))
        if targets is not None:
            outputs.losses = {"loss": results} if isinstance(results, Tensor) else results
        elif runs_on:
            outputs.detections = [result["instances"] for result in results]
        return outputs


def unscaled(entry: dict) -> dict:
    """Drop the size that detections would be scaled to, so that they stay in input pixels."""
    return {key: value for key, value in entry.items() if key not in ("height", "width")}


class _FeaturesRead(Exception):
    """Ends a forward pass after the backbone if nothing else is needed."""


@torch.no_grad()
def reorder_outputs(layer: nn.Module, order: list[int], groups: int = 1, width: int = 1) -> None:
    """Reorder the outputs of a convolution or linear layer, in place.

    Args:
        layer: layer with `groups` groups of outputs, `width` outputs per class; further outputs are left unchanged.
        order: output i becomes what was output order[i].
    """
    for tensor in (layer.weight, layer.bias):
        if tensor is not None:
            classes = tensor[: groups * len(order) * width].unflatten(0, (groups, len(order), width))
            classes.copy_(classes[:, order].clone())


def build_adapter(model: nn.Module) -> DetectorAdapter:
    """Build the adapter for `model`, selected by its class.

    Raises:
        UserError: two adapters are registered for the same class.
    """
    adapters: dict[type, type[DetectorAdapter]] = {}
    for _, adapter in DETECTOR_ADAPTER_REGISTRY:
        known = adapters.setdefault(adapter.model_class, adapter)
        if known is not adapter:
            raise UserError(
                f"The adapters {known.__name__} and {adapter.__name__} are both registered for "
                f"{adapter.model_class.__name__}; set model_class of the new one to a subclass, or register only one of them."
            )
    for cls in type(model).__mro__:
        adapter = adapters.get(cls)
        if adapter and adapter.supports(model):
            return adapter(model)
    raise TypeError(f"{type(model)} is not a torch module")
