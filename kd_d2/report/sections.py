"""The sections of a page, each read from the folder that one of the programs wrote."""

from __future__ import annotations

import glob
import json
import math
import os
from typing import Any

import yaml

from ..errors import UserError
from ..sweep import Matrix
from ..sweep.plots import plot_ap, plot_curves
from ..sweep.report import first_curves, read_costs
from ..sweep.runner import read_curves, read_metrics, read_versions
from ..sweep.table import HEADERS, build_rows, format_row, read_results
from .page import Listing, Picture, Section, Table

SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CLASS_COLUMNS = 4
SIZES = ("all", "small", "medium", "large")


def comparison_section(matrix: Matrix, results_folder: str, scratch: str) -> Section:
    """Table, plots and settings of a comparison.

    Args:
        scratch: a folder for the plots.

    Raises:
        UserError: no cell of the matrix is finished.
    """
    results = read_results(matrix, results_folder)
    if not results:
        raise UserError(f"--results: {results_folder} has no finished cell of the matrix.")
    rows = [format_row(row) for row in build_rows(matrix, results, read_costs(results_folder) or {})]
    kept = [i for i in range(len(HEADERS)) if any(row[i] for row in rows)]
    table = Table([HEADERS[i] for i in kept], [[row[i] for i in kept] for row in rows])
    table.caption = (
        f"Mean and standard deviation over seeds. gain: over {_title(matrix, matrix.baseline)}; > 2 sd: whether it is more than two "
        "pooled standard deviations; gap closed: share of the way from the plain student to the teacher. Parameters, GFLOPs and "
        "ms / image are the detector's own at inference; s / iteration and memory the training's."
    )
    section = Section("Comparison", (), [table])
    ap, curves = (os.path.join(scratch, name) for name in ("ap.png", "curves.png"))
    plot_ap(build_rows(matrix, results, {}), ap)
    section.blocks.append(Picture(ap, "AP and AP50 by method; a dot is a seed, the dashed line the teacher."))
    plot_curves(first_curves(matrix, results), curves)
    if os.path.isfile(curves):
        section.blocks.append(Picture(curves, "AP and losses over the iterations, the first seed of each."))
    for name, of_cell in results.items():
        settings = {key: of_cell[0][key] for key in ("settings", "versions") if of_cell[0].get(key)}
        section.blocks.append(Listing(f"Settings: {_title(matrix, name)}", _as_yaml(settings)))
    return section


def _title(matrix: Matrix, name: str) -> str:
    return next((cell.title for cell in matrix.cells if cell.name == name), name)


def run_section(folder: str, scratch: str) -> Section:
    """Scores, classes, curves, cost and config of a training.

    Raises:
        UserError: the folder is no training's.
    """
    config = os.path.join(folder, "config.yaml")
    metrics = read_metrics(folder)
    if not os.path.isfile(config) or not metrics:
        raise UserError(
            f"--run: {folder} has no config.yaml and metrics.json, which a training by train_net.py leaves."
        )
    name = "/".join(os.path.abspath(folder).split(os.sep)[-2:])
    section = Section(f"Training {name}", [_cost_sentence(metrics)])
    for dataset, results in _results_by_dataset(folder).items():
        section.blocks += _score_tables(results, dataset)
    curves = os.path.join(scratch, f"run-{len(os.listdir(scratch))}.png")
    plot_curves({name: read_curves(metrics)}, curves)
    if os.path.isfile(curves):
        section.blocks.append(Picture(curves, "AP and losses over the iterations."))
    with open(config, encoding="utf-8") as file:
        section.blocks.append(Listing("config.yaml", file.read()))
    made_with = read_versions(folder)
    if made_with:
        section.blocks.append(Listing("Versions", _as_yaml(made_with)))
    return section


def _cost_sentence(metrics: list[dict[str, Any]]) -> str:
    last = max((row["iteration"] for row in metrics if "total_loss" in row), default=-1) + 1
    seconds = sorted(row["time"] for row in metrics if "time" in row)
    memory = max((row["peak_memory_mib"] for row in metrics if "peak_memory_mib" in row), default=None)
    parts = [f"{last} iterations"]
    parts += [f"{seconds[len(seconds) // 2]:.2f} s an iteration (median)"] if seconds else []
    parts += [f"peak memory {memory:.0f} MiB"] if memory is not None else []
    return ", ".join(parts) + "."


def _results_by_dataset(folder: str) -> dict[str, dict]:
    """What the evaluation at the end of a training gave; the name is empty where there is one data set."""
    path = os.path.join(folder, "train.json")
    if not os.path.isfile(path):
        return {}
    with open(path) as file:
        results = json.load(file)
    return {"": results} if "bbox" in results else {name: r for name, r in results.items() if isinstance(r, dict)}


def _score_tables(results: dict[str, dict[str, float]], dataset: str) -> list[Table]:
    tables = []
    for task, scores in results.items():
        if not isinstance(scores, dict):
            continue
        of = " ".join(part for part in (task, dataset) if part)
        overall = [name for name in SUMMARY if name in scores]
        tables.append(Table(["", *overall], [[of, *(_points(scores[name]) for name in overall)]]))
        classes = [(name.removeprefix("AP-"), value) for name, value in scores.items() if name.startswith("AP-")]
        classes.sort(key=lambda entry: -entry[1] if not math.isnan(entry[1]) else math.inf)
        if classes:
            tables.append(_in_columns([(name, _points(value)) for name, value in classes], f"{of} AP by class."))
    return tables


