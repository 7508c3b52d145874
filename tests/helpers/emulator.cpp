// A .cu file of csrc run on the CPU as it is written, thread by thread: -DSOURCE='"adaln.cu"'
// -DARGS=AdaLN -DENTRIES=adaln_entries. The threads of a block are contexts that take turns: each
// runs to its next barrier or shuffle.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#undef __host__
#undef __device__
#undef __global__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __CUDACC__

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim;

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static std::vector<float> shuffled;
static unsigned waiting, alive;
static unsigned long long barriers;

static void take_turns() { swapcontext(&threads[threadIdx.x].context, &scheduler); }
static void __syncthreads() {
    const unsigned long long before = barriers;
    ++waiting;
    while (barriers == before) take_turns();
}
static float __shfl_xor_sync(unsigned, float x, int offset) {
    shuffled[threadIdx.x] = x;
    take_turns();
    const float other = shuffled[threadIdx.x ^ offset];
    take_turns();
    return other;
}

#include SOURCE

static flowturbo::ARGS args;
static void (*kernel)(flowturbo::ARGS);

static void run_thread() {
    kernel(args);
    threads[threadIdx.x].done = true;
    --alive;
}

static void run_block(unsigned size) {
    threads = std::vector<Thread>(size);
    shuffled.assign(size, NAN);
    alive = size, waiting = 0;
    for (Thread& t : threads) {
        getcontext(&t.context);
        t.stack.reset(new char[1 << 16]);
        t.context.uc_stack = {t.stack.get(), 0, 1 << 16};
        t.context.uc_link = &scheduler;
        makecontext(&t.context, run_thread, 0);
    }
    while (alive) {
        for (unsigned i = 0; i < size; ++i) {
            threadIdx = {i, 0, 0};
            if (!threads[i].done) swapcontext(&scheduler, &threads[i].context);
        }
        if (waiting && waiting == alive) waiting = 0, ++barriers;
    }
}

// 1 if no kernel has that name.
extern "C" int run(const char* name, unsigned grid_x, unsigned grid_y, unsigned size,
                   const void* bytes) {
    for (const flowturbo::Entry& entry : flowturbo::ENTRIES()) {
        if (entry.name != name) continue;
        kernel = reinterpret_cast<void (*)(flowturbo::ARGS)>(const_cast<void*>(entry.kernel));
        memcpy(&args, bytes, sizeof args);
        blockDim = {size, 1, 1};
        for (blockIdx.y = 0; blockIdx.y < grid_y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x) run_block(size);
        return 0;
    }
    return 1;
}
