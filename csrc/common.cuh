// What the kernels share: number types, vectors of 16 bytes, sums over a block. Compiled by nvcc
// for device and host, and by NVRTC, which has no host headers, for the device alone.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FT_SHARED_CODE __host__ __device__ __forceinline__

// Outside the namespace, as CUDA's own `half`: NVRTC resolves the names of instances there.
using bfloat16 = __nv_bfloat16;

namespace flowturbo {

FT_SHARED_CODE float to_float(float x) { return x; }
FT_SHARED_CODE float to_float(half x) { return __half2float(x); }
FT_SHARED_CODE float to_float(bfloat16 x) { return __bfloat162float(x); }

template <typename T> FT_SHARED_CODE T from_float(float x);
template <> FT_SHARED_CODE float from_float<float>(float x) { return x; }
template <> FT_SHARED_CODE half from_float<half>(float x) { return __float2half_rn(x); }
template <> FT_SHARED_CODE bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }

// V numbers that are loaded and stored at once.
template <typename T, int V> struct alignas(sizeof(T) * V) Vector {
    T at[V];
};

template <int V, typename T> FT_SHARED_CODE void load(const T* from, float (&to)[V]) {
    const Vector<T, V> v = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = to_float(v.at[i]);
}

template <int V, typename T> FT_SHARED_CODE void store(T* to, const float (&from)[V]) {
    Vector<T, V> v;
#pragma unroll
    for (int i = 0; i < V; ++i) v.at[i] = from_float<T>(from[i]);
    *reinterpret_cast<Vector<T, V>*>(to) = v;
}

#ifdef __CUDACC__
// The sum over a block of whole warps, in every thread. `scratch`: 32 floats, reusable at once.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    const int warps = blockDim.x / 32;
    if (warps == 1) return x;
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < warps; ++warp) total += scratch[warp];
    return total;
}
#endif

}  // namespace flowturbo