def _in_columns(entries: list[tuple[str, str]], caption: str) -> Table:
    """Names with their values, down one pair of columns after the other."""
    height = -(-len(entries) // CLASS_COLUMNS)
    padded = entries + [("", "")] * (-len(entries) % height)
    columns = [padded[start : start + height] for start in range(0, len(padded), height)]
    rows = [[text for pair in row for text in pair] for row in zip(*columns, strict=True)]
    return Table(["class", "AP"] * len(columns), rows, caption)


def errors_section(folder: str) -> Section:
    """What tools/error_analysis.py wrote."""
    tree = _read_json(folder, "errors.json", "--errors", "tools/error_analysis.py")
    stages = list(next(iter(tree.values()))["overall"]["all"])
    rows = [
        [f"{title}, {size}", *(_share(areas["overall"][size][stage]) for stage in stages)]
        for size in SIZES
        for title, areas in tree.items()
    ]
    section = Section(
        "Error types",
        [
            "The area under the precision-recall curve, each stage forgiving more than the one before: IoU 0.75 (C75), 0.5 (C50) and "
            "0.1 (Loc), confusions with a class of the same super-category (Sim) and with any class (Oth), detections of background "
            "(BG), and misses (FN)."
        ],
        [Table(["model, size of objects", *stages], rows)],
    )
    section.blocks += _pictures(
        folder,
        {
            "curves.png": "All classes.",
            "costs.png": "What each kind of error costs, by object size.",
            "sizes.png": "Small, medium and large objects.",
        },
    )
    rows = [
        [f"{name}, {title}", *(_share(areas["classes"][name]["all"][stage]) for stage in stages)]
        for name in next(iter(tree.values()))["classes"]
        for title, areas in tree.items()
    ]
    section.blocks.append(Table(["class, model", *stages], rows, "By class, objects of all sizes."))
    return section


def robustness_section(folder: str) -> Section:
    """What tools/robustness.py wrote."""
    tree = _read_json(folder, "summary.json", "--robustness", "tools/robustness.py")
    section = Section(
        "Robustness",
        [
            "Performance on corrupted images: mPC is the mean over corruptions of the mean over severities, rPC is mPC / clean "
            "(Michaelis et al. 2019)."
        ],
    )
    columns = {f"{title}, {metric}": of[metric] for metric in ("AP", "AP50") for title, of in tree.items()}
    names = next(iter(columns.values()))
    rows = [[name.replace("_", " "), *(_points(scores[name]) for scores in columns.values())] for name in names]
    section.blocks.append(Table(["", *columns], rows, "Of each corruption the mean over severities."))
    section.blocks += _pictures(
        folder,
        {"robustness.png": "AP over severity.", "corruptions.png": "An image in every corruption, at severity 3."},
    )
    return section


def features_section(folder: str) -> Section:
    """What tools/feature_analysis.py wrote."""
    tree = _read_json(folder, "features.json", "--features", "tools/feature_analysis.py")
    section = Section("Features", [f"Means over {tree['images']} images."])
    section.blocks.append(
        Table(
            ["model", "stride", "horizontal", "vertical", "mean"],
            [
                [r["model"], str(r["stride"]), *(_share(r[key]) for key in ("horizontal", "vertical", "mean"))]
                for r in tree["correlations"]
            ],
            "Correlation of neighbouring features.",
        )
    )
    if tree["distances"]:
        kinds = [key for key in tree["distances"][0] if key not in ("model", "stride")]
        section.blocks.append(
            Table(
                ["model", "stride", *kinds],
                [[r["model"], str(r["stride"]), *(_share(r[kind]) for kind in kinds)] for r in tree["distances"]],
                "How far the students' maps are from the teacher's: |s - t|² / |t|², correlation over positions, mean absolute "
                "difference and SSIM loss of maps scaled to [0, 1], SSIM's components (1: as the teacher's), range over the teacher's.",
            )
        )
    section.blocks += _pictures(folder, {"neighbours.png": "Features against their right neighbours."})
    section.blocks += _all_pictures(os.path.join(folder, "differences"), "Where the students differ from the teacher: ")
    section.blocks += _all_pictures(os.path.join(folder, "channels"), "Channels side by side: ")
    return section


def detections_section(folder: str) -> Section:
    """What tools/compare_detections.py wrote."""
    tree = _read_json(folder, "differences.json", "--detections", "tools/compare_detections.py")
    first, second = tree["compared"]
    total = tree["total"]
    intro = (
        f"{second} finds {total['gained']} objects that {first} does not, and misses {total['lost']} that it finds; below are the "
        "images where they differ most. Gained objects are green, lost ones red."
    )
    return Section("Detections", [intro], _all_pictures(folder, pattern="[0-9][0-9]-*.png"))


def pictures_section(title: str, path: str, option: str) -> Section:
    """The pictures of a folder, or one."""
    pictures = [Picture(path)] if os.path.isfile(path) else _all_pictures(path)
    if not pictures:
        raise UserError(f"{option}: {path} has no pictures.")
    return Section(title, (), pictures)


def _read_json(folder: str, name: str, option: str, program: str) -> dict:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise UserError(f"{option}: {folder} has no {name}, which {program} writes.")
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _pictures(folder: str, captions: dict[str, str]) -> list[Picture]:
    paths = {os.path.join(folder, name): caption for name, caption in captions.items()}
    return [Picture(path, caption) for path, caption in paths.items() if os.path.isfile(path)]


def _all_pictures(folder: str, caption: str = "", pattern: str = "*.png") -> list[Picture]:
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
    return [Picture(path, caption + os.path.basename(path)) for path in paths]


def _as_yaml(tree: dict) -> str:
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120)


def _points(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
