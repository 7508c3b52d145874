#!/usr/bin/env bash
# On a machine with a CUDA device and no network: build the extension for that device, run every test that needs a GPU, run csrc
# under compute-sanitizer, measure every operation, and write FOLDER/<device>.json and FOLDER/RESULTS.md (bench/results by default).
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
stage build 120 env FLOWTURBO_CUDA_ARCHS="$arch" FLOWTURBO_BUILD_CUDA=1 python setup.py -q build_ext --inplace
stage info 30 python -c 'from flowturbo.info import report; print(report())'
# Most of the tests' time is Triton compiling, on one core a kernel.
workers=$(python -c 'import os, xdist; print("-n", min(12, os.cpu_count()))' 2>/dev/null || true)
# shellcheck disable=SC2086 (two words or none)
stage tests 200 python -m pytest -q $workers -m gpu tests/test_gpu.py tests/test_triton.py
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -n "$sanitizer" ]; then
    stage sanitizer 60 "$sanitizer" --error-exitcode 1 --log-file "$folder/sanitizer.log" \
        python -m pytest -q -m gpu tests/test_gpu.py -k "cuda_backend and float32"
else
    failed+=("sanitizer (compute-sanitizer is not installed)")
fi
stage bench 170 python -m pytest -q bench/test_kernels.py --benchmark-json="$folder/$device.json" --benchmark-columns=median
stage table 10 python bench/table.py "$folder/$device.json" "$folder/RESULTS.md"

echo "total $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all stages passed"
