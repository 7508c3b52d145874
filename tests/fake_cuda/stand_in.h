// What the sections of the stand-in share: one device's properties, streams and captures, launches,
// and what CUDA forbids.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace fake {

struct Device {
    const char* key;  // as FAKE_CUDA names it
    const char* name;
    int major, minor, multiprocessors, memory_mib, l2_mib, shared_optin, shared_multiprocessor,
        threads_multiprocessor;
    int clock_khz, memory_khz, bus_bits;
};
const Device& device();
int device_count();
std::size_t total_memory();

extern std::recursive_mutex mutex;  // everything below is called with it held, or takes it
struct Lock {
    std::lock_guard<std::recursive_mutex> held{mutex};
};

// What CUDA forbids, or what this library does not know, was done: it fails the test that did it.
void violation(const std::string& what);

// Work given to a stream: a node where the stream is captured, else a launch.
enum class Work { kernel, copy, fill, host };
// dependent: by programmatic dependent launch.
void submit(Work kind, const std::string& name, void* stream, bool dependent = false);

// Captures, by the rules of "CUDA Graphs, prohibited and unhandled operations" in the programming
// guide.
enum class Mode { global, thread_local_, relaxed };
Mode exchange_mode(Mode mode);
bool capturing(void* stream);
// A call that may not be made now: `unsafe` ones by the modes of captures under way, `whole` ones
// (of the device) by any capture.
bool forbidden_unsafe(const char* call);
bool forbidden_whole(const char* call);
void invalidate(void* stream, const std::string& why);

// Launch limits. Returns what is wrong, or an empty string.
struct Shape {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z;
    std::size_t shared;
};
struct Limits {
    int registers = 0;  // a thread; 0: not known
    int most_threads = 1024;
    std::size_t static_shared = 0, dynamic_shared = 48 << 10;
    bool waits = true;  // for the kernels before it, where its code says so or is not known
};
// What is wrong with a programmatic dependent launch of such a kernel, or an empty string.
std::string dependent_misfit(const Limits& limits);
std::string misfit(const Shape& shape, const Limits& limits);

void* new_handle();
// Device memory is host memory, given page by page as it is written.
void* allocate(std::size_t bytes);
bool release(void* memory);
bool on_device(const void* memory);
bool pinned(const void* memory);
void pin(void* memory, std::size_t bytes);
bool unpin(void* memory);
std::size_t used_memory();
// Neither writes much to the device: weights of which nothing is computed would only fill the
// host's memory.
void fill(void* to, int value, std::size_t bytes);
void copy(void* to, const void* from, std::size_t bytes);

// An entry point by name, as cudaGetDriverEntryPoint and dlsym answer; null where there is none.
void* entry_point(const char* name);

}  // namespace fake
