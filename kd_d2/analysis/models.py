"""Trained models and distillations, the input of the analyses."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..checkpoint import distiller_states, load_complete, local_path
from ..class_names import match_classes, names_in_checkpoint, names_in_data, names_in_training_set
from ..config import find_weights, load_config, thawed
from ..data import build_test_loader, evenly_spaced, register_coco_json, register_synthetic, resolve_epochs
from ..distillers.matching import check_same_anchors, check_same_classes
from ..engine.checks import check_classes, check_datasets, check_distillation
from ..errors import UserError
from ..evaluation import build_evaluator, check_coco_metrics
from ..files import checksum, read_json, write_json
from ..meta_arch import KDMetaArch
from ..model_paths import ModelPath, read_model_paths
from ..modeling.building import build_detector
from ..text import folder_name

Path = str | os.PathLike[str]
Models = Sequence[Path | Sequence[Path]]
"""Values of `--model`, each a path or a pair: [TITLE=]CONFIG_OR_RUN, and the weights if it is a config."""


@dataclass
class TrainedModel:
    """A detector with its weights: a teacher, a plain student or a distilled student.

    Attributes:
        title: the name in pictures and tables.
        cfg: the config of the plain detector; the first of DATASETS.TEST is the dataset.
    """

    title: str
    cfg: CfgNode

    @property
    def dataset(self) -> str:
        """The name of the dataset on which the model is analyzed."""
        return self.cfg.DATASETS.TEST[0]

    @property
    def folder_name(self) -> str:
        """The title as a valid folder name."""
        return folder_name(self.title)

    def identity(self) -> dict[str, object]:
        """Return a record of what the results depend on: the weights file, the config and the annotations."""
        weights = _local_file(self.cfg.MODEL.WEIGHTS)
        status = os.stat(weights)
        annotations = MetadataCatalog.get(self.dataset).get("json_file")
        if annotations:
            data = checksum(annotations)
        else:
            ids = "\n".join(str(entry["image_id"]) for entry in DatasetCatalog.get(self.dataset))
            data = hashlib.sha256(ids.encode()).hexdigest()
        return {
            "weights": [os.path.realpath(weights), status.st_size, status.st_mtime_ns],
            "config": hashlib.sha256(self.cfg.dump().encode()).hexdigest(),
            "data": data,
        }

    def build(self) -> nn.Module:
        """Build the detector on its device, in eval mode, with all weights loaded.

        Raises:
            UserError: the checkpoint is for a different model, or the dataset has different classes.
        """
        model = build_detector(self.cfg).eval()
        check_classes(self.cfg, model)
        load_complete(model, self.cfg.MODEL.WEIGHTS, self.title)
        match_classes(model, self.title, names_in_checkpoint(self.cfg.MODEL.WEIGHTS), names_in_data(self.cfg))
        return model

    def down_to(self, score_thresh: float) -> Self:
        """Return the model with a config in which score thresholds are at most `score_thresh`."""
        cfg = thawed(self.cfg)
        for node in cfg.MODEL.values():
            if isinstance(node, CfgNode) and "SCORE_THRESH_TEST" in node:
                node.SCORE_THRESH_TEST = min(node.SCORE_THRESH_TEST, score_thresh)
        return replace(self, cfg=cfg)

    def detections(self, output: str) -> list[dict]:
        """Return the model's detections on its dataset in COCO format.

        They are cached in the model's subfolder of `output` and read from there as long as `identity` is unchanged.

        Raises:
            UserError: the dataset is not evaluated with COCO metrics.
        """
        check_coco_metrics(self.dataset, "This analysis")
        folder = os.path.join(output, self.folder_name)
        path, source = os.path.join(folder, "coco_instances_results.json"), os.path.join(folder, "source.json")
        identity = self.identity()
        if not (os.path.isfile(path) and os.path.isfile(source) and read_json(source) == identity):
            os.makedirs(folder, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.remove(source)
            loader = build_test_loader(self.cfg, self.dataset)
            inference_on_dataset(self.build(), loader, build_evaluator(self.cfg, self.dataset, folder))
            write_json(source, identity)
        return read_json(path)


@dataclass
class Distillation:
    """The config of a distillation, which names the teacher, and a checkpoint of the student.

    Attributes:
        title: the name in pictures and tables.
        cfg: the config of the distillation.
        weights: path or URL; "" for the student at the start of training.
    """

    title: str
    cfg: CfgNode
    weights: str

    def build(self) -> KDMetaArch:
        """Build student, teacher and distillers in eval mode, without loading weights into the student."""
        model = build_model(self.cfg).eval()
        check_classes(self.cfg, model)
        return model

    def build_trained(self) -> KDMetaArch:
        """Call `build` and load the checkpoint into the student.

        Raises:
            UserError: there is no checkpoint, or it is for a different model.
        """
        return self._loaded(self.build())

    def build_dense_pair(self, analysis: str) -> KDMetaArch:
        """Build as `build_trained`, and check that both detectors have dense predictions of the same classes and anchors.

        Args:
            analysis: the name of the analysis, for error messages.

        Raises:
            UserError: see `build_trained`; or a detector has no dense predictions, or their classes or anchors differ.
        """
        model = self.build()
        for whose, adapter in (("student", model.adapter), ("teacher", model.teacher.adapter)):
            if "dense" not in adapter.provides:
                raise UserError(f"The {whose} ({type(adapter.model).__name__}) has no dense predictions to compare.")
        check_same_classes(analysis, model.adapter.spec, model.teacher.spec)
        check_same_anchors(analysis, model.adapter.spec, model.teacher.spec)
        return self._loaded(model)

    def _loaded(self, model: KDMetaArch) -> KDMetaArch:
        load_complete(model.student, self.checkpoint, "the student")
        match_classes(model.student, "the student", names_in_checkpoint(self.checkpoint), names_in_data(self.cfg))
        return model

    @property
    def checkpoint(self) -> str:
        """`weights`, for an analysis that needs a trained student. Raises a UserError if it is empty."""
        if not self.weights:
            raise UserError(f"--model {self.title}: write the student's checkpoint after the config, or name a run.")
        return self.weights

    def distiller_states(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of the distillers' layers in the checkpoint; see `kd_d2.checkpoint.distiller_states`."""
        return distiller_states(_local_file(self.checkpoint))

    @property
    def class_names(self) -> list[str]:
        """Class names of the dataset, the first of DATASETS.TEST."""
        return MetadataCatalog.get(self.cfg.DATASETS.TEST[0]).thing_classes


