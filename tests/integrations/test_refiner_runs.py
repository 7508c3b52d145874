"""What a refiner in a pipeline keeps, where its weights lie, and when it waits for the device."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import newer_pipelines
import pytest
import torch
from accelerate import cpu_offload
from accelerated import refiner_of
from close import assert_close
from newer_pipelines import newer, noise_for
from pipelines import SIZE, call, embeds, flux, sd3
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flowturbo as ft
from flowturbo.integrations import placement

PLAN = "H1P1R1"


def expected_of(pipe: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of a pipeline like this one that is neither offloaded nor moved."""
    pipe.to(dtype=dtype)
    with ft.accelerated(pipe, PLAN, refiner_of(pipe)):
        return call_in(pipe, dtype)


def call_in(pipe: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    halves = {**embeds(), **{f"negative_{name}": x for name, x in embeds(9).items()}}
    return pipe(
        **{name: x.to(dtype) for name, x in halves.items()},
        generator=torch.Generator().manual_seed(3),
        height=SIZE, width=SIZE, output_type="latent",
    ).images  # fmt: skip


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_sequentially_offloaded_pipeline_leaves_the_refiner_its_weights(before):
    """Between calls its own network's are on `meta`."""
    expected, pipe = expected_of(sd3()), sd3()
    refiner = refiner_of(pipe)
    weights = {name: x.clone() for name, x in refiner.state_dict().items()}
    for offload in (before, not before):
        if offload:
            for part in (pipe.transformer, pipe.vae):  # as enable_sequential_cpu_offload does
                cpu_offload(part, torch.device("cpu"))
            assert pipe.transformer.device.type == "meta"
        else:
            ft.accelerate(pipe, PLAN, refiner)
    assert call_in(pipe).equal(expected)
    ft.restore(pipe)
    kept = refiner.state_dict()
    assert all(kept[name].equal(x) for name, x in weights.items())


@pytest.mark.parametrize("inference", [False, True])
def test_a_pipeline_may_be_cast_after_accelerate(inference):
    expected, pipe = expected_of(sd3(), torch.bfloat16), sd3()
    refiner = refiner_of(pipe)
    ft.accelerate(pipe, PLAN, refiner)
    call_in(pipe)
    pipe.to(dtype=torch.bfloat16)
    with torch.inference_mode(inference):
        assert call_in(pipe, torch.bfloat16).equal(expected)
    assert refiner.dtype == torch.bfloat16
    assert not any(parameter.is_inference() for parameter in refiner.parameters())


class Moves:
    """In the place of move_part: where refiners were to be brought."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, torch.dtype]] = []
        monkeypatch.setattr(placement, "move_part", self)

    def __call__(self, part: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.made.append((str(device), dtype))


def test_a_refiner_goes_where_an_offloaded_pipeline_runs(monkeypatch):
    """With model offload the network waits on the CPU."""
    pipe, moves = sd3(), Moves(monkeypatch)
    refiner = refiner_of(pipe)
    where = {"device": torch.device("cuda", 1)}
    monkeypatch.setattr(type(pipe), "_execution_device", property(lambda self: where["device"]))
    ft.accelerate(pipe, PLAN, refiner)
    assert moves.made == [("cuda:1", torch.float32)]
    # Moved after accelerate: once a run, when the refiner is called first, and not in each step.
    where["device"] = torch.device("cpu")
    call_in(pipe)
    assert len(moves.made) == 1
    pipe.transformer.to(torch.float64)
    attached, x = pipe.scheduler.refiner, torch.zeros(1, 4, 8, 8)
    monkeypatch.setattr(attached, "_offsets", lambda *given: x)
    for run in range(2, 4):
        attached.reset()
        for _ in range(3):
            attached.note((x,), {}, (-x,))
            attached.observe(x)
            attached(x, 0.5, x)
        assert moves.made[1:] == [("cpu", torch.float64)] * (run - 1)


def test_a_refiner_stays_where_it_is_while_the_place_is_not_known(monkeypatch):
    expected, pipe = expected_of(sd3()), sd3()
    refiner = refiner_of(pipe)
    with monkeypatch.context() as patched:
        patched.setattr(type(pipe), "_execution_device", torch.device("meta"))
        ft.accelerate(pipe, PLAN, refiner)
    assert refiner.device.type == "cpu"
    assert call_in(pipe).equal(expected)


def test_a_refiner_that_is_offloaded_itself_is_left_to_its_hooks(monkeypatch):
    expected, pipe = expected_of(sd3()), sd3()
    refiner, moves = refiner_of(pipe), Moves(monkeypatch)
    cpu_offload(refiner, torch.device("cpu"))
    assert refiner.device.type == "meta"
    with ft.accelerated(pipe, PLAN, refiner):
        assert call_in(pipe).equal(expected)
    assert not moves.made


def test_a_refiner_without_weights_is_refused():
    pipe = sd3()
    with pytest.raises(ValueError, match=r"refiner must have its weights, got a SD3.* on the meta"):
        ft.accelerate(pipe, PLAN, refiner_of(pipe).to("meta"))
    assert not pipe.transformer._forward_hooks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("how", ["model", "sequential", "to"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_refiners_follow_a_pipeline_to_the_device(how, before):
    def move(pipe: Any) -> None:
        getattr(pipe, "to" if how == "to" else f"enable_{how}_cpu_offload")(
            *["cuda"] if how == "to" else []
        )

    expected, pipe = expected_of(sd3()), sd3()
    refiner = refiner_of(pipe)
    for moved in (before, not before):
        if moved:
            move(pipe)
        else:
            ft.accelerate(pipe, PLAN, refiner)
    assert_close(call_in(pipe).cpu(), expected, 1e-3)
    assert refiner.device.type == "cuda"


class Network:
    """Weak references to what the network of a pipeline was given."""

    def __init__(self, network: Any) -> None:
        self.given: list[weakref.ref[Tensor]] = []
        network.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, network: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = [*arguments, *named.values()]
        self.given += [weakref.ref(x) for x in values if isinstance(x, Tensor)]

    def alive(self) -> int:
        gc.collect()
        return sum(one() is not None for one in self.given)


def fails_in_the_callback(pipe: Any, index: int, timestep: Any, kept: Any) -> Any:
    if index == 1:
        raise RuntimeError("stopped")
    return kept


def interrupts(pipe: Any, index: int, timestep: Any, kept: Any) -> Any:
    pipe._interrupt = True
    return kept


def runs(pipe: Any) -> None:
    call(pipe)


def fails(pipe: Any) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        call(pipe, callback_on_step_end=fails_in_the_callback)


def fails_in_the_network(pipe: Any) -> None:
    """After the network has been called."""
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *given, **named: 1 / 0
    with pytest.raises(ZeroDivisionError):
        call(pipe)
    pipe.scheduler.step = step


def is_interrupted(pipe: Any) -> None:
    call(pipe, callback_on_step_end=interrupts)


def serves_another_pipeline(pipe: Any) -> None:
    call(sd3(transformer=pipe.transformer), num_inference_steps=2)


def is_called_by_hand(pipe: Any) -> None:
    given = embeds()
    with torch.no_grad():
        pipe.transformer(
            torch.randn(2, 4, 8, 8), given["prompt_embeds"], given["pooled_prompt_embeds"],
            torch.full((2,), 500.0),
        )  # fmt: skip


def is_called_in_another_thread(pipe: Any) -> None:
    """While a run is on in this one."""

    def start(pipe: Any, index: int, timestep: Any, kept: Any) -> Any:
        thread = threading.Thread(target=is_called_by_hand, args=[pipe])
        thread.start()
        thread.join()
        return kept

    call(pipe, callback_on_step_end=start)


CALLS = (
    runs,
    fails,
    fails_in_the_network,
    is_interrupted,
    serves_another_pipeline,
    is_called_by_hand,
    is_called_in_another_thread,
)


@pytest.mark.parametrize("how", CALLS)
def test_a_refiner_keeps_no_prompts_or_latents(how):
    pipe = sd3()
    ft.accelerate(pipe, PLAN, refiner_of(pipe))
    expected = call(pipe)
    network = Network(pipe.transformer)
    how(pipe)
    assert network.given
    assert network.alive() == 0
    assert call(pipe).equal(expected)


def test_a_loop_of_the_users_own_is_followed_and_forgotten_at_its_end():
    """Also where it goes through the timesteps again: from its first step on."""
    pipe = sd3()
    ft.accelerate(pipe, PLAN, refiner_of(pipe))
    pipe.scheduler.set_timesteps(3)

    def loop() -> Tensor:
        given = embeds()
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in pipe.scheduler.timesteps:
            out = pipe.transformer(
                hidden_states=x, timestep=t.expand(2), return_dict=False,
                encoder_hidden_states=given["prompt_embeds"],
                pooled_projections=given["pooled_prompt_embeds"],
            )[0]  # fmt: skip
            x = pipe.scheduler.step(out, t, x, return_dict=False)[0]
        return x

    network = Network(pipe.transformer)
    with torch.no_grad():
        assert loop().equal(loop())
    is_called_by_hand(pipe)
    assert len(network.given) > 6
    assert network.alive() == 0


class _HostReads(TorchDispatchMode):
    """Counts numbers that are copied from a tensor to the host, for which a GPU is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@contextmanager
def reads_of_steps(pipe: Any) -> Iterator[list[int]]:
    """The host reads of each step of a pipeline's scheduler."""
    step, found = pipe.scheduler.step, list[int]()

    def counted(*given: Any, **named: Any) -> Any:
        with _HostReads() as reads:
            result = step(*given, **named)
        found.append(reads.count)
        return result

    pipe.scheduler.step = counted
    yield found
    pipe.scheduler.step = step


def qwen(pipe: Any) -> Any:
    model = ft.from_pipeline(pipe, image_size=SIZE)
    return newer_pipelines.call("qwen", pipe, 3.0, noise_for(pipe, model))


PIPES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "one velocity": (flux, call),
    "halves of one call": (sd3, call),
    "two calls, rescaled": (lambda: newer("qwen"), qwen),
}


@pytest.mark.parametrize("kind", PIPES)
def test_steps_that_refine_nothing_do_not_wait_for_the_device(kind):
    make, run = PIPES[kind]
    pipe = make()
    with (
        ft.accelerated(pipe, "H1A4R1", refiner_of(pipe)),
        reads_of_steps(pipe) as reads,
    ):
        run(pipe)
    *others, refined = reads
    assert len(others) == 5
    assert not any(others)
    # How the velocity was made is found once, for both of the refiner's calls.
    assert 1 <= refined <= 2
