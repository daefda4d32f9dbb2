#!/usr/bin/env bash
# The steps that make the image, and CI runs the same ones in a plain folder:
#
#   install.sh tools TOOLS          uv and hatchling, by their hashes, into the virtual environment TOOLS
#   install.sh dependencies VENV    what the worker needs, by the lock's versions and hashes
#   install.sh application VENV     loramux itself, from this source tree
#   install.sh check VENV           it starts, and what is installed agrees with itself
#   install.sh all VENV             all of these; the tools go again
#
# TORCH_BACKEND=cpu leaves the CUDA libraries out and takes PyTorch's CPU build of the locked version from
# PyTorch's own index (uv knows where it is). That one wheel is held by version, not by hash.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source_tree=$(cd "$here/../.." && pwd)
PYTHON=${PYTHON:-python3}
TORCH_BACKEND=${TORCH_BACKEND:-locked}
tools=${TOOLS:-}

install_tools() {
    "$PYTHON" -m venv "$1"
    "$1/bin/python" -m pip install --quiet --no-deps --require-hashes --requirement "$here/tools.txt"
}

# The lock without PyTorch and what only its CUDA build needs.
without_cuda() {
    awk '/^[a-z]/ { keep = !/^(torch|nvidia-|cuda-)/ } keep' "$here/requirements.txt"
}

install_dependencies() {
    "$tools/bin/uv" venv --quiet --allow-existing --python "$PYTHON" "$1"
    local install=("$tools/bin/uv" pip install --quiet --python "$1/bin/python" --no-deps)
    case $TORCH_BACKEND in
        locked) "${install[@]}" --require-hashes --requirement "$here/requirements.txt" ;;
        cpu)
            without_cuda | "${install[@]}" --require-hashes --requirement -
            "${install[@]}" --torch-backend cpu "$(grep -o '^torch==[^ ;]*' "$here/requirements.txt")"
            ;;
        *) echo "install.sh: TORCH_BACKEND is locked or cpu, not '$TORCH_BACKEND'" >&2; return 2 ;;
    esac
}

install_application() {
    local wheels
    wheels=$(mktemp -d)
    (cd "$source_tree" && "$tools/bin/python" -m hatchling build --target wheel --directory "$wheels" >/dev/null)
    "$tools/bin/uv" pip install --quiet --python "$1/bin/python" --no-deps --no-index "$wheels"/*.whl
    rm -rf "$wheels"
}

check() {
    if [[ $TORCH_BACKEND == locked ]]; then "$tools/bin/uv" pip check --quiet --python "$1/bin/python"; fi
    (cd / && "$1/bin/loramux" worker --help) | grep -q -- --bootstrap-servers
    (cd / && "$1/bin/python" -c 'import loramux_worker.engine.build, loramux_worker.assembly')
}

if (($# != 2)); then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
case $1 in
    tools) install_tools "$2" ;;
    dependencies | application | check)
        : "${tools:?say in TOOLS where \`install.sh tools\` put them}"
        case $1 in
            dependencies) install_dependencies "$2" ;;
            application) install_application "$2" ;;
            check) check "$2" ;;
        esac
        ;;
    all)
        tools=$(mktemp -d)
        trap 'rm -rf "$tools"' EXIT
        install_tools "$tools"
        install_dependencies "$2"
        install_application "$2"
        check "$2"
        ;;
    *) echo "install.sh: there is no step '$1'" >&2; exit 2 ;;
esac
