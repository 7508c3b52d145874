"""What needs a CUDA device: every backend of every operation there, in graphs and on streams, and
whole models.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fake_cuda
import pytest
import torch
from close import assert_close, assert_equal, relative_error
from hopper import FP8_SUMS
from ops import CASES, DTYPES, NAMES, case, mapped, tensors
from replays import assert_replays
from tiny import CONFIG, HEAD_DIM_72, random_sit
from torch import Tensor

import flowturbo as ft
from flowturbo.models.vae import Pixels
from flowturbo.sampling.generate import generate
from flowturbo.sampling.run import Job
from flowturbo_kernels import (
    OPS,
    BackendError,
    linear,
    linear_fp8,
    quantize_rows,
    sizes,
    use_backend,
)
from flowturbo_kernels._matmul import FP8_TILES, product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def model(config, device: str, dtype: torch.dtype | None, backend: str = "auto") -> ft.FlowModel:
    return ft.load(
        random_sit(config, 0),
        random_sit(config.refiner(), 1),
        device=device,
        dtype=dtype,
        backend=backend,
    )


def check(name: str, args, dtype: torch.dtype, backend: str) -> None:
    """Against float64 on the same inputs: at most twice the error of the reference in this dtype,
    on poisoned memory.
    """
    op = OPS[name]
    truths = tensors(op.reference(*mapped(args, Tensor.double)))
    plain = tensors(op.reference(*args))
    torch.cuda.synchronize()
    poison = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(4)]
    del poison  # the allocator hands this memory out next
    try:
        with use_backend(backend):
            results = tensors(op(*args))
    except BackendError as error:
        if "was asked for, but" in str(error) and any(
            w in str(error) for w in ("several dtypes", "must be", "at most", "dtype")
        ):
            pytest.skip(str(error))
        raise
    for got, torchs, truth in zip(results, plain, truths, strict=True):
        floor = torch.finfo(dtype).eps * (1 if dtype == torch.float32 else 0.25)
        assert_close(got, truth, 2 * relative_error(torchs, truth) + floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, index", [(n, i) for n, i in CASES if "cuda" in OPS[n].backends])
def test_cuda_backend(name, index, dtype):
    args = mapped(case(name, index, dtype, seed=21), Tensor.cuda)
    reason = OPS[name].backends["cuda"].unsupported(*OPS[name]._positional(args, {}))
    if reason:
        pytest.skip(reason)
    check(name, args, dtype, "cuda")


def real(dtype: torch.dtype):
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    return itertools.chain(sizes.sit(make, 1), sizes.vae(make, 1))


REAL = sum(
    1
    for _ in itertools.chain(
        *(f(lambda *s: torch.empty(s, device="meta"), 1) for f in (sizes.sit, sizes.vae))
    )
)


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@pytest.mark.parametrize("index", range(REAL))
def test_real_sizes(index, backend):
    name, args = next(itertools.islice(real(torch.bfloat16), index, None))
    if backend != "auto" and backend not in OPS[name].backends:
        pytest.skip(f"{name} has no {backend} backend")
    check(name, args, torch.bfloat16, backend)


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_operation_replays_on_new_inputs(name, backend):
    args, new = (mapped(case(name, 1, torch.float16, seed=n), Tensor.cuda) for n in (22, 23))
    assert_replays(name, args, new, backend)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_run_on_the_current_stream(name):
    """Inputs are written late on a side stream: a launch on any other stream would read them too
    early.
    """
    args = mapped(case(name, 1, torch.float32, seed=24), Tensor.cuda)
    late = mapped(args, torch.zeros_like)
    expected = tensors(OPS[name](*args))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(tensors(late), tensors(args), strict=True):
            target.copy_(source)
        results = tensors(OPS[name](*late))
    torch.cuda.synchronize()
    for a, b in zip(results, expected, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("tile", FP8_TILES)
def test_fp8_products_are_exact_but_for_their_sums(tile):
    """On operands that are quantised already; fp8's tensor cores keep fewer bits of their sums than
    float32 has (hopper.py).
    """
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("products in e4m3 need sm_89 or later")
    (x, x_scale), (weight, weight_scale) = (
        quantize_rows(torch.randn(rows, 1152, device="cuda")) for rows in (512, 1152)
    )
    bias = torch.randn(1152, device="cuda")
    truth = (x.double() * x_scale.double()[:, None]) @ (
        weight.double() * weight_scale.double()[:, None]
    ).T + bias.double()
    assert_close(product(x, weight, bias, tile, scales=(x_scale, weight_scale)), truth, FP8_SUMS)


def test_torchs_fp8_product_is_exact_but_for_its_sums():
    """That of one scale a row with fast sums, which `auto` may choose; its result is rounded to
    bfloat16 once more.
    """
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("products in e4m3 need sm_89 or later")
    (x, x_scale), (weight, weight_scale) = (
        quantize_rows(torch.randn(rows, 1152, device="cuda")) for rows in (512, 1152)
    )
    bias = torch.randn(1152, device="cuda").bfloat16()
    truth = (x.double() * x_scale.double()[:, None]) @ (
        weight.double() * weight_scale.double()[:, None]
    ).T + bias.double()
    got = torch._scaled_mm(
        x, weight.t(), x_scale[:, None], weight_scale[None], bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=True
    )  # fmt: skip
    assert_close(got, truth, FP8_SUMS + relative_error(truth.bfloat16(), truth))


def test_fp8_layers_err_as_fp8_does():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("products in e4m3 need sm_89 or later")
    x, bias = (
        torch.randn(512, 1152, device="cuda").bfloat16(),
        torch.randn(4608, device="cuda").bfloat16(),
    )
    weight = torch.randn(4608, 1152, device="cuda") / 1152**0.5
    truth = linear(x.double(), weight.double(), bias.double(), "gelu_tanh")
    reference = linear_fp8.reference(x, *quantize_rows(weight), bias, "gelu_tanh")
    assert_close(
        linear_fp8(x, *quantize_rows(weight), bias, "gelu_tanh"),
        truth,
        1.2 * relative_error(reference, truth),
    )


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda", "reference"])
@pytest.mark.parametrize("config", [CONFIG, HEAD_DIM_72], ids=["24", "72"])
@pytest.mark.parametrize("plan", ["H1P2R2", "C3", "E1S1"])
def test_float32_images_are_the_cpus(config, plan, backend):
    labels = [1, 8, 3]
    truth = ft.sample(model(config, "cpu", torch.float64), plan, labels, guidance=1.5, seed=0)
    cpu = ft.sample(model(config, "cpu", torch.float32), plan, labels, guidance=1.5, seed=0)
    cuda = ft.sample(
        model(config, "cuda", torch.float32, backend), plan, labels, guidance=1.5, seed=0
    )
    assert cuda.is_cuda
    assert_close(cuda, truth, max(1e-5, 4 * relative_error(cpu, truth)))


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
def test_bfloat16_errs_as_torchs_own_model_does(backend):
    """At most 1.5 times the error of the references in bfloat16, against float64."""
    labels = [1, 8, 3]
    assert model(CONFIG, "cuda", None).dtype == torch.bfloat16
    truth = ft.sample(model(CONFIG, "cpu", torch.float64), "H1P2R2", labels, guidance=1.5, seed=0)
    plain, ours = (
        ft.sample(model(CONFIG, "cuda", torch.bfloat16, b), "H1P2R2", labels, guidance=1.5, seed=0)
        for b in ("reference", backend)
    )
    assert_close(ours, truth, 1.5 * relative_error(plain, truth))


def test_a_quantised_model_that_is_loaded_again_stays_quantised():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("products in e4m3 need sm_89 or later")
    m = ft.load(
        random_sit(CONFIG, 0), random_sit(CONFIG.refiner(), 1), device="cuda", quantize="fp8"
    )
    before = ft.sample(m, "H1P1R1", [1, 8], guidance=1.5, seed=0)
    kinds = {name: value.dtype for name, value in m.predictor.state_dict().items()}
    assert list(kinds.values()).count(torch.float8_e4m3fn) == 4 * CONFIG.depth
    again = ft.load(m.predictor, m.refiner, device="cuda")
    assert {name: value.dtype for name, value in again.predictor.state_dict().items()} == kinds
    assert_equal(ft.sample(again, "H1P1R1", [1, 8], guidance=1.5, seed=0), before)


# Whole plans as CUDA graphs


def sampled(
    m: ft.FlowModel, plan: str, seed: int, guidance: float = 1.5, **options: object
) -> Tensor:
    labels = [seed % 10, (seed + 3) % 10]
    return ft.sample(m, plan, labels, guidance=guidance, seed=seed, **options)


def without_graphs(
    m: ft.FlowModel, plan: str, seed: int, guidance: float = 1.5, **options: object
) -> Tensor:
    return sampled(m, plan, seed, guidance, callback=lambda info: None, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("plan", ["H1P2R2", "E1S1C2"])
def test_a_replayed_plan_is_the_eager_one(plan, dtype):
    m = model(CONFIG, "cuda", dtype)
    for seed, guidance in enumerate((1.5, 2.0, 0.5, 3.0)):
        assert_equal(sampled(m, plan, seed, guidance), without_graphs(m, plan, seed, guidance))
    [capture] = m.captures.report()
    assert capture.hits == 3
    assert capture.replay_seconds > 0


def test_replays_from_several_threads_are_those_of_one():
    m = model(CONFIG, "cuda", None)
    plans = ["H1P1R1", "H2", "E2"]
    ft.compile(m, plans, 2)
    truth = [without_graphs(m, plans[n % 3], n) for n in range(24)]

    def one(n: int) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            result = sampled(m, plans[n % 3], n)
            torch.cuda.current_stream().synchronize()
            return result

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(one, range(24)))
    for a, b in zip(results, truth, strict=True):
        assert_equal(a, b)


def test_weights_that_moved_are_seen():
    m = model(CONFIG, "cuda", None)
    ft.compile(m, "H1R1", 2)
    m.predictor.to("cpu").to("cuda")
    ballast = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
    assert_equal(sampled(m, "H1R1", 0), without_graphs(m, "H1R1", 0))
    m.predictor.final_layer.linear = torch.nn.Linear(
        CONFIG.hidden, 16, device="cuda", dtype=torch.bfloat16
    )
    assert_equal(sampled(m, "H1R1", 1), without_graphs(m, "H1R1", 1))
    assert len(ballast) == 8


def test_images_are_decoded_inside_the_graph():
    m = model(replace(CONFIG, channels=1), "cuda", None)
    m.vae = Pixels()
    ft.compile(m, "H1R1", 2, output="uint8")
    assert_equal(
        sampled(m, "H1R1", 0, output="uint8"), without_graphs(m, "H1R1", 0, output="uint8")
    )
    assert m.captures.report()[0].hits == 1


def test_a_capture_inside_the_callers_own_is_not_made():
    m = model(CONFIG, "cuda", None)
    noise, labels = torch.randn(2, *m.latent_shape), torch.tensor([1, 2])
    expected = ft.sample(m, "E2", labels, noise=noise, callback=lambda info: None)
    noise, labels = noise.cuda(), labels.cuda()
    graph = torch.cuda.CUDAGraph()
    job = Job.of(m, ft.Plan.parse("E2"), 1.0, None, "latents", torch.float32)
    with torch.no_grad(), torch.cuda.graph(graph):
        assert not job.can_be_captured(m)
        result = job.execute(m, noise, labels=labels)
    graph.replay()
    assert_equal(result, expected)


def test_a_set_that_was_stopped_is_the_undisturbed_one(tmp_path):
    """To the last bit, though a part of it is made by another model, as in a later process."""

    def make() -> dict[str, bytes]:
        model = ft.load("digits", device="cuda")
        generate(
            model,
            "H1P1R1",
            [i % 10 for i in range(40)],
            tmp_path,
            guidance=1.5,
            batch_size=4,
            shard_size=8,
        )
        assert model.captures.report()
        return {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")}

    whole = make()
    for k in (1, 2, 4):
        (tmp_path / f"images-0000{k}-of-00005.npz").unlink()
    again = make()
    assert again.keys() == whole.keys()
    assert fake_cuda.PRESENT or again == whole
