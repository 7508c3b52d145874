// The device that is none: memory, streams, captures, launch limits, and the record of what was
// done.
#include "stand_in.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <set>

#include "captures.h"

namespace fake {

std::recursive_mutex mutex;

// ---- devices

static const Device DEVICES[] = {
    // key, name, capability, multiprocessors, MiB, L2, shared memory (block, multiprocessor),
    // threads, kHz, kHz, bits
    {"H100", "NVIDIA H100 80GB HBM3", 9, 0, 132, 81559, 50, 232448, 233472, 2048, 1980000, 2619000,
     5120},
    {"H200", "NVIDIA H200", 9, 0, 132, 143771, 50, 232448, 233472, 2048, 1980000, 3201000, 6144},
    {"A100", "NVIDIA A100-SXM4-80GB", 8, 0, 108, 81920, 40, 166912, 167936, 2048, 1410000, 1593000,
     5120},
    {"RTX4090", "NVIDIA GeForce RTX 4090", 8, 9, 128, 24564, 72, 101376, 102400, 1536, 2520000,
     10501000, 384},
};

const Device& device() {
    static const Device& chosen = [&]() -> const Device& {
        const char* wanted = getenv("FAKE_CUDA");
        for (const Device& d : DEVICES)
            if (!wanted || !*wanted || !strcmp(wanted, d.key)) return d;
        fprintf(stderr, "FAKE_CUDA must be one of H100, H200, A100, RTX4090, got %s\n", wanted);
        abort();
    }();
    return chosen;
}

int device_count() {
    static const int count = getenv("FAKE_CUDA_COUNT") ? atoi(getenv("FAKE_CUDA_COUNT")) : 1;
    return count;
}

static std::atomic<std::size_t> memory_limit{0};
std::size_t total_memory() {
    if (!memory_limit) {
        const char* mib = getenv("FAKE_CUDA_MEMORY");
        memory_limit = (mib ? strtoull(mib, nullptr, 10) : (unsigned long long)device().memory_mib)
                       << 20;
    }
    return memory_limit;
}

// ---- what was done

static std::vector<std::string> violations;
static std::deque<std::string> launches, dependents;
static std::vector<std::string> last_capture;
static bool loud() {
    static const bool value = getenv("FAKE_CUDA_LOG") != nullptr;
    return value;
}

void violation(const std::string& what) {
    Lock lock;
    violations.push_back(what);
    fprintf(stderr, "[fake_cuda] %s\n", what.c_str());
}

// A process that ends with violations nobody took says so in the file that run.py reads.
__attribute__((destructor)) static void report() {
    const char* path = getenv("FAKE_CUDA_REPORT");
    if (!path || violations.empty()) return;
    if (FILE* file = fopen(path, "a")) {
        for (const auto& v : violations) fprintf(file, "%d: %s\n", (int)getpid(), v.c_str());
        fclose(file);
    }
}

static std::string demangled(const std::string& name) {
    int status = 0;
    char* plain = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    std::string text = status == 0 ? plain : name;
    free(plain);
    return text;
}

static int copied_out(const std::string& text, char* out, int size) {
    if (out && size > (int)text.size()) memcpy(out, text.c_str(), text.size() + 1);
    return (int)text.size() + 1;
}

template <class List> static std::string joined(const List& list) {
    std::string text;
    for (const auto& line : list) text += demangled(line) + "\n";
    return text;
}

// ---- captures

static std::map<void*, std::shared_ptr<Capture>> captures;  // by every stream that takes part
static thread_local Mode thread_mode = Mode::global;
static unsigned long long next_capture = 1;

Mode exchange_mode(Mode mode) { return std::exchange(thread_mode, mode); }
bool capturing(void* stream) {
    Lock lock;
    return captures.count(stream) != 0;
}
std::shared_ptr<Capture> capture_of(void* stream) {
    Lock lock;
    auto found = captures.find(stream);
    return found == captures.end() ? nullptr : found->second;
}

static bool mine(const Capture& c) { return pthread_equal(c.thread, pthread_self()); }

static void break_capture(Capture& c, const std::string& why) {
    if (!c.invalid) violation("a capture is broken: " + why);
    c.invalid = true;
}

void invalidate(void* stream, const std::string& why) {
    Lock lock;
    if (auto c = capture_of(stream)) break_capture(*c, why);
}

bool forbidden_unsafe(const char* call) {
    Lock lock;
    if (thread_mode == Mode::relaxed) return false;
    for (auto& [stream, c] : captures) {
        const bool by_another = c->mode == Mode::global && thread_mode == Mode::global;
        const bool by_itself = mine(*c) && c->mode != Mode::relaxed;
        if (by_another || by_itself) {
            break_capture(
                *c, std::string(call) + (mine(*c) ? "" : ", by another thread,") +
                        " while it is under way");
            return true;
        }
    }
    return false;
}

bool forbidden_whole(const char* call) {
    Lock lock;
    for (auto& [stream, c] : captures)
        break_capture(*c, std::string(call) + " of the device while it is under way");
    return !captures.empty();
}

bool begin_capture(void* stream, Mode mode) {
    Lock lock;
    if (!stream || capturing(stream)) return false;
    captures[stream] =
        std::make_shared<Capture>(Capture{next_capture++, mode, pthread_self(), stream});
    return true;
}

std::shared_ptr<Capture> end_capture(void* stream) {
    Lock lock;
    auto c = capture_of(stream);
    if (!c) return nullptr;
    if (!mine(*c) && c->mode != Mode::relaxed)
        break_capture(*c, "it is ended by another thread than began it");
    if (stream != c->origin) break_capture(*c, "it is ended on another stream than it began on");
    if (!c->unjoined.empty())
        break_capture(*c, "work that it forked to another stream is not joined");
    for (auto it = captures.begin(); it != captures.end();)
        it = it->second == c ? captures.erase(it) : std::next(it);
    last_capture = c->nodes;
    if (loud()) fprintf(stderr, "[fake_cuda] captured %zu nodes\n", c->nodes.size());
    return c;
}

void join_capture(void* stream, const std::shared_ptr<Capture>& c) {
    captures[stream] = c;
    c->unjoined.insert(stream);
}

// ---- work

void submit(Work kind, const std::string& name, void* stream, bool dependent) {
    Lock lock;
    auto c = capture_of(stream);
    if (dependent) {
        dependents.push_back(name);
        if (dependents.size() > (1u << 20)) dependents.pop_front();
    }
    if (loud())
        fprintf(
            stderr, "[fake_cuda] %s on %p%s\n", demangled(name).c_str(), stream,
            c ? " (captured)" : "");
    if (c) {
        c->nodes.push_back(name);
        if (stream != c->origin) c->unjoined.insert(stream);
        return;
    }
    if (kind == Work::kernel) {
        launches.push_back(name);
        if (launches.size() > (1u << 20)) launches.pop_front();
    }
    for (auto& [other, under_way] : captures)
        if (mine(*under_way)) {
            violation(
                demangled(name) +
                " is launched on another stream than the one that this thread captures");
            return;
        }
}

std::string misfit(const Shape& s, const Limits& limits) {
    const unsigned long long threads = 1ull * s.block_x * s.block_y * s.block_z;
    auto wrong = [](const char* what, unsigned long long got, unsigned long long most) {
        return std::string(what) + " " + std::to_string(got) + ", at most " + std::to_string(most);
    };
    if (!s.grid_x || !s.grid_y || !s.grid_z || !threads) return "an empty grid or block";
    if (s.grid_x > 2147483647u) return wrong("grid x", s.grid_x, 2147483647u);
    if (s.grid_y > 65535) return wrong("grid y", s.grid_y, 65535);
    if (s.grid_z > 65535) return wrong("grid z", s.grid_z, 65535);
    if (s.block_z > 64) return wrong("block z", s.block_z, 64);
    if (threads > 1024) return wrong("threads a block", threads, 1024);
    if (threads > (unsigned)limits.most_threads)
        return wrong("threads of this kernel", threads, limits.most_threads);
    const unsigned long long warps = (threads + 31) / 32,
                             registers = (limits.registers + 7) / 8 * 8 * 32 * warps;
    if (registers > 65536) return wrong("registers a block", registers, 65536);
    if (s.shared > limits.dynamic_shared)
        return wrong("dynamic shared memory", s.shared, limits.dynamic_shared);
    const std::size_t shared = s.shared + limits.static_shared;
    if (shared > (std::size_t)device().shared_optin)
        return wrong("shared memory", shared, device().shared_optin);
    return "";
}

std::string dependent_misfit(const Limits& limits) {
    if (device().major < 9) return "programmatic dependent launch begins with sm_90";
    return limits.waits ? "" : "it may start before the kernels before it end, and does not wait";
}

void* new_handle() {
    static std::atomic<uintptr_t> next{0x100000};
    return (void*)(next += 16);
}

// ---- memory

static std::map<uintptr_t, std::size_t> device_memory, pinned_memory;
static std::size_t used = 0;

static bool within(const std::map<uintptr_t, std::size_t>& ranges, const void* memory) {
    auto it = ranges.upper_bound((uintptr_t)memory);
    return it != ranges.begin() && (--it, (uintptr_t)memory < it->first + it->second);
}

void* allocate(std::size_t bytes) {
    Lock lock;
    if (used + bytes > total_memory()) return nullptr;
    void* got = mmap(
        nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) return nullptr;
    device_memory[(uintptr_t)got] = bytes;
    used += bytes;
    return got;
}

bool release(void* memory) {
    Lock lock;
    auto it = device_memory.find((uintptr_t)memory);
    if (it == device_memory.end()) return false;
    munmap(memory, it->second);
    used -= it->second;
    device_memory.erase(it);
    return true;
}

bool on_device(const void* memory) {
    Lock lock;
    return within(device_memory, memory);
}
bool pinned(const void* memory) {
    Lock lock;
    return within(pinned_memory, memory);
}
void pin(void* memory, std::size_t bytes) {
    Lock lock;
    pinned_memory[(uintptr_t)memory] = bytes;
}
bool unpin(void* memory) {
    Lock lock;
    return pinned_memory.erase((uintptr_t)memory) != 0;
}
std::size_t used_memory() {
    Lock lock;
    return used;
}

static const std::size_t MUCH = 1 << 20;
static bool too_much(const void* to, std::size_t bytes) { return bytes > MUCH && on_device(to); }

void copy(void* to, const void* from, std::size_t bytes) {
    if (!too_much(to, bytes)) memmove(to, from, bytes);
}

void fill(void* to, int value, std::size_t bytes) {
    if (!too_much(to, bytes)) memset(to, value, bytes);
}

// ---- entry points by name

void* entry_point(const char* name) {
    static void* self = [] {
        Dl_info info;
        dladdr((void*)&entry_point, &info);
        return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    }();
    using Find = void* (*)(void*, const char*);
    static Find find = (Find)dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
    static Find old = find ? find : (Find)dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
    for (const char* suffix : {"", "_v2", "_v3"})
        if (void* found = old(self, (std::string(name) + suffix).c_str())) return found;
    return nullptr;
}

}  // namespace fake

