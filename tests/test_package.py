"""The wheel: its contents, and training with a user's own method without a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, write_yaml
from test_readme import example

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # about a minute on an idle machine

# Every process that imports the method writes a list of the files that kd_d2 was imported from.
TELL = """
import atexit, json, os, sys
def tell():
    files = [str(m.__file__) for n, m in list(sys.modules.items()) if n.split(".")[0] == "kd_d2" and getattr(m, "__file__", None)]
    json.dump(files, open(os.path.join(os.environ["TELL"], f"{os.getpid()}.json"), "w"))
atexit.register(tell)
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy to build from, since a build leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("kd_d2", "configs", "projects", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.png", "*.json"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment with the wheel and all other packages of the current environment."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    bases = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (Path(site) / "base.pth").write_text("\n".join([*bases, sysconfig.get_path("platlib")]))
    return folder / "bin"


def test_what_the_wheel_holds(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = {f"kd_d2/{path.relative_to(ROOT / 'kd_d2')}" for path in (ROOT / "kd_d2").rglob("*.py")}
    configs = {
        f"kd_d2/share/{path.relative_to(ROOT)}"
        for path in (*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/*/configs/*.yaml"))
        if "evidence" not in path.parts
    }
    others = {"kd_d2/py.typed", "kd_d2/report/page.html.jinja"}
    assert {name for name in names if ".dist-info/" not in name} == package | configs | others


def test_what_the_source_distribution_holds(source: Path, tmp_path: Path) -> None:
    """Check that it has what the wheel is built from, but no tests, which need fixtures that setuptools leaves out."""
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=source)
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "kd_d2/py.typed", "configs/tiny/retinanet-ssim.yaml"} <= names
    assert [name for name in names if name.startswith("tests")] == []


def test_types_are_checked_below_a_folder_named_venv(tmp_path: Path) -> None:
    """Check that pyrefly does not exclude the whole checkout by its path."""
    package = tmp_path / "venv" / "checkout" / "kd_d2"
    package.mkdir(parents=True)
    (package / "module.py").write_text("import no_such_module\n")
    shutil.copy(ROOT / "pyproject.toml", package.parent)
    command = [sys.executable, "-m", "pyrefly", "check", "--python-interpreter-path", sys.executable]
    done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True)
    assert "Cannot find module `no_such_module`" in done.stdout, done.stderr


def test_an_own_method_trains_where_there_is_no_checkout(scripts: Path, tmp_path: Path) -> None:
    """Check configs by name, a user's method in one process and in two, and a sweep, all with the installed kd_d2."""
    work, told = tmp_path / "work", tmp_path / "told"
    work.mkdir(), told.mkdir()
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "channel_means.py").write_text(example("distiller", "docs/guides/own-method.md") + TELL)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TELL": str(told)}
    options = {"cwd": work, "env": environment}
    run(scripts / "python", "-m", "kd_d2.data.synthetic", "set", "--train", 12, "--val", 4, **options)

    data = [[split, f"set/{split}/annotations.json", f"set/{split}/images"] for split in ("train", "val")]
    short = {
        "DATASETS": {"COCO_JSON": data, "TRAIN": ["train"], "TEST": ["val"]},
        "MODEL": {"DEVICE": "cpu"},
        "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {"IMS_PER_BATCH": 2, "MAX_ITER": 2, "STEPS": [1]},
    }
    write_yaml(work / "teacher.yaml", {"_BASE_": "tiny/retinanet-teacher", "OUTPUT_DIR": "teacher", **short})
    short["MODEL"]["KD"] = {"TEACHER": {"WEIGHTS": "teacher/model_final.pth"}, "DISTILLERS": ["ChannelMeans"]}
    write_yaml(work / "own.yaml", {"_BASE_": "tiny/retinanet-ssim", "OUTPUT_DIR": "own", **short})
    cells = {"plain": {"opts": {"MODEL.META_ARCHITECTURE": "RetinaNet"}}, "own": {}}
    write_yaml(work / "sweep.yaml", {"config": "own.yaml", "baseline": "plain", "student": "plain", "cells": cells})

    own = ("--import", tmp_path / "methods" / "channel_means.py")
    run(scripts / "kd-d2", "train", "teacher.yaml", **options)
    run(scripts / "kd-d2", "train", "own.yaml", *own, "MODEL.KD.CHANNEL_MEANS.WEIGHT=0.5", **options)
    two = ("--num-gpus", 2, "MODEL.DEVICE", "cpu", "OUTPUT_DIR=two")
    run(scripts / "kd-d2", "train", "own.yaml", *own, *two, **options)
    printed = run(scripts / "kd-d2", "sweep", "sweep.yaml", "--output", "sweep", *own, **options)
    assert "| own " in printed and "| plain " in printed and "| teacher " in printed
    for folder in ("own", "two", "sweep/own/seed0"):
        losses = json.loads((work / folder / "metrics.json").read_text().splitlines()[0])
        assert losses["loss_channel_means"] > 0
    prefix = str(scripts.parent) + os.sep
    processes = [json.loads(path.read_text()) for path in told.iterdir()]
    # one training in one process, one in two; the sweep, its evaluation of the teacher and its two trainings
    assert len(processes) == 7
    for files in processes:
        assert len(files) > 20
        assert [file for file in files if not file.startswith(prefix)] == []
    printed = run(scripts / "kd-d2", "config", "list", **options).split()
    assert {"tiny/retinanet-ssim", "ICD/fcos_R50", "recommended/icd"} <= set(printed)
