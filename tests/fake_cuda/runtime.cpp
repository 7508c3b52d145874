// The CUDA runtime (cudart), as far as torch, Triton, CuPy and the project's extension use it.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "runtime.h"

using fake::Lock;
using fake::Work;

static thread_local cudaError_t last = cudaSuccess;
static thread_local int current = 0;  // device

cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last = error;
    return error;
}

// ---- devices and errors

API cudaError_t cudaGetDeviceCount(int* count) {
    return *count = fake::device_count(), cudaSuccess;
}
API cudaError_t cudaGetDevice(int* index) { return *index = current, cudaSuccess; }
API cudaError_t cudaSetDevice(int index) {
    if (index < 0 || index >= fake::device_count()) return result(cudaErrorInvalidDevice);
    current = index;
    fake_make_context_current();
    return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    const fake::Device& d = fake::device();
    memset(p, 0, sizeof *p);
    strcpy(p->name, d.name);
    p->major = d.major, p->minor = d.minor, p->multiProcessorCount = d.multiprocessors;
    p->totalGlobalMem = fake::total_memory();
    p->warpSize = 32, p->maxThreadsPerBlock = 1024,
    p->maxThreadsPerMultiProcessor = d.threads_multiprocessor;
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = d.shared_optin,
    p->sharedMemPerMultiprocessor = d.shared_multiprocessor;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->l2CacheSize = d.l2_mib << 20, p->memoryBusWidth = d.bus_bits;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->textureAlignment = 512, p->concurrentKernels = p->unifiedAddressing = 1;
    return cudaSuccess;
}
int fake_attribute(int which) {  // cudaDeviceAttr and CUdevice_attribute share their numbers
    const fake::Device& d = fake::device();
    switch (which) {
        case cudaDevAttrMaxThreadsPerBlock:
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return d.shared_optin;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return d.shared_multiprocessor;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrClockRate: return d.clock_khz;
        case cudaDevAttrMemoryClockRate: return d.memory_khz;
        case cudaDevAttrGlobalMemoryBusWidth: return d.bus_bits;
        case cudaDevAttrMultiProcessorCount: return d.multiprocessors;
        case cudaDevAttrL2CacheSize: return d.l2_mib << 20;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return d.threads_multiprocessor;
        case cudaDevAttrComputeCapabilityMajor: return d.major;
        case cudaDevAttrComputeCapabilityMinor: return d.minor;
        case cudaDevAttrIntegrated:
        case cudaDevAttrEccEnabled:
        case cudaDevAttrKernelExecTimeout: return 0;
        default: return 1;
    }
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    return *value = fake_attribute(which), cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) {
    return *least = 0, *most = -5, cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int index) {
    return snprintf(text, size, "0000:%02x:00.0", index), cudaSuccess;
}
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
    return *pool = nullptr, cudaSuccess;
}
API cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit) { return *value = 0, cudaSuccess; }
API cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
API cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
API cudaError_t cudaPeekAtLastError() { return last; }
API const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
        case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
        case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
        case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
        case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
        case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
        case cudaErrorNotSupported: return "cudaErrorNotSupported";
        default:
            static thread_local char text[48];
            snprintf(text, sizeof text, "cudaError %d", (int)error);
            return text;
    }
}
API const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorStreamCaptureUnsupported:
            return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated:
            return "operation failed due to a previous error during capture";
        default: return cudaGetErrorName(error);
    }
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- memory

API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    fake_make_context_current();
    *total = fake::total_memory();
    *free = *total - std::min(*total, fake::used_memory());
    return cudaSuccess;
}
API cudaError_t cudaMalloc(void** memory, size_t bytes) {
    fake_make_context_current();
    if (fake::forbidden_unsafe("cudaMalloc")) return result(UNSUPPORTED);
    *memory = fake::allocate(bytes);
    return *memory ? cudaSuccess : result(cudaErrorMemoryAllocation);
}
API cudaError_t cudaFree(void* memory) {
    if (!memory) return cudaSuccess;
    if (fake::forbidden_unsafe("cudaFree")) return result(UNSUPPORTED);
    return fake::release(memory) ? cudaSuccess : result(cudaErrorInvalidValue);
}
API cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
    if (fake::forbidden_unsafe("cudaHostAlloc")) return result(UNSUPPORTED);
    *memory = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    fake::pin(*memory, bytes);
    return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* memory) {
    if (fake::unpin(memory)) free(memory);
    return cudaSuccess;
}
API cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
    return fake::pin(memory, bytes), cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* memory) { return fake::unpin(memory), cudaSuccess; }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* memory) {
    memset(a, 0, sizeof *a);
    const bool on_device = fake::on_device(memory), pinned = fake::pinned(memory);
    a->type = on_device ? cudaMemoryTypeDevice
              : pinned  ? cudaMemoryTypeHost
                        : cudaMemoryTypeUnregistered;
    a->devicePointer = on_device || pinned ? const_cast<void*>(memory) : nullptr;
    a->hostPointer = pinned ? const_cast<void*>(memory) : nullptr;
    return cudaSuccess;
}
API cudaError_t
cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    fake_make_context_current();
    if (!fake::capturing(stream)) {
        fake::submit(Work::copy, "memcpy", stream);
        fake::copy(to, from, bytes);
        return cudaSuccess;
    }
    for (const void* end : {(const void*)to, from})
        if (!fake::on_device(end) && !fake::pinned(end)) {
            fake::invalidate(
                stream, "a copy of " + std::to_string(bytes) +
                            " bytes between the device and pageable memory");
            return result(UNSUPPORTED);
        }
    fake::submit(Work::copy, "memcpy", stream);
    return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    fake_make_context_current();
    if (fake::forbidden_unsafe("cudaMemcpy")) return result(cudaErrorStreamCaptureImplicit);
    fake::copy(to, from, bytes);
    return cudaSuccess;
}
API cudaError_t
cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
API cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
    cudaMemcpyKind, cudaStream_t stream) {
    fake::submit(Work::copy, "memcpy 2D", stream);
    for (size_t row = 0; row < height && !fake::capturing(stream); row++)
        memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
    return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
    return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    fake_make_context_current();
    fake::submit(Work::fill, "memset", stream);
    if (!fake::capturing(stream)) fake::fill(to, value, bytes);
    return cudaSuccess;
}
API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    if (fake::forbidden_unsafe("cudaMemset")) return result(cudaErrorStreamCaptureImplicit);
    fake::fill(to, value, bytes);
    return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    static char symbol[1 << 16];
    return *address = symbol, cudaSuccess;
}

// ---- the driver's entry points

API cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* found) {
    *function = fake::entry_point(name);
    if (found)
        *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPoint(
    const char* name, void** function, unsigned long long flags,
    cudaDriverEntryPointQueryResult* found) {
    return cudaGetDriverEntryPointByVersion(name, function, 13000, flags, found);
}
