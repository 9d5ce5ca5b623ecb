#!/usr/bin/env bash
# Build the wheel with the CUDA backend for this machine's CPU, install it in a fresh venv, and try it with a tiny model.
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

"$venv/bin/pip" install --quiet "$wheel" gguf
"$venv/bin/python" scripts/try_wheel.py
