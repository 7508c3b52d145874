// What surrounds the network in a solver step: guidance, base velocity, cache write and the update
// of x, in one pass. One thread per vector of an image, which loads all that it needs before it
// computes; grid (vectors per image / threads, N).
#include "common.cuh"

namespace flowturbo {

constexpr int kThreads = 64;       // of a block, at most: an image has few vectors, and many blocks
constexpr int kBlocks = 8;         // of a multiprocessor, at least: registers for all the loads
constexpr int kMaxVelocities = 4;  // those of Adams-Bashforth of order 4

struct VelocityUpdate {
    const void* x;       // (N, S)
    const void* raw;     // (2N, S), conditional rows first, or (N, S); null: velocities alone
    const float* scale;  // (N,); null: no guidance, raw has N rows
    const void* base;    // of raw's shape and x's type; null: none
    const void* velocities[kMaxVelocities];  // (N, S) each, of x's type
    void* out;                               // (N, S); may be x
    void* velocity;                          // of raw's shape and x's type
    long long N, S, HW;                      // images, elements of an image, of one channel
    float weight, weights[kMaxVelocities];
    int count, channels;
};

FT_SHARED_CODE float guided(float c, float u, float scale) { return u + scale * (c - u); }

// Elements i to i + V of image n.
template <typename T, typename R, int V>
FT_SHARED_CODE void velocity_update_at(const VelocityUpdate& a, long long n, long long i) {
    const long long at = n * a.S + i, other = (n + a.N) * a.S + i;
    const bool halves = a.raw && a.scale, based = a.raw && a.base;
    const Vector<T, V> x = fetch<V>(static_cast<const T*>(a.x) + at);
    Vector<T, V> velocities[kMaxVelocities] = {}, base_c = {}, base_u = {};
    Vector<R, V> raw_c = {}, raw_u = {};
#pragma unroll
    for (int k = 0; k < kMaxVelocities; ++k)
        if (k < a.count) velocities[k] = fetch<V>(static_cast<const T*>(a.velocities[k]) + at);
    if (a.raw) raw_c = fetch<V>(static_cast<const R*>(a.raw) + at);
    if (halves) raw_u = fetch<V>(static_cast<const R*>(a.raw) + other);
    if (based) base_c = fetch<V>(static_cast<const T*>(a.base) + at);
    if (based && halves) base_u = fetch<V>(static_cast<const T*>(a.base) + other);
    const float scale = halves ? a.scale[n] : 0.0f;
    float total[V], v[V], c[V], u[V];
    widen<V>(x, total);
#pragma unroll
    for (int k = 0; k < kMaxVelocities; ++k)
        if (k < a.count) {
            widen<V>(velocities[k], v);
#pragma unroll
            for (int j = 0; j < V; ++j) total[j] += a.weights[k] * v[j];
        }
    if (a.raw) {
        widen<V>(raw_c, c);
        if (halves) {
            widen<V>(raw_u, u);
#pragma unroll
            for (int j = 0; j < V; ++j)
                if (i + j < a.channels * a.HW) c[j] = u[j] = guided(c[j], u[j], scale);
            if (based) {
                widen<V>(base_u, v);
#pragma unroll
                for (int j = 0; j < V; ++j) u[j] += v[j];
            }
            store<V>(static_cast<T*>(a.velocity) + other, u);
        }
        if (based) {
            widen<V>(base_c, v);
#pragma unroll
            for (int j = 0; j < V; ++j) c[j] += v[j];
        }
        store<V>(static_cast<T*>(a.velocity) + at, c);
#pragma unroll
        for (int j = 0; j < V; ++j) total[j] += a.weight * c[j];
    }
    store<V>(static_cast<T*>(a.out) + at, total);
}

template <typename T, typename R, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) velocity_update(VelocityUpdate a) {
    in_turn();
    const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    if (i < a.S) velocity_update_at<T, R, V>(a, blockIdx.y, i);
}

}  // namespace flowturbo

#ifndef __CUDACC_RTC__
#include "kernels.h"

namespace flowturbo {
namespace {

template <typename T, typename R, int V> void on_host(const void* args) {
    const auto& a = *static_cast<const VelocityUpdate*>(args);
    for (long long n = 0; n < a.N; ++n)
        for (long long i = 0; i < a.S; i += V) velocity_update_at<T, R, V>(a, n, i);
}

template <typename T, typename R, int V> Entry entry(const char* name) {
    return {name, reinterpret_cast<const void*>(&velocity_update<T, R, V>), &on_host<T, R, V>,
            sizeof(VelocityUpdate)};
}

}  // namespace

#define FT_ENTRY(T, R, V) entry<T, R, V>("flowturbo::velocity_update<" #T "," #R "," #V ">")
#define FT_ENTRIES(T, R, V) FT_ENTRY(T, R, V), FT_ENTRY(T, R, 1)

std::vector<Entry> velocity_update_entries() {
    return {FT_ENTRIES(float, float, 4), FT_ENTRIES(float, half, 4), FT_ENTRIES(float, bfloat16, 4),
            FT_ENTRIES(half, half, 8), FT_ENTRIES(bfloat16, bfloat16, 8)};
}

}  // namespace flowturbo
#endif
