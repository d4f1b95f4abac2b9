"""Reading configs: types, paths, safe YAML, and error messages for invalid values."""

import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from kd_d2.config import (
    SolverKeys,
    add_kd_config,
    changed_keys,
    library_keys,
    load_config,
    load_teacher_config,
    reads_annotations,
)
from kd_d2.config_files import is_zoo_file
from kd_d2.engine import student_config
from kd_d2.errors import UserError
from kd_d2.extensions import HINT
from kd_d2.keys import keys_of
from kd_d2.modeling import GFL, add_slim_resnet_config
from kd_d2.plain_yaml import read_plain_yaml
from kd_d2.reference import explain

import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model
from helpers import TINY, example, tree_of, write_yaml

pytestmark = pytest.mark.unit

ZOO = Path(model_zoo.get_config_file("Base-RetinaNet.yaml")).parent
ZOO_RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


class Files:
    """A student config and a teacher config in a folder, with an empty file as the teacher's weights."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.teacher = write_yaml(folder / "teacher.yaml", {"_BASE_": str(TINY / "retinanet-teacher.yaml")})
        (folder / "teacher.pth").touch()

    def student(self, **keys: object) -> Path:
        tree = tree_of(
            **{
                "_BASE_": str(TINY / "retinanet-student.yaml"),
                "MODEL__META_ARCHITECTURE": "KDMetaArch",
                "MODEL__KD__TEACHER__CONFIG_FILE": "teacher.yaml",
                "MODEL__KD__TEACHER__WEIGHTS": "teacher.pth",
                "MODEL__KD__DISTILLERS": ("StructuralKD",),
            }
            | keys
        )
        return write_yaml(self.folder / "student.yaml", tree)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.chdir(tmp_path)
    return Files(tmp_path)


def sentence(config: object = "", *opts: object, **options: bool) -> str:
    """Return the error message of `load_config`."""
    with pytest.raises(UserError) as caught:
        load_config(str(config), opts, **options)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("SOLVER.BASE_LR", 1, 1.0),
        ("SOLVER.MAX_ITER", 800.0, 800),
        ("SOLVER.MAX_ITER", 1e3, 1000),
        ("SOLVER.WEIGHT_DECAY", "1e-4", 1e-4),
        ("MODEL.KD.STRUCTURAL.SMOOTH_L1_BETA", 1, 1.0),
        ("MODEL.KD.STRUCTURAL.WINDOW_SIZE", 7.0, 7),
    ],
)
def test_numbers_take_the_type_of_their_default(files: Files, key: str, value: object, expected: object) -> None:
    """Check that ints for floats, whole floats for ints and strings are converted, from a file and the command line."""
    from_file = load_config(str(files.student(**{key.replace(".", "__"): value})))
    from_line = load_config(str(files.student()), [key, str(value)])
    for cfg in (from_file, from_line):
        for part in key.split("."):
            cfg = cfg[part]
        assert cfg == expected
        assert type(cfg) is type(expected)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("0.5", "SOLVER.MAX_ITER is 0.5; it must be a whole number."),
        ("1e999", "SOLVER.MAX_ITER is inf; it must be a whole number."),
        ("True", "SOLVER.MAX_ITER is True; it must be of type int, like its default 40000."),
        ("many", "SOLVER.MAX_ITER is 'many'; it must be of type int, like its default 40000."),
        ("None", "SOLVER.MAX_ITER is None; it must be of type int, like its default 40000."),
        ("(1,)", "SOLVER.MAX_ITER is (1,); it must be of type int, like its default 40000."),
    ],
)
def test_other_values_for_a_whole_number_are_refused(value: str, reason: str) -> None:
    """Check that the message names the key and the value."""
    assert sentence("", "SOLVER.MAX_ITER", value) == f"the command line: {reason}"


def test_a_number_for_a_truth_value_is_refused() -> None:
    assert sentence("", "MODEL.MASK_ON", 2) == (
        "the command line: MODEL.MASK_ON is 2; it must be of type bool, like its default False."
    )


def test_infinity_and_nan_in_a_file_are_refused(tmp_path: Path) -> None:
    """Check YAML's own .inf and .nan."""
    for value in (".inf", ".nan"):
        path = tmp_path / "a.yaml"
        path.write_text(f"SOLVER: {{MAX_ITER: {value}}}")
        assert sentence(path) == f"{path}: SOLVER.MAX_ITER is {value[1:]}; it must be a whole number."


@pytest.mark.parametrize(
    "key",
    [
        "DATASETS.COCO_JSON",
        "MODEL.KD.DISTILLERS",
        "MODEL.KD.STRUCTURAL.LOSS",
        "OUTPUT_DIR",
        "MODEL.RETINANET.NUM_CLASSES",
    ],
)
def test_a_key_without_a_value_is_refused(tmp_path: Path, key: str) -> None:
    """Check an empty YAML entry, which is read as None."""
    path = write_yaml(tmp_path / "a.yaml", tree_of(**{key.replace(".", "__"): None}))
    assert sentence(path).startswith(f"{path}: {key} is None; it must be of type ")


@pytest.mark.parametrize("value", [None, 1, 0.5])
@pytest.mark.parametrize("key", ["MODEL.KD.LAYER_LR", "MODEL.KD.FGD.ATTENTION_WEIGHT"])
def test_optional_numbers_can_be_overridden(files: Files, key: str, value: float | None) -> None:
    """Check that an override of a value from a file may be None, and is not limited to whole numbers by a whole one."""
    cfg = load_config(str(files.student(**{key.replace(".", "__"): 2})), [key, str(value)])
    assert (cfg.MODEL.KD.LAYER_LR if "LAYER" in key else cfg.MODEL.KD.FGD.ATTENTION_WEIGHT) == value


def test_none_is_kept_where_detectron2_knows_it() -> None:
    """Check None for keys whose default is None, and for a name that is optional in Detectron2's models."""
    cfg = load_config(
        "", ["MODEL.FPN.NORM", "None", "MODEL.KD.STRUCTURAL.WEIGHT", "None", "SOLVER.BIAS_LR_FACTOR", "2"]
    )
    assert cfg.MODEL.FPN.NORM is None
    assert cfg.MODEL.KD.STRUCTURAL.WEIGHT is None
    assert cfg.SOLVER.BIAS_LR_FACTOR == 2.0


