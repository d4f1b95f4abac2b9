#!/usr/bin/env bash
# Makes .venv with everything that kd_d2 needs; returns at once when that is done already.
# PYTHON and DETECTRON2 are described in the Makefile.
set -euo pipefail
cd "$(dirname "$0")/.."

SOURCE=git+https://github.com/facebookresearch/detectron2@02b5c4e295e990042a714712c21dc79b731e8833
SITE_PACKAGES='import sysconfig; print(sysconfig.get_path("purelib"))'
VENV=$PWD/.venv
VPY=$VENV/bin/python
STATE=$VENV/kd_d2-setup # line 1: how Detectron2 came; line 2: the base Python; line 3, once done: fingerprint
want=${DETECTRON2:-}
unset VIRTUAL_ENV
PATH=${PATH//"$VENV/bin:"/}

die() {
    echo "setup failed: $*" >&2
    exit 1
}

step() {
    echo "== setup: $*"
}

pip_install() { # what it is for, then pip's arguments
    local what=$1
    shift
    "$VPY" -m pip install --disable-pip-version-check --no-build-isolation "$@" ||
        die "pip could not install $what: see its messages above, and whether a package registry can be reached."
}

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

supported() {
    case $(version_of "$1") in 3.11 | 3.12) ;; *) return 1 ;; esac
}

in_venv() {
    "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'
}

has_detectron2() {
    "$1" -c 'import sys, importlib.util as u; sys.exit(not (u.find_spec("detectron2") and u.find_spec("torch")))'
}

why_unusable() { # prints why kd_d2 cannot use what this Python has; nothing if it can
    "$1" -W ignore - <<'PY' 2>/dev/null || echo "importing it fails"
import detectron2, numpy, torch
number = lambda module: tuple(int(n) for n in module.__version__.split("+")[0].split(".")[:2])
if number(torch) < (2, 10):
    print(f"its torch is {torch.__version__}, not >= 2.10")
elif not (1, 26) <= number(numpy) < (2, 0):
    print(f"its numpy is {numpy.__version__}, not >= 1.26 and < 2")
PY
}

choose_python() { # sets python
    local candidate seen=
    if [ -n "${PYTHON:-}" ]; then
        python=$(command -v "$PYTHON") || die "PYTHON=$PYTHON is not a program that can be run."
        version=$(version_of "$python") && [ -n "$version" ] || die "PYTHON=$PYTHON does not run as a Python."
        supported "$python" || die "kd_d2 needs Python 3.11 or 3.12, and PYTHON=$PYTHON is Python $version."
        return
    fi
    python=
    for candidate in python3.11 python3.12 python3 python; do
        candidate=$(command -v "$candidate") && version=$(version_of "$candidate") || continue
        seen="$seen $version"
        supported "$candidate" || continue
        python=${python:-$candidate}
        if has_detectron2 "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || die "kd_d2 needs Python 3.11 or 3.12, and only these are here:${seen:- none};" \
        "install one, or name it with PYTHON=path."
}

make_venv() {
    choose_python
    local reason
    case $want in
    source | pypi) mode=$want ;;
    *)
        mode=pypi
        if has_detectron2 "$python"; then
            reason=$(why_unusable "$python")
            if [ -z "$reason" ]; then
                mode=installed
            elif [ -z "$want" ]; then
                echo "Detectron2 of $python is not used: $reason."
            fi
        fi
        [ "$want" != installed ] || [ "$mode" = installed ] ||
            die "DETECTRON2=installed cannot be used with $python: ${reason:-it has no Detectron2 and torch}."
        ;;
    esac
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python cannot make virtual environments; install its venv module (Debian: apt-get install python3-venv)."

    step "making .venv with $python (Python $(version_of "$python")), Detectron2: $mode"
    rm -rf "$VENV"
    mkdir "$VENV"
    printf '%s\n%s\n' "$mode" "$python" >"$STATE"
    local inherit=
    [ "$mode" != installed ] || in_venv "$python" || inherit=--system-site-packages
    "$python" -m venv $inherit "$VENV" || die "$python could not make .venv."
    if [ "$mode" = installed ] && [ -z "$inherit" ]; then
        # A virtual environment does not inherit from another: its packages come by a .pth file.
        "$python" - "$("$VPY" -c "$SITE_PACKAGES")" <<'PY'
