"""Helpers of several test files: a COCO dataset of tiny images, narrow detectors, and train_net.py in this process."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import runpy
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kd_d2 import cli, files
from kd_d2.adapters import DetectorOutputs, DetectorSpec
from kd_d2.config import load_config
from kd_d2.data import register_coco_json
from kd_d2.distillers import DISTILLER_REGISTRY, Distiller, Pair, build_distiller
from kd_d2.engine import KDTrainer, launch
from kd_d2.modeling.building import build_detector

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import logger as detectron2_logger
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs" / "tiny"
CLASSES = ("red", "green", "blue")

# Narrow detectors and small images, so that an iteration takes a few hundredths of a second.
NARROW = {
    "MODEL": {
        "DEVICE": "cpu",
        "SLIM_RESNET": {"WIDTHS": (8, 12, 16, 24)},
        "RESNETS": {"STEM_OUT_CHANNELS": 8},
        "FPN": {"OUT_CHANNELS": 16},
        "RETINANET": {"NUM_CLASSES": len(CLASSES), "NUM_CONVS": 1},
        **{
            name: {"NUM_CLASSES": len(CLASSES), "NUM_CONVS": 1, "NORM": ""}
            for name in ("FCOS", "ATSS", "GFL", "FSAF", "REPPOINTS")
        },
        "ROI_HEADS": {"NUM_CLASSES": len(CLASSES), "BATCH_SIZE_PER_IMAGE": 16},
        "ROI_BOX_HEAD": {"FC_DIM": 16, "POOLER_RESOLUTION": 3},
        "RPN": {"POST_NMS_TOPK_TRAIN": 40, "POST_NMS_TOPK_TEST": 20, "BATCH_SIZE_PER_IMAGE": 32},
    },
    "INPUT": {"MIN_SIZE_TRAIN": (64, 80), "MIN_SIZE_TEST": 64, "MAX_SIZE_TRAIN": 128, "MAX_SIZE_TEST": 128},
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {"IMS_PER_BATCH": 2, "WARMUP_ITERS": 2, "MAX_ITER": 4, "STEPS": (3,), "CHECKPOINT_PERIOD": 100},
    "TEST": {"EVAL_PERIOD": 0},
}
WIDE = {"MODEL__SLIM_RESNET__WIDTHS": (16, 24, 32, 48)}
"""Keys that make NARROW detectors wide enough for channels-last training on a CPU."""


def example(name: str, file: str) -> str:
    """Return the code block after `<!-- test: name -->` in a page of the documentation."""
    return re.search(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)[1]


def make_coco(folder: Path, num_images: int = 6, *, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """Create images with rectangles in the classes' colors on noise, alternately landscape and portrait.

    The third image has no objects. NumPy's frozen legacy generator and PNG give the same pixels on every machine.

    Returns:
        The annotation file; the images are next to it in the folder `images`.
    """
    random = np.random.RandomState(seed)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for index in range(num_images):
        height, width = (64, 96) if index % 2 == 0 else (96, 64)
        pixels = random.randint(90, 140, (height, width, 3)).astype(np.uint8)
        for _ in range(0 if index == 2 else 1 + index % 3):
            label = random.randint(len(classes))
            w, h = random.randint(16, 40, 2)
            x, y = random.randint(0, width - w), random.randint(0, height - h)
            pixels[y : y + h, x : x + w] = 30
            pixels[y : y + h, x : x + w, 2 - label % 3] = 220
            box = [int(v) for v in (x, y, w, h)]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index + 1, "category_id": int(label) + 1, "bbox": box}
                | {"area": box[2] * box[3], "iscrowd": 0}
            )
        name = f"{index:03d}.png"
        cv2.imwrite(str(folder / "images" / name), pixels)
        images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def targets_of(*images: list[list[float]]) -> list[Instances]:
    """Return ground truth with the given boxes of each image, all of class 0, in images of 64 x 64 pixels."""
    return [
        Instances(
            (64, 64), gt_boxes=Boxes(torch.tensor(b).view(-1, 4)), gt_classes=torch.zeros(len(b), dtype=torch.int64)
        )
        for b in images
    ]


def spec_of(
    channels: dict[int, int], family: str = "one-stage", name: str = "Pupil", **changes: object
) -> DetectorSpec:
    """Return the spec of a 3-class detector with these channels by stride that provides only features."""
    shapes = {stride: ShapeSpec(channels=c, stride=stride) for stride, c in channels.items()}
    rest = {"num_classes": 3, "cell_anchors": None, "provides": frozenset({"features"}), **changes}
    return DetectorSpec(name=name, family=family, shapes=shapes, **rest)


def make(
    method: type[Distiller],
    student: DetectorSpec,
    teacher: DetectorSpec | None = None,
    *,
    datasets: tuple[str, ...] = (),
    max_iter: int = 1,
    **keys: object,
) -> Distiller:
    """Build a method, for example `make(DeFeat, spec_of({8: 4}), adaptation="1x1")`; teacher defaults to student."""
    return method(method.Config(**keys), Pair(student, teacher or student, datasets, max_iter))


def configured(method: type[Distiller], cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> Distiller:
    """Build a registered method from a config, as KDMetaArch does."""
    return build_distiller(cfg, method.__name__, Pair.from_config(cfg, student, teacher))


def scaled(distiller: Distiller, *arguments: object) -> dict[str, torch.Tensor]:
    """Return the losses as used in training without a schedule: times the method's weight, except auxiliary ones."""
    return distiller.scaled(distiller(*arguments))


