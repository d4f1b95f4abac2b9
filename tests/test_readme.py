"""The examples in README and guides, and the README's table of methods and detectors."""

import json
import re
import runpy
import shlex
import sys
from types import SimpleNamespace

from kd_d2 import DISTILLER_REGISTRY, KDMetaArch, Teacher, load_config, register_hook
from kd_d2.adapters import DETECTOR_ADAPTER_REGISTRY, build_adapter
from kd_d2.engine import hooks
from kd_d2.errors import UserError
from kd_d2.extensions import import_extensions
from kd_d2.meta_arch import META_ARCH_REGISTRY

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from helpers import ROOT, KillAt, clean_process, configured, example, make_project, make_trainer, run_command, train


def test_five_lines_of_yaml(tmp_path):
    """Check that the README's config, with its files in place, is a valid distillation on custom data."""
    text = example("config", "README.md")
    assert len(text.strip().splitlines()) == 5
    (tmp_path / "my.yaml").write_text(text)
    (tmp_path / "images").mkdir()
    for name in ("train.json", "val.json"):
        (tmp_path / name).write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    (tmp_path / "teacher.yaml").write_text("MODEL: {META_ARCHITECTURE: RetinaNet}\n")
    (tmp_path / "teacher.pth").write_bytes(b"")
    cfg = load_config(str(tmp_path / "my.yaml"))
    assert cfg.MODEL.META_ARCHITECTURE == "KDMetaArch" and cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert cfg.MODEL.KD.DISTILLERS and cfg.MODEL.KD.INHERIT.ENABLED and cfg.MODEL.KD.BALANCE.ENABLED
    assert str(tmp_path / "teacher.pth") == cfg.MODEL.KD.TEACHER.WEIGHTS
    assert cfg.DATASETS.COCO_JSON[0] == ["my_train", str(tmp_path / "train.json"), str(tmp_path / "images")]


def test_a_smaller_student(tmp_path, monkeypatch):
    """Check that the guide's example is a valid config over the README's, and builds a ResNet-10."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(example("config", "README.md"))
    (tmp_path / "small.yaml").write_text(example("small", "docs/guides/own-data.md"))
    for name in ("teacher.pth", "resnet18.pth"):
        (tmp_path / name).touch()
    (tmp_path / "teacher.yaml").write_text("MODEL: {META_ARCHITECTURE: RetinaNet}\n")
    cfg = load_config("small.yaml", ["MODEL.DEVICE", "cpu"], needs_data=False)
    assert cfg.MODEL.META_ARCHITECTURE == "KDMetaArch"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    stages = build_model(cfg).backbone.bottom_up.stages
    assert [len(stage) for stage in stages] == [1, 1, 1, 1]


def test_a_backbone_from_timm(tmp_path, monkeypatch):
    """Check that the guide's example is a valid config over the README's, and builds the network."""
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(example("config", "README.md"))
    (tmp_path / "mobile.yaml").write_text(example("timm", "docs/guides/own-data.md"))
    (tmp_path / "teacher.yaml").write_text("MODEL: {META_ARCHITECTURE: RetinaNet}\n")
    (tmp_path / "teacher.pth").touch()
    cfg = load_config("mobile.yaml", ["MODEL.DEVICE", "cpu"], needs_data=False)
    assert cfg.MODEL.WEIGHTS == "timm://mobilenetv4_conv_small"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert build_model(cfg).backbone.bottom_up.name == "mobilenetv4_conv_small"


@pytest.fixture
def channel_means():
    """Register the guide's example of a method for one test."""
    scope: dict = {}
    code = example("distiller", "docs/guides/own-method.md")
    assert len([line for line in code.splitlines() if line.strip() and not line.strip().startswith('"""')]) <= 25
    exec(compile(code, "own-method.md", "exec"), scope)
    yield scope["ChannelMeans"]
    del DISTILLER_REGISTRY._obj_map["ChannelMeans"]