import sys, pathlib
folders = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
line = "import site; " + "; ".join(f"site.addsitedir({p!r})" for p in folders)
pathlib.Path(sys.argv[1], "kd_d2_base.pth").write_text(line + "\n")
PY
    fi
}

constraints() { # pip's -c arguments for this mode
    case $mode in
    pypi) echo "-c requirements/pins.txt -c requirements/torch.txt" ;;
    source) echo "-c requirements/pins.txt -c requirements/torch-source.txt" ;;
    installed)
        # What works stays as it is; the pins are for what is missing, and for the linter.
        "$VPY" - requirements/pins.txt >.venv/constraints.txt <<'PY'
import re, sys
from importlib.metadata import distributions
plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
here = {}
for d in distributions():
    here.setdefault(plain(d.name), d.version)
for name in ("torch", "torchvision", "numpy"):
    if name in here:
        print(f"{name}=={here[name]}")
for line in open(sys.argv[1]):
    name = plain(line.split("==")[0])
    if name not in here or name in ("pip", "setuptools", "ruff"):
        print(line.strip())
PY
        echo "-c .venv/constraints.txt"
        ;;
    esac
}

case $want in "" | installed | source | pypi) ;;
*) die "DETECTRON2=$want is not one of installed, source, pypi." ;; esac

fingerprint=$({
    sed '/^# From here on/,$d' pyproject.toml
    cat requirements/*.txt tools/setup_env.sh
    echo "$VENV"
} | cksum)

mode= base= done=
[ ! -f "$STATE" ] || { read -r mode && read -r base && read -r done; } <"$STATE" || true
if [ -n "${PYTHON:-}" ] && [ -n "$base" ]; then
    choose_python
    [ "$python" = "$base" ] || mode=
fi
if [ -z "$mode" ] || [ "${want:-$mode}" != "$mode" ] || ! "$VPY" -c '' 2>/dev/null; then
    [ ! -e "$VENV" ] || [ -f "$STATE" ] || die ".venv is here but not of this set-up's making; move it away first."
    make_venv
elif [ "$done" = "$fingerprint" ]; then
    exit 0
fi
printf '%s\n' "$mode" "${python:-$base}" >"$STATE"

# Unquoted on purpose: two words for each file.
pins=$(constraints)
step "1/4 pip and setuptools"
pip_install "pip and setuptools" -q $pins pip setuptools
step "2/4 torch and the other packages (several minutes and 6 GB on a new machine)"
pip_install "the packages that pyproject.toml names" $pins -e '.[dev]'
pip_install "imagecorruptions-imaug" -q --no-deps --require-hashes -r requirements/imagecorruptions.txt

step "3/4 Detectron2: $mode"
case $mode in
source)
    command -v git >/dev/null || die "DETECTRON2=source needs git."
    # pip's cache would hand back a build against another torch.
    pip_install "Detectron2 from its source" --no-deps --no-cache-dir "$SOURCE"
    ;;
pypi)
    pip_install "Detectron2 from PyPI" -q --no-deps --only-binary=:all: --python-version 3.10 --upgrade \
        --target "$("$VPY" -c "$SITE_PACKAGES")" \
        --require-hashes -r requirements/detectron2.txt
    ;;
installed)
    pip_install "ruff" -q $pins --no-deps --ignore-installed ruff
    ;;
esac

step "4/4 trying the imports"
"$VPY" -W ignore - "$mode" <<'PY' || die "the packages are installed but do not work together; the error stands above."
import platform, sys
import cv2, kornia, numpy, pycocotools.mask, torch, torchvision
import detectron2.model_zoo, detectron2.modeling
from importlib.metadata import PackageNotFoundError, version
torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
try:
    detectron2_version = version("detectron2")
except PackageNotFoundError:
    detectron2_version = detectron2.__version__
print(
    f"kd_d2 is ready: Python {platform.python_version()}, torch {torch.__version__}, "
    f"torchvision {torchvision.__version__}, kornia {kornia.__version__}, numpy {numpy.__version__}, "
    f"opencv {cv2.__version__}, detectron2 {detectron2_version} ({sys.argv[1]})"
)
PY
printf '%s\n' "$fingerprint" >>"$STATE"
