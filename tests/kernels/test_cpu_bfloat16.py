"""bfloat16 on the CPU: as exact as the references, nothing wide as large as the batch, and the same
bits anywhere in it. Both on CPUs that multiply bfloat16 and on others; this one acts as both.
"""

import math
from dataclasses import replace

import pytest
import torch
from close import assert_close, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flowturbo as ft
from flowturbo.models.random_weights import filled
from flowturbo.models.sit import SIT_CONFIGS
from flowturbo.runtime.cpu_dtype import VELOCITY_ERROR
from flowturbo_kernels import (
    OPS,
    adaln_modulate,
    attention,
    batch_invariant,
    gated_residual_adaln,
    linear,
    patch_embed,
    use_backend,
)
from flowturbo_kernels.batch_invariant import gelu_tanh_bfloat16, matmul

EPS = torch.finfo(torch.bfloat16).eps
CONFIG = replace(SIT_CONFIGS["SiT-S/2"], depth=2, side=16)


@pytest.fixture(params=[True, False], ids=["multiplies", "widens"])
def multiplies(request, monkeypatch):
    monkeypatch.setattr(batch_invariant, "multiplies_bfloat16", lambda: request.param)
    return request.param


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def network():
    """With gates about one: closed, they would hide the blocks."""
    net = filled(CONFIG, torch.device("cpu"), 0)
    for block in net.blocks:
        block.adaLN_modulation[1].bias += 1
    return net


def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    c = CONFIG
    x = torch.randn(count, c.channels, c.side, c.side)
    return x, torch.rand(count), torch.randint(0, c.num_classes + 1, (count,))


def cast(args: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in args]


