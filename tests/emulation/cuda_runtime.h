// Stands in for the CUDA toolkit's cuda_runtime.h, so that a C++ compiler makes CPU code of an unmodified .cu file.
//
// For tests only. Every thread of a block is a fiber: it runs until it waits in a barrier or a warp operation, and then
// another goes on, all on one CPU thread. So this shows indexing, argument passing, reduction trees and bits, and a
// missing barrier shows under some order of the fibers. It shows nothing about memory order or speed.
//
//   OPTFORGE_EMULATION_THREADS          which thread that can run goes on: ascending (default), descending, random:SEED
//   OPTFORGE_EMULATION_BLOCKS           the order of the blocks, likewise
//   OPTFORGE_EMULATION_ONLY_LAST        so many blocks of each grid run, the last ones: for grids too large to emulate
//   OPTFORGE_EMULATION_MULTIPROCESSORS  how many the device claims to have (default 4)
//   OPTFORGE_EMULATION_CAPTURING        cudaStreamIsCapturing says yes
//   OPTFORGE_EMULATION_REFUSE           NAME:CODE, a call that fails, as cudaLaunchKernel:719 or cuMemAlloc_v2:2
//
// Misuse (a barrier that some threads never reach, a mask of absent lanes, a misaligned access, an impossible grid, a
// write beyond an allocation) ends the process with a message. Shared and freshly allocated memory holds 0x7f in every
// byte. Not emulated: kernels that are templates, extern __shared__, textures, <<<>>>.
//
// Kernels are found by name and address through objects of the class Kernel, one for each, which the build appends to
// the preprocessed file (link_emulated in __init__.py).
#pragma once

#include <cstddef>  // the macros of libstdc++ are defined behind it
#undef _GLIBCXX_USE_STD_SPEC_FUNCS  // most of math.h in libstdc++ are special functions, which no kernel calls

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"
#include "vector_types.h"

// ---------------------------------------------------------------------------------------------------------------------
// Language

#define __global__ __attribute__((noinline, used))  // what the build looks for in the preprocessed file
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// In a function this means static too. The thread-local variables of a library lie together, which is how all of its
// shared variables can be overwritten between two blocks.
#define __shared__ thread_local

// ---------------------------------------------------------------------------------------------------------------------
// Device functions

#define threadIdx emulation::now.thread
#define blockIdx emulation::now.block
#define blockDim emulation::now.block_size
#define gridDim emulation::now.grid_size
constexpr int warpSize = emulation::warp_size;

