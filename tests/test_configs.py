"""All configs of the project: each is valid, matches its name, and describes models that can be built."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kd_d2 import DISTILLER_REGISTRY
from kd_d2.adapters import DetectorSpec, build_adapter
from kd_d2.config import KD_META_ARCH, load_config, load_teacher_config
from kd_d2.config_files import as_overrides, read_yaml
from kd_d2.distillers.icd import distiller as icd
from kd_d2.inheritance import component_of, inherit
from kd_d2.sweep.matrix import read_matrix

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from helpers import configured
from torch import nn

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny"
RECOMMENDED = ROOT / "configs" / "recommended"
THESIS = ROOT / "projects" / "StructuralKD" / "configs"
ICD = ROOT / "projects" / "ICD" / "configs"
FILES = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/*/configs/**/*.yaml")])
MATRICES = [path for path in FILES if "cells" in yaml.safe_load(path.read_text())]
CONFIGS = [path for path in FILES if path not in MATRICES]

COCO_IMAGES_WITH_OBJECTS = 117266
R50, R101 = "detectron2://ImageNetPretrained/MSRA/R-50.pkl", "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
X101 = "cascade_rcnn_X101.yaml"
P2_TO_P6, P3_TO_P7 = [4, 8, 16, 32, 64], [8, 16, 32, 64, 128]


class Plain(NamedTuple):
    family: str
    depth: int
    weights: str
    lr: float
    strides: list[int]
    million_parameters: float


class Distilled(NamedTuple):
    student: str
    teacher: str
    loss: str
    weight: float
    adaptation: str
    inherits: bool


PLAIN = {
    "retinanet_R50": Plain("one-stage", 50, R50, 0.01, P3_TO_P7, 37.9),
    "retinanet_R18": Plain("one-stage", 18, "resnet18.pth", 0.01, P3_TO_P7, 21.3),
    "faster_rcnn_R50": Plain("two-stage", 50, R50, 0.02, P2_TO_P6, 41.7),
}
DISTILLED = {
    "retinanet_R101-R50_l1": Distilled("retinanet_R50", R101, "l1", 4, "none", False),
    "retinanet_R101-R50_l2": Distilled("retinanet_R50", R101, "l2", 4, "none", False),
    "retinanet_R101-R50_ssim": Distilled("retinanet_R50", R101, "ssim", 4, "none", False),
    "retinanet_R101-R50_l1_inherit": Distilled("retinanet_R50", R101, "l1", 4, "none", True),
    "retinanet_R101-R50_l2_inherit": Distilled("retinanet_R50", R101, "l2", 4, "none", True),
    "retinanet_R101-R50_ssim_inherit": Distilled("retinanet_R50", R101, "ssim", 4, "none", True),
    "retinanet_R101-R18_l1": Distilled("retinanet_R18", R101, "l1", 4, "none", False),
    "retinanet_R101-R18_l2": Distilled("retinanet_R18", R101, "l2", 4, "none", False),
    "retinanet_R101-R18_ssim": Distilled("retinanet_R18", R101, "ssim", 4, "none", False),
    "retinanet_R101-R18_l1_inherit": Distilled("retinanet_R18", R101, "l1", 4, "none", True),
    "retinanet_R101-R18_l2_inherit": Distilled("retinanet_R18", R101, "l2", 4, "none", True),
    "retinanet_R101-R18_ssim_inherit": Distilled("retinanet_R18", R101, "ssim", 4, "none", True),
    "faster_rcnn_X101-R50_l1": Distilled("faster_rcnn_R50", X101, "l1", 2, "1x1", False),
    "faster_rcnn_X101-R50_l2": Distilled("faster_rcnn_R50", X101, "l2", 2, "1x1", False),
    "faster_rcnn_X101-R50_ssim": Distilled("faster_rcnn_R50", X101, "ssim", 2, "1x1", False),
    "faster_rcnn_X101-R50_l1_inherit": Distilled("faster_rcnn_R50", X101, "l1", 2, "1x1", True),
    "faster_rcnn_X101-R50_l2_inherit": Distilled("faster_rcnn_R50", X101, "l2", 2, "1x1", True),
    "faster_rcnn_X101-R50_ssim_inherit": Distilled("faster_rcnn_R50", X101, "ssim", 2, "1x1", True),
    "faster_rcnn_R101-R50_ssim_inherit": Distilled(
        "faster_rcnn_R50", "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", "ssim", 2, "none", True
    ),
}
SSIM = "retinanet_R101-R50_ssim"
STRUCTURAL = "MODEL.KD.STRUCTURAL."
TWICE_AS_LONG = {"SOLVER.STEPS": [234500, 322500], "SOLVER.MAX_ITER": 351800}
NO_ANNOTATIONS = {"MODEL.KD.PSEUDO_LABELS.ENABLED": True}
VARIANTS = {
    **{
        f"{SSIM}_{component}": (SSIM, {STRUCTURAL + "SSIM_EXPONENTS": exponents})
        for component, exponents in (
            ("luminance", [1.0, 0.0, 0.0]),
            ("contrast", [0.0, 1.0, 0.0]),
            ("structure", [0.0, 0.0, 1.0]),
            ("contrast_structure", [0.0, 1.0, 1.0]),
        )
    },
    f"{SSIM}_2x": (SSIM, TWICE_AS_LONG),
    "retinanet_R50_2x": ("retinanet_R50", TWICE_AS_LONG),
    f"{SSIM}_1x1": (SSIM, {STRUCTURAL + "ADAPTATION": "1x1"}),
    "faster_rcnn_X101-R50_ssim_no_adaptation": ("faster_rcnn_X101-R50_ssim", {STRUCTURAL + "ADAPTATION": "none"}),
    **{f"{SSIM}_F{side}": (SSIM, {STRUCTURAL + "WINDOW_SIZE": side}) for side in (5, 7, 9, 13)},
    **{
        f"retinanet_R101-R50_{loss}": (SSIM, {STRUCTURAL + "LOSS": loss})
        for loss in ("smooth_l1", "ms_ssim", "l1_ms_ssim")
    },
    "retinanet_R101-R50_spatial_ssim": (SSIM, {STRUCTURAL + "SPATIAL_ATTENTION": True}),
    f"{SSIM}_no_annotations": (SSIM, NO_ANNOTATIONS),
    "retinanet_R101-R50_l2_no_annotations": ("retinanet_R101-R50_l2", NO_ANNOTATIONS),
    "retinanet_R101-R50_fkd": (SSIM, {"MODEL.KD.DISTILLERS": ["FKD"]}),
    "faster_rcnn_X101-R50_fkd": ("faster_rcnn_X101-R50_ssim", {"MODEL.KD.DISTILLERS": ["FKD"]}),
    **{
        f"{pair}_ssim_inherit_as_icd": (
            f"../../ICD/configs/{pair}_icd_inherit",
            {"MODEL.KD.DISTILLERS": ["StructuralKD"]},
        )
        for pair in ("retinanet_R101-R50", "faster_rcnn_R101-R50")
    },
    "retinanet_R101-R50_no_annotations": (SSIM, {**NO_ANNOTATIONS, "MODEL.KD.DISTILLERS": []}),
}
"""For each variant in the thesis, the config that it is based on and the keys that differ."""
OTHER_DETECTORS = {"fsaf": ("FSAF", 36.4), "reppoints": ("RepPoints", 36.8)}
OTHERS = {
    X101.removesuffix(".yaml"),
    f"{SSIM}_bn",
    *(f"{name}_{rest}" for name in OTHER_DETECTORS for rest in ("X101", "R50", "X101-R50_ssim")),
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of an empty file that replaces checkpoints only a user has."""
    path = tmp_path_factory.mktemp("weights") / "stand_in.pth"
    path.touch()
    return str(path)


