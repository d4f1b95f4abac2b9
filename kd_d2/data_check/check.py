"""The complete check of datasets, with its results as text and JSON."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from ..class_names import ClassCount
from ..data.coco import CocoData, read_coco
from ..errors import UserError, printable
from ..files import write_json
from ..tables import markdown_table
from .files import find_repeated, find_unreadable
from .findings import Finding, find_between, find_in_set, find_wrong_class_count
from .sets import DataSet
from .statistics import PERCENTILES, SetStatistics, measure

FILE = "check.json"


@dataclass
class DataCheck:
    """Results of a check.

    Attributes:
        sets: readable datasets, with their annotations.
        statistics: statistics of each of these sets.
        findings: errors and warnings.
        checked_images: maximum number of images read per set; None for all.
    """

    sets: list[tuple[DataSet, CocoData]]
    statistics: list[SetStatistics]
    findings: list[Finding]
    checked_images: int | None

    @property
    def errors(self) -> list[Finding]:
        """Findings that break a training or invalidate its results."""
        return [finding for finding in self.findings if finding.is_error]

    def summary(self) -> str:
        """Return the results as text."""
        parts = [_describe(dataset, s) for (dataset, _), s in zip(self.sets, self.statistics)]
        warnings = [finding for finding in self.findings if not finding.is_error]
        for title, findings in (("warnings", warnings), ("errors", self.errors)):
            if findings:
                lines = [f"- {finding.dataset}: {printable(finding.text)}" for finding in findings]
                parts.append("\n".join([f"{title}:", *lines]))
        read = "all images" if self.checked_images is None else f"up to {self.checked_images} images of each set"
        parts.append(
            f"Found in annotations, file contents and {read}: {len(self.errors)} error(s), {len(warnings)} warning(s)"
        )
        return "\n\n".join(parts)

    def as_tree(self) -> dict[str, Any]:
        """Return the results as a JSON-serializable dictionary."""
        sets = [asdict(dataset) | asdict(s) for (dataset, _), s in zip(self.sets, self.statistics)]
        findings = [asdict(finding) for finding in self.findings]
        return {"sets": sets, "findings": findings, "checked_images": self.checked_images, "percentiles": PERCENTILES}

    def save(self, folder: str) -> None:
        """Write `check.json`."""
        write_json(os.path.join(folder, FILE), self.as_tree())


def check_sets(
    sets: list[DataSet],
    images: int | None = 200,
    *,
    skips_unusable: bool = False,
    predicted: ClassCount | None = None,
) -> DataCheck:
    """Check datasets in COCO format, each by itself and against the first training set.

    Args:
        sets: datasets, training sets first.
        images: number of images to read per set; None for all.
        skips_unusable: whether the training skips unreadable images, which makes them warnings in training sets.
        predicted: the number of classes that the detector predicts; None if unknown.
    """
    read: list[tuple[DataSet, CocoData]] = []
    findings: list[Finding] = []
    for dataset in sets:
        try:
            data = read_coco(
                dataset.json_file,
                dataset.folder,
                annotated=dataset.annotated,
                masks=dataset.masks,
                keypoints=dataset.keypoints > 0,
            )
            read.append((dataset, data))
        except UserError as error:
            findings.append(Finding(True, dataset.name, str(error)))
    statistics = [measure(data) for _, data in read]
    for (dataset, data), counts in zip(read, statistics):
        findings += find_in_set(dataset, data, counts)
        findings += find_unreadable(dataset, data, images, skips_unusable and dataset.role == "train")
    annotated = [(*entry, counts) for entry, counts in zip(read, statistics) if entry[0].annotated]
    for dataset, data, counts in annotated[1:]:
        first, first_data, first_counts = annotated[0]
        findings += find_between(first.name, first_data, dataset.name, data, (first_counts, counts))
    findings += find_wrong_class_count(read, predicted)
    findings += find_repeated(read)
    return DataCheck(read, statistics, findings, images)


def _describe(dataset: DataSet, statistics: SetStatistics) -> str:
    crowds = f", {statistics.crowds} crowds" if statistics.crowds else ""
    sizes = ", ".join(f"{width} x {height} ({count})" for width, height, count in statistics.image_sizes)
    head = (
        f"{dataset.role}: {dataset.name}, {dataset.json_file}\n{statistics.images} images, {statistics.empty} of them without "
        f"annotations; {statistics.boxes} boxes{crowds}; most frequent sizes: {sizes}"
    )
    rows = [[printable(c.name), c.boxes, c.small, c.medium, c.large, c.images] for c in statistics.classes]
    classes = markdown_table(["class", "boxes", "small", "medium", "large", "images"], rows)
    measured = [[name, *(f"{value:.4g}" for value in values)] for name, values in statistics.percentiles.items()]
    headers = ["", "min", *(f"{p} %" for p in PERCENTILES[1:-1]), "max"]
    return "\n\n".join([head, classes, markdown_table(headers, measured)])
