// GroupNorm and SiLU on channels-last images (N, H*W, C), in two kernels over blocks of pixels. The
// first writes each block's mean and sum of squared deviations of every group; the second merges
// them (Chan et al. 1983), without cancellation whatever the mean of the data, and normalises.
#include "common.cuh"

namespace flowturbo {

constexpr int kStatisticsThreads = 1024, kApplyThreads = 256;  // of a block, at most

struct GroupNorm {
    const void *x, *weight, *bias;          // (N, HW, C), (C,), (C,)
    float *means, *squares;                 // (N, blocks, G)
    void* out;                              // (N, HW, C)
    long long N, HW, C, G, blocks, pixels;  // pixels per block; blocks = ceil(HW / pixels)
    float eps;
};

struct Statistics {
    float count, mean, squares;
};

FT_SHARED_CODE Statistics merge(Statistics a, float count, float mean, float squares) {
    const float both = a.count + count, difference = mean - a.mean;
    return {both, a.mean + difference * (count / both),
            a.squares + squares + difference * difference * (a.count * count / both)};
}
FT_SHARED_CODE long long pixels_of(const GroupNorm& a, long long block) {
    const long long rest = a.HW - block * a.pixels;
    return rest < a.pixels ? rest : a.pixels;
}
FT_SHARED_CODE float silu(float y) { return y / (1.0f + expf(-y)); }

#ifdef __CUDACC__
// Sums per group, from every thread's sums of its V channels; a lane is the threads that cover all
// channels of a pixel. `sums`: blockDim.x * V floats.
template <int V>
__device__ float group_sum(const GroupNorm& a, float (&mine)[V], float* sums, int lanes) {
    const int vectors = a.C / V, size = a.C / a.G;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) sums[threadIdx.x * V + j] = mine[j];
    __syncthreads();
    float total = 0;
    if (threadIdx.x < a.G)
        for (int lane = 0; lane < lanes; ++lane)
            for (int c = threadIdx.x * size; c < (static_cast<int>(threadIdx.x) + 1) * size; ++c)
                total += sums[lane * vectors * V + c];
    return total;
}
#endif

// Grid (blocks, N); threads: lanes * C / V, at least G; shared memory: (threads * V + G) floats.
template <typename T, int V>
__global__ void __launch_bounds__(kStatisticsThreads, 1) group_norm_statistics(GroupNorm a) {
    extern __shared__ float shared[];
    float *sums = shared, *means = shared + blockDim.x * V;
    const int vectors = a.C / V, lanes = blockDim.x / vectors;
    const int lane = threadIdx.x / vectors, c = threadIdx.x % vectors * V;
    const long long n = blockIdx.y, first = blockIdx.x * a.pixels, count = pixels_of(a, blockIdx.x);
    const T* x = static_cast<const T*>(a.x) + (n * a.HW + first) * a.C + c;
    const float size = static_cast<float>(count) * (a.C / a.G);
    float mine[V] = {}, v[V];
    if (lane < lanes)
        for (long long p = lane; p < count; p += lanes) {
            load<V>(x + p * a.C, v);
#pragma unroll
            for (int j = 0; j < V; ++j) mine[j] += v[j];
        }
    const float mean = group_sum<V>(a, mine, sums, lanes) / size;
    if (threadIdx.x < a.G) means[threadIdx.x] = mean;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) mine[j] = 0;
    if (lane < lanes)
        for (long long p = lane; p < count; p += lanes) {
            load<V>(x + p * a.C, v);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float difference = v[j] - means[(c + j) / (a.C / a.G)];
                mine[j] += difference * difference;
            }
        }
    const float squares = group_sum<V>(a, mine, sums, lanes);
    if (threadIdx.x < a.G) {
        const long long place = (n * a.blocks + blockIdx.x) * a.G + threadIdx.x;
        a.means[place] = mean;
        a.squares[place] = squares;
    }
}

