"""The kd-d2 program: commands, overrides, --model, and users' modules."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kd_d2 import UserError, __version__, moved
from kd_d2.analysis import ANALYSES
from kd_d2.cli import COMMANDS, main
from kd_d2.cli.log import print_log
from kd_d2.cli.overrides import split_overrides
from kd_d2.config import load_config, read_config
from kd_d2.distillers import DISTILLER_REGISTRY
from kd_d2.engine import write_configs
from kd_d2.extensions import import_extensions
from kd_d2.model_paths import ModelPath, read_model_paths, read_one_model_path

import pytest
import yaml
from helpers import ROOT, clean_process, make_coco, make_project, run_command

# ---------------------------------------------------------------------------------------------- commands


def _run(*arguments: str) -> subprocess.CompletedProcess:
    """Run `kd-d2 ARGUMENTS` in a separate process, which prints at exit the heavy packages that it has imported."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('IMPORTED', *{'torch', 'detectron2', 'cv2'} & sys.modules.keys()))\n"
        "from kd_d2.cli import main\n"
        f"main({list(arguments)!r})\n"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = _run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "IMPORTED"
    assert (__version__ if "--version" in arguments else f"usage: kd-d2 {' '.join(arguments[:-1])}") in done.stdout


def test_names_of_configs_import_nothing_heavy() -> None:
    printed = _run("config", "list").stdout.splitlines()
    assert "tiny/retinanet-ssim" in printed and printed[-1] == "IMPORTED"


def test_the_overview_has_every_command() -> None:
    printed = _run("--help").stdout
    assert all(f"  {name} " in printed and text in printed for name, text in COMMANDS.items())
    assert f"{__version__}\n" in _run("--version").stdout


