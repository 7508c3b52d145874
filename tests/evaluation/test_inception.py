"""Inception by torch-fidelity's code, on random weights in a file of the published layout; and
where its weights are looked for.
"""

import subprocess
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inception_weights import random_weights

from flowturbo.evaluation import inception
from flowturbo.evaluation.inception import WEIGHTS, Inception, find_weights
from flowturbo.storage.files import CheckpointError

needs_torch_fidelity = pytest.mark.skipif(
    find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    if find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    path = tmp_path_factory.mktemp("weights") / WEIGHTS[0]
    torch.save(random_weights(), path)
    return path


@pytest.fixture
def network(weights, monkeypatch) -> Inception:
    monkeypatch.setattr(inception, "SHA256", sha256(weights.read_bytes()).hexdigest()[:8])
    return Inception(weights)


IMAGES = np.random.default_rng(1).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)


def resize_as_tensorflow_1(images: np.ndarray) -> torch.Tensor:
    """(N, height, width, 3) -> (N, 3, 299, 299): output pixel i reads between floor(i * scale) and
    the next, in float64.
    """
    x = images.astype(np.float64)
    for axis in (1, 2):
        at = np.arange(299) * (x.shape[axis] / 299)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        weight = np.expand_dims(at - low, [i for i in range(4) if i != axis])
        x = x.take(low, axis) * (1 - weight) + x.take(high, axis) * weight
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def unit(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A convolution of Inception, batch normalisation and ReLU, in float64; padded as its kernel's
    shape needs in Mixed_5 and 6.
    """
    kernel = w[f"{name}.conv.weight"].double()
    valid = (
        name.startswith(("Conv2d_1a", "Conv2d_2a", "Conv2d_4a", "Mixed_6a.branch3x3dbl_3"))
        or name == "Mixed_6a.branch3x3"
    )
    stride = (
        2
        if name.startswith(("Conv2d_1a", "Mixed_6a.branch3x3dbl_3")) or name == "Mixed_6a.branch3x3"
        else 1
    )
    padding = (0, 0) if valid else tuple(k // 2 for k in kernel.shape[2:])
    x = F.conv2d(x, kernel, stride=stride, padding=padding)
    mean, var, scale, shift = (
        w[f"{name}.bn.{k}"].double()[:, None, None]
        for k in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-3).sqrt() * scale + shift).relu()


def mixed_6_conv(images: np.ndarray, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first 1 x 1 convolution of Mixed_6d, long-hand, (N, 192, 17, 17)."""

    def chain(x: torch.Tensor, block: str, *names: str) -> torch.Tensor:
        for name in names:
            x = unit(x, w, f"{block}.{name}")
        return x

    def pooled(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    x = (resize_as_tensorflow_1(images) - 128) / 128
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
        x = unit(x, w, name)
    x = F.max_pool2d(x, 3, 2)
    for name in ("Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        x = unit(x, w, name)
    x = F.max_pool2d(x, 3, 2)
    triple = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(x, block, "branch5x5_1", "branch5x5_2"),
                chain(x, block, *triple),
                chain(pooled(x), block, "branch_pool"),
            ],
            dim=1,
        )
    x = torch.cat(
        [chain(x, "Mixed_6a", "branch3x3"), chain(x, "Mixed_6a", *triple), F.max_pool2d(x, 3, 2)],
        dim=1,
    )
    for block in ("Mixed_6b", "Mixed_6c"):
        x = torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(x, block, *(f"branch7x7_{i}" for i in (1, 2, 3))),
                chain(x, block, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
                chain(pooled(x), block, "branch_pool"),
            ],
            dim=1,
        )
    return chain(x, "Mixed_6d", "branch1x1")


