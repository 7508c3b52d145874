"""What each operation means, written out in its formula."""

import math

import torch

# What each operation means, written out in its formula.


def each_row(modulation, rows):
    """Of (N + 1, D) the last is the row of a whole half."""
    return torch.stack([modulation[min(b, len(modulation) - 1)] for b in range(rows)])


def long_adaln(x, shift, scale, eps=1e-6):
    shift, scale = each_row(shift, len(x)), each_row(scale, len(x))
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + eps) ** 0.5 * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def long_seam(x, y, gate, shift, scale, eps=1e-6):
    gate = each_row(gate, len(x))
    total = torch.stack([x[b] + gate[b] * y[b] for b in range(len(x))])
    return total, long_adaln(total, shift, scale, eps)


def long_attention(qkv):
    B, T, _, heads, head_dim = qkv.shape
    out = torch.empty(B, T, heads * head_dim, dtype=qkv.dtype)
    for b in range(B):
        for h in range(heads):
            q, k, v = (qkv[b, :, j, h] for j in range(3))
            scores = (q @ k.T / math.sqrt(head_dim)).exp()
            out[b, :, h * head_dim : (h + 1) * head_dim] = scores @ v / scores.sum(1, keepdim=True)
    return out


def long_linear(x, weight, bias, activation=None):
    y = torch.einsum("...k,nk->...n", x, weight) + bias
    if activation is None:
        return y
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def long_patch_embed(x, weight, bias, v=None, positions=None, copies=1, ahead=None, step=0.0):
    if ahead is not None:
        x = torch.stack([x[b] + step * ahead[b] for b in range(len(x))])
    both = (
        x if v is None else torch.stack([torch.cat([x[b % len(x)], v[b]]) for b in range(len(v))])
    )
    p = weight.shape[-1]
    patches = [
        both[:, :, row : row + p, column : column + p].reshape(len(both), -1)
        for row in range(0, x.shape[2], p)
        for column in range(0, x.shape[3], p)
    ]
    tokens = torch.stack(patches, 1) @ weight.reshape(len(weight), -1).T + bias
    tokens = tokens if positions is None else tokens + positions
    return torch.cat([tokens] * copies)


def long_velocity_update(x, velocities, weights):
    out = x.clone()
    for n in range(len(x)):
        for v, weight in zip(velocities, weights, strict=True):
            out[n] += weight * v[n]
    return out


def long_guide(v, scale, channels):
    out, N = v.clone(), len(v) // 2
    for n in range(N):
        s = scale if isinstance(scale, float) else float(scale[n])
        for c in range(channels):
            out[n, c] = out[N + n, c] = v[N + n, c] + s * (v[n, c] - v[N + n, c])
    return out


def long_guided_update(x, raw, scale, channels, weight, base=None, velocities=(), weights=()):
    v = raw if scale is None else long_guide(raw, scale, channels)
    v = v if base is None else v + base
    return long_velocity_update(x, [v, *velocities], [weight, *weights]), v