inline void __syncthreads() { emulation::barrier(); }
inline int __syncthreads_count(int vote) { return int(emulation::barrier(vote)); }
inline int __syncthreads_or(int vote) { return emulation::barrier(vote) != 0; }
inline int __syncthreads_and(int vote) { return emulation::barrier(vote) == emulation::threads(); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::warp_operation(emulation::Operation::join, mask); }
inline unsigned __ballot_sync(unsigned mask, int vote) {
    return unsigned(emulation::warp_operation(emulation::Operation::vote, mask, vote != 0));
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap() { emulation::fail("__trap"); }

namespace emulation __attribute__((visibility("hidden"))) {

template <class T>
T shuffle(std::uint32_t mask, T value, unsigned source, bool in_segment) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = warp_operation(Operation::shuffle, mask, bits, in_segment ? source : lane());
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned segment(int width) {  // where the lane's segment begins
    if (width < 1 || width > 32 || width & (width - 1)) fail("a shuffle of width %d", width);
    return lane() & ~unsigned(width - 1);
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return emulation::shuffle(mask, value, emulation::segment(width) | (source & (width - 1)), true);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = emulation::lane();
    return emulation::shuffle(mask, value, lane - delta, lane >= emulation::segment(width) + delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned source = emulation::lane() + delta;
    return emulation::shuffle(mask, value, source, source < emulation::segment(width) + width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
    const unsigned source = emulation::lane() ^ unsigned(flip);
    return emulation::shuffle(mask, value, source, source < emulation::segment(width) + width);
}

// Atomics are plain here: nothing runs at the same time. The value converts to the type in memory, as in CUDA.
#define EMULATION_ATOMIC(name, updated)                                                                    \
    template <class T>                                                                                     \
    T name(T *pointer, std::enable_if_t<true, T> value) {                                                  \
        T &memory = emulation::aligned(pointer);                                                           \
        const T old = memory;                                                                              \
        memory = updated;                                                                                  \
        return old;                                                                                        \
    }
EMULATION_ATOMIC(atomicAdd, old + value)
EMULATION_ATOMIC(atomicSub, old - value)
EMULATION_ATOMIC(atomicExch, value)
EMULATION_ATOMIC(atomicMin, value < old ? value : old)
EMULATION_ATOMIC(atomicMax, old < value ? value : old)
EMULATION_ATOMIC(atomicAnd, old & value)
EMULATION_ATOMIC(atomicOr, old | value)
EMULATION_ATOMIC(atomicXor, old ^ value)
EMULATION_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
EMULATION_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef EMULATION_ATOMIC
template <class T>
T atomicCAS(T *pointer, std::enable_if_t<true, T> expected, std::enable_if_t<true, T> value) {
    T &memory = emulation::aligned(pointer);
    const T old = memory;
    if (old == expected) memory = value;
    return old;
}

#define EMULATION_LOAD(name) \
    template <class T>       \
    T name(const T *pointer) { return emulation::aligned(pointer); }
#define EMULATION_STORE(name) \
    template <class T>        \
    void name(T *pointer, std::enable_if_t<true, T> value) { emulation::aligned(pointer) = value; }
EMULATION_LOAD(__ldg)
EMULATION_LOAD(__ldca)
EMULATION_LOAD(__ldcg)
EMULATION_LOAD(__ldcs)
EMULATION_LOAD(__ldlu)
EMULATION_LOAD(__ldcv)
EMULATION_STORE(__stwb)
EMULATION_STORE(__stcg)
EMULATION_STORE(__stcs)
EMULATION_STORE(__stwt)
#undef EMULATION_LOAD
#undef EMULATION_STORE

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __drcp_rn(double a) { return 1 / a; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline void sincos(float a, float *sine, float *cosine) { sincosf(a, sine, cosine); }
inline float rsqrtf(float a) { return 1 / sqrtf(a); }
inline double rsqrt(double a) { return 1 / sqrt(a); }

inline float __double2float_rn(double a) { return float(a); }
inline int __float2int_rn(float a) { return int(rintf(a)); }
inline int __float2int_rz(float a) { return int(a); }
inline int __double2int_rn(double a) { return int(rint(a)); }
inline long long __double2ll_rn(double a) { return llrint(a); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }
inline float __ll2float_rn(long long a) { return float(a); }
inline float __ull2float_rn(unsigned long long a) { return float(a); }
inline double __int2double_rn(int a) { return a; }
inline double __uint2double_rn(unsigned a) { return a; }
inline double __ll2double_rn(long long a) { return double(a); }
inline double __ull2double_rn(unsigned long long a) { return double(a); }

namespace emulation __attribute__((visibility("hidden"))) {
template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace emulation
inline unsigned __float_as_uint(float a) { return emulation::same_bits<unsigned>(a); }
inline int __float_as_int(float a) { return emulation::same_bits<int>(a); }
inline float __uint_as_float(unsigned a) { return emulation::same_bits<float>(a); }
inline float __int_as_float(int a) { return emulation::same_bits<float>(a); }
inline long long __double_as_longlong(double a) { return emulation::same_bits<long long>(a); }
inline double __longlong_as_double(long long a) { return emulation::same_bits<double>(a); }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll((unsigned long long)a) : 64; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmin(T(a), T(b));
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmax(T(a), T(b));
    return T(a) < T(b) ? T(b) : T(a);
}

// ---------------------------------------------------------------------------------------------------------------------
// Host functions, in cuda_runtime.cpp. Device memory is host memory, and everything is done when a call returns.

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault,
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
};
using cudaStream_t = struct CUstream_st *;
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone,
    cudaStreamCaptureStatusActive,
};
struct cudaFuncAttributes {
    int maxThreadsPerBlock;
};

EMULATION_EXPORT cudaError_t cudaGetLastError();
EMULATION_EXPORT cudaError_t cudaPeekAtLastError();
EMULATION_EXPORT const char *cudaGetErrorString(cudaError_t error);
EMULATION_EXPORT const char *cudaGetErrorName(cudaError_t error);
EMULATION_EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                              std::size_t shared, cudaStream_t);
template <class... Arguments>
cudaError_t cudaLaunchKernel(void (*function)(Arguments...), dim3 grid, dim3 block, void **arguments,
                             std::size_t shared = 0, cudaStream_t stream = nullptr) {
    return cudaLaunchKernel(reinterpret_cast<const void *>(function), grid, block, arguments, shared, stream);
}

EMULATION_EXPORT cudaError_t cudaMalloc(void **pointer, std::size_t size);
template <class T>
cudaError_t cudaMalloc(T **pointer, std::size_t size) {
    return cudaMalloc(reinterpret_cast<void **>(pointer), size);
}
EMULATION_EXPORT cudaError_t cudaFree(void *pointer);
EMULATION_EXPORT cudaError_t cudaMemcpy(void *to, const void *from, std::size_t size, cudaMemcpyKind);
EMULATION_EXPORT cudaError_t cudaMemset(void *pointer, int value, std::size_t size);
EMULATION_EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, std::size_t size, cudaMemcpyKind kind,
                                             cudaStream_t = nullptr);
EMULATION_EXPORT cudaError_t cudaMemsetAsync(void *pointer, int value, std::size_t size, cudaStream_t = nullptr);
// Memory of the host that the device sees too, at the same address.
constexpr unsigned cudaHostAllocPortable = 1;
EMULATION_EXPORT cudaError_t cudaHostAlloc(void **pointer, std::size_t size, unsigned);
#define CUDART_CB
using cudaHostFn_t = void (*)(void *);
EMULATION_EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data);
EMULATION_EXPORT cudaError_t cudaDeviceSynchronize();
EMULATION_EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t);
EMULATION_EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream);
EMULATION_EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream);
// A stream is captured, as far as launchers can tell, while OPTFORGE_EMULATION_CAPTURING is set.
EMULATION_EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status);
EMULATION_EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *found, const void *function);
EMULATION_EXPORT cudaError_t cudaGetDevice(int *device);
EMULATION_EXPORT cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int);
template <class Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, Function *, int block, std::size_t) {
    *count = 2048 / block;
    return cudaSuccess;
}
