// What the kernels share: number types, vectors of 16 bytes, sums, dependent launch. Compiled by nvcc
// for device and host, and by NVRTC, which has no host headers, for the device alone.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifndef __CUDACC_RTC__
#include <cstring>
#endif

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

// Whole words of memory, from the numbers in them and back.
template <typename To, typename From> FT_SHARED_CODE To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
FT_SHARED_CODE void unpack(unsigned word, float (&to)[1], float) {
    to[0] = same_bits<float>(word);
}
FT_SHARED_CODE void unpack(unsigned word, float (&to)[2], half) {
    const float2 both = __half22float2(same_bits<half2>(word));
    to[0] = both.x, to[1] = both.y;
}
FT_SHARED_CODE void unpack(unsigned word, float (&to)[2], bfloat16) {
    to[0] = same_bits<float>(word << 16), to[1] = same_bits<float>(word & 0xffff0000u);
}
FT_SHARED_CODE unsigned pack(const float (&from)[1], float) {
    return same_bits<unsigned>(from[0]);
}
FT_SHARED_CODE unsigned pack(const float (&from)[2], half) {
    return same_bits<unsigned>(__floats2half2_rn(from[0], from[1]));
}
FT_SHARED_CODE unsigned pack(const float (&from)[2], bfloat16) {
    return same_bits<unsigned>(__floats2bfloat162_rn(from[0], from[1]));
}

// V numbers that are loaded and stored at once. As words, because a compiler gives each number of an
// array of 16-bit ones a register of its own.
template <typename T, int V> struct alignas(sizeof(T) * V) Vector {
    static constexpr int kWord = 4 / sizeof(T);
    unsigned words[V / kWord];
};
template <typename T> struct Vector<T, 1> {
    T number;
};

// Apart from `widen`, so that all loads of a thread can be under way before the first is waited for.
template <int V, typename T> FT_SHARED_CODE Vector<T, V> fetch(const T* from) {
    return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <int V, typename T> FT_SHARED_CODE void widen(const Vector<T, V>& from, float (&to)[V]) {
    if constexpr (V == 1) {
        to[0] = to_float(from.number);
    } else {
        constexpr int kWord = Vector<T, V>::kWord;
#pragma unroll
        for (int i = 0; i < V / kWord; ++i) {
            float numbers[kWord];
            unpack(from.words[i], numbers, T());
#pragma unroll
            for (int k = 0; k < kWord; ++k) to[i * kWord + k] = numbers[k];
        }
    }
}

template <int V, typename T> FT_SHARED_CODE void store(T* to, const float (&from)[V]) {
    Vector<T, V> v;
    if constexpr (V == 1) {
        v.number = from_float<T>(from[0]);
    } else {
        constexpr int kWord = Vector<T, V>::kWord;
#pragma unroll
        for (int i = 0; i < V / kWord; ++i) {
            float numbers[kWord];
#pragma unroll
            for (int k = 0; k < kWord; ++k) numbers[k] = from[i * kWord + k];
            v.words[i] = pack(numbers, T());
        }
    }
    *reinterpret_cast<Vector<T, V>*>(to) = v;
}

#ifdef __CUDACC__
// Programmatic dependent launch: this kernel may have been launched while those before it still run,
// so it waits for them before it reads or writes anything; then it lets the next one start. Every
// kernel begins so, because launch.cu and _nvrtc.py launch all of them so.
__device__ __forceinline__ void in_turn() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The 16 bytes at `from` if they are needed, else `to` stays. Without a branch: a compiler moves work
// on earlier loads ahead of one, and the loads behind it would wait for those.
template <typename T, int V>
__device__ __forceinline__ void fetch_if(bool needed, const T* from, Vector<T, V>& to) {
    static_assert(sizeof to == 16, "");
#ifdef __CUDA_ARCH__
    asm volatile(
        "{\n\t.reg .pred p;\n\t.reg .u64 at;\n\tsetp.ne.u32 p, %5, 0;\n\t"
        "cvta.to.global.u64 at, %4;\n\t@p ld.global.v4.u32 {%0, %1, %2, %3}, [at];\n\t}"
        : "+r"(to.words[0]), "+r"(to.words[1]), "+r"(to.words[2]), "+r"(to.words[3])
        : "l"(from), "r"(static_cast<unsigned>(needed)));
#else
    if (needed) to = fetch<V>(from);
#endif
}

// The sum over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// The sum over a block of whole warps, in every thread. `scratch`: 32 floats, reusable at once.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) total += scratch[warp];
    return total;
}
#endif

}  // namespace flowturbo
