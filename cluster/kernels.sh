#!/usr/bin/env bash
# Builds wheels of mamba_ssm and causal_conv1d, or of the packages that are named, for the torch of the Python that
# `python` is: kernels.sh DIRECTORY [PACKAGE ...]
# It needs a C++ compiler and no GPU. CUDA's compiler comes as packages and is of the CUDA that torch was built for.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
constraints=${CONSTRAINTS:-$here/../constraints.txt}
wheels=${1:?"say where the wheels go"}
shift
packages=("$@")
[[ ${#packages[@]} -gt 0 ]] || packages=('causal-conv1d>=1.5' 'mamba-ssm>=2.3.2')

cuda=$(python -c 'import torch; print(torch.version.cuda)')
if [[ $cuda == None ]]; then
    echo "kernels.sh: this torch was built without CUDA; install one that has it" >&2
    exit 1
fi
python -m pip install -c "$constraints" "nvidia-cuda-nvcc==$cuda.*" "nvidia-cuda-crt==$cuda.*" "nvidia-nvvm==$cuda.*" \
    setuptools wheel ninja packaging

# The packages are laid out for running programs; for building them, the library has a name without its number and lies
# in lib64. So they get a folder of links, which leaves them as they are.
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
major=${cuda%%.*}
python -c 'import nvidia; print(*nvidia.__path__, sep="\n")' | while read -r part; do
    [[ ! -d $part/cu$major ]] || cp --recursive --symbolic-link --no-clobber "$part/cu$major/." "$home/"
done
ln -s lib "$home/lib64"
[[ -e $home/lib/libcudart.so ]] || ln -s "libcudart.so.$major" "$home/lib/libcudart.so"

# mamba_ssm's kernels for Mamba-2 are Triton's, which are compiled where they run; what it would build here is
# Mamba-1's, which mlmamba/ops/cuda.py does without. FORCE_BUILD: else each set-up first looks for a wheel to download.
CUDA_HOME=$home CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE MAX_JOBS=${MAX_JOBS:-4} \
    python -m pip wheel -c "$constraints" --no-deps --no-build-isolation --wheel-dir "$wheels" "${packages[@]}"
