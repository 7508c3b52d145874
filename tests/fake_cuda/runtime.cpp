// The CUDA runtime (cudart), as far as torch, Triton, CuPy and the project's extension use it.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "captures.h"

using fake::Lock;
using fake::Work;

static thread_local cudaError_t last = cudaSuccess;
static thread_local int current = 0;  // device
void fake_make_context_current();  // what nearly all of the runtime's calls do in a thread of their own

static cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last = error;
    return error;
}
static const cudaError_t UNSUPPORTED = cudaErrorStreamCaptureUnsupported;

// ---- devices and errors

API cudaError_t cudaGetDeviceCount(int* count) { return *count = fake::device_count(), cudaSuccess; }
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
    p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = d.threads_multiprocessor;
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = d.shared_optin, p->sharedMemPerMultiprocessor = d.shared_multiprocessor;
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
        case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return d.shared_optin;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return d.shared_multiprocessor;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrClockRate: return d.clock_khz;
        case cudaDevAttrMemoryClockRate: return d.memory_khz;
        case cudaDevAttrGlobalMemoryBusWidth: return d.bus_bits;
        case cudaDevAttrMultiProcessorCount: return d.multiprocessors;
        case cudaDevAttrL2CacheSize: return d.l2_mib << 20;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return d.threads_multiprocessor;
        case cudaDevAttrComputeCapabilityMajor: return d.major;
        case cudaDevAttrComputeCapabilityMinor: return d.minor;
        case cudaDevAttrIntegrated: case cudaDevAttrEccEnabled: case cudaDevAttrKernelExecTimeout: return 0;
        default: return 1;
    }
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) { return *value = fake_attribute(which), cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { return *least = 0, *most = -5, cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int index) { return snprintf(text, size, "0000:%02x:00.0", index), cudaSuccess; }
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { return *pool = nullptr, cudaSuccess; }
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
        default: static thread_local char text[48]; snprintf(text, sizeof text, "cudaError %d", (int)error); return text;
    }
}
API const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
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
API cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) { return fake::pin(memory, bytes), cudaSuccess; }
API cudaError_t cudaHostUnregister(void* memory) { return fake::unpin(memory), cudaSuccess; }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* memory) {
    memset(a, 0, sizeof *a);
    const bool on_device = fake::on_device(memory), pinned = fake::pinned(memory);
    a->type = on_device ? cudaMemoryTypeDevice : pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->devicePointer = on_device || pinned ? const_cast<void*>(memory) : nullptr;
    a->hostPointer = pinned ? const_cast<void*>(memory) : nullptr;
    return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    fake_make_context_current();
    if (!fake::capturing(stream)) {
        fake::submit(Work::copy, "memcpy", stream);
        fake::copy(to, from, bytes);
        return cudaSuccess;
    }
    for (const void* end : {(const void*)to, from})
        if (!fake::on_device(end) && !fake::pinned(end)) {
            fake::invalidate(stream, "a copy of " + std::to_string(bytes) + " bytes between the device and pageable memory");
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
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
API cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
    fake::submit(Work::copy, "memcpy 2D", stream);
    for (size_t row = 0; row < height && !fake::capturing(stream); row++)
        memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
    return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
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

// ---- streams

static std::set<void*> destroyed;  // streams that are gone

static bool alive(void* stream, const char* call) {
    fake_make_context_current();
    Lock lock;
    if (!destroyed.count(stream)) return true;
    fake::violation(std::string(call) + " of a stream that was destroyed");
    return false;
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return *stream = (cudaStream_t)fake::new_handle(), cudaSuccess; }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    Lock lock;
    fake::invalidate(stream, "its stream is destroyed");
    destroyed.insert(stream);
    return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (!alive(stream, "cudaStreamQuery")) return result(cudaErrorInvalidResourceHandle);
    if (fake::capturing(stream)) return fake::invalidate(stream, "its stream is queried"), result(UNSUPPORTED);
    return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (!alive(stream, "cudaStreamSynchronize")) return result(cudaErrorInvalidResourceHandle);
    if (fake::capturing(stream)) return fake::invalidate(stream, "its stream is waited for by the host"), result(UNSUPPORTED);
    return fake::forbidden_unsafe("cudaStreamSynchronize") ? result(UNSUPPORTED) : cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() { return fake::forbidden_whole("cudaDeviceSynchronize") ? result(UNSUPPORTED) : cudaSuccess; }
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
    if (fake::capturing(stream)) return fake::invalidate(stream, "cudaStreamAddCallback"), result(UNSUPPORTED);
    return call(stream, cudaSuccess, data), cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
    fake::submit(Work::host, "host function", stream);
    if (!fake::capturing(stream)) call(data);
    return cudaSuccess;
}

// ---- events. Times are of a clock that goes on by a step at each record: no figure means anything.

struct Event {
    std::shared_ptr<fake::Capture> capture;  // in which it was recorded
    void* stream = nullptr;
    size_t nodes = 0;  // of the capture, when it was recorded
    double milliseconds = 0;
    bool recorded = false;
};
static std::map<void*, Event> events;
static double now = 0;
static const double STEP = 5;  // a warm-up of 25 ms and 100 ms of repeats, as benchmarks take them, are then a few calls

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = (cudaEvent_t)fake::new_handle(), cudaSuccess; }
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
    Lock lock;
    events.erase(event);
    return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (!alive(stream, "cudaEventRecord")) return result(cudaErrorInvalidResourceHandle);
    Lock lock;
    auto capture = fake::capture_of(stream);
    events[event] = {capture, stream, capture ? capture->nodes.size() : 0, now += STEP, true};
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) { return cudaEventRecord(event, stream); }
static bool captured(cudaEvent_t event) {
    Lock lock;
    auto it = events.find(event);
    if (it == events.end() || !it->second.capture) return false;
    fake::invalidate(it->second.stream, "an event that was recorded in it is asked for by the host");
    return true;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (captured(event)) return result(cudaErrorCapturedEvent);
    return fake::forbidden_unsafe("cudaEventQuery") ? result(UNSUPPORTED) : cudaSuccess;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (captured(event)) return result(cudaErrorCapturedEvent);
    return fake::forbidden_unsafe("cudaEventSynchronize") ? result(UNSUPPORTED) : cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    Lock lock;
    if (!events[from].recorded || !events[to].recorded) return result(cudaErrorInvalidResourceHandle);
    *milliseconds = float(events[to].milliseconds - events[from].milliseconds);
    return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (!alive(stream, "cudaStreamWaitEvent")) return result(cudaErrorInvalidResourceHandle);
    Lock lock;
    auto it = events.find(event);
    if (it == events.end() || !it->second.recorded) return cudaSuccess;  // never recorded: nothing to wait for
    auto mine = fake::capture_of(stream), theirs = it->second.capture;
    const bool under_way = theirs && fake::capture_of(theirs->origin) == theirs;
    if (mine && theirs != mine) {
        fake::invalidate(stream, "it waits for an event that was recorded outside it");
        return result(cudaErrorStreamCaptureIsolation);
    }
    if (!mine && under_way) fake::join_capture(stream, theirs);
    if (mine && it->second.stream != (void*)stream) mine->unjoined.erase(it->second.stream);
    return cudaSuccess;
}