def load(path: Path, stand_in: str, *opts, **kwargs) -> CfgNode:
    """Load a config with the user's files replaced, and with a teacher if the config leaves it to the user."""
    model = read_yaml(str(path)).get("MODEL", {})
    teacher = model.get("KD", {}).get("TEACHER", {})
    opts = list(opts)
    if model.get("WEIGHTS") and "://" not in model["WEIGHTS"]:
        opts += ["MODEL.WEIGHTS", stand_in]
    if model.get("META_ARCHITECTURE") == KD_META_ARCH and not teacher.get("CONFIG_FILE"):
        classes = ["MODEL.RETINANET.NUM_CLASSES", model["RETINANET"]["NUM_CLASSES"]]
        opts += ["MODEL.KD.TEACHER.CONFIG_FILE", str(TINY / "retinanet-teacher.yaml"), "MODEL.KD.TEACHER.OPTS", classes]
        teacher = {"WEIGHTS": stand_in}
    if teacher.get("WEIGHTS"):
        opts += ["MODEL.KD.TEACHER.WEIGHTS", stand_in]
    return load_config(str(path), opts, **kwargs)


def build(cfg: CfgNode) -> nn.Module:
    """Build the detector of a config (the student of a distillation) on the meta device."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    if cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.KD.STUDENT
    with torch.device("meta"):
        return build_model(cfg)


SPECS: dict[str, DetectorSpec] = {}


def spec_of(cfg: CfgNode) -> DetectorSpec:
    """Return the spec of a config's detector, built once for all configs that differ only in MODEL.KD and weights.

    It has no anchors, which have no values on the meta device.
    """
    detector = cfg.MODEL.KD.STUDENT if cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH else cfg.MODEL.META_ARCHITECTURE
    model = {key: value for key, value in cfg.MODEL.items() if key not in ("META_ARCHITECTURE", "WEIGHTS", "KD")}
    keys = json.dumps([detector, model, {key: value for key, value in cfg.items() if key != "MODEL"}])
    if keys not in SPECS:
        SPECS[keys] = replace(build_adapter(build(cfg)).spec, cell_anchors=None)
    return SPECS[keys]


def pair(cfg: CfgNode) -> tuple[nn.Module, nn.Module]:
    return build(cfg), build(load_teacher_config(cfg))


def without(cfg: CfgNode, *keys: str) -> dict:
    tree = json.loads(json.dumps(cfg))
    for key in keys:
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        del node[leaf]
    return tree


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_loads_and_its_pair_can_be_built(
    path: Path, stand_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the config is valid, and that its distillers accept its student and teacher."""
    monkeypatch.setattr(icd, "read_priors", lambda datasets, k: (torch.ones(k), torch.ones(k, 2), torch.ones(k, 2)))
    cfg = load(path, stand_in)
    if "Base" in path.stem or path.stem == "base":
        return
    if cfg.MODEL.META_ARCHITECTURE != KD_META_ARCH:
        build(cfg)
        return
    student, teacher = spec_of(cfg), spec_of(load_teacher_config(cfg))
    assert student.num_classes == teacher.num_classes
    for name in cfg.MODEL.KD.DISTILLERS:
        configured(DISTILLER_REGISTRY.get(name), cfg, student, teacher)


