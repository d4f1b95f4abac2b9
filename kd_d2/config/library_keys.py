"""The config keys of the library, those of methods and detectors excepted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from detectron2.config import CfgNode

from ..distillers import DISTILLER_REGISTRY
from ..errors import UserError
from ..keys import Above, AtLeast, Below, Keys
from ..modeling import add_modeling_config

KD_META_ARCH = "KDMetaArch"
INHERITABLE = ("neck", "head")


@dataclass(frozen=True)
class DatasetKeys(Keys):
    coco_json: Annotated[
        list,
        "COCO-format datasets: [[name, annotations.json, image folder], ...]; the names are then used in TRAIN and TEST.",
    ] = field(default_factory=list)


@dataclass(frozen=True)
class DataloaderKeys(Keys):
    filter_empty_annotations: Annotated[
        bool, "Whether images without objects are left out of the training; Detectron2's default is True."
    ] = False
    skip_unusable_images: Annotated[
        bool,
        "Whether a training image that cannot be read is named in the log and the next one takes its place; otherwise it ends the "
        "training.",
    ] = False


@dataclass(frozen=True)
class LargeScaleJitterKeys(Keys):
    enabled: Annotated[
        bool,
        "Resize each training image by a random factor and cut or pad it to a square (Ghiasi et al. 2021), in place of INPUT.MIN_SIZE_TRAIN.",
    ] = False
    size: Annotated[int, AtLeast(1), "Side of the square in pixels."] = 1024
    min_scale: Annotated[float, Above(0), "The smallest factor; at 1 the image just fits the square."] = 0.1
    max_scale: Annotated[float, Above(0), "The largest factor."] = 2.0

    def check(self, name: str) -> None:
        if self.min_scale > self.max_scale:
            raise UserError(
                f"{name}.MIN_SCALE is {self.min_scale} and MAX_SCALE {self.max_scale}; it must not be larger."
            )


@dataclass(frozen=True)
class AmpKeys(Keys):
    dtype: Annotated[
        Literal["float16", "bfloat16"],
        "Autocast type under SOLVER.AMP.ENABLED; 'float16' comes with a gradient scaler.",
    ] = "float16"


@dataclass(frozen=True)
class SolverKeys(Keys):
    optimizer: Annotated[
        Literal["SGD", "AdamW"],
        "The student's optimizer. SOLVER's learning rates and weight decays hold for both; momentum and Nesterov are of SGD.",
    ] = "SGD"
    ema_decay: Annotated[
        float,
        AtLeast(0),
        Below(1),
        "Decay of the exponential moving average of the student's weights, which is evaluated and saved in their place; 0 for none.",
    ] = 0.0
    gradient_accumulation_steps: Annotated[
        int,
        "Parts into which a process divides its images of a batch, one forward and backward pass each, before the optimizer's step.",
    ] = 1
    channels_last: Annotated[
        bool | None,
        "Train with channels last in memory, with the same losses up to rounding; None does on a CPU, where it is faster.",
    ] = None
    compile: Annotated[
        bool,
        "Compile the backbone of the model that is trained (torch.compile), which takes minutes at the start; the losses are the same up to "
        "rounding.",
    ] = False
    checkpoint_minutes: Annotated[
        float,
        AtLeast(0),
        "Minutes after which a checkpoint is written as model_latest.pth, if none was written since; 0 for never.",
    ] = 10.0
    checkpoints_to_keep: Annotated[
        int,
        AtLeast(0),
        "Checkpoints of SOLVER.CHECKPOINT_PERIOD that are kept, the last ones; 0 keeps all. model_final.pth, and model_best.pth of "
        "trainings that are evaluated meanwhile, are kept too.",
    ] = 0
    checkpoint_async: Annotated[
        bool,
        "Write checkpoints in another thread while the training continues; takes memory for a copy of the weights.",
    ] = False


@dataclass(frozen=True)
class DistillationKeys(Keys):
    student: Annotated[str, "The student's own meta-architecture, where MODEL.META_ARCHITECTURE is KDMetaArch."] = (
        "RetinaNet"
    )
    distillers: Annotated[
        tuple[str, ...], "Distillation methods by their registered names; each has its node beside this key."
    ] = ()


@dataclass(frozen=True)
class TeacherKeys(Keys):
    config_file: Annotated[
        str,
        "The teacher's config: a yaml file, a LazyConfig (.py), or a model-zoo name such as 'COCO-Detection/retinanet_R_101_FPN_3x.yaml'.",
    ] = ""
    trust_config: Annotated[
        bool, "Whether a LazyConfig that Detectron2 does not ship may be loaded, which runs its code."
    ] = False
    weights: Annotated[
        str,
        "The teacher's checkpoint; '' is the config's own MODEL.WEIGHTS, for a model-zoo name its trained checkpoint.",
    ] = ""
    opts: Annotated[
        list, "Overrides of the teacher's config: [KEY, value, ...]; of a LazyConfig ['key=value', ...]."
    ] = field(default_factory=list)
    compile: Annotated[
        bool,
        "Compile the teacher's backbone (torch.compile): a minute or two at the start, then a faster forward pass.",
    ] = False
    channels_last: Annotated[
        bool | None, "Keep the teacher's weights with channels last in memory; None does on a CPU, where it is faster."
    ] = None


@dataclass(frozen=True)
class PseudoLabelKeys(Keys):
    enabled: Annotated[bool, "Train on the teacher's detections in place of annotations; none are read."] = False
    score_thresh: Annotated[float, AtLeast(0), Below(1), "Detections with a higher score count."] = 0.3


@dataclass(frozen=True)
class InheritKeys(Keys):
    enabled: Annotated[
        bool,
        "Before the first iteration copy the teacher's modules to the student, as far as names and shapes fit.",
    ] = False
    modules: Annotated[
        tuple[Literal["neck", "head"], ...],
        "Modules that are copied: the neck is the backbone without its bottom-up network, the head all that is not backbone.",
    ] = INHERITABLE


@dataclass(frozen=True)
class BalanceKeys(Keys):
    enabled: Annotated[
        bool,
        "Multiply the losses of each distiller, but its auxiliary ones, so that the norm of their gradient in the student's neck "
        "keeps a chosen ratio to that of the detector's own losses, whatever the data, the image size and the detector.",
    ] = False
    target: Annotated[
        float,
        Above(0),
        "The ratio of all active distillers together. Each has an equal share; a WEIGHT other than the method's default changes its "
        "share in proportion.",
    ] = 2.0
    period: Annotated[int, AtLeast(1), "Iterations between two measurements of the ratios."] = 20
    momentum: Annotated[float, AtLeast(0), Below(1), "Momentum of the ratios' moving average."] = 0.9
    limit: Annotated[float, AtLeast(1), "Multipliers are at least 1 / LIMIT and at most LIMIT."] = 100000.0
    levels: Annotated[
        bool,
        "Also scale each distiller's gradient in the student's neck outputs, so that it is spread over the levels as the gradient of the "
        "detector's own losses is. It has no effect on gradients that reach the neck through the detector's head.",
    ] = False


LIBRARY_KEYS: dict[str, type[Keys]] = {
    "DATASETS": DatasetKeys,
    "DATALOADER": DataloaderKeys,
    "INPUT.LARGE_SCALE_JITTER": LargeScaleJitterKeys,
    "SOLVER.AMP": AmpKeys,
    "SOLVER": SolverKeys,
    "MODEL.KD": DistillationKeys,
    "MODEL.KD.TEACHER": TeacherKeys,
    "MODEL.KD.PSEUDO_LABELS": PseudoLabelKeys,
    "MODEL.KD.INHERIT": InheritKeys,
    "MODEL.KD.BALANCE": BalanceKeys,
}
"""The library's own keys by config node, those of methods and detectors excepted."""


