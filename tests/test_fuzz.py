"""Fuzzing of configs, annotation files and checkpoints: each is read, or refused in one sentence, and no code is run.

KD_D2_FUZZ_EXAMPLES sets the number of cases of each test; cases that failed in the past have their own tests below.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
from pathlib import Path
from typing import Any

from kd_d2 import UserError
from kd_d2.checkpoint import read_checkpoint
from kd_d2.config import load_config
from kd_d2.data.coco import read_coco
from kd_d2.data.coco_json import _register, check_coco_json
from kd_d2.engine.learning_rate import learning_rate_advice

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import make_coco, make_project
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("KD_D2_FUZZ_EXAMPLES", "60")),
    derandomize="KD_D2_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)
FUZZ = settings.get_profile("fuzz")

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [10**400, -1, 0, 1e308, "../../etc/passwd", "!!python/object/apply:os.system", "\x00", "ä" * 50, "1e999"]
    ),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def _places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Return every place in a tree as a path of keys."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] + [place for key, value in inner for place in _places(value, (*path, key))]


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """Draw a copy of the tree with one to three places changed, removed or repeated."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        *parents, leaf = draw(st.sampled_from([p for p in _places(tree) if p] or [("x",)]))
        node = tree
        for key in parents:
            node = node[key]
        action = draw(st.sampled_from(["change", "remove", "repeat"]))
        if action == "change" or not isinstance(node, dict | list):
            node[leaf] = draw(VALUES)
        elif action == "remove":
            del node[leaf]
        elif isinstance(node, list):
            node.append(copy.deepcopy(node[leaf]))
        else:
            node[draw(st.text(max_size=6))] = node[leaf]
        if not isinstance(tree, dict | list):
            break
    return tree


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco"), 3)


def _read_annotations(path: Path, images: Path) -> None:
    """Check a file, and read it as training and evaluation would."""
    try:
        check_coco_json(str(path), str(images))
    except UserError as error:
        assert "\n" not in str(error)
        return
    name = "fuzzed"
    _register(name, read_coco(str(path), str(images)), str(images), True, None)
    try:
        DatasetCatalog.get(name)
        COCO(MetadataCatalog.get(name).json_file)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@given(data=st.data())
@FUZZ
def test_annotations(coco: Path, data: st.DataObject) -> None:
    path = coco.with_name("fuzzed.json")
    path.write_text(json.dumps(data.draw(mutated(json.loads(coco.read_text())))))
    _read_annotations(path, coco.parent / "images")


@given(data=st.data())
@FUZZ
def test_annotation_bytes(coco: Path, data: st.DataObject) -> None:
    path = coco.with_name("fuzzed.json")
    path.write_bytes(data.draw(damaged(coco.read_bytes())))
    _read_annotations(path, coco.parent / "images")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("config"), MODEL__KD__DISTILLERS=("ICD", "PFI")).student


@given(data=st.data())
@FUZZ
def test_configs(config: Path, data: st.DataObject) -> None:
    tree = data.draw(mutated(yaml.safe_load(config.read_text())))
    path = config.with_name("fuzzed.yaml")
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    _read_config(path, [])


@given(data=st.data())
@FUZZ
def test_config_bytes(config: Path, data: st.DataObject) -> None:
    path = config.with_name("fuzzed.yaml")
    path.write_bytes(data.draw(damaged(config.read_bytes())))
    _read_config(path, [])


KEYS = (
    "SOLVER.BASE_LR",
    "MODEL.KD.ICD.DIM",
    "MODEL.KD.DISTILLERS",
    "DATASETS.TRAIN",
    "MODEL.DEVICE",
    "MODEL",
    "X.Y",
    "--x",
    "",
)


@given(opts=st.lists(st.one_of(st.sampled_from(KEYS), st.text(max_size=12)), max_size=6))
@FUZZ
def test_overrides(config: Path, opts: list[str]) -> None:
    _read_config(config, opts)


def _read_config(path: Path, opts: list[str]) -> None:
    try:
        load_config(str(path), opts)
    except UserError as error:
        assert str(error)
        return
    learning_rate_advice(str(path), opts)


class _Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module", params=["pth", "pkl", "evil.pth", "evil.pkl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a valid checkpoint, or one that would run code, in one of the two formats."""
    path = tmp_path_factory.mktemp("checkpoint") / f"good.{request.param}"
    is_evil, suffix = request.param.startswith("evil"), path.suffix
    content: dict = {"model": {"a.weight": torch.ones(2, 3), "b": torch.zeros(())}, "iteration": 3}
    if suffix == ".pkl":
        content = {"model": {"a.weight": np.ones((2, 3)), "b": np.zeros(2)}, "__author__": "someone"}
    if is_evil:
        content["model"]["c"] = _Runs(path.with_name("ran"))
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path


@given(data=st.data())
@FUZZ
def test_checkpoint_bytes(checkpoint: Path, data: st.DataObject) -> None:
    path = checkpoint.with_name("fuzzed" + checkpoint.suffix)
    path.write_bytes(data.draw(damaged(checkpoint.read_bytes())))
    try:
        content = read_checkpoint(str(path))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(content["model"], dict)
    assert not checkpoint.with_name("ran").exists()


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Draw the bytes with some removed, inserted or changed, often at the beginning, which identifies the format."""
    found = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        last = max(0, len(found) - 1)
        place = draw(st.one_of(st.integers(0, last), st.integers(0, min(last, 200))))
        action = draw(st.sampled_from(["change", "insert", "cut", "end"]))
        if action == "change" and found:
            found[place] = draw(st.integers(0, 255))
        elif action == "insert":
            found[place:place] = draw(st.binary(max_size=8))
        elif action == "cut":
            del found[place : place + draw(st.integers(1, 40))]
        elif action == "end":
            del found[place:]
    return bytes(found)


# Cases that fuzzing found.


def test_a_box_beyond_what_a_float_holds(coco: Path) -> None:
    tree = json.loads(coco.read_text())
    tree["annotations"][0]["bbox"][0] = 10**400
    path = coco.with_name("found.json")
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="it must be four finite numbers"):
        check_coco_json(str(path), str(coco.parent / "images"))


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_a_list_for_the_name_of_a_data_set(config: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"DATASETS\.{key} contains \['a'\]; it must be a list of dataset names"):
        load_config(str(config), [f"DATASETS.{key}", "[['a']]"])


def test_a_pickle_that_names_a_high_place_of_the_memo(tmp_path: Path) -> None:
    """Check that reading it takes at most 1 GiB; the unpickler in C would take 32 GiB."""
    path = tmp_path / "memo.pkl"
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")  # a dictionary, memoized at index 2^31 - 1
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + 2**30, limits[1]))
    try:
        assert read_checkpoint(str(path)) == {"model": {}, "__author__": "Caffe2", "matching_heuristics": True}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _address_space() -> int:
    """Return the number of bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
