// GroupNorm and SiLU on channels-last images (N, H*W, C), in three kernels. The first reads a tile
// of pixels into registers, once, and writes each group's mean and sum of squared deviations; the
// second merges the tiles' (Chan et al. 1983), without cancellation whatever the mean of the data,
// into a gain and an offset for each channel; the third applies these.
//
// A thread holds ITEMS vectors of V channels, 16 bytes each: the same channels of every lanes-th
// pixel of the tile. Its lane is those threads that together cover all channels of a pixel.
#include "common.cuh"

namespace flowturbo {

constexpr int kThreads = 256;  // of a block, at most
constexpr int kItems = 8;      // loads of a thread that are under way at once

struct GroupNorm {
    const void *x, *weight, *bias;  // (N, HW, C), (C,), (C,)
    float* parts;                   // (N, G, tiles, 2): mean, sum of squared deviations
    float* affine;                  // (N, 2, C): gain, offset
    void* out;                      // (N, HW, C)
    long long N, HW, C, G, tiles;   // tiles = ceil(HW / pixels_of_a_tile)
    int lanes;                      // of a tile
    float eps;
};

// Of a tile, and of one lane in it.
FT_SHARED_CODE int pixels_of(const GroupNorm& a, long long tile) {
    const long long most = a.lanes * kItems, rest = a.HW - tile * most;
    return static_cast<int>(rest < most ? rest : most);
}
FT_SHARED_CODE int pixels_of_lane(const GroupNorm& a, long long tile, int lane) {
    const int pixels = pixels_of(a, tile);
    return pixels / a.lanes + (lane < pixels % a.lanes);
}
// What a part of `count` numbers adds to the squared deviations from the mean of all.
FT_SHARED_CODE float shifted(float count, float mean, float squares, float mean_of_all) {
    return squares + count * (mean - mean_of_all) * (mean - mean_of_all);
}
FT_SHARED_CODE void write_affine(const GroupNorm& a, long long n, int c, float mean, float rstd,
                                 float weight, float bias) {
    const float gain = rstd * weight;
    a.affine[2 * n * a.C + c] = gain;
    a.affine[(2 * n + 1) * a.C + c] = bias - mean * gain;
}
// Of ordinary numbers: the general one calls a function, for which registers go to memory.
FT_SHARED_CODE float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
    const float inverse = __fdividef(1.0f, b), q = a * inverse;
    return fmaf(fmaf(-q, b, a), inverse, q);
#else
    return a / b;
#endif
}
FT_SHARED_CODE float silu(float y) {
#ifdef __CUDA_ARCH__
    return __fdividef(y, 1.0f + __expf(-y));  // the exact ones would take longer than the memory
#else
    return y / (1.0f + expf(-y));
#endif
}

#ifdef __CUDACC__
// The thread's vectors of a tile; those behind the image's end are zero.
template <typename T, int V>
__device__ __forceinline__ void fetch_tile(const T* first, int step, int pixels,
                                           Vector<T, V> (&held)[kItems]) {
#pragma unroll
    for (int item = 0; item < kItems; ++item)
        if (item < pixels)
            held[item] = fetch<V>(first + item * step);
        else
            held[item] = {};
}

template <int V> __device__ __forceinline__ void fetch_floats(const float* from, float (&to)[V]) {
#pragma unroll
    for (int k = 0; k < V; k += 4) {
        float four[4];
        widen<4>(fetch<4>(from + k), four);
#pragma unroll
        for (int j = 0; j < 4; ++j) to[k + j] = four[j];
    }
}

// Grid (tiles, N); threads: lanes * C / V. A slot is SLOT neighbouring channels of one group.
template <typename T, int V, int SLOT>
__global__ void __launch_bounds__(kThreads) group_norm_statistics(GroupNorm a) {
    in_turn();
    constexpr int kSlots = V / SLOT;
    __shared__ float means[kThreads * kSlots], squares[kThreads * kSlots];
    const int vectors = static_cast<int>(a.C) / V, lane = threadIdx.x / vectors;
    const int c = threadIdx.x % vectors * V, pixels = pixels_of_lane(a, blockIdx.x, lane);
    const long long n = blockIdx.y, tile = blockIdx.x, first = tile * a.lanes * kItems + lane;
    Vector<T, V> held[kItems];
    fetch_tile<T, V>(static_cast<const T*>(a.x) + (n * a.HW + first) * a.C + c,
                     a.lanes * static_cast<int>(a.C), pixels, held);
    float v[V];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
        float sum = 0, square = 0;
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            widen<V>(held[item], v);
#pragma unroll
            for (int j = slot * SLOT; j < (slot + 1) * SLOT; ++j) sum += v[j];
        }
        const float mean = pixels ? quotient(sum, pixels * SLOT) : 0.0f;
