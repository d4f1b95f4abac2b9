"""Adaptation layers, which map the student's feature maps to the teacher's channels."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Annotated, Literal, NamedTuple

from torch import Tensor, nn

from ..adapters import DetectorOutputs
from ..errors import UserError
from ..weight_selection import evenly_spaced
from .matching import levels_by_stride
from .pair import Pair

logger = logging.getLogger(__name__)

KERNEL_SIZES = {"none": 0, "select": 0, "1x1": 1, "3x3": 3}

Adaptation = Annotated[
    Literal[None, "none", "select", "1x1", "3x3"],
    "Convolution that maps the student's features to the teacher's channels, one per level; 'select' instead compares the student's "
    "features with evenly spaced channels of the teacher's, those that weight selection inherits; None means 'none' if the channels are "
    "equal at all levels, otherwise 'select' if the student has fewer and inherits the neck (MODEL.KD.INHERIT), and else '1x1'.",
]
"""Type of the key ADAPTATION of a method."""


Selection = Annotated[
    Literal[None, "none", "select"],
    "Channels of the teacher's features that are imitated: 'none' all of them, 'select' as many evenly spaced ones as the student has, "
    "which weight selection inherits; None means 'select' if the student has fewer channels and inherits the neck "
    "(MODEL.KD.INHERIT), and else 'none'.",
]
"""Type of the key ADAPTATION of a method whose own layers map the student's channels to the teacher's."""


class LevelGroup(NamedTuple):
    """Strides and maps of levels with the same numbers of channels, adapted, (B, C, H, W)."""

    strides: tuple[int, ...]
    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]


class AdaptationLayers(nn.Module):
    """Maps the student's features to the teacher's channels with one convolution per level, or leaves them unchanged.

    Args:
        channels: student and teacher channels by stride.
        kernel_size: kernel size of the convolutions; 0 for the identity.
        select: reduce the teacher's features to as many evenly spaced channels as the student has.

    Attributes:
        compared_channels: channels of the maps of `pairs`, C, by stride.
    """

    def __init__(self, channels: dict[int, tuple[int, int]], kernel_size: int, *, select: bool = False):
        super().__init__()
        self.channels = channels
        self.strides = tuple(channels)
        self.compared_channels = {stride: ours if select else theirs for stride, (ours, theirs) in channels.items()}
        self.selections = nn.ModuleDict()
        if select:
            for stride, (ours, theirs) in channels.items():
                self.selections[str(stride)] = ChannelSelection(evenly_spaced(ours, theirs))
        self.layers = nn.ModuleDict()
        if kernel_size:
            for stride, (student, teacher) in channels.items():
                self.layers[str(stride)] = nn.Conv2d(student, teacher, kernel_size, padding=kernel_size // 2)

    @classmethod
    def without_convolutions(cls, adaptation: str | None, pair: Pair, node: str) -> AdaptationLayers:
        """Build the selection of the teacher's channels; see `Selection`. Arguments and errors are those of `build`."""
        return cls(pair.channels, kernel_size=0, select=chosen_adaptation(adaptation, pair, node) == "select")

    def is_residual(self, residual: bool | None, node: str) -> bool:
        """Return whether a method adds the student's maps to what its layers make of them; by default, if the channels are equal.

        Args:
            residual: value of the key RESIDUAL.
            node: the method's CONFIG_NODE, for error messages.

        Raises:
            UserError: it is True, but the compared channels differ.
        """
        different = [stride for stride, (ours, _) in self.channels.items() if ours != self.compared_channels[stride]]
        if residual and different:
            ours, theirs = self.channels[different[0]]
            raise UserError(
                f"MODEL.KD.{node}.RESIDUAL is True, but at stride {different[0]} the student has {ours} channels and the teacher {theirs}: "
                "set it to False."
            )
        return not different if residual is None else residual

    @classmethod
    def build(cls, adaptation: str | None, pair: Pair, node: str) -> AdaptationLayers:
        """Build the layers for every stride that both detectors have.

        Args:
            adaptation: value of the key; see `Adaptation`.
            pair: the detectors.
            node: the method's CONFIG_NODE, for error messages.

        Raises:
            UserError: there is no common stride, the channels differ and there is no adaptation, or there are too few to select.
        """
        channels = pair.channels
        adaptation = chosen_adaptation(adaptation, pair, node)
        kernel_size, selects = KERNEL_SIZES[adaptation], adaptation == "select"
        for stride, (ours, theirs) in channels.items():
            if adaptation == "none" and ours != theirs:
                raise UserError(
                    f"MODEL.KD.{node}.ADAPTATION is {adaptation!r}, but at stride {stride} the student has {ours} channels "
                    f"and the teacher {theirs}: set it to '1x1'."
                )
        return cls(channels, kernel_size, select=selects)

    def pairs(self, student: DetectorOutputs, teacher: DetectorOutputs) -> list[tuple[Tensor, Tensor]]:
        """Return the student's and the teacher's feature map of each level, adapted, (B, C, H, W) each."""
        student_maps = self(levels_by_stride(student.features, self.strides, "student"))
        teacher_maps = levels_by_stride(teacher.features, self.strides, "teacher")
        if self.selections:
            teacher_maps = [self.selections[str(s)](x) for s, x in zip(self.strides, teacher_maps, strict=True)]
        return list(zip(student_maps, teacher_maps, strict=True))

    def groups(self, student: DetectorOutputs, teacher: DetectorOutputs) -> list[LevelGroup]:
        """Return `pairs`, levels with the same numbers of channels together."""
        by_channels = defaultdict(list)
        for stride, pair in zip(self.strides, self.pairs(student, teacher), strict=True):
            by_channels[self.channels[stride]].append((stride, *pair))
        return [LevelGroup(*zip(*levels, strict=True)) for levels in by_channels.values()]

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Map the student's features (B, C_student, H, W) per level, in order of `strides`, to (B, C, H, W)."""
        if not self.layers:
            return features
        return [self.layers[str(s)](x) for s, x in zip(self.strides, features, strict=True)]


def chosen_adaptation(adaptation: str | None, pair: Pair, node: str) -> str:
    """Return the value of a key ADAPTATION, or what None means for these detectors; see `Adaptation`.

    Args:
        node: the method's CONFIG_NODE, for messages.

    Raises:
        UserError: it is 'select', but there are too few channels to select.
    """
    if adaptation == "select":
        for stride, (ours, theirs) in pair.channels.items():
            if ours > theirs:
                raise UserError(
                    f"MODEL.KD.{node}.ADAPTATION is 'select', but at stride {stride} the student has {ours} channels and the teacher only "
                    f"{theirs}."
                )
    if adaptation is not None:
        return adaptation
    if all(ours == theirs for ours, theirs in pair.channels.values()):
        return "none"
    if not pair.inherits_neck or any(ours > theirs for ours, theirs in pair.channels.values()):
        return "1x1"
    logger.info(
        f"MODEL.KD.{node}: features are compared with evenly spaced channels of the teacher's (ADAPTATION 'select')."
    )
    return "select"


def selects_by_default(method: nn.Module) -> bool:
    """Return whether a method compares selected channels because its ADAPTATION is None."""
    is_default = getattr(method.config, "adaptation", "none") is None
    return is_default and any(isinstance(module, ChannelSelection) for module in method.modules())


class ChannelSelection(nn.Module):
    """Selects channels of maps (B, N, H, W) by their indices (n,)."""

    def __init__(self, channels: Tensor):
        super().__init__()
        self.register_buffer("channels", channels, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        return maps.index_select(1, self.channels)
