"""Networks of timm (PyTorch Image Models) as Detectron2 bottom-up networks."""

from __future__ import annotations

import copy
import inspect
import logging
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..errors import UserError
from ..keys import AtLeast, Below, Keys
from .necks import register_with_fpns

logger = logging.getLogger(__name__)

# Strides by Detectron2's stage names.
STRIDES = {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}
PROBE_SIZE = (96, 160)
"""Height and width of an image, odd multiples of 32, to which Detectron2 pads."""
ANY_SIZE = {"strict_img_size": False, "always_partition": True}
"""Arguments of those of timm's networks that need them for images of any size."""
BATCH_NORM = nn.BatchNorm2d | nn.SyncBatchNorm


@dataclass(frozen=True)
class TimmKeys(Keys):
    """Config keys of timm's networks; MODEL.BACKBONE.FREEZE_AT and MODEL.RESNETS.OUT_FEATURES apply too."""

    name: Annotated[str, "Name of the network in timm, such as 'convnext_tiny'."] = "mobilenetv3_large_100"
    norm: Annotated[
        Literal["BN", "SyncBN", "FrozenBN"],
        "Batch normalization layers, if the network has them: 'BN', 'SyncBN' or 'FrozenBN'.",
    ] = "BN"
    drop_path_rate: Annotated[float, AtLeast(0), Below(1), "Rate of stochastic depth, for networks that have it."] = 0.0