// CuPy loads CUDA's libraries by path and asks them by dlsym, past LD_PRELOAD.
API void* dlsym(void* handle, const char* name) {
    static thread_local bool inside = false;
    using Find = void* (*)(void*, const char*);
    static Find real = [] {
        auto found = (Find)dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
        return found ? found : (Find)dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
    }();
    const bool cuda = !strncmp(name, "cu", 2) && strncmp(name, "curl", 4);
    if (cuda && !inside) {
        inside = true;
        void* found = real(RTLD_DEFAULT, "fake_cuda_version") ? fake::entry_point(name) : nullptr;
        inside = false;
        if (found) return found;
    }
    return real(handle, name);
}

// ---- what tests ask (tests/fake_cuda/__init__.py). Texts: lines; the size that is needed is
// returned, and if it fits they are drained.

API int fake_cuda_version() { return 1; }
API int fake_cuda_violations(char* out, int size) {
    fake::Lock lock;
    const std::string text = fake::joined(fake::violations);
    const int needed = fake::copied_out(text, out, size);
    if (out && size >= needed) fake::violations.clear();
    return needed;
}
API int fake_cuda_launches(char* out, int size) {
    fake::Lock lock;
    const std::string text = fake::joined(fake::launches);
    const int needed = fake::copied_out(text, out, size);
    if (out && size >= needed) fake::launches.clear();
    return needed;
}
API int fake_cuda_dependents(char* out, int size) {
    fake::Lock lock;
    const int needed = fake::copied_out(fake::joined(fake::dependents), out, size);
    if (out && size >= needed) fake::dependents.clear();
    return needed;
}
API int fake_cuda_captured(char* out, int size) {
    fake::Lock lock;
    return fake::copied_out(fake::joined(fake::last_capture), out, size);
}
API void fake_cuda_set_memory(unsigned long long mib) {
    fake::memory_limit = (mib ? mib : (unsigned long long)fake::device().memory_mib) << 20;
}
API unsigned long long fake_cuda_used() { return fake::used_memory(); }