def with_features(features: dict[int, torch.Tensor], losses_of: Callable | None = None) -> DetectorOutputs:
    """Return outputs with feature maps by stride, of two images of 48 x 72 pixels, and perhaps the detector's losses of other features."""
    images = ImageList(torch.zeros(2, 3, 48, 72), [(48, 72)] * 2)
    return DetectorOutputs(images=images, features=features, losses_of=losses_of)


def merged(*trees: dict) -> dict:
    """Merge nested dictionaries; later ones take precedence."""
    result: dict = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def write_yaml(path: Path, tree: dict) -> Path:
    """Write a config as YAML, with tuples as lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
    return path


def tree_of(**keys: object) -> dict:
    """Return nested dictionaries: `tree_of(MODEL__KD__STUDENT="x")` is {"MODEL": {"KD": {"STUDENT": "x"}}}."""
    tree: dict = {}
    for key, value in keys.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def fixed_weights(model: nn.Module, seed: int = 0) -> None:
    """Set weights and running means to values that depend only on their names and `seed`, not on torch's generator.

    Weights of convolutions and linear layers get He's scale; all other tensors are unchanged.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
            if name.endswith("weight") and tensor.dim() > 1:
                scale = (2.0 / tensor[0].numel()) ** 0.5
                tensor.copy_(torch.from_numpy(random.uniform(-1.7, 1.7, tuple(tensor.shape)) * scale))
            elif name.endswith("running_mean"):
                tensor.copy_(torch.from_numpy(random.uniform(-0.1, 0.1, tuple(tensor.shape))))


def save_fixed_weights(config_file: Path, path: Path, seed: int = 0) -> nn.Module:
    """Save only the `fixed_weights` of the config's detector as a checkpoint; return the detector in eval mode."""
    cfg = load_config(str(config_file))
    cfg.MODEL.WEIGHTS = ""
    model = build_detector(cfg)
    fixed_weights(model, seed)
    torch.save({"model": model.state_dict()}, path)
    return model.eval()


