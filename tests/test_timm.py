"""Networks of timm as backbones: feature maps, freezing, normalization, and timm's weights."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_d2.checkpoint import KDCheckpointer, load_complete
from kd_d2.engine.optimizers import build_main_optimizer
from kd_d2.errors import UserError
from kd_d2.inheritance import inherit
from kd_d2.modeling import TimmNetwork

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from torch import Tensor, nn

NEEDS_EXTRA = "needs the extra timm: pip install '.[timm]'"
timm = pytest.importorskip("timm", reason=NEEDS_EXTRA)
safetensors_torch = pytest.importorskip("safetensors.torch", reason=NEEDS_EXTRA)

PYRAMID = ["res3", "res4", "res5"]
BACKBONE = "build_retinanet_timm_fpn_backbone"
IMAGENET: dict[str, Any] = {"PIXEL_MEAN": [123.675, 116.28, 103.53], "PIXEL_STD": [58.395, 57.12, 57.375]}


@pytest.fixture
def timm_cfg(tiny_cfg: Callable) -> Callable:
    """Return a function (name, keys of MODEL.TIMM, other trees) -> config of a tiny RetinaNet with ImageNet's input."""

    def make(name: str, keys: dict | None = None, backbone: dict | None = None, **tree: Any) -> Any:
        model = {"TIMM": {"NAME": name, **(keys or {})}, "BACKBONE": {"NAME": BACKBONE, **(backbone or {})}}
        return tiny_cfg("retinanet", {"INPUT": {"FORMAT": "RGB"}, "MODEL": {**IMAGENET, **model, **tree}})

    return make


