#!/bin/sh
# Writes constraints/pyXY.txt: the newest versions that pyproject.toml admits today, as a clean environment of the interpreter
# PYTHON (default python3) resolves them. With Python 3.11 also constraints/oracle.txt, what the extra oracle adds to those.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
target=constraints/py${minor%.*}${minor#*.}.txt
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip"

# Local version suffixes (torch's +cpu) name a build, not a version, and are not to be had everywhere.
freeze() {
    $pip freeze --exclude kogpt-jax | sed 's/+.*//'
}

# Which libraries are compiled changes no version.
export KOGPT_HOST=OFF KOGPT_CUDA=OFF
$pip install --quiet ".[dev]"
{
    echo "# Python $minor: everything that runtime, tests, linter and type checker need. Made by make lock PYTHON=python$minor."
    freeze
} >"$folder/pins"
mkdir -p constraints
cp "$folder/pins" "$target"
echo "wrote $target"

if [ "$minor" = 3.11 ]; then
    $pip install --quiet --constraint "$target" ".[oracle]"
    {
        echo "# Python 3.11, on top of py311.txt: what the extra oracle adds. Made by make lock PYTHON=python3.11."
        freeze | grep -vxFf "$target"
    } >"$folder/oracle"
    cp "$folder/oracle" constraints/oracle.txt
    echo "wrote constraints/oracle.txt"
fi
