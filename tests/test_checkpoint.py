"""Checkpoints: safe reading, reports of weights that do not fit, inheritance, and atomic saving."""

import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path

from kd_d2 import KDMetaArch
from kd_d2.checkpoint import (
    KDCheckpointer,
    fill,
    load_complete,
    read_checkpoint,
)
from kd_d2.checkpoint.torchvision import rename_torchvision_resnet
from kd_d2.config import load_config
from kd_d2.distillers import FeatureImitation
from kd_d2.errors import UserError
from kd_d2.files import atomic_write
from kd_d2.inheritance import component_of, inherit
from kd_d2.modeling import add_slim_resnet_config

import cv2
import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from helpers import TINY, Project, clean_process, make_project, make_trainer, merged, tree_of, write_yaml
from torch import nn

TINY_RETINANET = TINY / "retinanet-student.yaml"


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


class Toy(nn.Module):
    """Modules named as in a detector: a bottom-up network, a neck and a head."""

    def __init__(self, width: int = 2, classes: int = 3):
        super().__init__()
        self.backbone = nn.ModuleDict({"bottom_up": nn.Linear(4, width), "lateral": nn.Linear(width, 2)})
        self.head = nn.ModuleDict({"norm": nn.BatchNorm1d(2), "score": nn.Linear(2, classes)})


def sentence(function, *args: object) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


# ---------------------------------------------------------------------------------------------- safe reading


@pytest.mark.parametrize("kind", ["pth", "legacy pth", "pkl"])
@pytest.mark.parametrize("place", ["model", "beside it"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, kind: str, place: str) -> None:
    """Check that a file that would run a command is refused, naming file and command, and that nothing is run."""
    marker, path = tmp_path / "executed", tmp_path / f"evil.{kind[-3:]}"
    weights = {"weight": np.zeros(3)} if kind == "pkl" else {"weight": torch.zeros(3)}
    content = {"model": weights, "__author__": "nobody"}
    (content if place == "beside it" else weights)["evil"] = RunsCode(marker)
    if kind == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "pth")
    assert sentence(read_checkpoint, str(path)) == (
        f"Checkpoint {path} was not loaded: it holds more than tensors and plain data (posix.system), which could run code."
    )
    assert not marker.exists()
    if kind == "pkl":  # the file does run the command when loaded unsafely
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("name", ["builtins eval", "numpy.core.multiarray _reconstruct.__globals__", "numpy load"])
def test_no_other_name_gets_into_a_pkl(tmp_path: Path, name: str) -> None:
    """Check that names similar to the allowed ones are refused."""
    path = tmp_path / "evil.pkl"
    path.write_bytes(b"c" + name.replace(" ", "\n").encode() + b"\n.")
    assert f"({name.replace(' ', '.')})" in sentence(read_checkpoint, str(path))


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize("content", ["empty", "garbage", "truncated", "text"])
def test_damaged_files(tmp_path: Path, suffix: str, content: str) -> None:
    """Check that the message is one line with the file name, and does not suggest loading the file unsafely."""
    path = tmp_path / f"a.{suffix}"
    weights = {"weight": np.arange(5000.0) if suffix == "pkl" else torch.arange(5000.0)}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps(weights))
    else:
        torch.save(weights, path)
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "garbage": np.random.RandomState(0).bytes(4000),
        "truncated": whole[: len(whole) // 2],
        "text": b"version https://git-lfs.github.com/spec/v1\n",
    }
    path.write_bytes(contents[content])
    said = sentence(read_checkpoint, str(path))
    assert said.startswith(f"Checkpoint {path} is damaged or not a checkpoint: it cannot be read (")
    assert "\n" not in said
    assert "weights_only" not in said


def test_numpy_scalars_are_plain_data(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "AP": np.float64(0.5), "n": np.int64(3)}, tmp_path / "model.pth")
    content = read_checkpoint(str(tmp_path / "model.pth"))
    assert (content["AP"], content["n"]) == (0.5, 3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.zeros(1)], "holds a list, not a dictionary of weights by name."),
        ({3: torch.zeros(1)}, "holds a dict, not a dictionary of weights by name."),
        ({"model": {3: torch.zeros(1)}}, "holds a dict, not a dictionary of weights by name."),
        ({"model": {"a": 3}}, "is not a dictionary of weights: its entry 'a' is not a tensor."),
        ({"model_state": {3: torch.zeros(1)}}, "holds a dict, not a dictionary of weights by name."),
        ({"model_state": 3}, "is not a dictionary of weights: its entry 'model_state' is not a tensor."),
    ],
)
def test_files_without_weights(tmp_path: Path, content: object, expected: str) -> None:
    """Check the message for intact files with other contents."""
    path = tmp_path / "a.pth"
    torch.save(content, path)
    assert sentence(read_checkpoint, str(path)) == f"Checkpoint {path} {expected}"


