"""A few of the attacks of tests/attacks.py: no code is run, nothing hangs or ends in a traceback, no file is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attacks import attack_disk, attack_files, attack_kills, make_readers, whole_files


@pytest.mark.slow
def test_hostile_files(tmp_path: Path) -> None:
    assert attack_files(make_readers(tmp_path), tries=60, seed=1) == []


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    assert attack_kills(tmp_path, tries=8, seed=1) == []


@pytest.mark.slow
def test_full_disks(tmp_path: Path) -> None:
    assert attack_disk(tmp_path, tries=4, seed=1) == []


def test_a_half_file_is_seen(tmp_path: Path) -> None:
    """Check `whole_files`, which the attacks rely on."""
    content = {"model": {"a": torch.ones(1)}, "distillers": {}, "trainer": {}, "iteration": 4}
    torch.save(content, tmp_path / "model_0000004.pth")
    assert whole_files(tmp_path) == 4
    (tmp_path / "student.yaml").write_text("SEED: 1")
    with pytest.raises(AssertionError, match=r"student\.yaml"):
        whole_files(tmp_path)
