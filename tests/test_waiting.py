"""Where a training step would make the host wait for a GPU: known places alone, each with its reason.

Operators whose results have a size or a value that the host needs (item, nonzero, boolean indices, unique, repeat_interleave without
a size) are recorded on a CPU, so that some of these places are of CPUs alone.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from kd_d2.adapters import Positives

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import META_ARCHITECTURES, make_project, make_trainer, methods_of
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}

KNOWN = {
    ("adapter.py", "preprocess"): "ImageList compares sizes, on the host",
    ("assignment.py", "of"): "the positions of the positives; their number is needed for everything at them",
    ("assignment.py", "assign_by_iou"): "Detectron2's Matcher",
    ("dense.py", "losses"): "Detectron2's RetinaNet",
    ("fcos.py", "losses"): "Detectron2's FCOS and fvcore's IoU loss",
    ("atss.py", "losses"): "torchvision's IoU loss, once a batch",
    ("gfl.py", "losses"): "torchvision's IoU loss, once a batch",
    ("rcnn.py", "run"): "Detectron2's R-CNN samples proposals",
    ("rcnn.py", "_propose"): "Detectron2's RPN",
    ("rcnn.py", "_class_logits"): "Detectron2's RoI pooler assigns levels",
    ("gid.py", "select_instances"): "the NMS",
    ("queries.py", "<genexpr>"): "on the host",
    ("queries.py", "build_queries"): "on the host",
    ("encoding.py", "describe"): "one_hot checks classes on CPUs alone",
    ("fsaf.py", "_positive_losses"): "one_hot checks classes on CPUs alone",
    ("fsaf.py", "_ignored"): "one_hot checks classes on CPUs alone",
}
"""By file and function of kd_d2 why it waits."""


class WaitRecorder(TorchDispatchMode):
    """Notes the last function of kd_d2 on the stack of every operator that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = func in WAITING and (kwargs or {}).get("output_size") is None
        if func in INDEXING:
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if waits:
            ours = [frame for frame in traceback.extract_stack() if "/kd_d2/" in frame.filename]
            if ours:  # else the backward pass of one that was noted
                self.places.add((Path(ours[-1].filename).name, ours[-1].name))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("detector", META_ARCHITECTURES)
def test_a_training_step_waits_in_known_places_alone(tmp_path: Path, detector: str) -> None:
    """Check forward and backward pass of every method that goes with the detector."""
    icd = {"MODEL__KD__ICD__DIM": 16, "MODEL__KD__ICD__NUM_HEADS": 2, "MODEL__KD__ICD__FFN_DIM": 32}
    trainer = make_trainer(make_project(tmp_path, detector, MODEL__KD__DISTILLERS=tuple(methods_of(detector)), **icd))
    trainer.resume_or_load(resume=False)
    model, batch = trainer.bare_model.train(), next(iter(trainer._trainer.data_loader))
    recorder = WaitRecorder()
    with EventStorage(), recorder:
        sum(model(batch).values()).backward()
    assert recorder.places <= KNOWN.keys()


@pytest.mark.parametrize(
    "call",
    [
        lambda: Positives.of(torch.tensor([[0, -1, 2]])),
        lambda: Positives(*torch.zeros(3, 2, dtype=torch.int64)).pick([torch.ones(1, 2, 3)]),
    ],
    ids=["waits", "does not wait"],
)
def test_what_waits_is_seen(call, request: pytest.FixtureRequest) -> None:
    recorder = WaitRecorder()
    with recorder:
        call()
    assert recorder.places == ({("assignment.py", "of")} if request.node.callspec.id == "waits" else set())