@dataclass
class Project:
    """A folder with everything that a tiny distillation needs.

    Attributes:
        folder: the folder of all files.
        student, teacher: config files; the student's meta-architecture is KDMetaArch.
        teacher_weights: the teacher's checkpoint, which is not set in the teacher's config.
        annotations: annotation file of the only dataset, used for training and for testing.
        name: name of the dataset, which is registered from the config.
    """

    folder: Path
    student: Path
    teacher: Path
    teacher_weights: Path
    annotations: Path
    name: str

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def change(self, **keys: object) -> Path:
        """Change keys of the student's config: `change(SOLVER__MAX_ITER=2)`."""
        return write_yaml(self.student, merged(yaml.safe_load(self.student.read_text()), tree_of(**keys)))

    def change_teacher(self, **keys: object) -> Path:
        """Change keys of the teacher's config."""
        return write_yaml(self.teacher, merged(yaml.safe_load(self.teacher.read_text()), tree_of(**keys)))

    def change_annotations(self, change) -> None:
        """Edit the content of the annotation file with `change`, which modifies it in place."""
        tree = json.loads(self.annotations.read_text())
        change(tree)
        self.annotations.write_text(json.dumps(tree))

    def main(self, *args: object, config: Path | None = None) -> object:
        """Run the `main` of train_net.py in this process with `launch`."""
        return run_train_net("--config-file", str(config or self.student), *args)


def teacher_arguments(project: Project, title: str) -> list[object]:
    """Return the options of an analysis for a project's teacher."""
    return ["--model", f"{title}={project.teacher}", project.teacher_weights]


