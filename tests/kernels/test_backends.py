"""Which backend an operation takes, what it says when it can't, and how it looks to torch.compile
and torch.export.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from close import assert_close
from ops import CASES, NAMES, case, mapped, tensors
from tiny import CONFIG, HEAD_DIM_72, random_sit
from torch import Tensor, nn

import flowturbo as ft
from flowturbo_kernels import (
    OPS,
    BackendError,
    adaln_modulate,
    linear,
    patch_embed,
    use_backend,
    velocity_update,
)
from flowturbo_kernels._op import Backend, requested_backend

X, SHIFT, SCALE = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU"
)


def test_on_the_cpu_references_run_and_say_why():
    name, refused = adaln_modulate.why(X, SHIFT, SCALE)
    assert name == "reference"
    assert refused["triton"] == "tensors are on the cpu"
    assert adaln_modulate(X, SHIFT, SCALE).equal(adaln_modulate.reference(X, SHIFT, SCALE))


@interpreted
def test_a_backend_asked_for_by_name_runs(monkeypatch):
    calls = []
    for name in ("triton", "other"):
        backend = Backend(lambda *args, name=name: calls.append((name, len(args))), lambda *_: None)
        monkeypatch.setitem(adaln_modulate.backends, name, backend)
    with use_backend("triton"):
        assert adaln_modulate.why(X, SHIFT, SCALE)[0] == "triton"
        adaln_modulate(X, SHIFT, scale=SCALE)
    assert calls == [("triton", 4)]  # with the default eps
    with use_backend("reference"):
        assert adaln_modulate(X, SHIFT, SCALE) is not None
    assert len(calls) == 1


def test_the_environment_names_a_backend(monkeypatch):
    monkeypatch.setenv("FLOWTURBO_BACKEND", "reference")
    assert requested_backend() == "reference"
    with use_backend("triton"):
        assert requested_backend() == "triton"
    monkeypatch.setenv("FLOWTURBO_BACKEND", "tritom")
    with pytest.raises(
        ValueError,
        match="FLOWTURBO_BACKEND must be one of auto, reference, triton, cuda, got 'tritom'",
    ):
        requested_backend()
    monkeypatch.delenv("FLOWTURBO_BACKEND")
    assert requested_backend() == "auto"


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(
            ValueError, match="backend must be one of auto, reference, triton, cuda, got 'fast'"
        ),
        use_backend("fast"),
    ):
        pass


@interpreted
@pytest.mark.parametrize(
    "args, said",
    [
        ((X.double(), SHIFT, SCALE), "torch.float64 is none of"),
        ((X[:0], SHIFT[:0], SCALE[:0]), "a tensor is empty"),
        ((X[..., :1], SHIFT[:, :1], SCALE[:, :1]), "the hidden size must be from 2"),
    ],
)
def test_a_named_backend_never_falls_back(args, said):
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match=f"adaln_modulate: triton was asked for, but: .*{said}"),
    ):
        adaln_modulate(*args)
    adaln_modulate(*args)


def test_a_named_backend_without_its_machine_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        use_backend("triton"),
        pytest.raises(
            BackendError, match="tensors are on the cpu, and TRITON_INTERPRET=1 is not set"
        ),
    ):
        adaln_modulate(X, SHIFT, SCALE)


@interpreted
def test_where_gradients_are_needed_the_reference_runs():
    x = X.clone().requires_grad_()
    with use_backend("triton"):
        name, refused = adaln_modulate.why(x, SHIFT, SCALE)
        assert name == "reference"
        assert "forward only" in refused["triton"]
        adaln_modulate(x, SHIFT, SCALE).sum().backward()
        with torch.no_grad():
            assert adaln_modulate.why(x, SHIFT, SCALE)[0] == "triton"
    assert x.grad is not None


@interpreted
def test_under_autocast_the_reference_runs():
    """A kernel would take float32 as it comes, where autocast means 16 bits."""
    weight, bias = torch.randn(4, 8), torch.randn(4)
    with use_backend("triton"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear.why(X, weight, bias) == (
            "reference",
            {"triton": "under autocast torch chooses the dtypes"},
        )
        assert linear(X, weight, bias).dtype == torch.bfloat16


# Whole models


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("config", [CONFIG, HEAD_DIM_72], ids=["24", "72"])
def test_a_model_on_triton_is_the_reference_model(config):
    """In float32, through every operation of a guided plan with refiner steps."""
    config = replace(config, side=4)  # the interpreter takes its time
    networks = random_sit(config, 0), random_sit(config.refiner(), 1)
    plain, triton = (
        ft.load(*networks, device="cpu", dtype=torch.float32, backend=b)
        for b in ("reference", "triton")
    )
    a, b = (ft.sample(m, "H1P1R1", [1, 8], guidance=1.5, seed=0) for m in (plain, triton))
    assert not a.equal(b)
    assert_close(b, a, 1e-5)


def test_a_model_asks_for_its_backend_at_the_door(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend in ("triton", "cuda"):
        with pytest.raises(
            BackendError, match=f"backend '{backend}' was asked for, but: tensors are on the cpu"
        ):
            ft.load(random_sit(CONFIG, 0), device="cpu", backend=backend)
    with pytest.raises(
        ValueError, match="backend must be one of auto, reference, triton, cuda, got 'fast'"
    ):
        ft.load(random_sit(CONFIG, 0), backend="fast")


# torch.library


def lowered(name: str, args: tuple) -> tuple:
    op = OPS[name]
    full = op._positional(args, {})
    return op.lower(*full) if op.lower else full


@pytest.mark.parametrize("name, index", CASES)
def test_opcheck(name, index):
    """torch's own checks: the schema tells the truth, fake results have the real ones' metadata,
    and tracing works.
    """
    args = lowered(name, case(name, index, torch.float32))
    torch.library.opcheck(OPS[name].library, args)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_operation_is_one_node_of_the_graph(name):
    """With fullgraph, so that a graph break is an error; guards and shapes are torch's business."""
    args = case(name, 1, torch.float32)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: OPS[name](*a), backend=keep, fullgraph=True)
    with torch.no_grad():
        for got, plain in zip(tensors(compiled(*args)), tensors(OPS[name](*args)), strict=True):
            assert got.equal(plain)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum(f"flowturbo.{name}" in target for target in targets) == 1


