// The CUDA runtime: kernels, how they are registered and launched.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "runtime.h"

using fake::Lock;
using fake::Work;

// ---- kernels

static std::map<const void*, std::string> kernels;    // by the address of their host function
static std::map<const void*, size_t> dynamic_shared;  // what cudaFuncSetAttribute raised it to

static std::string name_of(const void* kernel) {
    auto it = kernels.find(kernel);
    return it == kernels.end() ? "a kernel without a name" : it->second;
}
static cudaError_t launch(
    const void* kernel, dim3 grid, dim3 block, size_t shared, void* stream,
    bool dependent = false) {
    fake_make_context_current();
    Lock lock;
    if (!alive(stream, "a launch")) return result(cudaErrorInvalidResourceHandle);
    fake::Limits limits;
    auto raised = dynamic_shared.find(kernel);
    if (raised != dynamic_shared.end())
        limits.dynamic_shared = std::max(limits.dynamic_shared, raised->second);
    auto wrong = fake::misfit({grid.x, grid.y, grid.z, block.x, block.y, block.z, shared}, limits);
    if (wrong.empty() && dependent) wrong = fake::dependent_misfit(limits);
    if (!wrong.empty())
        return fake::violation(name_of(kernel) + " can't be launched: " + wrong),
               result(cudaErrorInvalidConfiguration);
    fake::submit(Work::kernel, name_of(kernel), stream, dependent);
    return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(
    const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared, stream);
}
API cudaError_t cudaLaunchCooperativeKernel(
    const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
    bool dependent = false;
    for (unsigned i = 0; i < config->numAttrs; i++)
        dependent |= config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                     config->attrs[i].val.programmaticStreamSerializationAllowed;
    return launch(
        kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream,
        dependent);
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    return *kernel = (cudaKernel_t)function, cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared, stream);
}
API cudaError_t __cudaLaunchKernel_ptsz(
    cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared, stream);
}
static thread_local struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} configured;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    return configured = {grid, block, shared, stream}, 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configured.grid, *block = configured.block, *shared = configured.shared,
    *(void**)stream = configured.stream;
    return cudaSuccess;
}
API void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
    Lock lock;
    kernels[function] = name;
}
API cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
    Lock lock;
    if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > fake::device().shared_optin) return result(cudaErrorInvalidValue);
    dynamic_shared[kernel] = value;
    return cudaSuccess;
}
API cudaError_t
cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute which, int value, int) {
    return cudaFuncSetAttribute(kernel, which, value);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = 10 * fake::device().major + fake::device().minor;
    a->maxDynamicSharedSizeBytes = fake::device().shared_optin;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void*, int, size_t, unsigned) {
    return *blocks = 2, cudaSuccess;
}
API cudaError_t
cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
    return *blocks = 2, cudaSuccess;
}
