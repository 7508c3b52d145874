"""A quantised model stays what it is: moved, cast, copied, loaded, saved. Casts leave fp8 weights
and their scales alone.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import relative_error
from tiny import CONFIG, random_sit
from torch import Tensor

import flowturbo as ft
from flowturbo.models.checkpoint import load_sit, save_sit
from flowturbo.models.fp8 import Fp8Linear
from flowturbo.models.sit import SiT
from flowturbo_kernels._op import skip_checks

E4M3, EIGHT_BITS = torch.float8_e4m3fn, (torch.float8_e4m3fn, torch.float8_e5m2)


def quantised(seed: int = 0) -> SiT:
    return random_sit(CONFIG, seed).quantize_()


def velocity(sit: SiT) -> Tensor:
    """Of three images at three times, in float64; inputs are rounded to the weights' dtype."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 4, 8, 8, generator=generator).to(sit.pos_embed.dtype)
    with torch.no_grad():
        return sit(x, torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1, 2, 3])).double()


def quantised_state(sit: SiT) -> dict[str, Tensor]:
    """The numbers that a cast must leave alone: weights, of which bytes are compared, and
    scales.
    """
    layers = [
        (name, module) for name, module in sit.named_modules() if isinstance(module, Fp8Linear)
    ]
    assert len(layers) == 4 * CONFIG.depth
    return {
        f"{name}.{kind}": getattr(module, kind)
        for name, module in layers
        for kind in ("weight", "weight_scale", "input_scale", "product_scale")
        if getattr(module, kind) is not None
    }


def assert_kept(sit: SiT, before: dict[str, Tensor], dtype: torch.dtype) -> None:
    """All fp8 weights and scales are as before, bit for bit; everything else is of `dtype`."""
    after = quantised_state(sit)
    for name, value in before.items():
        assert (
            after[name].dtype == value.dtype == (E4M3 if name.endswith("weight") else torch.float32)
        ), name
        assert after[name].view(torch.uint8).equal(value.view(torch.uint8)), name
    others = {name: value.dtype for name, value in sit.state_dict().items() if name not in before}
    assert set(others.values()) == {dtype}, others