class Made(TorchDispatchMode):
    """Records the names of operations, and the sizes of the float32 tensors that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.wide: list[tuple[int, str]] = []
        self.products: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.dtype == torch.float32:
                self.wide.append((t.numel(), name))
        if name == "addmm":
            self.products.append(args[1].dtype)
        return out


@pytest.mark.parametrize("shape", [(1, 256, 64), (4, 64, 384), (2, 100, 1152), (5, 7, 72)])
@pytest.mark.parametrize("shared", [False, True], ids=["a row each", "the null class shared"])
def test_adaln_and_residual_keep_the_bits_of_the_reference(shape, shared):
    rows = shape[0] // 2 + 1 if shared and shape[0] % 2 == 0 else shape[0]
    x, y, modulation = random(*shape), random(*shape), random(rows, 3 * shape[2])
    gate, shift, scale = modulation.chunk(3, dim=-1)
    for operation, args in (
        (adaln_modulate, (x, shift, scale)),
        (gated_residual_adaln, (x, y, gate, shift, scale)),
    ):
        with torch.no_grad():
            got, expected = operation(*args), operation.reference(*args)
            strided = operation(x.transpose(0, 1).contiguous().transpose(0, 1), *args[1:])
        for a, b, c in zip(
            *(r if isinstance(r, tuple) else (r,) for r in (got, expected, strided)), strict=True
        ):
            assert a.dtype == torch.bfloat16
            assert a.equal(b)
            assert c.equal(b)


def test_gelu_rounds_every_number_as_float64_does():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    wide = x.double()
    inner = 0.044715 * wide**3 + wide
    truth = wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * inner)
    for given in (x.clone(), x.float()):
        got = gelu_tanh_bfloat16(given).double()
        assert got.isfinite().all()
        error = (got - truth).abs()
        assert (error <= 0.5005 * EPS * truth.abs() + 1e-30).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gelu_of_any_number_of_elements(threads, monkeypatch):
    monkeypatch.setattr(batch_invariant, "_PIECE", 1000)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (0, 1, 63, 64, 1000, 1024, 1025, 40_000, 100_001):
            x = random(count, 1)
            truth = torch.nn.functional.gelu(x.double(), approximate="tanh")
            for given in (x.clone(), x.float()):
                got = gelu_tanh_bfloat16(given)
                assert got.shape == x.shape
                if count:
                    assert_close(got, truth, 0.75 * EPS)
    finally:
        torch.set_num_threads(before)


def test_products_err_by_a_rounding_and_run_in_what_the_cpu_multiplies(multiplies):
    x, weight, bias = random(2, 16, 384), random(96, 384) / 16, random(96)
    truth = matmul(x.double(), weight.double(), bias.double())
    with Made() as made:
        got = matmul(x, weight, bias)
    assert got.dtype == torch.bfloat16
    assert_close(got, truth, 0.75 * EPS)
    assert made.products == [torch.bfloat16 if multiplies else torch.float32]
    gelu = torch.nn.functional.gelu(truth, approximate="tanh")
    assert_close(linear(x, weight, bias, "gelu_tanh"), gelu, EPS)


def test_attention_and_patches_err_by_roundings(multiplies):
    qkv = random(2, 80, 3, 4, 72)
    assert_close(attention(qkv), attention(qkv.double()), 0.75 * EPS)
    patches = random(2, 4, 16, 16), random(384, 4, 2, 2), random(384), None, random(64, 384)
    truth = patch_embed(*(t if t is None else t.double() for t in patches))
    assert_close(patch_embed(*patches), truth, EPS)


def test_nothing_wide_is_as_large_as_the_batch():
    """On a CPU that multiplies bfloat16, float32 tensors are of an image, or a piece for GELU."""
    count, tokens = 9, (CONFIG.side // CONFIG.patch) ** 2
    x, *c = inputs(count)
    net = network().bfloat16()
    piece = 65536 * torch.get_num_threads()
    assert piece < count * tokens * CONFIG.hidden * 4
    with torch.no_grad():
        modulations = net.modulations(net.t_embedder(c[0]) + net.y_embedder(c[1]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batch_invariant, "multiplies_bfloat16", lambda: True)
            with Made() as made:
                net.evaluate(x.bfloat16(), modulations)
    assert made.products
    assert set(made.products) == {torch.bfloat16}
    softmax = count * tokens * CONFIG.heads  # attention's sums
    largest = max(tokens * CONFIG.hidden, piece, softmax)
    assert [(n, name) for n, name in made.wide if n > largest] == []
    with Made() as made, torch.no_grad(), use_backend("reference"):
        net.evaluate(x.bfloat16(), modulations)
    assert any(n > tokens * CONFIG.hidden for n, _ in made.wide)


def test_the_velocity_errs_as_it_does_by_the_references(multiplies):
    """At most 1.5 times; 1.02 were measured."""
    net, args = network(), inputs(3)
    truth = network().double()(*cast(args, torch.float64))
    narrow = net.bfloat16()
    with torch.inference_mode():
        got = relative_error(narrow(*cast(args, torch.bfloat16)), truth)
        with use_backend("reference"):
            reference = relative_error(narrow(*cast(args, torch.bfloat16)), truth)
    assert 0 < got <= 1.5 * reference
    assert got < 0.015


def test_the_error_of_the_bundled_model_is_what_is_said():
    count = 64
    models = [ft.load("digits", device="cpu", dtype=d) for d in (torch.float64, torch.float32)]
    shape = models[0].latent_shape
    x, t, y = torch.randn(count, *shape), torch.rand(count), torch.arange(count) % 10
    with torch.inference_mode():
        truth = models[0].predictor(x.double(), t.double(), y)
        got = models[1].predictor.bfloat16()(x.bfloat16(), t, y)
    said = float(VELOCITY_ERROR.removesuffix(" %"))
    assert 100 * relative_error(got, truth) == pytest.approx(said, rel=0.2)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_has_the_same_bits_anywhere_in_its_batch(multiplies, threads):
    """Images so large that they go one by one; tests/sampling/test_sampler.py has small ones."""
    assert (CONFIG.side // CONFIG.patch) ** 2 * CONFIG.hidden >= 16384
    net, args, before = network().bfloat16(), inputs(4), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            first, *others = (
                net(*cast(tuple(t.roll(place, 0) for t in args), torch.bfloat16))[place]
                for place in range(4)
            )
    finally:
        torch.set_num_threads(before)
    assert all(other.equal(first) for other in others)


def test_why_names_what_runs():
    args = random(2, 64, 384), random(2, 384), random(2, 384)
    assert adaln_modulate.why(*args)[0] == "cpu"
    assert adaln_modulate.why(*(t.float() for t in args))[0] == "reference"
    assert adaln_modulate.why(args[0], args[1].float(), args[2])[0] == "reference"
    assert adaln_modulate.why(args[0].clone().requires_grad_(), *args[1:])[0] == "reference"
    with use_backend("reference"):
        assert adaln_modulate.why(*args)[0] == "reference"
    assert {n for n, o in OPS.items() if o.on_cpu} == {
        "adaln_modulate", "attention", "gated_residual_adaln", "linear",
    }  # fmt: skip


def test_gradients_are_those_of_the_reference():
    def gradient(name: str) -> Tensor:
        x = torch.ones(2, 64, 384, dtype=torch.bfloat16).cumsum(-1).sin().requires_grad_()
        with use_backend(name):
            linear(x, torch.eye(384).bfloat16(), torch.zeros(384).bfloat16(), "gelu_tanh").backward(
                torch.ones(2, 64, 384, dtype=torch.bfloat16)
            )
        assert x.grad is not None
        return x.grad

    assert gradient("auto").equal(gradient("reference"))
