"""Attacks on the package: hostile files for every reader, kills at random moments, and full disks.

    python tests/attacks.py files [--tries 2000] [--readers config image ...]
    python tests/attacks.py kills [--tries 100]
    python tests/attacks.py ranks [--tries 40]
    python tests/attacks.py disk [--tries 20]

Each prints rows of a Markdown table: attack, tries and harmful cases. The same --seed gives the same files and moments.
Harmful cases are printed too, and harmful files are kept in the folder --keep.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_d2 import UserError
from kd_d2.analysis import load_analysis
from kd_d2.checkpoint import read_checkpoint
from kd_d2.config import load_config
from kd_d2.data.coco_json import check_coco_json
from kd_d2.data.convert import ConvertOptions, convert
from kd_d2.data.images import CheckedMapper
from kd_d2.engine import KDTrainer
from kd_d2.prediction import find_images
from kd_d2.report.sections import run_section
from kd_d2.sweep import read_matrix
from kd_d2.sweep.table import read_results

import numpy as np
import torch
import yaml
from detectron2.data import DatasetMapper
from helpers import Project, make_project, run_train_net, train
from PIL import Image

SECONDS, MEMORY = 10, 2 * 2**30
HARM = ("ran code", "traceback", "over 10 s", "over 2 GiB", "ended the process")


@dataclass
class Reader:
    """A reader of files.

    Args:
        good: valid files, which are mutated.
        read: function that reads a file.
        hostile: handmade files.
    """

    name: str
    good: list[bytes]
    read: Callable[[Path], object]
    hostile: list[bytes] = field(default_factory=list)
    suffix: str = ""


VALUES: list[Any] = [
    None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**400, "", "a" * 10_000, "../../../etc/passwd", "\x00", "<script>", "\x1b[31m",
    "!!python/object/apply:os.system", [], {}, [[]], {"a": {"a": {}}}, "2026-01-01", "1e999", [1] * 1000,
]  # fmt: skip


def mutated_tree(tree: Any, draw: random.Random) -> Any:
    """Return a copy of the tree with one to three values changed, removed, renamed or repeated."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        parent, key = None, None
        node = tree
        while isinstance(node, dict | list) and node and (parent is None or draw.random() < 0.8):
            parent, key = node, draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = node[key]
        if parent is None:
            return draw.choice(VALUES)
        action = draw.choice(("change", "remove", "rename"))
        if action == "change":
            parent[key] = draw.choice(VALUES)
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent["".join(draw.choices(string.printable, k=6))] = parent.pop(key)
        else:
            parent.append(copy.deepcopy(node))
    return tree


def mutated_bytes(good: bytes, draw: random.Random) -> bytes:
    """Return the bytes with some removed, inserted or changed, often at the beginning, which identifies the format."""
    found = bytearray(good)
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(max(1, min(len(found), draw.choice((64, 1024, len(found) or 1)))))
        action = draw.choice(("change", "insert", "cut", "end"))
        if action == "change" and found:
            found[place] = draw.randrange(256)
        elif action == "insert":
            found[place:place] = draw.randbytes(draw.randint(1, 8))
        elif action == "cut":
            del found[place : place + draw.randint(1, 64)]
        elif draw.random() < 0.3:
            del found[place:]
    return bytes(found)


def mutated(good: bytes, suffix: str, draw: random.Random) -> bytes:
    if suffix in (".json", ".yaml") and draw.random() < 0.7:
        tree = mutated_tree(json.loads(good) if suffix == ".json" else yaml.safe_load(good), draw)
        with contextlib.suppress(ValueError, yaml.YAMLError):
            return (json.dumps(tree) if suffix == ".json" else yaml.safe_dump(tree)).encode("utf-8", "surrogatepass")
    return mutated_bytes(good, draw)


