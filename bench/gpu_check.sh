#!/usr/bin/env bash
# On a machine with a CUDA device and no network: build the extension for that device, run every test that needs a GPU, run csrc
# under compute-sanitizer, measure every operation and some plans against rivals, profile one, and write FOLDER/<device>-*.json,
# FOLDER/profile and FOLDER/RESULTS.md (bench/results by default).
# Every stage runs, whatever the ones before it did; the exit status says whether all were right.
#   bash bench/gpu_check.sh [FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-bench/results}
mkdir -p "$folder"
failed=()

stage() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" || failed+=("$name")
    echo "== $name: $((SECONDS - start)) s"
}

python - <<'PY' || exit 1
import torch
assert torch.cuda.is_available(), "no CUDA device"
import triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
PY
arch=$(python -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + ("a" if a >= 9 else ""))')
device=$(python -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower())')

export PYTHONPATH=$PWD
stage build 60 env FLOWTURBO_CUDA_ARCHS="$arch" FLOWTURBO_BUILD_CUDA=1 python setup.py -q build_ext --inplace
stage info 30 python -c 'from flowturbo.info import report; print(report())'
# Most of the tests' time is Triton compiling, on one core a kernel.
workers=$(python -c 'import os, xdist; print("-n", min(12, os.cpu_count()))' 2>/dev/null || true)
# shellcheck disable=SC2086 (two words or none)
stage tests 110 python -m pytest -q $workers -m gpu tests/test_gpu.py tests/test_triton.py
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -n "$sanitizer" ]; then
    stage sanitizer 40 "$sanitizer" --error-exitcode 1 --log-file "$folder/sanitizer.log" \
        python -m pytest -q -m gpu tests/test_gpu.py -k "cuda_backend and float32"
else
    failed+=("sanitizer (compute-sanitizer is not installed)")
fi
stage kernels 110 python -m pytest -q bench/test_kernels.py --batches 8 --benchmark-json="$folder/$device-kernels.json" \
    --benchmark-columns=median
# Every rival compiles, so that one size is all there is time for; the rest of the suite takes hours: python -m pytest bench.
stage plans 130 python -m pytest -q bench/test_plans.py --sizes 256 --batches 8 --decode yes --plans "H1P5R3 H2P4R2 H8" \
    --rivals "ours ours-fp8 ours-eager eager autocast compile" --benchmark-json="$folder/$device-plans.json" --benchmark-columns=median
stage profile 40 python -c 'import sys; from pathlib import Path; from flowturbo.latency import Bench, bench
print(bench(Bench("SiT-XL/2", plans=("H1P5R3",), batch_sizes=(1, 8, 32), repeats=5, profile=Path(sys.argv[1]))))' "$folder/profile"
stage table 10 python bench/table.py "$folder/$device-plans.json" "$folder/$device-kernels.json" --out "$folder/RESULTS.md"

echo "total $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all stages passed"
