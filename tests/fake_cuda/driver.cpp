// The CUDA driver, as far as Triton's and CuPy's launchers and torch's allocator use it. Code that
// is loaded is really read.
#include <cuda.h>
#include <elf.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>

#include "captures.h"

using fake::Lock;
using fake::Work;

int fake_attribute(int which);

// ---- devices and contexts

// A thread has no context until the runtime's first call in it, or the driver's cuCtxSetCurrent,
// makes one current.
static CUcontext const CONTEXT = (CUcontext)0x77;
static thread_local CUcontext current = nullptr;
void fake_make_context_current() { current = CONTEXT; }
API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int* count) { return *count = fake::device_count(), CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
API CUresult cuDeviceGetName(char* name, int size, CUdevice) {
    return snprintf(name, size, "%s", fake::device().name), CUDA_SUCCESS;
}
API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
    return *bytes = fake::total_memory(), CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
    if (which >= CU_DEVICE_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE;  // of a newer driver
    return *value = fake_attribute(which), CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* context) { return *context = current, CUDA_SUCCESS; }
API CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
static bool without_context(const char* call) {
    if (!current)
        fake::violation(std::string(call) + " in a thread in which no context is current");
    return !current;
}
API CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    return *context = CONTEXT, CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    return *flags = 0, *active = 1, CUDA_SUCCESS;
}
API CUresult cuGetErrorName(CUresult error, const char** text) {
    switch (error) {
        case CUDA_ERROR_INVALID_VALUE: return *text = "CUDA_ERROR_INVALID_VALUE", CUDA_SUCCESS;
        case CUDA_ERROR_OUT_OF_MEMORY: return *text = "CUDA_ERROR_OUT_OF_MEMORY", CUDA_SUCCESS;
        case CUDA_ERROR_INVALID_CONTEXT: return *text = "CUDA_ERROR_INVALID_CONTEXT", CUDA_SUCCESS;
        case CUDA_ERROR_NO_BINARY_FOR_GPU:
            return *text = "CUDA_ERROR_NO_BINARY_FOR_GPU", CUDA_SUCCESS;
        case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED:
            return *text = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", CUDA_SUCCESS;
        default: break;
    }
    static thread_local char line[48];
    snprintf(line, sizeof line, "CUresult %d", (int)error);
    return *text = line, CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult error, const char** text) {
    return cuGetErrorName(error, text);
}
API CUresult cuGetProcAddress_v2(
    const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* found) {
    *function = fake::entry_point(name);
    if (found)
        *found = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
// Private tables of the driver: there are none. So a statically linked runtime, such as CuPy's,
// does not start here.
API CUresult cuGetExportTable(const void** table, const CUuuid*) {
    return *table = nullptr, CUDA_ERROR_NOT_FOUND;
}
API CUresult cuPointerGetAttribute(void* data, CUpointer_attribute, CUdeviceptr pointer) {
    if (!fake::on_device((void*)pointer) && !fake::pinned((void*)pointer)) {
        fake::violation("a kernel is given a pointer that is not to the device's memory");
        return CUDA_ERROR_INVALID_VALUE;
    }
    *(CUdeviceptr*)data = pointer;
    return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttributes(
    unsigned count, CUpointer_attribute* which, void** data, CUdeviceptr pointer) {
    for (unsigned i = 0; i < count; i++)
        if (CUresult error = cuPointerGetAttribute(data[i], which[i], pointer)) return error;
    return CUDA_SUCCESS;
}

// ---- machine code: an ELF file, of which registers, shared memory and the largest block of each
// kernel are read, and whether it waits for the kernels before it

struct Function {
    std::string name;
    fake::Limits limits;
};
static std::map<void*, std::map<std::string, fake::Limits>> modules;
static std::map<void*, Function> functions;

// Whether some instruction of sm_90 and newer, of 16 bytes each, is ACQBULK: griddepcontrol.wait.
static bool waits(const unsigned char* code, std::size_t size) {
    for (std::size_t at = 0; at + 16 <= size; at += 16)
        if ((code[at] | (code[at + 1] & 0xf) << 8) == 0x82e) return true;
    return false;
}
static std::map<std::string, fake::Limits> kernels_of(const unsigned char* code) {
    std::map<std::string, fake::Limits> found;
    const auto* head = (const Elf64_Ehdr*)code;
    const auto* sections = (const Elf64_Shdr*)(code + head->e_shoff);
    const char* names = (const char*)code + sections[head->e_shstrndx].sh_offset;
    std::map<unsigned, std::string>
        symbols;  // names of functions by their index in the table of symbols
    for (int i = 0; i < head->e_shnum; i++) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const auto* table = (const Elf64_Sym*)(code + sections[i].sh_offset);
        const char* texts = (const char*)code + sections[sections[i].sh_link].sh_offset;
        for (unsigned k = 0; k < sections[i].sh_size / sizeof(Elf64_Sym); k++)
            symbols[k] = texts + table[k].st_name;
    }
    for (int i = 0; i < head->e_shnum; i++) {
        const std::string section = names + sections[i].sh_name;
        if (!section.compare(0, 6, ".text."))
            found[section.substr(6)].waits =
                waits(code + sections[i].sh_offset, sections[i].sh_size);
    }
    for (int i = 0; i < head->e_shnum; i++) {
        const std::string section = names + sections[i].sh_name;
        if (!section.compare(0, 11, ".nv.shared.") && section != ".nv.shared.reserved.0")
            if (found.count(section.substr(11)))
                found[section.substr(11)].static_shared = sections[i].sh_size;
        if (section.compare(0, 8, ".nv.info")) continue;
        const unsigned char *at = code + sections[i].sh_offset, *end = at + sections[i].sh_size;
        while (at + 4 <= end) {  // records: format, attribute, and two bytes that are a size
                                 // (format 4) or the value
            const unsigned format = at[0], attribute = at[1], size = at[2] | at[3] << 8;
            const auto* value = (const unsigned*)(at + 4);
            if (format == 4 && attribute == 0x2f && found.count(symbols[value[0]]))
                found[symbols[value[0]]].registers = value[1];
            if (format == 4 && attribute == 0x05 && section.size() > 9 &&
                found.count(section.substr(9)))
                found[section.substr(9)].most_threads = value[0] * value[1] * value[2];
            at += 4 + (format == 4 ? size : 0);
        }
    }
    return found;
}

static int architecture_of(const unsigned char* code) {  // 90 for sm_90 and sm_90a
    const auto* head = (const Elf64_Ehdr*)code;
    const bool newer = head->e_ident[EI_ABIVERSION] >= 8;
    return newer ? (head->e_flags >> 8) & 0xff : head->e_flags & 0xff;
}

API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    Lock lock;
    const auto* code = (const unsigned char*)image;
    if (without_context("cuModuleLoadData")) return CUDA_ERROR_INVALID_CONTEXT;
    if (fake::forbidden_unsafe("cuModuleLoadData")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    *module = (CUmodule)fake::new_handle();
    if (memcmp(code, ELFMAG, SELFMAG))
        return modules[*module], CUDA_SUCCESS;  // PTX, or several codes in one
    const int arch = architecture_of(code),
              device = 10 * fake::device().major + fake::device().minor;
    if (arch / 10 != device / 10 || arch > device) {
        fake::violation(
            "code for sm_" + std::to_string(arch) + " is loaded on a device of sm_" +
            std::to_string(device));
        return CUDA_ERROR_NO_BINARY_FOR_GPU;
    }
    modules[*module] = kernels_of(code);
    return CUDA_SUCCESS;
}
API CUresult
cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    return cuModuleLoadData(module, image);
}
API CUresult cuModuleUnload(CUmodule module) {
    Lock lock;
    modules.erase(module);
    return CUDA_SUCCESS;
}
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    Lock lock;
    auto& kernels = modules[module];
    if (!kernels.empty() && !kernels.count(name)) return CUDA_ERROR_NOT_FOUND;
    *function = (CUfunction)fake::new_handle();
    functions[*function] = {name, kernels[name]};
    return CUDA_SUCCESS;
}
API CUresult cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char*) {
    return CUDA_ERROR_NOT_FOUND;
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
    Lock lock;
    const fake::Limits& limits = functions[function].limits;
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? limits.most_threads
             : which == CU_FUNC_ATTRIBUTE_NUM_REGS            ? limits.registers
             : which == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES   ? (int)limits.static_shared
                                                              : 0;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    Lock lock;
    if (which >= CU_FUNC_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE;  // of a newer driver
    if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    if (value > fake::device().shared_optin) return CUDA_ERROR_INVALID_VALUE;
    functions[function].limits.dynamic_shared = value;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
    return *clusters = 8, CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
    return *blocks = 2, CUDA_SUCCESS;
}
API CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
    const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

// ---- launches

// The one kernel that does something: the library's probe asks whether Triton works at all, and
// reads what it wrote.
static void run(const std::string& name, void** arguments) {
    if (name == "_one" && arguments) *(float*)*(CUdeviceptr*)arguments[0] = 1.0f;
}
static CUresult launch(
    CUfunction function, const fake::Shape& shape, void* stream, void** arguments,
    bool dependent = false) {
    Lock lock;
    if (without_context("a launch by the driver")) return CUDA_ERROR_INVALID_CONTEXT;
    auto it = functions.find(function);
    if (it == functions.end())
        return fake::violation("a function is launched that no module holds"),
               CUDA_ERROR_INVALID_HANDLE;
    std::string wrong = fake::misfit(shape, it->second.limits);
    if (wrong.empty() && dependent) wrong = fake::dependent_misfit(it->second.limits);
    if (!wrong.empty())
        return fake::violation(it->second.name + " can't be launched: " + wrong),
               CUDA_ERROR_INVALID_VALUE;
    fake::submit(Work::kernel, it->second.name, stream, dependent);
    if (!fake::capturing(stream)) run(it->second.name, arguments);
    return CUDA_SUCCESS;
}
API CUresult
cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void**) {
    bool dependent = false;
    for (unsigned i = 0; i < c->numAttrs; i++)
        dependent |= c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION &&
                     c->attrs[i].value.programmaticStreamSerializationAllowed;
    return launch(
        function,
        {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
         c->sharedMemBytes},
        c->hStream, arguments, dependent);
}
API CUresult cuLaunchKernel(
    CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
    unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** arguments,
    void**) {
    return launch(
        function, {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared}, stream, arguments);
}