CASTS: dict[str, tuple[Callable[[SiT], Any], torch.dtype]] = {
    "to": (lambda sit: sit.to(torch.bfloat16), torch.bfloat16),
    "to a device and dtype": (lambda sit: sit.to("cpu", torch.float16), torch.float16),
    "half": (lambda sit: sit.half(), torch.float16),
    "bfloat16": (lambda sit: sit.bfloat16(), torch.bfloat16),
    "double": (lambda sit: sit.double(), torch.float64),
    "float": (lambda sit: sit.double().float(), torch.float32),
    "type": (lambda sit: sit.type(torch.bfloat16), torch.bfloat16),
    "a block": (
        lambda sit: [part.to(torch.float16) for part in sit.children()]
        and sit._buffers.update(pos_embed=sit.pos_embed.half()),
        torch.float16,
    ),
    "share_memory": (lambda sit: sit.share_memory(), torch.float32),
    "cpu": (lambda sit: sit.cpu(), torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("name", CASTS)
def test_casts_leave_fp8_weights_and_scales_alone(name):
    cast, dtype = CASTS[name]
    sit = quantised()
    before = {name: value.clone() for name, value in quantised_state(sit).items()}
    cast(sit)
    assert_kept(sit, before, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_to_the_dtype_that_is_there_changes_no_bit_of_the_velocity(dtype):
    sit = random_sit(CONFIG, 1).to(dtype).quantize_()
    before = velocity(sit)
    assert velocity(sit.to(dtype)).equal(before)
    assert velocity(sit.to("cpu", dtype)).equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_costs_a_quantised_model_what_it_costs_a_plain_one(dtype):
    """A little more: where a layer's input rounds to another number of e4m3 it moves by an eighth,
    and few do.
    """
    plain, sit = random_sit(CONFIG, 0), quantised()
    truths = velocity(plain), velocity(sit)
    costs = [
        relative_error(velocity(network.to(dtype)), truth)
        for network, truth in zip((plain, sit), truths, strict=True)
    ]
    assert costs[1] <= 3 * costs[0]


def test_moves_keep_what_was_moved():
    sit = quantised()
    weight = sit.blocks[0].attn.qkv.weight
    assert (
        sit.to("cpu").blocks[0].attn.qkv.weight is weight
    )  # nothing to do: captured graphs read it where it is
    meta = quantised().to("meta", torch.float16)
    assert {value.device.type for value in meta.state_dict().values()} == {"meta"}
    assert {value.dtype for value in quantised_state(meta).values()} == {E4M3, torch.float32}
    empty = meta.to_empty(device="cpu")
    assert {value.dtype for value in quantised_state(empty).values()} == {E4M3, torch.float32}
    assert {value.device.type for value in empty.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_load_keeps_a_quantised_module(dtype, quantize):
    """As benchmarks give them: a copy of a model's predictor, quantised, is loaded again."""
    sit = random_sit(CONFIG, 0).to(dtype)
    quantised_before = copy.deepcopy(sit).quantize_()
    expected, before = velocity(quantised_before), quantised_state(quantised_before)
    model = ft.load(
        quantised_before,
        random_sit(CONFIG.refiner(), 1),
        device="cpu",
        dtype=dtype,
        quantize=quantize,
    )
    assert_kept(model.predictor, before, dtype)
    assert velocity(model.predictor).equal(expected)
    assert ft.sample(model, "H1P1R1", [1, 2], guidance=1.5, seed=0).isfinite().all()


def test_copies_are_quantised_too():
    sit = quantised()
    file = io.BytesIO()
    torch.save(sit, file)
    file.seek(0)
    for other in (copy.deepcopy(sit), copy.copy(sit), torch.load(file, weights_only=False)):
        assert_kept(other, quantised_state(sit), torch.float32)
        assert velocity(other).equal(velocity(sit))


def test_a_state_dict_goes_round_and_another_kind_is_refused():
    sit, other = quantised(0), quantised(1)
    assert not velocity(other).equal(velocity(sit))
    file = io.BytesIO()
    torch.save(sit.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert velocity(other).equal(velocity(sit))
    plain = random_sit(CONFIG, 2).state_dict()
    for assign in (False, True):
        with pytest.raises(
            RuntimeError,
            match=(
                r"attn\.qkv\.weight must be torch\.float8_e4m3fn, of a layer in fp8, got "
                r"torch\.float32"
            ),
        ):
            quantised().load_state_dict(plain, strict=False, assign=assign)


def test_files_hold_no_quantised_weights(tmp_path):
    sit = quantised()
    with pytest.raises(
        ValueError, match=r"model must not be quantised to be saved: save it before quantize_\(\)"
    ):
        save_sit(tmp_path / "m.safetensors", sit)
    assert list(tmp_path.iterdir()) == []
    torch.save(sit.state_dict(), tmp_path / "m.pt")
    with pytest.raises(
        ft.CheckpointError,
        match=r"m\.pt: it is quantised, and only the weights before that can be loaded",
    ):
        load_sit(tmp_path / "m.pt", "predictor", heads=CONFIG.heads)


@pytest.mark.parametrize(
    "name, dtype",
    [("weight", torch.bfloat16), ("weight_scale", torch.bfloat16), ("weight", torch.float8_e5m2)],
)
def test_a_weight_that_was_cast_is_refused_where_arguments_are_trusted(name, dtype):
    """On the CPU too, where the reference would multiply whatever it is given."""
    sit = quantised()
    layer = sit.blocks[0].mlp.fc1
    layer._buffers[name] = layer._buffers[name].to(dtype)
    with (
        skip_checks(),
        pytest.raises(TypeError, match=f"a layer in fp8 must have .*, got .*{name} {dtype}"),
    ):
        velocity(sit)


# Pipelines


def eight_bit_pipeline() -> Any:
    """Kept in 8 bits and widened layer by layer, diffusers' own way."""
    pipe = pytest.importorskip("pipelines", exc_type=ImportError).sd3()
    pipe.transformer.enable_layerwise_casting(storage_dtype=E4M3, compute_dtype=torch.float32)
    return pipe


def test_a_quantised_pipeline_is_moved_and_not_cast():
    pipe = eight_bit_pipeline()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    assert any(value.dtype in EIGHT_BITS for value in before.values())
    for options in ({}, {"device": "cpu"}, {"device": "cpu", "dtype": torch.float32}):
        model = ft.from_pipeline(pipe, image_size=32, **options)
        assert model.dtype == torch.float32
        after = pipe.transformer.state_dict()
        assert all(after[name].dtype == value.dtype for name, value in before.items())
    with pytest.raises(
        ValueError,
        match=r"dtype must be left out for a quantised SD3Transformer2DModel of torch\.float32",
    ):
        ft.from_pipeline(pipe, image_size=32, dtype=torch.bfloat16)


def test_a_plain_pipeline_is_cast():
    pipe = pytest.importorskip("pipelines", exc_type=ImportError).sd3()
    assert ft.from_pipeline(pipe, image_size=32, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert {value.dtype for value in pipe.transformer.state_dict().values()} == {torch.bfloat16}


def test_what_a_quantiser_marks_is_not_cast():
    """A text encoder of bitsandbytes', say: its weights are packed numbers of any dtype."""
    pipe = pytest.importorskip("pipelines", exc_type=ImportError).sd3()
    pipe.vae.is_quantized = True
    ft.from_pipeline(pipe, image_size=32, dtype=torch.bfloat16)
    assert {value.dtype for value in pipe.vae.state_dict().values()} == {torch.float32}
    assert {value.dtype for value in pipe.transformer.state_dict().values()} == {torch.bfloat16}


def test_a_refiner_that_a_quantiser_marks_is_not_cast():
    pipe = pytest.importorskip("pipelines", exc_type=ImportError).sd3()
    for quantised, dtype in ((True, torch.bfloat16), (False, pipe.transformer.dtype)):
        refiner = ft.refiner_for(pipe.transformer).to(torch.bfloat16)
        if quantised:
            refiner.is_quantized = True
        ft.restore(ft.accelerate(pipe, "H1P2R1", refiner=refiner))
        assert {value.dtype for value in refiner.state_dict().values()} == {dtype}
