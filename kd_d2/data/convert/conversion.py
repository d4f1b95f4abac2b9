"""Conversion of a dataset to one COCO JSON file per split, with a config and a summary."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, fields

from ...errors import UserError, printable
from ...files import check_output_folder, write_json, write_text
from ...tables import markdown_table
from ...text import is_unicode
from ..coco_json import is_taken
from ..synthetic import register_synthetic
from .formats import Format, find_format
from .source import WHOLE, ConvertOptions, Source
from .trees import Split, share_out

CONFIG = "datasets.yaml"
BEGINNING = "DATASETS:\n  COCO_JSON:"
EVALUATED = ("val", "valid", "validation", "minival", "dev", "test", "testing")
"""Names of splits for evaluation, by priority; a year may follow the name, as in COCO."""


@dataclass
class SplitFile:
    """A converted split.

    Attributes:
        dataset: name of the dataset in DATASETS.
        file, folder: JSON file, and the folder that its image names are relative to.
        images, empty: number of images, and number of images without boxes.
        boxes: number of boxes by class, sorted by category id.
        crowds: number of boxes with iscrowd set.
    """

    dataset: str
    file: str
    folder: str
    images: int
    empty: int
    boxes: dict[str, int]
    crowds: int


@dataclass
class Conversion:
    """Result of a conversion.

    Attributes:
        title: name of the format.
        splits: splits by name.
        notes: one sentence per kind of dropped or modified entries.
        config: path of the YAML file that uses the splits.
    """

    title: str
    splits: dict[str, SplitFile]
    notes: list[str]
    config: str

    def summary(self) -> str:
        """Return the result as text."""
        lines = []
        for name, split in self.splits.items():
            boxes = sum(split.boxes.values())
            crowds = f", {split.crowds} of them crowds" if split.crowds else ""
            lines.append(
                f"{name}: {split.images} images, {split.empty} of them without boxes; {boxes} boxes{crowds}: {split.file}"
            )
        classes = list(dict.fromkeys(label for split in self.splits.values() for label in split.boxes))
        rows = [[printable(label), *(split.boxes.get(label, 0) for split in self.splits.values())] for label in classes]
        table = markdown_table([f"{self.title}: class", *self.splits], rows)
        with open(self.config, encoding="utf-8") as file:
            config = f"{self.config} uses the splits; add it to the _BASE_ of a config:\n\n{file.read().rstrip()}"
        notes = ["\n".join(map(printable, self.notes))] if self.notes else []
        return "\n\n".join(["\n".join(lines), table, *notes, config])


def convert(
    folder: str,
    output: str,
    format: str | None = None,
    options: ConvertOptions | None = None,
    *,
    overwrite: bool = False,
) -> Conversion:
    """Convert a dataset to COCO JSON, one file per split, without copying images.

    Args:
        folder: folder of images and labels.
        output: folder for the JSON files and `datasets.yaml`.
        format: one of FORMATS; None to detect it.
        options: conversion options.
        overwrite: whether files of an earlier conversion are replaced; label files of `folder` never are.

    Raises:
        UserError: the dataset is invalid or ambiguous; nothing is written then.
    """
    options = options or ConvertOptions()
    for argument, path in (("IN", folder), ("OUT", output)):
        if not is_unicode(os.path.abspath(path)):
            raise UserError(f"{argument}: the path {path} is not UTF-8, but the config names it: rename the folder.")
    source = Source(os.path.abspath(folder), options, without=os.path.abspath(output))
    form = find_format(source, format)
    _check_options(options, form)
    splits = form.read(source)
    if options.val_share:
        splits = share_out(splits, options.val_share, source)
    for name in splits:  # also used as file names
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise UserError(f"IN: a split is named {name!r}; only letters, digits, '_', '-' and '.' are allowed.")
    files = {name: os.path.join(os.path.abspath(output), f"{name}.json") for name in splits}
    config = os.path.join(os.path.abspath(output), CONFIG)
    inputs = {os.path.realpath(source.path(file)) for file in source.having(*form.suffixes)}
    for file in (*files.values(), config):
        if os.path.realpath(file) in inputs and not _is_own_config(file):
            raise UserError(f"OUT: {file} would overwrite a file of IN: choose another folder.")
        if os.path.lexists(file) and not overwrite:
            raise UserError(f"OUT: {file} already exists: choose another folder, or pass --overwrite.")
    check_output_folder(output, "OUT")
    for name, split in splits.items():
        write_json(files[name], split.tree, indent=None)
    title = _title(os.path.basename(source.folder), files)
    written = {name: _describe(f"{title}_{name}", files[name], split) for name, split in splits.items()}
    write_text(config, _config(written))
    return Conversion(form.title, written, source.notes.sentences(), config)


def _check_options(options: ConvertOptions, form: Format) -> None:
    for field in fields(options):
        if getattr(options, field.name) != field.default and field.name not in form.options:
            raise UserError(f"--{field.name.replace('_', '-')} has no effect for {form.title}: leave it out.")
    if options.unlabelled == "keep" and options.drop_broken:
        raise UserError(
            "--unlabelled keep and --drop-broken cannot be combined: an image with unreadable labels would count as one without "
            "objects."
        )


def _title(folder: str, files: dict[str, str]) -> str:
    """Return a prefix for dataset names, derived from the folder's name, with which no name is taken by another dataset."""
    register_synthetic()
    title = re.sub(r"\W+", "_", folder).strip("_").lower() or "data"
    while any(is_taken(f"{title}_{name}", file) for name, file in files.items()):
        title = f"my_{title}"
    return title


def _describe(dataset: str, file: str, split: Split) -> SplitFile:
    tree = split.tree
    name_of = {category["id"]: category["name"] for category in tree["categories"]}
    counts = Counter(annotation["category_id"] for annotation in tree["annotations"])
    return SplitFile(
        dataset=dataset,
        file=file,
        folder=split.folder,
        images=len(tree["images"]),
        empty=len(tree["images"]) - len({annotation["image_id"] for annotation in tree["annotations"]}),
        boxes={name: counts[number] for number, name in name_of.items()},
        crowds=sum(bool(annotation.get("iscrowd")) for annotation in tree["annotations"]),
    )


def _is_own_config(file: str) -> bool:
    """Return whether a file begins like those of `_config`."""
    if os.path.basename(file) != CONFIG:
        return False
    with open(file, encoding="utf-8", errors="replace") as text:
        return text.read(len(BEGINNING)) == BEGINNING


def _config(splits: dict[str, SplitFile]) -> str:
    """Return a YAML config that uses the splits for training and evaluation."""
    plain = {re.sub(r"\d{4}$", "", name): name for name in splits}
    test = next((plain[name] for name in EVALUATED if name in plain), None)
    train = plain.get("train") or plain.get("training") or plain.get("trainval") or plain.get(WHOLE)
    lines = [BEGINNING]
    lines += [f"    - {json.dumps([s.dataset, s.file, s.folder], ensure_ascii=False)}" for s in splits.values()]
    lines += [f"  TRAIN: [{splits[train].dataset}]" if train else "  TRAIN: []"]
    lines += [
        f"  TEST: [{splits[test].dataset}]" if test else "  TEST: [] # name a set here, or convert with --val-share"
    ]
    count = max(len(split.boxes) for split in splits.values())
    classes = "1 class" if count == 1 else f"{count} classes"
    lines += [f"# {classes}: NUM_CLASSES of the detector, such as MODEL.RETINANET.NUM_CLASSES", ""]
    return "\n".join(lines)