def test_two_commands_in_one_process(capsys: pytest.CaptureFixture) -> None:
    """Check that the second prints each message once."""
    with clean_process():
        for _ in range(2):
            print_log()
            logging.getLogger("kd_d2.test").info("a message")
    assert capsys.readouterr().out == "a message\n" * 2


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("trian", "kd-d2 has no command 'trian'; did you mean train?"),
        ("pseudo_label", "kd-d2 has no command 'pseudo_label'; did you mean pseudo-label?"),
        ("xyz", "kd-d2 has no command 'xyz'; kd-d2 --help lists all commands."),
    ],
)
def test_an_unknown_command(capsys: pytest.CaptureFixture, command: str, sentence: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(command, "--output", "x")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.parametrize(
    "command", [["analyze", "errors", "--model", "x", "--output", "y"], ["config", "show", "tiny/retinanet-student"]]
)
def test_an_abbreviated_option(capsys: pytest.CaptureFixture, command: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(*command, "--imp", "nowhere.py")
    assert ended.value.code == 2
    assert "unrecognized arguments: --imp nowhere.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["config", "show", ""], "CONFIG is empty: name a config."),
        (["eval", "--teacher-of", ""], "--teacher-of is empty: name a config."),
        (["eval", "--model", ""], "--model is empty: name a config or the output folder of a training."),
        (["eval", "--model", "title="], "--model is empty: name a config or the output folder of a training."),
    ],
)
def test_an_empty_config(capsys: pytest.CaptureFixture, command: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit):
        run_command(*command)
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_config_list_and_show(capsys: pytest.CaptureFixture) -> None:
    """Check names, the resolved config as YAML, and the keys that differ from the defaults, including overrides."""
    run_command("config", "list")
    names = capsys.readouterr().out.splitlines()
    assert {"tiny/retinanet-ssim", "ICD/fcos_R50", "recommended/icd", "Base-FCOS"} <= set(names)
    run_command("config", "show", "tiny/retinanet-ssim", "SOLVER.BASE_LR=0.5", "MODEL.KD.BALANCE.ENABLED", "True")
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["SOLVER"]["BASE_LR"] == 0.5 and tree["MODEL"]["KD"]["BALANCE"]["ENABLED"] is True
    assert tree["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 80
    run_command("config", "show", "--changes", "recommended/icd", "SEED", "3")
    changed = sorted(capsys.readouterr().out.splitlines())
    assert changed == ["MODEL.KD.BALANCE.ENABLED: True", "MODEL.KD.DISTILLERS: ['ICD']", "SEED: 3"]


def test_a_shipped_config_is_trained_by_its_name(tmp_path: Path) -> None:
    """Check the command of the README, with a small config."""
    data = make_coco(tmp_path)
    run_command(
        *("train", "tiny/retinanet-student", "MODEL.RETINANET.NUM_CLASSES", 3, "OUTPUT_DIR", tmp_path / "output"),
        *("DATASETS.COCO_JSON", [["shipped", str(data), str(tmp_path / "images")]], "DATASETS.TRAIN", "('shipped',)"),
        *("DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(32,)", "DATALOADER.NUM_WORKERS", 0),
        *("SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()"),
    )
    assert (tmp_path / "output" / "model_final.pth").is_file()


def test_completion(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("shtab")
    run_command("completion", "bash")
    printed = capsys.readouterr().out
    assert "--score-thresh" in printed and "pseudo-label" in printed
    assert "--supercategories" in printed  # of kd-d2 analyze errors
    assert not subprocess.run(["bash", "-n"], input=printed, text=True).returncode


def test_completion_in_bash(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check an option after one with several values, and a file as a value, in a folder with one file."""
    pytest.importorskip("shtab")
    run_command("completion", "bash")
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "only.yaml").touch()

    def completed(line: str) -> list[str]:
        words = line.split(" ")
        complete = f"COMP_CWORD={len(words) - 1}; _shtab_kd_d2 2>/dev/null; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        command = ["bash", "-c", f'source {script}; COMP_WORDS=("$@"); {complete}', "bash", *words]
        return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True).stdout.split()

    assert completed("kd-d2 predict --model run --in") == ["--input"]
    assert completed("kd-d2 predict --model on") == ["only.yaml"]
    assert completed("kd-d2 train only.yaml --resu") == ["--resume"]


def _program_of(function: Callable[[], None]) -> list[str]:
    """Return the command of a process in which `kd-d2 config list` calls a function instead, without heavy imports."""
    lines = ["import kd_d2.cli.config", inspect.getsource(function)]
    lines += [f"kd_d2.cli.config.run = lambda args: {function.__name__}()", "kd_d2.cli.main(['config', 'list'])"]
    return [sys.executable, "-c", "\n".join(lines)]


def _print_much() -> None:
    print("x" * 100_000)


def _print_little() -> None:
    print("x")


def _log_and_fail() -> None:
    import logging

    from kd_d2 import UserError
    from kd_d2.cli.log import print_log

    print_log()
    logging.getLogger("kd_d2").info("a message")
    raise UserError("--results: a reason.")


@pytest.mark.parametrize("function", [_print_much, _print_little])
def test_output_that_is_not_read(function: Callable[[], None]) -> None:
    """Check that a command whose reader, such as `head`, has ended stops without a traceback, also if it ends before."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(_program_of(function), cwd=ROOT, env=environment, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("program", [["-m", "kd_d2", "config", "list"], ["train_net.py", "--help"]])
def test_without_docstrings(program: list[str]) -> None:
    done = subprocess.run([sys.executable, "-OO", *program], cwd=ROOT, capture_output=True, text=True)
    sentence = "error: Detectron2 needs docstrings, which python -OO and PYTHONOPTIMIZE=2 remove; use -O or neither.\n"
    assert (done.returncode, done.stderr) == (2, sentence)


@pytest.mark.parametrize(
    ("function", "status", "error"), [(_print_little, 0, ""), (_log_and_fail, 2, "error: --results: a reason.\n")]
)
def test_closed_output(function: Callable[[], None], status: int, error: str) -> None:
    command = ["bash", "-c", 'exec "$@" >&-', "bash", *_program_of(function)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (status, error)


def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """Check that a child process, which writes to all streams, does not write to a file of its parent."""
    script = (
        "import os\nfrom kd_d2.errors import exit_on_user_error\n"
        f"with exit_on_user_error(), open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "    os.system('cat; echo out; echo error >&2')\n"
        "    print(file.fileno() > 2, file=file)"
    )
    command = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", script]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (tmp_path / "file").read_text() == "True\n"


def test_output_without_unicode() -> None:
    """Check that characters that the encoding of the output lacks are escaped."""
    script = "from kd_d2.errors import exit_on_user_error\nwith exit_on_user_error(): print('caf\\u00e9 \\u72ac')"
    command, environment = [sys.executable, "-c", script], {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, env=environment)
    assert done.stdout == b"caf\xe9 \\u72ac\n" and done.returncode == 0


# --------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("line", "options", "overrides"),
    [
        ("", "", ""),
        ("a.yaml --resume", "a.yaml --resume", ""),
        ("a.yaml SOLVER.BASE_LR 0.1", "a.yaml", "SOLVER.BASE_LR 0.1"),
        ("a.yaml SOLVER.BASE_LR=0.1 SEED 3", "a.yaml", "SOLVER.BASE_LR 0.1 SEED 3"),
        ("--cells a b MODEL.KD.FGD.WEIGHT 2", "--cells a b", "MODEL.KD.FGD.WEIGHT 2"),
        ("--cells A B_1 OUTPUT_DIR=x=y", "--cells A B_1", "OUTPUT_DIR x=y"),
        ("a.yaml INPUT.MIN_SIZE_TEST= SEED -1", "a.yaml", "INPUT.MIN_SIZE_TEST= SEED -1"),
        ("a.yaml SOLVER.STEPS --x", "a.yaml", "SOLVER.STEPS --x"),
        ("--input My.JPG A.b", "--input My.JPG A.b", ""),
        ("--input DSC_0001.JPG SEED 3", "--input DSC_0001.JPG", "SEED 3"),
        ("a.yaml SEED 3 no_key x", "a.yaml", "SEED 3 no_key x"),  # reported as an unknown key when the config is read
    ],
)
def test_overrides_are_split_off(line: str, options: str, overrides: str) -> None:
    expected = overrides.replace("INPUT.MIN_SIZE_TEST=", "INPUT.MIN_SIZE_TEST \0").split()
    assert split_overrides(line.split()) == (options.split(), [value.replace("\0", "") for value in expected])


def test_values_keep_spaces_and_lines() -> None:
    arguments = ["DATASETS.TRAIN=('a', 'b')", "DATASETS.COCO_JSON", "[['a',\n'b = c', 'd']]"]
    assert split_overrides(arguments)[1] == ["DATASETS.TRAIN", "('a', 'b')", *arguments[1:]]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("a.yaml SEED 3 --resume", "The option --resume must come before the KEY VALUE overrides."),
        ("a.yaml SEED", "The override SEED has no value"),
        ("a.yaml SEED=3 SOLVER.BASE_LR", "The override SOLVER.BASE_LR has no value"),
    ],
)
def test_wrong_overrides(line: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        split_overrides(line.split())


# ----------------------------------------------------------------------------------------------- --model


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "ssim=4"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    (folder / "model_final.pth").touch()
    return folder


def test_models(run_folder: Path) -> None:
    """Check configs and run folders, with and without title and weights; an existing path may have = in its name."""
    config, weights = str(run_folder / "config.yaml"), str(run_folder / "model_final.pth")
    other = run_folder / "model_0000399.pth"
    other.touch()
    values = [["dir/a.yaml"], ["b=dir/a.yaml", "x.pth"], [str(run_folder)], [f"c={run_folder}", str(other)]]
    assert read_model_paths(values) == [
        ModelPath("a", "dir/a.yaml", ""),
        ModelPath("b", "dir/a.yaml", "x.pth"),
        ModelPath("ssim=4", config, weights, str(run_folder)),
        ModelPath("c", config, str(other), str(run_folder)),
    ]
    assert ModelPath("b", "a.yaml", "x.pth").overrides == ["MODEL.WEIGHTS", "x.pth"]
    assert ModelPath("b", "a.yaml", "").overrides == []


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([["a.yaml", "b.pth", "c"]], "'c' is one value too many"),
        ([["a.yaml"], ["b.yaml"], ["x/b.yaml"]], "two models have the title 'b'"),
        ([["RUN"]], "RUN is not the output folder of a finished training: there is no .*model_final.pth"),
        ([["RUN", "x.pth"]], "--model: there is no file x.pth"),
    ],
)
def test_wrong_models(run_folder: Path, values: list[list[str]], sentence: str) -> None:
    (run_folder / "model_final.pth").unlink()
    values = [[value.replace("RUN", str(run_folder)) for value in model] for model in values]
    with pytest.raises(UserError, match=sentence.replace("RUN", str(run_folder))):
        read_model_paths(values)


