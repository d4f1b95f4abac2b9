"""Config keys of the library, except those of methods and detectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from detectron2.config import CfgNode

from ..distillers import DISTILLER_REGISTRY
from ..errors import UserError
from ..keys import Above, AtLeast, AtMost, Below, Keys
from ..modeling import MODELING_KEYS, add_modeling_config

KD_META_ARCH = "KDMetaArch"


@dataclass(frozen=True)
class DatasetKeys(Keys):
    coco_json: Annotated[
        list,
        "COCO-format datasets: [[name, annotations.json, image folder], ...]. The names can be used in TRAIN and TEST.",
    ] = field(default_factory=list)
    train_repeat_factor: Annotated[
        list,
        "How often images of sets in TRAIN are seen in an epoch: [[name, factor], ...], by default 1. Read by the samplers "
        "WeightedTrainingSampler and, multiplied by the factors of RepeatFactorTrainingSampler, WeightedCategoryTrainingSampler.",
    ] = field(default_factory=list)


@dataclass(frozen=True)
class DataloaderKeys(Keys):
    filter_empty_annotations: Annotated[
        bool, "Whether images without objects are excluded from training; Detectron2's default is True."
    ] = False
    skip_unusable_images: Annotated[
        bool,
        "Whether a training image that cannot be read is logged and replaced with the next one; otherwise it is an error that ends "
        "the training.",
    ] = False
    random_subset_ratio: Annotated[
        float,
        Above(0),
        AtMost(1),
        "Fraction of the images that the sampler RandomSubsetTrainingSampler selects, once for the whole training.",
    ] = 1.0


@dataclass(frozen=True)
class InputKeys(Keys):
    augmentations: Annotated[
        list,
        "Augmentations of Detectron2 for training images before they are resized: [[name, arguments...], ...], such as "
        "[['RandomBrightness', 0.8, 1.2], ['RandomRotation', [-10, 10]]].",
    ] = field(default_factory=list)


@dataclass(frozen=True)
class LargeScaleJitterKeys(Keys):
    enabled: Annotated[
        bool,
        "Scale each training image randomly and crop or pad it to a square (Ghiasi et al. 2021), instead of INPUT.MIN_SIZE_TRAIN.",
    ] = False
    size: Annotated[int, AtLeast(1), "Side of the square in pixels."] = 1024
    min_scale: Annotated[float, Above(0), "Smallest scale factor; at 1, the image just fits into the square."] = 0.1
    max_scale: Annotated[float, Above(0), "Largest scale factor."] = 2.0

    def check(self, name: str) -> None:
        if self.min_scale > self.max_scale:
            raise UserError(f"{name}.MIN_SCALE is {self.min_scale}; it must be at most MAX_SCALE {self.max_scale}.")


@dataclass(frozen=True)
class AmpKeys(Keys):
    dtype: Annotated[
        Literal["float16", "bfloat16"],
        "Autocast dtype if SOLVER.AMP.ENABLED is True; 'float16' uses gradient scaling.",
    ] = "float16"


@dataclass(frozen=True)
class SolverKeys(Keys):
    epochs: Annotated[
        float | None,
        Above(0),
        AtMost(1_000_000),
        "Length of the training in epochs of the images in DATASETS.TRAIN, as DATALOADER filters and samples them. When a training starts, it "
        "sets SOLVER.MAX_ITER, and SOLVER.STEPS keep their places as fractions of the SOLVER.MAX_ITER in the config; other keys in "
        "iterations do not change. None: the length is SOLVER.MAX_ITER.",
    ] = None
    optimizer: Annotated[
        Literal["SGD", "AdamW"],
        "Optimizer of the student. SOLVER's learning rates and weight decays apply to both; momentum and Nesterov only to SGD.",
    ] = "SGD"
    ema_decay: Annotated[
        float,
        AtLeast(0),
        Below(1),
        "Decay of the exponential moving average of the student's weights, which is evaluated and saved in their place; 0 disables it.",
    ] = 0.0
    gradient_accumulation_steps: Annotated[
        int,
        "Number of forward and backward passes per optimizer step, into which each process splits its images of a batch.",
    ] = 1
    channels_last: Annotated[
        bool | None,
        "Train with the channels-last memory format, with the same losses up to rounding; None enables it on a CPU, where it is faster, "
        "and with SOLVER.COMPILE.",
    ] = None
    compile: Annotated[
        bool,
        "Compile the backbone of the trained model (torch.compile), which takes minutes at startup; the losses are the same up to "
        "rounding. With SOLVER.CHANNELS_LAST False, it is compiled again for each image size.",
    ] = False
    checkpoint_minutes: Annotated[
        float,
        AtLeast(0),
        "Minutes since the last checkpoint after which model_latest.pth is written; 0 disables it.",
    ] = 10.0
    checkpoints_to_keep: Annotated[
        int,
        AtLeast(0),
        "Number of most recent checkpoints of SOLVER.CHECKPOINT_PERIOD to keep; 0 keeps all. model_final.pth and, with periodic "
        "evaluation, model_best.pth are kept too.",
    ] = 0
    checkpoint_async: Annotated[
        bool,
        "Write checkpoints in another thread while training continues; needs memory for a copy of the weights.",
    ] = False


@dataclass(frozen=True)
class TestKeys(Keys):
    best_metric: Annotated[
        str,
        "Metric of periodic evaluation by which model_best.pth is chosen, as in metrics.json, such as 'segm/AP' or 'bbox/AP50'; with several "
        "test sets, that of the first one.",
    ] = "bbox/AP"


@dataclass(frozen=True)
class DistillationKeys(Keys):
    student: Annotated[str, "Meta-architecture of the student if MODEL.META_ARCHITECTURE is KDMetaArch."] = "RetinaNet"
    distillers: Annotated[
        tuple[str, ...], "Registered names of the distillation methods; each has its own node in MODEL.KD."
    ] = ()
    layer_lr: Annotated[
        float | None,
        Above(0),
        "Learning rate of the layers that the methods add, such as adaptation layers: AdamW trains them, with cosine decay to zero, so that "
        "neither weights nor gradient balancing change how fast they learn. None trains them with the student's optimizer. ICD's decoder "
        "has its own key, MODEL.KD.ICD.LR.",
    ] = None


@dataclass(frozen=True)
class TeacherKeys(Keys):
    config_file: Annotated[
        str,
        "Config of the teacher: a YAML file, a LazyConfig (.py), or a model zoo name such as 'COCO-Detection/retinanet_R_101_FPN_3x.yaml'.",
    ] = ""
    trust_config: Annotated[
        bool, "Whether to load LazyConfigs that are not part of Detectron2, which runs their code."
    ] = False
    weights: Annotated[
        str,
        "Checkpoint of the teacher; '' for MODEL.WEIGHTS of its config, or for a model zoo name, its trained checkpoint.",
    ] = ""
    opts: Annotated[
        list, "Overrides of the teacher's config: [KEY, value, ...], or ['key=value', ...] for a LazyConfig."
    ] = field(default_factory=list)
    compile: Annotated[
        bool,
        "Compile the teacher's backbone (torch.compile): takes a minute or two at startup and speeds up its forward pass.",
    ] = False
    channels_last: Annotated[
        bool | None, "Use channels-last memory format for the teacher; None enables it on a CPU, where it is faster."
    ] = None


@dataclass(frozen=True)
class PseudoLabelKeys(Keys):
    enabled: Annotated[bool, "Train on the teacher's detections instead of annotations, which are not read."] = False
    score_thresh: Annotated[float, AtLeast(0), Below(1), "Score threshold of the teacher's detections."] = 0.3


@dataclass(frozen=True)
class InheritKeys(Keys):
    enabled: Annotated[
        bool,
        "Copy modules of the teacher to the student before the first iteration, where names and shapes match; see WEIGHT_SELECTION for "
        "layers with fewer channels.",
    ] = False
    modules: Annotated[
        tuple[Literal["bottom_up", "neck", "head"], ...],
        "Modules to copy: the bottom-up network (of a ResNet with fewer blocks, the first blocks of each stage), the neck, which is the "
        "rest of the backbone, and the head, which is everything outside the backbone. A backbone without neck, such as that of "
        "an R-CNN C4, is a bottom-up network.",
    ] = ("neck", "head")
    weight_selection: Annotated[
        bool,
        "Where the student's layers have fewer channels than the teacher's, copy evenly spaced channels (weight selection, Xu et al. "
        "2024). Otherwise such layers are not copied.",
    ] = True

    def check(self, name: str) -> None:
        if self.enabled and not self.modules:
            raise UserError(f"{name} is enabled, but {name}.MODULES is empty.")


@dataclass(frozen=True)
class BalanceKeys(Keys):
    enabled: Annotated[
        bool,
        "Scale the losses of each distiller, except its auxiliary ones, so that the norm of their gradient in the student's neck "
        "keeps a fixed ratio to that of the detection losses, independent of the data, the image size and the detector.",
    ] = False
    target: Annotated[
        float,
        Above(0),
        "Gradient ratio of all active distillers together. Each has an equal share; a WEIGHT that differs from the method's default "
        "scales its share proportionally.",
    ] = 2.0
    period: Annotated[int, AtLeast(1), "Iterations between measurements of the ratios."] = 20
    momentum: Annotated[float, AtLeast(0), Below(1), "Momentum of the moving average of the ratios."] = 0.9
    limit: Annotated[float, AtLeast(1), "Multipliers are clamped to [1 / LIMIT, LIMIT]."] = 100000.0
    levels: Annotated[
        bool,
        "Also scale each distiller's gradient in the student's neck outputs and dense predictions, so that it is distributed over the levels "
        "like the gradient of the detection losses. Gradients through the box head of an R-CNN are not affected.",
    ] = False


LIBRARY_KEYS: dict[str, type[Keys]] = {
    "DATASETS": DatasetKeys,
    "DATALOADER": DataloaderKeys,
    "INPUT": InputKeys,
    "INPUT.LARGE_SCALE_JITTER": LargeScaleJitterKeys,
    "SOLVER.AMP": AmpKeys,
    "SOLVER": SolverKeys,
    "TEST": TestKeys,
    "MODEL.KD": DistillationKeys,
    "MODEL.KD.TEACHER": TeacherKeys,
    "MODEL.KD.PSEUDO_LABELS": PseudoLabelKeys,
    "MODEL.KD.INHERIT": InheritKeys,
    "MODEL.KD.BALANCE": BalanceKeys,
}
"""The library's own keys by config node, except those of methods and detectors."""