@pytest.mark.parametrize("path", MATRICES, ids=name_of)
def test_every_cell_of_a_matrix_loads(path: Path, stand_in: str) -> None:
    """Check that each cell has a valid config, so that no sweep fails at its last cell."""
    matrix = read_matrix(str(path))
    for cell in (*matrix.cells, *filter(None, [matrix.teacher])):
        load(Path(cell.config), stand_in, *cell.opts)


@pytest.mark.parametrize("name", ["Base-RetinaNet.yaml", "Base-RCNN-FPN.yaml"])
def test_bases_are_detectron2s_own(name: str) -> None:
    ours, theirs = load_config(str(ROOT / "configs" / name)), load_config(name)
    assert ours.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    keys = ["DATALOADER.FILTER_EMPTY_ANNOTATIONS"]
    assert without(ours, *keys) == without(theirs, *keys)


def test_the_thesis_tables_are_complete() -> None:
    """Check that this file lists exactly the configs of the folder, and that the notes have rows of these tables."""
    files = {path.stem for path in THESIS.glob("*.yaml") if not path.stem.startswith("Base-")}
    assert files == PLAIN.keys() | DISTILLED.keys() | VARIANTS.keys() | OTHERS
    assert tables_in_readme(THESIS) == {"1", "2", "3", "4", "5", "6", "7", "10", "11"}


def tables_in_readme(configs: Path) -> set[str]:
    """Return the numbers of the paper's tables in a project's notes, whose rows must name existing configs."""
    tables = set()
    for line in (configs.parent / "notes.md").read_text().splitlines():
        if match := re.match(r"\| (\d+) \|.*\|(.*)\|$", line):
            tables.add(match[1])
            named = re.findall(r"`([\w/.-]+)`", match[2])
            assert named and all((configs / f"{name}.yaml").is_file() for name in named), line
    return tables


@pytest.mark.parametrize("name", PLAIN)
def test_plain_students_of_the_thesis(name: str, stand_in: str) -> None:
    expected = PLAIN[name]
    path = THESIS / f"{name}.yaml"
    cfg = load(path, stand_in)
    assert read_yaml(str(path))["MODEL"]["WEIGHTS"] == expected.weights
    assert expected.depth == cfg.MODEL.RESNETS.DEPTH
    assert (expected.lr, 8) == (cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH)
    assert (cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY) == (0.9, 1e-4)
    epochs = [n * 8 / COCO_IMAGES_WITH_OBJECTS for n in (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)]
    assert epochs == pytest.approx([8, 11, 12], abs=0.01)
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == [800] and cfg.INPUT.RANDOM_FLIP == "horizontal"
    assert list(cfg.DATASETS.TRAIN) == ["coco_2017_train"] and list(cfg.DATASETS.TEST) == ["coco_2017_val"]

    model = build(cfg)
    spec = build_adapter(model).spec
    assert (spec.family, spec.num_classes, sorted(spec.shapes)) == (expected.family, 80, expected.strides)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert parameters == pytest.approx(expected.million_parameters, abs=0.15)