@pytest.mark.parametrize(
    ("value", "named", "list_"),
    [
        ("('ICD')", "ICD", '["ICD"]'),
        ("[ICD, PKD]", "[ICD, PKD]", '["ICD", "PKD"]'),
        ("(ICD,)", "(ICD,)", '["ICD"]'),
    ],
)
def test_a_text_in_place_of_a_list(files: Files, value: str, named: str, list_: str) -> None:
    """Check that the message gives the list for a name in parentheses without a comma, and for names without quotes."""
    assert sentence(files.student(), "MODEL.KD.DISTILLERS", value) == (
        f"the command line: MODEL.KD.DISTILLERS is the string {named!r}, but must be a list, such as {list_}."
    )


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        ("('voc', 'a.json', 'images')", "'voc'"),
        ("[['voc', 'a.json']]", "['voc', 'a.json']"),
        ("[['voc', 'a.json', 3]]", "['voc', 'a.json', 3]"),
    ],
)
def test_coco_json_must_be_a_list_of_triples(value: str, entry: str) -> None:
    """Check that the message names the entry, for a single triple and for entries of another length or type."""
    assert sentence("", "DATASETS.COCO_JSON", value) == (
        "DATASETS.COCO_JSON must be a list of lists, [[name, annotations.json, image folder], ...]; one entry is "
        f"{entry}."
    )


# -------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["SOLVER.MAX_ITERS", 5], "there is no config key SOLVER.MAX_ITERS. Did you mean SOLVER.MAX_ITER?"),
        (["MODEL.KD.CHANNEL_MEANS.FROM_STRIDE", 8], f"there is no config key MODEL.KD.CHANNEL_MEANS; {HINT}."),
        (["MODEL.KD.STRUCTURAL.LAMBDA", 5], "there is no config key MODEL.KD.STRUCTURAL.LAMBDA."),
        (["solver.base_lr", 5], "there is no config key solver. Did you mean SOLVER?"),
        (["SOLVER.base_lr", 5], "there is no config key SOLVER.base_lr. Did you mean SOLVER.BASE_LR?"),
        (
            ["SOLVER.CHANNELS_LAST", "{'a': 1}"],
            "SOLVER.CHANNELS_LAST is not a group of keys and cannot be set to {'a': 1}.",
        ),
        (["SOLVER", 5], "SOLVER is a group of keys and cannot be set to 5."),
        (["SOLVER.MAX_ITER"], "overrides come in pairs of a key and a value; 'SOLVER.MAX_ITER' has no value."),
        (["SEED", 1, "--resume"], "the option --resume must come before the KEY VALUE overrides."),
        (["MODEL", "x", "MODEL.DEVICE", "cpu"], "MODEL.DEVICE is set, but so is a value for its group MODEL."),
    ],
)
def test_keys_that_are_not_there(opts: list, expected: str) -> None:
    """Check that the message names the key, and the most similar key if there is one."""
    assert sentence("", *opts) == f"the command line: {expected}"


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (
            ["MODEL.BACKBONE.NAME", "nope"],
            f"MODEL.BACKBONE.NAME is 'nope', which is not registered in Detectron2; {HINT}.",
        ),
        (["MODEL.BACKBONE.NAME", None], f"MODEL.BACKBONE.NAME is None, which is not registered in Detectron2; {HINT}."),
        (
            ["MODEL.ANCHOR_GENERATOR.NAME", "X"],
            f"MODEL.ANCHOR_GENERATOR.NAME is 'X', which is not registered in Detectron2; {HINT}.",
        ),
        *(
            ([f"MODEL.{node}.NORM", "X"], f"MODEL.{node}.NORM is 'X', which is not a normalization of Detectron2.")
            for node in ("RESNETS", "FPN", "RETINANET", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD")
        ),
        (["DATASETS.TRAIN", (3,)], "DATASETS.TRAIN contains 3; it must be a list of dataset names."),
        (
            ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "x"],
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE is 'x'; it must be one of 'value', 'norm'.",
        ),
        (
            ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "x"],
            "INPUT.MIN_SIZE_TRAIN_SAMPLING is 'x'; it must be one of 'choice', 'range'.",
        ),
        (["INPUT.RANDOM_FLIP", "x"], "INPUT.RANDOM_FLIP is 'x'; it must be one of 'horizontal', 'vertical', 'none'."),
        (
            ["INPUT.CROP.TYPE", "x"],
            "INPUT.CROP.TYPE is 'x'; it must be one of 'relative_range', 'relative', 'absolute', ",
        ),
        (["INPUT.FORMAT", "XYZ"], "INPUT.FORMAT is 'XYZ'; it must be one of 'BGR', 'RGB', 'L', "),
        (["INPUT.FORMAT", "F"], "INPUT.FORMAT is 'F'; it must be one of 'BGR', 'RGB', 'L', "),
        (["INPUT.MIN_SIZE_TRAIN", ()], "INPUT.MIN_SIZE_TRAIN is (); it must be a list of sizes in pixels."),
        (["INPUT.MIN_SIZE_TRAIN", (-1,)], "INPUT.MIN_SIZE_TRAIN is (-1,); it must be a list of sizes in pixels."),
        (
            ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", (8,)],
            "INPUT.MIN_SIZE_TRAIN is (8,); it must be two ascending sizes, for MIN_SIZE_TRAIN_SAMPLING 'range'.",
        ),
        (
            ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", (9, 8)],
            "INPUT.MIN_SIZE_TRAIN is (9, 8); it must be two ascending sizes, for MIN_SIZE_TRAIN_SAMPLING 'range'.",
        ),
        (["INPUT.MAX_SIZE_TRAIN", 0], "INPUT.MAX_SIZE_TRAIN is 0; it must be a number at least 1."),
        (["INPUT.MIN_SIZE_TEST", -1], "INPUT.MIN_SIZE_TEST is -1; it must be a number at least 0."),
        (["INPUT.MAX_SIZE_TEST", 0], "INPUT.MAX_SIZE_TEST is 0; it must be a number at least 1."),
        (["INPUT.MASK_FORMAT", "x"], "INPUT.MASK_FORMAT is 'x'; it must be one of 'polygon', 'bitmask'."),
        (
            ["MODEL.RPN.BBOX_REG_LOSS_TYPE", "x"],
            "MODEL.RPN.BBOX_REG_LOSS_TYPE is 'x'; it must be one of 'smooth_l1', 'giou', 'diou', 'ciou'.",
        ),
        (["MODEL.PIXEL_MEAN", [1, 2]], "MODEL.PIXEL_MEAN has 2 values; it must have 3, one per channel."),
        (["MODEL.PIXEL_MEAN", ["a"] * 3], "A value of MODEL.PIXEL_MEAN is 'a'; it must be a number."),
        (["SEED", 2**32], "SEED is 4294967296; it must be below 2**32."),
        (["MODEL.PIXEL_STD", [1, 1, 0]], "A value of MODEL.PIXEL_STD is 0; it must be a number above 0."),
    ],
)
def test_values_of_detectron2s_keys(opts: list, expected: str) -> None:
    assert sentence("", *opts).startswith(expected)


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("DATALOADER.RANDOM_SUBSET_RATIO", 0.0, "a number above 0 and at most 1"),
        ("DATALOADER.RANDOM_SUBSET_RATIO", 1.5, "a number above 0 and at most 1"),
        ("INPUT.LARGE_SCALE_JITTER.SIZE", 0, "a whole number at least 1"),
        ("INPUT.LARGE_SCALE_JITTER.MIN_SCALE", 0.0, "a number above 0"),
        ("INPUT.LARGE_SCALE_JITTER.MAX_SCALE", 0.0, "a number above 0"),
        ("SOLVER.EMA_DECAY", -0.5, "a number from 0 to below 1"),
        ("SOLVER.CHECKPOINT_MINUTES", -1.0, "a number at least 0"),
        ("SOLVER.CHECKPOINTS_TO_KEEP", -1, "a whole number at least 0"),
    ],
)
def test_ranges_of_the_librarys_keys(key: str, value: float, must: str) -> None:
    assert sentence("", key, value) == f"{key} is {value}; it must be {must}."


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("relative", [0.5, 1.5], "two numbers above 0 and at most 1."),
        ("relative_range", [0, 1], "two numbers above 0 and at most 1."),
        ("relative_range", [0.5, 0.5, 0.5], "two numbers above 0 and at most 1."),
        ("absolute", [0.9, 0.9], "two whole numbers of pixels, at least 1."),
        ("absolute", [0, 8], "two whole numbers of pixels, at least 1."),
        ("absolute_range", [9, 8], "two whole numbers of pixels, at least 1 and ascending."),
        ("relative", [1.0, 0.5], None),
        ("absolute", [9, 8], None),
        ("absolute_range", [8, 8], None),
    ],
)
def test_sizes_of_crops(kind: str, size: list[float], expected: str | None) -> None:
    opts = ["INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", size]
    load_config("", opts)
    if expected is None:
        load_config("", [*opts, "INPUT.CROP.ENABLED", True])
    else:
        said = sentence("", *opts, "INPUT.CROP.ENABLED", True)
        assert said == f"INPUT.CROP.SIZE is {size!r}; for INPUT.CROP.TYPE {kind!r} it must be {expected}"