def test_a_compiled_training_step_differentiates():
    weight = torch.randn(4, 8, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w, b: linear(x, w, b, "gelu_tanh").sum(), backend="aot_eager", fullgraph=True
    )
    (got,) = torch.autograd.grad(compiled(X, weight, torch.zeros(4)), weight)
    (plain,) = torch.autograd.grad(linear(X, weight, torch.zeros(4), "gelu_tanh").sum(), weight)
    assert_close(got, plain, 1e-6)


class Twice(nn.Module):
    def forward(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (
            velocity_update(x, [x, x], [0.5, 0.25]) + patch_embed(x, w, b).square().mean()
        )  # no sum of differing signs, of which rounding may leave any share


def test_export_keeps_the_operators():
    args = torch.randn(2, 4, 8, 8), torch.randn(16, 4, 2, 2), torch.randn(16)
    with torch.no_grad():
        program = torch.export.export(Twice(), args)
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("flowturbo.velocity_update" in t for t in targets)
    assert any("flowturbo.patch_embed" in t for t in targets)
    assert_close(program.module()(*args), Twice()(*args), 1e-6)


def test_mapped_arguments_reach_the_schema():
    """guide takes a number or one an image; its operator takes a tensor."""
    args = lowered("guide", (torch.randn(4, 1, 2, 2), 2.0, 1))
    assert args[1].shape == (2, 1, 1, 1)
    assert mapped(args, lambda t: t.shape)[0] == (4, 1, 2, 2)
