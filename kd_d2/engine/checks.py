"""Checks before training that need the data, the model or the number of processes; see also `config.validation`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from ..adapters import build_adapter
from ..class_names import ClassCount, class_count_key, names_in_data
from ..config import KD_META_ARCH, detector_of
from ..data.coco.keypoints import check_keypoints
from ..data.coco_json import registered_classes
from ..errors import UserError, check_number, is_finite_number
from ..evaluation import check_evaluation, metrics_of
from ..files import read_json
from ..meta_arch import student_of

PRECISIONS = ("highest", "high", "medium")
"""Values of FLOAT32_PRECISION."""
NVIDIA_DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidia0")
"""Files of which a machine with an NVIDIA driver has at least one."""
TEACHERS_CLASSES = "the number of classes in the teacher's config"
"""Description, in messages, of where the number of classes of a teacher is set."""
SMALLEST = {
    "SOLVER.MAX_ITER": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.BASE_LR": 0,
    "SOLVER.MOMENTUM": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.REPEAT_THRESHOLD": 0,
}
ROTATED = {
    "PROPOSAL_GENERATOR.NAME": "RRPN",
    "ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
    **{f"{head}.POOLER_TYPE": "ROIAlignRotated" for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")},
}
"""Values of keys of MODEL that mean rotated boxes."""


def check_distillation(cfg: CfgNode, source: str = "CONFIG") -> None:
    """Raise a UserError unless this is a distillation config. `source` is the config's name in the message."""
    if cfg.MODEL.META_ARCHITECTURE != KD_META_ARCH:
        raise UserError(
            f"{source} must be the config of a distillation: "
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, not {KD_META_ARCH}."
        )


def check_device(cfg: CfgNode, world_size: int) -> None:
    """Check that MODEL.DEVICE fits the GPUs of this machine and the number of processes, and make it the current device.

    Raises:
        UserError: there is no such GPU, or several processes would share one, or would train on CPUs with NCCL.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cpu" and world_size > 1 and torch.cuda.is_available():
        raise UserError(
            f"MODEL.DEVICE is 'cpu', but {world_size} processes on a machine with GPUs communicate with NCCL, which needs them: to "
            "train on CPUs, hide the GPUs (CUDA_VISIBLE_DEVICES=)."
        )
    if device.type != "cuda" or device.index is None:
        return
    if world_size > 1:
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but each of the {world_size} processes needs its own GPU: set it to 'cuda'."
        )
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but this machine has {torch.cuda.device_count()} usable GPUs, numbered from 0."
        )
    torch.cuda.set_device(device)


def check_float32_precision(cfg: CfgNode) -> None:
    """Raise a UserError unless FLOAT32_PRECISION, which only official Detectron2 has, is empty or one of PyTorch's."""
    precision = cfg.get("FLOAT32_PRECISION", "")
    if precision not in ("", *PRECISIONS):
        raise UserError(
            f"FLOAT32_PRECISION is {precision!r}; it must be one of {', '.join(map(repr, PRECISIONS))}, or '' to change nothing."
        )


def missing_gpu_advice(wanted: str, device: str) -> str | None:
    """Return why a device is "cpu" instead of the one in the config, such as "cuda", or None if it is the same."""
    if device == wanted:
        return None
    if not wanted.startswith("cuda"):
        return f"MODEL.DEVICE is {wanted!r}, which PyTorch cannot use here: running on the CPU; MODEL.DEVICE cpu silences this warning."
    if torch.version.cuda is None and torch.version.hip is None:
        reason = " (this PyTorch is built without CUDA)"
    elif torch.version.cuda and any(os.path.exists(path) for path in NVIDIA_DRIVER):
        reason = (
            f" (there is an NVIDIA driver, but it is too old for this PyTorch, which is built for CUDA {torch.version.cuda}, or the "
            "GPUs are hidden)"
        )
    else:
        reason = ""
    return (
        f"MODEL.DEVICE is {wanted!r}, but PyTorch finds no usable GPU{reason}: running on the CPU; MODEL.DEVICE cpu silences "
        "this warning."
    )