def test_input_formats_belong_to_the_starting_weights(stand_in: str) -> None:
    caffe, torchvision = (load(THESIS / f"retinanet_{name}.yaml", stand_in) for name in ("R50", "R18"))
    assert caffe.INPUT.FORMAT == "BGR"
    assert list(caffe.MODEL.PIXEL_STD) == [1, 1, 1] and caffe.MODEL.PIXEL_MEAN[0] == 103.53
    assert torchvision.INPUT.FORMAT == "RGB"
    assert list(torchvision.MODEL.PIXEL_MEAN) == [123.675, 116.28, 103.53]
    assert list(torchvision.MODEL.PIXEL_STD) == [58.395, 57.12, 57.375]


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_students_of_the_thesis(name: str, stand_in: str) -> None:
    expected = DISTILLED[name]
    cfg = load(THESIS / f"{name}.yaml", stand_in)
    kd = cfg.MODEL.KD
    assert list(kd.DISTILLERS) == ["StructuralKD"]
    assert expected[2:5] == (kd.STRUCTURAL.LOSS, kd.STRUCTURAL.WEIGHT, kd.STRUCTURAL.ADAPTATION)
    assert kd.INHERIT.ENABLED is expected.inherits
    assert list(kd.INHERIT.MODULES) == ["neck", "head"]
    local = expected.teacher == X101
    assert (str(THESIS / X101) if local else expected.teacher) == kd.TEACHER.CONFIG_FILE
    assert bool(kd.TEACHER.WEIGHTS) is local

    student = load(THESIS / f"{name}.yaml", stand_in, student_only=True)
    plain = load(THESIS / f"{expected.student}.yaml", stand_in)
    assert without(student, "MODEL.KD") == without(plain, "MODEL.KD")


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_thesis(name: str, stand_in: str) -> None:
    """Check that only the keys in VARIANTS differ from the base config."""
    base, expected = VARIANTS[name]
    ours, theirs = (without(load(THESIS / f"{n}.yaml", stand_in)) for n in (name, base))
    assert dict(differences(ours, theirs)) == expected


def differences(tree: dict, other: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from differences(value, other[key], f"{prefix}{key}.")
        elif value != other[key]:
            yield prefix + key, value


@pytest.mark.parametrize("name", OTHER_DETECTORS)
def test_other_detectors_of_the_thesis(name: str, stand_in: str) -> None:
    """Check schedule, size and levels of the student, and that its teacher is the same detector on ResNeXt."""
    detector, million_parameters = OTHER_DETECTORS[name]
    plain = load(THESIS / f"{name}_R50.yaml", stand_in)
    retinanet = load(THESIS / "retinanet_R50.yaml", stand_in)
    assert detector == plain.MODEL.META_ARCHITECTURE
    for key in ("STEPS", "MAX_ITER", "IMS_PER_BATCH", "BASE_LR"):
        assert plain.SOLVER[key] == retinanet.SOLVER[key]
    assert plain.MODEL.BACKBONE == retinanet.MODEL.BACKBONE
    model = build(plain)
    assert sorted(build_adapter(model).spec.shapes) == P3_TO_P7
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million_parameters, abs=0.15)
    cfg = load(THESIS / f"{name}_X101-R50_ssim.yaml", stand_in)
    assert without(load(THESIS / f"{name}_X101-R50_ssim.yaml", stand_in, student_only=True), "MODEL.KD") == without(
        plain, "MODEL.KD"
    )
    teacher = load_teacher_config(cfg)
    assert (detector, 32) == (teacher.MODEL.META_ARCHITECTURE, teacher.MODEL.RESNETS.NUM_GROUPS)


def test_teachers_of_the_zoo_come_with_their_trained_checkpoint(stand_in: str) -> None:
    cfg = load_teacher_config(load(THESIS / "retinanet_R101-R50_ssim.yaml", stand_in))
    assert cfg.MODEL.RESNETS.DEPTH == 101
    assert "retinanet_R_101_FPN_3x" in cfg.MODEL.WEIGHTS and cfg.MODEL.WEIGHTS.endswith("model_final_971ab9.pkl")