def test_a_pkl_of_something_else(tmp_path: Path) -> None:
    """Check a pickle whose `blobs` is not a dictionary."""
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"blobs": [1]}))
    assert (
        sentence(read_checkpoint, str(path)) == f"Checkpoint {path} holds a list, not a dictionary of weights by name."
    )


def test_a_missing_file(tmp_path: Path) -> None:
    """Check the message of `read_checkpoint` and of the checkpointer."""
    path = str(tmp_path / "gone.pth")
    assert sentence(read_checkpoint, path) == f"There is no checkpoint {path}."
    assert sentence(KDCheckpointer(Toy()).load, path) == f"There is no checkpoint {path}."


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("style", ["zoo", "caffe2", "caffe2 blobs"])
def test_pkl_files_of_the_model_zoo(tmp_path: Path, protocol: int, style: str) -> None:
    """Check that each format of the zoo's files is read, with several pickle protocols."""
    source, target = Toy(), Toy()
    arrays = {name: tensor.numpy() for name, tensor in source.state_dict().items()}
    content = {
        "zoo": {"model": OrderedDict(arrays), "__author__": "Detectron2 Model Zoo"},
        "caffe2": arrays | {"head.score.weight_momentum": np.zeros(1)},
        "caffe2 blobs": {"blobs": arrays, "cfg": "text"},
    }[style]
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_checkpoint(str(path))
    assert read["model"].keys() == arrays.keys()
    assert bool(read.get("matching_heuristics")) == (style != "zoo")
    for name, array in read["model"].items():
        assert np.array_equal(array, arrays[name])
    if style == "zoo":
        load_complete(target, str(path), "the teacher")
        for name, tensor in target.state_dict().items():
            assert torch.equal(tensor, source.state_dict()[name])


def test_a_query_matches_names_by_their_ends(tmp_path: Path, monkeypatch) -> None:
    """Check that a query in MODEL.WEIGHTS enables Detectron2's matching heuristics, for paths as for URLs."""
    source, target = Toy(), Toy()
    named = {name.removeprefix("backbone."): tensor for name, tensor in source.state_dict().items()}
    torch.save(named, tmp_path / "a.pth")
    monkeypatch.chdir(tmp_path)
    weights = load_config(str(TINY_RETINANET), ["MODEL.WEIGHTS", "a.pth?matching_heuristics=True"]).MODEL.WEIGHTS
    assert weights == f"{tmp_path}/a.pth?matching_heuristics=True"
    KDCheckpointer(target).load(weights)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


# --------------------------------------------------------------------------------- torchvision's ResNet format


@pytest.fixture(scope="module")
def torchvision_resnet() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    return model


def detector(tmp_path: Path, **keys: object) -> nn.Module:
    """Build the tiny ResNet-10 RetinaNet at full width on the CPU."""
    path = write_yaml(
        tmp_path / "a.yaml", merged(tree_of(_BASE_=str(TINY_RETINANET), MODEL__DEVICE="cpu"), tree_of(**keys))
    )
    return build_model(load_config(str(path)))


TORCHVISION_NAMES = {
    "stem.conv1.weight": "conv1.weight",
    "stem.conv1.norm.running_var": "bn1.running_var",
    "res2.0.conv1.weight": "layer1.0.conv1.weight",
    "res2.0.conv2.norm.bias": "layer1.0.bn2.bias",
    "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
    "res3.0.shortcut.norm.running_mean": "layer2.0.downsample.1.running_mean",
    "res5.1.conv1.norm.num_batches_tracked": "layer4.1.bn1.num_batches_tracked",
}


def test_torchvision_names(torchvision_resnet: nn.Module) -> None:
    """Check one name of each kind, derived by hand, and that every name except the classifier's is kept once."""
    weights = torchvision_resnet.state_dict()
    renamed = rename_torchvision_resnet(weights, "backbone.")
    for ours, theirs in TORCHVISION_NAMES.items():
        assert torch.equal(renamed[f"backbone.{ours}"], weights[theirs])
    assert len(renamed) == len(weights) - 2


def test_converted_resnet_computes_the_same(torchvision_resnet: nn.Module) -> None:
    """Check that Detectron2's ResNet-18 with the converted weights has the output of torchvision's layer4."""
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 18, 64, "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = ["res5"], False
    ours = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    fit = fill(ours, rename_torchvision_resnet(torchvision_resnet.state_dict()))
    assert not fit.misfits
    assert not fit.missing
    theirs = nn.Sequential(*list(torchvision_resnet.children())[:-2])
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(images)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(images)["res5"], expected)


