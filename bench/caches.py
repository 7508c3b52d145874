"""First-block caching beside plans, on the bundled digits: how many calls it spares, and how close
the images stay to the fine solution.

    python bench/caches.py --images 100

The cache is diffusers' FirstBlockCache, on the whole batch: where the first block's change of its
input differs from that of the last full call by at most the threshold (mean magnitude of the
difference over that of the change), the other blocks' change of that call is added instead of
theirs.
"""

from __future__ import annotations

import argparse
import copy

import torch
from plain_sit import PlainSiT
from torch import Tensor, nn

import flowturbo as ft

PLANS = ("A4", "H1A3", "H1A4", "H1A5", "H1A6", "A6", "H2A3E1", "H3E1", "H4E1")
FINE = "C80"


class FirstBlockCache(nn.Module):
    """A SiT with the cache. full: the number of calls that ran all blocks."""

    def __init__(self, network: PlainSiT, threshold: float) -> None:
        super().__init__()
        self.network, self.threshold, self.full = network, threshold, 0
        self.change: Tensor | None = None
        self.rest: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        network = self.network
        first, *others = network.blocks
        h, c = network.embed(x, v), network.t_embedder(t) + network.y_embedder(y)
        ahead = first(h, c)
        if self.change is None or not self._close(ahead - h, self.change):
            self.change, self.full, h = ahead - h, self.full + 1, ahead
            for block in others:
                h = block(h, c)
            self.rest = h - ahead
        assert self.rest is not None
        return network.unpatchify(network.final_layer(ahead + self.rest, c))

    def _close(self, change: Tensor, last: Tensor) -> bool:
        return float((change - last).abs().mean() / last.abs().mean()) <= self.threshold


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--fine", default=FINE, help="plan of the fine solution")
    options = parser.parse_args()
    model = ft.load("digits", device="cpu", dtype=torch.float32)
    common = dict(guidance=options.guidance, seed=0)
    labels = torch.arange(options.images) % model.num_classes
    fine = ft.sample(model, options.fine, labels, **common)
    print("| plan | calls | RMS | full calls with the cache | RMS with the cache |")
    print("|---|--:|--:|--:|--:|")
    for plan in options.plans:
        cached = copy.copy(model)
        cached.predictor = FirstBlockCache(PlainSiT.of(model.predictor), options.threshold)
        errors = [
            (ft.sample(m, plan, labels, **common) - fine).pow(2).mean().sqrt()
            for m in (model, cached)
        ]
        calls = ft.Plan.parse(plan).cost.predictor
        print(
            f"| `{plan}` | {calls} | {errors[0]:.3f} | {cached.predictor.full} | {errors[1]:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
