"""Finding configs: paths first, then the names of shipped configs, then Detectron2's model zoo."""

from pathlib import Path

from kd_d2 import UserError
from kd_d2.config import read_config
from kd_d2.config_files import find_config_file, read_layers, read_yaml, shipped_configs

import pytest
from detectron2 import model_zoo
from helpers import ROOT, write_yaml

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("tiny/retinanet-ssim", "configs/tiny/retinanet-ssim.yaml"),
        ("tiny/retinanet-ssim.yaml", "configs/tiny/retinanet-ssim.yaml"),
        ("configs/tiny/retinanet-ssim.yaml", "configs/tiny/retinanet-ssim.yaml"),
        ("Base-Dense", "configs/Base-Dense.yaml"),
        ("ICD/fcos_R50", "projects/ICD/configs/fcos_R50.yaml"),
        ("projects/ICD/configs/fcos_R50.yaml", "projects/ICD/configs/fcos_R50.yaml"),
    ],
)
def test_names_of_shipped_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, path: str) -> None:
    """Check short names and repository paths, from a folder that has neither."""
    monkeypatch.chdir(tmp_path)
    assert find_config_file(name, "key") == str(ROOT / path)


def test_every_shipped_config_has_a_name_of_its_own() -> None:
    files = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/*/configs/**/*.yaml")]
    assert sorted(shipped_configs().values()) == sorted(map(str, files))
    for name, path in shipped_configs().items():
        assert find_config_file(name, "key", "/") == path


def test_a_file_comes_before_a_name_and_a_name_before_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config_file("Base-RetinaNet.yaml", "key") == str(ROOT / "configs" / "Base-RetinaNet.yaml")
    own = write_yaml(tmp_path / "Base-RetinaNet.yaml", {"SEED": 3})
    assert find_config_file("Base-RetinaNet.yaml", "key") == str(own)
    zoo = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    assert find_config_file(zoo, "key") == model_zoo.get_config_file(zoo)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("tiny/retinanet-sim", "tiny/retinanet-ssim or "),
        ("COCO-Detection/retinanet_R_50_FPN.yaml", "COCO-Detection/retinanet_R_50_FPN_"),
        ("projects/ICD/configs/fcos_R5.yaml", "ICD/fcos_R50 or "),
    ],
)
def test_a_name_that_is_nearly_one(name: str, close: str) -> None:
    with pytest.raises(UserError, match=rf"^key: there is no file .* Did you mean {close}"):
        find_config_file(name, "key")


def test_bases_by_name(tmp_path: Path) -> None:
    """Check own and shipped bases: later ones and the file itself take precedence, and files precede shipped names."""
    write_yaml(tmp_path / "my.yaml", {"SEED": 3, "SOLVER": {"BASE_LR": 0.5, "MAX_ITER": 7}})
    path = write_yaml(
        tmp_path / "a.yaml",
        {"_BASE_": ["tiny/retinanet-ssim", "my.yaml", "recommended/icd"], "SOLVER": {"MAX_ITER": 9}},
    )
    cfg = read_config(str(path))
    assert cfg.MODEL.KD.DISTILLERS == ("ICD",) and cfg.MODEL.KD.BALANCE.ENABLED
    assert (cfg.SEED, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (3, 0.5, 9)
    names = [Path(name).name for name, _ in read_layers(str(path))]
    assert names[-4:] == ["retinanet-ssim.yaml", "my.yaml", "icd.yaml", "a.yaml"]
    write_yaml(tmp_path / "recommended" / "icd", {"SEED": 4})
    assert read_config(str(path)).SEED == 4


def test_bases_in_the_home_directory_and_behind_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_yaml(tmp_path / "base.yaml", {"SEED": 3})
    path = write_yaml(tmp_path / "folder" / "a.yaml", {"_BASE_": "~/base.yaml"})
    assert read_yaml(str(path)) == {"SEED": 3}
    write_yaml(path, {"_BASE_": "a.yaml"})
    (tmp_path / "link").symlink_to(path.parent)
    with pytest.raises(UserError, match=r"link/a\.yaml is its own _BASE_"):
        read_yaml(str(tmp_path / "link" / "a.yaml"))


def test_a_group_of_keys_over_a_value(tmp_path: Path) -> None:
    write_yaml(tmp_path / "b.yaml", {"SOLVER": 3})
    path = write_yaml(tmp_path / "a.yaml", {"_BASE_": "b.yaml", "SOLVER": {"MAX_ITER": 9}})
    with pytest.raises(UserError, match=r"a.yaml: SOLVER is a group of keys here and a value in its _BASE_"):
        read_yaml(str(path))


def test_overriding_a_group_leaves_its_aliases(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("MGD: &c {FEATURES: {LEVELS: 3}}\nFGD: *c\n")
    path = write_yaml(tmp_path / "a.yaml", {"_BASE_": "b.yaml", "MGD": {"FEATURES": {"LEVELS": 2}}})
    assert read_yaml(str(path)) == {"MGD": {"FEATURES": {"LEVELS": 2}}, "FGD": {"FEATURES": {"LEVELS": 3}}}
