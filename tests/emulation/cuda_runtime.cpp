// The host functions that cuda_runtime.h declares. Compiled once, and linked into every library.
#include "cuda_runtime.h"

#include <cstdlib>

namespace emulation __attribute__((visibility("hidden"))) {
static cudaError_t last_error = cudaSuccess;
static cudaError_t done(cudaError_t error = cudaSuccess) {
    if (error != cudaSuccess) last_error = error;
    return error;
}
}  // namespace emulation

#define EMULATION_REFUSAL \
    if (const int error = emulation::refused(__func__)) return emulation::done(cudaError_t(error))

EMULATION_EXPORT cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
EMULATION_EXPORT cudaError_t cudaPeekAtLastError() { return emulation::last_error; }
EMULATION_EXPORT const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "an emulated error";
}
EMULATION_EXPORT const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaSuccess ? "cudaSuccess" : "cudaError";
}

EMULATION_EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                              std::size_t shared, cudaStream_t) {
    EMULATION_REFUSAL;
    const emulation::Kernel *kernel = emulation::Kernel::first;
    while (kernel && kernel->address != function) kernel = kernel->next;
    if (!kernel) return emulation::done(cudaErrorInvalidDeviceFunction);
    if (shared != 0) emulation::fail("%s: dynamic shared memory is not emulated", kernel->name);
    emulation::launch(*kernel, grid, block, arguments);
    return emulation::done();
}
EMULATION_EXPORT cudaError_t cudaMalloc(void **pointer, std::size_t size) {
    EMULATION_REFUSAL;
    *pointer = size ? emulation::allocate(size) : nullptr;
    return emulation::done(size && !*pointer ? cudaErrorMemoryAllocation : cudaSuccess);
}
EMULATION_EXPORT cudaError_t cudaFree(void *pointer) {
    emulation::release(pointer);
    return emulation::done();
}
EMULATION_EXPORT cudaError_t cudaMemcpy(void *to, const void *from, std::size_t size, cudaMemcpyKind) {
    EMULATION_REFUSAL;
    if (size) std::memcpy(to, from, size);
    return emulation::done();
}
EMULATION_EXPORT cudaError_t cudaMemset(void *pointer, int value, std::size_t size) {
    EMULATION_REFUSAL;
    if (size) std::memset(pointer, value, size);
    return emulation::done();
}
EMULATION_EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, std::size_t size, cudaMemcpyKind kind,
                                             cudaStream_t) {
    EMULATION_REFUSAL;
    return cudaMemcpy(to, from, size, kind);
}
EMULATION_EXPORT cudaError_t cudaMemsetAsync(void *pointer, int value, std::size_t size, cudaStream_t) {
    EMULATION_REFUSAL;
    return cudaMemset(pointer, value, size);
}
EMULATION_EXPORT cudaError_t cudaHostAlloc(void **pointer, std::size_t size, unsigned) {
    EMULATION_REFUSAL;
    return cudaMalloc(pointer, size);
}
EMULATION_EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) {
    EMULATION_REFUSAL;
    function(data);
    return emulation::done();
}
EMULATION_EXPORT cudaError_t cudaDeviceSynchronize() { return emulation::done(); }
EMULATION_EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t) { return emulation::done(); }
EMULATION_EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = static_cast<cudaStream_t>(std::malloc(1));
    return emulation::done();
}
EMULATION_EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    std::free(stream);
    return emulation::done();
}
EMULATION_EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
    EMULATION_REFUSAL;
    *status = std::getenv("OPTFORGE_EMULATION_CAPTURING") ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return emulation::done();
}
EMULATION_EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *found, const void *function) {
    EMULATION_REFUSAL;
    const emulation::Kernel *kernel = emulation::Kernel::first;
    while (kernel && kernel->address != function) kernel = kernel->next;
    found->maxThreadsPerBlock = 1024;
    return emulation::done(kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}
EMULATION_EXPORT cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return emulation::done();
}
EMULATION_EXPORT cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount        ? emulation::multiprocessors()
             : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                              : 0;
    return emulation::done();
}