def test_starting_weights_fill_a_resnet10(tmp_path: Path, torchvision_resnet: nn.Module, log) -> None:
    """Check that all 72 bottom-up tensors are torchvision's, and that the table in the log reports it."""
    path = tmp_path / "resnet18.pth"
    weights = torchvision_resnet.state_dict()
    torch.save({name: t.half() if t.is_floating_point() else t for name, t in weights.items()}, path)
    model = detector(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    KDCheckpointer(model).load(str(path))
    offered = rename_torchvision_resnet(weights, "backbone.bottom_up.")
    after = model.state_dict()
    bottom_up = [name for name in after if component_of(name) == "bottom_up"]
    assert len(bottom_up) == 72
    for name in bottom_up:
        torch.testing.assert_close(after[name], offered[name], rtol=1e-3, atol=1e-3)
        assert after[name].dtype == before[name].dtype
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - set(bottom_up))
    table = log.text.split("torchvision's ResNet format from", 1)[1]
    for row in (
        "backbone.bottom_up.stem  6 of 6",
        "backbone.bottom_up.res2  12 of 12",
        "backbone.bottom_up.res5  18 of 18",
    ):
        assert row in table
    assert "Not used, since the model has no such block: 10 of backbone.bottom_up.res2, 10 of" in table
    assert "does not fill" not in log.text


def test_a_warning_if_starting_weights_are_incomplete(tmp_path: Path, torchvision_resnet: nn.Module, log) -> None:
    """Check that the warning counts tensors that the file lacks or has in another shape, without batch counters."""
    path = tmp_path / "resnet18.pth"
    weights = {n: t for n, t in torchvision_resnet.state_dict().items() if "downsample.1" not in n}
    weights["layer1.0.conv1.weight"] = torch.zeros(8, 3, 3, 3)
    torch.save(weights, path)
    KDCheckpointer(detector(tmp_path)).load(str(path))
    (warning,) = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    assert warning == (
        f"{path} does not fill 13 weights of the model's ResNet, which keep their initial values; the first one is "
        "backbone.bottom_up.res3.0.shortcut.norm.weight."
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"INPUT__FORMAT": "BGR"}, "INPUT.FORMAT RGB; the config says BGR."),
        (
            {"MODEL__PIXEL_MEAN": [0.0, 0.0, 0.0]},
            "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]; the config says [0.0, 0.0, 0.0].",
        ),
        (
            {"MODEL__PIXEL_STD": [1.0, 1.0, 1.0]},
            "MODEL.PIXEL_STD [58.395, 57.12, 57.375]; the config says [1.0, 1.0, 1.0].",
        ),
        (
            {
                "MODEL__BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone",
                "MODEL__RESNETS": {"DEPTH": 50, "STRIDE_IN_1X1": True, "RES2_OUT_CHANNELS": 256},
            },
            "MODEL.RESNETS.STRIDE_IN_1X1 False; the config says True.",
        ),
    ],
)
def test_another_input_format_is_refused(
    tmp_path: Path, torchvision_resnet: nn.Module, keys: dict, expected: str
) -> None:
    """Check that detectors with another channel order, normalization or stride refuse torchvision's weights."""
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision_resnet.state_dict(), path)
    model = detector(tmp_path, **keys)
    said = sentence(KDCheckpointer(model).load, str(path))
    assert said == f"{path} holds weights in torchvision's format, which need {expected}"


def test_a_normalization_may_be_rounded(tmp_path: Path, torchvision_resnet: nn.Module) -> None:
    """Check a mean rounded to two digits, which is accepted, and one that differs by half a gray level."""
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision_resnet.state_dict(), path)
    KDCheckpointer(detector(tmp_path, MODEL__PIXEL_MEAN=[123.68, 116.28, 103.53])).load(str(path))
    model = detector(tmp_path, MODEL__PIXEL_MEAN=[124.175, 116.28, 103.53])
    assert "the config says [124." in sentence(KDCheckpointer(model).load, str(path))


def test_a_resnet_of_which_nothing_fits(tmp_path: Path, torchvision_resnet: nn.Module) -> None:
    """Check a model without a ResNet, one that is too narrow for any weight, and a teacher."""
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision_resnet.state_dict(), path)
    assert sentence(KDCheckpointer(Toy()).load, str(path)) == (
        f"{path} holds a ResNet in torchvision's format, but Toy has 0 ResNets to fill."
    )
    narrow = detector(tmp_path, MODEL__SLIM_RESNET__WIDTHS=(8, 16, 24, 32), MODEL__RESNETS__STEM_OUT_CHANNELS=8)
    assert sentence(KDCheckpointer(narrow).load, str(path)) == (
        f"{path} holds a ResNet in torchvision's format, but none of its weights fits the model."
    )
    assert sentence(load_complete, detector(tmp_path), str(path), "the teacher") == (
        f"{path} has initial weights of a classifier, but the teacher must be a trained detector."
    )
    assert sentence(load_complete, detector(tmp_path), "", "the detector") == (
        "There are no weights for the detector: name the checkpoint after the config (--model CONFIG WEIGHTS), or set MODEL.WEIGHTS."
    )