def autocast_advice(cfg: CfgNode) -> str | None:
    """Return why mixed precision does not help on the device, or None if it may."""
    if cfg.MODEL.DEVICE != "cpu" or not cfg.SOLVER.AMP.ENABLED:
        return None
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return (
            f"SOLVER.AMP.DTYPE is {cfg.SOLVER.AMP.DTYPE!r}, with which a CPU without AVX-512, such as this one, trains many times slower "
            "than with float32: set SOLVER.AMP.ENABLED to False."
        )
    if cfg.SOLVER.AMP.DTYPE == "float16":
        return (
            "SOLVER.AMP.DTYPE is 'float16', with which most CPUs train many times slower than with float32: set it to 'bfloat16', or "
            "SOLVER.AMP.ENABLED to False."
        )
    return None


def check_supported(cfg: CfgNode) -> None:
    """Raise a UserError if the config has precomputed proposals, rotated boxes or test-time augmentation."""
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            "MODEL.LOAD_PROPOSALS is True: precomputed proposals are not supported, since they are pickle files, which can run code when they are loaded."
        )
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        raise UserError(
            "MODEL.PROPOSAL_GENERATOR.NAME is PrecomputedProposals: precomputed proposals are not supported; set it to 'RPN'."
        )
    for key, value in ROTATED.items():
        node, name = key.split(".")
        if cfg.MODEL[node][name] == value:
            raise UserError(f"MODEL.{key} is {value}: rotated boxes are not supported.")
    if cfg.TEST.AUG.ENABLED:
        raise UserError("TEST.AUG.ENABLED is True: test-time augmentation is not supported.")


def check_plain(cfg: CfgNode) -> None:
    """Raise a UserError if the config is that of a distillation instead of its student alone."""
    if cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {KD_META_ARCH}, with a teacher: load the student's config alone, load_config(..., student_only=True)."
        )


def check_datasets(cfg: CfgNode, *, train: bool) -> None:
    """Check that the config is supported, and that its datasets exist, are safe, and have the required annotations.

    Args:
        train: whether to check DATASETS.TRAIN in addition to DATASETS.TEST.

    Raises:
        UserError: a check fails; the message names the key and the dataset.
    """
    check_supported(cfg)
    keys = ["TRAIN", "TEST"] if train else ["TEST"]
    for key in keys:
        names = cfg.DATASETS[key]
        if not names and key == keys[0]:
            raise UserError(f"DATASETS.{key} is empty: name a dataset.")
        for name in names:
            if name not in DatasetCatalog.list():
                entries = [n for n, _, _ in cfg.DATASETS.COCO_JSON]
                raise UserError(
                    f"DATASETS.{key} names {name!r}, which is neither one of Detectron2's datasets nor an entry of "
                    f"DATASETS.COCO_JSON ({', '.join(entries) or 'empty'})."
                )
            _check_files(key, name)
            _check_keypoints(cfg, key, name)
    if cfg.DATASETS.TEST and detector_of(cfg) == "SemanticSegmentor":
        raise UserError(
            "DATASETS.TEST is not empty, but a SemanticSegmentor predicts no boxes or masks, and nothing else is evaluated; set it to ()."
        )
    for name in cfg.DATASETS.TEST:
        check_evaluation(name)
        if MetadataCatalog.get(name).get("evaluator_type") == "coco":
            _check_sizes_for_evaluation(name)
            _check_masks_for_evaluation(cfg, name)


def check_best_metric(cfg: CfgNode) -> None:
    """Raise a UserError if TEST.BEST_METRIC has no task, or is that of something that the detector does not predict."""
    metric = cfg.TEST.BEST_METRIC
    if metric.startswith("AP"):
        raise UserError(f"TEST.BEST_METRIC is {metric!r}; name the task too, such as 'bbox/{metric}'.")
    key = {"segm": "MASK_ON", "keypoints": "KEYPOINT_ON"}.get(metric.partition("/")[0])
    if key and not cfg.MODEL[key]:
        raise UserError(f"TEST.BEST_METRIC is {metric!r}, but MODEL.{key} is False.")


