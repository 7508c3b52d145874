"""What quack's products do with their sums, in its language: a function of one number of the
product, which quack compiles into its kernels. Importing this imports quack.

acc: the sum, in float32. bias, gate and weight_scale are of a column, scale of a row, c of the
residual, out_scale of all, all widened to float32; what is returned is rounded to the result's
dtype, in fp8 within its range. The reciprocal of out_scale is the same for all, so the compiler
takes it out of the loop over numbers.
"""

from __future__ import annotations

from quack.activation import gelu_tanh_approx
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import ColVecLoad, RowVecLoad

_BIAS = {"bias": RowVecLoad("bias")}
_GATED = {**_BIAS, "gate": RowVecLoad("gate")}
_SCALED = {
    **_BIAS,
    "scale": ColVecLoad("scale"),
    "weight_scale": RowVecLoad("weight_scale"),
}


@gemm_epilogue(ops=_BIAS)
def with_bias(acc, bias):
    return {"D": acc + bias}


@gemm_epilogue(ops=_BIAS)
def with_gelu(acc, bias):
    return {"D": gelu_tanh_approx(acc + bias)}


@gemm_epilogue(ops=_GATED)
def gated_residual(acc, c, bias, gate):
    return {"D": c + gate * (acc + bias)}


@gemm_epilogue(ops=_SCALED)
def scaled(acc, scale, weight_scale, bias):
    return {"D": acc * scale * weight_scale + bias}


@gemm_epilogue(ops=_SCALED)
def scaled_gelu(acc, scale, weight_scale, bias):
    return {"D": gelu_tanh_approx(acc * scale * weight_scale + bias)}


@gemm_epilogue(ops=_SCALED)
def scaled_to_fp8(acc, scale, weight_scale, bias, out_scale):
    return {"D": (acc * scale * weight_scale + bias) * (1.0 / out_scale)}


@gemm_epilogue(ops=_SCALED)
def scaled_gelu_to_fp8(acc, scale, weight_scale, bias, out_scale):
    return {"D": gelu_tanh_approx(acc * scale * weight_scale + bias) * (1.0 / out_scale)}
