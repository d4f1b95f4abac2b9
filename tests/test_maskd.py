"""MasKD: numbers of the authors' programs, the learning of tokens, and detection losses of other features."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

from kd_d2.adapters import DetectorOutputs, build_adapter
from kd_d2.adapters.other_features import normalized_by_this_batch
from kd_d2.checkpoint.reading import read_checkpoint
from kd_d2.distillers import MasKD, OptimizerSettings
from kd_d2.distillers.maskd import ReceptiveTokens
from kd_d2.errors import UserError
from kd_d2.losses import mask_overlap, masked_imitation_loss

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import make, make_project, spec_of, train
from torch import Tensor, nn

pytestmark = pytest.mark.unit

FIXTURE = Path(__file__).parent / "fixtures" / "methods" / "maskd.npz"
STRIDES = (8, 16)


@pytest.fixture
def values() -> dict[str, Tensor]:
    with np.load(FIXTURE) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def by_stride(values: dict[str, Tensor], name: str) -> dict[int, Tensor]:
    return {stride: values[f"{name}.{stride}"] for stride in STRIDES}


def outputs(features: dict[int, Tensor], losses_of: Callable | None = None) -> DetectorOutputs:
    images = torch.zeros(2, 3, 48, 72)
    return DetectorOutputs(images=type("Images", (), {"tensor": images}), features=features, losses_of=losses_of)


def of_the_program(values: dict[str, Tensor], **keys: object) -> MasKD:
    """Build the method with the program's parameters."""
    method = make(MasKD, spec_of({8: 4, 16: 4}), spec_of({8: 6, 16: 6}), max_iter=10, num_tokens=3, **keys)
    with torch.no_grad():
        for stride in STRIDES:
            for name, parameter in method.levels[str(stride)].named_parameters():
                parameter.copy_(values[f"param.{stride}.{name}"])
            for name, parameter in method.adaptation.layers[str(stride)].named_parameters():
                parameter.copy_(values[f"layer.{stride}.{name}"])
    return method


def test_tokens_are_trained_as_by_the_program(values: dict[str, Tensor]) -> None:
    """Check the masked features, here with a linear loss in place of the detector's, the overlap and all gradients."""
    weights, expected = by_stride(values, "weights"), by_stride(values, "masked")

    def losses_of(features: dict[int, Tensor], targets: list) -> dict[str, Tensor]:
        for stride, maps in features.items():
            torch.testing.assert_close(maps, expected[stride])
        return {f"loss_{stride}": (maps * weights[stride]).sum() for stride, maps in features.items()}

    method = of_the_program(values, token_iters=1, teacher_mask_iters=0)
    student = {stride: maps.requires_grad_() for stride, maps in by_stride(values, "student").items()}
    with EventStorage(0):
        losses = method(outputs(student), outputs(by_stride(values, "teacher"), losses_of), [])
    sum(losses.values()).backward()
    assert losses["loss_maskd"] == 0
    overlap = sum(by_stride(values, "overlap").values())
    torch.testing.assert_close(losses["loss_maskd_aux_overlap"], overlap, rtol=1e-5, atol=0)
    for stride in STRIDES:
        assert student[stride].grad is None or not student[stride].grad.any()
        for name, parameter in method.levels[str(stride)].named_parameters():
            torch.testing.assert_close(parameter.grad, values[f"grad_param.{stride}.{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("iteration", "masks"), [(2, "teacher_masks"), (3, "both_masks")])
def test_features_are_imitated_as_by_the_program(values: dict[str, Tensor], iteration: int, masks: str) -> None:
    method = of_the_program(values, start_iter=1, token_iters=1, teacher_mask_iters=1)
    student = {stride: maps.requires_grad_() for stride, maps in by_stride(values, "student").items()}
    with EventStorage(iteration):
        losses = method.scaled(method(outputs(student), outputs(by_stride(values, "teacher")), []))
    sum(losses.values()).backward()
    torch.testing.assert_close(losses["loss_maskd"], values[f"loss.{masks}"], rtol=1e-5, atol=0)
    assert losses["loss_maskd_aux_detection"] == losses["loss_maskd_aux_overlap"] == 0
    for stride in STRIDES:
        torch.testing.assert_close(student[stride].grad, values[f"grad_student.{stride}.{masks}"], rtol=1e-5, atol=1e-6)
        layer = method.adaptation.layers[str(stride)].weight
        torch.testing.assert_close(layer.grad, values[f"grad_layer.{stride}.{masks}"], rtol=1e-5, atol=1e-5)
        assert not method.levels[str(stride)].tokens.grad.any()


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_shares_are_those_of_a_convolution(size: tuple[int, int]) -> None:
    tokens, maps = ReceptiveTokens(4, 3), torch.randn(2, 4, *size)
    expected = tokens.share(tokens.context(maps).mean((2, 3))).softmax(1)
    torch.testing.assert_close(tokens.shares(maps), expected)


def test_masked_features_keep_their_type() -> None:
    """Check that a detector under autocast gets features of one type, whatever levels are masked."""
    found = {}

    def losses_of(features: dict[int, Tensor], targets: list) -> dict[str, Tensor]:
        found.update(features)
        return {"loss": features[8].sum()}

    features = {8: torch.ones(2, 4, 3, 5).bfloat16(), 16: torch.ones(2, 4, 2, 3).bfloat16()}
    with EventStorage(0):
        losses = make(MasKD, spec_of({8: 4}), max_iter=20)(outputs(features), outputs(features, losses_of), [])
    assert {maps.dtype for maps in found.values()} == {torch.bfloat16}
    assert torch.equal(found[16], features[16]) and not torch.equal(found[8], features[8])
    assert losses["loss_maskd_aux_overlap"].dtype == torch.float32


def test_overlap_by_hand() -> None:
    """Check an image with three masks, of which two are equal and one is disjoint, and an image with equal masks."""
    first = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]]])
    assert mask_overlap(first).item() == pytest.approx(1 / 3)
    assert mask_overlap(torch.cat([first, torch.full_like(first, 0.5)])).item() == pytest.approx((1 / 3 + 1) / 2)


