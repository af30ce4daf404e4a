// The handler of GPUs, called by a stand-in for XLA on a device that comes late: what a call enqueues is done when it is
// over, and what it was given is gone; with "all" as an argument, when all steps are enqueued. Prints the bits of the
// parameters, which none of that changes, as runtime/xla.c does.
#include <cstdlib>
#include <functional>
#include <vector>

namespace {

std::vector<std::function<void()>> enqueued;

cudaError_t kernel_later(const void *function, dim3 grid, dim3 block, void **arguments, std::size_t shared,
                         cudaStream_t stream) {
    const emulation::Kernel *kernel = emulation::Kernel::first;
    while (kernel && kernel->address != function) kernel = kernel->next;
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    std::vector<std::max_align_t> given((kernel->packed_size + sizeof(std::max_align_t)) / sizeof(std::max_align_t));
    std::memcpy(given.data(), arguments[0], kernel->packed_size);
    enqueued.push_back([=]() mutable {
        void *own[] = {given.data()};
        cudaLaunchKernel(function, grid, block, own, shared, stream);
    });
    return cudaSuccess;
}

cudaError_t memset_later(void *pointer, int value, std::size_t size, cudaStream_t) {
    enqueued.push_back([=] { std::memset(pointer, value, size); });
    return cudaSuccess;
}

cudaError_t function_later(cudaStream_t, cudaHostFn_t function, void *data) {
    enqueued.push_back([=] { function(data); });
    return cudaSuccess;
}

void do_all() {
    for (const auto &own : enqueued) own();
    enqueued.clear();
}

}  // namespace

#define cudaLaunchKernel kernel_later
#define cudaMemsetAsync memset_later
#define cudaLaunchHostFunc function_later
#define cudaMemcpy no_copy_that_waits
#define cudaStreamSynchronize no_stream_is_waited_for
#define cudaDeviceSynchronize no_device_is_waited_for
#include "xla-handler.cu"
#include "xla-frame.h"

static void *of_device(std::size_t size) { return emulation::allocate(size); }

static XLA_FFI_Error *some_stream(XLA_FFI_Stream_Get_Args *args) {
    args->stream = nullptr;
    return nullptr;
}

extern "C" int run(int all, int told) {
    frame *const f = static_cast<frame *>(std::malloc(sizeof(frame)));
    std::uint64_t elements = 0;

    make_frame(f, told, of_device);
    for (const std::size_t size : sizes) elements += size;
    const std::size_t scratch = optforge_xla_scratch_size(elements, TENSORS);
    XLA_FFI_Buffer buffers[OPERANDS + MOST];
    f->buffers[OPERANDS + 2].data = emulation::allocate(scratch);
    std::memcpy(buffers, f->buffers, sizeof buffers);
    for (int k = 0; k < STEPS; k++) {
        std::memset(f, 0, sizeof *f);
        std::memcpy(f->buffers, buffers, sizeof buffers);
        lay_frame(f, told);
        f->api.XLA_FFI_Stream_Get = some_stream;
        if (optforge_xla_step(&f->call) != nullptr) return 1;
        std::memset(f, 0x7f, sizeof *f);
        if (!all) do_all();
    }
    do_all();
    std::memcpy(f->buffers, buffers, sizeof buffers);
    const int status = tell_frame(f, 0);
    std::fflush(stdout);
    for (const XLA_FFI_Buffer &own : buffers) emulation::release(own.data);
    std::free(f);
    return status;
}