def test_spatial_features_are_seven_channels_of_mixed_6_conv_in_tensorflows_order(network, weights):
    features = network.read(IMAGES)
    expected = mixed_6_conv(IMAGES, torch.load(weights, weights_only=True))[:, :7]
    assert features.spatial.shape == (3, 17 * 17 * 7)
    spatial = features.spatial.view(3, 17, 17, 7).double().permute(0, 3, 1, 2)
    assert (spatial - expected).abs().max() < 1e-4 * expected.abs().max()
    assert ((expected > 0).double().mean() - 0.5).abs() < 0.45  # neither all cut off nor none


def test_pool_features_and_logits_are_the_librarys(network, weights):
    """Asked for both at once, as torch-fidelity's own evaluation asks."""
    features = network.read(IMAGES)
    direct = inception._extractor()(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
    )
    pool, logits = direct(torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    assert features.pool.dtype == torch.float32
    assert features.pool.equal(pool)
    assert pool.std() > 1e-3
    assert (network.logits(features.pool) - logits).abs().max() < 1e-5 * logits.abs().max()
    assert network.description["widths"] == [pool.shape[1], features.spatial.shape[1]]


def test_reading_is_in_float32_and_leaves_nothing_behind(network, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    tf32 = []
    network.network.register_forward_pre_hook(
        lambda *_: tf32.append(torch.backends.cudnn.allow_tf32)
    )
    one, two = network.read(IMAGES), network.read(IMAGES)
    assert tf32 == [False, False]
    assert torch.backends.cudnn.allow_tf32
    assert one.pool.equal(two.pool)
    assert one.spatial.equal(two.spatial)
    assert not network.network.Mixed_6d.branch1x1._forward_hooks


def test_loading_draws_no_random_number(weights, monkeypatch):
    monkeypatch.setattr(inception, "SHA256", "")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Inception(weights)
    assert torch.get_rng_state().equal(before)


@needs_torch_fidelity
def test_neither_torchvision_nor_the_rest_of_torch_fidelity_is_imported():
    code = """
import sys
from flowturbo.evaluation import inception
assert inception._extractor().__name__ == "FeatureExtractorInceptionV3"
left = [name for name in sys.modules if name.split(".")[0] in ("torchvision", "torch_fidelity")]
assert not left, left
assert inception._extractor().__name__ == "FeatureExtractorInceptionV3"
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr


def test_without_torch_fidelity_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(inception, "SHA256", "")
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError,
        match=r"pip install 'flowturbo\[metrics\]'.*pip install --no-deps torch-fidelity",
    ):
        Inception(tmp_path / "weights.pth")


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("FLOWTURBO_INCEPTION", raising=False)
    return tmp_path


def test_missing_weights_are_asked_for_by_name_and_place(nowhere):
    with pytest.raises(CheckpointError) as error:
        find_weights()
    assert f"download {inception.URL} (91 MB) and put it into {nowhere / 'cache'}" in str(
        error.value
    )
    with pytest.raises(
        CheckpointError,
        match=r"mine.pth, named as the weights of Inception, does not exist: download https",
    ):
        Inception(nowhere / "mine.pth")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("folder", ["cache", "torch/hub/checkpoints"])
def test_weights_are_found_where_they_are_put(nowhere, monkeypatch, folder, name):
    path = nowhere / folder / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert find_weights() == path
    other = nowhere / "other.pth"
    other.write_bytes(b"")
    monkeypatch.setenv("FLOWTURBO_INCEPTION", str(other))
    assert find_weights() == other
    assert find_weights(path) == path


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / WEIGHTS[0]
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(
        CheckpointError,
        match=(
            "whose SHA-256 begins with 6726825d: this file's is "
            f"{sha256(path.read_bytes()).hexdigest()}"
        ),
    ):
        Inception(path)


class Canary:
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


def test_weights_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inception, "SHA256", "")
    torch.save({"fc.weight": Canary()}, "weights.pth")
    with pytest.raises(CheckpointError, match="is no whole torch file of plain tensors"):
        Inception("weights.pth")
    assert not Path("canary").exists()