def test_commands_that_take_one_model() -> None:
    assert read_one_model_path([["a.yaml", "x.pth"]]) == ModelPath("a", "a.yaml", "x.pth")
    with pytest.raises(UserError, match="this command accepts one model, not 2"):
        read_one_model_path([["a.yaml"], ["b.yaml"]])


# ---------------------------------------------------------------------------------------------- --import


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with modules, and undo what the test imports."""
    before = dict(sys.modules)
    (tmp_path / "kd_d2_test_good.py").write_text("runs = globals().get('runs', 0) + 1\nclass Thing: pass\n")
    (tmp_path / "kd_d2_test_lacking.py").write_text("import kd_d2_test_nowhere\n")
    (tmp_path / "kd_d2_test_broken.py").write_text("1 / 0\n")
    (tmp_path / "json.py").write_text("")
    (tmp_path / "kd_d2_test_file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    for name in sys.modules.keys() - before.keys():
        if name.startswith("kd_d2_test"):
            del sys.modules[name]


def test_a_file_and_a_module_are_imported_once(own_modules: Path) -> None:
    """Check a path, the module of the same file in the working directory, and that pickle can find its classes."""
    import_extensions(["kd_d2_test_good", "kd_d2_test_good.py", str(own_modules / "kd_d2_test_good.py")])
    module = sys.modules["kd_d2_test_good"]
    assert module.runs == 1
    assert importlib.import_module(module.Thing.__module__).Thing is module.Thing


def test_a_file_that_imports_a_later_one(own_modules: Path) -> None:
    """Check files of the working directory, which the program kd-d2 does not search by itself."""
    (own_modules / "kd_d2_test_user.py").write_text("from kd_d2_test_good import Thing\n")
    import_extensions(["kd_d2_test_user.py", "kd_d2_test_good.py"])
    assert sys.modules["kd_d2_test_user"].Thing is sys.modules["kd_d2_test_good"].Thing


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("kd_d2_test_nowhere", UserError, "--import: there is no module kd_d2_test_nowhere"),
        ("kd_d2_test_good.part", UserError, "--import: there is no module kd_d2_test_good.part"),
        ("nowhere.py", UserError, "--import: there is no file .*nowhere.py"),
        ("json.py", UserError, "json.py has the name of another module, json: rename it"),
        ("./kd_d2_test_file", UserError, "kd_d2_test_file is not a Python file: its name must end with .py"),
        ("", UserError, "--import: '' is neither the name of a module nor the path of a Python file"),
        (".", UserError, r"--import: '\.' is neither the name"),
        (".kd_d2_test_good", UserError, r"--import: '\.kd_d2_test_good' is neither the name"),
        ("kd_d2_test_lacking", ModuleNotFoundError, "No module named 'kd_d2_test_nowhere'"),
        ("kd_d2_test_lacking.py", ModuleNotFoundError, "No module named 'kd_d2_test_nowhere'"),
        ("kd_d2_test_broken.py", ZeroDivisionError, "zero"),
    ],
)
def test_what_cannot_be_imported(own_modules: Path, name: str, error: type, sentence: str) -> None:
    """Check that a missing file or module is a UserError, and that an error inside the user's module is not wrapped."""
    with pytest.raises(error, match=sentence):
        import_extensions([name])
    assert name.removesuffix(".py") not in sys.modules or name == "json.py"