class TimmNetwork(Backbone):
    """A network of timm with its parameter names, without the layers after the last stage that is returned.

    Args:
        name: name of the network in timm.
        out_features: stages to return, from res2, res3, res4 and res5: the last feature maps of strides 4, 8, 16 and 32.
        norm: batch normalization layers, "BN", "SyncBN" or "FrozenBN".
        freeze_at: freeze nothing (0), all that the feature map of stride 2 is computed with (1), also res2 (2), and so on.
        drop_path_rate: rate of stochastic depth.

    Attributes:
        name: name of the network in timm.
        model: timm's network.

    Raises:
        UserError: timm is not installed or has no such network, or the network cannot be used, such as those without
            feature maps of these strides or for images of one size alone.
    """

    def __init__(
        self,
        name: str,
        out_features: list[str],
        norm: str = "BN",
        freeze_at: int = 0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.name = name
        self.model = _create(name, drop_path_rate)
        indices = _stages(self.model, name)
        missing = [stage for stage in out_features if stage not in indices or stage == "stem"]
        if missing:
            raise UserError(
                f"MODEL.RESNETS.OUT_FEATURES names {', '.join(missing)}; {name} of timm has "
                f"{', '.join(stage for stage in indices if stage != 'stem') or 'no feature maps of strides 4 to 32'}."
            )
        self._indices = {stage: indices[stage] for stage in STRIDES if stage in out_features}
        shapes, fixed = self._probe(self._last_frozen(indices, freeze_at))
        self._out_features = out_features
        self._out_feature_strides = {stage: STRIDES[stage] for stage in out_features}
        self._out_feature_channels = {stage: shapes[stage][0] for stage in out_features}
        self._freeze(fixed)
        self._set_norm(norm)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to the outputs of the stages in `out_features`, by name."""
        return dict(zip(self._indices, _feature_maps(self.model, x, [*self._indices.values()]), strict=True))

    def parameters_without_weight_decay(self) -> set[nn.Parameter]:
        """Return the parameters that timm trains without weight decay.

        These are vectors, such as biases and the scales of layers, and those that the network names, such as Swin's
        tables of relative positions.
        """
        from timm.optim import param_groups_weight_decay

        named = getattr(self.model, "no_weight_decay", set)()
        groups = param_groups_weight_decay(self.model, no_weight_decay_list=named)
        return {p for group in groups if not group["weight_decay"] for p in group["params"]}

    def _last_frozen(self, indices: dict[str, int], freeze_at: int) -> int | None:
        """Return the index of the last feature map to freeze, at most that of the last stage; None for none."""
        if freeze_at <= 0:
            return None
        last = [*STRIDES][min(freeze_at, len(STRIDES)) - 1]
        if last not in indices:
            allowed = [str(number) for number, stage in enumerate(STRIDES, 1) if stage in indices]
            raise UserError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but {self.name} of timm has no feature map of stride "
                f"{STRIDES[last]}; it can be {', '.join(['0', *allowed[:-1]])} or {allowed[-1]}."
            )
        return min(indices[last], max(self._indices.values()))

    @torch.enable_grad()
    def _probe(self, frozen: int | None) -> tuple[dict[str, torch.Size], set[str]]:
        """Remove the layers after the last stage, and run a copy without memory.

        Returns:
            The stages' shapes (C, H, W), and the names of the parameters not to train: those that feature map `frozen`
            depends on, and those that no stage depends on, such as HRNet's branches to a stage that is not returned.
        """
        indices = [*self._indices.values()]
        image = torch.zeros(1, 3, *PROBE_SIZE, device="meta")
        try:
            self.model.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
            model = copy.deepcopy(self.model).to("meta").eval()
            maps = _feature_maps(model, image, indices)
            last = None if frozen is None else _feature_maps(model, image, [frozen])[0]
        except Exception as error:  # of any kind, in timm's networks
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise UserError(
                f"{self.name} of timm cannot compute feature maps for images of any size: {reason}."
            ) from error
        shapes = {stage: one.shape[1:] for stage, one in zip(self._indices, maps, strict=True)}
        for stage, shape in shapes.items():
            if shape[1:] != tuple(side // STRIDES[stage] for side in PROBE_SIZE):
                raise UserError(
                    f"{self.name} of timm cannot be used: its feature map of stride {STRIDES[stage]} has "
                    f"{shape[1]} x {shape[2]} cells for images of {PROBE_SIZE[0]} x {PROBE_SIZE[1]} pixels."
                )
        fixed = {name for name, _ in model.named_parameters()} - _ancestors(model, maps)
        return shapes, fixed if last is None else fixed | _ancestors(model, [last])

    def _freeze(self, names: set[str]) -> None:
        """Freeze parameters, and batch normalization layers whose parameters are all frozen."""
        for name, parameter in self.model.named_parameters():
            if name in names:
                parameter.requires_grad_(False)
        self._convert_norms(lambda layer: layer.affine and not layer.weight.requires_grad)

    def _set_norm(self, norm: str) -> None:
        from timm.layers import convert_sync_batchnorm

        if norm != "BN" and not any(isinstance(m, BATCH_NORM) for m in self.model.modules()):
            logger.warning(f"MODEL.TIMM.NORM {norm} has no effect: {self.name} has no batch normalization to train.")
        if norm == "FrozenBN":
            self._convert_norms(lambda layer: True)
        elif norm == "SyncBN":
            self.model = convert_sync_batchnorm(self.model)

    def _convert_norms(self, condition: Any) -> None:
        """Replace the batch normalization layers that satisfy the condition by layers with fixed statistics and factors."""
        from timm.layers import freeze_batch_norm_2d

        for parent in [*self.model.modules()]:
            for name, layer in [*parent.named_children()]:
                if isinstance(layer, BATCH_NORM) and condition(layer):
                    setattr(parent, name, freeze_batch_norm_2d(layer))


def _create(name: str, drop_path_rate: float) -> nn.Module:
    """Create a network of timm with random weights, for images of any size if it can."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"MODEL.TIMM.NAME {name} needs timm, which is not installed: pip install timm") from error
    arguments: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    try:
        model = timm.create_model(name, **arguments)
        own = inspect.signature(type(model)).parameters
        any_size = {key: value for key, value in ANY_SIZE.items() if key in own}
        return timm.create_model(name, **arguments, **any_size) if any_size else model
    except (RuntimeError, ValueError, OSError) as error:
        given = f"MODEL.TIMM.NAME is {name!r}, but timm {timm.__version__}"
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        if "Unknown model" not in reason:
            raise UserError(f"{given} cannot create it: {reason}.") from error
        family = name.partition(".")[0].partition("_")[0]
        similar = timm.list_models(f"*{family}*")[:5] if family else []
        hint = f"; similar ones: {', '.join(similar)}" if similar else ""
        raise UserError(f"{given} has no such network{hint}.") from error
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise UserError(
            f"MODEL.TIMM.DROP_PATH_RATE is {drop_path_rate}, but {name} has no stochastic depth."
        ) from error


def _stages(model: nn.Module, name: str) -> dict[str, int]:
    """Return the indices of the last feature maps of each stride by stage name."""
    import timm

    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise UserError(f"{name} of timm {timm.__version__} has no feature maps to return.")
    stages = {stride: stage for stage, stride in STRIDES.items()}
    reductions = [info["reduction"] for info in model.feature_info]
    return {stages[stride]: index for index, stride in enumerate(reductions) if stride in stages}


def _ancestors(model: nn.Module, maps: list[Tensor]) -> set[str]:
    """Return the names of the parameters that feature maps depend on."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = [one.sum() for one in maps]
    gradients = torch.autograd.grad(sums, [*parameters.values()], retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _feature_maps(model: nn.Module, x: Tensor, indices: list[int]) -> list[Tensor]:
    return model.forward_intermediates(x, indices=indices, intermediates_only=True, output_fmt="NCHW")


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmNetwork:
    """Build a network of timm from MODEL.TIMM."""
    keys = TimmKeys.read(cfg.MODEL.TIMM, "MODEL.TIMM")
    if input_shape.channels != 3:
        raise UserError(f"{keys.name} takes images with 3 channels; MODEL.PIXEL_MEAN has {input_shape.channels}.")
    out_features, freeze_at = list(cfg.MODEL.RESNETS.OUT_FEATURES), cfg.MODEL.BACKBONE.FREEZE_AT
    return TimmNetwork(keys.name, out_features, keys.norm, freeze_at, keys.drop_path_rate)


(
    build_timm_fpn_backbone,
    build_retinanet_timm_fpn_backbone,
    build_dense_timm_fpn_backbone,
) = register_with_fpns("timm", build_timm_backbone)
