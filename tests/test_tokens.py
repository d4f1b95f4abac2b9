"""MasKD and FreeKD: numbers of the authors' programs, the learning of tokens, and detection losses of other features."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

from kd_d2.adapters import build_adapter
from kd_d2.adapters.other_features import normalized_by_this_batch
from kd_d2.checkpoint.reading import read_checkpoint
from kd_d2.distillers import FreeKD, MasKD, OptimizerSettings
from kd_d2.distillers.tokens import TokenDistiller
from kd_d2.errors import UserError

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import make, make_project, spec_of, train, with_features
from torch import Tensor, nn

pytestmark = pytest.mark.unit

FIXTURES = Path(__file__).parent / "fixtures" / "methods"
STRIDES = (8, 16)
METHODS = pytest.mark.parametrize("method", [MasKD, FreeKD])


def values_of(method: type[TokenDistiller]) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{method.__name__.lower()}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def by_stride(values: dict[str, Tensor], name: str) -> dict[int, Tensor]:
    return {stride: values[f"{name}.{stride}"] for stride in STRIDES}


def of_the_program(method: type[TokenDistiller], values: dict[str, Tensor], **keys: object) -> TokenDistiller:
    """Build a method with the program's parameters."""
    built = make(method, spec_of({8: 4, 16: 4}), spec_of({8: 6, 16: 6}), max_iter=10, num_tokens=3, **keys)
    with torch.no_grad():
        for stride in STRIDES:
            for name, parameter in built.levels[str(stride)].named_parameters():
                parameter.copy_(values[f"param.{stride}.{name}"])
            for name, parameter in built.adaptation.layers[str(stride)].named_parameters():
                parameter.copy_(values[f"layer.{stride}.{name}"])
    return built


