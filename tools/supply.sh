#!/usr/bin/env bash
# Locks, licenses and SBOM of the environment:
#
#   tools/supply.sh lock       requirements/lock*.txt: every version in requirements/ with the hashes of its files
#   tools/supply.sh licenses   docs/licenses.md: the licenses of the packages in .venv
#   tools/supply.sh sbom       output/sbom.json: the packages in .venv as CycloneDX
#
# The tools have their own environment, output/supply.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=output/supply
[ -x $tools/bin/cyclonedx-py ] || {
    .venv/bin/python -m venv $tools
    $tools/bin/python -m pip install -q -r requirements/supply.txt
}

hashes() { # result, arguments of uv pip compile
    $tools/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-annotate --custom-compile-command "make lock" \
        --output-file "$@"
}

lock() { # the torch stack's file, the result; CUDA's packages are for Linux
    grep -hv '^#' requirements/pins.txt "$1" | sed -E '/^(cuda|nvidia|triton)/ s/$/ ; sys_platform == "linux"/' |
        hashes "$2" --universal --python-version 3.11 --no-deps -
}

case ${1:-} in
lock)
    lock requirements/torch.txt requirements/lock.txt
    lock requirements/torch-source.txt requirements/lock-source.txt
    echo pip | hashes requirements/lock-image.txt --python-version 3.12 --python-platform linux -c requirements/pins.txt \
        -c requirements/torch-source.txt --extra eval --extra robustness --extra completion --extra export --extra convert --extra timm --extra vitdet \
        pyproject.toml -
    ;;
licenses)
    {
        echo "# Licenses of the packages"
        echo
        echo "The packages of \`make setup\` with their versions and licenses, as their authors state them, on Linux. \`make licenses\` writes this page anew."
        echo
        mapfile -t names < <(sed -nE 's/^([A-Za-z0-9_.-]+)==.*/\1/p' requirements/lock.txt)
        $tools/bin/pip-licenses --python .venv/bin/python --format markdown --order name --packages "${names[@]}"
    } >docs/licenses.md
    ;;
sbom)
    mkdir -p output
    $tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o output/sbom.json .venv/bin/python
    ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