CONFIG_FUNCTIONS: list[Callable[[CfgNode], None]] = []
"""The functions of `register_config`."""


def register_config(add_config: Callable[[CfgNode], None]) -> Callable[[CfgNode], None]:
    """Register a function that adds config keys of your own, such as those of a backbone, to every config.

    `add_kd_config` calls it, and so do all programs, also for the config of a teacher. A function decorator.
    """
    CONFIG_FUNCTIONS.append(add_config)
    return add_config


def add_kd_config(cfg: CfgNode) -> None:
    """Add the library's keys, with their defaults, to a Detectron2 config, and those of `register_config`.

    Importing it as `kd_d2.add_kd_config` also registers the library's detectors.

    Raises:
        UserError: a registered method uses the node of another method or of the library.
    """
    for path, keys in LIBRARY_KEYS.items():
        keys.add_to(node_at(cfg, path))
    add_modeling_config(cfg)
    for name, method in DISTILLER_REGISTRY:
        if method.CONFIG_NODE in cfg.MODEL.KD:
            raise UserError(
                f"The method {name} has the CONFIG_NODE {method.CONFIG_NODE!r}, which is a key of MODEL.KD already: rename it."
            )
        method.Config.add_to(node_at(cfg, f"MODEL.KD.{method.CONFIG_NODE}"))
    for add_config in CONFIG_FUNCTIONS:
        add_config(cfg)


