// The handler of GPUs, called by a stand-in for XLA on a device that comes late: what a call enqueues in its stream is done
// when it is over, and what it was given is gone. Two trainings have a stream each, of which the second lags behind. With
// `all` nothing is done before all steps are enqueued. Prints the bits of the parameters, which none of that changes, as
// runtime/xla.c does.
#include <cstdlib>
#include <functional>
#include <vector>

namespace {

enum { STREAMS = 2, LAG = 50 };
std::vector<std::function<void()>> enqueued[STREAMS];

std::vector<std::function<void()>> &queue_of(cudaStream_t stream) {
    return enqueued[reinterpret_cast<std::uintptr_t>(stream) - 1];
}

cudaError_t kernel_later(const void *function, dim3 grid, dim3 block, void **arguments, std::size_t shared,
                         cudaStream_t stream) {
    const emulation::Kernel *kernel = emulation::Kernel::first;
    while (kernel && kernel->address != function) kernel = kernel->next;
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    std::vector<std::max_align_t> given((kernel->packed_size + sizeof(std::max_align_t)) / sizeof(std::max_align_t));
    std::memcpy(given.data(), arguments[0], kernel->packed_size);
    queue_of(stream).push_back([=]() mutable {
        void *own[] = {given.data()};
        cudaLaunchKernel(function, grid, block, own, shared, stream);
    });
    return cudaSuccess;
}

cudaError_t memset_later(void *pointer, int value, std::size_t size, cudaStream_t stream) {
    queue_of(stream).push_back([=] { std::memset(pointer, value, size); });
    return cudaSuccess;
}

cudaError_t function_later(cudaStream_t stream, cudaHostFn_t function, void *data) {
    queue_of(stream).push_back([=] { function(data); });
    return cudaSuccess;
}

void do_all() {
    for (std::size_t i = 0; i < enqueued[0].size() + LAG; i++) {
        if (i < enqueued[0].size()) enqueued[0][i]();
        if (i >= LAG) enqueued[1][i - LAG]();
    }
    for (auto &own : enqueued) own.clear();
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

static std::uintptr_t now;

static XLA_FFI_Error *stream_of_now(XLA_FFI_Stream_Get_Args *args) {
    args->stream = reinterpret_cast<void *>(now);
    return nullptr;
}

static void *of_device(std::size_t size) { return emulation::allocate(size); }

extern "C" int run(int all, int told) {
    frame *const f = static_cast<frame *>(std::malloc(sizeof(frame)));
    XLA_FFI_Buffer buffers[STREAMS][OPERANDS + MOST];
    std::uint64_t elements = 0;
    int status = 0;

    for (const std::size_t size : sizes) elements += size;
    for (auto &own : buffers) {
        make_frame(f, told, of_device);
        f->buffers[OPERANDS + 2].data = of_device(optforge_xla_scratch_size(elements, TENSORS));
        std::memcpy(own, f->buffers, sizeof own);
    }
    for (int k = 0; k < STEPS; k++) {
        for (now = 1; now <= STREAMS; now++) {
            std::memset(f, 0, sizeof *f);
            std::memcpy(f->buffers, buffers[now - 1], sizeof f->buffers);
            lay_frame(f, told);
            f->api.XLA_FFI_Stream_Get = stream_of_now;
            if (optforge_xla_step(&f->call) != nullptr) return 1;
            std::memset(f, 0x7f, sizeof *f);
        }
        if (!all) do_all();
    }
    do_all();
    for (auto &own : buffers) {
        std::memcpy(f->buffers, own, sizeof own);
        status |= tell_frame(f, 0);
        for (const XLA_FFI_Buffer &buffer : own) emulation::release(buffer.data);
    }
    std::fflush(stdout);
    std::free(f);
    return status;
}