def test_images_in_gray_and_without_resizing() -> None:
    """Check values that Detectron2 supports."""
    one = ["MODEL.PIXEL_MEAN", [100.0], "MODEL.PIXEL_STD", [1.0]]
    load_config("", ["INPUT.FORMAT", "L", *one, "INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.MAX_SIZE_TRAIN", 0])
    load_config("", ["INPUT.MIN_SIZE_TEST", 0, "INPUT.MAX_SIZE_TEST", 0])


def test_a_sweep_is_not_a_config() -> None:
    """Check the message for a sweep, which `kd-d2 config list` names too."""
    assert sentence("evidence/long-matrix").endswith(
        "is a sweep of several trainings, not a config: run `kd-d2 sweep evidence/long-matrix`."
    )


def test_a_path_object(files: Files) -> None:
    student = files.student()
    assert load_config(student) == load_config(str(student))


def test_the_source_of_a_wrong_key_is_named(files: Files) -> None:
    """Check that the message names the file or the list of overrides that has the wrong key."""
    path = files.student(MODEL__KD__STRUKTURAL__WEIGHT=1.0)
    assert sentence(path) == (
        f"{path}: there is no config key MODEL.KD.STRUKTURAL; {HINT}. Did you mean MODEL.KD.STRUCTURAL?"
    )
    files.teacher.write_text("MODEL: {DEPTHS: 1}")
    with pytest.raises(UserError, match=rf"^{re.escape(str(files.teacher))}: there is no config key MODEL.DEPTHS\.$"):
        load_teacher_config(load_config(str(files.student())))
    files.teacher.write_text("SEED: 1")
    for opts, reason in (
        (("SEET", 1), "there is no config key SEET. Did you mean SEED?"),
        (("SEED",), "overrides come"),
    ):
        cfg = load_config(str(files.student(MODEL__KD__TEACHER__OPTS=opts)))
        with pytest.raises(UserError) as caught:
            load_teacher_config(cfg)
        assert str(caught.value).startswith(f"MODEL.KD.TEACHER.OPTS: {reason}")


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (
            ["MODEL.KD.DISTILLERS", "('IDC',)"],
            "MODEL.KD.DISTILLERS names the unknown method 'IDC'; available: .*FeatureImitation.*StructuralKD.*--import",
        ),
        (
            ["MODEL.KD.DISTILLERS", "('StructuralKD', 'StructuralKD')"],
            r"MODEL.KD.DISTILLERS names 'StructuralKD' twice\.$",
        ),
        (["MODEL.KD.STUDENT", "Retina"], "MODEL.KD.STUDENT is 'Retina'; it must be the name of a registered detector"),
        (["MODEL.KD.STUDENT", "KDMetaArch"], "MODEL.KD.STUDENT is 'KDMetaArch'; it must be the name"),
        (["MODEL.META_ARCHITECTURE", "Retina"], "MODEL.META_ARCHITECTURE is 'Retina', which is not the name of a"),
        (["MODEL.KD.TEACHER.CONFIG_FILE", ""], r"MODEL.KD.TEACHER.CONFIG_FILE is empty: name the teacher's config\.$"),
        (
            ["MODEL.KD.INHERIT.MODULES", "('body',)"],
            r"MODEL.KD.INHERIT.MODULES is .*body.*; it must be a list whose entries are one of 'bottom_up', 'neck', 'head'\.$",
        ),
        (
            ["MODEL.KD.INHERIT.ENABLED", "True", "MODEL.KD.INHERIT.MODULES", "()"],
            r"MODEL.KD.INHERIT is enabled, but MODEL.KD.INHERIT.MODULES is empty\.$",
        ),
        (
            ["MODEL.KD.DISTILLERS", "()"],
            "MODEL.KD.DISTILLERS is empty and MODEL.KD.INHERIT.ENABLED and MODEL.KD.PSEUDO_LABELS.ENABLED are False: the teacher",
        ),
        (
            ["MODEL.KD.PSEUDO_LABELS.SCORE_THRESH", 1],
            r"MODEL.KD.PSEUDO_LABELS.SCORE_THRESH is 1.0; it must be a number from 0 to below 1\.$",
        ),
        (["MODEL.KD.LAYER_LR", -1], r"MODEL.KD.LAYER_LR is -1; it must be None or a number above 0\.$"),
        (["MODEL.KD.TEACHER.CHANNELS_LAST", "no"], r"MODEL.KD.TEACHER.CHANNELS_LAST is 'no'; it must be None or "),
        (["SOLVER.AMP.DTYPE", "half"], r"SOLVER.AMP.DTYPE is 'half'; it must be one of 'float16', 'bfloat16'\.$"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu', which PyTorch does not know"),
        (["MODEL.KD.STRUCTURAL.LOSS", "l3"], "MODEL.KD.STRUCTURAL.LOSS is 'l3'; it must be one of 'l1', 'l2'"),
        (
            ["MODEL.KD.STRUCTURAL.MS_SSIM_WINDOW_SIZE", 8],
            "MODEL.KD.STRUCTURAL.MS_SSIM_WINDOW_SIZE is 8; it must be odd",
        ),
        (
            ["MODEL.KD.STRUCTURAL.SSIM_EXPONENTS", (1, 1)],
            r"MODEL.KD.STRUCTURAL.SSIM_EXPONENTS is \(1, 1\); it must be three numbers",
        ),
        (
            ["MODEL.KD.STRUCTURAL.SSIM_EXPONENTS", (0, 0, 0)],
            r"MODEL.KD.STRUCTURAL.SSIM_EXPONENTS is \(0, 0, 0\): at least one exponent must be above 0",
        ),
        (
            ["MODEL.KD.STRUCTURAL.SSIM_EXPONENTS", (1, 0, 0), "MODEL.KD.STRUCTURAL.LOSS", "ms_ssim"],
            r"MODEL.KD.STRUCTURAL.SSIM_EXPONENTS is \(1, 0, 0\), which only LOSS 'ssim' uses; LOSS is 'ms_ssim'",
        ),
        (
            ["MODEL.KD.STRUCTURAL.SSIM_EXPONENTS", (1, -1, 0)],
            r"MODEL.KD.STRUCTURAL.SSIM_EXPONENTS is \(1, -1, 0\); it must be three numbers at least 0",
        ),
        (
            ["MODEL.KD.STRUCTURAL.ATTENTION_TEMPERATURE", 0],
            "MODEL.KD.STRUCTURAL.ATTENTION_TEMPERATURE is 0; it must be None or a number above 0",
        ),
        (["MODEL.KD.STRUCTURAL.WINDOW_SIZE", 4], "MODEL.KD.STRUCTURAL.WINDOW_SIZE is 4; it must be odd and positive"),
        (
            ["MODEL.KD.STRUCTURAL.ADAPTATION", "2x2"],
            "MODEL.KD.STRUCTURAL.ADAPTATION is '2x2'; it must be one of None, 'none'",
        ),
    ],
)
def test_names_and_choices(files: Files, opts: list, expected: str) -> None:
    """Check that each wrong name or choice is refused before anything is built."""
    with pytest.raises(UserError, match=f"^{expected}"):
        load_config(str(files.student()), opts)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"WEIGHT": -1}, "WEIGHT is -1; it must be None or a number at least 0."),
        ({"WEIGHT": "much"}, "WEIGHT is 'much'; it must be None or a number at least 0."),
        ({"WEIGHT": float("nan")}, "WEIGHT is nan; it must be None or a number at least 0."),
        ({"START_ITER": -1}, "START_ITER is -1; it must be a whole number at least 0."),
        ({"WARMUP_ITERS": -5}, "WARMUP_ITERS is -5; it must be a whole number at least 0."),
        (
            {"START_ITER": 800},
            "START_ITER is 800, but training ends at SOLVER.MAX_ITER 800: it would never run.",
        ),
        (
            {"START_ITER": 100, "END_ITER": 100},
            "END_ITER is 100; it must be None or a whole number above START_ITER 100.",
        ),
        ({"END_ITER": 20.5}, "END_ITER is 20.5; it must be None or a whole number above START_ITER 0."),
    ],
)
def test_schedules_that_make_no_sense(files: Files, keys: dict, expected: str) -> None:
    """Check that the message names the key and the value, for weights and iterations outside their range."""
    path = files.student(**{f"MODEL__KD__STRUCTURAL__{key}": value for key, value in keys.items()})
    assert sentence(path) == f"MODEL.KD.STRUCTURAL.{expected}"