class Evil:
    """Creates the folder `ran` in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def image_bytes(size: tuple[int, int] = (40, 30), form: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, form, **options)
    return stream.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    text = chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(b"\x00" * 2**26))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + text
        + chunk(b"IDAT", zlib.compress(b"\x00" * 1000))
        + chunk(b"IEND", b"")
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) (w) file closefile showpage\n%%EOF\n"
YAML_BOMB = "a: &a [x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefghi", "bcdefghij", strict=True)
)


ENTITIES = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
XML_BOMB = f'<!DOCTYPE a [<!ENTITY l0 "ha">{ENTITIES}]><annotation><filename>&l11;</filename></annotation>'.encode()
VOC = b"""<annotation><filename>a.jpg</filename><size><width>40</width><height>30</height></size><object><name>x</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"""
CVAT = b"""<annotations><image name="a.jpg" width="40" height="30"><box label="x" xtl="1" ytl="2" xbr="9" ybr="9"/>
<polygon label="y" points="1,2;3,4;5,6"/></image></annotations>"""
LABELME = b"""{"imagePath": "a.jpg", "imageWidth": 40, "imageHeight": 30, "shapes":
[{"label": "x", "shape_type": "rectangle", "points": [[1, 2], [9, 9]], "group_id": 1}, {"label": "y", "points": [[1, 2], [3, 4], [5, 6]]}]}"""
OPEN_IMAGES = b"ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\na,x,0.1,0.5,0.2,1.0,0\na,y,0.1,0.5,0.2,1.0,1\n"
DATA_YAML = b"{path: ../here, train: images, val: images, names: {0: x, 1: y}, kpt_shape: [1, 3]}\n"
YOLO = b"0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2 0.1 0.1 2\n1 0.1 0.1 0.5 0.5 0.1 0.5\n"
LABELS = {
    "voc": ("a.xml", VOC), "cvat": ("a.xml", CVAT), "labelme": ("a.json", LABELME), "openimages": ("a.csv", OPEN_IMAGES),
    "yolo": ("images/a.txt", YOLO), "yolo's yaml": ("data.yaml", DATA_YAML),
}  # fmt: skip
"""File name and content of the labels of an image in `images`, by format; for YOLO also of the list of classes."""


def label_readers() -> list[Reader]:
    """Return readers of the formats of `kd-d2 convert` other than COCO; all other files of a dataset are valid."""

    def reader(title: str, name: str, good: bytes) -> Reader:
        def read(path: Path) -> object:
            folder = path.parent / "labels"
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "images").mkdir(parents=True)
            (folder / "images" / "a.jpg").write_bytes(image_bytes())
            for other in ("data.yaml", "images/a.txt") if title.startswith("yolo") else ():
                (folder / other).write_bytes(DATA_YAML if other == "data.yaml" else YOLO)
            shutil.copyfile(path, folder / name)
            before = set(os.listdir(path.parent))
            places = str(folder), str(path.parent / "out"), title.removesuffix("'s yaml")
            with contextlib.suppress(UserError):
                convert(*places, ConvertOptions(drop_broken=True), overwrite=True)
            result = convert(*places, overwrite=True)
            assert set(os.listdir(path.parent)) - before <= {"out"}, "a file outside of OUT"
            return result

        hostile = (
            [XML_BOMB, XML_BOMB.decode().encode("utf-16")]
            if name.endswith("xml")
            else [b"[" * 9999, YAML_BOMB.encode()]
        )
        return Reader(f"labels, {title}", [good], read, [*hostile, b"", b"\xff\xfe"], os.path.splitext(name)[1])

    return [reader(title, name, good) for title, (name, good) in LABELS.items()]


def make_readers(folder: Path) -> list[Reader]:
    """Return all readers, with valid files from a short training or made by hand."""
    project = make_project(folder / "project", SOLVER__MAX_ITER=2, SOLVER__STEPS=())
    train(project)
    (project.output / "config.yaml").write_text("SEED: 1\n")
    (project.output / "train.json").write_text(json.dumps({"bbox": {"AP": 1.0, "AP50": 2.0, "AP-red": 3.0}}))
    config = project.student.read_bytes()
    evil_yaml = b'SEED: !!python/object/apply:os.mkdir ["ran"]\n'
    annotations = project.annotations.read_bytes()
    weights = saved({"model": {"a.weight": torch.ones(3, 4), "b": torch.zeros(())}, "iteration": 3})
    pickled = pickle.dumps({"model": {"a": np.ones((2, 3)), "b": np.zeros(2)}, "__author__": "someone"})
    matrix = yaml.safe_dump(
        {"config": str(project.student), "baseline": "a", "cells": {"a": {"seeds": [0]}, "b": {"opts": {"SEED": 1}}}}
    )
    result = json.dumps(
        {
            "cell": "a",
            "seed": 0,
            "scores": {"AP": 1.0, "AP50": 2.0},
            "settings": {},
            "curves": {},
            "seconds_per_iteration": 1,
        }
    )
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", b"\x00" * 2**28)

    def read_image_file(path: Path) -> None:
        find_images([str(path)])
        entry = {"file_name": str(path), "image_id": 1, "annotations": []}
        CheckedMapper(DatasetMapper(load_config(str(project.student)), is_train=False))(entry)

    def read_config_file(path: Path) -> object:
        beside_teacher = project.folder / "hostile.yaml"
        shutil.copyfile(path, beside_teacher)
        return load_config(str(beside_teacher))

    def read_with(name: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
        """Return a function that puts the file into a training's output folder under `name` and reads the folder."""

        def call(path: Path) -> object:
            target = path.parent / "folder"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            for other in ("config.yaml", "metrics.json", "train.json"):
                shutil.copyfile(project.output / other, target / other)
            shutil.copyfile(path, target / name)
            return read(target)

        return call

    def report(folder: Path) -> object:
        with tempfile.TemporaryDirectory() as scratch:
            return run_section(str(folder), scratch)

    def read_cells(path: Path) -> object:
        shutil.copyfile(path, path.parent / "a-seed0.json")
        (path.parent / "cells.yaml").write_text(matrix)
        return read_results(read_matrix(str(path.parent / "cells.yaml")), str(path.parent))

    def read_analysis(folder: Path) -> object:
        (folder / "analysis.json").write_text('{"analysis": "rank-oracle"}')
        return load_analysis(str(folder)).tables()

    images = [image_bytes(form=form) for form in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")]
    return [
        Reader("config", [config], read_config_file, [evil_yaml, YAML_BOMB.encode(), b"SEED: " + b"[" * 9999, b"\xff\xfe"], ".yaml"),
        Reader("annotations", [annotations], lambda path: check_coco_json(str(path), str(project.annotations.parent / "images")),
               [b"[" * 100_000, b"{}", b'{"images": ' + b"9" * 5000 + b"}"], ".json"),
        Reader("image", images, read_image_file,
               [EPS, png_that_claims(20_000, 20_000), png_that_claims(2**31 - 1, 2**31 - 1), image_bytes((1, 60_000)), image_bytes((60_000, 1)),
                images[0][:20], b"", b"BM" + b"\xff" * 60], ".jpg"),
        Reader("checkpoint", [weights], lambda path: read_checkpoint(str(path)),
               [saved({"model": Evil()}), saved(Evil()), bomb.getvalue(), saved({"model": {"a": torch.eye(2).to_sparse()}}), pickle.dumps(Evil())], ".pth"),
        Reader("pickled checkpoint", [pickled], lambda path: read_checkpoint(str(path)), [pickle.dumps(Evil()), pickle.dumps({"model": {"a": Evil()}})], ".pkl"),
        Reader("sweep", [matrix.encode()], lambda path: read_matrix(str(path)), [evil_yaml, YAML_BOMB.encode()], ".yaml"),
        Reader("finished cell", [result.encode()], read_cells, [b"{}", b"[]", b"null"], ".json"),
        Reader("metrics of a report", [(project.output / "metrics.json").read_bytes()], read_with("metrics.json", report), [b"{}\n", b"[]\n", b"5\n"]),
        Reader("results of a report", [(project.output / "train.json").read_bytes()], read_with("train.json", report), [b"[]", b"null", b'{"bbox": 5}'], ".json"),
        Reader("analysis", [b'{"student": {"AP": 1.0, "AP50": 2.0, "AP75": null}}'], read_with("rank_oracle.json", read_analysis), [b"{}", b"[]"], ".json"),
        *label_readers(),
    ]  # fmt: skip


def attack_files(readers: list[Reader], tries: int, seed: int, keep: Path | None = None) -> list[str]:
    """Print for each reader how many files it was given and how many did harm; return the harmful cases."""
    harms = []
    print("| reader | files | read | refused in one sentence | " + " | ".join(HARM) + " |")
    print("|---" * (4 + len(HARM)) + "|")
    for reader in readers:
        outcomes = Counter()
        for number, outcome, detail in _outcomes(reader, tries, seed, keep):
            outcomes[outcome] += 1
            if outcome in HARM:
                harms.append(f"{reader.name} {number}: {outcome}: {detail}")
        counts = [sum(outcomes.values()), outcomes["read"], outcomes["refused"], *(outcomes[harm] for harm in HARM)]
        print("| " + " | ".join([reader.name, *map(str, counts)]) + " |", flush=True)
    return harms


def _outcomes(reader: Reader, tries: int, seed: int, keep: Path | None) -> Iterator[tuple[int, str, str]]:
    """Yield (number, outcome, detail) per file, read by child processes with limited memory; dead ones are replaced."""
    next_number = 0
    while next_number < tries:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            with contextlib.suppress(BaseException):
                _read_files(reader, range(next_number, tries), seed, keep, write_end)
            os._exit(0)
        os.close(write_end)
        with open(read_end, encoding="utf-8") as lines:
            for line in lines:
                number, outcome, detail = json.loads(line)
                next_number = number + 1
                yield number, outcome, detail
        _, status = os.waitpid(child, 0)
        if next_number < tries and status:
            yield next_number, "ended the process", f"wait status {status}"
            next_number += 1


def _read_files(reader: Reader, numbers: range, seed: int, keep: Path | None, write_end: int) -> None:
    logging.disable(logging.CRITICAL)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1), os.dup2(devnull, 2)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    signal.signal(signal.SIGALRM, _too_slow)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for number in numbers:
            draw = random.Random(f"{seed} {reader.name} {number}")
            content = (
                reader.hostile[number]
                if number < len(reader.hostile)
                else mutated(draw.choice(reader.good), reader.suffix, draw)
            )
            path = Path(scratch) / f"hostile{reader.suffix}"
            path.write_bytes(content)
            outcome, detail = _outcome(reader, path)
            if outcome in HARM and keep is not None:
                (keep / f"{reader.name.replace(' ', '-')}-{number}{reader.suffix}").write_bytes(content)
            os.write(write_end, (json.dumps([number, outcome, detail]) + "\n").encode())


