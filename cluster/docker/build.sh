#!/usr/bin/env bash
# Builds an image with the versions of cluster/versions/versions.env: build.sh cpu | gpu | mlflow [docker build options]
set -euo pipefail
cd "$(dirname "$0")/../.."
kind=${1:?"say which image: cpu, gpu or mlflow"}
shift
arguments=()
while IFS='=' read -r name value; do
    [[ $name == [A-Z]* ]] || continue
    printf -v "$name" '%s' "$value"
    arguments+=(--build-arg "$name=$value")
done < cluster/versions/versions.env
case $kind in
cpu | gpu) tag="mlmamba-ray-$kind:$RAY_VERSION" ;;
mlflow) tag="mlmamba-mlflow:$MLFLOW_VERSION" ;;
*) echo "there is no image $kind: choose cpu, gpu or mlflow" >&2 && exit 2 ;;
esac
exec "${DOCKER:-docker}" build --file "cluster/docker/Dockerfile.$kind" --tag "$tag" "${arguments[@]}" "$@" .