def test_a_schedule_that_makes_sense(files: Files) -> None:
    """Check that the bounds themselves are allowed."""
    keys = {"WEIGHT": 0, "START_ITER": 799, "WARMUP_ITERS": 0, "END_ITER": 800}
    load_config(str(files.student(**{f"MODEL__KD__STRUCTURAL__{key}": value for key, value in keys.items()})))


# ------------------------------------------------------------------------------------------------- files


def test_relative_paths(files: Files, tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    """Check that a relative path is resolved against the working directory first, then against the config's folder."""
    student = files.student()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    found = load_config(str(student)).MODEL.KD.TEACHER.WEIGHTS
    assert found == str(files.folder / "teacher.pth")
    (elsewhere / "teacher.pth").touch()
    found = load_config(str(student)).MODEL.KD.TEACHER.WEIGHTS
    assert found == str(elsewhere / "teacher.pth")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("MODEL.KD.TEACHER.CONFIG_FILE", "file"),
        ("MODEL.KD.TEACHER.WEIGHTS", "file"),
        ("MODEL.WEIGHTS", "file"),
        ("DATASETS.COCO_JSON (mine)", "file"),
        ("DATASETS.COCO_JSON (mine)", "folder"),
    ],
)
def test_a_missing_file_names_both_places(
    files: Files, tmp_path_factory: pytest.TempPathFactory, monkeypatch, key: str, kind: str
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    student = files.student()
    (files.folder / "there.json").touch()
    monkeypatch.chdir(elsewhere)
    if key == "DATASETS.COCO_JSON (mine)":
        triple = ["mine", "gone" if kind == "file" else "there.json", "gone"]
        opts = ["DATASETS.COCO_JSON", [triple], "DATASETS.TEST", ["mine"]]
    else:
        opts = [key, "gone"]
    expected = f"{key}: there is no {kind} {elsewhere / 'gone'} or {files.folder / 'gone'}"
    if "CONFIG_FILE" in key:
        expected += ", and no config gone comes with kd_d2 or is in Detectron2's model zoo"
    assert sentence(student, *opts) == f"{expected}."
    if key.startswith("DATASETS"):
        load_config(str(student), opts, needs_data=False)


def test_the_config_itself_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a config that is neither on disk nor in the model zoo, and the name of one of the zoo's folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("gone.yaml", "COCO-Detection"):
        assert sentence(name).startswith(
            f"the config: there is no file {tmp_path / name}, and no config {name} comes with kd_d2 or is in Detectron2's model zoo."
        )
    assert sentence(tmp_path / "gone.yaml") == f"the config: there is no file {tmp_path / 'gone.yaml'}."


def test_unused_data_need_not_exist(files: Files) -> None:
    """Check that COCO_JSON entries listed in neither TRAIN nor TEST are not checked or changed."""
    cfg = load_config(str(files.student(DATASETS__COCO_JSON=[["mine", "gone.json", "gone"]])))
    assert cfg.DATASETS.COCO_JSON == [["mine", "gone.json", "gone"]]


def test_device_of_another_machine(files: Files) -> None:
    """Check that a device in the file that PyTorch cannot use here becomes the CPU, and that overrides are refused."""
    assert load_config(str(files.student(MODEL__DEVICE="meta"))).MODEL.DEVICE == "cpu"
    assert sentence(files.student(), "MODEL.DEVICE", "meta") == (
        "MODEL.DEVICE is 'meta', which PyTorch cannot use here; it is usually 'cuda' or 'cpu'."
    )


def test_evaluating_the_student_needs_no_teacher_and_no_training_data(files: Files) -> None:
    """Check that `student_only` turns KDMetaArch into the student without reading the teacher or the training data."""
    path = files.student(DATASETS__COCO_JSON=[["mine", "gone.json", "gone"]], DATASETS__TRAIN=["mine"])
    files.teacher.unlink()
    (files.folder / "teacher.pth").unlink()
    assert "DATASETS.COCO_JSON (mine)" in sentence(path)
    assert "MODEL.KD.TEACHER.CONFIG_FILE" in sentence(path, "DATASETS.TRAIN", ())
    assert load_config(str(path), student_only=True).MODEL.META_ARCHITECTURE == "RetinaNet"


def test_an_evaluation_finds_training_data_that_exist(
    files: Files, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that their path, whose classes are the model's, does not depend on the working directory."""
    path = files.student(DATASETS__COCO_JSON=[["mine", "train.json", "images"]], DATASETS__TRAIN=["mine"])
    (files.folder / "train.json").touch()
    (files.folder / "images").mkdir()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    [[_, *found]] = load_config(str(path), student_only=True).DATASETS.COCO_JSON
    assert found == [str(files.folder / name) for name in ("train.json", "images")]


def test_the_same_file_trains_the_plain_student(files: Files) -> None:
    """Check that MODEL.KD is not validated if the meta-architecture is that of the student, which needs annotations."""
    path = files.student(MODEL__KD__DISTILLERS=["Unknown"], MODEL__KD__TEACHER__WEIGHTS="gone.pth")
    plain = ["MODEL.META_ARCHITECTURE", "RetinaNet"]
    cfg = load_config(str(path), plain)
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    path = files.student(MODEL__KD__PSEUDO_LABELS__ENABLED=True)
    assert not reads_annotations(load_config(str(path)))
    assert reads_annotations(load_config(str(path), plain))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"- SEED\n", "holds no config keys"),
        (b"SEED", "holds no config keys"),
        (b"_BASE_: 3\n", "has the _BASE_ 3, which is neither a path nor a list of paths"),
        (b"_BASE_: a.yaml\n", "is its own _BASE_, directly or through others"),
        (b"SEED: [1\n", "is not plain yaml: while parsing a flow sequence"),
        (b"\xff\xfe\x00\x01", "cannot be read: 'utf-8' codec can't decode byte"),
        (b"VERSION: 1\n", "has an old VERSION"),
        (b"SOLVER: {BASE_LR: 0.5}\nSEED: 1\nSOLVER: {MAX_ITER: 7}\n", "has the key SOLVER twice, in lines 1 and 3"),
        (b"SOLVER:\n  MAX_ITER: 5\n  MAX_ITER: 7\n", "has the key MAX_ITER twice, in lines 2 and 3"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, expected: str) -> None:
    """Check that the message has the file name and the reason."""
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    assert sentence(path).startswith(f"Config file {path} {expected}")


def test_a_lazy_config_is_not_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "fcos.py"
    path.write_text("model = 1\n")
    assert sentence(path).startswith(f"Config file {path} is a Python file; it must be YAML.")


def _doubling(folder: Path) -> str:
    """Return a config whose bases would be read 2^24 times."""
    for level in range(24):
        (folder / f"{level}.yaml").write_text(f"_BASE_: [{level + 1}.yaml, {level + 1}.yaml]\n")
    (folder / "24.yaml").write_text("SEED: 1\n")
    return "_BASE_: 0.yaml\n"


ALIASES = "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("SEED: " + "9" * 5000, "has a value that cannot be read: Exceeds the limit"),
        ("SEED: " + "[" * 100 + "]" * 100, "is nested more than 50 levels deep"),
        ("SEED: " + "[" * 9000 + "]" * 9000, "is nested too deeply"),
        ("SEED: 2026-01-01", "SEED is '2026-01-01'; it must be of type int"),
        ("? [1, 2]\n: 3", "is not plain yaml: while constructing a mapping"),
        ("1: 3", "there is no config key 1."),
        ("SOLVER: {BASE_LR: " + "9" * 400 + "}", "SOLVER.BASE_LR is too large a number"),
        ("SEED: .inf", "SEED is inf; it must be a whole number"),
        (ALIASES, "has more than 200000 values"),
        ("SEED: &a [*a]", "SEED is"),
        ("#" * (4 * 2**20 + 1), "is larger than 4 MiB"),
        (_doubling, "has more than 200 _BASE_ files"),
    ],
    ids=[
        "5000-digit int",
        "100 nested lists",
        "9000 nested lists",
        "date",
        "list as key",
        "int as key",
        "400-digit float",
        "infinity",
        "alias expansion",
        "self-reference",
        "over 4 MiB",
        "too many bases",
    ],
)
def test_hostile_configs(tmp_path: Path, content: str | Callable, expected: str) -> None:
    """Check that each is refused with a message, in bounded time and memory."""
    path = tmp_path / "a.yaml"
    path.write_text(content(tmp_path) if callable(content) else content)
    assert expected in sentence(path)