#pragma unroll
        for (int item = 0; item < kItems; ++item)
            if (item < pixels) {
                widen<V>(held[item], v);
#pragma unroll
                for (int j = slot * SLOT; j < (slot + 1) * SLOT; ++j)
                    square += (v[j] - mean) * (v[j] - mean);
            }
        means[threadIdx.x * kSlots + slot] = mean;
        squares[threadIdx.x * kSlots + slot] = square;
    }
    __syncthreads();
    // A thread a group merges its slots in all lanes.
    const int size = static_cast<int>(a.C / a.G), slots = size / SLOT, all = vectors * kSlots;
    for (int g = threadIdx.x; g < a.G; g += blockDim.x) {
        const float count = static_cast<float>(pixels_of(a, blockIdx.x)) * size;
        float sum = 0, total = 0;
        for (int l = 0; l < a.lanes; ++l)
            for (int s = g * slots; s < (g + 1) * slots; ++s)
                sum += means[l * all + s] * (pixels_of_lane(a, blockIdx.x, l) * SLOT);
        const float mean = quotient(sum, count);
        for (int l = 0; l < a.lanes; ++l)
            for (int s = g * slots; s < (g + 1) * slots; ++s)
                total += shifted(static_cast<float>(pixels_of_lane(a, blockIdx.x, l) * SLOT),
                                 means[l * all + s], squares[l * all + s], mean);
        const long long place = (n * a.G + g) * a.tiles + blockIdx.x;
        reinterpret_cast<float2*>(a.parts)[place] = make_float2(mean, total);
    }
}

// Grid (G, N); threads: whole warps.
template <typename T> __global__ void __launch_bounds__(kThreads) group_norm_merge(GroupNorm a) {
    in_turn();
    __shared__ float scratch[32];
    const int g = blockIdx.x, size = static_cast<int>(a.C / a.G);
    const long long n = blockIdx.y;
    const float2* parts = reinterpret_cast<const float2*>(a.parts) + (n * a.G + g) * a.tiles;
    float sum = 0, total = 0;
#pragma unroll 4
    for (int tile = threadIdx.x; tile < a.tiles; tile += blockDim.x)
        sum += parts[tile].x * pixels_of(a, tile);
    const float mean = block_sum(sum, scratch) / a.HW;
#pragma unroll 4
    for (int tile = threadIdx.x; tile < a.tiles; tile += blockDim.x)
        total += shifted(static_cast<float>(pixels_of(a, tile)) * size, parts[tile].x,
                         parts[tile].y, mean);
    const float variance = block_sum(total, scratch) / (static_cast<float>(a.HW) * size);
    const float rstd = 1.0f / sqrtf(variance + a.eps);
    for (int c = g * size + threadIdx.x; c < (g + 1) * size; c += blockDim.x)
        write_affine(a, n, c, mean, rstd, to_float(static_cast<const T*>(a.weight)[c]),
                     to_float(static_cast<const T*>(a.bias)[c]));
}

// Grid (tiles, N); threads: lanes * C / V.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) group_norm_apply(GroupNorm a) {
    in_turn();
    const int vectors = static_cast<int>(a.C) / V, lane = threadIdx.x / vectors;
    const int c = threadIdx.x % vectors * V, pixels = pixels_of_lane(a, blockIdx.x, lane);
    const long long n = blockIdx.y, tile = blockIdx.x, first = tile * a.lanes * kItems + lane;
    const long long start = (n * a.HW + first) * a.C + c;
    const int step = a.lanes * static_cast<int>(a.C);
    Vector<T, V> held[kItems];
    fetch_tile<T, V>(static_cast<const T*>(a.x) + start, step, pixels, held);
    const float* affine = a.affine + 2 * n * a.C + c;
    float gain[V], offset[V];
    fetch_floats(affine, gain);
    fetch_floats(affine + a.C, offset);
