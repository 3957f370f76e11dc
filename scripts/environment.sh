#!/bin/sh
# Makes a virtual environment that holds this project (editable) with the given extras, or leaves it as it is when it already does.
#
# usage: environment.sh FOLDER EXTRA...
#   EXTRA is one of pyproject.toml's, `runtime` for none of them, or `cuda`: the CUDA packages for this machine's driver, if any.
# environment:
#   PYTHON          interpreter, a name or a path; default: the folder's own, else the first that runs of python3.13 ... python3
#   PYTHON_VERSION  accept only this version, such as 3.11; default: 3.11 or newer
#   CUDA            for the extra cuda: 13, 12, none, or auto (default)
set -eu
cd "$(dirname "$0")/.."
folder=$1
shift

fail() {
    echo "$*" >&2
    exit 1
}

# Prints the version of a usable interpreter. A name on PATH may be a version manager's stub that fails, and Debian's python3 may
# lack venv: only running it tells.
probe() {
    "$1" -c 'import ensurepip, sys, venv; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

accepts() {
    case $1 in
        '') return 1 ;;
        "${PYTHON_VERSION:-$1}" | "${PYTHON_VERSION:-$1}".*) ;;
        *) return 1 ;;
    esac
    case $1 in
        2.* | 3.[0-9].* | 3.10.*) return 1 ;;
    esac
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    elif version=$(probe "$folder/bin/python") && accepts "$version"; then
        python=$folder/bin/python
        return
    else
        set -- python3.13 python3.12 python3.11 python3
    fi
    found=
    for python; do
        version=$(probe "$python") || version=
        if accepts "$version"; then
            return
        fi
        if seen=$("$python" -V 2>&1); then
            found="${found:+$found, }$python is $seen"
        fi
    done
    needed="Python ${PYTHON_VERSION:-3.11 or newer} with its venv module"
    hint="PYTHON=/path/to/python chooses one, on Debian and Ubuntu apt-get install python3-venv adds the module"
    fail "$needed is needed, but ${found:-none of $* runs}; $hint"
}

# CUDA 13 needs driver 580 and a GPU of compute capability 7.5, CUDA 12 needs driver 525.
cuda_version() {
    case ${CUDA:-auto} in
        12 | 13 | none) echo "$CUDA" && return ;;
        auto) ;;
        *) fail "CUDA must be auto, 13, 12 or none, got $CUDA" ;;
    esac
    # nvidia-smi explains its failures on standard output, hence the test for a number.
    nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null | awk -F '[ ,.]+' '
        NR == 1 && $1 ~ /^[0-9]+$/ {
            capability = $(NF - 1) + $NF / 10
            print ($1 >= 580 && capability >= 7.5) ? 13 : ($1 >= 525) ? 12 : "none"
        }'
}

find_python
if [ "$(cat "$folder/.python" 2>/dev/null || true)" != "$version" ]; then
    echo "environment: making $folder with Python $version"
    "$python" -m venv --clear "$folder"
    echo "$version" >"$folder/.python"
fi

# Exact versions for the supported interpreters; another one gets the newest that pyproject.toml admits.
minor=${version%.*}
constraints=constraints/py${minor%.*}${minor#*.}.txt
if [ ! -f "$constraints" ]; then
    echo "environment: no constraints file for Python $minor, so versions are not pinned"
    constraints=/dev/null
fi

for extra; do
    pins=$constraints
    case $extra in
        runtime) what=. ;;
        cuda)
            choice=$(cuda_version)
            if [ "${choice:-none}" = none ]; then
                echo "environment: no CUDA packages (CUDA=${CUDA:-auto})"
                continue
            fi
            what=.[cuda$choice]
            echo "environment: CUDA $choice packages (CUDA=${CUDA:-auto})"
            ;;
        oracle) what=.[oracle] pins=constraints/oracle.txt ;;
        *) what=.[$extra] ;;
    esac
    stamp=$folder/.installed-$extra
    key="$what $(cat pyproject.toml "$constraints" "$pins" | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null || true)" = "$key" ]; then
        continue
    fi
    echo "environment: installing $what into $folder"
    # Without the compiled libraries, which scripts/build_ops.sh keeps up to date in the source tree.
    "$folder/bin/python" -m pip install --quiet --constraint "$constraints" --constraint "$pins" \
        --config-settings wheel.cmake=false --editable "$what"
    echo "$key" >"$stamp"
done