def load_models(models: Models, opts: Sequence[str] = ()) -> list[TrainedModel]:
    """Read the configs of trained models, and register and check their data.

    Args:
        models: for example ["plain=output/plain", ("retinanet.yaml", "model.pth")].
            The config of a distillation is reduced to its student.
        opts: config overrides for all models, alternating keys and values.

    Raises:
        UserError: a config, checkpoint or dataset is missing, two titles give one folder name, or the datasets differ.
    """
    register_synthetic()
    found, classes = [], None
    for path in read_paths(models):
        if path.weights and "MODEL.WEIGHTS" in opts[::2]:
            raise UserError(
                f"--model {path.title} names the checkpoint {path.weights}: leave out the override MODEL.WEIGHTS."
            )
        weights = ["MODEL.WEIGHTS", find_weights(path.weights, f"--model {path.title}")] if path.weights else []
        cfg = load_config(path.config, [*opts, *weights], student_only=True)
        if not cfg.MODEL.WEIGHTS:
            raise UserError(f"--model {path.title}: write a checkpoint after the config {path.config}, or name a run.")
        classes = classes or names_in_checkpoint(cfg.MODEL.WEIGHTS) or names_in_training_set(cfg)
        cfg.DATASETS.TRAIN = ()  # not read
        register_coco_json(cfg, classes)
        check_datasets(cfg, train=False)
        found.append(TrainedModel(path.title, cfg))
    check_folder_names(found)
    datasets = [model.dataset for model in found]
    if len(set(datasets)) > 1:
        raise UserError(f"--model: the models have different datasets in DATASETS.TEST: {', '.join(datasets)}.")
    return found


