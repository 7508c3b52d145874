// adaLN: LayerNorm without affine, then modulation; alone, and after the gated residual. One warp a
// row, which stays in registers, so it is read once and written once; each lane holds ITEMS vectors
// of V numbers, 16 bytes each. A warp takes several rows of an image one after another, and keeps
// that image's modulation in registers meanwhile.
#include "common.cuh"

namespace flowturbo {

constexpr int kThreads = 128;  // of a block: four warps, which share the modulation in the L1 cache
constexpr int kBlocks = 3;     // of a multiprocessor, at least: as a launch bound it limits registers

struct AdaLN {
    const void *x, *y;                 // (B, T, D)
    const void *gate, *shift, *scale;  // (M, D); rows of x beyond M have the last one's
    void *total, *out;  // (B, T, D), dense; y, gate and total: null without a residual
    long long x_b, x_t, y_b, y_t, gate_b, shift_b, scale_b;
    unsigned B, T, D, per_warp, M;  // per_warp: rows of a warp
    float eps;
};

FT_SHARED_CODE long long modulation(long long b, long long M) { return b < M ? b : M - 1; }
FT_SHARED_CODE float residual(float x, float gate, float y) { return x + gate * y; }
FT_SHARED_CODE float inverse_deviation(float variance, float eps) {
#ifdef __CUDA_ARCH__
    return rsqrtf(variance + eps);
#else
    return 1.0f / sqrtf(variance + eps);
#endif
}
FT_SHARED_CODE float modulated(float x, float mean, float rstd, float shift, float scale) {
    return (x - mean) * rstd * (1.0f + scale) + shift;
}

template <typename T, int V, int ITEMS, bool RESIDUAL>
__global__ void __launch_bounds__(kThreads, kBlocks) adaln(AdaLN a) {
    in_turn();
    constexpr bool kHeld = sizeof(T) == 2;  // shift and scale, where registers suffice
    const int lane = threadIdx.x % 32;
    const unsigned turn = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;  // of all warps
    const unsigned turns = (a.T + a.per_warp - 1) / a.per_warp;               // of an image
    const long long b = turn / turns, first = turn % turns * a.per_warp;
    if (b >= a.B) return;
    const long long end = first + a.per_warp < a.T ? first + a.per_warp : a.T;
    const float share = 1.0f / a.D;
    const long long m = modulation(b, a.M);
    const T* gates = static_cast<const T*>(a.gate) + m * a.gate_b;
    const T* shifts = static_cast<const T*>(a.shift) + m * a.shift_b;
    const T* scales = static_cast<const T*>(a.scale) + m * a.scale_b;
    Vector<T, V> gate[ITEMS] = {}, shift[ITEMS] = {}, scale[ITEMS] = {};
    for (long long t = first; t < end; ++t) {
        Vector<T, V> x[ITEMS] = {}, y[ITEMS] = {};
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            const unsigned d = (item * 32 + lane) * V;
            if (d >= a.D) continue;
            x[item] = fetch<V>(static_cast<const T*>(a.x) + b * a.x_b + t * a.x_t + d);
            if (RESIDUAL)
                y[item] = fetch<V>(static_cast<const T*>(a.y) + b * a.y_b + t * a.y_t + d);
        }
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            const unsigned d = (item * 32 + lane) * V;
            const bool needed = t == first && d < a.D;
            if (RESIDUAL) fetch_if(needed, gates + d, gate[item]);
            if (kHeld) fetch_if(needed, shifts + d, shift[item]);
            if (kHeld) fetch_if(needed, scales + d, scale[item]);
        }
        float h[ITEMS][V], other[V], factor[V], sum = 0, squares = 0;
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            const unsigned d = (item * 32 + lane) * V;
            widen<V>(x[item], h[item]);
            if (RESIDUAL) {
                widen<V>(y[item], other);
                widen<V>(gate[item], factor);
#pragma unroll
                for (int j = 0; j < V; ++j) h[item][j] = residual(h[item][j], factor[j], other[j]);
                if (d < a.D)
                    store<V>(static_cast<T*>(a.total) + (b * a.T + t) * a.D + d, h[item]);
            }
#pragma unroll
            for (int j = 0; j < V; ++j) sum += h[item][j];  // zero behind the row's end
        }
        const float mean = warp_sum(sum) * share;