// Grid (blocks, N); shared memory: 2 * G floats, and one Statistics per thread.
template <typename T, int V>
__global__ void __launch_bounds__(kApplyThreads) group_norm_apply(GroupNorm a) {
    extern __shared__ float shared[];
    float *means = shared, *rstds = shared + a.G;
    Statistics* parts = reinterpret_cast<Statistics*>(shared + 2 * a.G);
    const long long n = blockIdx.y;
    // All threads merge the image's statistics: each lane, of one thread per group, takes some
    // blocks, then the first lane merges the lanes.
    const int width = a.G < blockDim.x ? a.G : blockDim.x;
    const int lanes = blockDim.x / width, lane = threadIdx.x / width;
    for (int start = 0; start < a.G; start += width) {
        const int g = start + threadIdx.x % width;
        Statistics s = {0, 0, 0};
        if (lane < lanes && g < a.G)
            for (long long b = lane; b < a.blocks; b += lanes) {
                const long long place = (n * a.blocks + b) * a.G + g;
                s = merge(s, static_cast<float>(pixels_of(a, b)) * (a.C / a.G), a.means[place],
                          a.squares[place]);
            }
        __syncthreads();
        parts[threadIdx.x] = s;
        __syncthreads();
        if (lane == 0 && g < a.G) {
            for (int other = 1; other < lanes; ++other) {
                const Statistics p = parts[other * width + threadIdx.x];
                if (p.count > 0) s = merge(s, p.count, p.mean, p.squares);
            }
            means[g] = s.mean;
            rstds[g] = 1.0f / sqrtf(s.squares / s.count + a.eps);
        }
    }
    __syncthreads();
    const long long first = (n * a.HW + blockIdx.x * a.pixels) * a.C;
    const int C = a.C, size = a.C / a.G, end = pixels_of(a, blockIdx.x) * a.C;
    for (int i = threadIdx.x * V; i < end; i += blockDim.x * V) {
        const int c = i % C;
        float y[V], weight[V], bias[V];
        load<V>(static_cast<const T*>(a.x) + first + i, y);
        load<V>(static_cast<const T*>(a.weight) + c, weight);
        load<V>(static_cast<const T*>(a.bias) + c, bias);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int g = (c + j) / size;
            y[j] = silu((y[j] - means[g]) * rstds[g] * weight[j] + bias[j]);
        }
        store<V>(static_cast<T*>(a.out) + first + i, y);
    }
}

}  // namespace flowturbo

#ifndef __CUDACC_RTC__
#include "kernels.h"

namespace flowturbo {
namespace {

template <typename T> void statistics_on_host(const void* args) {
    const auto& a = *static_cast<const GroupNorm*>(args);
    const long long size = a.C / a.G;
    for (long long n = 0; n < a.N; ++n)
        for (long long b = 0; b < a.blocks; ++b)
            for (long long g = 0; g < a.G; ++g) {
                const T* x =
                    static_cast<const T*>(a.x) + (n * a.HW + b * a.pixels) * a.C + g * size;
                float sum = 0, squares = 0;
                for (long long p = 0; p < pixels_of(a, b); ++p)
                    for (long long c = 0; c < size; ++c) sum += to_float(x[p * a.C + c]);
                const float mean = sum / (pixels_of(a, b) * size);
                for (long long p = 0; p < pixels_of(a, b); ++p)
                    for (long long c = 0; c < size; ++c) {
                        const float deviation = to_float(x[p * a.C + c]) - mean;
                        squares += deviation * deviation;
                    }
                a.means[(n * a.blocks + b) * a.G + g] = mean;
                a.squares[(n * a.blocks + b) * a.G + g] = squares;
            }
}

template <typename T> void apply_on_host(const void* args) {
    const auto& a = *static_cast<const GroupNorm*>(args);
    const long long size = a.C / a.G;
    for (long long n = 0; n < a.N; ++n)
        for (long long g = 0; g < a.G; ++g) {
            Statistics s = {0, 0, 0};
            for (long long b = 0; b < a.blocks; ++b) {
                const long long place = (n * a.blocks + b) * a.G + g;
                s = merge(s, static_cast<float>(pixels_of(a, b)) * size, a.means[place],
                          a.squares[place]);
            }
            const float rstd = 1.0f / sqrtf(s.squares / s.count + a.eps);
            for (long long p = 0; p < a.HW; ++p)
                for (long long c = g * size; c < (g + 1) * size; ++c) {
                    const long long at = (n * a.HW + p) * a.C + c;
                    const float y = (to_float(static_cast<const T*>(a.x)[at]) - s.mean) * rstd;
                    static_cast<T*>(a.out)[at] =
                        from_float<T>(silu(y * to_float(static_cast<const T*>(a.weight)[c]) +
                                           to_float(static_cast<const T*>(a.bias)[c])));
                }
        }
}

}  // namespace

#define FT_ENTRY(KERNEL, T, V)                                                               \
    Entry {                                                                                  \
        "flowturbo::group_norm_" #KERNEL "<" #T "," #V ">",                                  \
            reinterpret_cast<const void*>(&group_norm_##KERNEL<T, V>), &KERNEL##_on_host<T>, \
            sizeof(GroupNorm)                                                                \
    }
#define FT_ENTRIES(T, V) FT_ENTRY(statistics, T, V), FT_ENTRY(apply, T, V)

std::vector<Entry> group_norm_entries() {
    return {FT_ENTRIES(float, 4), FT_ENTRIES(float, 1),    FT_ENTRIES(half, 8),
            FT_ENTRIES(half, 1),  FT_ENTRIES(bfloat16, 8), FT_ENTRIES(bfloat16, 1)};
}

}  // namespace flowturbo
#endif
