"""Images without noise or edges, which survive JPEG and resizing."""

import numpy as np


def pixels(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """An image of waves, which resizing does not blur away."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(rng.uniform(0.05, 0.6) * y + rng.uniform(0.05, 0.6) * x + rng.uniform(0, 6))
        for _ in range(3)
    ]
    return np.round(127.5 + 127 * np.stack(waves, axis=-1)).astype(np.uint8)
