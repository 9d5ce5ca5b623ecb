#!/usr/bin/env bash
# Check Overspill on the GPU of this machine, with what pack_gpu_check.sh has packed: no network, compiler or Python is
# needed. It takes eight minutes at most.
#
#   gpu_check.sh [--stand-in]
#
# Lies beside the packed parts, which it unpacks there, or in what was unpacked. Results go to $OUT, by default
# ./gpu-check-results. Ends with 1 if a test failed, and with 2 if the tests did not come to their end. --stand-in tries
# all of it without a GPU, as is done where there is no nvidia-smi; CUDA's libraries are needed all the same. In less
# than $SECONDS_IN_ALL, by default 480, later steps are cut off, and that is said.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-$PWD/gpu-check-results}
total_s=${SECONDS_IN_ALL:-480}
status=0
mkdir -p "$out"
out=$(cd "$out" && pwd)
exec > >(tee "$out/check.log") 2>&1

stand_in=
case "${1:-}" in
--stand-in) stand_in=1 ;;
"") command -v nvidia-smi >/dev/null || stand_in=1 ;;
*)
  echo "usage: gpu_check.sh [--stand-in]" >&2
  exit 2
  ;;
esac

# Runs a command for so many seconds at most, and no longer than what is left of all; its output goes to the log NAME.
cut_off=()
step() {
  local name=$1 limit_s=$2 left_s=$((total_s - SECONDS - 10)) code
  shift 2
  ((limit_s < left_s)) || limit_s=$left_s
  printf '\n=== %s (after %d s, at most %d)\n' "$name" "$SECONDS" "$limit_s"
  if ((limit_s < 5)); then
    echo "not begun: the time is over"
    cut_off+=("$name, not begun")
    return 124
  fi
  timeout --kill-after=5 "$limit_s" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  if [ "$code" = 124 ] || [ "$code" = 137 ]; then
    echo "cut off after $limit_s s"
    cut_off+=("$name, after $limit_s s")
  fi
  return "$code"
}

unpack() {
  local part
  for part in "$here"/*.tar.xz; do
    if command -v xz >/dev/null; then
      tar -xJf "$part" -C "$here"
    else
      python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$part" "$here"
    fi || exit 2
  done
}

root=$here
if [ -d "$here/../python/bin" ]; then
  root=$(cd "$here/.." && pwd)
elif [ ! -d "$here/python/bin" ]; then
  echo "unpacking"
  unpack
fi
python=$(echo "$root"/python/bin/python3.*)
package=$(echo "$root"/python/lib/python3.*/site-packages/overspill)

# CUDA's libraries: those of the surroundings, of this system's Python packages, or of the toolkit.
cuda_libraries() {
  local folder
  if ldconfig -p 2>/dev/null | grep -q 'libcublas\.so\.13'; then
    return
  fi
  while read -r folder; do
    if [ -e "$folder/libcudart.so.13" ] && [ -e "$folder/libcublas.so.13" ]; then
      echo "$folder"
      return
    fi
  done < <(
    tr : '\n' <<<"${LD_LIBRARY_PATH:-}"
    python3 -c 'import site, sys; print(*(f"{path}/nvidia/cu13/lib" for path in sys.path + site.getsitepackages() + [site.getusersitepackages()]), sep="\n")' 2>/dev/null
    printf '%s\n' /usr/local/cuda-13*/lib64 /usr/local/cuda/lib64
  )
  echo "libcudart.so.13 and libcublas.so.13 are nowhere to be found: add their folder to LD_LIBRARY_PATH" >&2
  return 1
}
cuda=$(cuda_libraries) || exit 2

# shellcheck disable=SC2016 # the inner shell expands them
step machine 20 bash -c '
  date -u
  nvidia-smi --query-gpu=name,memory.total,memory.used,driver_version,pcie.link.gen.current,pcie.link.width.current --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
  grep -m 1 "model name" /proc/cpuinfo
  echo "$(nproc) CPUs, $(grep -o -w -E "avx2|avx512f|avx512_vnni|avx512_bf16|amx_tile" /proc/cpuinfo | sort -u | paste -sd " ")"
  grep -E "MemTotal|MemAvailable" /proc/meminfo
  lscpu | grep -E "^(Thread|Core|Socket|L2|L3|NUMA node\(s\))"
  echo "huge pages: $(cat /sys/kernel/mm/transparent_hugepage/enabled)"
