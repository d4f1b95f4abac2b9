"""The programs for GPU machines, as far as they can be tested without a GPU: what they read, run and pack."""

import ast
import contextlib
import importlib.util
import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

ROOT = Path(__file__).parent.parent


def load(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_check_stops_a_stage_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a stage's time limit, exit code and log."""
    check = load("benchmarks/gpu_check.py", monkeypatch)
    log = tmp_path / "stage.log"
    far = time.monotonic() + 1000
    assert check.run_stage(check.Stage(["-c", "print('{folder}')"], 60), log, far) == 0
    assert log.read_text() == f"{tmp_path}\n"
    assert check.run_stage(check.Stage(["-c", "raise SystemExit(3)"], 60), log, far) == 3
    endless = check.Stage(["-c", "print('begun'); import time; time.sleep(600)"], 2)
    assert check.run_stage(endless, log, far) == check.FAILED_TO_END
    assert log.read_text() == "begun\n"
    parent = check.Stage(["-c", "import subprocess; subprocess.run(['sh', '-c', 'echo $$; exec sleep 600'])"], 5)
    assert check.run_stage(parent, log, far) == check.FAILED_TO_END
    child = int(log.read_text())
    assert any(not _runs(child) or time.sleep(0.1) for _ in range(50))


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_check_reads_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the summary has each table of a log with the line above it, and nothing else."""
    log = tmp_path / "log"
    log.write_text("noise\ntitle\n| a | b |\n|---|---|\n| 1 | 2 |\nnoise\n| c |\n|---|\n")
    expected = ["", "title", "", "| a | b |", "|---|---|", "| 1 | 2 |", "", "noise", "", "| c |", "|---|"]
    assert load("benchmarks/gpu_check.py", monkeypatch).tables(log) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_check_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path / "check")])
    with pytest.raises(SystemExit, match=r"^PyTorch finds no GPU on this machine"):
        runpy.run_path(str(ROOT / "benchmarks" / "gpu_check.py"), run_name="__main__")
    assert not (tmp_path / "check").exists()


def test_pack_has_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that packages with a suitable version on the machine are omitted, and PyTorch always."""
    pack = load("tools/gpu_pack.py", monkeypatch)
    present = pack.read_freeze("numpy==1.25.2\nYacs==0.1.8\nsome @ file:///x\npycocotools==2.0.1\n")
    assert present == {"numpy": Version("1.25.2"), "yacs": Version("0.1.8"), "pycocotools": Version("2.0.1")}
    everything, missing = pack.missing_packages({}, "3.12"), pack.missing_packages(present, "3.12")
    assert set(everything) - set(missing) == {"yacs"}
    assert {"numpy", "pycocotools", "sal-detectron2", "fvcore", "kornia"} <= set(missing)
    assert not {"torch", "torchvision", "triton", "kd-d2", "sympy"} & set(everything)


def test_pack_for_a_machine_with_an_older_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that packages of the machine are kept with its NumPy, or packed with another one."""
    pack = load("tools/gpu_pack.py", monkeypatch)
    lines = "numpy==1.26.4\nmatplotlib==3.10.0\npycocotools==2.0.7\nyacs==0.1.8\n"
    built = {"numpy", "matplotlib", "pycocotools"}
    opencv = "opencv-python-headless"
    requires = pack.metadata.requires
    monkeypatch.setattr(pack.metadata, "requires", lambda n: ["numpy>=2"] if n == opencv else requires(n))
    with_old_opencv = pack.missing_packages(pack.read_freeze(f"{lines}{opencv}==4.10.0.84\n"), "3.12")
    assert not built & set(with_old_opencv) and opencv not in with_old_opencv
    without = pack.missing_packages(pack.read_freeze(lines), "3.12")
    assert built | {opencv} <= set(without) and "yacs" not in without


@pytest.mark.parametrize(("lines", "message"), [
    ("torch==2.9.1+cu130\n", "--installed has torch 2.9.1+cu130, but kd_d2 needs torch>=2.10.0a0: install that there first."),
    ("torch==2.10.0a0+b4e4ee81d3.nv25.12\ntorchvision==0.25.0\n", None),
])  # fmt: skip
def test_pack_for_a_machine_with_an_old_torch(monkeypatch: pytest.MonkeyPatch, lines: str, message: str | None) -> None:
    """Check that prereleases, which NVIDIA's containers have, count as their release."""
    pack = load("tools/gpu_pack.py", monkeypatch)
    with pytest.raises(SystemExit) if message else contextlib.nullcontext() as caught:
        pack.missing_packages(pack.read_freeze(lines), "3.12")
    assert caught is None or caught.value.code == message


def test_pack_for_another_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check the platforms of the wheels: those of the machine, except Detectron2's."""
    pack = load("tools/gpu_pack.py", monkeypatch)
    commands = []
    monkeypatch.setattr(pack, "_run", lambda command, wanted: commands.append((wanted, command)))
    pack.fetch_wheels({"numpy": "2.3.5", pack.DETECTRON2: "0.7.2"}, "3.12", "aarch64", tmp_path)
    (numpy, own), (detectron2, its), _ = commands
    assert numpy == ["numpy==2.3.5"] and detectron2 == [f"{pack.DETECTRON2}==0.7.2"]
    assert "manylinux_2_28_aarch64" in own and "manylinux_2_28_x86_64" not in own
    assert "manylinux_2_28_x86_64" in its and "manylinux_2_28_aarch64" not in its


@pytest.mark.parametrize("line", ["numpy==2023.1-custom-build", "numpy==", "numpy @ file:///numpy.whl"])
def test_pack_for_a_machine_with_an_unclear_version(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Check that a version that cannot be compared counts as missing, and that the other lines are read."""
    pack = load("tools/gpu_pack.py", monkeypatch)
    assert pack.read_freeze(f"yacs==0.1.8\n{line}\nkornia===0.9.0\n") == {
        "yacs": Version("0.1.8"),
        "kornia": Version("0.9.0"),
    }


def test_pack_has_what_the_stages_of_the_check_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the imports of the tests and benchmarks, and that tests of the pack, which need more, are not run there."""
    pack, check = load("tools/gpu_pack.py", monkeypatch), load("benchmarks/gpu_check.py", monkeypatch)
    assert "--ignore=tests/test_gpu_tools.py" in check.STAGES["tests"].command
    files = [*(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    own = {"kd_d2", "detectron2", *(file.stem for file in files)}
    statements = [statement for file in files for statement in ast.parse(file.read_text()).body]
    names = [alias.name for statement in statements if isinstance(statement, ast.Import) for alias in statement.names]
    names += [statement.module for statement in statements if isinstance(statement, ast.ImportFrom)]
    modules = {name.partition(".")[0] for name in names} - own - sys.stdlib_module_names
    packed = {*pack.missing_packages({}, "3.12"), *pack.OF_THE_MACHINE}
    found = packages_distributions()
    assert {"pytest", "hypothesis", "cv2", "torch"} <= modules
    assert [m for m in modules if not packed & {pack._normalized(name) for name in found[m]}] == []
    assert "pytest-timeout" in packed


def test_scaling_of_results_with_and_without_a_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scale = load("benchmarks/scale.py", monkeypatch)
    step = SimpleNamespace(model=torch.nn.Linear(3, 2))
    monkeypatch.setattr(scale, "Bench", lambda pair, batch: SimpleNamespace(step=lambda method: step))
    variants = {"PFI": {"seconds": [3.0, 1.0, 2.0], "memory_mib": 7.0}}
    for more, device in (({}, "CPU"), ({"batch": 4}, "CPU, batch 4")):
        (tmp_path / "step.json").write_text(json.dumps({"pair": "tiny", "device": "CPU", "variants": variants, **more}))
        pair, parts = scale.measured_elsewhere(str(tmp_path / "step.json"), "PFI")
        assert pair == "tiny"
        assert asdict(parts) == pytest.approx(asdict(scale.Parts(device, 2.0, 7.0, gradients=8)), nan_ok=True)


def test_scaling_on_one_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Check that nothing is measured where Detectron2 would not start two processes."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scale = load("benchmarks/scale.py", monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["scale.py"])
    with pytest.raises(SystemExit, match="2"):
        scale.main()
    assert "two processes need two GPUs, and PyTorch finds one" in capsys.readouterr().err


def test_latencies_are_of_each_models_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    deploy = load("benchmarks/deploy.py", monkeypatch)
    seen: dict[str, list[int]] = {"small": [], "large": []}
    models = {(title, "any"): lambda x, title=title: seen[title].append(len(x[0]["image"])) for title in seen}
    inputs = {"small": [torch.zeros(1), torch.zeros(2)], "large": [torch.zeros(3), torch.zeros(4)]}
    times = deploy.latencies(models, inputs, rounds=2)
    assert seen == {"small": [1, 2] * 3, "large": [3, 4] * 3}
    assert [len(taken) for taken in times.values()] == [4, 4]


def test_profile_of_the_methods_that_support_the_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    profile = load("benchmarks/profile_step.py", monkeypatch)
    monkeypatch.setattr(profile.Bench, "step", lambda bench, variant: sys.exit(variant))
    monkeypatch.setattr(sys, "argv", ["profile_step.py", "--batch", "1"])
    with pytest.raises(SystemExit) as methods:
        profile.main()
    chosen = methods.value.code.split("+")
    assert {"StructuralKD", "ICD"} <= set(chosen) and "DKD" not in chosen  # it needs a box head


def test_profile_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Check device times by hand: 30 us of kernels in the teacher, 60 in the backward pass, 5 in the optimizer.

    The profiler lists labels twice, as they ran on the CPU and on the GPU, and the backward pass runs in another thread.
    """
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    profile = load("benchmarks/profile_step.py", monkeypatch)
    on_cpu = [("iteration", 1, 0, 100), ("teacher", 1, 1, 10), ("aten::conv2d", 1, 2, 9)]
    on_cpu += [("backward", 1, 20, 60), ("ConvolutionBackward0", 2, 21, 59), ("optimizer", 1, 61, 90)]
    kernels = {"aten::conv2d": ("k1", 5, 35), "ConvolutionBackward0": ("k2", 45, 105), "optimizer": ("k3", 113, 118)}
    labels = {"iteration": (5, 120), "teacher": (5, 40), "optimizer": (110, 120)}
    events = []

    def add(*what: object, device: DeviceType = DeviceType.CUDA, label: bool = False) -> FunctionEvent:
        options = {"use_device": "cuda", "device_type": device, "is_user_annotation": label, "stack": []}
        events.append(FunctionEvent(len(events), *what, **options))
        return events[-1]

    for name, thread, start, end in on_cpu:
        event = add(name, thread, start, end, device=DeviceType.CPU, label=name in labels or name == "backward")
        if name in kernels:
            kernel, begin, finish = kernels[name]
            event.append_kernel(kernel, 0, finish - begin)
            add(kernel, 7, begin, finish)
    for name, (start, end) in labels.items():
        add(name, 7, start, end, label=True)
    events = EventList(events, use_device="cuda")
    events._build_tree()
    profile.print_profile(events.key_averages(), ["teacher", "backward", "optimizer"], iterations=1, has_gpu=True)
    rows = [tuple(cell.strip() for cell in line.split("|")[1::2]) for line in capsys.readouterr().out.splitlines()]
    shares = [row for row in rows if len(row) == 2 and row[1].replace(".", "").isdigit()]
    assert shares[:4] == [
        ("teacher", "31.6"), ("optimizer", "5.3"), ("backward and all else", "63.2"), ("iteration", "100.0"),
    ]  # fmt: skip
    assert shares[-3:] == [("k2", "63.2"), ("k1", "31.6"), ("k3", "5.3")]


@pytest.mark.parametrize("target", ["gpu-check", "gpu-evidence"])
def test_check_in_a_folder_with_a_space(tmp_path: Path, target: str) -> None:
    """Check the PYTHONPATH that make gives to the program."""
    clone = tmp_path / "my clone"
    (clone / "benchmarks").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", clone)
    program = clone / "benchmarks" / f"{target.replace('-', '_')}.py"
    program.write_text("import os; print(os.environ['PYTHONPATH'])")
    done = subprocess.run(["make", "-s", target, f"PYTHON={sys.executable}"], cwd=clone, capture_output=True, text=True)
    assert done.stdout.startswith(f"{clone}:{clone}/output/gpu-pack/site:"), done.stderr


def test_pack_from_an_environment_with_another_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that Detectron2's pinned version is packed, unless the machine has one."""
    pack = load("tools/gpu_pack.py", monkeypatch)
    requires = pack.metadata.requires
    monkeypatch.setattr(pack.metadata, "requires", lambda name: requires({pack.DETECTRON2: "none"}.get(name, name)))
    assert (
        f"{pack.DETECTRON2}=={pack.missing_packages({}, '3.12')[pack.DETECTRON2]} "
        in (ROOT / "requirements" / "detectron2.txt").read_text()
    )
    assert pack.DETECTRON2 not in pack.missing_packages({"detectron2": Version("0.6")}, "3.12")


def test_pack_without_the_list_of_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pack = load("tools/gpu_pack.py", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["gpu_pack.py", "--installed", "none.txt"])
    with pytest.raises(SystemExit, match="2"):
        pack.main()
    assert "argument --installed: can't open 'none.txt'" in capsys.readouterr().err


def test_evidence_without_mps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Check that trainings run without NVIDIA's service, and that its absence is reported."""
    evidence = load("benchmarks/gpu_evidence.py", monkeypatch)
    monkeypatch.setattr(evidence, "MPS", "no-such-program")
    with evidence.multi_process_service() as environment:
        assert environment == {}
    assert "no-such-program is missing or does not start" in capsys.readouterr().out


def test_evidence_stops_its_trainings_on_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a SIGTERM while they run, and that there is one for every other core."""
    evidence = load("benchmarks/gpu_evidence.py", monkeypatch)
    told = []

    class Process:
        def __init__(self, command: list[str], **options: object):
            told.append(command[command.index("--jobs") + 1])

        def wait(self, seconds: float) -> None:
            if len(told) == 1:
                signal.raise_signal(signal.SIGTERM)

        def send_signal(self, number: int) -> None:
            told.append(number)

    monkeypatch.setattr(evidence.subprocess, "Popen", Process)
    monkeypatch.setattr(evidence, "MPS", "no-such-program")
    monkeypatch.setattr(evidence, "available_cores", lambda: 6)
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py"])
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        evidence.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == ["3", signal.SIGTERM]


def test_evidence_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that results go to a new folder: committed ones have other settings, with which a sweep is refused."""
    evidence = load("benchmarks/gpu_evidence.py", monkeypatch)
    started = []

    class Process:
        def __init__(self, command: list[str], **options: object):
            started.append(command)

        def wait(self, seconds: float) -> int:
            return 0

    monkeypatch.setattr(evidence.subprocess, "Popen", Process)
    monkeypatch.setattr(evidence, "MPS", "no-such-program")
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py"])
    assert evidence.main() == 0
    folder = started[0][started[0].index("--results") + 1]
    assert folder == "projects/evidence/long-gpu"
    own = ["SOLVER.AMP.ENABLED", "True"]
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", "--cells", "ima", "--seeds", "0", *own])
    assert evidence.main() == 0
    assert started[1][-10:] == ["--cells", "ima", "--seeds", "0", *evidence.ON_A_GPU, *own]
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", *own, "--seeds", "0"])
    with pytest.raises(SystemExit, match="2"):
        evidence.main()