#pragma unroll
    for (int item = 0; item < kItems; ++item)
        if (item < pixels) {
            float y[V];
            widen<V>(held[item], y);
#pragma unroll
            for (int j = 0; j < V; ++j)
                y[j] = silu(y[j] * gain[j] + offset[j]);
            store<V>(static_cast<T*>(a.out) + start + item * step, y);
        }
}
#endif

}  // namespace flowturbo

#ifndef __CUDACC_RTC__
#include "kernels.h"

namespace flowturbo {
namespace {

template <typename T> void statistics_on_host(const void* args) {
    const auto& a = *static_cast<const GroupNorm*>(args);
    const long long size = a.C / a.G;
    for (long long n = 0; n < a.N; ++n)
        for (long long g = 0; g < a.G; ++g)
            for (long long tile = 0; tile < a.tiles; ++tile) {
                const T* x = static_cast<const T*>(a.x) +
                             (n * a.HW + tile * a.lanes * kItems) * a.C + g * size;
                float sum = 0, squares = 0;
                for (long long p = 0; p < pixels_of(a, tile); ++p)
                    for (long long c = 0; c < size; ++c) sum += to_float(x[p * a.C + c]);
                const float mean = sum / (pixels_of(a, tile) * size);
                for (long long p = 0; p < pixels_of(a, tile); ++p)
                    for (long long c = 0; c < size; ++c) {
                        const float deviation = to_float(x[p * a.C + c]) - mean;
                        squares += deviation * deviation;
                    }
                float* part = a.parts + 2 * ((n * a.G + g) * a.tiles + tile);
                part[0] = mean;
                part[1] = squares;
            }
}

template <typename T> void merge_on_host(const void* args) {
    const auto& a = *static_cast<const GroupNorm*>(args);
    const long long size = a.C / a.G;
    for (long long n = 0; n < a.N; ++n)
        for (long long g = 0; g < a.G; ++g) {
            const float* parts = a.parts + 2 * (n * a.G + g) * a.tiles;
            float sum = 0, total = 0;
            for (long long tile = 0; tile < a.tiles; ++tile)
                sum += parts[2 * tile] * pixels_of(a, tile);
            const float mean = sum / a.HW;
            for (long long tile = 0; tile < a.tiles; ++tile)
                total += shifted(static_cast<float>(pixels_of(a, tile)) * size, parts[2 * tile],
                                 parts[2 * tile + 1], mean);
            const float rstd = 1.0f / sqrtf(total / (static_cast<float>(a.HW) * size) + a.eps);
            for (long long c = g * size; c < (g + 1) * size; ++c)
                write_affine(a, n, static_cast<int>(c), mean, rstd,
                             to_float(static_cast<const T*>(a.weight)[c]),
                             to_float(static_cast<const T*>(a.bias)[c]));
        }
}

template <typename T> void apply_on_host(const void* args) {
    const auto& a = *static_cast<const GroupNorm*>(args);
    for (long long n = 0; n < a.N; ++n)
        for (long long p = 0; p < a.HW; ++p)
            for (long long c = 0; c < a.C; ++c) {
                const long long at = (n * a.HW + p) * a.C + c;
                const float* affine = a.affine + 2 * n * a.C + c;
                static_cast<T*>(a.out)[at] = from_float<T>(
                    silu(to_float(static_cast<const T*>(a.x)[at]) * affine[0] + affine[a.C]));
            }
}

}  // namespace

#define FT_ENTRY(NAME, KERNEL, T, ...)                                                   \
    Entry {                                                                              \
        NAME, reinterpret_cast<const void*>(&group_norm_##KERNEL<__VA_ARGS__>),          \
            &KERNEL##_on_host<T>, sizeof(GroupNorm)                                      \
    }
#define FT_STATISTICS(T, V, SLOT) \
    FT_ENTRY("flowturbo::group_norm_statistics<" #T "," #V "," #SLOT ">", statistics, T, T, V, SLOT)
#define FT_ENTRIES(T, V)                                                         \
    FT_STATISTICS(T, V, V), FT_STATISTICS(T, V, 4), FT_STATISTICS(T, V, 1),      \
        FT_ENTRY("flowturbo::group_norm_merge<" #T ">", merge, T, T),            \
        FT_ENTRY("flowturbo::group_norm_apply<" #T "," #V ">", apply, T, T, V)

std::vector<Entry> group_norm_entries() {
    return {FT_ENTRIES(float, 4), FT_ENTRIES(half, 8), FT_ENTRIES(bfloat16, 8)};
}

}  // namespace flowturbo
#endif
