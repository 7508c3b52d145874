"""Inception v3 features for FID, as torch-fidelity computes them, and their cache on disk."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowturbo_kernels._cache import cache_folder

from ..checks import listed
from ..models.not_finite import NotFiniteError, not_finite_rows
from ..storage.files import CheckpointError, load_torch_file, save_tensors, user_path
from ..storage.provenance import file_digest
from ..storage.resume import remove_partial_files, resumed_tensors
from .image_sets import ImageSet


class Features(NamedTuple):
    """Features of N images, float32 on the CPU: pool (N, D), spatial (N, S)."""

    pool: Tensor
    spatial: Tensor


class FeatureNetwork(Protocol):
    """The interface of a network whose features are compared."""

    description: dict[str, Any]
    """Its provenance in a report; an evaluation resumes only with the same. "widths": [D, S]."""

    def read(self, images: np.ndarray) -> Features:
        """images (N, height, width, 3) uint8."""
        ...

    def logits(self, pool: Tensor) -> Tensor:
        """pool (N, D) -> logits (N, classes), for the inception score."""
        ...


WEIGHTS = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""The file names under which torch-fidelity and pytorch-fid publish the same weights."""
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS[0]}"
SHA256 = "6726825d"
"""The first digits of the weights' digest, which both names end with."""

SPATIAL_CHANNELS = 7


class Inception:
    """Inception v3 of 2015-12-05, the network of ADM's FID protocol, in torch-fidelity's port.

    Images are resized to 299 x 299 as TensorFlow 1 does (bilinear, corners not aligned, no
    half-pixel centres, no antialiasing) and scaled to (x - 128) / 128. It runs in float32 without
    TF32.

    pool: "pool_3:0" of the TensorFlow graph, 2048 features.
    spatial: the first 7 channels of "mixed_6/conv:0", 17 x 17, flattened as (height, width,
        channel), which is TensorFlow's order and so that of mu_s and sigma_s in ADM's files.
    logits: without the bias, as in ADM's evaluator and the inception score's own code.

    "mixed_6/conv" is Mixed_6d.branch1x1 after its ReLU. That module follows from torch-fidelity's
    weight converter, which maps mixed_6/conv/conv2d_params to Mixed_6d.branch1x1.conv. The ReLU
    follows from the graph's node names: a layer's nodes are conv2d_params, Conv2D, batchnorm,
    CheckNumerics, control_dependency and last the layer's bare name, which alone can be the
    activation. It has not been compared with TensorFlow's own values.
    """

    def __init__(
        self, weights: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """weights: path of one of WEIGHTS, by default the one that `find_weights` returns.

        CheckpointError for a file of other content, ValueError without torch-fidelity.
        """
        path = find_weights(weights)
        digest = file_digest(path)
        if not str(digest).startswith(SHA256):
            raise CheckpointError(
                f"{path} does not hold the weights of {WEIGHTS[0]}, whose SHA-256 begins with "
                f"{SHA256}: this file's is {digest}"
            )
        # The extractor unpickles its file without restrictions. It gets a copy in memory of the
        # tensors, which were loaded with weights_only.
        copy = io.BytesIO()
        torch.save(load_torch_file(path), copy)
        copy.seek(0)
        extractor = _extractor()
        with torch.random.fork_rng(devices=[]):  # layers draw random weights before these are set
            network: nn.Module = extractor(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=copy
            )
        self.network: Any = network.to(device)
        self.device = torch.device(device)
        self.description = {
            "name": "Inception v3 of 2015-12-05",
            "code": f"torch-fidelity {importlib.metadata.version('torch-fidelity')}",
            "weights_sha256": digest,
            "dtype": "float32",
            "widths": [2048, 17 * 17 * SPATIAL_CHANNELS],
        }

    @torch.no_grad()
    def read(self, images: np.ndarray) -> Features:
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        spatial: list[Tensor] = []
        branch = self.network.Mixed_6d.branch1x1
        hook = branch.register_forward_hook(
            lambda module, inputs, output: spatial.append(output[:, :SPATIAL_CHANNELS].clone())
        )
        try:
            with torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ):
                (pool,) = self.network(pixels)
        finally:
            hook.remove()
        return Features(pool.cpu(), spatial[0].permute(0, 2, 3, 1).flatten(1).cpu())

    def logits(self, pool: Tensor) -> Tensor:
        return pool.double() @ self.network.fc.weight.detach().double().cpu().T


