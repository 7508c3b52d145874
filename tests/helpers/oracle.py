"""A second, plain implementation of SiT and of FlowTurbo sampling, to test the library against.

It needs torch alone and shares no code with the package. Names follow the FlowTurbo paper
(arXiv 2409.18128): x is the latent, v a velocity, d the slope at the start of a step, d' the slope
at its end. Where paper and public code differ, this follows the public code. Nothing here casts:
weights, noise and result have one dtype, float32 or float64, which the caller chooses.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

StateDict = dict[str, Tensor]
Velocity = Callable[[Tensor, float], Tensor]  # v(x, t)
Offset = Callable[[Tensor, float, Tensor], Tensor]  # r(x, t, v)
Step = tuple[Tensor, Tensor]  # (x, cache)


def _linear(sd: StateDict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, sd[f"{name}.weight"], sd[f"{name}.bias"])


def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift, where LN has eps 1e-6 and no affine of its own."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    normed = centred / torch.sqrt(variance + 1e-6)
    return normed * (1 + scale[:, None, :]) + shift[:, None, :]


def _timestep_embedding(sd: StateDict, t: Tensor) -> Tensor:
    """256 sinusoids of t in [0, 1], cosines first, longest period 10 000; Linear, SiLU, Linear."""
    k = torch.arange(128, dtype=t.dtype, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(10_000.0) * k / 128)[None, :]
    features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    return _linear(sd, "t_embedder.mlp.2", F.silu(_linear(sd, "t_embedder.mlp.0", features)))


def _attention(sd: StateDict, name: str, x: Tensor, heads: int) -> Tensor:
    """Multi-head self-attention; the qkv output is laid out (3, heads, head_dim)."""
    n, tokens, width = x.shape
    head_dim = width // heads
    qkv = _linear(sd, f"{name}.qkv", x).reshape(n, tokens, 3, heads, head_dim)
    q, k, v = (qkv[:, :, j].transpose(1, 2) for j in range(3))
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(head_dim), dim=-1)
    out = (weights @ v).transpose(1, 2).reshape(n, tokens, width)
    return _linear(sd, f"{name}.proj", out)


def sit_forward(
    sd: StateDict, heads: int, x: Tensor, t: Tensor, y: Tensor, velocity_channels: int = 4
) -> Tensor:
    """The SiT trunk (public code), sized by its weights; x (N, C, H, W), t (N,), y (N,).

    The predictor reads x of 4 channels; the refiner is the same trunk reading concat([x, v]), 8
    channels. Learned sigma doubles the output; only its first `velocity_channels` are returned.
    """
    patch = sd["x_embedder.proj.weight"].shape[-1]
    depth = len([name for name in sd if name.endswith(".attn.qkv.weight")])
    n, _, height, width = x.shape

    z = F.conv2d(x, sd["x_embedder.proj.weight"], sd["x_embedder.proj.bias"], stride=patch)
    z = z.flatten(2).transpose(1, 2) + sd["pos_embed"]
    silu_c = F.silu(_timestep_embedding(sd, t) + sd["y_embedder.embedding_table.weight"][y])

    for i in range(depth):
        b = f"blocks.{i}"
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = _linear(
            sd, f"{b}.adaLN_modulation.1", silu_c
        ).chunk(6, dim=1)
        attended = _attention(sd, f"{b}.attn", _modulated_norm(z, shift_msa, scale_msa), heads)
        z = z + gate_msa[:, None, :] * attended
        hidden = _linear(sd, f"{b}.mlp.fc1", _modulated_norm(z, shift_mlp, scale_mlp))
        hidden = F.gelu(hidden, approximate="tanh")
        z = z + gate_mlp[:, None, :] * _linear(sd, f"{b}.mlp.fc2", hidden)

    shift, scale = _linear(sd, "final_layer.adaLN_modulation.1", silu_c).chunk(2, dim=1)
    z = _linear(sd, "final_layer.linear", _modulated_norm(z, shift, scale))
    z = z.reshape(n, height // patch, width // patch, patch, patch, -1)  # (n, h, w, p, q, c)
    image = z.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, height, width)  # (n, c, h p, w q)
    return image[:, :velocity_channels]


def guide(out: Tensor, scale: float, channels: int | None = 3) -> Tensor:
    """Classifier-free guidance of [conditional; unconditional] stacked on the batch axis.

    The first `channels` become u + s (c - u) in both halves, the rest keep their own half's value
    (public code: 3 of 4). None guides every channel, the other convention.
    """
    c, u = out.chunk(2, dim=0)
    k = out.shape[1] if channels is None else channels
    guided = u[:, :k] + scale * (c[:, :k] - u[:, :k])
    return torch.cat([torch.cat([guided, c[:, k:]], 1), torch.cat([guided, u[:, k:]], 1)], 0)


# The steps. x is the conditional half's latent, (N, C, H, W). With guidance v(x, t) and r(x, t, v)
# return both halves, (2N, C, H, W), and so does the cache; [:n] takes the conditional half. Without
# guidance they return (N, C, H, W) and [:n] takes everything.


def heun_step(v: Velocity, x: Tensor, t: float, t_next: float) -> Step:
    """H, the Heun step of the FlowTurbo paper; the slope at the predicted point is cached."""
    n, dt = len(x), t_next - t
    d = v(x, t)
    x_tilde = x + dt * d[:n]
    d_prime = v(x_tilde, t_next)
    return x + dt / 2 * (d[:n] + d_prime[:n]), d_prime


def pseudo_corrector_step(
    v: Velocity, x: Tensor, t: float, t_next: float, cache: Tensor | None
) -> Step:
    """P, the paper's pseudo corrector: Heun, but d is the cached d', evaluated if there is none."""
    n, dt = len(x), t_next - t
    d = v(x, t) if cache is None else cache
    x_tilde = x + dt * d[:n]
    d_prime = v(x_tilde, t_next)
    return x + dt / 2 * (d[:n] + d_prime[:n]), d_prime


def refiner_step(r: Offset, x: Tensor, t: float, t_next: float, cache: Tensor) -> Step:
    """R, the velocity refiner's step as in the public code (not the paper's eq. 7).

    Both calls read the same cached velocity, the second offset is added to d, and d is cached.
    """
    n, dt = len(x), t_next - t
    d = r(x, t, cache) + cache
    x_tilde = x + dt * d[:n]
    d_prime = r(x_tilde, t_next, cache) + d
    return x + dt / 2 * (d[:n] + d_prime[:n]), d


@torch.no_grad()
def run(
    plan_counts: tuple[int, int, int],
    predictor_sd: StateDict,
    refiner_sd: StateDict | None,
    heads: int,
    noise: Tensor,
    labels: Tensor,
    guidance: float,
    channels: int | None = 3,
) -> Tensor:
    """The latents, shaped as noise, after H<n>P<n>R<n> on t_i = i / N from noise at t = 0.

    Every call, of predictor and refiner alike, is guided; the refiner's offset is guided before it
    is added to the velocity (public code). The null class is the last row of the label table.
    """
    null = predictor_sd["y_embedder.embedding_table.weight"].shape[0] - 1
    y = torch.cat([labels, torch.full_like(labels, null)])

    def v(x: Tensor, t: float) -> Tensor:
        both = torch.cat([x, x])
        out = sit_forward(predictor_sd, heads, both, both.new_full((len(both),), t), y)
        return guide(out, guidance, channels)

    def r(x: Tensor, t: float, velocity: Tensor) -> Tensor:
        assert refiner_sd is not None
        both = torch.cat([torch.cat([x, x]), velocity], dim=1)
        out = sit_forward(refiner_sd, heads, both, both.new_full((len(both),), t), y)
        return guide(out, guidance, channels)

    (n_h, n_p, _), total = plan_counts, sum(plan_counts)
    x, cache = noise, None
    for i in range(total):
        t, t_next = i / total, (i + 1) / total
        if i < n_h:
            x, cache = heun_step(v, x, t, t_next)
        elif i < n_h + n_p:
            x, cache = pseudo_corrector_step(v, x, t, t_next, cache)
        elif cache is None:
            raise ValueError("a plan cannot start with a refiner step: it needs a cached velocity")
        else:
            x, cache = refiner_step(r, x, t, t_next, cache)
    return x
