// cuDNN's graph interface, far enough for convolutions: descriptors hold what they are told, one
// engine runs everything.
#include <cudnn.h>

#include <cstring>
#include <map>
#include <set>
#include <vector>

#include "stand_in.h"

using fake::Lock;
using fake::Work;

static const cudnnStatus_t FINE = CUDNN_STATUS_SUCCESS;
static std::map<void*, void*> streams;  // of a handle

API size_t cudnnGetVersion() { return CUDNN_VERSION; }
API size_t cudnnGetCudartVersion() { return 13000; }
API const char* cudnnGetErrorString(cudnnStatus_t status) {
    return status == FINE ? "CUDNN_STATUS_SUCCESS" : "a status of the stand-in for cuDNN";
}
API void cudnnGetLastErrorString(char* text, size_t size) { strncpy(text, "", size); }
API cudnnStatus_t cudnnGetProperty(libraryPropertyType which, int* value) {
    *value = which == MAJOR_VERSION   ? CUDNN_MAJOR
             : which == MINOR_VERSION ? CUDNN_MINOR
                                      : CUDNN_PATCHLEVEL;
    return FINE;
}
API cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
    return *handle = (cudnnHandle_t)fake::new_handle(), FINE;
}
API cudnnStatus_t cudnnDestroy(cudnnHandle_t) { return FINE; }
API cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
    Lock lock;
    return streams[handle] = stream, FINE;
}
API cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t* stream) {
    Lock lock;
    return *stream = (cudaStream_t)streams[handle], FINE;
}

// ---- descriptors

struct Attribute {
    int64_t count = 0;
    std::vector<char> bytes;
};
struct Descriptor {
    cudnnBackendDescriptorType_t type;
    std::map<int, Attribute> attributes;
};

static size_t size_of(cudnnBackendAttributeType_t type) {
    switch (type) {
        case CUDNN_TYPE_INT64:
        case CUDNN_TYPE_DOUBLE:
        case CUDNN_TYPE_VOID_PTR:
        case CUDNN_TYPE_HANDLE:
        case CUDNN_TYPE_BACKEND_DESCRIPTOR: return 8;
        case CUDNN_TYPE_BOOLEAN:
        case CUDNN_TYPE_CHAR: return 1;
        case CUDNN_TYPE_FRACTION: return 16;
        default: return 4;
    }
}
API cudnnStatus_t
cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* made) {
    *made = (cudnnBackendDescriptor_t) new Descriptor{type, {}};
    return FINE;
}
API cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
    return delete (Descriptor*)descriptor, FINE;
}
API cudnnStatus_t cudnnBackendInitialize(cudnnBackendDescriptor_t) { return FINE; }
API cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t) { return FINE; }
API cudnnStatus_t cudnnBackendSetAttribute(
    cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
    cudnnBackendAttributeType_t type, int64_t count, const void* values) {
    const char* bytes = (const char*)values;
    ((Descriptor*)descriptor)->attributes[name] = {
        count, {bytes, bytes + (bytes ? count * size_of(type) : 0)}};
    return FINE;
}
// What was set is given back. What only cuDNN knows: one engine, without notes, knobs or workspace,
// in one configuration.
API cudnnStatus_t cudnnBackendGetAttribute(
    const cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
    cudnnBackendAttributeType_t type, int64_t room, int64_t* count, void* values) {
    auto& attributes = ((Descriptor*)descriptor)->attributes;
    int64_t ignored;
    count = count ? count : &ignored;
    if (type ==
        CUDNN_TYPE_BACKEND_DESCRIPTOR) {  // the caller made the descriptors, which would be filled
        const bool one =
            name == CUDNN_ATTR_ENGINEHEUR_RESULTS || name == CUDNN_ATTR_ENGINECFG_ENGINE;
        return *count = one ? 1 : 0, FINE;
    }
    auto it = attributes.find(name);
    if (it != attributes.end()) {
        *count = it->second.count;
        if (values)
            memcpy(
                values, it->second.bytes.data(),
                std::min<size_t>(it->second.bytes.size(), room * size_of(type)));
        return FINE;
    }
    const bool number = name == CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT ||
                        name == CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE ||
                        name == CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE;
    *count = number ? 1 : 0;
    if (number && room > 0 && values)
        *(int64_t*)values = name == CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT ? 1 : 0;
    return FINE;
}
API cudnnStatus_t
cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t, cudnnBackendDescriptor_t) {
    Lock lock;
    fake::submit(Work::kernel, "cudnnBackendExecute", streams[handle]);
    return FINE;
}

// torch asks this whether a user allows cuDNN's attention, whose graphs need more than is here: it
// takes its own instead.
API bool _ZNK2at7Context19userEnabledCuDNNSDPEv(const void*) {
    return false;
}  // at::Context::userEnabledCuDNNSDP() const