#pragma unroll
        for (int item = 0; item < ITEMS; ++item)
            if ((item * 32 + lane) * V < a.D)
#pragma unroll
                for (int j = 0; j < V; ++j) squares += (h[item][j] - mean) * (h[item][j] - mean);
        const float rstd = inverse_deviation(warp_sum(squares) * share, a.eps);
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            const unsigned d = (item * 32 + lane) * V;
            if (d >= a.D) continue;
            widen<V>(kHeld ? shift[item] : fetch<V>(shifts + d), other);
            widen<V>(kHeld ? scale[item] : fetch<V>(scales + d), factor);
#pragma unroll
            for (int j = 0; j < V; ++j)
                h[item][j] = modulated(h[item][j], mean, rstd, other[j], factor[j]);
            store<V>(static_cast<T*>(a.out) + (b * a.T + t) * a.D + d, h[item]);
        }
    }
}

}  // namespace flowturbo

#ifndef __CUDACC_RTC__
#include "kernels.h"

namespace flowturbo {
namespace {

template <typename T> void on_host(const void* args) {
    const auto& a = *static_cast<const AdaLN*>(args);
    std::vector<float> h(a.D);
    for (long long row = 0; row < static_cast<long long>(a.B) * a.T; ++row) {
        const long long b = row / a.T, t = row % a.T, m = modulation(b, a.M);
        float mean = 0, squares = 0;
        for (long long d = 0; d < a.D; ++d) {
            h[d] = to_float(static_cast<const T*>(a.x)[b * a.x_b + t * a.x_t + d]);
            if (a.y) {
                h[d] = residual(h[d], to_float(static_cast<const T*>(a.gate)[m * a.gate_b + d]),
                                to_float(static_cast<const T*>(a.y)[b * a.y_b + t * a.y_t + d]));
                static_cast<T*>(a.total)[row * a.D + d] = from_float<T>(h[d]);
            }
            mean += h[d];
        }
        mean /= a.D;
        for (long long d = 0; d < a.D; ++d) squares += (h[d] - mean) * (h[d] - mean);
        const float rstd = inverse_deviation(squares / a.D, a.eps);
        for (long long d = 0; d < a.D; ++d)
            static_cast<T*>(a.out)[row * a.D + d] = from_float<T>(modulated(
                h[d], mean, rstd, to_float(static_cast<const T*>(a.shift)[m * a.shift_b + d]),
                to_float(static_cast<const T*>(a.scale)[m * a.scale_b + d])));
    }
}

template <typename T, int V, int ITEMS, bool RESIDUAL> Entry entry(const char* name) {
    return {name, reinterpret_cast<const void*>(&adaln<T, V, ITEMS, RESIDUAL>), &on_host<T>,
            sizeof(AdaLN)};
}

}  // namespace

#define FT_ENTRY(T, V, ITEMS, RESIDUAL) \
    entry<T, V, ITEMS, RESIDUAL>("flowturbo::adaln<" #T "," #V "," #ITEMS "," #RESIDUAL ">")
#define FT_BOTH(T, V, ITEMS) FT_ENTRY(T, V, ITEMS, false), FT_ENTRY(T, V, ITEMS, true)
#define FT_ENTRIES(T, V, A, B, C) FT_BOTH(T, V, A), FT_BOTH(T, V, B), FT_BOTH(T, V, C)

// ITEMS for widths up to 512, 768 and 1280 in 16 bits, 384, 768 and 1152 in 32.
std::vector<Entry> adaln_entries() {
    return {FT_ENTRIES(float, 4, 3, 6, 9), FT_ENTRIES(half, 8, 2, 3, 5),
            FT_ENTRIES(bfloat16, 8, 2, 3, 5)};
}

}  // namespace flowturbo
#endif
