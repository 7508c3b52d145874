// adaLN: LayerNorm without affine, then modulation; alone, and after the gated residual. One block
// per row (b, t), which stays in registers, so it is read once and written once. Each thread holds
// ITEMS vectors of V numbers.
#include "common.cuh"

namespace flowturbo {

// Of a block, at most: as a launch bound it keeps a block's registers within a multiprocessor's.
constexpr int kThreads = 1024;

struct AdaLN {
    const void *x, *y;                 // (B, T, D)
    const void *gate, *shift, *scale;  // (B, D)
    void *total, *out;  // (B, T, D), dense; y, gate and total: null without a residual
    long long T, D, x_b, x_t, y_b, y_t, gate_b, shift_b, scale_b, rows;
    float eps;
};

FT_SHARED_CODE float residual(float x, float gate, float y) { return x + gate * y; }
FT_SHARED_CODE float inverse_deviation(float squares, long long count, float eps) {
    return 1.0f / sqrtf(squares / count + eps);
}
FT_SHARED_CODE float modulated(float x, float mean, float rstd, float shift, float scale) {
    return (x - mean) * rstd * (1.0f + scale) + shift;
}

template <typename T, int V, int ITEMS> __global__ void __launch_bounds__(kThreads) adaln(AdaLN a) {
    __shared__ float scratch[32];
    const long long row = blockIdx.x, b = row / a.T, t = row % a.T;
    const T* x = static_cast<const T*>(a.x) + b * a.x_b + t * a.x_t;
    float h[ITEMS][V], sum = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const long long d = (static_cast<long long>(item) * blockDim.x + threadIdx.x) * V;
        if (d < a.D) {
            load<V>(x + d, h[item]);
            if (a.y) {
                float y[V], gate[V];
                load<V>(static_cast<const T*>(a.y) + b * a.y_b + t * a.y_t + d, y);
                load<V>(static_cast<const T*>(a.gate) + b * a.gate_b + d, gate);
#pragma unroll
                for (int j = 0; j < V; ++j) h[item][j] = residual(h[item][j], gate[j], y[j]);
                store<V>(static_cast<T*>(a.total) + row * a.D + d, h[item]);
            }
#pragma unroll
            for (int j = 0; j < V; ++j) sum += h[item][j];
        }
    }
    const float mean = block_sum(sum, scratch) / a.D;
    float squares = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; ++item)
        if ((static_cast<long long>(item) * blockDim.x + threadIdx.x) * V < a.D)
#pragma unroll
            for (int j = 0; j < V; ++j) squares += (h[item][j] - mean) * (h[item][j] - mean);
    const float rstd = inverse_deviation(block_sum(squares, scratch), a.D, a.eps);
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const long long d = (static_cast<long long>(item) * blockDim.x + threadIdx.x) * V;
        if (d < a.D) {
            float shift[V], scale[V];
            load<V>(static_cast<const T*>(a.shift) + b * a.shift_b + d, shift);
            load<V>(static_cast<const T*>(a.scale) + b * a.scale_b + d, scale);
#pragma unroll
            for (int j = 0; j < V; ++j)
                h[item][j] = modulated(h[item][j], mean, rstd, shift[j], scale[j]);
            store<V>(static_cast<T*>(a.out) + row * a.D + d, h[item]);
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
    for (long long row = 0; row < a.rows; ++row) {
        const long long b = row / a.T, t = row % a.T;
        float mean = 0, squares = 0;
        for (long long d = 0; d < a.D; ++d) {
            h[d] = to_float(static_cast<const T*>(a.x)[b * a.x_b + t * a.x_t + d]);
            if (a.y) {
                h[d] = residual(h[d], to_float(static_cast<const T*>(a.gate)[b * a.gate_b + d]),
                                to_float(static_cast<const T*>(a.y)[b * a.y_b + t * a.y_t + d]));
                static_cast<T*>(a.total)[row * a.D + d] = from_float<T>(h[d]);
            }
            mean += h[d];
        }
        mean /= a.D;
        for (long long d = 0; d < a.D; ++d) squares += (h[d] - mean) * (h[d] - mean);
        const float rstd = inverse_deviation(squares, a.D, a.eps);
        for (long long d = 0; d < a.D; ++d)
            static_cast<T*>(a.out)[row * a.D + d] = from_float<T>(modulated(
                h[d], mean, rstd, to_float(static_cast<const T*>(a.shift)[b * a.shift_b + d]),
                to_float(static_cast<const T*>(a.scale)[b * a.scale_b + d])));
    }
}

template <typename T, int V, int ITEMS> Entry entry(const char* name) {
    return {name, reinterpret_cast<const void*>(&adaln<T, V, ITEMS>), &on_host<T>, sizeof(AdaLN)};
}

}  // namespace

#define FT_ENTRY(T, V, ITEMS) entry<T, V, ITEMS>("flowturbo::adaln<" #T "," #V "," #ITEMS ">")
#define FT_ENTRIES(T, V) \
    FT_ENTRY(T, V, 1), FT_ENTRY(T, V, 4), FT_ENTRY(T, 1, 1), FT_ENTRY(T, 1, 4), FT_ENTRY(T, 1, 16)

std::vector<Entry> adaln_entries() {
    return {FT_ENTRIES(float, 4), FT_ENTRIES(half, 8), FT_ENTRIES(bfloat16, 8)};
}

}  // namespace flowturbo
#endif
