#!/usr/bin/env bash
# Makes a node ready, or finds it ready: setup.sh CODE [VENV]. On a node with a GPU it also builds the kernels. The
# packages are installed again when their list has changed, the code always: a restart of Ray then runs what was sent.
set -euo pipefail
code=${1:?"say where the project lies"}
venv=${2:-$HOME/mlmamba-venv}
cd "$code"
kind=cpu
[[ -n $(compgen -G '/dev/nvidia[0-9]*') ]] && kind=gpu
stamp=$venv/.$kind-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)

if [[ ! -e $stamp ]]; then
    [[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
    export PATH=$venv/bin:$PATH
    # torch goes first: DeepSpeed's set-up imports it.
    pip install --disable-pip-version-check -c constraints.txt torch setuptools wheel
    DS_BUILD_OPS=0 pip install --disable-pip-version-check -c constraints.txt --no-build-isolation '.[quickstart]'
    if [[ $kind == gpu ]]; then
        wheels=$(mktemp -d)
        cluster/kernels.sh "$wheels"
        pip install --disable-pip-version-check -c constraints.txt --no-build-isolation "$wheels"/*.whl
        rm -r "$wheels"
    fi
fi
rm -rf build  # what an earlier install left there would be installed again, deleted modules included
"$venv/bin/pip" install --disable-pip-version-check --no-deps --no-build-isolation --force-reinstall .
touch "$stamp"
