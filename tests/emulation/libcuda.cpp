// A libcuda.so.1 without a GPU, which loads as a module and launches what the emulation made of a .cu file.
//
// For tests only. It has the entry points of the driver that PyCUDA calls to manage contexts, memory, streams, events
// and modules; all others that PyCUDA is linked to are added when it is built and answer CUDA_ERROR_NOT_SUPPORTED.
// There is one device at most, and calls without a current context fail, as they must.
//
//   OPTFORGE_EMULATION_TRACE  a file to which each call appends its name
//   OPTFORGE_EMULATION_DEVICES     how many there are, 1 or 0 (default 1)
//   OPTFORGE_EMULATION_CAPABILITY  the compute capability that it claims, as 90 (the default)
//   OPTFORGE_EMULATION_LAZY   set: work waits until a call must wait for it, so that whoever reads a result too early, or
//                             overwrites page-locked memory that is still to be copied, gets other bits. Otherwise
//                             everything is done when a call returns.
//
// For other variables see cuda_runtime.h.

#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "machine.h"

namespace {

enum Status {
    success = 0,
    invalid_value = 1,
    out_of_memory = 2,
    not_initialized = 3,
    invalid_device = 101,
    invalid_image = 200,
    invalid_context = 201,
    no_binary = 209,
    file_not_found = 301,
    invalid_handle = 400,
    not_found = 500,
    not_ready = 600,
    context_is_destroyed = 709,
};

const std::map<int, std::pair<const char *, const char *>> errors = {
    {success, {"CUDA_SUCCESS", "no error"}},
    {invalid_value, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {out_of_memory, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {not_initialized, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {invalid_device, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {invalid_image, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {invalid_context, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {no_binary, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {file_not_found, {"CUDA_ERROR_FILE_NOT_FOUND", "file not found"}},
    {invalid_handle, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {not_found, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {not_ready, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {context_is_destroyed, {"CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"}},
    {719, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    {801, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported by the emulation"}},
};

using Device = int;
using Pointer = unsigned long long;
struct Context {
    int users = 0;  // of the primary context
};
struct Module {
    void *library;
};
struct Function {
    decltype(&emulation_launch) launch;
    const void *kernel;
};
struct Stream {};
struct Event {
    timespec recorded{};
    int pending = 0;
};

bool initialized = false;
Context primary;
std::set<Context *> contexts;
std::set<Stream *> streams;
std::map<const char *, std::size_t> locked;  // page-locked memory: start and size
std::deque<std::function<void()>> waiting;  // the work of all streams, in one order
std::mutex one_at_a_time;
thread_local std::vector<Context *> stack;  // the current context is the last

// What every entry point begins with.
class Call {
public:
    explicit Call(const char *name) : lock(one_at_a_time) {
        const char *path = std::getenv("OPTFORGE_EMULATION_TRACE");
        if (path) std::ofstream(path, std::ios::app) << name << '\n';
    }
    Status status() const {
        return !initialized                      ? not_initialized
               : stack.empty()                   ? invalid_context
               : contexts.count(stack.back()) == 0 ? context_is_destroyed
                                                 : success;
    }

private:
    std::lock_guard<std::mutex> lock;
};

void *address(Pointer pointer) { return reinterpret_cast<void *>(pointer); }
bool alive(Stream *stream) { return reinterpret_cast<std::uintptr_t>(stream) <= 2 || streams.count(stream); }

void work_off(std::size_t left = 0) {
    while (waiting.size() > left) {
        const std::function<void()> work = std::move(waiting.front());
        waiting.pop_front();
        work();
    }
}

Status enqueue(Stream *stream, std::function<void()> work) {
    if (!alive(stream)) return invalid_handle;
    waiting.push_back(std::move(work));
    if (!std::getenv("OPTFORGE_EMULATION_LAZY")) work_off();
    return success;
}

Status synchronize(Stream *stream = nullptr) {
    if (!alive(stream)) return invalid_handle;
    work_off();
    return success;
}

Status progress(bool done) {  // whoever asks often enough sees the end
    if (done) return success;
    work_off(waiting.size() - 1);
    return not_ready;
}

bool is_locked(const void *pointer) {
    const char *const byte = static_cast<const char *>(pointer);
    const auto after = locked.upper_bound(byte);
    return after != locked.begin() && byte < std::prev(after)->first + std::prev(after)->second;
}

template <class Word>
Status fill(Pointer to, Word value, std::size_t count, Stream *stream) {
    return enqueue(stream, [=] { std::fill_n(&emulation::aligned(static_cast<Word *>(address(to))), count, value); });
}

Status copy(void *to, const void *from, std::size_t size, Stream *stream = nullptr) {
    return enqueue(stream, [=] { std::memmove(to, from, size); });
}

Status allocate(void **pointer, std::size_t size) {
    if (size == 0) return invalid_value;
    *pointer = emulation::allocate(size);
    return *pointer ? success : out_of_memory;
}

Status load(Module **module, const char *image) {
    Elf64_Ehdr header;
    std::memcpy(&header, image, 4);
    if (std::memcmp(&header, ELFMAG, 4) != 0) return invalid_image;
    std::memcpy(&header, image, sizeof header);
    if (header.e_type != ET_DYN) return no_binary;  // such as what nvcc makes for a GPU
    // An image comes without its size. Linkers put the table of sections at the end.
    const std::size_t size = header.e_shoff + std::size_t(header.e_shentsize) * header.e_shnum;
    char path[] = "/tmp/optforge-emulation-XXXXXX";
    const int file = mkstemp(path);
    const bool written = file >= 0 && write(file, image, size) == ssize_t(size);
    close(file);
    void *library = written ? dlopen(path, RTLD_LAZY | RTLD_LOCAL) : nullptr;
    unlink(path);
    if (!library) std::fprintf(stderr, "CUDA emulation: %s\n", written ? dlerror() : "cannot write to /tmp");
    if (!library) return invalid_image;
    *module = new Module{library};
    return success;
}

int variable(const char *name, int otherwise) {
    const char *value = std::getenv(name);
    return value ? std::atoi(value) : otherwise;
}

int attribute_value(int attribute) {
    switch (attribute) {
    case 1: return emulation::largest_block;  // threads in a block
    case 2: case 3: return 1024;              // the block's width and height
    case 4: return 64;
    case 5: return 0x7fffffff;  // the grid's width
    case 6: case 7: return 65535;
    case 8: return 48 << 10;  // bytes of shared memory in a block
    case 9: return 64 << 10;  // of constant memory
    case 10: return emulation::warp_size;
    case 12: case 82: return 65536;  // registers of a block, a multiprocessor
    case 13: case 36: return 1000000;  // kHz
    case 14: return 512;  // alignment of textures
    case 16: return emulation::multiprocessors();
    case 19: case 31: case 40: case 41: return 1;  // maps host memory, has concurrent kernels, copies
    case 37: return 5120;  // width of the memory bus
    case 38: return 50 << 20;  // bytes of level 2 cache
    case 39: return 2048;  // threads on a multiprocessor
    case 75: return variable("OPTFORGE_EMULATION_CAPABILITY", 90) / 10;
    case 76: return variable("OPTFORGE_EMULATION_CAPABILITY", 90) % 10;
    case 81: case 97: return 227 << 10;  // shared memory of a multiprocessor, and of a block that asks for more
    case 106: return 32;  // blocks on a multiprocessor
    default: return 0;
    }
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int
#define CALL                 \
    const Call call(__func__); \
    if (const int error = emulation::refused(__func__)) return error
#define CALL_IN_CONTEXT \
    CALL;               \
    if (const Status status = call.status()) return status

// ---- The driver and the device

API cuInit(unsigned) {
    CALL;
    initialized = true;
    return success;
}
API cuDriverGetVersion(int *version) {
    CALL;
    *version = 13000;
    return success;
}
API cuGetErrorString(int error, const char **text) {
    const auto found = errors.find(error);
    *text = found == errors.end() ? nullptr : found->second.second;
    return *text ? success : invalid_value;
}
API cuGetErrorName(int error, const char **text) {
    const auto found = errors.find(error);
    *text = found == errors.end() ? nullptr : found->second.first;
    return *text ? success : invalid_value;
}
API cuDeviceGetCount(int *count) {
    CALL;
    *count = variable("OPTFORGE_EMULATION_DEVICES", 1);
    return initialized ? success : not_initialized;
}
API cuDeviceGet(Device *device, int ordinal) {
    CALL;
    *device = 0;
    return !initialized ? not_initialized : ordinal == 0 ? success : invalid_device;
}
API cuDeviceGetName(char *name, int size, Device) {
    CALL;
    std::snprintf(name, std::size_t(size), "optforge emulation");
    return success;
}
API cuDeviceGetPCIBusId(char *name, int size, Device) {
    CALL;
    std::snprintf(name, std::size_t(size), "0000:00:00.0");
    return success;
}
API cuDeviceTotalMem_v2(std::size_t *size, Device) {
    CALL;
    *size = std::size_t(sysconf(_SC_PHYS_PAGES)) * std::size_t(sysconf(_SC_PAGESIZE));
    return success;
}
API cuDeviceGetAttribute(int *value, int attribute, Device) {
    CALL;
    *value = attribute_value(attribute);
    return success;
}
API cuDeviceComputeCapability(int *major, int *minor, Device) {
    CALL;
    *major = attribute_value(75);
    *minor = attribute_value(76);
    return success;
}

// ---- Contexts

API cuDevicePrimaryCtxRetain(Context **context, Device) {
    CALL;
    if (!initialized) return not_initialized;
    primary.users++;
    contexts.insert(*context = &primary);
    return success;
}
API cuDevicePrimaryCtxRelease_v2(Device) {
    CALL;
    if (primary.users == 0) return invalid_context;
    work_off();
    if (--primary.users == 0) contexts.erase(&primary);
    return success;
}
API cuCtxCreate_v4(Context **context, const void *, unsigned, Device) {
    CALL;
    if (!initialized) return not_initialized;
    contexts.insert(*context = new Context);
    stack.push_back(*context);
    return success;
}
API cuCtxDetach(Context *context) {
    CALL_IN_CONTEXT;
    if (context == &primary || context != stack.back()) return invalid_context;
    stack.pop_back();
    contexts.erase(context);
    delete context;
    return success;
}
API cuCtxAttach(Context **context, unsigned) {
    CALL_IN_CONTEXT;
    *context = stack.back();
    return success;
}
API cuCtxPushCurrent_v2(Context *context) {
    CALL;
    if (!contexts.count(context)) return invalid_context;
    stack.push_back(context);
    return success;
}
API cuCtxPopCurrent_v2(Context **context) {
    CALL;
    if (stack.empty()) return invalid_context;
    if (context) *context = stack.back();
    stack.pop_back();
    return success;
}
API cuCtxGetCurrent(Context **context) {
    CALL;
    *context = stack.empty() ? nullptr : stack.back();
    return success;
}
API cuCtxGetDevice(Device *device) {
    CALL_IN_CONTEXT;
    *device = 0;
    return success;
}
API cuCtxGetApiVersion(Context *, unsigned *version) {
    CALL;
    *version = 3020;
    return success;
}
API cuCtxSynchronize() {
    CALL_IN_CONTEXT;
    return synchronize();
}

// ---- Modules and launches

API cuModuleLoadData(Module **module, const void *image) {
    CALL_IN_CONTEXT;
    return load(module, static_cast<const char *>(image));
}
API cuModuleLoadDataEx(Module **module, const void *image, unsigned count, const int *options, void **values) {
    CALL_IN_CONTEXT;
    for (unsigned i = 0; i < count; i++)
        if (options[i] == 4 || options[i] == 6) values[i] = nullptr;  // the compiler's messages are 0 bytes long
    return load(module, static_cast<const char *>(image));
}
API cuModuleLoad(Module **module, const char *path) {
    CALL_IN_CONTEXT;
    std::ifstream file(path, std::ios::binary);
    const std::string image(std::istreambuf_iterator<char>(file), {});
    return file ? load(module, image.c_str()) : file_not_found;
}
API cuModuleUnload(Module *module) {
    CALL_IN_CONTEXT;
    synchronize();
    dlclose(module->library);
    delete module;
    return success;
}
API cuModuleGetFunction(Function **function, Module *module, const char *name) {
    CALL_IN_CONTEXT;
    const auto find = reinterpret_cast<decltype(&emulation_find)>(dlsym(module->library, "emulation_find"));
    const auto launch = reinterpret_cast<decltype(&emulation_launch)>(dlsym(module->library, "emulation_launch"));
    if (!find || !launch) return invalid_image;
    const void *kernel = find(name);
    if (!kernel) return not_found;
    *function = new Function{launch, kernel};  // never deleted, like a function of the driver
    return success;
}
API cuModuleGetGlobal_v2(Pointer *pointer, std::size_t *size, Module *module, const char *name) {
    CALL_IN_CONTEXT;
    void *const variable = dlsym(module->library, name);
    Dl_info info;
    void *symbol;
    if (!variable || !dladdr1(variable, &info, &symbol, RTLD_DL_SYMENT)) return not_found;
    if (pointer) *pointer = reinterpret_cast<Pointer>(variable);
    if (size) *size = static_cast<const ElfW(Sym) *>(symbol)->st_size;
    return success;
}
API cuFuncSetBlockShape(Function *, int, int, int) {  // PyCUDA calls it before every prepared launch
    CALL_IN_CONTEXT;
    return success;
}
API cuFuncSetCacheConfig(Function *, int) {
    CALL_IN_CONTEXT;
    return success;
}
API cuFuncSetAttribute(Function *, int, int) {
    CALL_IN_CONTEXT;
    return success;
}
API cuFuncGetAttribute(int *value, int attribute, Function *) {
    CALL_IN_CONTEXT;
    *value = attribute == 0 ? int(emulation::largest_block) : attribute == 4 ? 32 : 0;  // threads, registers
    return success;
}
API cuLaunchKernel(Function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, Stream *stream, void **arguments,
                   void **extra) {
    CALL_IN_CONTEXT;
    if (!function || !alive(stream)) return invalid_handle;
    if (shared) emulation::fail("dynamic shared memory is not emulated");
    const char *packed = nullptr;
    std::size_t size = 0;
    for (; extra && *extra; extra += 2)  // pairs: 1 and a buffer of arguments, 2 and a pointer to its size, until 0
        if (reinterpret_cast<std::uintptr_t>(extra[0]) == 1) packed = static_cast<const char *>(extra[1]);
        else size = *static_cast<const std::size_t *>(extra[1]);
    const std::string copied(packed ? packed : "", size);
    const Status status = enqueue(stream, [=] {
        const unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
        function->launch(function->kernel, grid, block, arguments, copied.data(), size);
    });
    return status || !arguments ? status : synchronize();  // arguments that are not packed are the caller's
}

// ---- Memory

API cuMemGetInfo_v2(std::size_t *available, std::size_t *total) {
    CALL_IN_CONTEXT;
    *total = std::size_t(sysconf(_SC_PHYS_PAGES)) * std::size_t(sysconf(_SC_PAGESIZE));
    *available = std::size_t(sysconf(_SC_AVPHYS_PAGES)) * std::size_t(sysconf(_SC_PAGESIZE));
    return success;
}
API cuMemAlloc_v2(Pointer *pointer, std::size_t size) {
    CALL_IN_CONTEXT;
    return allocate(reinterpret_cast<void **>(pointer), size);
}
API cuMemAllocManaged(Pointer *pointer, std::size_t size, unsigned) {
    CALL_IN_CONTEXT;
    return allocate(reinterpret_cast<void **>(pointer), size);
}
API cuMemFree_v2(Pointer pointer) {
    CALL_IN_CONTEXT;
    synchronize();
    emulation::release(address(pointer));
    return success;
}
API cuMemHostAlloc(void **pointer, std::size_t size, unsigned) {
    CALL_IN_CONTEXT;
    if (const Status status = allocate(pointer, size)) return status;
    locked[static_cast<char *>(*pointer)] = size;
    return success;
}
API cuMemFreeHost(void *pointer) {
    CALL_IN_CONTEXT;
    synchronize();
    locked.erase(static_cast<char *>(pointer));
    emulation::release(pointer);
    return success;
}
API cuMemHostRegister_v2(void *pointer, std::size_t size, unsigned) {
    CALL_IN_CONTEXT;
    locked[static_cast<char *>(pointer)] = size;
    return success;
}
API cuMemHostUnregister(void *pointer) {
    CALL_IN_CONTEXT;
    synchronize();
    locked.erase(static_cast<char *>(pointer));
    return success;
}
API cuMemHostGetDevicePointer_v2(Pointer *pointer, void *host, unsigned) {
    CALL_IN_CONTEXT;
    *pointer = reinterpret_cast<Pointer>(host);
    return success;
}
API cuMemcpyHtoD_v2(Pointer to, const void *from, std::size_t size) {
    CALL_IN_CONTEXT;
    copy(address(to), from, size);
    return synchronize();
}
API cuMemcpyDtoH_v2(void *to, Pointer from, std::size_t size) {
    CALL_IN_CONTEXT;
    copy(to, address(from), size);
    return synchronize();
}
API cuMemcpyDtoD_v2(Pointer to, Pointer from, std::size_t size) {
    CALL_IN_CONTEXT;
    return copy(address(to), address(from), size);
}
API cuMemcpyHtoDAsync_v2(Pointer to, const void *from, std::size_t size, Stream *stream) {
    CALL_IN_CONTEXT;
    if (is_locked(from)) return copy(address(to), from, size, stream);
    const char *const bytes = static_cast<const char *>(from);  // other memory is free again when the call returns
    const std::string taken(bytes, size);
    return enqueue(stream, [=] { std::memcpy(address(to), taken.data(), size); });
}
API cuMemcpyDtoHAsync_v2(void *to, Pointer from, std::size_t size, Stream *stream) {
    CALL_IN_CONTEXT;
    const Status status = copy(to, address(from), size, stream);
    return status || is_locked(to) ? status : synchronize(stream);
}
API cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, std::size_t size, Stream *stream) {
    CALL_IN_CONTEXT;
    return copy(address(to), address(from), size, stream);
}
#define FILL(name, Word)                                                         \
    API cuMemset##name##_v2(Pointer to, Word value, std::size_t count) {         \
        CALL_IN_CONTEXT;                                                         \
        return fill(to, value, count, nullptr);                                  \
    }                                                                            \
    API cuMemset##name##Async(Pointer to, Word value, std::size_t count, Stream *stream) { \
        CALL_IN_CONTEXT;                                                         \
        return fill(to, value, count, stream);                                   \
    }
FILL(D8, unsigned char)
FILL(D16, unsigned short)
FILL(D32, unsigned)

// ---- Streams and events

API cuStreamCreate(Stream **stream, unsigned) {
    CALL_IN_CONTEXT;
    streams.insert(*stream = new Stream);
    return success;
}
API cuStreamDestroy_v2(Stream *stream) {
    CALL_IN_CONTEXT;
    if (!streams.erase(stream)) return invalid_handle;
    delete stream;
    return success;
}
API cuStreamQuery(Stream *stream) {
    CALL_IN_CONTEXT;
    return alive(stream) ? progress(waiting.empty()) : invalid_handle;
}
API cuStreamSynchronize(Stream *stream) {
    CALL_IN_CONTEXT;
    return synchronize(stream);
}
API cuStreamWaitEvent(Stream *stream, Event *, unsigned) {
    CALL_IN_CONTEXT;
    return alive(stream) ? success : invalid_handle;
}
API cuEventCreate(Event **event, unsigned) {
    CALL_IN_CONTEXT;
    *event = new Event;
    return success;
}
API cuEventDestroy_v2(Event *event) {
    CALL_IN_CONTEXT;
    synchronize();
    delete event;
    return success;
}
API cuEventRecord(Event *event, Stream *stream) {
    CALL_IN_CONTEXT;
    event->pending++;
    return enqueue(stream, [=] {
        clock_gettime(CLOCK_MONOTONIC, &event->recorded);
        event->pending--;
    });
}
API cuEventQuery(Event *event) {
    CALL_IN_CONTEXT;
    return progress(event->pending == 0);
}
API cuEventSynchronize(Event *) {
    CALL_IN_CONTEXT;
    return synchronize();
}
API cuEventElapsedTime_v2(float *milliseconds, Event *start, Event *end) {
    CALL_IN_CONTEXT;
    if (start->pending || end->pending) return not_ready;
    if (start->recorded.tv_sec == 0 || end->recorded.tv_sec == 0) return invalid_handle;
    *milliseconds = float(double(end->recorded.tv_sec - start->recorded.tv_sec) * 1e3 +
                          double(end->recorded.tv_nsec - start->recorded.tv_nsec) * 1e-6);
    return success;
}
