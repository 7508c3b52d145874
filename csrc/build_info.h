#pragma once
#include <string>

namespace flowturbo {

struct BuildInfo {
    int cuda_version = 0;       // as CUDART_VERSION: 13000 is 13.0
    std::string architectures;  // of the machine code inside, separated by spaces
    int devices = 0;            // CUDA devices that the driver shows
    std::string problem;        // why there are none, in the runtime's words
};

BuildInfo build_info();

}  // namespace flowturbo