'
echo "CUDA's libraries: ${cuda:-those that the system knows}"

cd "$root" || exit 2
export LD_LIBRARY_PATH=$root/python/lib:$root/tools:$package/lib${cuda:+:$cuda} OVERSPILL_TEST_TOOLS=$root/tools
export XDG_CACHE_HOME=$out/cache

# What libraries say when they are loaded, and which devices there are.
step devices 60 "$python" -m overspill devices || status=2
if [ -z "$stand_in" ] && ! grep -q '^CUDA' "$out/devices.log"; then
  echo "this GPU cannot be used: see above; the tests would run on a stand-in"
  exit 2
fi

step tests 180 "$python" -m pytest -m gpu tests/gpu --durations=10 --junitxml="$out/tests.xml" -p no:cacheprovider
code=$?
if [ "$code" = 1 ]; then
  status=1
elif [ "$code" != 0 ]; then
  status=2
fi

device=CUDA0
[ -z "$stand_in" ] || device=GPU0
exchanges=("$python" -c '
import sys
from overspill import _core
meter = _core.DeviceMeter(sys.argv[1], n_threads=1, working_set_bytes=1 << 30, gpus=[], budget_s=0.2)
for n in (1, 2, 3, 4):
    seconds = meter.exchange_s("mxfp4", 2880, 2880, n)
    print(f"activations to {n} of gpt-oss'\''s experts and their results back: {seconds * 1e6:.1f} us")
' "$device")
if [ -n "$stand_in" ]; then
  PYTHONPATH=$root/tests/support:$root/tests/support/stand_in_everywhere OVERSPILL_TEST_STAND_IN=2GiB \
    step exchanges 30 "${exchanges[@]}"
else
  step exchanges 30 "${exchanges[@]}"
fi

paths=$root/tests/support:$root/benchmarks:$root/benchmarks/cuda
routes=()
[ ! -e "$here/routes.npz" ] || routes=(--routes "$here/routes.npz")
experts=("$python" benchmarks/cuda/compare_experts.py --json "$out/experts.json" "${routes[@]}")
compare=("$python" benchmarks/cuda/compare_placements.py --rounds 1 --json "$out/placements.json")
# As much as the model takes in RAM, and room for what else there is.
needed_kb=70000000
available_kb=$(sed -n 's/^MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo)
if [ -n "$stand_in" ]; then
  PYTHONPATH=$paths:$root/tests/support/stand_in_everywhere OVERSPILL_TEST_STAND_IN=1300MiB step experts 120 \
    "${experts[@]}" --shape gpt-oss-2-layers --device GPU0 --vram 1250MB --threads 1 --tokens 60
  PYTHONPATH=$paths:$root/tests/support/stand_in_everywhere OVERSPILL_TEST_STAND_IN=2GiB step placements 300 \
    "${compare[@]}" --shape gpt-oss-2-layers --device GPU0 --vram 1400MB --threads 1
elif ((available_kb < needed_kb)); then
  echo "placements of gpt-oss-120b: skipped, they take 66.6 GB of RAM, and $((available_kb / 1000000)) GB are free"
else
  PYTHONPATH=$paths step experts 300 "${experts[@]}"
  PYTHONPATH=$paths step placements 420 "${compare[@]}" --shape gpt-oss-120b
fi
if [ -e "$out/placements.json" ]; then
  step predictions 20 "$python" benchmarks/cuda/predictions.py "$out/placements.json"
fi

rm -rf "$out/cache"
printf '\n=== %d s, results in %s\n' "$SECONDS" "$out"
for one in "${cut_off[@]}"; do
  echo "cut off: $one"
done
case $status in
0) echo "no test failed" ;;
1) echo "a test failed" ;;
*) echo "the tests did not come to their end" ;;
esac
exit "$status"
