#!/bin/sh
# Builds a compiled library of custom_ops into the source tree, or leaves it as it is when nothing that it is made from has changed.
#
# usage: build_ops.sh FOLDER LIBRARY
#   FOLDER is the virtual environment whose pip builds it; LIBRARY is `host`, `cuda`, or `gpu`: cuda on a machine with an NVIDIA
#   GPU and a compiler for it, else nothing.
# environment:
#   KOGPT_HOST, KOGPT_CUDA, KOGPT_CUDA_ARCHITECTURES, KOGPT_CUTLASS_INCLUDE_DIR, KOGPT_WERROR   as custom_ops/csrc/CMakeLists.txt has them; by default `host`
#                   is left out without a C++ compiler, and `cuda` is built with the system's nvcc, or PyPI's if there is none
#   CUDA            for `gpu`: none leaves it out
set -eu
cd "$(dirname "$0")/.."
folder=$1
library=$2

works() {
    "$@" >/dev/null 2>&1
}

has_nvcc() {
    works "${CUDACXX:-nvcc}" --version || works /usr/local/cuda/bin/nvcc --version
}

if [ "$library" = gpu ]; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n '1s/^\([0-9]*\)\..*/\1/p')
    if [ "${CUDA:-auto}" = none ] || [ -z "$driver" ]; then
        exit 0
    elif ! works "${CXX:-c++}" --version; then
        echo "build_ops: no C++ compiler, so no CUDA library: decoding runs on XLA's own kernels"
        exit 0
    elif [ "$driver" -lt 580 ] && ! has_nvcc; then
        echo "build_ops: PyPI's nvcc is for driver 580 or newer, so no CUDA library: decoding runs on XLA's own kernels"
        exit 0
    fi
    library=cuda
fi
case $library in
    host)
        host=${KOGPT_HOST:-AUTO} cuda=OFF
        ;;
    cuda)
        host=OFF cuda=${KOGPT_CUDA:-PYPI}
        if [ -z "${KOGPT_CUDA:-}" ] && has_nvcc; then
            cuda=ON
        fi
        ;;
    *)
        echo "build_ops: LIBRARY must be host, cuda or gpu, got $library" >&2
        exit 1
        ;;
esac

stamp=build/ops-$library
key="$host $cuda ${KOGPT_CUDA_ARCHITECTURES:-} ${KOGPT_CUTLASS_INCLUDE_DIR:-} ${KOGPT_WERROR:-} $({
    cat pyproject.toml kogpt_jax/_version.py custom_ops/csrc/*
    "${CXX:-c++}" --version 2>&1 || true
} | cksum)"
target=custom_ops/libkogpt_ops_$library.so
outcome() {
    if [ -f "$target" ]; then echo "$key built"; else echo "$key none"; fi
}
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$(outcome)" ]; then
    exit 0
fi
echo "build_ops: building the $library library of custom_ops (KOGPT_HOST=$host KOGPT_CUDA=$cuda)"
wheel=build/wheel-$library
rm -rf "$wheel"
KOGPT_HOST=$host KOGPT_CUDA=$cuda "$folder/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$wheel" .
rm -f "$target"
"$folder/bin/python" - "$wheel" "$target" <<'EOF'
import pathlib, sys, zipfile

folder, target = sys.argv[1:]
(wheel,) = pathlib.Path(folder).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    if target in archive.namelist():
        archive.extract(target)
    else:
        print(f"build_ops: no compiler, so no {target}: the reference implementations work without")
EOF
rm -rf "$wheel"
outcome >"$stamp"
