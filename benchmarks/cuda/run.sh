#!/usr/bin/env bash
# Build Overspill for the GPU of this machine, and compare placements of gpt-oss on it: see README.md here.
#
#   benchmarks/cuda/run.sh [--arch ARCHITECTURE] [OPTION ...]
#
# --help lists the options. ARCHITECTURE is a CMAKE_CUDA_ARCHITECTURES value, by default that of the GPUs here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

fail() {
  echo "error: $1" >&2
  exit 1
}

arch=
if [ "${1:-}" = --arch ]; then
  arch=${2:-}
  [ -n "$arch" ] || fail "--arch needs a CMAKE_CUDA_ARCHITECTURES value, such as 86-real"
  shift 2
fi
# Before a build of many minutes.
python3 "$root/benchmarks/cuda/comparison_options.py" "$@"
case " $* " in *" -h "* | *" --help "*) exit ;; esac

if [ -z "$arch" ]; then
  capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u) || true
  [[ $capabilities =~ ^[0-9]+\.[0-9]+ ]] ||
    fail "nvidia-smi finds no GPU here: install NVIDIA's driver, or try all of it without one: see README.md"
  arch=$(tr -d . <<<"$capabilities" | sed 's/$/-real/' | paste -sd ';')
fi
nvcc=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\..*/\1/p') || true
[ -n "$nvcc" ] || fail "nvcc is not in the PATH: install the toolkit of CUDA 13, or add its bin folder to the PATH"
[ "$nvcc" = 13 ] || fail "nvcc is that of CUDA $nvcc: install the toolkit of CUDA 13, for which NVIDIA's wheels are taken"
driver=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\)\..*/\1/p' | head -n 1) || true
[ "${driver:-13}" -ge 13 ] || fail "the driver is for CUDA $driver and nvcc for CUDA $nvcc: install a newer driver"

"$root/scripts/build_cuda.sh" "$arch"
venv=$root/build/cuda/venv
"$venv/bin/pip" install --quiet gguf pytest # what the models and llama.cpp's fit are made with
export PATH=$venv/bin:$PATH PYTHONPATH=$root/tests/support:$root/benchmarks
exec python "$root/benchmarks/cuda/compare_placements.py" "$@"
