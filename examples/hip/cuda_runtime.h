/* Stands in for CUDA's header of this name, so that hipcc compiles an emitted .cu for AMD's GPUs, unchanged:
 *
 *     hipcc -x hip --offload-arch=gfx90a -O3 -Iexamples/hip -c adam.cu
 *
 * It has what the emitted files use and nothing more. README.md says what has been compiled and what has been run. */
#ifndef OPTFORGE_HIP_CUDA_RUNTIME_H
#define OPTFORGE_HIP_CUDA_RUNTIME_H

#if defined(__FAST_MATH__)
#error "-ffast-math would change the bits of the results"
#endif

#include <hip/hip_runtime.h>

/* ---- the host ---- */

typedef hipStream_t cudaStream_t;
typedef hipError_t cudaError_t;

#define cudaSuccess hipSuccess
#define cudaMemcpyHostToDevice hipMemcpyHostToDevice
#define cudaMemcpyAsync hipMemcpyAsync
#define cudaMemsetAsync hipMemsetAsync
#define cudaLaunchKernel hipLaunchKernel
#define cudaGetLastError hipGetLastError
#define cudaFuncAttributes hipFuncAttributes
#define cudaFuncGetAttributes hipFuncGetAttributes
#define cudaStreamIsCapturing hipStreamIsCapturing
#define cudaStreamCaptureStatus hipStreamCaptureStatus
#define cudaStreamCaptureStatusNone hipStreamCaptureStatusNone

#define __grid_constant__ /* arguments of kernels are in constant memory anyway */

/* ---- arithmetic ----
 *
 * hipcc fuses a product and a sum even through HIP's own __fmul_rn and __fadd_rn, and HIP's __fsqrt_rn is the
 * instruction's approximation. So here are others, with fusing off. Division and sqrtf are rounded correctly by default;
 * -fno-hip-fp32-correctly-rounded-divide-sqrt would end that. */
#pragma clang fp contract(off)

#define OPTFORGE_HIP_ROUNDED(number, name, expression)                                                                 \
    static __device__ __forceinline__ number optforge_hip_##name(number a, number b)                                   \
    {                                                                                                                  \
        _Pragma("clang fp contract(off)") return expression;                                                           \
    }
OPTFORGE_HIP_ROUNDED(float, fadd, a + b)
OPTFORGE_HIP_ROUNDED(float, fsub, a - b)
OPTFORGE_HIP_ROUNDED(float, fmul, a * b)
OPTFORGE_HIP_ROUNDED(float, fdiv, a / b)
OPTFORGE_HIP_ROUNDED(double, dadd, a + b)
OPTFORGE_HIP_ROUNDED(double, dsub, a - b)
OPTFORGE_HIP_ROUNDED(double, dmul, a * b)
OPTFORGE_HIP_ROUNDED(double, ddiv, a / b)
#undef OPTFORGE_HIP_ROUNDED

#define __fadd_rn optforge_hip_fadd
#define __fsub_rn optforge_hip_fsub
#define __fmul_rn optforge_hip_fmul
#define __fdiv_rn optforge_hip_fdiv
#define __fsqrt_rn(a) ::sqrtf(a)
#define __dadd_rn optforge_hip_dadd
#define __dsub_rn optforge_hip_dsub
#define __dmul_rn optforge_hip_dmul
#define __ddiv_rn optforge_hip_ddiv
#define __dsqrt_rn(a) ::sqrt(a)
#define __fma_rn(a, b, c) optforge_hip_dadd(optforge_hip_dmul(a, b), c) /* of products that are exact in double */
#define __double2float_rn(a) (static_cast<float>(a))

/* ---- threads and memory ----
 *
 * CUDA's warps have 32 threads, AMD's waves 32 or 64. The emitted files give every shuffle its width, which divides 32,
 * and threads of one width are active together: so a wave of 64 is two warps. The mask is not needed. */
#define __shfl_sync(mask, value, from, width) __shfl(value, from, width)
#define __shfl_down_sync(mask, value, by, width) __shfl_down(value, by, width)
#define __shfl_up_sync(mask, value, by, width) __shfl_up(value, by, width)
#define __syncwarp() __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront"), __builtin_amdgcn_wave_barrier()

/* A load that sees what other blocks have written: past the cache of the compute unit, as CUDA's __ldcg. */
static __device__ __forceinline__ double optforge_hip_load(const double *from)
{
    return __hip_atomic_load(from, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
#define __ldcg optforge_hip_load

#endif
