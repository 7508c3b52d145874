"""Checkpoints as other people's trainers and wrappers save them: the right weights are read."""

import itertools

import pytest
import safetensors.torch
import torch
from published_checkpoints import HEADS, agrees, predictor_state, refiner_state, repa_state

from flowturbo.models.checkpoint import convert, load_sit
from flowturbo.storage.files import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*label table")


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def inside(wrapper, state):
    """With the parts of a network wrapped one by one."""
    return {
        name.replace("attn.", f"{wrapper}.attn.").replace("mlp.", f"{wrapper}.mlp."): value
        for name, value in state.items()
    }


OTHERS = {
    "loss.logvar": torch.zeros(()),
    "first_stage_model.encoder.blocks.0.weight": torch.zeros(2),
    "vae.decoder.final_layer.weight": torch.zeros(2),
}
STEPS = {"n_averaged": torch.tensor(3)}

# m: other weights, e: those that should be read.
FORMS = {
    "DDP": lambda m, e: prefixed("module.", e),
    "torch.compile": lambda m, e: prefixed("_orig_mod.", e),
    "DDP of compiled": lambda m, e: prefixed("module._orig_mod.", e),
    "compiled DDP": lambda m, e: prefixed("_orig_mod.module.", e),
    "FSDP": lambda m, e: inside("_fsdp_wrapped_module", prefixed("_fsdp_wrapped_module.", e)),
    "blocks compiled": lambda m, e: inside("_orig_mod", e),
    "blocks compiled under DDP": lambda m, e: prefixed("module.", inside("_orig_mod", e)),
    "checkpointed blocks": lambda m, e: {"ema": inside("_checkpoint_wrapped_module", e)},
    "ema of DDP": lambda m, e: {"model": m, "ema": prefixed("module.", e)},
    "both of DDP": lambda m, e: {"model": prefixed("module.", m), "ema": prefixed("module.", e)},
    "AveragedModel": lambda m, e: {"ema": {**STEPS, **prefixed("module.", e)}},
    "bare AveragedModel": lambda m, e: {**prefixed("module.", e), **STEPS},
    "swa_model": lambda m, e: {"model": m, "swa_model": {**prefixed("module.", e), **STEPS}},
    "state_dict": lambda m, e: {"state_dict": e, "epoch": 3},
    "model.state_dict": lambda m, e: {"model": {"state_dict": e}},
    "ema.state_dict": lambda m, e: {"ema": {"state_dict": e}, "model": {"state_dict": m}},
    "model_ema": lambda m, e: {"model": m, "model_ema": e},
    "ema_model": lambda m, e: {"ema_model": e, "model": m},
    "model_state_dict": lambda m, e: {"model_state_dict": e, "optimizer_state_dict": {}},
    "ema_state_dict": lambda m, e: {"model_state_dict": m, "ema_state_dict": e},
    "state_dict_ema": lambda m, e: {"state_dict": m, "state_dict_ema": e},
    "params_ema": lambda m, e: {"params": m, "params_ema": e},
    "EMAModel": lambda m, e: {"net": m, "EMAModel": e},
    "DeepSpeed": lambda m, e: {"module": e, "ds_version": "0.14", "optimizer": None},
    "a list of one average": lambda m, e: {"model": m, "emas": [{"decay": 0.999, "weights": e}]},
    "average in a class's state": lambda m, e: {
        "model": m,
        "ema": {
            "initted": torch.tensor(True),
            "step": torch.tensor(9),
            **prefixed("online_model.module.", m),
            **prefixed("ema_model.module.", e),
        },
    },
    "Lightning": lambda m, e: {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {**prefixed("net.", e), **OTHERS},
        "hyper_parameters": {"lr": 1e-4},
        "callbacks": {"ModelCheckpoint": {"best": 1.0}},
    },
    "Lightning with average": lambda m, e: {
        "state_dict": {**prefixed("model.", m), **prefixed("model_ema.", e), **OTHERS},
    },
    "Lightning's callback": lambda m, e: {
        "state_dict": prefixed("model._orig_mod.", m),
        "callbacks": {"EMA": {"ema_weights": prefixed("model._orig_mod.", e)}},
    },
    "no average: settings": lambda m, e: {"model": e, "ema_kwargs": {"decay": 0.999, "every": [1]}},
    "no average: None, number": lambda m, e: {"model": e, "ema": None, "ema_decay": 0.9999},
    "model among others": lambda m, e: {"model": e, "best_model": m, "teacher": m},
}


OTHER, STATE = predictor_state(31, depth=1), predictor_state(32, depth=1)
TENSORS = list(STATE.values())


def loads_as(path, state, role="predictor"):
    """Whether the file's SiT has these weights, by these names."""
    read = load_sit(path, role, heads=HEADS).model.state_dict()
    return read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state)


