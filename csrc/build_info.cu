// What this extension was built with and what devices there are, for `flowturbo info`.
#include "build_info.h"

#include <cuda_runtime.h>

namespace flowturbo {

BuildInfo build_info() {
    BuildInfo info;
    info.cuda_version = CUDART_VERSION;
    info.architectures = FLOWTURBO_ARCHS;
    const cudaError_t status = cudaGetDeviceCount(&info.devices);
    if (status != cudaSuccess) {
        info.devices = 0;
        info.problem = cudaGetErrorString(status);
    }
    return info;
}

}  // namespace flowturbo