def test_cascade_teacher(stand_in: str) -> None:
    cfg = load(THESIS / X101, stand_in)
    assert cfg.MODEL.WEIGHTS.endswith("FAIR/X-101-32x8d.pkl")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (270000, 16, 0.02)
    zoo = load_config("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml")
    for key in ("RESNETS", "FPN", "PIXEL_MEAN", "PIXEL_STD", "WEIGHTS"):
        assert cfg.MODEL[key] == zoo.MODEL[key]
    zoo = load_config("Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml")
    for key in ("RPN", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_BOX_CASCADE_HEAD", "ANCHOR_GENERATOR"):
        assert cfg.MODEL[key] == zoo.MODEL[key]
    assert len(build(cfg).roi_heads.box_head) == 3


def inherited(cfg: CfgNode) -> tuple[set[str], set[str]]:
    """Return names of the neck's and head's tensors that are copied from the teacher, and of the others."""
    student, teacher = pair(cfg)
    filled = set(inherit(student, teacher, cfg.MODEL.KD.INHERIT.MODULES).filled)
    return filled, {name for name in student.state_dict() if component_of(name) != "bottom_up"} - filled


def modules(names: set[str]) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in names}


def test_what_is_inherited(stand_in: str) -> None:
    """Check what the comments in the configs state about inheritance."""
    _, rest = inherited(load(THESIS / "retinanet_R101-R50_ssim_inherit.yaml", stand_in))
    assert not rest
    _, rest = inherited(load(THESIS / "retinanet_R101-R18_ssim_inherit.yaml", stand_in))
    layers = ("fpn_lateral3", "fpn_lateral4", "fpn_lateral5", "top_block.p6")
    assert rest == {f"backbone.{layer}.{tensor}" for layer in layers for tensor in ("weight", "bias")}
    filled, rest = inherited(load(THESIS / "faster_rcnn_X101-R50_ssim_inherit.yaml", stand_in))
    assert "proposal_generator.rpn_head" in modules(filled)
    assert modules(rest) == {"roi_heads.box_head", "roi_heads.box_predictor"}
    _, rest = inherited(load(THESIS / "faster_rcnn_R101-R50_ssim_inherit.yaml", stand_in))
    assert not rest


def test_batch_norm_is_a_switch(stand_in: str) -> None:
    def norms(path: Path, *opts) -> dict[str, int]:
        model = build(load(path, stand_in, *opts))
        names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
        return {part: sum(component_of(name) == part for name in names) for part in ("bottom_up", "neck", "head")}

    assert norms(THESIS / "retinanet_R101-R50_ssim.yaml") == {"bottom_up": 0, "neck": 0, "head": 0}
    levels, convolutions = 5, 2 * 4
    expected = {"bottom_up": 0, "neck": 6, "head": levels * convolutions}
    assert norms(THESIS / "retinanet_R101-R50_ssim_bn.yaml") == expected
    overrides = yaml.safe_load((THESIS / "Base-RCNN-FPN-BN.yaml").read_text())
    assert overrides == {"MODEL": {"FPN": {"NORM": "BN"}}}
    assert norms(THESIS / "faster_rcnn_R50.yaml", "MODEL.FPN.NORM", "BN") == {"bottom_up": 0, "neck": 8, "head": 0}


TINY_EXAMPLES = {
    "ssim": ("retinanet", "fsaf", "reppoints", "faster-rcnn"),
    "rm-pfi": ("retinanet", "fcos", "atss", "gfl"),
    "soft-label": ("faster-rcnn",),
    **dict.fromkeys(("feature-imitation", "gid"), ("retinanet",)),
    **dict.fromkeys(
        (
            "icd",
            "ima",
            "fgfi",
            "defeat",
            "fkd",
            "cwd",
            "pkd",
            "mgd",
            "fgd",
            "reviewkd",
            "diffkd",
            "frs",
            "maskd",
            "freekd",
        ),
        ("retinanet", "faster-rcnn"),
    ),
}
"""Detectors by name of the recommended settings."""


@pytest.mark.parametrize(
    ("detector", "fragment"), [(detector, name) for name, detectors in TINY_EXAMPLES.items() for detector in detectors]
)
def test_tiny_examples(detector: str, fragment: str, stand_in: str) -> None:
    """Check that only the recommended settings differ from the tiny student with inheritance."""
    cfg, inherit_alone = (load(TINY / f"{detector}-{name}.yaml", stand_in) for name in (fragment, "inherit"))
    inherit_alone.merge_from_list(as_overrides(str(RECOMMENDED / f"{fragment}.yaml")))
    assert cfg == inherit_alone