def add_kd_config(cfg: CfgNode) -> None:
    """Add the library's keys, with their defaults, to a Detectron2 config.

    Imported as `kd_d2.add_kd_config`, the library's detectors are registered with it.

    Raises:
        UserError: a registered method has the node of another or of the library.
    """
    for path, keys in LIBRARY_KEYS.items():
        keys.add_to(_node_at(cfg, path))
    add_modeling_config(cfg)
    for name, method in DISTILLER_REGISTRY:
        if method.CONFIG_NODE in cfg.MODEL.KD:
            raise UserError(
                f"The method {name} has the CONFIG_NODE {method.CONFIG_NODE!r}, which is a key of MODEL.KD already: rename it."
            )
        method.Config.add_to(_node_at(cfg, f"MODEL.KD.{method.CONFIG_NODE}"))


def _node_at(cfg: CfgNode, path: str) -> CfgNode:
    """The node at a dotted path; those that are not there are added."""
    node = cfg
    for part in path.split("."):
        if part not in node:
            node[part] = CfgNode()
        node = node[part]
    return node


def reads_annotations(cfg: CfgNode) -> bool:
    """Whether the ground truth of the training comes from its datasets."""
    return cfg.MODEL.META_ARCHITECTURE != KD_META_ARCH or not cfg.MODEL.KD.PSEUDO_LABELS.ENABLED
