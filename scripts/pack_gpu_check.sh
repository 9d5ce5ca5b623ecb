#!/usr/bin/env bash
# Pack all that gpu_check.sh needs on a machine with an NVIDIA GPU and without network, compiler and this Python.
#
#   scripts/pack_gpu_check.sh [--wheel FILE] [ARCHITECTURE] [FOLDER]
#
# ARCHITECTURE is a CMAKE_CUDA_ARCHITECTURES value, by default 90-real (H100), FOLDER is build/gpu-check. Without
# --wheel it is built, for CPUs with AVX-512 and for the python3 that runs this; CMake and Ninja have to be there.
# FOLDER then holds gpu_check.sh and the parts that it unpacks, 60 MiB at most.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $1" >&2
  exit 1
}

wheel=
if [ "${1:-}" = --wheel ]; then
  wheel=${2:-}
  [ -f "$wheel" ] || fail "--wheel needs the file of a wheel"
  shift 2
fi
arch=${1:-90-real}
out=${2:-build/gpu-check}
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
most_bytes=$((60 << 20))

if [ -z "$wheel" ]; then
  # What every CPU with AVX-512 since 2019 has; this machine's own may have more, or less.
  scripts/build_cuda.sh "$arch" GGML_NATIVE=OFF GGML_{SSE42,AVX,AVX2,FMA,F16C,BMI2,AVX512,AVX512_VNNI}=ON
  wheel=$(echo build/cuda/dist/overspill-*.whl)
fi
wheel=$(realpath "$wheel")
version=$(python3 -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
case $wheel in
*-cp"${version/./}"-*) ;;
*) fail "$(basename "$wheel") is not for Python $version, which is to be packed" ;;
esac

rm -rf "$out"
mkdir -p "$out"
out=$(realpath "$out")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
SECONDS=0

# --- The interpreter, its library without what no program of ours imports, and the libraries of its modules.
mkdir -p "$work/python/bin" "$work/python/lib/python$version"
program=$(python3 -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
library=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
cp "$program" "$work/python/bin/python$version"
tar -C "$library" -c --exclude=site-packages --exclude=dist-packages --exclude=__pycache__ --exclude='config-*' \
  --exclude=./test --exclude=./unittest/test --exclude=./{idlelib,tkinter,turtledemo,lib2to3,ensurepip,pydoc_data,distutils} \
  --exclude=./{curses,dbm,sqlite3} --exclude='_tkinter*' --exclude='_curses*' --exclude='readline*' --exclude='_dbm*' \
  --exclude='_gdbm*' --exclude='_sqlite3*' --exclude='nis.*' --exclude='_test*' --exclude='_ctypes_test*' \
  . | tar -C "$work/python/lib/python$version" -x
ldd "$program" "$work/python/lib/python$version"/lib-dynload/*.so |
  sed -n 's/.* => \(\/.*\) (.*/\1/p' | sort -u | grep -v -E '/lib(c|m|dl|rt|pthread|util)\.so\.' |
  xargs -r cp -L -t "$work/python/lib"

# --- The packages of the tests. gguf asks for more than what writes a file.
site=$work/python/lib/python$version/site-packages
pip() { python3 -m pip "$@" --quiet --no-compile --target "$site"; }
pip install "$wheel" pytest hypothesis tqdm pyyaml
pip install --no-deps gguf
rm -rf "${site:?}"/bin "$site"/numpy/{f2py,doc,distutils,_pyinstaller,_core/include,_core/lib,random/lib}
find "$site" -depth -type d -name tests -exec rm -rf {} +
find "$site" "$work/python/lib" -depth -name __pycache__ -exec rm -rf {} +

# --- The tests, with what they have compiled: linked to the wheel's libraries, which find CUDA's only where they are.
python3 vendor/fetch.py
build=build/upstream-tools/gpu-check # as deep as where the tests build them, so that ccache finds them
build_tools() {
  rm -rf "$build"
  cmake -S tests/upstream -B "$build" -G Ninja -D OVERSPILL_LLAMA_CPP_DIR="$PWD/vendor/llama.cpp" \
    -D OVERSPILL_LIBRARIES="$site/overspill/lib" -D CMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined
  cmake --build "$build" --target upstream-fit llama-bench stand_in_gpu upstream_minimal_loop upstream_sampling
}
(set -e; build_tools) >"$work/build.log" 2>&1 || {
  tail -n 30 "$work/build.log"
  fail "the tools of the tests do not build"
}
mkdir -p "$work/tools" "$work/vendor/llama.cpp/models"
cp "$build"/*.so "$build"/{llama-bench,upstream-fit} "$work/tools"
cp vendor/llama.cpp/models/ggml-vocab-gpt-2.gguf "$work/vendor/llama.cpp/models"
git ls-files -z --cached --others --exclude-standard conftest.py pyproject.toml tests benchmarks scripts/gpu_check.sh | xargs -0 cp --parents -t "$work"

# --- Parts that can be replaced on their own: the first one changes with each build.
pack() {
  tar -C "$work" --sort=name --owner=0 --group=0 -c "${@:2}" | xz -8 -T2 >"$out/$1.tar.xz"
}
mkdir "$work/own"
mv "$site"/overspill "$site"/overspill-*.dist-info "$work/own"
pack python python
mkdir -p "$work/new/${site#"$work/"}"
mv "$work"/own/* "$work/new/${site#"$work/"}"
pack overspill -C new python
pack tests tools vendor conftest.py pyproject.toml tests benchmarks scripts
cp scripts/gpu_check.sh "$out"
bytes=$(du -cb "$out"/* | tail -n 1 | cut -f 1)
du -h "$out"/*
echo "packed in $SECONDS s: $((bytes >> 10)) KiB in $out"
((bytes <= most_bytes)) || fail "that is more than $((most_bytes >> 20)) MiB"