@METHODS
def test_tokens_are_trained_as_by_the_program(method: type[TokenDistiller]) -> None:
    """Check the masked features, here with a linear loss in place of the detector's, the overlap and all gradients."""
    values = values_of(method)
    weights, expected = by_stride(values, "weights"), by_stride(values, "masked")

    def losses_of(features: dict[int, Tensor], targets: list) -> dict[str, Tensor]:
        for stride, maps in features.items():
            torch.testing.assert_close(maps, expected[stride], rtol=1e-5, atol=1e-5)
        return {f"loss_{stride}": (maps * weights[stride]).sum() for stride, maps in features.items()}

    built = of_the_program(method, values, token_iters=1)
    student = {stride: maps.requires_grad_() for stride, maps in by_stride(values, "student").items()}
    with EventStorage(0):
        losses = built(with_features(student), with_features(by_stride(values, "teacher"), losses_of), [])
    sum(losses.values()).backward()
    imitation, _, overlap = method.loss_names
    assert losses[imitation] == 0
    torch.testing.assert_close(losses[overlap], sum(by_stride(values, "overlap").values()), rtol=1e-5, atol=0)
    for stride in STRIDES:
        assert student[stride].grad is None or not student[stride].grad.any()
        for name, parameter in built.levels[str(stride)].named_parameters():
            torch.testing.assert_close(parameter.grad, values[f"grad_param.{stride}.{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "keys", "iteration", "case"),
    [
        (MasKD, {"teacher_mask_iters": 1}, 2, ".teacher_masks"),
        (MasKD, {"teacher_mask_iters": 1}, 3, ".both_masks"),
        (FreeKD, {}, 2, ""),
    ],
)
def test_features_are_imitated_as_by_the_program(
    method: type[TokenDistiller], keys: dict, iteration: int, case: str
) -> None:
    values = values_of(method)
    built = of_the_program(method, values, start_iter=1, token_iters=1, **keys)
    student = {stride: maps.requires_grad_() for stride, maps in by_stride(values, "student").items()}
    with EventStorage(iteration):
        losses = built.scaled(built(with_features(student), with_features(by_stride(values, "teacher")), []))
    sum(losses.values()).backward()
    imitation, detection, overlap = method.loss_names
    torch.testing.assert_close(losses[imitation], values[f"loss{case}"], rtol=1e-5, atol=0)
    assert losses[detection] == losses[overlap] == 0
    for stride in STRIDES:
        torch.testing.assert_close(student[stride].grad, values[f"grad_student.{stride}{case}"], rtol=1e-5, atol=1e-6)
        layer = built.adaptation.layers[str(stride)].weight
        torch.testing.assert_close(layer.grad, values[f"grad_layer.{stride}{case}"], rtol=1e-5, atol=1e-5)
        assert not built.levels[str(stride)].tokens.grad.any()


@METHODS
def test_masked_features_keep_their_type(method: type[TokenDistiller]) -> None:
    """Check that a detector under autocast gets features of one type, whatever levels are masked."""
    found = {}

    def losses_of(features: dict[int, Tensor], targets: list) -> dict[str, Tensor]:
        found.update(features)
        return {"loss": features[8].sum()}

    features = {8: torch.ones(2, 4, 3, 5).bfloat16(), 16: torch.ones(2, 4, 2, 3).bfloat16()}
    with EventStorage(0):
        losses = make(method, spec_of({8: 4}), max_iter=20)(
            with_features(features), with_features(features, losses_of), []
        )
    assert {maps.dtype for maps in found.values()} == {torch.bfloat16}
    assert torch.equal(found[16], features[16]) and not torch.equal(found[8], features[8])
    assert losses[method.loss_names[2]].dtype == torch.float32


@METHODS
@pytest.mark.parametrize(
    ("max_iter", "keys", "learn_until"),
    [(180_000, {}, 2000), (800, {"start_iter": 100}, 180), (800, {"token_iters": 5}, 5)],
)
def test_iterations_of_learning(method: type[TokenDistiller], max_iter: int, keys: dict, learn_until: int) -> None:
    assert make(method, spec_of({8: 2}), max_iter=max_iter, **keys).learn_until == learn_until


@METHODS
def test_optimizers(tiny_cfg: Callable, method: type[TokenDistiller]) -> None:
    """Check that the tokens have an optimizer of their own, and the adaptation layers that of LAYER_LR."""
    cfg = tiny_cfg("retinanet", {"MODEL": {"KD": {"LAYER_LR": 0.5}}})
    built = make(method, spec_of({8: 2}), max_iter=800, start_iter=100, lr=0.25)
    tokens, layers = built.param_groups(cfg)
    name = method.__name__.lower()
    assert tokens.optimizer == OptimizerSettings(name, 0.25, 1e-3, start_iter=100, end_iter=180)
    assert [id(p) for p in tokens.params] == [id(p) for p in built.levels.parameters()]
    assert layers.optimizer.lr == 0.5
    assert [id(p) for p in layers.params] == [id(p) for p in built.adaptation.parameters()] != []


def test_the_number_of_iterations_is_needed() -> None:
    for method, keys in ((MasKD, {"token_iters": 3}), (MasKD, {"teacher_mask_iters": 3}), (FreeKD, {})):
        with pytest.raises(UserError, match=f"{method.__name__} needs the number of training iterations"):
            make(method, spec_of({8: 2}), max_iter=0, **keys)
    make(MasKD, spec_of({8: 2}), max_iter=0, token_iters=3, teacher_mask_iters=2)
    make(FreeKD, spec_of({8: 2}), max_iter=0, token_iters=3)


@METHODS
@pytest.mark.parametrize("keys", [{"token_iters": 80}, {"start_iter": 30}, {"token_iters": 20, "end_iter": 20}])
def test_a_schedule_without_imitation(method: type[TokenDistiller], keys: dict) -> None:
    with pytest.raises(UserError, match=rf"{method.CONFIG_NODE}.*TOKEN_ITERS \d+ leave no iteration before \d+"):
        make(method, spec_of({8: 2}), max_iter=33 if "start_iter" in keys else 80, **keys)


@pytest.mark.parametrize(
    ("detector", "method"), [("retinanet", MasKD), ("faster-rcnn", MasKD), ("retinanet", FreeKD), ("gfl", FreeKD)]
)
def test_training(tmp_path: Path, detector: str, method: type[TokenDistiller]) -> None:
    """Check that tokens are learned first and frozen then, and that a resumed training has the losses of a whole one."""
    project = make_project(tmp_path, detector, MODEL__KD__DISTILLERS=[method.__name__])
    project.change(**{f"MODEL__KD__{method.CONFIG_NODE}__TOKEN_ITERS": 2})
    project.change(SOLVER__MAX_ITER=4, SOLVER__STEPS=(), SOLVER__BASE_LR=0.001, SOLVER__CHECKPOINT_PERIOD=1)
    whole = train(project).losses
    for iteration, losses in whole.items():
        is_zero = {name: losses[name] == 0 for name in method.loss_names}
        imitation, detection, overlap = method.loss_names
        assert is_zero == {imitation: iteration < 2, detection: iteration >= 2, overlap: iteration >= 2}
    at = [read_checkpoint(str(project.output / f"model_000000{n}.pth"))["distillers"] for n in range(3)]
    tokens = f"{method.__name__}.levels.8.tokens"
    assert not torch.equal(at[0][tokens], at[1][tokens])
    assert torch.equal(at[1][tokens], at[2][tokens])
    for path in project.output.glob("model_000000[1-3].pth"):
        path.unlink()
    (project.output / "model_final.pth").unlink()
    (project.output / "last_checkpoint").write_text("model_0000000.pth")
    resumed = train(project, resume=True).losses
    assert resumed == {iteration: losses for iteration, losses in whole.items() if iteration > 0}


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
