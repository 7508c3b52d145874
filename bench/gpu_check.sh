#!/usr/bin/env bash
# On a machine with a CUDA device and no network: build the extension for that device, import it, run every test that needs a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

python - <<'PY'
import torch
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
PY
arch=$(python -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + ("a" if a >= 9 else ""))')
FLOWTURBO_CUDA_ARCHS="$arch" FLOWTURBO_BUILD_CUDA=1 python setup.py -q build_ext --inplace
python -c 'from flowturbo_kernels import _C; b = _C.build_info(); assert b.devices > 0, b.problem; print("sm_" + b.architectures, b.devices, "devices")'
python -m pytest -q -m gpu tests/test_gpu.py