def test_starting_weights_fill_a_mobilenet(tmp_path: Path, log) -> None:
    """Check that torchvision's file fills the whole bottom-up network, and is refused at half width."""
    path = tmp_path / "mobilenet.pth"
    torch.manual_seed(0)
    weights = torchvision.models.mobilenet_v2(weights=None).state_dict()
    torch.save(weights, path)
    backbone = "build_retinanet_mobilenet_v2_fpn_backbone"
    model = detector(tmp_path, MODEL__BACKBONE__NAME=backbone)
    KDCheckpointer(model).load(str(path))
    bottom_up = {name: tensor for name, tensor in model.state_dict().items() if component_of(name) == "bottom_up"}
    assert all(torch.equal(tensor, weights[name.partition("bottom_up.")[2]]) for name, tensor in bottom_up.items())
    assert "Initial weights in torchvision's MobileNetV2 format" in log.text
    assert "does not fit" not in log.text
    half = detector(tmp_path, MODEL__BACKBONE__NAME=backbone, MODEL__MOBILENET_V2__WIDTH_MULT=0.5)
    assert sentence(KDCheckpointer(half).load, str(path)) == (
        f"{path} holds a MobileNetV2 in torchvision's format, but none of its weights fits the model."
    )


# ------------------------------------------------------------------------------------------------ inheritance


def test_inheritance_copies_what_fits_and_lists_what_does_not(log: pytest.LogCaptureFixture) -> None:
    """Check each tensor: neck and head are the teacher's; mismatched ones and the bottom-up network are unchanged."""
    student, teacher = Toy(classes=5), Toy()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    teacher.head["norm"].running_mean.fill_(7)
    fit = inherit(student, teacher, ("neck", "head"))
    after, source = student.state_dict(), teacher.state_dict()
    copied = {name for name in after if name.startswith(("backbone.lateral", "head.norm"))}
    assert set(fit.filled) == copied
    for name in after:
        assert torch.equal(after[name], source[name] if name in copied else before[name])
    reason = "weight of shape (3, 2) offered, (5, 2) needed"
    assert fit.misfits == {"head.score.weight": reason, "head.score.bias": reason}
    rows = [" ".join(line.split()) for line in log.text.splitlines()]
    assert "backbone.lateral 2 of 2" in rows
    assert "head.score 0 of 2" in rows
    assert f"head.score.* {reason}" in rows