def test_imitation_by_hand() -> None:
    """Check two masks of two positions whose mean squared errors are 4 and 1."""
    student = torch.tensor([[[[2.0, 1.0]], [[2.0, 1.0]]]])
    masks = torch.tensor([[[[1.0, 1.0]], [[0.5, 0.0]]]])
    loss = masked_imitation_loss(student, torch.zeros_like(student), masks, torch.tensor([[0.25, 0.75]]))
    assert loss.item() == pytest.approx(0.25 * (4 + 1) / 2 + 0.75 * (0.25 * 4) / 0.5)


def test_imitation_in_empty_masks() -> None:
    """Check that masks of 0 everywhere give a loss of 0, not NaN."""
    student = torch.ones(1, 2, 1, 2)
    assert masked_imitation_loss(student, 0 * student, torch.zeros(1, 2, 1, 2), torch.full((1, 2), 0.5)) == 0


def test_masks_of_selected_channels() -> None:
    """Check that a student with every second channel of the teacher's has the same masks if these are equal in pairs."""
    method = make(MasKD, spec_of({8: 2}), spec_of({8: 4}), adaptation="select", token_iters=0, teacher_mask_iters=0)
    tokens = method.levels["8"]
    maps = torch.randn(1, 2, 3, 5)
    with torch.no_grad():
        tokens.tokens.copy_(torch.randn(6, 2).repeat_interleave(2, 1))
    selected = method.adaptation.selections["8"].channels
    torch.testing.assert_close(tokens.masks(maps, selected), tokens.masks(maps.repeat_interleave(2, 1)))


KINDS = ("retinanet", "fcos", "atss", "gfl", "fsaf", "reppoints", "faster", "cascade")


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_other_features(tiny_detector: Callable, make_inputs: Callable, kind: str) -> None:
    """Check that losses of a detector's own features equal its losses in training, with gradients, and change nothing."""
    inputs = make_inputs()
    targets = [entry["instances"] for entry in inputs]
    model: nn.Module = tiny_detector(kind)
    adapter = build_adapter(model)
    with normalized_by_this_batch(model):
        torch.manual_seed(0)
        trained = adapter.run(inputs, frozenset({"features"}), targets)
    model.eval().requires_grad_(False)
    before, attributes = copy.deepcopy(model.state_dict()), {name: {**vars(m)} for name, m in model.named_modules()}
    own = adapter.run(inputs, frozenset({"features", "losses"}))
    features = {stride: maps.detach().requires_grad_() for stride, maps in trained.features.items()}
    torch.manual_seed(0)
    losses = own.losses_of(features, targets)
    assert losses.keys() == trained.losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, trained.losses[name].detach(), rtol=1e-4, atol=1e-6)
    sum(losses.values()).backward()
    assert all(maps.grad.any() for maps in features.values() if maps.shape[-1] > 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: vars(m).keys() for name, m in model.named_modules()} == {n: v.keys() for n, v in attributes.items()}
    assert not any(module.training for module in model.modules()) and "_ema_update" not in vars(model)


def test_statistics_of_a_box_head_remain(tiny_detector: Callable, make_inputs: Callable) -> None:
    """Check that batch normalization in a box head keeps its statistics, and uses them."""
    keys = {"NAME": "FastRCNNConvFCHead", "NUM_CONV": 1, "CONV_DIM": 8, "NORM": "BN", "NUM_FC": 1, "FC_DIM": 8}
    model = tiny_detector("faster", {"MODEL": {"ROI_BOX_HEAD": keys}}).eval()
    norm = next(module for module in model.roi_heads.modules() if isinstance(module, nn.BatchNorm2d))
    inputs = make_inputs()
    outputs = build_adapter(model).run(inputs, frozenset({"features", "losses"}))
    seen = []
    norm.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    outputs.losses_of(outputs.features, [entry["instances"] for entry in inputs])
    assert seen == [False] and norm.num_batches_tracked == 0


