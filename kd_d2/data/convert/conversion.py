"""A dataset converted: one COCO json a split, a config that names them, and what was counted and left out."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, fields

from tabulate import tabulate

from ...errors import UserError, printable
from ...files import check_output_folder, write_json, write_text
from .formats import Format, find_format
from .source import WHOLE, ConvertOptions, Source
from .trees import Split, share_out

CONFIG = "datasets.yaml"
EVALUATED = ("val", "valid", "validation", "minival", "dev", "test", "testing")
"""Splits that are evaluated, the first that is there; with the year that COCO puts behind it."""


@dataclass
class SplitFile:
    """A split that was written.

    Attributes:
        dataset: its name in DATASETS.
        file, folder: the json, and what its images' names are relative to.
        images, empty: how many images, and how many of them without boxes.
        boxes: by class, in order of category id.
        crowds: how many boxes have iscrowd set.
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
    """What was converted.

    Attributes:
        title: of the format.
        splits: by name.
        notes: what was left out or read otherwise than it is written, a sentence a kind.
        config: the file with the lines that use the splits.
    """

    title: str
    splits: dict[str, SplitFile]
    notes: list[str]
    config: str

    def summary(self) -> str:
        """All of it as text."""
        lines = []
        for name, split in self.splits.items():
            boxes = sum(split.boxes.values())
            crowds = f", {split.crowds} of them crowds" if split.crowds else ""
            lines.append(
                f"{name}: {split.images} images, {split.empty} of them without boxes; {boxes} boxes{crowds}: {split.file}"
            )
        classes = list(dict.fromkeys(label for split in self.splits.values() for label in split.boxes))
        rows = [[printable(label), *(split.boxes.get(label, 0) for split in self.splits.values())] for label in classes]
        align = ["left", *["right"] * len(self.splits)]
        table = tabulate(rows, [f"{self.title}: class", *self.splits], "github", disable_numparse=True, colalign=align)
        with open(self.config, encoding="utf-8") as file:
            config = f"{self.config} has the lines that use them; add it to the _BASE_ of a config:\n\n{file.read().rstrip()}"
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
    """Write a dataset as COCO json, one file a split; its images stay where they are.

    Args:
        folder: images and labels.
        output: folder of the json files and of `datasets.yaml`.
        format: one of FORMATS; None to find out.
        options: how it is read.
        overwrite: replace files of an earlier conversion.

    Raises:
        UserError: something is broken or ambiguous; nothing is written then.
    """
    options = options or ConvertOptions()
    source = Source(os.path.abspath(folder), options, without=os.path.abspath(output))
    form = find_format(source, format)
    _check_options(options, form)
    splits = form.read(source)
    if options.val_share:
        splits = share_out(splits, options.val_share, source)
    for name in splits:  # which become those of files
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise UserError(f"IN: a split is called {name!r}; it must be a name of letters, digits, '_', '-' and '.'.")
    files = {name: os.path.join(os.path.abspath(output), f"{name}.json") for name in splits}
    config = os.path.join(os.path.abspath(output), CONFIG)
    for file in (*files.values(), config):
        if os.path.lexists(file) and not overwrite:
            raise UserError(f"OUT: {file} is there already: choose another folder, or pass --overwrite.")
    check_output_folder(output, "OUT")
    for name, split in splits.items():
        write_json(files[name], split.tree, indent=None)
    title = re.sub(r"\W+", "_", os.path.basename(source.folder)).strip("_").lower() or "data"
    written = {name: _describe(f"{title}_{name}", files[name], split) for name, split in splits.items()}
    write_text(config, _config(written))
    return Conversion(form.title, written, source.notes.sentences(), config)


def _check_options(options: ConvertOptions, form: Format) -> None:
    for field in fields(options):
        if getattr(options, field.name) != field.default and field.name not in form.options:
            raise UserError(f"--{field.name.replace('_', '-')} changes nothing for {form.title}: leave it out.")
    if options.unlabelled == "keep" and options.drop_broken:
        raise UserError(
            "--unlabelled keep and --drop-broken exclude each other: an image whose labels cannot be read would count as one without "
            "objects."
        )


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


def _config(splits: dict[str, SplitFile]) -> str:
    """Lines of yaml that train on the splits."""
    plain = {re.sub(r"\d{4}$", "", name): name for name in splits}
    test = next((plain[name] for name in EVALUATED if name in plain), None)
    train = plain.get("train") or plain.get("training") or plain.get("trainval") or plain.get(WHOLE)
    lines = ["DATASETS:", "  COCO_JSON:"]
    lines += [f"    - {json.dumps([s.dataset, s.file, s.folder], ensure_ascii=False)}" for s in splits.values()]
    lines += [f"  TRAIN: [{splits[train].dataset}]" if train else "  TRAIN: []"]
    lines += [
        f"  TEST: [{splits[test].dataset}]" if test else "  TEST: [] # name a set here, or convert with --val-share"
    ]
    count = max(len(split.boxes) for split in splits.values())
    classes = "1 class" if count == 1 else f"{count} classes"
    lines += [f"# {classes}: NUM_CLASSES of the detector, such as MODEL.RETINANET.NUM_CLASSES", ""]
    return "\n".join(lines)