def check_best_metric_is_evaluated(cfg: CfgNode) -> None:
    """Raise a UserError if the periodic evaluation of the first test set does not have TEST.BEST_METRIC."""
    if cfg.TEST.EVAL_PERIOD <= 0 or not cfg.DATASETS.TEST:
        return
    metric, dataset = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST[0]
    task, _, name = metric.partition("/")
    metrics = metrics_of(dataset)
    start = f"TEST.BEST_METRIC is {metric!r}, which the evaluation of {dataset} does not have"
    if task not in metrics:
        raise UserError(f"{start}: its tasks are {', '.join(metrics)}.")
    if name not in metrics[task]:
        of_classes = [known for known in metrics[task] if known.startswith("AP-")]
        general = [known for known in metrics[task] if known not in of_classes]
        listed = (
            of_classes if of_classes and name.startswith("AP-") else [*general, *(["AP-CLASS"] if of_classes else [])]
        )
        raise UserError(f"{start}; it has {', '.join(f'{task}/{known}' for known in listed)}.")


def check_expected_results(cfg: CfgNode) -> None:
    """Raise a UserError unless TEST.EXPECTED_RESULTS is empty, or lists results of the only dataset in DATASETS.TEST."""
    for entry in cfg.TEST.EXPECTED_RESULTS:
        if not (
            isinstance(entry, list | tuple)
            and len(entry) == 4
            and all(isinstance(name, str) for name in entry[:2])
            and all(map(is_finite_number, entry[2:]))
        ):
            raise UserError(
                "TEST.EXPECTED_RESULTS must be a list of lists, [[task, metric, value, tolerance], ...], such as [['bbox', 'AP', 38.5, 0.2]]; "
                f"one entry is {entry!r}."
            )
    if cfg.TEST.EXPECTED_RESULTS and len(cfg.DATASETS.TEST) != 1:
        raise UserError(
            f"TEST.EXPECTED_RESULTS are the results of one dataset, but DATASETS.TEST names {len(cfg.DATASETS.TEST)}."
        )


def _check_files(key: str, name: str) -> None:
    metadata = MetadataCatalog.get(name)
    annotations, folder = metadata.get("json_file"), metadata.get("dirname")
    if (annotations and os.path.isfile(annotations)) or (folder and os.path.isdir(folder)):
        return
    try:
        DatasetCatalog.get(name)  # the synthetic dataset is generated on first use
    except (OSError, AssertionError) as error:
        raise UserError(
            f"DATASETS.{key} names {name!r}, whose files do not exist ({annotations or folder or error}); the environment variable "
            "DETECTRON2_DATASETS names the folder that holds Detectron2's built-in datasets."
        ) from error
    except ImportError as error:
        raise UserError(
            f"DATASETS.{key} names {name!r}, which needs the package {error.name}: pip install {error.name}"
        ) from error


def _check_keypoints(cfg: CfgNode, key: str, name: str) -> None:
    if not cfg.MODEL.KEYPOINT_ON:
        return
    metadata, predicted = MetadataCatalog.get(name), cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    names = metadata.get("keypoint_names")
    if names is None:
        raise UserError(
            f"DATASETS.{key} names {name!r}, whose keypoints have no names, but MODEL.KEYPOINT_ON is True: set it to False, or list the names "
            "as 'keypoints' in the categories of its annotation file (of a dataset registered in a file for --import, set keypoint_names and "
            "keypoint_flip_map in its metadata)."
        )
    if len(names) != predicted:
        raise UserError(
            f"The dataset {name} has {len(names)} keypoints, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {predicted}."
        )
    if key == "TRAIN" and metadata.get("keypoint_flip_map") is None:
        raise UserError(
            f"DATASETS.TRAIN names {name!r}, whose metadata have no keypoint_flip_map: set it to the pairs of names that a horizontal flip "
            "swaps, such as (('left_eye', 'right_eye'),), or to ()."
        )
    _check_keypoint_order(cfg, name, names)
    if key == "TRAIN":
        return
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if (sigmas or 17) != predicted:
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values, but the dataset {name} needs {predicted}, one for each keypoint; leave it empty for COCO's 17."
        )
    if MetadataCatalog.get(name).get("evaluator_type") == "coco":
        for description, annotation in _described_annotations(name):
            check_keypoints(f"The dataset {name}: {description}", annotation.get("keypoints"), predicted)