// ---- captures and graphs

static cudaStreamCaptureStatus status_of(void* stream) {
    auto capture = fake::capture_of(stream);
    return !capture ? cudaStreamCaptureStatusNone : capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    Lock lock;
    return *status = status_of(stream), cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** nodes,
    const cudaGraphEdgeData** edges, size_t* count) {
    Lock lock;
    *status = status_of(stream);
    auto capture = fake::capture_of(stream);
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture ? (cudaGraph_t)capture.get() : nullptr;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    *mode = (cudaStreamCaptureMode)(int)fake::exchange_mode((fake::Mode)(int)*mode);
    return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    if (!stream) return result(UNSUPPORTED);
    return fake::begin_capture(stream, (fake::Mode)(int)mode) ? cudaSuccess : result(cudaErrorIllegalState);
}

static std::map<void*, std::shared_ptr<fake::Capture>> graphs;  // a graph's handle is its capture's address
static std::map<void*, size_t> executables;                     // and how many nodes it has

API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    Lock lock;
    *graph = nullptr;
    auto capture = fake::end_capture(stream);
    if (!capture) return result(cudaErrorIllegalState);
    if (capture->invalid) return result(capture->unjoined.empty() ? cudaErrorStreamCaptureInvalidated : cudaErrorStreamCaptureUnjoined);
    graphs[capture.get()] = capture;
    *graph = (cudaGraph_t)capture.get();
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    Lock lock;
    if (!graphs.count(graph)) return result(cudaErrorInvalidValue);
    *executable = (cudaGraphExec_t)fake::new_handle();
    executables[*executable] = graphs[graph]->nodes.size();
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(executable, graph, flags);
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    Lock lock;
    if (!executables.count(executable)) {
        fake::violation("a graph is launched after it was destroyed");
        return result(cudaErrorInvalidValue);
    }
    fake::submit(Work::kernel, "graph of " + std::to_string(executables[executable]) + " nodes", stream);
    return cudaSuccess;
}
API cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    Lock lock;
    return executables.erase(executable) ? cudaSuccess : result(cudaErrorInvalidValue);
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    Lock lock;
    return graphs.erase(graph) ? cudaSuccess : result(cudaErrorInvalidValue);
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
    Lock lock;
    *count = graphs.count(graph) ? graphs[graph]->nodes.size() : 0;
    return cudaSuccess;
}
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) { return *count = 0, cudaSuccess; }
API cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
    return *object = (cudaUserObject_t)fake::new_handle(), cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }

