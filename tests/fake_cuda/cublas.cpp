// cuBLAS and cuBLASLt: every product is one launch, of no arithmetic.
#include <cublasLt.h>
#include <cublas_api.h>

#include <cstring>
#include <map>

#include "stand_in.h"

using fake::Lock;
using fake::Work;

static std::map<void*, void*> streams, workspaces;  // of a handle

// Called before each launch of a product of cuBLAS, when it has its workspace: a test may wait
// there.
static void (*before_product)() = nullptr;
API void fake_cuda_before_product(void (*call)()) { before_product = call; }

void fake_product(void* handle, const char* name) {
    if (before_product) before_product();
    Lock lock;
    if (void* workspace = workspaces[handle])
        if (!fake::on_device(workspace))
            fake::violation(
                std::string(name) + " has a workspace that was given back to the device");
    fake::submit(Work::kernel, name, streams[handle]);
}

// ---- cuBLAS; the products themselves are in products.cpp

static const cublasStatus_t FINE = CUBLAS_STATUS_SUCCESS;
API cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    return *handle = (cublasHandle_t)fake::new_handle(), FINE;
}
API cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return FINE; }
API cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    Lock lock;
    return streams[handle] = stream, FINE;
}
API cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t* stream) {
    Lock lock;
    return *stream = (cudaStream_t)streams[handle], FINE;
}
API cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t) {
    Lock lock;
    return workspaces[handle] = workspace, FINE;
}
API cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return FINE; }
API cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
    return *mode = CUBLAS_DEFAULT_MATH, FINE;
}
API cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t) { return FINE; }
API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
    return *mode = CUBLAS_POINTER_MODE_HOST, FINE;
}
API cublasStatus_t cublasSetSmCountTarget(cublasHandle_t, int) { return FINE; }

// ---- cuBLASLt

API size_t cublasLtGetVersion() { return 130100; }
API cublasStatus_t
cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t, cudaDataType_t) {
    return *d = (cublasLtMatmulDesc_t)fake::new_handle(), FINE;
}
API cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t) { return FINE; }
API cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void*, size_t) {
    return FINE;
}
API cublasStatus_t
cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* d, cudaDataType, uint64_t, uint64_t, int64_t) {
    return *d = (cublasLtMatrixLayout_t)fake::new_handle(), FINE;
}
API cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t) { return FINE; }
API cublasStatus_t cublasLtMatrixLayoutSetAttribute(
    cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, const void*, size_t) {
    return FINE;
}
API cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* d) {
    return *d = (cublasLtMatmulPreference_t)fake::new_handle(), FINE;
}
API cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t) { return FINE; }
API cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void*, size_t) {
    return FINE;
}
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
    cublasLtMatmulHeuristicResult_t* found, int* count) {
    memset(found, 0, sizeof *found);
    return *count = 1, FINE;
}
API cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*, cublasLtMatrixLayout_t,
    const void*, cublasLtMatrixLayout_t, const void*, const void*, cublasLtMatrixLayout_t, void*,
    cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t stream) {
    fake::submit(Work::kernel, "cublasLtMatmul", stream);
    return FINE;
}
