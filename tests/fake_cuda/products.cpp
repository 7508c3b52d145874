// cuBLAS's products, without its header: of their arguments only the handle is read.
#include "stand_in.h"

void fake_product(void* handle, const char* name);

#define PRODUCT(name)                 \
    API int name(void* handle, ...) { \
        fake_product(handle, #name);  \
        return 0;                     \
    }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
