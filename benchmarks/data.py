#!/usr/bin/env python
"""Measure time and memory to load COCO-size annotations, and the throughput of data loading workers.

    benchmarks/data.py [--images 118000] [--boxes-per-image 7] [--workers 2] [--batches 20]

The annotations are synthetic, with one polygon each. The images are links to 64 different JPEGs of 640 x 480 pixels.
"resident" is the increase of the process's resident memory, "of its own" the private memory of a (forked) worker.
"""

import argparse
import json
import os
import random
import re
import tempfile
import time
from pathlib import Path

from kd_d2 import load_config
from kd_d2.data import build_stream_loader, register_coco_json

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate

SIZE = (640, 480)
FILES = 64
CLASSES = 80
MIB = 2**20


def write_set(folder: Path, images: int, boxes_per_image: int) -> Path:
    rng, pixels = random.Random(0), np.random.default_rng(0)
    for number in range(FILES):
        coarse = Image.fromarray(pixels.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        coarse.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"file{number}.jpg", quality=90)
    for number in range(images):
        os.link(folder / f"file{number % FILES}.jpg", folder / f"{number:012d}.jpg")

    def annotation(number: int) -> dict:
        x, y = rng.uniform(0, 500), rng.uniform(0, 350)
        w, h = rng.uniform(10, 639 - x), rng.uniform(10, 479 - y)
        outline = [round(v, 2) for _ in range(12) for v in (x + rng.random() * w, y + rng.random() * h)]
        return {
            "id": number + 1, "image_id": number // boxes_per_image, "category_id": rng.randrange(CLASSES) + 1, "iscrowd": 0,
            "bbox": [round(v, 2) for v in (x, y, w, h)], "area": round(w * h, 2), "segmentation": [outline],
        }  # fmt: skip

    data = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": SIZE[0], "height": SIZE[1]} for i in range(images)],
        "annotations": [annotation(number) for number in range(images * boxes_per_image)],
        "categories": [{"id": i + 1, "name": f"class{i}"} for i in range(CLASSES)],
    }
    (folder / "annotations.json").write_text(json.dumps(data))
    return folder / "annotations.json"


def memory(process: int | str, field: str) -> float:
    """Return the MiB of all fields of a process's memory that begin with `field`, such as Rss or Private."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return sum(map(int, re.findall(rf"^{field}\w*:\s+(\d+)", text, re.M))) * 1024 / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes-per-image", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_set(folder, args.images, args.boxes_per_image)
        options = [
            "DATASETS.COCO_JSON",
            [["made_up", str(file), name]],
            "DATASETS.TRAIN",
            ("made_up",),
            "DATASETS.TEST",
            (),
        ]
        options += ["DATALOADER.NUM_WORKERS", args.workers, "SOLVER.IMS_PER_BATCH", 16, "MODEL.DEVICE", "cpu"]
        cfg = load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", options)
        before, start = memory("self", "Rss"), time.perf_counter()
        register_coco_json(cfg)
        read = time.perf_counter()
        batches = iter(build_stream_loader(cfg, seed=0))
        next(batches)
        first = time.perf_counter()
        workers = [w.pid for w in getattr(batches, "_workers", [])]
        begin = time.perf_counter()
        for _ in range(args.batches):
            next(batches)
        seconds = time.perf_counter() - begin
        rows = [
            [
                f"annotations of {args.images} images, {args.images * args.boxes_per_image} boxes read and checked",
                f"{read - start:.1f} s",
            ],
            ["then until the first batch of 16", f"{first - read:.1f} s"],
            ["resident, the process", f"{memory('self', 'Rss') - before:.0f} MiB"],
            *[[f"of its own, worker {n}", f"{memory(pid, 'Private_'):.0f} MiB"] for n, pid in enumerate(workers)],
            [f"images a second, {args.workers} workers", f"{16 * args.batches / seconds:.1f}"],
        ]
        print(tabulate(rows, tablefmt="github"))


if __name__ == "__main__":
    main()