@pytest.mark.parametrize(("detector", "fragment"), [("retinanet", "pkd"), ("fcos", "fgd"), ("gfl", "mgd")])
def test_tiny_examples_of_different_families(detector: str, fragment: str, stand_in: str) -> None:
    """Check that only teacher and inheritance differ from the recommended settings; four levels are compared."""
    name = f"{detector}-{fragment}-from-faster-rcnn"
    cfg, expected = (load(TINY / f"{n}.yaml", stand_in) for n in (name, f"{detector}-inherit"))
    expected.merge_from_list(as_overrides(str(RECOMMENDED / f"{fragment}.yaml")))
    teacher = {
        "MODEL.KD.TEACHER.CONFIG_FILE": str(TINY / "faster-rcnn-teacher.yaml"),
        "MODEL.KD.INHERIT.ENABLED": False,
    }
    assert dict(differences(without(cfg), without(expected))) == teacher
    weights = read_yaml(str(TINY / f"{name}.yaml"))["MODEL"]["KD"]["TEACHER"]["WEIGHTS"]
    assert weights == "output/tiny/faster-rcnn-teacher/model_final.pth"
    student, other = (build_adapter(model).spec for model in pair(cfg))
    assert (student.family, other.family) == ("one-stage", "two-stage")
    (method,) = cfg.MODEL.KD.DISTILLERS
    assert configured(DISTILLER_REGISTRY.get(method), cfg, student, other).adaptation.strides == (8, 16, 32, 64)


PUBLISHED = {
    "DKD": ("faster-rcnn",),
    "DIST": ("retinanet", "faster-rcnn"),
    "LD": ("gfl",),
    "CrossKD": ("retinanet", "fcos", "atss", "gfl"),
}
"""Detectors by method, all with the authors' settings."""


@pytest.mark.parametrize(
    ("detector", "method"), [(detector, name) for name, detectors in PUBLISHED.items() for detector in detectors]
)
def test_tiny_examples_as_published(detector: str, method: str, stand_in: str) -> None:
    """Check that only the method differs from the tiny student with inheritance."""
    inherit_alone = load(TINY / f"{detector}-inherit.yaml", stand_in, "MODEL.KD.DISTILLERS", (method,))
    assert load(TINY / f"{detector}-{method.lower()}.yaml", stand_in) == inherit_alone


@pytest.mark.parametrize("detector", ["retinanet", "fcos", "atss", "gfl", "fsaf", "reppoints", "faster-rcnn"])
def test_tiny_inheritance(detector: str, stand_in: str) -> None:
    """Check that only MODEL.KD differs from the plain tiny student, and that all of the teacher's neck and head fit."""
    name = f"{detector}-inherit"
    cfg = load(TINY / f"{name}.yaml", stand_in)
    assert list(cfg.MODEL.KD.DISTILLERS) == []
    assert str(TINY / f"{detector}-teacher.yaml") == cfg.MODEL.KD.TEACHER.CONFIG_FILE
    weights = read_yaml(str(TINY / f"{name}.yaml"))["MODEL"]["KD"]["TEACHER"]["WEIGHTS"]
    assert weights == f"output/tiny/{detector}-teacher/model_final.pth"
    plain = load(TINY / f"{detector}-student.yaml", stand_in)
    student = load(TINY / f"{name}.yaml", stand_in, student_only=True)
    assert without(student, "MODEL.KD") == without(plain, "MODEL.KD")
    assert cfg.MODEL.KD.INHERIT.ENABLED
    assert not inherited(cfg)[1]
    sizes = [sum(p.numel() for p in model.parameters()) for model in pair(cfg)]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize(
    ("name", "zoo", "teacher"),
    [
        ("retinanet", "retinanet_R_50_FPN_1x", "retinanet_R_101_FPN_3x"),
        ("faster_rcnn", "faster_rcnn_R_50_FPN_1x", "faster_rcnn_R_101_FPN_3x"),
        ("mask_rcnn", "mask_rcnn_R_50_FPN_1x", "mask_rcnn_R_101_FPN_3x"),
    ],
)
def test_icd_on_coco_is_the_references_setting(name: str, zoo: str, teacher: str) -> None:
    """Check that the students are Detectron2's 1x models, and that ICD's keys have their published defaults."""
    group = "COCO-InstanceSegmentation" if name == "mask_rcnn" else "COCO-Detection"
    theirs = load_config(f"{group}/{zoo}.yaml")
    plain = load_config(str(ICD / f"{name}_R50.yaml"))
    filtered = "DATALOADER.FILTER_EMPTY_ANNOTATIONS"
    assert without(plain, filtered) == without(theirs, filtered)
    defaults = theirs.MODEL.KD.ICD
    for suffix, inherits in (("icd", False), ("icd_inherit", True)):
        cfg = load_config(str(ICD / f"{name}_R101-R50_{suffix}.yaml"))
        assert list(cfg.MODEL.KD.DISTILLERS) == ["ICD"] and defaults == cfg.MODEL.KD.ICD
        assert cfg.MODEL.KD.INHERIT.ENABLED is inherits
        assert f"{group}/{teacher}.yaml" == cfg.MODEL.KD.TEACHER.CONFIG_FILE
        student = load_config(str(ICD / f"{name}_R101-R50_{suffix}.yaml"), student_only=True)
        assert without(student, "MODEL.KD") == without(plain, "MODEL.KD")