@pytest.mark.parametrize("form", FORMS)
def test_the_right_weights_are_read(tmp_path, form):
    torch.save(FORMS[form](OTHER, STATE), tmp_path / "a.pt")
    assert loads_as(tmp_path / "a.pt", STATE)


def test_a_refiners_weights_are_read_alike(tmp_path):
    other, state = refiner_state(31), refiner_state(32)
    for form in ("AveragedModel", "Lightning with average", "ema.state_dict"):
        torch.save(FORMS[form](other, state), tmp_path / "a.pt")
        assert loads_as(tmp_path / "a.pt", state, "refiner")
        assert agrees(load_sit(tmp_path / "a.pt", "refiner", heads=HEADS).model, state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod.module.", "net.x.y."])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"title": "{", "step": "3"}])
def test_safetensors_with_prefixes_and_metadata(tmp_path, prefix, metadata):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(prefixed(prefix, STATE), path, metadata)
    assert loads_as(path, STATE)
    both = {**prefixed(prefix, OTHER), **prefixed(f"ema.{prefix}", STATE)}
    safetensors.torch.save_file(both, path, metadata)
    assert loads_as(path, STATE)


def test_prefixes_hide_no_projectors(tmp_path):
    """REPA's files are recognised by keys that only its training needs."""
    for prefix in ("module.", "_orig_mod.", "model."):
        torch.save({"ema": prefixed(prefix, repa_state())}, tmp_path / "a.pt")
        assert load_sit(tmp_path / "a.pt", "predictor", heads=HEADS).convention == "repa"


def test_conversion_writes_a_sits_own_names(tmp_path):
    torch.save({"state_dict": {**prefixed("net.", STATE), **OTHERS}}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", heads=HEADS)
    assert loads_as(tmp_path / "b.safetensors", STATE)


CLASHES = {
    "an empty average": ({"model": STATE, "ema": {}}, "averaged.*'ema', which is empty.*'model'"),
    "an empty average of names": ({"model": STATE, "ema": {"state_dict": {}}}, "'ema'.*is empty"),
    "an average without names": (
        {"model": STATE, "ema": {"decay": 0.999, "shadow_params": TENSORS}},
        "averaged.*'ema', which holds no names of a SiT, but a list of",
    ),
    "an average of other names": (
        {"model": STATE, "ema": {name.replace(".", ""): v for name, v in STATE.items()}},
        "averaged.*'ema', which holds no names of a SiT, but 'blocks0",
    ),
    "an average of other names beside": (
        {
            **prefixed("model.", STATE),
            **{"model_ema." + name.replace(".", ""): v for name, v in STATE.items()},
        },
        "averaged.*'model_ema.'",
    ),
    "two averages": ({"ema_0.999": STATE, "ema_0.9999": OTHER}, "several models.*0.999.*0.9999"),
    "two networks": ({"student": STATE, "teacher": OTHER}, "several models, 'student', 'teacher'"),
    "two prefixes": (
        {**prefixed("net.", STATE), **prefixed("target.", STATE)},
        "several models, 'net.'..., 'target.'",
    ),
    "one key without its prefix": (
        {**prefixed("net.", {k: v for k, v in STATE.items() if k != "pos_embed"}), "pos_embed": 0},
        "prefix 'net.', and 'pos_embed' without it",
    ),
    "another network": (
        {"state_dict": {"conv.weight": torch.zeros(2)}, "epoch": 3},
        "no weights of a SiT.*x_embedder.proj.weight.*'state_dict', 'epoch'",
    ),
}


@pytest.mark.parametrize("what", CLASHES)
def test_what_is_not_clear_is_refused_with_its_cause(tmp_path, what):
    content, message = CLASHES[what]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_sit(tmp_path / "a.pt", "predictor", heads=HEADS)
    assert str(refusal.value).startswith(str(tmp_path / "a.pt"))
    if "several" in message or "averaged" in message:
        assert "torch.save" in str(refusal.value)  # the cure


def test_a_cure_that_messages_name_works(tmp_path):
    torch.save({"model": STATE, "ema": {}}, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(content["model"], tmp_path / "b.pt")
    assert loads_as(tmp_path / "b.pt", STATE)


def test_mappings_that_contain_each_other_end(tmp_path):
    content = {str(i): {} for i in range(200)}
    for i, j in itertools.product(range(200), range(20)):
        content[str(i)][str(j)] = content[str((i * 7 + j) % 200)]
    content["self"] = content
    content["deep"] = {}
    inner = content["deep"]
    for _ in range(100):
        inner["deep"] = [{}]
        inner = inner["deep"][0]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no weights of a SiT"):
        load_sit(tmp_path / "a.pt", "predictor", heads=HEADS)
    content["many"] = [{} for _ in range(20_000)]
    content["ema"] = STATE
    torch.save(content, tmp_path / "a.pt")
    assert loads_as(tmp_path / "a.pt", STATE)