def test_the_import_option_comes_before_the_config_is_read(own_modules: Path, capsys: pytest.CaptureFixture) -> None:
    project = make_project(own_modules / "project", MODEL__KD__DISTILLERS=("Mine",))
    with pytest.raises(SystemExit):
        run_command("train", project.student, "--import", "nowhere.py")
    assert "--import: there is no file" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- moved modules


@pytest.mark.parametrize("old", moved.MODULES)
def test_moved_modules(old: str) -> None:
    """Check that importing an old name reports the new one, and that the new one exists."""
    with pytest.raises(ModuleNotFoundError, match=f"kd_d2.{old} is now kd_d2.{moved.MODULES[old]}"):
        importlib.import_module(f"kd_d2.{old}")
    importlib.import_module(f"kd_d2.{moved.MODULES[old]}")


@pytest.mark.parametrize("old", moved.NAMES)
def test_moved_names(old: str) -> None:
    """Check that `from module import name` with an old name reports the new one, and that the new one exists."""
    module, _, name = old.rpartition(".")
    with pytest.raises(ImportError, match=f"kd_d2.{old} is now kd_d2.{moved.NAMES[old]}$"):
        exec(f"from kd_d2.{module} import {name}")
    module, _, name = moved.NAMES[old].rpartition(".")
    assert hasattr(importlib.import_module(f"kd_d2.{module}"), name)


def test_an_unknown_name_of_a_module_is_an_attribute_error() -> None:
    assert not hasattr(importlib.import_module("kd_d2.distillers.base"), "nothing")