def data_arguments(project: Project, **more: object) -> list[object]:
    """Return the overrides for a plain config that name a project's dataset, keep all detections, and change further keys."""
    entry = [[project.name, str(project.annotations), str(project.annotations.parent / "images")]]
    keys = {"DATASETS.COCO_JSON": entry, "DATASETS.TEST": (project.name,), "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0}
    return [x for pair in {**keys, **more}.items() for x in pair]


META_ARCHITECTURES = {
    "retinanet": "RetinaNet",
    "fcos": "FCOS",
    "atss": "ATSS",
    "gfl": "GFL",
    "fsaf": "FSAF",
    "reppoints": "RepPoints",
    "faster-rcnn": "GeneralizedRCNN",
}


def parts_of(detector: str) -> frozenset[str]:
    """Return the inputs of methods that a detector of META_ARCHITECTURES provides."""
    parts = {"features", "anchors", "losses", "targets"}
    if detector == "faster-rcnn":
        return frozenset(parts | {"objectness", "proposals"})
    parts |= {"dense"} if detector == "reppoints" else {"dense", "towers"}
    return frozenset(parts | {"distributions"} if detector == "gfl" else parts)


def methods_of(detector: str) -> list[str]:
    """Return the names of the registered methods that support a detector of META_ARCHITECTURES."""
    parts = parts_of(detector)
    return [
        name
        for name, method in DISTILLER_REGISTRY
        if method.needs <= parts or (method.alternative_needs is not None and method.alternative_needs <= parts)
    ]


def detector_of(method: str) -> str:
    """Return a detector of META_ARCHITECTURES that a method supports, RetinaNet if possible."""
    return next(detector for detector in ("retinanet", "faster-rcnn", "gfl") if method in methods_of(detector))


@functools.cache
def _teacher_of_projects(detector: str) -> bytes:
    """Return the checkpoint of the teacher of `make_project`, which depends on the detector only."""
    with tempfile.TemporaryDirectory() as folder:
        config = write_yaml(Path(folder) / "teacher.yaml", _project_base(detector))
        save_fixed_weights(config, Path(folder) / "teacher.pth", seed=1)
        return (Path(folder) / "teacher.pth").read_bytes()


def _project_base(detector: str) -> dict:
    return merged({"_BASE_": str(TINY / f"{detector}-student.yaml")}, NARROW)


def make_project(folder: Path, detector: str = "retinanet", **keys: object) -> Project:
    """Create a tiny project with a detector of META_ARCHITECTURES; `keys` change the student's config."""
    annotations = make_coco(folder / "data")
    name = f"tiny_{zlib.crc32(str(folder).encode()):08x}"
    base = _project_base(detector)
    teacher = write_yaml(folder / "teacher.yaml", base)
    student = write_yaml(
        folder / "student.yaml",
        merged(
            base,
            tree_of(
                MODEL__META_ARCHITECTURE="KDMetaArch",
                MODEL__KD__STUDENT=META_ARCHITECTURES[detector],
                MODEL__KD__TEACHER__CONFIG_FILE="teacher.yaml",
                MODEL__KD__TEACHER__WEIGHTS="teacher.pth",
                MODEL__KD__DISTILLERS=("FeatureImitation",),
                DATASETS__COCO_JSON=[[name, "data/annotations.json", "data/images"]],
                DATASETS__TRAIN=(name,),
                DATASETS__TEST=(name,),
                OUTPUT_DIR=str(folder / "output"),
            ),
            tree_of(**keys),
        ),
    )
    weights = folder / "teacher.pth"
    weights.write_bytes(_teacher_of_projects(detector))
    return Project(folder, student, teacher, weights, annotations, name)


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    """Put the temporary file of the target on a device without space."""
    temporary, new_name = target.with_name("full"), files._partial
    temporary.symlink_to("/dev/full")
    monkeypatch.setattr(files, "_partial", lambda path: str(temporary) if path == str(target) else new_name(path))


def run_train_net(*args: object) -> object:
    """Run `python train_net.py ARGS` in this process, and return the result of its `main`."""
    program = runpy.run_path(str(ROOT / "train_net.py"), run_name="train_net")
    parsed = program["argument_parser"]().parse_args([str(a) for a in args])
    results = []
    with clean_process():
        launch(lambda a: results.append(program["main"](a)), parsed)
    return results[0]


def run_command(*arguments: object) -> None:
    """Run `kd-d2 ARGUMENTS` in this process."""
    with clean_process():
        cli.main([str(a) for a in arguments])


@contextlib.contextmanager
def clean_process() -> Iterator[None]:
    """Restore on exit what a training program changes: log handlers, registered datasets and environment variables."""
    datasets, metadata = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    loggers = {name: logging.getLogger(name) for name in ("detectron2", "fvcore", "kd_d2")}
    kept = {name: (log.handlers[:], log.propagate, log.level) for name, log in loggers.items()}
    environment = dict(os.environ)
    try:
        yield
    finally:
        for name in set(DatasetCatalog.list()) - datasets:
            DatasetCatalog.remove(name)
        for name in set(MetadataCatalog.list()) - metadata:
            MetadataCatalog.remove(name)
        for name, log in loggers.items():
            log.handlers[:], log.propagate, log.level = kept[name]
        detectron2_logger.setup_logger.cache_clear()
        detectron2_logger._cached_log_stream.cache_clear()
        os.environ.clear()
        os.environ.update(environment)


class LossRecorder(HookBase):
    """Records all losses of each iteration as `losses[iteration][name]`."""

    def __init__(self):
        self.losses: dict[int, dict[str, float]] = {}

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        now = self.trainer.iter
        self.losses[now] = {k: v for k, (v, at) in latest.items() if k.startswith("loss_") and at == now}


class Killed(BaseException):
    """Simulates a kill: no code of the program catches it."""


class KillAt(HookBase):
    """Raises `Killed` after the given iteration."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise Killed


def make_trainer(project: Project, *opts: object, seed: int = 0, trainer: type[KDTrainer] = KDTrainer) -> KDTrainer:
    """Build a trainer as train_net.py does: datasets registered, global generators seeded, no weights loaded yet."""
    cfg = load_config(str(project.student), [str(o) for o in opts])
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    register_coco_json(cfg)
    torch.manual_seed(seed)
    np.random.seed(seed)
    return trainer(cfg)


@dataclass
class Run:
    """Result of a training: all losses by iteration and name, and the trainer."""

    losses: dict[int, dict[str, float]]
    trainer: KDTrainer


def train(project: Project, *opts: object, resume: bool = False, hooks: tuple = (), seed: int = 0) -> Run:
    """Train in this process; `Killed` ends the training early."""
    with clean_process():
        trainer = make_trainer(project, *opts, seed=seed)
        trainer.resume_or_load(resume=resume)
        recorder = LossRecorder()
        trainer.register_hooks([recorder, *hooks])
        with contextlib.suppress(Killed):
            trainer.train()
    return Run(recorder.losses, trainer)
