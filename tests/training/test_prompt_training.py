"""Refiners of text-to-image models: captions and latents encoded once, an objective told prompts, a
folder that diffusers reads.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from close import assert_close
from PIL import Image

import flowturbo as ft
from flowturbo.data.encode import Encode, encode
from flowturbo.data.prompt_latents import load_prompts
from flowturbo.models.pipelines import load_pipeline, network_of
from flowturbo.models.text_to_image import PromptNetwork, encode_prompts, packed, unpacked
from flowturbo.runtime.rng import StepRandom
from flowturbo.storage.files import CheckpointError, load_tensors, save_tensors
from flowturbo.storage.images import scan_captions
from flowturbo.training.objectives import Refinement
from flowturbo.training.train import Distill, distill

KINDS = {"2rf": "2-rf", "sd3": "auto", "flux": "auto"}
SIZE = pipelines.SIZE


CAPTIONS = ["a cat", "two dogs", "", "a cat", "snow, snow"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("captioned")
    rng = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        Image.fromarray(rng.integers(0, 256, (SIZE + 7, SIZE + 20, 3), dtype=np.uint8)).save(
            root / f"{i}.png"
        )
        (root / f"{i}.txt").write_text(caption + "\n")
    return root


def encoding(
    kind: str, pipeline_folders: dict[str, Path], source: Path, out: Path, **changes: Any
) -> Encode:
    values: dict[str, Any] = dict(
        image_size=SIZE, batch_size=2, shard_size=3, dtype="float32", device="cpu"
    )
    return Encode(source=source, out=out, model=str(pipeline_folders[kind]), **values | changes)


# Captions.


def test_captions_stand_beside_their_images_or_in_a_table(captioned, tmp_path):
    beside = scan_captions(captioned)
    assert (beside.names, beside.captions) == ([f"{i}.png" for i in range(5)], CAPTIONS)
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png"):
        Image.new("RGB", (9, 9), "red").save(tmp_path / name)
    rows = [
        {"file_name": "sub/a.png", "text": "one"},
        {"file_name": "b.png", "text": "two", "more": 1},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    table = scan_captions(tmp_path)
    assert (table.names, table.captions) == (["sub/a.png", "b.png"], ["one", "two"])
    assert table.read([1, 0], 4).shape == (2, 4, 4, 3)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "has none"),
        ({"a.png": ""}, "a.png has no caption: a.txt beside it"),
        (
            {"metadata.jsonl": '{"file_name": "a.png"}'},
            "line 1, must be JSON with file_name and text",
        ),
        ({"metadata.jsonl": "[1]"}, "line 1, must be JSON"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "x"}'}, "line 1: a.png does not exist"),
    ],
)
def test_images_without_captions_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        scan_captions(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        scan_captions(tmp_path / "none")


# Encoding.


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_what_the_pipeline_makes_of_images_and_captions(
    kind, pipeline_folders, captioned, tmp_path
):
    out = encode(encoding(kind, pipeline_folders, captioned, tmp_path / "out"))
    data = load_prompts(out)
    assert (len(data), sorted(path.name for path in out.iterdir())[1]) == (
        5,
        "latents-00001-of-00002.safetensors",
    )
    pipe = load_pipeline(pipeline_folders[kind])
    expected = encode_prompts(pipe, CAPTIONS, [""] * 5, "cpu")
    latents, prompts = data.batch(np.array([4, 0, 3]), StepRandom(0, 0, range(3)))
    assert (
        {"embeds"}
        <= prompts.keys()
        == {name for name in expected if not name.startswith("negative_")}
    )
    for name, value in prompts.items():
        assert_close(value, expected[name][[4, 0, 3]], 1e-6)
        assert_close(data.null[name], expected[f"negative_{name}"][:1], 1e-6)
    images = torch.from_numpy(scan_captions(captioned).read([4], SIZE))
    view = images.permute(0, 3, 1, 2) / 127.5 - 1
    posterior = pipe.vae.encode(view).latent_dist
    tensors, _ = load_tensors(out / "latents-00001-of-00002.safetensors")
    assert_close(
        tensors["latents"][1:],
        (posterior.mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor,
        1e-5,
    )
    assert_close(tensors["std"][1:], posterior.std * pipe.vae.config.scaling_factor, 1e-5)
    assert latents.shape == (3, *data.shape)


def test_an_encoding_goes_on_and_is_not_mixed_with_another(pipeline_folders, captioned, tmp_path):
    settings = encoding("2rf", pipeline_folders, captioned, tmp_path / "out")
    whole = encode(settings)
    first, second = (whole / f"latents-0000{i}-of-00002.safetensors" for i in range(2))
    before = second.read_bytes()
    kept = first.stat().st_mtime_ns
    second.unlink()
    with pytest.raises(CheckpointError, match="shards 1 of 2 are missing"):
        load_prompts(whole)
    encode(settings)
    assert (second.read_bytes(), first.stat().st_mtime_ns) == (before, kept)
    with pytest.raises(ValueError, match="flips was True and is now False"):
        encode(replace(settings, flips=False))
    other = tmp_path / "other"
    other.mkdir()
    for path in captioned.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "0.txt").write_text("a caption that was corrected")
    with pytest.raises(ValueError, match="from other images"):
        encode(replace(settings, source=other))


def test_each_use_draws_anew_and_mirrors(pipeline_folders, captioned, tmp_path):
    data = load_prompts(encode(encoding("2rf", pipeline_folders, captioned, tmp_path / "out")))
    row, tensors = (
        np.array([0, 0]),
        load_tensors(tmp_path / "out/latents-00000-of-00002.safetensors")[0],
    )
    draws = StepRandom(0, 0, range(2))
    flip = (draws.uniform() < 0.5).tolist()
    spread = draws.normal(data.shape)
    latents, _ = data.batch(row, StepRandom(0, 0, range(2)))
    for i, mirrored in enumerate(flip):
        suffix = "_flipped" if mirrored else ""
        assert_close(
            latents[i],
            tensors["latents" + suffix][0] + tensors["std" + suffix][0] * spread[i],
            1e-6,
        )
    assert any(
        data.batch(row, StepRandom(s, 0, range(2)))[0][0].equal(latents[0]) is False
        for s in range(1, 3)
    )


def test_data_that_is_not_whole_is_refused(pipeline_folders, captioned, tmp_path):
    out = encode(encoding("sd3", pipeline_folders, captioned, tmp_path / "out"))
    path = out / "latents-00000-of-00002.safetensors"
    tensors, described = load_tensors(path)
    assert described is not None
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != "null_pooled"}, "must hold null_pooled"),
        ({k: v for k, v in tensors.items() if k != "embeds"}, "must hold embeds"),
        ({**tensors, "embeds": tensors["embeds"][:2]}, "as many rows of each kind"),
        ({**tensors, "embeds": tensors["embeds"] / 0}, "embeds must be finite"),
        ({**tensors, "embeds": tensors["embeds"][:, :3]}, "holds .*, but"),
    ):
        save_tensors(path, changed, described)
        with pytest.raises(CheckpointError, match=message):
            load_prompts(out)
    save_tensors(path, tensors, described)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="damaged"):
        load_prompts(out)
    with pytest.raises(ValueError, match="that `flowturbo encode --model` wrote"):
        load_prompts(tmp_path / "nothing")


def test_prompts_are_no_data_of_a_class_conditional_teacher(pipeline_folders, captioned, tmp_path):
    out = encode(encoding("2rf", pipeline_folders, captioned, tmp_path / "out"))
    with pytest.raises(ValueError, match="refiner of a text-to-image model"):
        distill(Distill(out=tmp_path / "run", teacher="digits", data=str(out), device="cpu"))


# The objective.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [(1.0, 1.0), (2.0, 4.0)])
def test_the_objective_told_prompts_is_the_formula(
    kind, guidance, pipeline_folders, captioned, tmp_path
):
    """Row by row and by hand: dropped rows are told the empty prompt, guided ones a velocity of
    both halves.
    """
    data = load_prompts(encode(encoding(kind, pipeline_folders, captioned, tmp_path / "out")))
    module = network_of(
        load_pipeline(pipeline_folders[kind], ("network",)), KINDS[kind]
    ).requires_grad_(False)
    student_module = ft.refiner_for(module)
    for parameter in student_module.parameters():
        parameter.data.normal_(0, 0.05)
    teacher, student = PromptNetwork(module), PromptNetwork(student_module.requires_grad_(False))
    rows, delta_max, drop = 4, 0.3, 0.5
    latents, prompts = data.batch(np.arange(rows), StepRandom(1, 0, range(rows)))
    embedded = kind == "flux"
    objective = Refinement(
        teacher,
        data.null,
        data.shape[0],
        label_drop=drop,
        delta_max=delta_max,
        guidance=guidance,
        embedded=embedded,
    )
    loss = objective(student, latents, prompts, StepRandom(2, 0, range(rows)))

    draws = StepRandom(2, 0, range(rows))
    x0, t, dropped = draws.normal(latents.shape[1:]), draws.uniform(), draws.uniform() < drop
    assert 0 < int(dropped.sum()) < rows
    if embedded:
        scale = guidance[0] + (guidance[1] - guidance[0]) * draws.uniform()
        prompts = {**prompts, "embedded_guidance": scale}
    delta = delta_max * float(draws.shared.random())
    if not embedded and guidance[1] > 1:
        scale = guidance[0] + (guidance[1] - guidance[0]) * draws.uniform()
    total = torch.zeros(())
    for i in range(rows):
        mine = {name: value[i : i + 1] for name, value in prompts.items()}
        null = {**mine, **data.null}
        x, time = t[i] * latents[i : i + 1] + (1 - t[i]) * x0[i : i + 1], t[i : i + 1]
        v = cached = teacher(x, time, mine)
        if not embedded and guidance[1] > 1:
            u = teacher(x, time, null)
            v = cached = u + scale[i] * (v - u)
        x = x + delta * v
        seen = null if dropped[i] else mine
        total = (
            total
            + (student(x, time + delta, seen, cached) + cached - teacher(x, time + delta, seen))
            .square()
            .mean()
            / rows
        )
    assert_close(loss, total, 1e-4)


# Distilling.


def distillation(
    kind: str, pipeline_folders: dict[str, Path], data: Path, out: Path, **changes: Any
) -> Distill:
    values: dict[str, Any] = dict(
        convention=KINDS[kind],
        steps=6,
        batch_size=2,
        lr=1e-3,
        warmup=2,
        clip=1.0,
        ema=0.5,
        save_every=3,
        log_every=1,
        device="cpu",
    )
    return Distill(out=out, teacher=str(pipeline_folders[kind]), data=str(data), **values | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refiner_is_trained_and_runs_in_plans(kind, pipeline_folders, captioned, tmp_path):
    data = encode(encoding(kind, pipeline_folders, captioned, tmp_path / "data"))
    path = distill(distillation(kind, pipeline_folders, data, tmp_path / "run"))
    assert path == tmp_path / "run/diffusion_pytorch_model.safetensors"
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    model = ft.from_pipeline(
        pipeline_folders[kind],
        tmp_path / "run",
        convention=KINDS[kind],
        image_size=SIZE,
        device="cpu",
    )
    assert isinstance(model.refiner, PromptNetwork)
    refined, plain = (ft.sample(model, plan, ["a cat"], seed=1) for plan in ("H1R1", "H1P1"))
    assert refined.isfinite().all()
    assert not torch.allclose(refined, plain)
    # What is read from the folder is the average of the weights.
    state, _ = load_tensors(tmp_path / "run/state.safetensors")
    for name, value in model.refiner.module.state_dict().items():
        assert value.equal(state[f"ema.module.module.{name}"])


@pytest.mark.parametrize(("kind", "guidance"), [("sd3", 2.5), ("flux", 3.0)])
def test_a_pipeline_with_the_trained_folder_makes_what_the_model_makes(
    kind, guidance, pipeline_folders, captioned, tmp_path
):
    run = tmp_path / "run"
    distill(
        distillation(
            kind,
            pipeline_folders,
            encode(encoding(kind, pipeline_folders, captioned, tmp_path / "data")),
            run,
        )
    )
    plan = ft.Plan.parse("H1P1R1", shift=1.7)
    model = ft.from_pipeline(pipeline_folders[kind], run, image_size=SIZE, device="cpu")
    noise = ft.noise(model.latent_shape, 5, range(1))
    expected = ft.sample(model, plan, ["a fox"], guidance=guidance, noise=noise)
    pipe = load_pipeline(pipeline_folders[kind])
    pipe.set_progress_bar_config(disable=True)
    latents = packed(noise) if kind == "flux" else noise
    length = {} if kind == "sd3" else {"max_sequence_length": 512}
    with ft.accelerated(pipe, plan, run):
        made = pipe(
            "a fox",
            guidance_scale=guidance,
            latents=latents,
            height=SIZE,
            width=SIZE,
            output_type="latent",
            **length,
        ).images
    assert_close(unpacked(made, *noise.shape[2:]) if kind == "flux" else made, expected, 1e-5)


def test_a_stopped_distillation_goes_on_to_the_same_weights(pipeline_folders, captioned, tmp_path):
    data = encode(encoding("flux", pipeline_folders, captioned, tmp_path / "data"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distill(distillation("flux", pipeline_folders, data, whole))
    distill(distillation("flux", pipeline_folders, data, parts, steps=3))
    distill(distillation("flux", pipeline_folders, data, parts))
    for name in ("diffusion_pytorch_model.safetensors", "state.safetensors"):
        a, b = (load_tensors(folder / name)[0] for folder in (whole, parts))
        assert a.keys() == b.keys()
        assert all(a[key].equal(b[key]) for key in a)
    assert (whole / "config.json").read_text() == (parts / "config.json").read_text()


def test_a_teacher_and_data_that_do_not_fit_are_refused(pipeline_folders, captioned, tmp_path):
    data = encode(encoding("2rf", pipeline_folders, captioned, tmp_path / "data"))
    with pytest.raises(ValueError, match="convention='2-rf' must be given"):
        distill(distillation("2rf", pipeline_folders, data, tmp_path / "run", convention="auto"))
    with pytest.raises(ValueError, match="convention='2-rf' is for"):
        distill(
            Distill(
                out=tmp_path / "run",
                teacher="digits",
                data="digits",
                convention="2-rf",
                device="cpu",
            )
        )
    with pytest.raises(ValueError, match="wrote, got"):
        distill(distillation("2rf", pipeline_folders, tmp_path / "none", tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        distill(
            replace(
                distillation("2rf", pipeline_folders, data, tmp_path / "run"), teacher=str(tmp_path)
            )
        )
    assert not (tmp_path / "run").exists()