def test_config_explain(capsys: pytest.CaptureFixture[str]) -> None:
    """Check a key with its range and default, a whole node, the same for Detectron2's, and a wrong name."""
    main(["config", "explain", "MODEL.KD.BALANCE.TARGET"])
    assert "a number above 0; default 2.0" in capsys.readouterr().out
    main(["config", "explain", "MODEL.KD.DEFEAT"])
    explained = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MODEL.KD.DEFEAT.")]
    assert len(explained) == 7 and explained[-1] == "MODEL.KD.DEFEAT.ADAPTATION"
    main(["config", "explain", "SOLVER.BASE_LR"])
    assert "a key of Detectron2, 0.001 by default" in capsys.readouterr().out
    main(["config", "explain", "SOLVER.CLIP_GRADIENTS"])
    explained = capsys.readouterr().out
    assert "SOLVER.CLIP_GRADIENTS.CLIP_VALUE\n    a key of Detectron2, 1.0 by default" in explained
    for name, hint in (
        ("MODEL.KD.BALANCE.TARGETS", " Did you mean MODEL.KD.BALANCE.TARGET?"),
        ("model.kd.icd", " Did you mean MODEL.KD.ICD?"),
        ("", ""),
    ):
        with pytest.raises(SystemExit):
            main(["config", "explain", name])
        assert f"There is no config key or node {name}.{hint}\n" in capsys.readouterr().err


def test_an_evaluation_leaves_the_configs_of_the_training(tmp_path: Path) -> None:
    """Check that `--model RUN` still means a distillation after `kd-d2 eval` with overrides."""
    project = make_project(tmp_path, SOLVER__MAX_ITER=1, SOLVER__STEPS=())
    run_command("train", project.student)
    names = ("config.yaml", "student.yaml", "versions.json")
    before = {name: (project.output / name).read_text() for name in names}
    assert "META_ARCHITECTURE: KDMetaArch" in before["config.yaml"]
    run_command("eval", "--model", project.output, "INPUT.MIN_SIZE_TEST", 48)
    assert (project.output / "eval.json").is_file()
    assert {name: (project.output / name).read_text() for name in names} == before


def test_a_training_needs_no_method_that_it_does_not_use(tmp_path: Path) -> None:
    """Check that its folder can be read without the files of such methods, unless their keys were changed."""
    path = tmp_path / "my_variants.py"
    path.write_text(
        "from kd_d2.distillers import DISTILLER_REGISTRY, Distiller\n\n\n"
        "@DISTILLER_REGISTRY.register()\nclass Unused(Distiller):\n    CONFIG_NODE = 'UNUSED'\n\n\n"
        "@DISTILLER_REGISTRY.register()\nclass Changed(Distiller):\n    CONFIG_NODE = 'CHANGED'\n"
    )
    project = make_project(tmp_path)
    try:
        import_extensions([str(path)])
        cfg = load_config(
            str(project.student), ["MODEL.KD.CHANGED.WEIGHT", 2.0, "MODEL.KD.DISTILLERS", ("StructuralKD",)]
        )
        os.makedirs(cfg.OUTPUT_DIR)
        write_configs(cfg)
    finally:
        for name in ("Unused", "Changed"):
            DISTILLER_REGISTRY._obj_map.pop(name, None)
    written = yaml.safe_load((project.output / "config.yaml").read_text())["MODEL"]["KD"]
    assert "UNUSED" not in written and written["CHANGED"]["WEIGHT"] == 2.0 and "STRUCTURAL" in written
    with pytest.raises(UserError, match=r"there is no config key MODEL\.KD\.CHANGED; if it is your own"):
        read_config(str(project.output / "config.yaml"))


def test_an_evaluation_of_a_moved_run_writes_to_it(tmp_path: Path) -> None:
    """Check that the results are in the run's folder, not in the OUTPUT_DIR of its config, unless it is overridden."""
    project = make_project(tmp_path, SOLVER__MAX_ITER=1, SOLVER__STEPS=())
    run_command("train", project.student)
    moved_to = project.output.rename(tmp_path / "moved")
    run_command("eval", "--model", moved_to)
    assert (moved_to / "eval.json").is_file() and not project.output.exists()
    run_command("eval", "--model", moved_to, "OUTPUT_DIR", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "eval.json").is_file()


def test_in_a_fresh_process_reading_a_config_registers_its_detector(tmp_path: Path) -> None:
    """Check that kd_d2.config.load_config registers no detector, and that kd_d2.load_config does."""
    program = """
import sys
from kd_d2.config import load_config
from detectron2.modeling import META_ARCH_REGISTRY
assert load_config(sys.argv[1]).MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY
from kd_d2 import load_config
assert load_config(sys.argv[1]).MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY
"""
    subprocess.run([sys.executable, "-c", program, make_project(tmp_path).student], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "command",
    [*([name] for name in COMMANDS), *(["analyze", name] for name in ANALYSES), ["data", "check"]],
    ids=" ".join,
)
def test_help_fits_the_terminal(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    _usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert max(map(len, rest.splitlines())) <= 80