@pytest.mark.parametrize("path", sorted(RECOMMENDED.glob("*.yaml")), ids=lambda path: path.stem)
def test_recommended_settings(path: Path, stand_in: str) -> None:
    """Check that they set only methods and their keys, not detector, data or schedule, and that they are valid."""
    overrides = as_overrides(str(path))
    assert all(key.startswith("MODEL.KD.") for key in overrides[::2])
    cfg = load(TINY / "retinanet-inherit.yaml", stand_in, *overrides)
    assert cfg.MODEL.KD.DISTILLERS and cfg.MODEL.KD.BALANCE.ENABLED
    nodes = {DISTILLER_REGISTRY.get(name).CONFIG_NODE for name in cfg.MODEL.KD.DISTILLERS} | {"BALANCE", "DISTILLERS"}
    assert {key.split(".")[2] for key in overrides[::2]} <= nodes
    with_levels = as_overrides(str(RECOMMENDED / "ssim.yaml"))
    over_another = load(TINY / "retinanet-inherit.yaml", stand_in, *with_levels, *overrides)
    assert over_another.MODEL.KD.BALANCE == cfg.MODEL.KD.BALANCE


BASELINES = {"fitnet": "FeatureImitation", "fgfi": "FGFI", "defeat": "DeFeat", "gid": "GID", "fkd": "FKD"}


@pytest.mark.parametrize(
    ("project", "detector", "suffix", "method"),
    [
        *(("Baselines", detector, suffix, method) for detector in ("retinanet", "faster_rcnn") for suffix, method in BASELINES.items()),
        *(("InstanceMaskAlignment", detector, "ima", "IMA") for detector in ("retinanet", "faster_rcnn")),
    ],
)  # fmt: skip
def test_methods_on_coco(project: str, detector: str, suffix: str, method: str) -> None:
    """Check that the students are Detectron2's 1x models, and that the method's keys have their defaults."""
    folder = ROOT / "projects" / project / "configs"
    if (detector, method) == ("faster_rcnn", "GID"):
        assert not list(folder.glob("faster_rcnn*gid*"))
        return
    theirs, plain = (
        load_config(f"COCO-Detection/{detector}_R_50_FPN_1x.yaml"),
        load_config(str(folder / f"{detector}_R50.yaml")),
    )
    filtered = "DATALOADER.FILTER_EMPTY_ANNOTATIONS"
    assert without(plain, filtered) == without(theirs, filtered)
    for name, inherits in ((suffix, False), (f"{suffix}_inherit", True)):
        path = str(folder / f"{detector}_R101-R50_{name}.yaml")
        cfg = load_config(path)
        assert list(cfg.MODEL.KD.DISTILLERS) == [method]
        node = DISTILLER_REGISTRY.get(method).CONFIG_NODE
        assert cfg.MODEL.KD[node] == theirs.MODEL.KD[node]
        assert cfg.MODEL.KD.INHERIT.ENABLED is inherits
        assert without(load_config(path, student_only=True), "MODEL.KD") == without(plain, "MODEL.KD")


@pytest.mark.parametrize("name", ["retinanet_MaskR101-R50_pkd", "gfl_R101-R50_pkd_crosskd"])
def test_pkd_of_one_stage_students_with_the_published_weight(name: str) -> None:
    """Check the weight of PKD where the published one is not the default of one-stage students, 10."""
    tree = read_yaml(str(ROOT / "projects" / "NewerMethods" / "configs" / f"{name}.yaml"))
    assert tree["MODEL"]["KD"]["PKD"]["WEIGHT"] == 6


def test_fkd_as_in_the_program() -> None:
    """Check these keys, and that only keys of FKD differ from the paper's config."""
    paper, program = (
        load_config(str(ROOT / "projects" / "Baselines" / "configs" / f"retinanet_R101-R50_{name}_inherit.yaml"))
        for name in ("fkd", "fkd_program")
    )
    node = program.MODEL.KD.FKD
    assert (node.WEIGHT, node.TEMPERATURE, node.ATTENTION, node.NORM) == (6.0, 0.1, "adapted", "batch")
    assert without(program, "MODEL.KD.FKD") == without(paper, "MODEL.KD.FKD")


