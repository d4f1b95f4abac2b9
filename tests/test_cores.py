"""The number of CPU cores, with control groups as files."""

import os
from pathlib import Path

from kd_d2 import cores
from kd_d2.cli import main

import pytest

pytestmark = pytest.mark.unit

JOB, STEP = "slurm/job", "slurm/job/step"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        (f"0::/{STEP}\n", {f"{JOB}/cpu.max": "150000 50000\n", f"{STEP}/cpu.max": "max 50000\n"}, 3),
        (f"0::/{STEP}\n", {f"{JOB}/cpu.max": "400000 100000\n", f"{STEP}/cpu.max": "200000 100000\n"}, 2),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000\n"}, 2),
        ("1:memory:/\n2:cpu,cpuacct:/a\n0::/\n",
         {"cpu/a/cpu.cfs_quota_us": "350000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 4),
        ("2:cpuacct,cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        (None, {"cpu.max": "200000 100000\n"}, 8),
    ],
)  # fmt: skip
def test_limits_of_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str | None, files: dict, expected: int
) -> None:
    """Check quotas divided by periods, rounded up, of both versions, on a machine with 8 cores."""
    _limit(tmp_path, monkeypatch, membership, files)
    assert cores.available_cores() == expected


@pytest.mark.parametrize(
    ("quota", "already", "expected"), [("200000", None, "2"), ("200000", "5", "5"), ("max", None, None)]
)
def test_the_program_has_as_many_threads_as_a_container_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, already: str | None, expected: str | None
) -> None:
    _limit(tmp_path, monkeypatch, "0::/\n", {"cpu.max": f"{quota} 100000\n"})
    monkeypatch.setenv("OMP_NUM_THREADS", already or "")
    if already is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ.get("OMP_NUM_THREADS") == expected


def _limit(folder: Path, monkeypatch: pytest.MonkeyPatch, membership: str | None, files: dict[str, str]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cores, "GROUPS", str(folder))
    monkeypatch.setattr(cores, "MEMBERSHIP", str(folder / "membership"))
    if membership is not None:
        (folder / "membership").write_text(membership)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
