#!/usr/bin/env bash
# Make the package of this checkout that of a CUDA version, before its wheels are built: set_cuda.sh 12|13
#
# Version 0.1.0 becomes 0.1.0+cu13. pip takes it for the same package, and for a newer one than 0.1.0. cuBLAS and the
# CUDA runtime from NVIDIA's wheels become dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
12) suffix=-cu12 ;;
13) suffix= ;;
*)
  echo "usage: set_cuda.sh 12|13" >&2
  exit 2
  ;;
esac
grep -q '^version = "[0-9.]*"$' pyproject.toml || {
  echo "pyproject.toml has no version such as 0.1.0: has it got a CUDA version already?" >&2
  exit 1
}
packages="\"nvidia-cublas$suffix==$1.*\", \"nvidia-cuda-runtime$suffix==$1.*\""
sed -i -e "s/^version = \"[0-9.]*/&+cu$1/" -e "s/^dependencies = \[/&$packages, /" pyproject.toml
