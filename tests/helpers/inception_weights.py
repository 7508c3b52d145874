"""Random weights of Inception's shapes."""

from pathlib import Path

import pytest
import torch

from flowturbo.evaluation import inception


def random_weights() -> dict[str, torch.Tensor]:
    """Of the network's own shapes, of such sizes that activations neither vanish nor grow."""
    kind = inception._extractor()
    blank = type("Blank", (kind,), {"load_state_dict": lambda self, state: None})
    generator = torch.Generator().manual_seed(0)
    path = Path(__file__)  # any file: reading it is stubbed out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        state = blank("blank", ["2048"], feature_extractor_weights_path=path).state_dict()
    for name, value in state.items():
        if value.ndim > 1:
            state[name] = (
                torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
            )
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 0.8 + 0.4 * torch.rand(value.shape, generator=generator)
        elif value.is_floating_point():
            state[name] = 0.1 * torch.randn(value.shape, generator=generator)
    return {
        name: value for name, value in state.items() if not name.endswith("num_batches_tracked")
    }