def test_an_output_folder_in_the_home_directory(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(str(files.student(OUTPUT_DIR="~/x"))).OUTPUT_DIR == "/home/me/x"


@pytest.mark.parametrize("url", ["http://foo bar/x.yaml", "catalog://x"])
def test_urls_that_cannot_be_read(url: str) -> None:
    assert sentence(url).startswith(f"Config file {url} cannot be read: ")


def test_mappings_may_be_merged(tmp_path: Path) -> None:
    """Check that YAML's merge key may be repeated, and that a key may override a merged one."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "SOLVER: &a {MAX_ITER: 5, GAMMA: 0.5}\nTEST: &b {EVAL_PERIOD: 3}\nX: {<<: *a, <<: *b, GAMMA: 0.2}\n"
    )
    assert read_plain_yaml(str(path), "X")["X"] == {"MAX_ITER": 5, "EVAL_PERIOD": 3, "GAMMA": 0.2}


def test_a_file_that_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that it is parsed once, that its reader may change what it gets, and that another text is read again."""
    path, parsed = tmp_path / "file.yaml", []
    compose = yaml.compose
    monkeypatch.setattr(yaml, "compose", lambda text, loader: parsed.append(text) or compose(text, loader))
    for text in ("A: [1]", "A: [1]", "A: [2]", "A: ['1']"):
        path.write_text(text)
        read_plain_yaml(str(path), str(path))["A"].append(3)
    assert parsed == ["A: [1]", "A: [2]", "A: ['1']"]
    assert read_plain_yaml(str(path), str(path)) == {"A": ["1"]}


def test_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffSEED: 5\n", encoding="utf-8")
    assert load_config(str(path)).SEED == 5


def test_a_named_pipe_as_config(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    os.mkfifo(path)
    assert "there is no file" in sentence(path)


@pytest.mark.parametrize("value", ["(" * 5000, "[" * 80 + "]" * 80, "9" * 5000, "-" * 100_000 + "1"])
def test_hostile_overrides(value: str) -> None:
    with pytest.raises(UserError, match=r"^the command line: SEED"):
        load_config("", ["SEED", value])


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    """Check that the message names the missing base and the file that refers to it."""
    path = write_yaml(tmp_path / "a.yaml", {"_BASE_": "gone.yaml"})
    assert sentence(path).startswith(
        f"_BASE_ of {path}: there is no file {tmp_path / 'gone.yaml'}, and no config gone.yaml"
    )


# --------------------------------------------------------------------------------------------- safe yaml


@pytest.mark.parametrize("where", ["itself", "base", "second base", "base of a base"])
def test_yaml_that_runs_code_is_refused(tmp_path: Path, where: str) -> None:
    """Check that a Python tag anywhere is refused with the name of its file, and never executed."""
    marker = tmp_path / "executed"
    evil = tmp_path / "evil.yaml"
    evil.write_text(f'SEED: !!python/object/apply:os.mkdir ["{marker}"]\n')
    plain = write_yaml(tmp_path / "plain.yaml", {"SEED": 3})
    middle = write_yaml(tmp_path / "middle.yaml", {"_BASE_": "evil.yaml"})
    bases = {"base": "evil.yaml", "second base": [str(plain), str(evil)], "base of a base": str(middle)}
    path = evil if where == "itself" else write_yaml(tmp_path / "a.yaml", {"_BASE_": bases[where]})
    assert sentence(path).startswith(
        f"Config file {evil} is not plain yaml: line 1 has the tag !!python/object/apply:os.mkdir, which can run code; "
    )
    assert not marker.exists()
    yaml.unsafe_load(evil.read_text())
    assert marker.exists()  # the file does run code when loaded unsafely


def test_yaml_that_runs_code_in_the_teachers_config(files: Files) -> None:
    marker = files.folder / "executed"
    files.teacher.write_text(f'SEED: !!python/object/apply:os.mkdir ["{marker}"]\n')
    with pytest.raises(UserError, match=f"^Config file {re.escape(str(files.teacher))} is not plain yaml"):
        load_teacher_config(load_config(str(files.student())))
    assert not marker.exists()


def test_only_files_inside_the_zoo_are_trusted(tmp_path: Path) -> None:
    """Check a path that leads out of the zoo's folder, and a folder with a similar name."""
    marker = tmp_path / "executed"
    content = f'SEED: !!python/object/apply:os.mkdir ["{marker}"]\n'
    (tmp_path / "evil.yaml").write_text(content)
    through = f"{ZOO}/{os.path.relpath(tmp_path, ZOO)}/evil.yaml"
    similar = tmp_path / "model_zoo" / "configs"
    similar.mkdir(parents=True)
    (similar / "evil.yaml").write_text(content)
    for path in (through, similar / "evil.yaml"):
        assert "is not plain yaml" in sentence(path)
    assert not marker.exists()
    assert is_zoo_file(f"{ZOO}/a.yaml") and not is_zoo_file(f"{ZOO}-2/a.yaml")


def test_a_copy_of_a_zoo_config(tmp_path: Path) -> None:
    """Check that the message names the line and the remedy, which works once the copy is gone."""
    copy = tmp_path / "Base-RetinaNet.yaml"
    copy.write_text((ZOO / copy.name).read_text())
    own = write_yaml(tmp_path / "own.yaml", {"_BASE_": copy.name})
    line = next(number for number, text in enumerate(copy.read_text().splitlines(), 1) if "!!python" in text)
    assert sentence(own) == (
        f"Config file {copy} is not plain yaml: line {line} has the tag !!python/object/apply:eval, which can run "
        "code; write the value itself, or, instead of copying a config of Detectron2's model zoo, name it, as in "
        "_BASE_: Base-RetinaNet.yaml."
    )
    copy.unlink()
    assert load_config(str(own)).MODEL.META_ARCHITECTURE == "RetinaNet"


def test_the_zoo_of_the_installed_detectron2_loads(tmp_path: Path) -> None:
    """Check a zoo config whose base computes anchor sizes in Python tags, by name and as a base."""
    expected = [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)]
    own = write_yaml(tmp_path / "own.yaml", {"_BASE_": str(ZOO / ZOO_RETINANET), "SEED": 3})
    for path in (ZOO_RETINANET, own):
        sizes = load_config(str(path)).MODEL.ANCHOR_GENERATOR.SIZES
        for ours, theirs in zip(sizes, expected, strict=True):
            assert ours == pytest.approx(theirs)


def test_every_zoo_config_reads_as_detectron2_reads_it() -> None:
    """Check that validation and conversion do not change any config that ships with Detectron2."""
    paths = [p for p in sorted(ZOO.glob("*/*.yaml")) if yaml.safe_load(_without_tags(p)).get("VERSION", 2) == 2]
    assert len(paths) > 40
    for path in paths:
        theirs = get_cfg()
        theirs.merge_from_file(str(path))
        ours = load_config(str(path))
        for key in ("DATALOADER", "DATASETS", "INPUT", "MODEL", "SOLVER", "TEST"):
            for name, value in theirs[key].items():
                if name not in ("FILTER_EMPTY_ANNOTATIONS", "AMP", "DEVICE"):
                    assert ours[key][name] == value, (path, key, name)


def _without_tags(path: Path) -> str:
    return path.read_text().replace("!!python/object/apply:eval", "")


# ------------------------------------------------------------------------------------------- the teacher


def test_a_zoo_name_stands_for_its_trained_checkpoint(files: Files) -> None:
    """Check that empty WEIGHTS mean the zoo's checkpoint for a zoo config, and that given ones take precedence."""
    path = files.student(MODEL__KD__TEACHER={"CONFIG_FILE": ZOO_RETINANET, "WEIGHTS": ""})
    url = load_teacher_config(load_config(str(path))).MODEL.WEIGHTS
    assert url == model_zoo.get_checkpoint_url(ZOO_RETINANET)
    given = ["MODEL.KD.TEACHER.WEIGHTS", "teacher.pth"]
    weights = load_teacher_config(load_config(str(path), given)).MODEL.WEIGHTS
    assert weights == str(files.folder / "teacher.pth")


def test_a_zoo_name_without_a_checkpoint(files: Files) -> None:
    path = files.student(MODEL__KD__TEACHER={"CONFIG_FILE": "Base-RCNN-C4.yaml", "WEIGHTS": ""})
    with pytest.raises(UserError) as caught:
        load_teacher_config(load_config(str(path)))
    assert str(caught.value) == (
        "MODEL.KD.TEACHER.WEIGHTS is empty, and the model zoo has no checkpoint for Base-RCNN-C4.yaml."
    )


def test_where_the_teachers_weights_come_from(files: Files) -> None:
    """Check WEIGHTS, then MODEL.WEIGHTS of the config, relative to its folder, and the error if neither is set."""
    path = files.student(MODEL__KD__TEACHER={"CONFIG_FILE": "models/own.yaml", "WEIGHTS": ""})
    own = write_yaml(files.folder / "models" / "own.yaml", tree_of(MODEL__WEIGHTS="own.pth"))
    with pytest.raises(
        UserError, match=r"^MODEL.KD.TEACHER.WEIGHTS: there is no file .*own.pth or .*models/own.pth\.$"
    ):
        load_teacher_config(load_config(str(path)))
    (files.folder / "models" / "own.pth").touch()
    weights = load_teacher_config(load_config(str(path))).MODEL.WEIGHTS
    assert weights == str(files.folder / "models" / "own.pth")
    write_yaml(own, tree_of(SEED=1))
    with pytest.raises(UserError) as caught:
        load_teacher_config(load_config(str(path)))
    assert str(caught.value) == (
        f"MODEL.KD.TEACHER.WEIGHTS is empty, and {own} does not set MODEL.WEIGHTS: the teacher would be untrained."
    )


def test_the_teachers_options_and_device(files: Files) -> None:
    """Check that OPTS override the teacher's file, and that the teacher uses the student's device."""
    opts = ["MODEL.RETINANET.NUM_CONVS", 4, "MODEL.DEVICE", "cuda"]
    cfg = load_config(str(files.student(MODEL__KD__TEACHER__OPTS=opts, MODEL__DEVICE="cpu")))
    teacher = load_teacher_config(cfg)
    assert teacher.MODEL.RETINANET.NUM_CONVS == 4
    assert teacher.MODEL.DEVICE == "cpu"
    assert cfg.MODEL.RETINANET.NUM_CONVS == 2


def test_a_distilled_model_as_teacher(files: Files) -> None:
    """Check that a teacher config with KDMetaArch means its student."""
    write_yaml(files.teacher, tree_of(MODEL__META_ARCHITECTURE="KDMetaArch", MODEL__KD__STUDENT="GeneralizedRCNN"))
    assert load_teacher_config(load_config(str(files.student()))).MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


# -------------------------------------------------------------------------------------- the plain student


def _tree(node: CfgNode) -> dict:
    return yaml.safe_load(node.dump())


@pytest.mark.parametrize("name", ["FCOS", "ATSS", "GFL"])
def test_the_dumped_student_has_the_keys_of_its_own_detector_alone(files: Files, name: str) -> None:
    """Check detectors that have no keys in Detectron2, with a MobileNetV2 backbone."""
    backbone = "build_dense_mobilenet_v2_fpn_backbone"
    cfg = load_config(str(files.student(MODEL__KD__STUDENT=name, MODEL__BACKBONE__NAME=backbone)))
    ours = student_config(cfg).MODEL.keys() - get_cfg().MODEL.keys()
    assert ours == {name, "MOBILENET_V2", "DENSE_FPN"}


def test_the_dumped_student_keeps_what_a_model_of_ones_own_may_use(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a subclass of a detector, and a function around a backbone, of this library."""
    slim = BACKBONE_REGISTRY.get("build_retinanet_slim_resnet_fpn_backbone")
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_my_backbone", lambda cfg, shape: slim(cfg, shape))
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "MyGFL", type("MyGFL", (GFL,), {"__module__": "mine"}))
    added = {}
    for student, backbone in (("MyGFL", None), ("RetinaNet", "build_my_backbone")):
        keys = {"MODEL__GFL__NUM_CLASSES": 7, "MODEL__SLIM_RESNET__WIDTHS": [8, 8, 8, 8], "MODEL__KD__STUDENT": student}
        cfg = load_config(str(files.student(**keys, **({"MODEL__BACKBONE__NAME": backbone} if backbone else {}))))
        added[student] = student_config(cfg).MODEL
        assert added[student].keys() - get_cfg().MODEL.keys() == {"GFL", "SLIM_RESNET"}
    assert added["MyGFL"].GFL.NUM_CLASSES == 7
    assert added["RetinaNet"].SLIM_RESNET.WIDTHS == (8, 8, 8, 8)


def test_keys_of_ones_own(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check `register_config` in the student's config, its plain config, and the teacher's; unknown keys name --import."""
    with pytest.raises(UserError, match=r"MODEL.MY_BACKBONE; if it is your own, import the file that registers it"):
        load_config(str(files.student(MODEL__MY_BACKBONE__WIDTH=32)))
    monkeypatch.setattr(library_keys, "CONFIG_FUNCTIONS", [])
    exec(example("config keys of your own", "docs/guides/own-teacher.md"), {})
    cfg = load_config(str(files.student(MODEL__KD__TEACHER__OPTS=["MODEL.MY_BACKBONE.WIDTH", 16])))
    assert cfg.MODEL.MY_BACKBONE.WIDTH == 64
    assert load_teacher_config(cfg).MODEL.MY_BACKBONE.WIDTH == 16
    cfg = load_config(str(files.student(MODEL__MY_BACKBONE__WIDTH=32)))
    assert student_config(cfg).MODEL.MY_BACKBONE.WIDTH == 32
    assert changed_keys(cfg)["MODEL.MY_BACKBONE.WIDTH"] == 32
    assert (
        explain("MODEL.MY_BACKBONE")
        == "MODEL.MY_BACKBONE.WIDTH\n    a key of your own (register_config), 64 by default"
    )
    with pytest.raises(UserError, match=r"there is no config key MODEL.MY_BACKBONE.WIDHT. Did you mean"):
        load_config(str(files.student(MODEL__MY_BACKBONE__WIDHT=32)))


@pytest.mark.parametrize("slim", [False, True])
def test_the_dumped_student_is_a_plain_detectron2_config(files: Files, slim: bool) -> None:
    """Check that plain Detectron2 merges the student's config, with ints given for floats and floats for ints."""
    base = TINY / f"retinanet-{'student' if slim else 'teacher'}.yaml"
    numbers = {"SOLVER__BASE_LR": 1, "SOLVER__MAX_ITER": 500.0, "MODEL__RETINANET__SMOOTH_L1_LOSS_BETA": 0}
    cfg = load_config(str(files.student(_BASE_=str(base), **numbers)))
    dumped = files.folder / "plain.yaml"
    dumped.write_text(student_config(cfg).dump())
    plain = get_cfg()
    if slim:
        add_slim_resnet_config(plain)
    plain.merge_from_file(str(dumped), allow_unsafe=False)
    assert plain.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert plain.SOLVER.MAX_ITER == 500
    assert plain.MODEL.RETINANET == cfg.MODEL.RETINANET
    assert cfg.INPUT.keys() - plain.INPUT.keys() == {"LARGE_SCALE_JITTER", "AUGMENTATIONS"}
    assert plain.INPUT.items() <= cfg.INPUT.items()
    assert (plain.MODEL.WEIGHTS, plain.DATASETS.TRAIN) == ("", ())


def test_the_dumped_student_needs_no_frequencies_of_classes(files: Files) -> None:
    """Check that plain Detectron2 builds a student that is trained with the federated loss."""
    base = str(TINY / "faster-rcnn-teacher.yaml")
    keys = {"MODEL__ROI_BOX_HEAD__USE_FED_LOSS": True, "MODEL__ROI_BOX_HEAD__USE_SIGMOID_CE": True}
    cfg = load_config(str(files.student(_BASE_=base, MODEL__KD__STUDENT="GeneralizedRCNN", **keys)))
    plain = student_config(cfg)
    assert plain.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE
    build_model(plain)


def test_a_teacher_needs_no_frequencies_of_classes(files: Files) -> None:
    """Check that a teacher trained with the federated loss is built without its training set."""
    opts = ["MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True]
    files.teacher.write_text(f"_BASE_: {TINY / 'faster-rcnn-teacher.yaml'}\n")
    teacher = load_teacher_config(load_config(str(files.student(MODEL__KD__TEACHER__OPTS=opts))))
    assert teacher.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE
    build_model(teacher)


def test_the_dumped_config_reads_as_itself(files: Files) -> None:
    cfg = load_config(str(files.student(MODEL__KD__STRUCTURAL__END_ITER=90)))
    dumped = files.folder / "dumped.yaml"
    dumped.write_text(cfg.dump())
    assert _tree(load_config(str(dumped))) == _tree(cfg)


def test_defaults_of_the_trainings_in_the_documentation() -> None:
    """Check keys that shipped configs do not set, although their results depend on them."""
    kd, solver = load_config("").MODEL.KD, load_config("").SOLVER
    assert kd.BALANCE == {
        "ENABLED": False, "TARGET": 2.0, "PERIOD": 20, "MOMENTUM": 0.9, "LIMIT": 1e5, "LEVELS": False
    }  # fmt: skip
    assert (kd.INHERIT.MODULES, kd.PSEUDO_LABELS.SCORE_THRESH, kd.LAYER_LR) == (("neck", "head"), 0.3, None)
    assert (solver.OPTIMIZER, solver.EMA_DECAY, solver.CHECKPOINT_MINUTES) == ("SGD", 0.0, 10.0)


def test_the_librarys_keys_leave_detectron2s_defaults_alone() -> None:
    """Check that FILTER_EMPTY_ANNOTATIONS is the only default of Detectron2 that differs."""
    ours, theirs = get_cfg(), get_cfg()
    add_kd_config(ours)
    ours.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    for node, key in (
        (ours.DATASETS, "COCO_JSON"),
        (ours.DATASETS, "TRAIN_REPEAT_FACTOR"),
        (ours.INPUT, "LARGE_SCALE_JITTER"),
        (ours.INPUT, "AUGMENTATIONS"),
        (ours.SOLVER.AMP, "DTYPE"),
        (ours.DATALOADER, "SKIP_UNUSABLE_IMAGES"),
        (ours.DATALOADER, "RANDOM_SUBSET_RATIO"),
        *((ours.SOLVER, key.name) for key in keys_of(SolverKeys)),
        (ours.TEST, "BEST_METRIC"),
        (ours.MODEL, "KD"),
        *(
            (ours.MODEL, name)
            for name in (
                "SLIM_RESNET",
                "MOBILENET_V2",
                "SWIN",
                "TIMM",
                "FCOS",
                "ATSS",
                "GFL",
                "FSAF",
                "REPPOINTS",
                "DENSE_FPN",
            )
        ),
    ):
        del node[key]
    assert _tree(ours) == _tree(theirs)