def declared_nodes() -> dict[str, type[Keys]]:
    """Return the keys of the library, its backbones and detectors, and the registered methods (sorted by name), by config node."""
    nodes = LIBRARY_KEYS | {f"MODEL.{name}": keys for name, keys in MODELING_KEYS.items()}
    return nodes | {f"MODEL.KD.{method.CONFIG_NODE}": method.Config for _, method in sorted(DISTILLER_REGISTRY)}


def node_at(cfg: CfgNode, path: str) -> CfgNode:
    """Return the node at a dotted path, and create it if it does not exist."""
    node = cfg
    for part in path.split("."):
        if part not in node:
            node[part] = CfgNode()
        node = node[part]
    return node


def detector_of(cfg: CfgNode) -> str:
    """Return the name of the meta-architecture that is trained and evaluated: that of the student, or of a plain detector."""
    model = cfg.MODEL.META_ARCHITECTURE
    return cfg.MODEL.KD.STUDENT if model == KD_META_ARCH else model


def reads_annotations(cfg: CfgNode) -> bool:
    """Return whether the training's ground truth comes from the annotations of its datasets."""
    return cfg.MODEL.META_ARCHITECTURE != KD_META_ARCH or not cfg.MODEL.KD.PSEUDO_LABELS.ENABLED
