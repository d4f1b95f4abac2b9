#!/usr/bin/env python
"""Pack everything that kd_d2 needs on a GPU machine without a network into one archive: missing packages, and data.

    tools/gpu_pack.py [--python 3.12] [--machine x86_64] [--installed FILE] [--add PATH[=NAME] ...]
                      [--output output/gpu-pack.tar.xz]

--installed is the output of `python -m pip list --format=freeze` there; suitable packages in it are omitted, as are
PyTorch, torchvision and Triton. --add includes files and folders, such as data and weights. There, in the clone:

    mkdir -p output && tar xJf gpu-pack.tar.xz -C output && make gpu-check
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
OF_THE_MACHINE = ("torch", "torchvision", "triton")
DETECTRON2 = "sal-detectron2"
# Tags of its wheel, only because of extensions that are not used; see requirements/detectron2.txt.
DETECTRON2_PYTHON, DETECTRON2_MACHINE = "3.10", "x86_64"
SOURCE_ALONE = ("antlr4-python3-runtime", "fvcore")  # pure Python, no wheels on PyPI
ALSO = ("faster-coco-eval", "pytest", "pytest-timeout", "hypothesis", "kornia")  # for evaluations and for the tests
MACHINES = ("x86_64", "aarch64")
MANYLINUX = [*(f"manylinux_2_{minor}" for minor in (35, 34, 31, 28, 27, 24, 17)), "manylinux2014"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="minor Python version of the machine (default 3.12)")
    parser.add_argument("--machine", choices=MACHINES, default="x86_64", help="its processor (default x86_64)")
    parser.add_argument(
        "--installed", type=argparse.FileType(), help="its packages, as listed by pip with --format=freeze"
    )
    parser.add_argument("--add", nargs="+", default=[], metavar="PATH[=NAME]", help="files and folders to include")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu-pack.tar.xz")
    args = parser.parse_args()
    additions = [_addition(text) for text in args.add]
    present = read_freeze(args.installed.read()) if args.installed else {}
    needed = missing_packages(present, args.python, args.machine)
    with tempfile.TemporaryDirectory() as folder:
        site, wheels = Path(folder) / "gpu-pack" / "site", Path(folder) / "wheels"
        fetch_wheels(needed, args.python, args.machine, wheels)
        for file in wheels.glob("*.whl"):
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(site)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(args.output, "w:xz") as archive:
            archive.add(site.parent, "gpu-pack")
            for path, name in additions:
                archive.add(path, f"gpu-pack/{name}")
    print(f"{args.output}: {len(needed)} packages, {args.output.stat().st_size / 1e6:.0f} MB")


def _addition(text: str) -> tuple[Path, str]:
    path, _, name = text.partition("=")
    if not Path(path).exists():
        sys.exit(f"--add {path} does not exist.")
    return Path(path), name or Path(path).name


def read_freeze(text: str) -> dict[str, Version]:
    """Return versions by normalized package name, without versions that no specifier can be compared with."""
    pairs = re.findall(r"^([\w.-]+)={2,3}(\S+)", text, re.MULTILINE)
    return {_normalized(name): Version(version) for name, version in pairs if _is_version(version)}


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def missing_packages(present: dict[str, Version], python: str, machine: str = "x86_64") -> dict[str, str]:
    """Return the requirements of kd_d2 missing on the machine, with the versions of this environment, and Detectron2.

    Args:
        present: versions of the machine's packages.
        python: its minor Python version, such as "3.12".
        machine: its processor, one of `MACHINES`.

    The environment may have another Detectron2 than the one to pack, whose version is in requirements/.
    """
    values = {
        "extra": "",
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
    }
    specifiers: dict[str, SpecifierSet] = {}
    needed: list[str] = []
    waiting = [Requirement(name) for name in ("kd_d2", *ALSO)]
    while waiting:
        requirement = waiting.pop()
        name = _normalized(requirement.name)
        specifiers[name] = specifiers.get(name, SpecifierSet()) & requirement.specifier
        is_kept = name in present and name != "kd-d2" and specifiers[name].contains(present[name], prereleases=True)
        if not is_kept and name not in (*needed, *OF_THE_MACHINE):
            needed.append(name)
            waiting += [
                other
                for other in map(Requirement, metadata.requires(name) or [])
                if other.marker is None or other.marker.evaluate(values)
            ]
    for name in OF_THE_MACHINE:
        version = present.get(name)
        unmet = [
            str(part) for part in specifiers.get(name, ()) if version and not part.contains(version, prereleases=True)
        ]
        if unmet:
            sys.exit(f"--installed has {name} {version}, but kd_d2 needs {name}{unmet[0]}: install that there first.")
    if "numpy" in needed and (built_for_another := _users_of_numpy(specifiers) & set(present)):
        others = {name: version for name, version in present.items() if name not in built_for_another}
        return missing_packages(others, python, machine)
    missing = {name: metadata.version(name) for name in sorted(needed) if name != "kd-d2"}
    if not {"detectron2", DETECTRON2} & set(present):
        pins = (ROOT / "requirements" / "detectron2.txt").read_text()
        missing[DETECTRON2] = re.search(rf"^{DETECTRON2}==(\S+)", pins, re.MULTILINE)[1]
    return missing


def _users_of_numpy(names: Iterable[str]) -> set[str]:
    requirements = {
        name: map(Requirement, metadata.requires(name) or []) for name in names if name not in OF_THE_MACHINE
    }
    return {name for name, its in requirements.items() if any(other.name == "numpy" for other in its)}


def fetch_wheels(packages: dict[str, str], python: str, machine: str, folder: Path) -> None:
    """Download wheels of the packages for the machine, and build those that are published only as source."""
    pins = {name: f"{name}=={version}" for name, version in packages.items()}
    built = [pins.pop(name) for name in SOURCE_ALONE if name in pins]
    detectron2 = [pins.pop(DETECTRON2)] if DETECTRON2 in pins else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    groups = ((python, machine, list(pins.values())), (DETECTRON2_PYTHON, DETECTRON2_MACHINE, detectron2))
    for version, processor, wanted in groups:
        platforms = [option for name in MANYLINUX for option in ("--platform", f"{name}_{processor}")]
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            version,
            "--implementation",
            "cp",
            *platforms,
        ]
        _run([*pip, "download", *options, "-d", folder, *wanted], wanted)
    _run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, *built], built)


def _run(command: list, wanted: list[str]) -> None:
    if wanted and subprocess.run(command).returncode:
        sys.exit(f"pip found no wheels for {', '.join(wanted)}: see its messages above.")


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