def test_the_example_of_a_method_trains(channel_means, tiny_cfg, tiny_detector, make_inputs, event_storage):
    """Check that the example reads its keys, computes the loss it describes, and trains the student."""
    overrides = {
        "MODEL": {"KD": {"CHANNEL_MEANS": {"FROM_STRIDE": 32, "WEIGHT": 3.0}, "DISTILLERS": ("ChannelMeans",)}}
    }
    cfg = tiny_cfg("retinanet", overrides)
    student, teacher = META_ARCH_REGISTRY.get("RetinaNet")(cfg), Teacher(tiny_detector("retinanet", seed=1))
    distiller = configured(channel_means, cfg, build_adapter(student).spec, teacher.spec)
    model = KDMetaArch(student=student, teacher=teacher, distillers={"ChannelMeans": distiller}).train()
    inputs = make_inputs()
    losses = model(inputs)
    losses["loss_channel_means"].backward()
    assert {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    with torch.no_grad():
        ours = model.adapter.run(inputs, frozenset()).features
        theirs = teacher(inputs, frozenset()).features
    expected = sum((ours[s].mean((2, 3)) - theirs[s].mean((2, 3))).square().mean() for s in (32, 64, 128))
    assert losses["loss_channel_means"].item() == pytest.approx(3.0 * expected.item(), rel=1e-3)


@pytest.fixture
def one_level_files(tmp_path):
    """Write the guide's detector and its adapter to files, and undo what they register after the test."""
    registries = META_ARCH_REGISTRY, DETECTOR_ADAPTER_REGISTRY
    before = [dict(registry._obj_map) for registry in registries]
    paths = [tmp_path / "one_level.py", tmp_path / "one_level_adapter.py"]
    for path, name in zip(paths, ("detector of your own", "adapter of your own"), strict=True):
        path.write_text(example(name, "docs/guides/own-detector.md"))
    yield list(map(str, paths))
    for registry, entries in zip(registries, before, strict=True):
        registry._obj_map = entries
    for path in paths:
        sys.modules.pop(path.stem, None)


def test_the_example_of_a_detector(one_level_files, tiny_cfg, make_inputs, event_storage):
    """Check the detector without its adapter; with it, the same detection losses, and methods that use predictions.

    One of the images has no objects.
    """
    detector_file, adapter_file = one_level_files
    import_extensions([detector_file])
    overrides = {
        "MODEL": {
            "RETINANET": {"IN_FEATURES": ["p5"]},
            "ANCHOR_GENERATOR": {"SIZES": [[32, 64]], "ASPECT_RATIOS": [[1.0]]},
            "KD": {"DISTILLERS": ("RankMimicking", "PFI", "SoftLabel", "DIST", "StructuralKD")},
        }
    }
    cfg = tiny_cfg("retinanet", overrides)
    student, teacher = (META_ARCH_REGISTRY.get("OneLevelDetector")(cfg).train() for _ in range(2))
    assert build_adapter(student).spec.provides == {"features", "detections", "losses", "targets"}
    import_extensions([adapter_file])
    adapter, inputs = build_adapter(student), make_inputs(sizes=((64, 80), (56, 96), (64, 64)), counts=(3, 2, 0))
    targets = [entry["instances"] for entry in inputs]
    own, outputs = student(inputs), adapter.run(inputs, frozenset({"dense"}), targets)
    assert outputs.losses.keys() == own.keys() == {"loss_scores", "loss_boxes"}
    for name, loss in own.items():
        assert outputs.losses[name].item() == pytest.approx(loss.item(), rel=1e-5)
    teacher = Teacher(teacher)
    names = cfg.MODEL.KD.DISTILLERS
    distillers = {name: configured(DISTILLER_REGISTRY.get(name), cfg, adapter.spec, teacher.spec) for name in names}
    losses = KDMetaArch(student=student, teacher=teacher, distillers=distillers).train()(inputs)
    distilled = {name: loss for name, loss in losses.items() if name not in own}
    assert len(distilled) >= 6 and all(loss > 0 for loss in distilled.values())
    sum(distilled.values()).backward()
    assert all(parameter.grad.any() for parameter in student.head.parameters())


def test_training_the_example_of_a_detector(one_level_files, tmp_path, monkeypatch):
    """Check the guide's config and command over a distillation from a RetinaNet with the method of the README."""
    guide = "docs/guides/own-detector.md"
    project = make_project(tmp_path, SOLVER__MAX_ITER=1, MODEL__KD__DISTILLERS=["StructuralKD"])
    project.change(MODEL__KD__INHERIT__ENABLED=True)
    project.student.rename(tmp_path / "my.yaml")
    (tmp_path / "one_level.yaml").write_text(example("config with a detector of your own", guide))
    monkeypatch.chdir(tmp_path)
    run_command(*shlex.split(example("training a detector of your own", guide))[1:])
    assert "scores" in (project.output / "metrics.json").read_text()
    log = (project.output / "log.txt").read_text()
    assert "Teacher: RetinaNet" in log and "(student): OneLevelDetector" in log


def test_the_example_of_a_trainer(tmp_path, monkeypatch):
    """Check the size of the images from the example's mapper, distillation, the files in OUTPUT_DIR, and a second run, which resumes."""
    project = make_project(tmp_path, SOLVER__MAX_ITER=1, DATASETS__TEST=[], MODEL__KD__DISTILLERS=["PKD"])
    project.student.rename(tmp_path / "my.yaml")
    path = tmp_path / "train_my.py"
    path.write_text(example("own trainer", "docs/guides/own-training.md").replace("(480, 640)", "(48, 64)"))
    monkeypatch.chdir(tmp_path)
    sizes = []
    forward = KDMetaArch.forward
    monkeypatch.setattr(
        KDMetaArch,
        "forward",
        lambda model, batch: sizes.extend(x["image"].shape[-2:] for x in batch) or forward(model, batch),
    )
    with clean_process():
        trained = runpy.run_path(str(path), run_name="__main__")["trainer"]
    assert sizes == [(48, 64)] * len(sizes)
    assert sizes
    assert "loss_pkd" in trained.storage.latest()
    assert "loss_pkd" in (project.output / "log.txt").read_text()
    assert {"config.yaml", "student.yaml", "versions.json"} <= {path.name for path in project.output.iterdir()}
    seen = len(sizes)
    with clean_process():
        again = runpy.run_path(str(path), run_name="__main__")["trainer"]
    assert (again.start_iter, len(sizes)) == (1, seen)


def test_the_example_of_a_hook(tmp_path, monkeypatch):
    """Check the iterations and metrics that `kd-d2 train --import` gives to wandb, which is replaced, and to each process once."""
    project = make_project(tmp_path, SOLVER__MAX_ITER=45, DATASETS__TEST=[], MODEL__KD__DISTILLERS=["PKD"])
    (tmp_path / "wandb_log.py").write_text(example("hook", "docs/guides/own-training.md"))
    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish"))
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **options: calls.append(options["dir"]) or run)
    )
    monkeypatch.setattr(hooks, "HOOK_BUILDERS", [])
    run_command("train", project.student, "--import", tmp_path / "wandb_log.py")
    folder, (first, values), (second, _), end = calls
    assert (folder, first, second, end) == (str(project.output), 19, 39, "finish")
    assert {"loss_pkd", "total_loss", "lr"} <= values.keys()