def _images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "test_convnext", "mobilevit_xxs"])
def test_feature_maps_are_timms(name: str) -> None:
    """Check names, outputs, strides and channels against timm's own extraction, and that each weight has a gradient."""
    net = TimmNetwork(name, ["res2", "res4", "res5"]).eval()
    theirs = timm.create_model(name, features_only=True, feature_cls="getter").eval()
    fit = theirs.model.load_state_dict(net.model.state_dict(), strict=False)
    assert not fit.unexpected_keys
    assert not fit.missing_keys
    outputs, expected = net(_images(64, 96)), theirs(_images(64, 96))
    by_stride = dict(zip(theirs.feature_info.reduction(), expected, strict=True))
    assert list(outputs) == ["res2", "res4", "res5"]
    for stage, stride in {"res2": 4, "res4": 16, "res5": 32}.items():
        assert torch.equal(outputs[stage], by_stride[stride])
        shape = net.output_shape()[stage]
        assert (shape.channels, shape.stride) == (outputs[stage].shape[1], stride)
        assert outputs[stage].shape[2:] == (64 // stride, 96 // stride)
    sum(map(Tensor.sum, outputs.values())).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_layers_after_the_last_stage_are_removed() -> None:
    names = TimmNetwork("resnet10t", ["res2", "res3"]).state_dict()
    assert {name.split(".")[1] for name in names} == {"conv1", "bn1", "layer1", "layer2"}


def test_networks_with_windows_take_images_of_any_size() -> None:
    """Check a Swin Transformer, which timm builds for images of 224 x 224 pixels."""
    outputs = TimmNetwork("swin_tiny_patch4_window7_224", PYRAMID)(_images(64, 96))
    assert [tuple(x.shape[1:]) for x in outputs.values()] == [(192, 8, 12), (384, 4, 6), (768, 2, 3)]


@pytest.mark.parametrize(
    ("freeze_at", "frozen"),
    [
        (0, set()),
        (1, {"conv1", "bn1"}),
        (2, {"conv1", "bn1", "layer1"}),
        (5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
        (7, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
    ],
)
def test_freezing(freeze_at: int, frozen: set[str]) -> None:
    """Check which weights a step of SGD and the training mode leave unchanged."""
    net = TimmNetwork("resnet10t", PYRAMID, freeze_at=freeze_at).train()
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    trained = [p for p in net.parameters() if p.requires_grad]
    loss = sum(map(Tensor.sum, net(_images(64, 64)).values()))
    if trained:
        loss.backward()
        torch.optim.SGD(trained, 0.1).step()
    after = net.model.state_dict()
    unchanged = {name.split(".")[0] for name in after if torch.equal(after[name], before[name])}
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert unchanged - changed == frozen
    assert not frozen & changed


def test_freezing_more_than_there_is() -> None:
    """Check a stage after the last one that is returned."""
    net = TimmNetwork("mobilenetv3_small_050", ["res2", "res3"], freeze_at=5)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_building_without_gradients() -> None:
    """Check that the same parameters are trained as those of a network that was built with gradients enabled."""
    with torch.no_grad():
        net = TimmNetwork("resnet10t", PYRAMID, freeze_at=2)
    trained = {name.split(".")[1] for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}


def test_freezing_needs_only_what_the_stage_is_computed_with() -> None:
    """Check a network whose stem is a patch embedding, of stride 4."""
    net = TimmNetwork("test_convnext", PYRAMID, freeze_at=2)
    frozen = {".".join(n.split(".")[1:3]) for n, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.0", "stem.1", "stages.0"}


def test_layers_that_no_stage_depends_on_are_not_trained() -> None:
    """Check HRNet, which also computes a map of stride 4: training in several processes needs a gradient of each weight."""
    net = TimmNetwork("hrnet_w18_small", PYRAMID)
    sum(map(Tensor.sum, net(_images(32, 32)).values())).backward()
    fixed = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    branches = ("model.stage4.0.fuse_layers.0.", "model.incre_modules.0.")
    convolutions = {n for n, m in net.named_modules() if n.startswith(branches) and isinstance(m, nn.Conv2d)}
    assert {name.removesuffix(".weight") for name in fixed} == convolutions
    assert not any(parameter.requires_grad for name, parameter in net.named_parameters() if name in fixed)
    assert not isinstance(net.model.stage4[0].fuse_layers[0][1][1], nn.BatchNorm2d)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
def test_norms(norm: str) -> None:
    """Check which statistics a forward pass in training updates, on one process, and that no output differs otherwise."""
    net = TimmNetwork("mobilenetv3_small_050", PYRAMID, norm=norm)
    plain = TimmNetwork("mobilenetv3_small_050", PYRAMID)
    plain.load_state_dict(net.state_dict(), strict=False)
    outputs, expected = net.eval()(_images(64, 64)), plain.eval()(_images(64, 64))
    assert all(torch.equal(outputs[name], expected[name]) for name in PYRAMID)
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]
    kinds = {isinstance(m, nn.SyncBatchNorm) for m in layers}
    assert kinds == {"BN": {False}, "SyncBN": {True}, "FrozenBN": set()}[norm]
    assert {n for n in net.state_dict() if "num_batches" not in n} == {
        n for n in plain.state_dict() if "num_batches" not in n
    }
    if norm == "FrozenBN":
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        net.train()(_images(64, 64))
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_norms_that_a_network_does_not_have(caplog: pytest.LogCaptureFixture) -> None:
    TimmNetwork("test_convnext", PYRAMID, norm="FrozenBN")
    assert caplog.messages == [
        "MODEL.TIMM.NORM FrozenBN has no effect: test_convnext has no batch normalization to train."
    ]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    ("name", "of_biases", "expected"),
    [
        ("test_convnext", None, {0.05: 31, 0.0: 66}),
        ("test_convnext", 0.5, {0.05: 31, 0.0: 22, 0.5: 44}),
        ("swin_tiny_patch4_window7_224", None, {0.05: 52, 0.0: 117}),
    ],
)
def test_weight_decay_is_timms(
    timm_cfg: Callable, optimizer: str, name: str, of_biases: float | None, expected: dict[float, int]
) -> None:
    """Check the numbers of parameters by weight decay, of the network and of the rest of the detector.

    ConvNeXt has 9 blocks with 3 weights, 4 biases, a norm's weight and gamma, and 4 layers with a weight, 2 biases and a
    norm's weight. Swin has 12 blocks with 4 weights, 6 biases, 2 norms' weights and a table of relative positions, and 4
    layers with a weight, a norm's weight and its bias, of which the first has another bias.
    """
    cfg = timm_cfg(name, backbone={"FREEZE_AT": 0})
    cfg.merge_from_list(["SOLVER.OPTIMIZER", optimizer, "SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.WEIGHT_DECAY_NORM", 0.0])
    cfg.SOLVER.WEIGHT_DECAY_BIAS = of_biases
    model = build_model(cfg)
    groups = build_main_optimizer(cfg, model).param_groups
    decay_of = {p: group["weight_decay"] for group in groups for p in group["params"]}
    network = {*model.backbone.bottom_up.parameters()}
    assert Counter(decay_of[p] for p in network) == expected
    rest = {name: decay_of[p] for name, p in model.named_parameters() if p not in network}
    assert rest == {name: (of_biases or 0.05) if name.endswith(".bias") else 0.05 for name in rest}
    assert sum(len(group["params"]) for group in groups) == len(network) + len(rest)


def test_stochastic_depth() -> None:
    """Check that blocks are left out at random in training, and only there."""
    net = TimmNetwork("test_convnext", PYRAMID, drop_path_rate=0.9)
    first, second = (net.train()(_images(64, 64))["res5"] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (net.eval()(_images(64, 64))["res5"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("mobilenetv3_tiny", {}, r"MODEL.TIMM.NAME is 'mobilenetv3_tiny', but timm \S+ has no such network; similar ones: mobilenetv3_"),
        ("qqq", {}, r"MODEL.TIMM.NAME is 'qqq', but timm \S+ has no such network\."),
        ("", {}, r"MODEL.TIMM.NAME is '', but timm \S+ has no such network\."),
        ("resnet18.qqq", {}, r"MODEL.TIMM.NAME is 'resnet18.qqq', but timm \S+ cannot create it: Invalid pretrained tag \(qqq\) for resnet18\."),
        ("local-dir:/nope", {}, r"MODEL.TIMM.NAME is 'local-dir:/nope', but timm \S+ cannot create it"),
        ("test_vit", {}, "MODEL.RESNETS.OUT_FEATURES names res3, res5; test_vit of timm has res4."),
        ("convmixer_768_32", {}, "names res3, res4, res5; convmixer_768_32 of timm has no feature maps of strides 4 to 32."),
        ("test_convnext", {"freeze_at": 1}, "FREEZE_AT is 1, but test_convnext of timm has no feature map of stride 2; it can be 0, 2, 3, 4 or 5."),
        ("inception_v3", {}, "inception_v3 of timm cannot be used: its feature map of stride 8 has 9 x 17 cells for images of 96 x 160 pixels."),
        ("mobilevitv2_050", {}, "mobilevitv2_050 of timm cannot be used: its feature map of stride 32 has 4 x 6 cells for images of 96 x 160 pixels."),
        ("efficientformerv2_s0", {}, "efficientformerv2_s0 of timm cannot compute feature maps for images of any size: shape"),
        ("dla46x_c", {"drop_path_rate": 0.1}, "MODEL.TIMM.DROP_PATH_RATE is 0.1, but dla46x_c has no stochastic depth."),
    ],
)  # fmt: skip
def test_networks_that_cannot_be_used(name: str, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TimmNetwork(name, PYRAMID, **keys)


def test_images_that_are_not_of_three_channels(timm_cfg: Callable) -> None:
    cfg = timm_cfg("resnet10t", PIXEL_MEAN=[1.0], PIXEL_STD=[1.0])
    with pytest.raises(UserError, match=r"resnet10t takes images with 3 channels; MODEL\.PIXEL_MEAN has 1\."):
        build_backbone(cfg)


def test_timm_is_not_needed_until_it_is_used(timm_cfg: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError, match=r"MODEL.TIMM.NAME resnet10t needs timm, which is not installed: pip install timm"
    ):
        build_backbone(timm_cfg("resnet10t"))


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_weights_of_a_classifier(
    timm_cfg: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, norm: str
) -> None:
    """Check that both file formats fill the bottom-up network, and nothing else."""
    caplog.set_level(logging.INFO)
    weights = timm.create_model("mobilenetv3_small_050").state_dict()
    torch.save(weights, tmp_path / "net.pth")
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors")
    for file in ("net.pth", "model.safetensors"):
        model = build_model(timm_cfg("mobilenetv3_small_050", {"NORM": norm}))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        caplog.clear()
        KDCheckpointer(model).load(str(tmp_path / file))
        prefix = "backbone.bottom_up.model."
        for name, tensor in model.state_dict().items():
            own = name.startswith(prefix)
            assert torch.equal(tensor, weights[name.removeprefix(prefix)] if own else before[name])
        assert f"Initial weights in timm's mobilenetv3_small_050 format from {tmp_path / file}" in caplog.text
        assert "backbone.bottom_up.model" in caplog.text
        assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_names_that_torchvision_has_too(timm_cfg: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check a ResNet, whose files are in torchvision's format, and of which only the classifier is not used."""
    caplog.set_level(logging.INFO)
    weights = timm.create_model("resnet18").state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    model = build_model(timm_cfg("resnet18"))
    KDCheckpointer(model).load(str(tmp_path / "resnet18.pth"))
    assert torch.equal(model.backbone.bottom_up.model.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])
    assert "Not used" not in caplog.text


def test_weights_that_do_not_fit(timm_cfg: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check another width, another normalization, a file of which nothing fits, and a teacher."""
    weights = timm.create_model("mobilenetv3_small_075").state_dict()
    path = tmp_path / "net.pth"
    torch.save(weights, path)
    model = build_model(timm_cfg("mobilenetv3_small_050", PIXEL_STD=[1.0, 1.0, 1.0]))
    KDCheckpointer(model).load(str(path))
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warnings[0] == (
        f"{path}: most weights of mobilenetv3_small_050 need MODEL.PIXEL_STD [58.395, 57.12, 57.375]; the config says [1.0, 1.0, 1.0]."
    )
    assert re.search(r"net.pth does not fill \d+ weights of the model's mobilenetv3_small_050", warnings[1])
    torch.save({"blocks.0.0.conv_dw.weight": torch.zeros(1)}, path)
    with pytest.raises(
        UserError, match="mobilenetv3_small_050 in timm's format, but none of its weights fits the model"
    ):
        KDCheckpointer(model).load(str(path))
    torch.save(timm.create_model("resnet18").state_dict(), path)
    with pytest.raises(UserError, match="holds a ResNet in torchvision's format, but RetinaNet has 0 ResNets to fill"):
        KDCheckpointer(model).load(str(path))
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), path)
    with pytest.raises(UserError, match="initial weights of a classifier, but the teacher must be a trained detector"):
        load_complete(model, str(path), "the teacher")


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let timm make up pretrained weights; return the names of the weights that were downloaded."""
    create, names = timm.create_model, []

    def fake(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        if pretrained:
            names.append(name)
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return names


def test_weights_from_timm(timm_cfg: Callable, downloads: list[str], tmp_path: Path) -> None:
    """Check that weights are downloaded once, under the name of the network's default weights."""
    for path in ("timm://mobilenetv3_small_050", "timm://mobilenetv3_small_050.lamb_in1k"):
        model = build_model(timm_cfg("mobilenetv3_small_050"))
        KDCheckpointer(model).load(path)
        cached = torch.load(tmp_path / "kd_d2/timm/mobilenetv3_small_050.lamb_in1k.pth")
        assert torch.equal(model.backbone.bottom_up.model.conv_stem.weight, cached["conv_stem.weight"])
    assert downloads == ["mobilenetv3_small_050.lamb_in1k"]


def test_weights_that_timm_does_not_have(timm_cfg: Callable, downloads: list[str]) -> None:
    """Check unknown names, and weights that were trained with pixels from -1 to 1."""
    model = build_model(timm_cfg("mobilenetv3_small_050"))
    version = timm.__version__
    for path, message in {
        "timm://qqq": f"Weights timm://qqq cannot be downloaded: timm {version} has no weights qqq.",
        "timm://resnet18.qqq": f"timm {version} has no weights resnet18.qqq; it has resnet18.a1_in1k",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            KDCheckpointer(model).load(path)
    assert not downloads
    with pytest.raises(UserError) as error:
        KDCheckpointer(build_model(timm_cfg("tf_efficientnet_lite0"))).load("timm://tf_efficientnet_lite0.in1k")
    assert str(error.value) == (
        "timm://tf_efficientnet_lite0.in1k needs MODEL.PIXEL_MEAN [127.5, 127.5, 127.5]; the config says "
        "[123.675, 116.28, 103.53]."
    )


def test_a_narrower_network_inherits_evenly_spaced_channels(timm_cfg: Callable) -> None:
    student, teacher = (build_model(timm_cfg(f"mobilenetv3_small_{width}")) for width in ("050", "075"))
    fit = inherit(student, teacher, ("bottom_up",))
    assert not fit.misfits
    assert not fit.missing
    wide, narrow = (m.backbone.bottom_up.model.blocks[0][0].conv_dw.weight for m in (teacher, student))
    assert torch.equal(narrow, wide[torch.arange(len(narrow)) * len(wide) // len(narrow)])


@pytest.mark.parametrize(
    ("student", "teacher"), [("convnext_tiny", "convnext_small"), ("efficientnet_b0", "efficientnet_b1")]
)
def test_a_shallower_network_inherits_the_first_blocks_of_each_stage(
    timm_cfg: Callable, student: str, teacher: str
) -> None:
    """Check 9 of 27 blocks in the third stage of a ConvNeXt, and 16 of 23 blocks of an EfficientNet."""
    shallow, deep = (build_model(timm_cfg(name)) for name in (student, teacher))
    fit = inherit(shallow, deep, ("bottom_up",))
    assert not fit.misfits
    assert not fit.missing
    source = deep.backbone.bottom_up.state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in shallow.backbone.bottom_up.state_dict().items())


def test_a_stem_that_does_not_fit_leaves_the_blocks(timm_cfg: Callable) -> None:
    """Check a teacher with three convolutions in the stem, and others for the shortcuts of three blocks."""
    student, teacher = build_model(timm_cfg("resnet18")), build_model(timm_cfg("resnet18d"))
    fit = inherit(student, teacher, ("bottom_up",))
    blocks = {name.removeprefix("backbone.bottom_up.model.").rpartition(".conv1.weight")[0] for name in fit.filled} - {
        ""
    }
    assert blocks == {"layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"}


@pytest.mark.parametrize(("norm", "is_warned"), [("FrozenBN", True), ("BN", False)])
def test_frozen_statistics_of_wider_layers(
    timm_cfg: Callable, caplog: pytest.LogCaptureFixture, norm: str, is_warned: bool
) -> None:
    student = build_model(timm_cfg("mobilenetv3_small_050", {"NORM": norm}))
    inherit(student, build_model(timm_cfg("mobilenetv3_small_075")), ("bottom_up",))
    warned = "layers are FrozenBN, with the statistics of the teacher's wider layers; the first one is backbone.bottom_up.model."
    assert (warned in caplog.text) is is_warned
