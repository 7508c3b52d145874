// The CUDA runtime: streams, events, captures and graphs.
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

// ---- streams

static std::set<void*> destroyed;  // streams that are gone

bool alive(void* stream, const char* call) {
    fake_make_context_current();
    Lock lock;
    if (!destroyed.count(stream)) return true;
    fake::violation(std::string(call) + " of a stream that was destroyed");
    return false;
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    return *stream = (cudaStream_t)fake::new_handle(), cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return cudaStreamCreateWithPriority(stream, 0, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return cudaStreamCreateWithPriority(stream, 0, 0);
}
API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    Lock lock;
    fake::invalidate(stream, "its stream is destroyed");
    destroyed.insert(stream);
    return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    return *priority = 0, cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (!alive(stream, "cudaStreamQuery")) return result(cudaErrorInvalidResourceHandle);
    if (fake::capturing(stream))
        return fake::invalidate(stream, "its stream is queried"), result(UNSUPPORTED);
    return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (!alive(stream, "cudaStreamSynchronize")) return result(cudaErrorInvalidResourceHandle);
    if (fake::capturing(stream))
        return fake::invalidate(stream, "its stream is waited for by the host"),
               result(UNSUPPORTED);
    return fake::forbidden_unsafe("cudaStreamSynchronize") ? result(UNSUPPORTED) : cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
    return fake::forbidden_whole("cudaDeviceSynchronize") ? result(UNSUPPORTED) : cudaSuccess;
}
API cudaError_t
cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
    if (fake::capturing(stream))
        return fake::invalidate(stream, "cudaStreamAddCallback"), result(UNSUPPORTED);
    return call(stream, cudaSuccess, data), cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
    fake::submit(Work::host, "host function", stream);
    if (!fake::capturing(stream)) call(data);
    return cudaSuccess;
}

// ---- events. Times are of a clock that goes on by a step at each record: no figure means
// anything.

struct Event {
    std::shared_ptr<fake::Capture> capture;  // in which it was recorded
    void* stream = nullptr;
    size_t nodes = 0;  // of the capture, when it was recorded
    double milliseconds = 0;
    bool recorded = false;
};
static std::map<void*, Event> events;
static double now = 0;
static const double STEP =
    5;  // a warm-up of 25 ms and 100 ms of repeats, as benchmarks take them, are then a few calls

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return *event = (cudaEvent_t)fake::new_handle(), cudaSuccess;
}
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
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}
static bool captured(cudaEvent_t event) {
    Lock lock;
    auto it = events.find(event);
    if (it == events.end() || !it->second.capture) return false;
    fake::invalidate(
        it->second.stream, "an event that was recorded in it is asked for by the host");
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
    if (!events[from].recorded || !events[to].recorded)
        return result(cudaErrorInvalidResourceHandle);
    *milliseconds = float(events[to].milliseconds - events[from].milliseconds);
    return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (!alive(stream, "cudaStreamWaitEvent")) return result(cudaErrorInvalidResourceHandle);
    Lock lock;
    auto it = events.find(event);
    if (it == events.end() || !it->second.recorded)
        return cudaSuccess;  // never recorded: nothing to wait for
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
    return !capture           ? cudaStreamCaptureStatusNone
           : capture->invalid ? cudaStreamCaptureStatusInvalidated
                              : cudaStreamCaptureStatusActive;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    Lock lock;
    return *status = status_of(stream), cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
    cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
    size_t* count) {
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
    return fake::begin_capture(stream, (fake::Mode)(int)mode) ? cudaSuccess
                                                              : result(cudaErrorIllegalState);
}

static std::map<void*, std::shared_ptr<fake::Capture>>
    graphs;                                  // a graph's handle is its capture's address
static std::map<void*, size_t> executables;  // and how many nodes it has

API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    Lock lock;
    *graph = nullptr;
    auto capture = fake::end_capture(stream);
    if (!capture) return result(cudaErrorIllegalState);
    if (capture->invalid)
        return result(
            capture->unjoined.empty() ? cudaErrorStreamCaptureInvalidated
                                      : cudaErrorStreamCaptureUnjoined);
    graphs[capture.get()] = capture;
    *graph = (cudaGraph_t)capture.get();
    return cudaSuccess;
}
API cudaError_t
cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    Lock lock;
    if (!graphs.count(graph)) return result(cudaErrorInvalidValue);
    *executable = (cudaGraphExec_t)fake::new_handle();
    executables[*executable] = graphs[graph]->nodes.size();
    return cudaSuccess;
}
API cudaError_t
cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(executable, graph, flags);
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    Lock lock;
    if (!executables.count(executable)) {
        fake::violation("a graph is launched after it was destroyed");
        return result(cudaErrorInvalidValue);
    }
    fake::submit(
        Work::kernel, "graph of " + std::to_string(executables[executable]) + " nodes", stream);
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
API cudaError_t
cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
    return *count = 0, cudaSuccess;
}
API cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
    return cudaSuccess;
}
API cudaError_t
cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
    return *object = (cudaUserObject_t)fake::new_handle(), cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
