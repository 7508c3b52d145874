// Launches a kernel by name with its struct, on the caller's stream; errors name the kernel.
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <unordered_map>

#include "kernels.h"

namespace flowturbo {
namespace {

const std::unordered_map<std::string, Entry>& table() {
    static const auto entries = [] {
        std::unordered_map<std::string, Entry> all;
        for (const auto& part : {adaln_entries(), velocity_update_entries(), group_norm_entries()})
            for (const Entry& entry : part) all.emplace(entry.name, entry);
        return all;
    }();
    return entries;
}

const Entry& find(const std::string& name, const std::string& bytes) {
    const auto entry = table().find(name);
    if (entry == table().end()) throw std::invalid_argument("no kernel is called " + name);
    if (bytes.size() != entry->second.size)
        throw std::invalid_argument(name + ": its arguments take " +
                                    std::to_string(entry->second.size) + " bytes, got " +
                                    std::to_string(bytes.size()));
    return entry->second;
}

}  // namespace

std::vector<std::string> names() {
    std::vector<std::string> all;
    for (const auto& entry : table()) all.push_back(entry.first);
    return all;
}

void launch(const std::string& name, const std::vector<unsigned>& grid, unsigned threads,
            unsigned shared, const std::string& bytes, std::size_t stream, bool dependent) {
    const Entry& entry = find(name, bytes);
    std::vector<char> args(bytes.begin(), bytes.end());  // new[] aligns enough for pointers
    void* pointers[] = {args.data()};
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid.at(0), grid.size() > 1 ? grid[1] : 1, grid.size() > 2 ? grid[2] : 1);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = dependent ? 1 : 0;
    const cudaError_t status = cudaLaunchKernelExC(&config, entry.kernel, pointers);
    if (status != cudaSuccess) {
        cudaGetLastError();  // clears it: any later call would report it again
        throw std::runtime_error(name + ": " + cudaGetErrorString(status));
    }
}

void run_on_host(const std::string& name, const std::string& bytes) {
    const Entry& entry = find(name, bytes);
    std::vector<char> args(bytes.begin(), bytes.end());
    entry.on_host(args.data());
}

}  // namespace flowturbo