def _check_keypoint_order(cfg: CfgNode, name: str, names: Sequence[str]) -> None:
    first = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else name
    wanted = MetadataCatalog.get(first).get("keypoint_names") or names
    if list(names) != list(wanted):
        raise UserError(
            f"The dataset {name} has the keypoints {', '.join(names)}, but {first} has {', '.join(wanted)}: give both the same names in the "
            "same order."
        )


def _annotation_file(name: str) -> str | None:
    """Return the dataset's annotation file, or None for one that Detectron2 converts to the format of COCO."""
    path = MetadataCatalog.get(name).get("json_file")
    return path if path and os.path.isfile(path) else None


def _check_sizes_for_evaluation(name: str) -> None:
    for entry in () if _annotation_file(name) else DatasetCatalog.get(name):
        if not entry.keys() >= {"width", "height"}:
            raise UserError(
                f"DATASETS.TEST names {name!r}, whose entry of {entry.get('file_name')} has no width and height, which the COCO "
                "evaluation needs."
            )


def _check_masks_for_evaluation(cfg: CfgNode, name: str) -> None:
    for description, annotation in _described_annotations(name) if cfg.MODEL.MASK_ON else ():
        if not annotation.get("segmentation"):
            raise UserError(
                f"DATASETS.TEST names {name!r}, whose {description} has no segmentation, but MODEL.MASK_ON is True; set "
                "it to False to train and evaluate only boxes."
            )


def _described_annotations(name: str) -> Iterator[tuple[str, dict]]:
    path = _annotation_file(name)
    if path:
        for annotation in read_json(path).get("annotations", []):
            yield f"annotation {annotation.get('id')}", annotation
        return
    for entry in DatasetCatalog.get(name):
        for annotation in entry.get("annotations", []):
            yield f"object in {entry.get('file_name')}", annotation


def check_classes(cfg: CfgNode, model: nn.Module, key: str | None = None) -> None:
    """Check that the datasets have as many classes as the model predicts, and the test sets those of the model's data.

    Args:
        key: what determines the number of the model, for the message; None for a key of this config.

    Raises:
        UserError: the counts differ, or the names or their order; the message names the dataset and both.
    """
    student = student_of(model)
    number = build_adapter(student).spec.num_classes
    if number is None:
        return
    predicted = ClassCount(number, type(student).__name__, key or class_count_key(cfg, type(student)))
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        if metadata.get("thing_classes") is None and registered_classes(name) is None:
            continue
        sentence = predicted.difference(name, len(metadata.thing_classes), metadata.get("placeholder"))
        if sentence:
            raise UserError(sentence)
    _check_class_names(cfg)


def _check_class_names(cfg: CfgNode) -> None:
    wanted = names_in_data(cfg)
    for name in cfg.DATASETS.TEST:
        own = registered_classes(name)
        if own and wanted and own.names != wanted.names and len(own.names) > 1:
            raise UserError(
                f"The dataset {name} has the classes {own.listed}, but {wanted.source} has {wanted.listed}: the class indices of a "
                "registered dataset are not changed, so register both with the same classes in the same order."
            )


def check_schedule(cfg: CfgNode, world_size: int) -> None:
    """Check the schedule, batch size and gradient accumulation of the config.

    Raises:
        UserError: a value is too small, the batch size is not divisible by the number of processes, or the images per
            process are not divisible by the number of accumulation steps.
    """
    for key, minimum in SMALLEST.items():
        section, name = key.split(".")
        check_number(key, cfg[section][name], minimum)
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    if clipping.ENABLED:
        check_number("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", clipping.CLIP_VALUE, 0, exclusive=True)
    batch, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS
    if batch % world_size or batch < 1:
        raise UserError(f"SOLVER.IMS_PER_BATCH is {batch}; it must be a multiple of {world_size} (processes).")
    if parts < 1 or batch // world_size % parts:
        raise UserError(
            f"SOLVER.GRADIENT_ACCUMULATION_STEPS is {parts}; it must divide the {batch // world_size} images per process."
        )
