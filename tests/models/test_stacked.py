"""adaLN's weights side by side in memory: one product for all, and parameters as before."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from close import assert_close
from safetensors.torch import load_file, save_model
from tiny import CONFIG, random_sit

import flowturbo as ft
from flowturbo.models.checkpoint import save_sit


@pytest.fixture
def pair():
    """(a network, the same one stacked)."""
    return random_sit(CONFIG, 3), random_sit(CONFIG, 3).stack_()


def conditions():
    return torch.randn(5, 4, CONFIG.hidden)


def is_stacked(network):
    return network.stacked() is not None


def assert_same_modulations(network, other):
    c = conditions()
    with torch.no_grad():
        for got, wanted in zip(network.modulations(c), other.modulations(c), strict=True):
            assert_close(got, wanted, 1e-6)


def test_one_product_gives_what_one_a_layer_gives(pair, monkeypatch):
    plain, network = pair
    assert is_stacked(network)
    assert not is_stacked(plain)
    assert_same_modulations(network, plain)
    shapes = []
    monkeypatch.setattr(
        "flowturbo.models.stacked.matmul",
        lambda c, weight, bias: (
            shapes.append(weight.shape) or torch.nn.functional.linear(c, weight)
        ),
    )
    network.modulations(conditions())
    with torch.no_grad():
        network.modulations(conditions())
    assert len(shapes) == CONFIG.depth + 1 + 1  # with gradients one a layer
    assert shapes[-1] == (network.modulation_width, CONFIG.hidden)


def test_stacking_again_moves_nothing(pair):
    _, network = pair
    before = [p.data_ptr() for p in network.parameters()]
    assert [p.data_ptr() for p in network.stack_().parameters()] == before


def test_parameters_stay_themselves():
    network = random_sit(CONFIG, 3)
    before, values = dict(network.named_parameters()), copy.deepcopy(network.state_dict())
    network.stack_()
    assert all(p is before[name] for name, p in network.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in network.state_dict().items())


def test_a_loaded_state_is_read(pair):
    plain, network = pair
    other = random_sit(CONFIG, 4)
    network.load_state_dict(other.state_dict())
    assert is_stacked(network)
    assert_same_modulations(network, other)
    network.load_state_dict(plain.state_dict(), assign=True)
    assert not is_stacked(network)
    assert_same_modulations(network, plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda network: network.double().float(),
        copy.deepcopy,
        lambda network: pickle.loads(pickle.dumps(network)),
    ],
    ids=["cast", "deepcopy", "pickle"],
)
def test_copies_have_memory_of_their_own(pair, change):
    plain, network = pair
    changed = change(network)
    assert not is_stacked(changed)
    assert_same_modulations(changed, plain)
    assert_same_modulations(changed.stack_(), plain)


def test_a_pickle_is_no_larger(pair):
    plain, network = pair
    assert len(pickle.dumps(network)) < 1.1 * len(pickle.dumps(plain))


@pytest.mark.parametrize("of", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_copy_leaves_the_network_stacked(pair, of):
    of(pair[1])
    assert is_stacked(pair[1])


def test_each_parameter_is_the_only_one_of_its_storage(pair, tmp_path):
    """safetensors' save_model refuses a part of a storage, and accelerate keeps one parameter of
    each.
    """
    plain, network = pair
    for layer in network.stackable():
        for parameter in (layer.weight, layer.bias):
            assert parameter.storage_offset() == 0
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
    save_model(network, str(tmp_path / "sit.safetensors"))
    state = load_file(tmp_path / "sit.safetensors")
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_the_memory_lives_as_long_as_its_parameters(pair):
    plain, network = pair
    whole, _ = network.stacked()
    address, alive = whole.data_ptr(), weakref.ref(whole)
    del whole
    kept = network.blocks[0].adaLN_modulation[1].weight.detach()
    network.double()
    assert network._stack is None
    assert alive() is None
    assert kept.data_ptr() == address
    assert torch.equal(kept, plain.blocks[0].adaLN_modulation[1].weight)


def test_parameters_without_an_address(pair):
    """As torch.func makes them, with gradients off too."""
    states, _ = torch.func.stack_module_state(list(pair))
    c = conditions()

    class Modulations(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, c):
            return self.network.modulations(c)

    states = {f"network.{name}": value for name, value in states.items()}
    module = Modulations(pair[1])
    with torch.no_grad():
        found = torch.vmap(lambda state: torch.func.functional_call(module, state, (c,)))(states)
        for got, wanted in zip(found, pair[0].modulations(c), strict=True):
            assert_close(got[0], wanted, 1e-6)


def test_files_hold_each_weight_once(pair, tmp_path):
    plain, _ = pair
    sizes = []
    for model in pair:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        sizes.append(len(file.getvalue()))
        save_sit(tmp_path / "sit.safetensors", model)
        sizes.append((tmp_path / "sit.safetensors").stat().st_size)
    assert sizes[2] < 1.1 * sizes[0]
    assert sizes[3] == sizes[1]
    loaded = ft.load(tmp_path / "sit.safetensors", heads=CONFIG.heads, device="cpu").predictor
    assert_same_modulations(loaded, plain)


def test_training_changes_what_the_product_reads(pair):
    optimisers = [torch.optim.AdamW(network.parameters(), lr=0.1) for network in pair]
    c = conditions()
    for network, optimiser in zip(pair, optimisers, strict=True):
        network.requires_grad_(True)
        sum(m.square().mean() for m in network.modulations(c)).backward()
        optimiser.step()
    assert is_stacked(pair[1])
    assert_same_modulations(pair[1], pair[0])
    assert not torch.equal(
        pair[1].stackable()[0].weight, random_sit(CONFIG, 3).stackable()[0].weight
    )


def test_layers_of_several_dtypes_stay_where_they_are():
    network = random_sit(CONFIG, 3)
    network.blocks[0].double()
    assert not is_stacked(network.stack_())
    network = random_sit(CONFIG, 3)
    bias = network.blocks[0].adaLN_modulation[1].bias
    bias.data = bias.data.double()
    assert not is_stacked(network.stack_())
    assert network.final_layer.adaLN_modulation[1].bias.dtype == torch.float32


def test_inference_mode_leaves_no_mark():
    network = random_sit(CONFIG, 3)
    with torch.inference_mode():
        network.stack_()
        pickle.dumps(network.stack_())
        network.stack_()
    assert is_stacked(network)
    assert not any(p.is_inference() for p in network.parameters())
    with torch.inference_mode():
        assert not is_stacked(random_sit(CONFIG, 3).stack_())
