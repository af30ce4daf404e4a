// The handler of GPUs for XLA on the CPU, beside an emulated device: it is given a stream, and a thread that keeps subnormal
// numbers, which XLA's do not; functions of the host are called by one that rounds upwards.
#include <fenv.h>

static cudaError_t upwards(cudaStream_t stream, cudaHostFn_t function, void *data) {
    fesetround(FE_UPWARD);
    const cudaError_t error = cudaLaunchHostFunc(stream, function, data);
    const bool kept = fegetround() == FE_UPWARD;
    fesetround(FE_TONEAREST);
    return kept ? error : cudaErrorLaunchFailure;
}

#define cudaLaunchHostFunc upwards
#define optforge_xla_step on_gpu
#include "xla-handler.cu"
#undef optforge_xla_step

static XLA_FFI_Error *some_stream(XLA_FFI_Stream_Get_Args *args) {
    args->stream = nullptr;
    return nullptr;
}

extern "C" XLA_FFI_Error *optforge_xla_step(XLA_FFI_CallFrame *call) {
    XLA_FFI_Api api = *call->api;
    XLA_FFI_CallFrame own = *call;
    fenv_t before;

    api.XLA_FFI_Stream_Get = some_stream;
    own.api = &api;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    XLA_FFI_Error *const answer = on_gpu(&own);
    fesetenv(&before);
    return answer;
}
