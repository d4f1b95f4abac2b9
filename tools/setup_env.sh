#!/usr/bin/env bash
# make setup: a .venv with everything that kd_d2 needs; returns at once if nothing has changed since the last time.
# PYTHON and DETECTRON2 are described in the Makefile; a .venv keeps those that it was made with.
set -euo pipefail
cd "$(dirname "$0")/.."

SOURCE=git+https://github.com/facebookresearch/detectron2@02b5c4e295e990042a714712c21dc79b731e8833
VENV_PYTHON=$PWD/.venv/bin/python
STATE=.venv/kd_d2-setup # three lines: the mode of DETECTRON2, the base Python, and once done a checksum
unset VIRTUAL_ENV
export PIP_USER=0
PATH=${PATH//"$PWD/.venv/bin:"/}

die() {
    echo "setup failed: $*" >&2
    exit 1
}

venv_python() { # without the packages of PYTHONPATH, which pip would count as installed
    env -u PYTHONPATH "$VENV_PYTHON" "$@"
}

install() { # arguments of pip install
    venv_python -m pip install --disable-pip-version-check --no-build-isolation "$@" ||
        die "pip install $*: see its messages above, and whether a package registry can be reached."
}

is_supported() { # a Python
    "$1" -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] <= (3, 14) or v[:3] == (3, 14, 1))' 2>/dev/null
}

has_detectron2() { # a Python: one that kd_d2 can use
    "$1" -W ignore - <<'PY' 2>/dev/null
import detectron2, numpy, torch
version = lambda module: tuple(map(int, module.__version__.split("+")[0].split(".")[:2]))
raise SystemExit(not (version(torch) >= (2, 10) and version(numpy) >= (1, 26)))
PY
}

# What there is, and what is wanted.
mode='' base='' stamp=''
if [ -e .venv ]; then
    [ -f "$STATE" ] || die ".venv exists, but was not made by this set-up; move it away first."
    { read -r mode && read -r base && read -r stamp; } <"$STATE" || true
fi
if [ -n "${PYTHON:-}" ]; then
    python=$(command -v "$PYTHON") || die "PYTHON=$PYTHON is not a program."
else
    python=$base
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        [ -n "$python" ] || ! is_supported "$candidate" || python=$(command -v "$candidate")
    done
fi
is_supported "$python" || die "kd_d2 needs Python 3.11 to 3.14, but not 3.14.1; install one, or name it with PYTHON=path."
want=${DETECTRON2:-$mode}
[ -n "$want" ] || { has_detectron2 "$python" && want=installed || want=pypi; }
checksum=$({ cat pyproject.toml setup.py requirements/*.txt tools/setup_env.sh && echo "$VENV_PYTHON"; } | cksum)

# The virtual environment.
if [ "$want $python" != "$mode $base" ] || ! venv_python -c '' 2>/dev/null; then
    case $want in
    source) command -v git >/dev/null || die "DETECTRON2=source needs git." ;;
    installed) has_detectron2 "$python" || die "$python has no Detectron2 with torch >= 2.10 and numpy >= 1.26." ;;
    pypi) ;;
    *) die "DETECTRON2=$want is not one of installed, source, pypi." ;;
    esac
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python cannot make virtual environments; install its venv module (Debian: apt-get install python3-venv)."
    echo "== setup: .venv of $python, Detectron2: $want"
    "$python" -m venv --clear .venv
elif [ "$stamp" = "$checksum" ]; then
    exit 0
fi
printf '%s\n' "$want" "$python" >"$STATE"
site=$(venv_python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# The packages, in the versions of requirements/.
lock='' constraints=()
case $want in
pypi) lock=requirements/lock.txt ;; # with the hash of every file
source) lock=requirements/lock-source.txt ;;
installed) # the packages of the base Python, whose versions stay; only what it lacks is pinned, except for OpenCV, whose version depends
    # on that of NumPy
    "$python" - >"$site/kd_d2_base.pth" <<'PY'
import os, sys
of_user = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
folders = [path for path in sys.path if path in of_user or path.endswith(("site-packages", "dist-packages"))]
print("import site; " + "; ".join(f"site.addsitedir({path!r})" for path in folders))
PY
    venv_python -m pip list --format=freeze | awk -F== '
        { name = tolower($1); gsub(/[-_.]+/, "-", name) }
        NR == FNR && name ~ /^(torch|torchvision|numpy)$/
        NR == FNR && name !~ /^(pip|setuptools|ruff)$/ { here[name] }
        NR != FNR && !(name in here) && name != "opencv-python-headless"' - requirements/pins.txt >.venv/constraints.txt
    constraints=(-c .venv/constraints.txt)
    ;;
esac
echo "== setup: torch and the other packages (several minutes and 6 GB on a new machine)"
if [ -n "$lock" ]; then
    awk '/^[a-zA-Z]/ { wanted = /^(pip|setuptools)==/ } wanted' $lock >.venv/builders.txt
    install -q --require-hashes --no-deps -r .venv/builders.txt
    install --require-hashes --no-deps -r $lock
    install -q --no-deps -e .
else
    install -q "${constraints[@]}" pip setuptools
    install "${constraints[@]}" -e '.[dev]'
fi
install -q --no-deps --require-hashes -r requirements/imagecorruptions.txt
case $want in
pypi) # its wheel is marked for Python 3.10, but only its compiled operators are, which are not used
    install -q --no-deps --only-binary=:all: --python-version 3.10 --upgrade --target "$site" \
        --require-hashes -r requirements/detectron2.txt
    ;;
source) install --no-deps --no-cache-dir "$SOURCE" ;; # the cache may hold a build for another torch
installed) install -q "${constraints[@]}" --no-deps --ignore-installed ruff ;;
esac

venv_python -W ignore cluster/check_install.py || die "the packages are installed, but do not work together: see the error above."
echo "$checksum" >>"$STATE"
