"""The folder of cached files."""

import os
import tempfile
from pathlib import Path

from kd_d2.cache import cache_folder

import pytest


def test_a_user_without_a_home_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as in a container started with an unknown user id
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_folder("annotations") == str(tmp_path / "kd_d2" / "annotations")


def test_an_unwritable_cache_folder_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("icd-priors") == str(tmp_path / "home" / ".cache" / "kd_d2" / "icd-priors")