// ---- kernels

static std::map<const void*, std::string> kernels;       // by the address of their host function
static std::map<const void*, size_t> dynamic_shared;     // what cudaFuncSetAttribute raised it to

static std::string name_of(const void* kernel) {
    auto it = kernels.find(kernel);
    return it == kernels.end() ? "a kernel without a name" : it->second;
}
static cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, void* stream) {
    fake_make_context_current();
    Lock lock;
    if (!alive(stream, "a launch")) return result(cudaErrorInvalidResourceHandle);
    fake::Limits limits;
    auto raised = dynamic_shared.find(kernel);
    if (raised != dynamic_shared.end()) limits.dynamic_shared = std::max(limits.dynamic_shared, raised->second);
    const auto wrong = fake::misfit({grid.x, grid.y, grid.z, block.x, block.y, block.z, shared}, limits);
    if (!wrong.empty()) return fake::violation(name_of(kernel) + " can't be launched: " + wrong), result(cudaErrorInvalidConfiguration);
    fake::submit(Work::kernel, name_of(kernel), stream);
    return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared, stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
    return launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) { return *kernel = (cudaKernel_t)function, cudaSuccess; }
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared, stream);
}
API cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared, stream);
}
static thread_local struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} configured;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) { return configured = {grid, block, shared, stream}, 0; }
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configured.grid, *block = configured.block, *shared = configured.shared, *(void**)stream = configured.stream;
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
API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
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
API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute which, int value, int) {
    return cudaFuncSetAttribute(kernel, which, value);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = 10 * fake::device().major + fake::device().minor;
    a->maxDynamicSharedSizeBytes = fake::device().shared_optin;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) { return *blocks = 2, cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) { return *blocks = 2, cudaSuccess; }

// ---- the driver's entry points

API cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found) {
    *function = fake::entry_point(name);
    if (found) *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags, cudaDriverEntryPointQueryResult* found) {
    return cudaGetDriverEntryPointByVersion(name, function, 13000, flags, found);
}
