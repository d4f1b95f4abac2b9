"""Measure the speed and size of trained and exported detectors on the same images.

kd-d2 benchmark --model [TITLE=]CONFIG_OR_RUN [WEIGHTS] [--model EXPORTED ...] [--images FILE_OR_FOLDER ...] [KEY VALUE ...]

EXPORTED is a file of kd-d2 export. The detectors run in turns, one image at a time, so that other load on the machine
affects all of them; "relative" is the time relative to that of the first one. Times include the NMS, but not the
reading of files. The number of CPU threads is OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse

from ..arguments import add_import_argument, add_model_argument
from ..errors import UserError, check_at_least
from ..extensions import import_extensions
from ..model_paths import ModelPath, format_of, read_model_paths
from .log import print_log

IMAGES = 16
RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torchscript": "TorchScript"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser, "one or more, which may be files of kd-d2 export")
    parser.add_argument(
        "--images",
        nargs="+",
        help=f"images and folders of images, of which {IMAGES} are used (default: those of DATASETS.TEST of the first config)",
    )
    parser.add_argument(
        "--rounds", type=int, default=20, metavar="N", help="how often each image is processed (default 20)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="copies of an image in a batch; exported files take one at a time",
    )
    parser.add_argument("--output", metavar="FILE.json", help="write the numbers to this file too")
    add_import_argument(parser)


def run(args: argparse.Namespace) -> None:
    from ..benchmark import as_json, benchmark, machine, table
    from ..data import read_image
    from ..files import write_json

    print_log()
    import_extensions(args.imports)
    check_at_least("--rounds", args.rounds, 1)
    check_at_least("--batch", args.batch, 1)
    paths = read_model_paths(args.model, may_be_exported=True)
    if args.opts and all(path.exported for path in paths):
        raise UserError(f"All models are exported, on which the override {args.opts[0]} has no effect.")
    files = _images(args.images, paths, args.opts)
    candidates = [_candidate(path, args.opts) for path in paths]
    formats = {candidate.detector.input_format for candidate in candidates}
    images = {name: [read_image(file, name) for file in files] for name in formats}
    speeds = benchmark(candidates, images, args.rounds, args.batch)
    facts = machine()
    print(
        f"{table(speeds)}\n\n{len(files)} images, {args.rounds} rounds; {facts['processor']}, threads: {facts['threads']}, PyTorch {facts['torch']}"
    )
    if args.output:
        write_json(args.output, as_json(speeds, facts))


def _images(named: list[str] | None, paths: list[ModelPath], opts: list[str]) -> list[str]:
    from ..config import load_config
    from ..data import evenly_spaced
    from ..export.images import dataset_files
    from ..prediction import find_images

    if named:
        return list(evenly_spaced(find_images(named), IMAGES))
    path = next((path for path in paths if not path.exported), None)
    if path is None:
        raise UserError("Name images with --images: exported models name no dataset.")
    cfg = load_config(path.config, opts, student_only=True, needs_weights=False)
    files = dataset_files(cfg, "TEST", IMAGES)
    if not files:
        raise UserError(f"Name images with --images: {path.config} has no dataset in DATASETS.TEST that can be read.")
    return files


def _candidate(path: ModelPath, opts: list[str]):
    from ..benchmark import Candidate
    from ..config import load_config
    from ..export import load_exported_detector
    from ..predictor import Predictor

    if path.exported:
        weights = (
            (path.exported, path.exported.removesuffix(".xml") + ".bin")
            if path.exported.endswith(".xml")
            else (path.exported,)
        )
        return Candidate(path.title, RUNTIMES[format_of(path.exported)], load_exported_detector(path.exported), weights)
    cfg = load_config(path.config, [*path.overrides, *opts], student_only=True, needs_data=False)
    return Candidate(path.title, f"PyTorch, {cfg.MODEL.DEVICE}", Predictor(cfg))
