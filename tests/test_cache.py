"""The folder of cached files."""

import os
import tempfile
from pathlib import Path

from kd_d2 import UserError
from kd_d2.cache import cache_folder

import pytest


def test_a_user_without_a_home_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as in a container started with an unknown user id
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"kd_d2-{os.getuid()}"
    assert cache_folder("annotations") == str(folder / "annotations")
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    (tmp_path / "kd_d2-4321").mkdir()
    with pytest.raises(UserError, match=r"There is no writable cache folder .*kd_d2-4321 belongs to another user"):
        cache_folder("annotations")


def test_a_cache_in_the_home_needs_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("annotations") == str(tmp_path / "kd_d2" / "annotations")
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    monkeypatch.setenv("HOME", os.devnull)
    with pytest.raises(UserError, match=r"There is no writable cache folder .*No usable temporary directory found"):
        cache_folder("annotations")


def test_an_unwritable_cache_folder_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("icd-priors") == str(tmp_path / "home" / ".cache" / "kd_d2" / "icd-priors")