def _too_slow(number: int, frame: object) -> None:
    raise TimeoutError


def _outcome(reader: Reader, path: Path) -> tuple[str, str]:
    signal.alarm(SECONDS)
    try:
        reader.read(path)
        outcome = "read", ""
    except UserError as error:
        outcome = ("refused", "") if "\n" not in str(error) else ("traceback", f"several lines: {error}"[:300])
    except TimeoutError:
        outcome = "over 10 s", ""
    except MemoryError:
        outcome = "over 2 GiB", traceback.format_exc().strip().splitlines()[-2]
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/kd_d2/" in f.filename]
        last = ours[-1] if ours else where
        outcome = "traceback", f"{type(error).__name__}: {str(error)[:120]} at {last.filename}:{last.lineno}"
    finally:
        signal.alarm(0)
    if Path("ran").exists():
        shutil.rmtree("ran", ignore_errors=True)
        return "ran code", ""
    return outcome


# ------------------------------------------------------------------------------------------ kills and full disks

LONG = {
    "SEED": 7, "SOLVER__MAX_ITER": 100_000, "SOLVER__STEPS": (), "SOLVER__BASE_LR": 0.00002, "SOLVER__CHECKPOINT_PERIOD": 5,
    "SOLVER__CHECKPOINTS_TO_KEEP": 3, "TEST__EVAL_PERIOD": 7,
}  # fmt: skip