def heads(teacher: nn.Module, student: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return detectors that consist of these heads only."""
    return nn.ModuleDict({"head": teacher}), nn.ModuleDict({"head": student})


def test_a_layer_is_inherited_whole_or_not_at_all() -> None:
    """Check that a bias of matching shape is not copied without its weight, while another layer of the head is."""
    teacher, student = heads(
        nn.ModuleDict({"narrow": nn.Linear(2, 3), "same": nn.Linear(4, 4)}),
        nn.ModuleDict({"narrow": nn.Linear(5, 3), "same": nn.Linear(4, 4)}),
    )
    fit = inherit(student, teacher, ("head",))
    assert set(fit.filled) == {"head.same.weight", "head.same.bias"}
    assert set(fit.misfits) == {"head.narrow.weight", "head.narrow.bias"}
    assert not torch.equal(student.head["narrow"].bias, teacher.head["narrow"].bias)


def test_layers_whose_names_begin_alike_are_inherited_separately() -> None:
    """Check that layer "conv10" is copied although "conv1" has another shape."""
    teacher, student = heads(
        nn.ModuleDict({"conv1": nn.Linear(2, 3), "conv10": nn.Linear(4, 4)}),
        nn.ModuleDict({"conv1": nn.Linear(5, 3), "conv10": nn.Linear(4, 4)}),
    )
    fit = inherit(student, teacher, ("head",))
    assert set(fit.filled) == {"head.conv10.weight", "head.conv10.bias"}
    assert set(fit.misfits) == {"head.conv1.weight", "head.conv1.bias"}


def test_a_parameter_beside_layers_is_inherited_alone() -> None:
    """Check a head with scales for another number of levels, all layers of which are inherited."""

    class Head(nn.Module):
        def __init__(self, levels: int):
            super().__init__()
            self.scales = nn.Parameter(torch.ones(levels))
            self.score = nn.Linear(2, 3)

    fit = inherit(*heads(Head(4), Head(5)), ("head",))
    assert fit.filled == ["head.score.weight", "head.score.bias"]
    assert fit.misfits == {"head.scales": "scales of shape (5,) offered, (4,) needed"}


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ("BN", "", "no norm.weight offered"),
        ("", "BN", "no bias offered"),
        ("GN", "BN", "no norm.running_mean needed"),
        ("BN", "FrozenBN", None),
    ],
)
def test_a_layer_is_inherited_with_its_norm(ours: str, theirs: str, reason: str | None) -> None:
    student, teacher = (
        nn.ModuleDict(
            {
                "backbone": nn.ModuleDict(
                    {
                        "bottom_up": nn.Identity(),
                        "lateral": Conv2d(2, 32, 1, bias=not norm, norm=get_norm(norm, 32)),
                        "output": nn.Conv2d(2, 2, 1),
                    }
                )
            }
        )
        for norm in (ours, theirs)
    )
    fit = inherit(student, teacher, ("neck",))
    lateral = {name for name in fit.filled if "lateral" in name and not name.endswith("num_batches_tracked")}
    assert bool(lateral) is (reason is None)
    assert {*fit.misfits.values()} == {reason} - {None}


def test_sequences_of_other_layers_are_not_inherited() -> None:
    """Check that numbered layers with norms in between do not inherit from a sequence without norms."""
    with_norms = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1))
    without = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    teacher, student = heads(
        nn.ModuleDict({"subnet": without, "score": nn.Conv2d(2, 1, 1)}),
        nn.ModuleDict({"subnet": with_norms, "score": nn.Conv2d(2, 1, 1)}),
    )
    fit = inherit(student, teacher, ("head",))
    assert set(fit.filled) == {"head.score.weight", "head.score.bias"}
    assert fit.misfits["head.subnet.3.weight"] == "the teacher's head.subnet has other layers"
    assert {"head.subnet.1.weight", "head.subnet.1.running_mean"} <= {*fit.missing}


def test_inheritance_of_one_part(log: pytest.LogCaptureFixture) -> None:
    student, teacher = Toy(), Toy()
    head = student.head["score"].weight.clone()
    fit = inherit(student, teacher, ("neck",))
    assert fit.filled == ["backbone.lateral.weight", "backbone.lateral.bias"]
    assert torch.equal(student.head["score"].weight, head)


@pytest.mark.parametrize(
    "student", [nn.Linear(2, 2), nn.ModuleDict({"head": nn.ModuleDict({"norm": nn.BatchNorm1d(9)})})]
)
def test_inheritance_of_nothing_is_an_error(student: nn.Module) -> None:
    """Check a student that no weight of the teacher fits, except possibly a batch counter."""
    assert sentence(inherit, student, Toy(), ("neck", "head")) == (
        f"MODEL.KD.INHERIT: no weight of the teacher's neck and head (Toy) fits the student ({type(student).__name__}) by name "
        "and shape."
    )


@pytest.mark.parametrize("modules", ["neck", ("neck", "heads")])
def test_names_of_what_is_inherited(modules: object) -> None:
    assert sentence(inherit, Toy(), Toy(), modules) == (
        f"The modules to inherit are {modules!r}; they must be a list of some of bottom_up, neck, head."
    )


def test_checkpoints_by_path_objects(tmp_path: Path) -> None:
    torch.save({"model": Toy().state_dict()}, tmp_path / "toy.pth")
    assert read_checkpoint(tmp_path / "toy.pth")["model"].keys() == Toy().state_dict().keys()
    load_complete(Toy(), tmp_path / "toy.pth", "the detector")


TINY_TEACHER = str(TINY / "retinanet-teacher.yaml")


def test_inheritance_of_the_bottom_up_network(tmp_path: Path) -> None:
    """Check that a ResNet-10 gets stem and first blocks of the teacher's ResNet-18, and nothing else changes."""
    teacher, student = detector(tmp_path, _BASE_=TINY_TEACHER), detector(tmp_path)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    fit = inherit(student, teacher, ("bottom_up",))
    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        is_inherited = component_of(name) == "bottom_up"
        assert torch.equal(tensor, source[name] if is_inherited else before[name]), name
    assert not fit.misfits and not fit.missing
    assert {name.split(".")[2] for name in fit.filled} == {"stem", "res2", "res3", "res4", "res5"}


def test_blocks_are_inherited_whole_or_not_at_all() -> None:
    """Check blocks with another shape, a lacking tensor and a batch counter too many."""

    def network(second: nn.Module, third: nn.Module, norm: nn.Module) -> nn.Module:
        stage = nn.Sequential(nn.ModuleDict({"conv": nn.Linear(2, 2), "norm": norm}), second, third)
        return nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": nn.ModuleDict({"res2": stage})})})

    def block(out: int, bias: bool = True) -> nn.Module:
        return nn.ModuleDict({"conv1": nn.Linear(2, 2), "conv2": nn.Linear(2, out, bias=bias)})

    student = network(block(3), block(2), nn.BatchNorm1d(2))
    teacher = network(block(2), block(2, bias=False), nn.LayerNorm(2))
    teacher.backbone.bottom_up.res2[0].norm.register_buffer("running_mean", torch.ones(2))
    teacher.backbone.bottom_up.res2[0].norm.register_buffer("running_var", torch.ones(2))
    fit = inherit(student, teacher, ("bottom_up",))
    res2 = "backbone.bottom_up.res2"
    assert {name.removeprefix(f"{res2}.0.") for name in fit.filled} == {
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
    }
    second = "conv2.weight of shape (2, 2) offered, (3, 2) needed"
    reasons = dict.fromkeys((f"{res2}.1.{name}" for name in student.backbone.bottom_up.res2[1].state_dict()), second)
    third = (f"{res2}.2.{name}" for name in ("conv1.weight", "conv1.bias", "conv2.weight"))
    assert fit.misfits == reasons | dict.fromkeys(third, "no conv2.bias offered")


@pytest.mark.parametrize(
    ("opts", "reason"),
    [
        ({"INPUT__FORMAT": "BGR"}, "but the student's INPUT.FORMAT is BGR and the teacher's RGB."),
        (
            {"MODEL__PIXEL_STD": [1.0, 1.0, 1.0]},
            "but the student's MODEL.PIXEL_STD is [1.0, 1.0, 1.0] and the teacher's [5",
        ),
        (
            {"MODEL__SLIM_RESNET__WIDTHS": (72, 136, 264, 520), "MODEL__RESNETS__STEM_OUT_CHANNELS": 72},
            "no weight of the teacher's bottom_up",
        ),
    ],
)
def test_a_bottom_up_network_that_does_not_fit(tmp_path: Path, opts: dict, reason: str) -> None:
    """Check another channel order, another normalization, and larger widths."""
    student, teacher = detector(tmp_path, **opts), detector(tmp_path, _BASE_=TINY_TEACHER)
    assert reason in sentence(inherit, student, teacher, ("bottom_up", "neck", "head"))


class WithBackbone(nn.Module):
    """A detector with this backbone."""

    def __init__(self, backbone: nn.Module, input_format: str = "BGR"):
        super().__init__()
        self.backbone, self.head, self.input_format = backbone, nn.Linear(2, 2), input_format


def test_a_backbone_without_neck_is_a_bottom_up_network(log: pytest.LogCaptureFixture) -> None:
    """Check that neck and head are the head alone, and that the backbone is copied by block and for the same input only."""

    def detector(second: int = 2, input_format: str = "BGR") -> nn.Module:
        def block(width: int) -> nn.Module:
            return nn.ModuleDict({"conv1": nn.Linear(2, 2), "conv2": nn.Linear(2, width)})

        backbone = nn.ModuleDict({"stem": block(2), "res4": nn.Sequential(block(2), block(second))})
        return WithBackbone(backbone, input_format)

    student = detector()
    fit = inherit(student, detector(input_format="RGB"), ("neck", "head"))
    assert fit.filled == ["head.weight", "head.bias"]
    assert "backbone (ModuleDict) has no neck; to inherit it, add 'bottom_up' to MODEL.KD.INHERIT.MODULES" in log.text
    assert "of the teacher's neck fits" not in log.text
    assert "INPUT.FORMAT is BGR and the teacher's RGB" in sentence(
        inherit, student, detector(input_format="RGB"), ("bottom_up",)
    )
    fit = inherit(student, detector(second=3), ("bottom_up",))
    assert {name.rpartition(".conv")[0] for name in fit.filled} == {"backbone.stem", "backbone.res4.0"}
    assert {name.rpartition(".conv")[0] for name in fit.misfits} == {"backbone.res4.1"}


def test_the_neck_of_a_vitdet() -> None:
    """Check that a SimpleFeaturePyramid's `net` is its bottom-up network."""
    student, teacher = (WithBackbone(nn.ModuleDict({"net": nn.Linear(2, 2), "simfp_2": nn.Linear(2, 2)})) for _ in "ab")
    assert inherit(student, teacher, ("neck",)).filled == ["backbone.simfp_2.weight", "backbone.simfp_2.bias"]
    assert inherit(student, teacher, ("bottom_up",)).filled == ["backbone.net.weight", "backbone.net.bias"]


@pytest.mark.parametrize(("theirs", "is_copied"), [("ATSS", True), ("MyATSS", True), ("FCOS", False)])
def test_box_layers_of_another_detector_are_not_inherited(theirs: str, is_copied: bool) -> None:
    """Check that they are those of the same detector or a subclass, and that the tower and the classes are always copied."""

    class ATSS(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Module()
            self.head.bbox_subnet, self.head.cls_score = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 3)
            self.head.bbox_pred, self.head.scales = nn.Linear(2, 4), nn.Parameter(torch.ones(2))

    teacher = ATSS() if theirs == "ATSS" else type(theirs, (ATSS,) if theirs == "MyATSS" else (nn.Module,), {})()
    teacher.head = ATSS().head
    student = ATSS()
    fit = inherit(student, teacher, ("head",))
    boxes = {"head.bbox_pred.weight", "head.bbox_pred.bias", "head.scales"}
    assert {*fit.filled} == {*student.state_dict()} - (set() if is_copied else boxes)
    reason = "FCOS and ATSS predict boxes in different units"
    assert fit.misfits == ({} if is_copied else dict.fromkeys(boxes, reason))


@pytest.mark.parametrize(("weights", "is_copied"), [([1.0] * 4, True), ([2.0] * 4, False)])
def test_weights_of_boxes_may_be_a_list(tiny_detector: Callable, weights: list[float], is_copied: bool) -> None:
    """Check a teacher from Python code; weights from a config are a tuple."""
    student, teacher = tiny_detector("retinanet"), tiny_detector("retinanet")
    teacher.box2box_transform = Box2BoxTransform(weights=weights)
    assert ("head.bbox_pred.weight" in inherit(student, teacher, ("head",)).filled) is is_copied


def test_inherited_tensors_are_copies() -> None:
    """Check that changing the student afterwards does not change the teacher."""
    student, teacher = Toy(), Toy()
    inherit(student, teacher, ("neck", "head"))
    kept = teacher.head["score"].weight.clone()
    with torch.no_grad():
        student.head["score"].weight.add_(1)
    assert torch.equal(teacher.head["score"].weight, kept)


# -------------------------------------------------------------------------------------------- complete loading


def test_a_teacher_must_be_filled_completely(tmp_path: Path) -> None:
    """Check that missing or misshapen tensors, including running statistics, are counted and named."""
    path = tmp_path / "a.pth"
    weights = Toy().state_dict()
    total = 10  # 8 parameters and 2 running statistics

    def load(content: dict) -> str:
        torch.save({"model": content}, path)
        return sentence(load_complete, Toy(), str(path), "the teacher")

    for gone in ("head.score.bias", "head.norm.running_var"):
        assert load({k: v for k, v in weights.items() if k != gone}) == (
            f"{path} fills {total - 1} of {total} parameters of the teacher (Toy); the first one not filled is {gone}. "
            "Do its config and weights match?"
        )
    assert "head.score.bias (shape (9,) instead of (3,))" in load(weights | {"head.score.bias": torch.zeros(9)})
    assert load({"other.weight": torch.zeros(2)}) == (
        f"{path} fills no parameter of Toy: it is another model's checkpoint."
    )


def test_weights_saved_behind_ddp_and_in_half_precision(tmp_path: Path) -> None:
    """Check that a teacher with a "module." prefix and float16 weights is loaded."""
    path, source, target = tmp_path / "a.pth", Toy(), Toy()
    torch.save({f"module.{k}": v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}, path)
    load_complete(target, str(path), "the teacher")
    torch.testing.assert_close(target.head["score"].weight, source.head["score"].weight, rtol=1e-3, atol=1e-3)
    assert target.head["score"].weight.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ saving


def test_a_crash_while_saving_leaves_the_last_good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that an incomplete file never gets a name that would be loaded, and that it is removed."""
    model = Toy()
    checkpointer = KDCheckpointer(model, str(tmp_path))
    checkpointer.save("model_1", iteration=1)
    good = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert good.keys() == {"model_1.pth", "last_checkpoint"}

    def crash(data: object, file) -> None:
        file.write(b"half a checkp")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    for name in ("model_1", "model_2"):
        with pytest.raises(
            UserError, match=r"cannot be written .*No space left.*checkpoints already written are intact"
        ):
            checkpointer.save(name)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == good
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_1.pth")
    assert KDCheckpointer(Toy(), str(tmp_path)).resume_or_load("", resume=True)["iteration"] == 1


def test_ctrl_c_while_a_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(str(path)) as file:
        file.write("half of the n")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_a_kill_between_file_and_tag_leaves_the_last_good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the tag is written after the file: after a kill in between, the previous file is still the last."""
    checkpointer = KDCheckpointer(Toy(), str(tmp_path))
    checkpointer.save("model_1")
    replaced = []

    def replace(source: str, target: str, original=os.replace) -> None:
        if os.path.basename(target) == "last_checkpoint":
            raise KeyboardInterrupt
        replaced.append(os.path.basename(target))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_2")
    assert replaced == ["model_2.pth"]
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_1.pth")
    read_checkpoint(str(tmp_path / "model_2.pth"))


class _WithState(nn.Module):
    def __init__(self, state: object):
        super().__init__()
        self.state = state

    def get_extra_state(self) -> object:
        return {"history": [1, self.state]}

    def set_extra_state(self, state: dict) -> None:
        self.state = state["history"][1]


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (deque([1]), "collections.deque"),
        (np.zeros(2), "numpy.ndarray"),
        (lambda: None, "function"),
        (Path("a"), "Path"),
    ],
)
def test_a_state_that_could_not_be_read_back_is_not_saved(tmp_path: Path, state: object, kind: str) -> None:
    checkpointer = KDCheckpointer(Toy(), str(tmp_path), distillers=nn.ModuleDict({"Mine": _WithState(state)}))
    with pytest.raises(UserError) as caught:
        checkpointer.save("model_1")
    assert str(caught.value).startswith("Checkpoint model_1.pth is not written; there is no checkpoint yet. ")
    assert re.search(rf"; Mine\._extra_state of distillers contains a \S*{kind}\.$", str(caught.value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "state", [None, 2.5, (1, b"a"), {1, 2}, OrderedDict(a=[True]), np.float64(2), torch.Size([2]), torch.float16]
)
def test_plain_state_is_saved_and_read_back(tmp_path: Path, state: object) -> None:
    saved, loaded = (nn.ModuleDict({"Mine": _WithState(value)}) for value in (state, 0))
    KDCheckpointer(Toy(), str(tmp_path), distillers=saved).save("model_1")
    KDCheckpointer(Toy(), str(tmp_path), distillers=loaded).resume_or_load("", resume=True)
    assert loaded["Mine"].state == state


def test_a_student_with_other_state_than_tensors_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be dense tensors; '0\._extra_state' is a dict"):
        KDCheckpointer(nn.Sequential(_WithState(1)), str(tmp_path)).save("model_1")


def test_state_that_could_not_be_read_back_is_refused_before_training(tmp_path: Path, monkeypatch) -> None:
    project = make_project(tmp_path)
    monkeypatch.setattr(FeatureImitation, "get_extra_state", lambda self: deque(), raising=False)
    with (
        clean_process(),
        pytest.raises(UserError, match=r"FeatureImitation\._extra_state of distillers contains a collections\.deque"),
    ):
        make_trainer(project)


# ------------------------------------------------------------------------- the checkpoint of a distillation run


@pytest.fixture(scope="module", params=["retinanet", "faster-rcnn"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Run train_net.py with adaptation layers, and mark a checkpoint from the middle of the training as the last."""
    project = make_project(
        tmp_path_factory.mktemp(request.param),
        request.param,
        MODEL__KD__FEATURE_IMITATION__ADAPTATION="1x1",
        MODEL__RETINANET__SCORE_THRESH_TEST=0.0,
        MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0,
        SOLVER__CHECKPOINT_PERIOD=2,
    )
    project.main()
    (project.output / "last_checkpoint").write_text("model_0000001.pth")
    return project


def test_the_file_is_a_plain_student(run: Project) -> None:
    """Check that `model` has exactly the plain student's names and shapes, and that the file has only plain data."""
    content = torch.load(run.output / "model_0000001.pth", weights_only=True)
    plain = build_model(load_config(str(run.teacher))).state_dict()  # has the same shapes as the student
    assert {k: v.shape for k, v in content["model"].items()} == {k: v.shape for k, v in plain.items()}
    assert content.keys() == {"model", "class_names", "run", "distillers", "trainer", "iteration"}
    assert {name.split(".")[0] for name in content["distillers"]} == {"FeatureImitation"}


def test_a_checkpoint_from_the_middle_detects_in_plain_detectron2(run: Project, caplog) -> None:
    """Check that DefaultPredictor loads student.yaml and the file without warnings, and has KDMetaArch's detections."""
    cfg = get_cfg()
    add_slim_resnet_config(cfg)
    cfg.merge_from_file(str(run.output / "student.yaml"), allow_unsafe=False)
    cfg.MODEL.WEIGHTS = str(run.output / "model_0000001.pth")
    with caplog.at_level(logging.WARNING):
        predictor = DefaultPredictor(cfg)
    assert not caplog.records  # Detectron2 warns about every missing and unexpected name
    assert predictor.model.state_dict().keys() == read_checkpoint(cfg.MODEL.WEIGHTS)["model"].keys()

    with clean_process():
        trainer = make_trainer(run)
        trainer.resume_or_load(resume=True)
        inputs = [item for batch in trainer.build_test_loader(trainer.cfg, run.name) for item in batch]
    model = trainer.bare_model.eval()
    assert isinstance(model, KDMetaArch)
    for item in inputs[:3]:
        with torch.no_grad():
            expected = model([item])[0]["instances"]
        found = predictor(cv2.imread(item["file_name"]))["instances"]
        assert len(found) == len(expected) > 0
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.pred_classes, expected.pred_classes)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.eye(3).to_sparse(), "is a sparse tensor"),
        (torch.eye(3).to_sparse_csr(), "is a sparse tensor"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "is a quantized tensor"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is a nested tensor"),
        (torch.ones(2, device="meta"), "is a tensor without data"),
        (torch.ones(1).expand(10**12), "is an expanded tensor"),
        ({"weight": torch.ones(1)}, "is not a tensor"),
    ],
    ids=["sparse", "csr", "quantized", "nested", "meta", "expanded", "dictionary"],
)
def test_tensors_that_are_no_weights(tmp_path: Path, tensor: torch.Tensor, expected: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": {"a.weight": tensor}}, path)
    assert f"its entry 'a.weight' {expected}" in sentence(read_checkpoint, str(path))


@pytest.mark.parametrize("values", [["x"], np.array(["2020-01-01"], "datetime64[D]"), [None], [1j]], ids=str)
def test_arrays_that_are_no_weights(tmp_path: Path, values: object) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": np.array(values)}, "__author__": "someone"}))
    said = sentence(read_checkpoint, str(path))
    assert str(path) in said and ("is an array of" in said or "was not loaded" in said or "is damaged" in said)


def test_a_file_that_unpacks_to_many_times_its_size(tmp_path: Path) -> None:
    """Check that it is refused before it is decompressed."""
    path, packed = tmp_path / "weights.pth", tmp_path / "packed.pth"
    torch.save({"model": {"a": torch.zeros(4 * 2**20)}}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert packed.stat().st_size < 2**17
    assert re.search(
        r"packed\.pth of \d+ bytes unpacks to 1677\d+; it is not loaded", sentence(read_checkpoint, str(packed))
    )