def test_icd_on_fcos(stand_in: str) -> None:
    """Check the teacher's longer schedule, and that inheritance fills neck and head completely."""
    plain, teacher = (load(ICD / f"fcos_{name}.yaml", stand_in) for name in ("R50", "R101"))
    assert (teacher.SOLVER.MAX_ITER, plain.SOLVER.MAX_ITER) == (270000, 90000)
    for suffix in ("icd", "icd_inherit"):
        cfg = load(ICD / f"fcos_R101-R50_{suffix}.yaml", stand_in)
        assert list(cfg.MODEL.KD.DISTILLERS) == ["ICD"] and plain.MODEL.KD.ICD == cfg.MODEL.KD.ICD
        student = load(ICD / f"fcos_R101-R50_{suffix}.yaml", stand_in, student_only=True)
        assert without(student, "MODEL.KD") == without(plain, "MODEL.KD")
    assert not inherited(cfg)[1]


@pytest.mark.parametrize(("name", "parameters"), [("FCOS", 32.1), ("ATSS", 32.1), ("GFL", 32.3)])
def test_dense_detectors_of_coco_size(name: str, parameters: float) -> None:
    """Check the published sizes (in millions, R50, 80 classes) and the levels P3 to P7."""
    cfg = load_config(str(ROOT / "configs" / f"Base-{name}.yaml"), ["MODEL.WEIGHTS", ""])
    assert cfg.MODEL[name].SCORE_THRESH_TEST == 0.05
    model = build(cfg)
    spec = build_adapter(model).spec
    assert sorted(spec.shapes) == P3_TO_P7
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.15)


RM = ROOT / "projects" / "RankMimicking" / "configs"
METHODS_OF = {
    "rm": ["RankMimicking"],
    "pfi": ["PFI"],
    "rm_pfi": ["RankMimicking", "PFI"],
    "soft": ["SoftLabel"],
    "rm_classification": ["RankMimicking"],
    **{mask: ["PFI"] for mask in ("whole", "positives", "negatives", "boxes")},
}
# Rows of the paper's tables by detector, teacher-student pair and schedule.
RM_ROWS = {
    "retinanet_R50-R18": "rm pfi rm_pfi soft rm_classification",
    "fcos_R50-R18": "rm pfi rm_pfi soft",
    "atss_R50-R18": "rm pfi rm_pfi",
    "gfl_R50-R18": "rm pfi rm_pfi soft whole positives negatives boxes",
    "retinanet_R101-R50": "rm pfi rm_pfi",
    "retinanet_MV2-MV2half": "rm pfi rm_pfi",
    "retinanet_R101-R50_2x": "rm_pfi",
    "retinanet_R152-R50_2x": "rm_pfi",
    "retinanet_R101-R50_voc": "rm_pfi",
}
RM_NAMES = [f"{pair}_{row}" for pair, rows in RM_ROWS.items() for row in rows.split()]


def test_the_rank_mimicking_tables_are_complete() -> None:
    assert {path.stem for path in RM.glob("*-*.yaml") if not path.stem.startswith("Base")} == set(RM_NAMES)
    assert tables_in_readme(RM) == {"3", "4", "5", "6", "7"}  # tables 1 and 2 have one config per cell


@pytest.mark.parametrize("name", RM_NAMES)
def test_distilled_students_of_rank_mimicking(name: str, stand_in: str) -> None:
    """Check methods, the paper's weights, the row's options, the teacher, and that the rest is the plain student's."""
    row = max((r for r in METHODS_OF if name.endswith("_" + r)), key=len)
    detector, models, *schedule = name.removesuffix("_" + row).split("_")
    teacher, student = ("_".join([detector, model, *schedule]) for model in models.split("-"))
    cfg = load(RM / f"{name}.yaml", stand_in)
    kd = cfg.MODEL.KD
    assert list(kd.DISTILLERS) == METHODS_OF[row]
    assert (kd.RANK_MIMICKING.WEIGHT, kd.PFI.WEIGHT, kd.INHERIT.ENABLED) == (4, 1.5, False)
    assert (row != "rm_classification") == kd.RANK_MIMICKING.LOCALIZATION
    assert (row if row in ("whole", "positives", "negatives", "boxes") else "prediction") == kd.PFI.MASK
    assert str(RM / f"{teacher}.yaml") == kd.TEACHER.CONFIG_FILE
    assert (
        read_yaml(str(RM / f"{name}.yaml"))["MODEL"]["KD"]["TEACHER"]["WEIGHTS"] == f"output/{teacher}/model_final.pth"
    )
    plain = load(RM / f"{student}.yaml", stand_in)
    assert without(load(RM / f"{name}.yaml", stand_in, student_only=True), "MODEL.KD") == without(plain, "MODEL.KD")
    images, epochs = {"2x": (117266, [16, 22, 24]), "voc": (16551, [14, 16, 18])}.get(
        "".join(schedule), (117266, [8, 11, 12])
    )
    assert [n * 16 / images for n in (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)] == pytest.approx(epochs, abs=0.01)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)