def find_weights(path: str | os.PathLike[str] | None = None) -> Path:
    """The file of Inception's weights.

    It is `path` if set, else the file that FLOWTURBO_INCEPTION names, else one of WEIGHTS in
    FLOWTURBO_CACHE (by default ~/.cache/flowturbo) or in torch hub's checkpoints, where
    torch-fidelity and pytorch-fid store it. Nothing is downloaded: CheckpointError says which file
    to put where.
    """
    explicit = path or os.environ.get("FLOWTURBO_INCEPTION")
    if explicit:
        path = user_path(explicit)
        if not path.is_file():
            raise CheckpointError(
                f"{path}, named as the weights of Inception, does not exist: {_cure(path.parent)}"
            )
        return path
    cache = cache_folder()
    folders = (cache, Path(torch.hub.get_dir()) / "checkpoints")
    files = [folder / name for folder in folders for name in WEIGHTS if (folder / name).is_file()]
    if not files:
        raise CheckpointError(
            f"the weights of Inception are not in {' or '.join(map(str, folders))}: {_cure(cache)}"
        )
    return files[0]


def _cure(folder: Path) -> str:
    return (
        f"download {URL} (91 MB) and put it into {folder}, or name the file by --inception or "
        "FLOWTURBO_INCEPTION"
    )


def _extractor() -> Any:
    """torch-fidelity's Inception class.

    Its package's __init__ imports torchvision, which only other networks need. So the module is
    imported without running that __init__.
    """
    package, module = "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"
    if package in sys.modules:
        return importlib.import_module(module).FeatureExtractorInceptionV3
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(
            "these metrics need torch-fidelity: pip install 'flowturbo[metrics]', or, so that its "
            "dependency torchvision does not "
            "replace your torch, pip install --no-deps torch-fidelity"
        )
    without_init = types.ModuleType(package)
    without_init.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[package] = without_init
    try:
        return importlib.import_module(module).FeatureExtractorInceptionV3
    finally:  # a later import of the package must get all of it
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]


SHARD = 1000
"""Images per file of features, rounded down to whole batches: an interrupted run loses at most so
many.
"""


def stored_features(
    images: ImageSet,
    network: FeatureNetwork,
    folder: Path,
    identity: Mapping[str, Any],
    batch_size: int,
) -> Features:
    """The features of all images, cached in `folder` in files of about SHARD images.

    identity: what the features depend on, with JSON types. ValueError for a cached file of another
    identity, CheckpointError for a damaged one.
    """
    size = batch_size * max(1, SHARD // batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial_files(folder, "*")
    parts = []
    with tqdm(total=len(images), disable=None, unit="image", desc=folder.name) as bar:
        for first in range(0, len(images), size):
            count = min(size, len(images) - first)
            path = folder / f"{first:08d}.safetensors"
            shard_identity = {**identity, "first": first, "count": count}
            tensors = resumed_tensors(path, shard_identity)
            if tensors is None:
                rows = range(first, first + count)
                tensors = _read_features(images, network, rows, batch_size, bar)
                save_tensors(path, tensors, shard_identity)
            else:
                bar.update(count)
            parts.append(tensors)
    return Features(*(torch.cat([part[name] for part in parts]) for name in Features._fields))


def _read_features(
    images: ImageSet, network: FeatureNetwork, rows: range, batch_size: int, bar: Any
) -> dict[str, Tensor]:
    batches = []
    for first in range(rows.start, rows.stop, batch_size):
        count = min(batch_size, rows.stop - first)
        batch = network.read(images.read(first, count))
        if broken := {i for part in batch for i in not_finite_rows(part)}:
            raise NotFiniteError(
                f"features must be finite, but those of these images are not: "
                f"{listed([first + i for i in sorted(broken)])}"
            )
        batches.append(batch)
        bar.update(count)
    return {
        name: torch.cat(values)
        for name, values in zip(Features._fields, zip(*batches, strict=True), strict=True)
    }