class Counter(HookBase):
    def __init__(self):
        self.count = 0

    def after_step(self):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_the_state_of_a_registered_hook(tmp_path, monkeypatch):
    """Check that a training of 3 iterations, resumed for 6, counts 6, with the losses of one without the hook."""
    project = make_project(tmp_path)
    plain = train(project, "SOLVER.MAX_ITER", 6, "OUTPUT_DIR", tmp_path / "plain").losses
    counters = []
    monkeypatch.setattr(hooks, "HOOK_BUILDERS", [])
    register_hook(lambda cfg: counters.append(Counter()) or counters[-1])
    register_hook(lambda cfg: None)
    first = train(project, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, hooks=(KillAt(2),)).losses
    second = train(project, "SOLVER.MAX_ITER", 6, resume=True).losses
    assert counters[-1].count == 6
    assert first | second == plain


def test_a_registered_hook_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "HOOK_BUILDERS", [])

    @register_hook
    def build_logger(cfg):
        return "logger"

    with pytest.raises(
        UserError, match="The function build_logger of register_hook returned 'logger'; it must be a HookBase or None"
    ):
        make_trainer(make_project(tmp_path))


def test_two_adapters_for_one_class(one_level_files, tiny_detector):
    """Check that the second adapter does not silently replace the first."""
    import_extensions(one_level_files)
    adapter = DETECTOR_ADAPTER_REGISTRY.get("OneLevelAdapter")
    DETECTOR_ADAPTER_REGISTRY._do_register("Another", type("Another", (adapter,), {}))
    with pytest.raises(UserError, match="OneLevelAdapter and Another are both registered for OneLevelDetector"):
        build_adapter(tiny_detector("retinanet"))


def test_links_between_files() -> None:
    """Check that the files exist in the repository, where they are read on GitHub."""
    pages = [page for folder in ("docs", "projects", "benchmarks", "cluster") for page in (ROOT / folder).rglob("*.md")]
    for page in [*ROOT.glob("*.md"), *pages]:
        for target in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), (page, target)


def test_the_table_of_methods_and_detectors() -> None:
    """Check each ✓ in the README against what the methods need and the detectors provide."""
    columns = {"retinanet": 3, "fcos": 3, "atss": 3, "gfl": 3, "fsaf": 3, "reppoints": 4, "faster-rcnn": 5}
    configs = {
        name: load_config(str(ROOT / f"configs/tiny/{name}-student.yaml"), ["MODEL.WEIGHTS", ""]) for name in columns
    }
    specs = {name: build_adapter(build_model(cfg)).spec for name, cfg in configs.items()}
    text = (ROOT / "README.md").read_text()
    rows = {
        row[1].strip("` "): row
        for row in (line.split("|") for line in text.splitlines())
        if row[0] == "" and len(row) == 9
    }
    assert {name for name, _ in DISTILLER_REGISTRY} == rows.keys() - {"MODEL.KD.DISTILLERS", "---"}
    for name, method in DISTILLER_REGISTRY:
        for detector, column in columns.items():
            provided = specs[detector].provides
            works = method.needs <= provided or (method.alternative_needs or {None}) <= provided
            cell = rows[name][column].strip()
            assert works == (cell == "✓" or cell.lower() == f"{detector} only"), (name, detector)
        assert (rows[name][6].strip() == "✓") == (method.needs <= {"features"}), name
