// The table of kernels: each .cu file lists its template instances by name. `bytes` holds the
// kernel's argument, a struct of pointers and sizes.
#pragma once
#include <string>
#include <vector>

namespace flowturbo {

struct Entry {
    std::string name;                   // of the instance, as C++ writes it
    const void* kernel;                 // for cudaLaunchKernelExC
    void (*on_host)(const void* args);  // the same arithmetic in a loop over CPU memory
    std::size_t size;                   // of the struct
};

std::vector<Entry> adaln_entries();
std::vector<Entry> velocity_update_entries();
std::vector<Entry> group_norm_entries();

std::vector<std::string> names();
// dependent: by programmatic dependent launch, which the device must have.
void launch(const std::string& name, const std::vector<unsigned>& grid, unsigned threads,
            unsigned shared, const std::string& bytes, std::size_t stream, bool dependent);
void run_on_host(const std::string& name, const std::string& bytes);

}  // namespace flowturbo