def check_models(models: Sequence[TrainedModel]) -> None:
    """Raise a UserError if one of several models cannot be built. A single model is checked when it is built for use."""
    if len(models) > 1:
        for model in models:
            model.build()


def check_folder_names(models: Sequence[TrainedModel | ModelPath]) -> None:
    """Raise a UserError if two titles give one folder name."""
    names = [folder_name(model.title) for model in models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--model: several titles give the folder name {name!r}; choose other titles.")


def load_distillations(models: Models, opts: Sequence[str] = (), *, train: bool = False) -> list[Distillation]:
    """Read the configs of distillations, and register and check their data.

    Args:
        models, opts: see `load_models`.
        train: also check the training data.

    Raises:
        UserError: see `load_models`; or a config is not that of a distillation.
    """
    register_synthetic()
    found = []
    for path in read_paths(models):
        cfg = load_config(path.config, list(opts))
        check_distillation(cfg, f"--model {path.title}")
        weights = path.weights and find_weights(path.weights, f"--model {path.title}")
        register_coco_json(cfg)
        check_datasets(cfg, train=train)
        cfg = resolve_epochs(cfg) if train else cfg
        found.append(Distillation(path.title, cfg, weights))
    return found


def read_paths(models: Models) -> list[ModelPath]:
    """Call `read_model_paths` with paths or pairs of them.

    Raises:
        UserError: see `read_model_paths`, or `models` is a single path.
    """
    if isinstance(models, str | os.PathLike):
        raise UserError(f"The models are a list of paths, such as [{os.fspath(models)!r}], not a single path.")
    pairs = ([model] if isinstance(model, str | os.PathLike) else model for model in models)
    return read_model_paths([list(map(os.fspath, pair)) for pair in pairs])


def read_annotations(dataset: str) -> dict:
    """Return the content of a dataset's annotation file.

    Raises:
        UserError: the dataset is not a single file in COCO format.
    """
    path = MetadataCatalog.get(dataset).get("json_file")
    if not path or not os.path.isfile(path):
        raise UserError(f"The dataset {dataset} has no annotation file in COCO format, which this analysis needs.")
    return read_json(path)


def restrict_images(models: Sequence[TrainedModel], count: int, output: str) -> list[TrainedModel]:
    """Return the models on a test set of `count` images, evenly spaced, whose annotation file is written to `output`.

    Raises:
        UserError: the dataset is not a single file in COCO format, or is not evaluated with COCO metrics.
    """
    dataset = models[0].dataset
    if count >= len(DatasetCatalog.get(dataset)):
        return list(models)
    check_coco_metrics(dataset, "--images")
    tree = read_annotations(dataset)
    images = evenly_spaced(tree["images"], count)
    ids = {image["id"] for image in images}
    annotations = [a for a in tree["annotations"] if a["image_id"] in ids]
    path = os.path.abspath(os.path.join(output, f"{count}-images.json"))
    write_json(path, {**tree, "images": images, "annotations": annotations}, indent=None)
    entry = [f"{dataset}_{count}_images", path, MetadataCatalog.get(dataset).image_root]
    if entry[0] in DatasetCatalog.list():  # of an earlier analysis in this process
        DatasetCatalog.remove(entry[0])
        MetadataCatalog.remove(entry[0])
    classes = names_in_data(models[0].cfg)
    restricted = [replace(model, cfg=thawed(model.cfg)) for model in models]
    for model in restricted:
        model.cfg.DATASETS.COCO_JSON = [entry]
        model.cfg.DATASETS.TEST = (entry[0],)
        register_coco_json(model.cfg, classes)
    return restricted


def _local_file(weights: str) -> str:
    """Return the local path of weights, which may be a URL and have a query such as "?matching_heuristics=True"."""
    path = local_path(weights.partition("?")[0])
    if not os.path.isfile(path):
        raise UserError(f"There is no checkpoint {path}.")
    return path
