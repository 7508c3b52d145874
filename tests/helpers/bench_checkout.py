"""A checkout for bench/gpu_check.sh, whose benchmarks take no time."""

from __future__ import annotations

CHECKOUT = {
    # What stands in for the checkout's own: the benchmarks, the library as far as the script calls
    # it, the tests that need a GPU.
    "torch/__init__.py": "class cuda:\n    is_available = staticmethod(lambda: True)\n",
    "bench/machine.py": """
import json, os
name = os.environ["DEVICE"]
facts = {"device": name, "code": "commit 1234", "torch": "2.11"}
print(name, name.lower().replace(" ", "-"), "90a", json.dumps(facts), sep="\\n")
""",
    "bench/test_plans.py": """
import os, signal, time, pytest
RIVALS = "ours ours-fp8 ours-eager eager autocast compile max-autotune plan-graph".split()
RIVALS += "plan-graph-hoisted max-autotune-fp8 plan-graph-fp8".split()
ROUNDS = 3

def about(rival, size, batch, decode, plan):
    return {"group": f"{plan} {size}x{size} batch {batch}", "who": rival}

def test_plan(benchmark, rounds, rival, size, batch, decode, plan):
    if rival == "ours-fp8":
        pytest.skip("fp8 is not here")
    if rival == "autocast":
        raise RuntimeError("out of memory\\nof 80 GB")
    if rival == os.environ.get("DEAF"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    benchmark.group = about(rival, size, batch, decode, plan)["group"]
    benchmark.extra_info |= dict(
        rival=rival, plan=plan, size=size, batch=batch, decode=False, first_seconds=1.0,
        peak_bytes=1 << 30, decode_seconds=0.0,
        caches={k: os.environ[k] for k in os.environ if k.endswith(("CACHE_DIR", "BENCH_CACHES"))},
        floor=1e-9, ceilings={"copy": 3e12}, device=os.environ["DEVICE"], dtype="bfloat16",
        torch="2.11",
    )
    def run():
        if rival == os.environ.get("SLOW"):
            open(os.environ["REACHED"], "w").close()
            time.sleep(600)

    benchmark.pedantic(run, rounds=rounds, iterations=1)
""",
    "bench/test_kernels.py": """
import os, time
PROVIDERS = ("eager", "compiled", "triton", "cuda", "auto")
ROUNDS = 3

def about(batch, who):
    return {"group": f"attention batch {batch}", "who": who}

def test_kernel(benchmark, rounds, batch, who):
    benchmark.group = about(batch, who)["group"]
    benchmark.extra_info |= dict(
        op="attention", batch=batch, provider=who, backend="torch", calls=8, floor=1e-9,
        ceilings={"copy": 3.1e12},
        device=os.environ["DEVICE"], dtype="torch.bfloat16", torch="2.11",
    )
    benchmark.pedantic(time.sleep, args=(0.001,), rounds=rounds, iterations=1)
""",
    "bench/growth.py": """
import os, sys
from lines import append
for at in (1, 8):
    point = {"at": at, "plan": "H1", "batch": at, "tokens": 256, "ms_an_image": 5 / at,
    "limit_ms_an_image": 1.0}
    append("growth", curve="batch", device=os.environ["DEVICE"], point=point)
open(sys.argv[1] + "/growth.png", "wb").close()
""",
    "flowturbo/cli/info.py": "def report():\n    return 'what it runs on'\n",
    "flowturbo/evaluation/latency.py": """
from dataclasses import dataclass
@dataclass
class Bench:
    model: str
    plans: tuple
    batch_sizes: tuple
    repeats: int
    profile: object

def bench(settings):
    settings.profile.mkdir(parents=True, exist_ok=True)
    for name in ("trace.json", "md"):
        path = settings.profile / f"{settings.plans[0]}-batch{settings.batch_sizes[0]}.{name}"
        path.write_text("a trace", encoding="utf-8")
""",
    "setup.py": "raise SystemExit('there is no nvcc')",
    "tests/kernels/test_gpu.py": """
import pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_wrong(): assert 1 == 2
def test_cuda_backend_float32(): pytest.skip("no CuPy")
""",
    "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["gpu: needs a CUDA device"]\n',
}