def test_losses_of_a_mask_head_are_left_out(tiny_detector: Callable, make_inputs: Callable) -> None:
    """Check a Mask R-CNN on ground truth without masks: it has only losses of boxes, and its mask head remains on."""
    inputs = make_inputs()
    model = tiny_detector("mask").eval()
    outputs = build_adapter(model).run(inputs, frozenset({"features", "losses"}))
    losses = outputs.losses_of(outputs.features, [entry["instances"] for entry in inputs])
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert model.roi_heads.mask_on


@pytest.mark.parametrize(
    ("family", "name", "weight"),
    [("one-stage", "RetinaNet", 7), ("one-stage", "FCOS", 10), ("two-stage", "GeneralizedRCNN", 1)],
)
def test_published_weights(family: str, name: str, weight: float) -> None:
    assert make(MasKD, spec_of({8: 2}, family, name)).weight == weight


@pytest.mark.parametrize(
    ("max_iter", "keys", "learn_until", "teacher_masks_until"),
    [
        (180_000, {}, 2000, 9200),
        (800, {"start_iter": 100}, 180, 212),
        (800, {"token_iters": 5, "teacher_mask_iters": 0}, 5, 5),
    ],
)
def test_iterations(max_iter: int, keys: dict, learn_until: int, teacher_masks_until: int) -> None:
    method = make(MasKD, spec_of({8: 2}), max_iter=max_iter, **keys)
    assert (method.learn_until, method.teacher_masks_until) == (learn_until, teacher_masks_until)


def test_optimizers(tiny_cfg: Callable) -> None:
    """Check that the tokens have an optimizer of their own, and the adaptation layers that of LAYER_LR."""
    cfg = tiny_cfg("retinanet", {"MODEL": {"KD": {"LAYER_LR": 0.5}}})
    method = make(MasKD, spec_of({8: 2}), max_iter=800, start_iter=100, lr=0.25)
    tokens, layers = method.param_groups(cfg)
    assert tokens.optimizer == OptimizerSettings("maskd", 0.25, 1e-3, start_iter=100, end_iter=180)
    assert [id(p) for p in tokens.params] == [id(p) for p in method.levels.parameters()]
    assert layers.optimizer.lr == 0.5
    assert [id(p) for p in layers.params] == [id(p) for p in method.adaptation.parameters()] != []


def test_the_number_of_iterations_is_needed() -> None:
    with pytest.raises(UserError, match="MasKD needs the number of training iterations"):
        make(MasKD, spec_of({8: 2}), max_iter=0, token_iters=3)
    make(MasKD, spec_of({8: 2}), max_iter=0, token_iters=3, teacher_mask_iters=2)


@pytest.mark.parametrize("keys", [{"token_iters": 80}, {"start_iter": 30}, {"token_iters": 20, "end_iter": 20}])
def test_a_schedule_without_imitation(keys: dict) -> None:
    with pytest.raises(UserError, match=r"TOKEN_ITERS \d+ leave no iteration before \d+"):
        make(MasKD, spec_of({8: 2}), max_iter=33 if "start_iter" in keys else 80, **keys)


@pytest.mark.parametrize("detector", ["retinanet", "faster-rcnn"])
def test_training(tmp_path: Path, detector: str) -> None:
    """Check that tokens are learned first and frozen then, and that a resumed training has the losses of a whole one."""
    project = make_project(tmp_path, detector, MODEL__KD__DISTILLERS=["MasKD"], MODEL__KD__MASKD__TOKEN_ITERS=2)
    project.change(SOLVER__MAX_ITER=4, SOLVER__STEPS=(), SOLVER__BASE_LR=0.001, SOLVER__CHECKPOINT_PERIOD=1)
    whole = train(project).losses
    for iteration, losses in whole.items():
        is_zero = {name: value == 0 for name, value in losses.items() if "maskd" in name}
        assert is_zero == {
            "loss_maskd": iteration < 2,
            "loss_maskd_aux_detection": iteration >= 2,
            "loss_maskd_aux_overlap": iteration >= 2,
        }
    at = [read_checkpoint(str(project.output / f"model_000000{n}.pth"))["distillers"] for n in range(3)]
    tokens = "MasKD.levels.8.tokens"
    assert not torch.equal(at[0][tokens], at[1][tokens])
    assert torch.equal(at[1][tokens], at[2][tokens])
    for path in project.output.glob("model_000000[1-3].pth"):
        path.unlink()
    (project.output / "model_final.pth").unlink()
    (project.output / "last_checkpoint").write_text("model_0000000.pth")
    resumed = train(project, resume=True).losses
    assert resumed == {iteration: losses for iteration, losses in whole.items() if iteration > 0}