def long_final_update(
    tokens, shift, scale, weight, bias, x, guidance, channels, weight_v, base=None, velocities=(),
    weights=(), eps=1e-6, branch=None, gate=None, sign=1.0,
):  # fmt: skip
    if branch is not None:
        tokens = long_seam(tokens, branch, gate, shift, scale)[0]
    h = long_adaln(tokens, shift, scale)
    C, H, W = x.shape[1:]
    p = math.isqrt(H * W // tokens.shape[1])
    outputs = len(weight) // p**2
    raw = x.new_zeros(len(tokens), C, H, W)
    for token in range(tokens.shape[1]):
        top, left = token // (W // p) * p, token % (W // p) * p
        for i in range(p):
            for j in range(p):
                for c in range(C):
                    row = (i * p + j) * outputs + c
                    raw[:, c, top + i, left + j] = sign * (h[:, token] @ weight[row] + bias[row])
    return long_guided_update(x, raw, guidance, channels, weight_v, base, velocities, weights)


def long_group_norm_silu(x, weight, bias, groups, eps=1e-6):
    out = torch.empty_like(x)
    size = x.shape[1] // groups
    for n in range(len(x)):
        for g in range(groups):
            part = x[n, g * size : (g + 1) * size]
            normal = (part - part.mean()) / (((part - part.mean()) ** 2).mean() + eps) ** 0.5
            y = (
                normal * weight[g * size : (g + 1) * size, None, None]
                + bias[g * size : (g + 1) * size, None, None]
            )
            out[n, g * size : (g + 1) * size] = y / (1 + (-y).exp())
    return out


def long_shifted_group_norm(x, shift, weight, bias, groups, eps, silu):
    if shift is not None:
        x = torch.stack([x[:, c] + shift[c] for c in range(len(shift))], dim=1)
    size = x.shape[1] // groups
    parts = x.unflatten(1, (groups, size))
    mean = parts.sum((2, 3, 4), keepdim=True) / parts[0, 0].numel()
    variance = ((parts - mean) ** 2).sum((2, 3, 4), keepdim=True) / parts[0, 0].numel()
    y = ((parts - mean) / (variance + eps) ** 0.5).flatten(1, 2)
    y = torch.einsum("nchw,c->nchw", y, weight) + bias[:, None, None]
    return y / (1 + (-y).exp()) if silu else y


def long_shifted_sum(y, shift, residual, residual_shift):
    total = torch.stack([y[:, c] + shift[c] for c in range(len(shift))], dim=1)
    if residual is not None:
        total = residual + total
    return total if residual_shift is None else total + residual_shift.view(1, -1, 1, 1)


def long_residual_group_norm(y, shift, residual, residual_shift, *norm):
    h = long_shifted_sum(y, shift, residual, residual_shift)
    return h, long_shifted_group_norm(h, None, *norm)


def long_double_pixels(x, *others):
    x = long_shifted_sum(x, *others) if others else x
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def long_interleaved_group_norm(y, shift, *norm):
    N, C, H, W = y.shape[0], y.shape[1] // 4, y.shape[2] - 1, y.shape[3] - 1
    h = y.new_zeros(N, C, 2 * H, 2 * W)
    for row in range(2 * H):
        for column in range(2 * W):
            part = 2 * (row % 2) + column % 2
            at = (row + 1) // 2, (column + 1) // 2
            h[:, :, row, column] = y[:, part * C : (part + 1) * C, at[0], at[1]] + shift
    return h, long_shifted_group_norm(h, None, *norm)


def long_linear_gated_residual(x, weight, bias, residual, gate):
    y = long_linear(x, weight, bias)
    return torch.stack([residual[b] + gate[b] * y[b] for b in range(len(x))])


def long_conditions(embedded, times, weight1, bias1, weight2, bias2, null=None):
    def silu(x):
        return x / (1 + (-x).exp())

    half = weight1.shape[1] // 2
    labels = list(embedded) + ([] if null is None else [null])
    out = embedded.new_zeros(len(times), len(labels), len(bias1))
    for s, t in enumerate(times):
        angles = [t / 10_000 ** (k / half) for k in range(half)]
        features = [*map(math.cos, angles), *map(math.sin, angles)]
        hidden = silu(weight1 @ torch.tensor(features, dtype=embedded.dtype) + bias1)
        for n, label in enumerate(labels):
            out[s, n] = silu(weight2 @ hidden + bias2 + label)
    return out


MEANING = {
    "adaln_modulate": long_adaln,
    "gated_residual_adaln": long_seam,
    "attention": long_attention,
    "linear": long_linear,
    "linear_gated_residual": long_linear_gated_residual,
    "patch_embed": long_patch_embed,
    "conditions": long_conditions,
    "velocity_update": long_velocity_update,
    "guide": long_guide,
    "guided_update": long_guided_update,
    "final_update": long_final_update,
    "group_norm_silu": long_group_norm_silu,
    "shifted_group_norm": long_shifted_group_norm,
    "shifted_sum": long_shifted_sum,
    "residual_group_norm": long_residual_group_norm,
    "double_pixels": long_double_pixels,
    "interleaved_group_norm": long_interleaved_group_norm,
}