def _train_and_count(project: Project, progress: int, log: int, limit: int | None = None) -> None:
    """Run the program in this process; it writes its last finished iteration to `progress`, and its output to `log`."""
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    step = KDTrainer.after_step

    def counted(self: KDTrainer) -> None:
        os.pwrite(progress, b"%-12d" % self.iter, 0)
        step(self)

    KDTrainer.after_step = counted
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    status = 0
    try:
        run_train_net("--config-file", project.student, "--resume")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def whole_files(output: Path) -> int:
    """Return the last iteration of the folder's checkpoints, or -1 if there are none.

    Raises:
        AssertionError: a file is incomplete.
    """
    iterations = [-1]
    for path in output.glob("*.pth"):
        content = read_checkpoint(str(path))
        assert content.keys() >= {"model", "distillers", "trainer", "iteration"}, path
        iterations.append(content["iteration"])
    tag = output / "last_checkpoint"
    assert not tag.exists() or (output / tag.read_text()).is_file(), tag
    for name in ("student.yaml", "versions.json", "train.json"):
        assert not (output / name).exists() or (output / name).read_text().endswith("\n"), name
    return max(iterations)


def attack_kills(folder: Path, tries: int, seed: int) -> list[str]:
    """Print how many kills of single-process trainings lost a file or too many iterations; return these cases."""
    draw, all_harms = random.Random(seed), []
    for number in (signal.SIGKILL, signal.SIGTERM):
        project, harms, lost = make_project(folder / f"killed-{number}", **LONG), [], []
        progress = os.open(folder / f"progress-{number}", os.O_RDWR | os.O_CREAT)
        for attempt in range(tries // 2):
            before = whole_files(project.output) if project.output.is_dir() else -1
            os.pwrite(progress, b"%-12d" % before, 0)
            log = os.open(project.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            child = os.fork()
            if child == 0:
                _train_and_count(project, progress, log)
            os.close(log)
            time.sleep(draw.uniform(0.05, 4))
            os.kill(child, number)
            status = os.waitpid(child, 0)[1]
            finished = int(os.pread(progress, 12, 0))
            try:
                after = whole_files(project.output) if project.output.is_dir() else -1
                lost.append(finished - after)
                allowed = 0 if number == signal.SIGTERM else LONG["SOLVER__CHECKPOINT_PERIOD"]
                assert before <= after and finished - after <= allowed, f"{finished} finished, checkpoint of {after}"
                trained = finished > before
                assert number == signal.SIGKILL or not trained or os.waitstatus_to_exitcode(status) == 143, (
                    f"status {status}"
                )
                assert "Traceback" not in (project.folder / "log").read_text(errors="replace"), "traceback"
            except Exception as error:
                harms.append(f"{attempt}: {type(error).__name__}: {error}")
        name = signal.Signals(number).name
        print(
            f"| {name} at random moments, one process | {tries // 2} | {len(harms)} | most iterations lost: {max(lost)} |",
            flush=True,
        )
        all_harms += harms
    return all_harms


COUNTER = """
import os
from detectron2.utils import comm
from kd_d2.engine import KDTrainer

step = KDTrainer.after_step

def counted(self):
    if comm.is_main_process():
        with open(os.environ["PROGRESS"], "r+b") as file:
            file.write(b"%-12d" % self.iter)
    step(self)

KDTrainer.after_step = counted
"""
"""An extension (--import) that writes the last finished iteration to a file."""


def attack_ranks(folder: Path, tries: int, seed: int) -> list[str]:
    """Print how many kills of two-process trainings, or of one rank, lost too many iterations; return these cases."""
    draw, all_harms = random.Random(seed), []
    progress, counter = folder / "progress", folder / "counter.py"
    counter.write_text(COUNTER)
    for number in (signal.SIGKILL, signal.SIGTERM):
        project, harms, lost = make_project(folder / f"ranks-{number}", **LONG), [], []
        program = [sys.executable, "-m", "kd_d2", "train", str(project.student), "--resume", "--num-gpus", "2"]
        command = [*program, "--import", str(counter), "MODEL.DEVICE", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PROGRESS": str(progress)}
        for attempt in range(tries // 2):
            before = whole_files(project.output) if project.output.is_dir() else -1
            progress.write_bytes(b"%-12d" % before)
            with open(project.folder / "log", "wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            if draw.random() < 0.7:  # startup takes most of the time
                while process.poll() is None and int(progress.read_bytes()) == before:
                    time.sleep(0.05)
                time.sleep(draw.uniform(0, 3))
            else:
                time.sleep(draw.uniform(0.05, 8))
            ranks = _ranks_of(process.pid)
            target = draw.choice([process.pid, *ranks])
            os.kill(target, number)
            try:
                status = process.wait(timeout=120)
                _wait_for_end(ranks)
                finished, after = int(progress.read_bytes()), whole_files(project.output)
                lost.append(finished - after)
                allowed = 0 if number == signal.SIGTERM else LONG["SOLVER__CHECKPOINT_PERIOD"]
                assert before <= after and finished - after <= allowed, f"{finished} finished, checkpoint of {after}"
                expected = {signal.SIGTERM: 143, signal.SIGKILL: -9 if target == process.pid else 2}[number]
                assert finished == before or status == expected, f"status {status}, not {expected}"
                assert b"Traceback" not in (project.folder / "log").read_bytes(), "traceback"
            except Exception as error:
                process.kill()
                harms.append(f"{attempt}: {type(error).__name__}: {error}")
        name = signal.Signals(number).name
        print(
            f"| {name} at random moments, two processes, to the program or to a rank | {tries // 2} | {len(harms)} | most iterations lost: "
            f"{max(lost, default=0)} |",
            flush=True,
        )
        all_harms += harms
    return all_harms


def _ranks_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _wait_for_end(pids: list[int], seconds: float = 60) -> None:
    """Wait until the processes, which may have lost their parent, have ended."""
    end = time.monotonic() + seconds
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"ranks {alive} go on"
        time.sleep(0.1)


def attack_disk(folder: Path, tries: int, seed: int) -> list[str]:
    """Print how many trainings with a random file size limit left a partial file or no message; return these cases."""
    draw, harms = random.Random(seed), []
    for attempt in range(tries):
        project = make_project(folder / f"disk-{attempt}", **{**LONG, "SOLVER__MAX_ITER": 12})
        limit = int(10 ** draw.uniform(2, 6.5))
        progress = os.open(folder / f"progress-{attempt}", os.O_RDWR | os.O_CREAT)
        read_end, write_end = os.pipe()  # not a file, which could not grow beyond the limit
        child = os.fork()
        if child == 0:
            _train_and_count(project, progress, write_end, limit)
        os.close(write_end)
        with open(read_end, errors="replace") as log:
            said = log.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            whole_files(project.output)
            assert status in (0, 2), f"limit {limit}: status {status}: {said[-1500:]}"
            assert "Traceback" not in said, f"limit {limit}: traceback: {said[said.index('Traceback') :][-600:]}"
        except Exception as error:
            harms.append(f"{attempt}: {type(error).__name__}: {error}")
    print(f"| files that cannot grow beyond a random size | {tries} | {len(harms)} | |", flush=True)
    return harms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="attack", required=True)
    files = commands.add_parser("files")
    files.add_argument("--tries", type=int, default=2000, help="files of each reader")
    files.add_argument("--readers", nargs="+")
    files.add_argument("--keep", type=Path, help="folder of the files that harmed")
    commands.add_parser("kills").add_argument("--tries", type=int, default=100)
    commands.add_parser("ranks").add_argument("--tries", type=int, default=40)
    commands.add_parser("disk").add_argument("--tries", type=int, default=20)
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.attack == "files":
            if args.keep:
                args.keep.mkdir(parents=True, exist_ok=True)
            readers = make_readers(Path(folder))
            chosen = [reader for reader in readers if not args.readers or reader.name in args.readers]
            harms = attack_files(chosen, args.tries, args.seed, args.keep)
        else:
            attack = {"kills": attack_kills, "ranks": attack_ranks, "disk": attack_disk}[args.attack]
            harms = attack(Path(folder), args.tries, args.seed)
    if harms:
        sys.exit("\n".join(harms[:20]))


if __name__ == "__main__":
    main()
