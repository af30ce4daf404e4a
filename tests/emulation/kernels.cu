// Small kernels that show what the emulation does, right and wrong. nvcc compiles this file as it is.
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

struct Work {
    const float *x;
    float *y;
    double *partial;
    unsigned *count;
    size_t n;
};

#define KERNEL extern "C" __global__ void __launch_bounds__(256, 4)

static __device__ __forceinline__ size_t element() { return size_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// ---- Right

template <class T>
static __device__ T block_sum(T value) {  // of 256 threads, in thread 0
    __shared__ T warps[8];
    for (int distance = 16; distance > 0; distance /= 2) value = value + __shfl_down_sync(~0u, value, distance);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x < 8) {
        value = warps[threadIdx.x];
        for (int distance = 4; distance > 0; distance /= 2) value = value + __shfl_down_sync(0xffu, value, distance, 8);
    }
    __syncthreads();
    return value;
}

KERNEL where(const Work w) {  // every thread of a grid in three dimensions writes its place
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    w.count[block * blockDim.x * blockDim.y * blockDim.z + thread] += block << 16 | thread;
}

KERNEL arithmetic(const __grid_constant__ Work w) {  // float4 for all but the tail
    const size_t i = element() * 4;
    if (i + 4 <= w.n) {
        float4 v = __ldcs(reinterpret_cast<const float4 *>(w.x + i));
        v.x = __fadd_rn(__fmul_rn(v.x, 3.0f), v.x);
        v.y = __fadd_rn(__fmul_rn(v.y, 3.0f), v.y);
        v.z = __fadd_rn(__fmul_rn(v.z, 3.0f), v.z);
        v.w = __fadd_rn(__fmul_rn(v.w, 3.0f), v.w);
        *reinterpret_cast<float4 *>(w.y + i) = v;
    } else {
        for (size_t k = i; k < w.n; k++) w.y[k] = __fadd_rn(__fmul_rn(__ldg(w.x + k), 3.0f), w.x[k]);
    }
}

KERNEL sums_f32(const Work w) {
    const float sum = block_sum(element() < w.n ? w.x[element()] : 0.0f);
    if (threadIdx.x == 0) w.y[blockIdx.x] = sum;
}

KERNEL sums_f64(const Work w) {
    const double sum = block_sum(element() < w.n ? double(w.x[element()]) : 0.0);
    if (threadIdx.x == 0) w.partial[blockIdx.x] = sum;
}

KERNEL total(const Work w) {  // the block that finishes last adds up what all have left
    __shared__ bool last;
    const double sum = block_sum(element() < w.n ? double(w.x[element()]) : 0.0);
    if (threadIdx.x == 0) {
        w.partial[1 + blockIdx.x] = sum;
        __threadfence();
        last = atomicInc(w.count, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    double all = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) all = all + __ldcg(w.partial + 1 + i);
    all = block_sum(all);
    if (threadIdx.x == 0) w.partial[0] = all;
}

template <int width>
static __device__ unsigned *shuffles(unsigned *to, unsigned lane) {
    to[lane] = __shfl_sync(~0u, lane, 3, width);
    to[32 + lane] = unsigned(__shfl_up_sync(~0u, (int)lane, 3, width));
    to[64 + lane] = unsigned(__shfl_down_sync(~0u, (unsigned long long)lane << 40, 3, width) >> 40);
    to[96 + lane] = unsigned(__shfl_xor_sync(~0u, (float)lane, 3, width));
    return to + 128;
}

KERNEL lanes(const Work w) {  // of one warp
    unsigned *to = w.count;
    to = shuffles<32>(to, threadIdx.x);
    to = shuffles<16>(to, threadIdx.x);
    to = shuffles<8>(to, threadIdx.x);
    to[threadIdx.x] = __ballot_sync(~0u, threadIdx.x % 3 == 0);
    to[32 + threadIdx.x] = unsigned(__any_sync(~0u, threadIdx.x == 9) * 2 + __all_sync(~0u, threadIdx.x != 9));
    if (threadIdx.x < 8) to[64 + threadIdx.x] = __shfl_sync(0xffu, threadIdx.x, 5, 8);
    __syncwarp();
    const int count = __syncthreads_count(threadIdx.x < 9);
    const bool any = __syncthreads_or(threadIdx.x == 9), all = __syncthreads_and(threadIdx.x != 9);
    to[96 + threadIdx.x] = unsigned(count) * 4 + any * 2 + all;
}

KERNEL atomics(const Work w) {
    __shared__ unsigned most;
    if (threadIdx.x == 0) most = 0;
    __syncthreads();
    atomicMax(&most, threadIdx.x);
    atomicAdd(w.count, 1);
    atomicOr(w.count + 1, 1u << threadIdx.x % 32);
    atomicAdd(reinterpret_cast<unsigned long long *>(w.count + 2), 1ull << 32);
    unsigned old = w.count[4], seen;
    do {
        seen = old;
        old = atomicCAS(w.count + 4, seen, seen + 2);
    } while (old != seen);
    __syncthreads();
    if (threadIdx.x == 0) atomicExch(w.count + 5, most);
}

KERNEL reversed(const Work w) {
    __shared__ float all[256];
    all[threadIdx.x] = w.x[threadIdx.x];
    __syncthreads();
    w.y[threadIdx.x] = all[255 - threadIdx.x];
}

template <int size>
struct Sized {
    unsigned long long *to;
    unsigned long long words[size / 8 - 1];
};
#define SIZED(size)                                                                \
    KERNEL sized_##size(const Sized<size> w) {                                     \
        for (int i = 0; i < size / 8 - 1; i++) w.to[i] = w.words[i] + threadIdx.x; \
    }
SIZED(16)
SIZED(24)
SIZED(32)
SIZED(40)
SIZED(264)
SIZED(4000)

KERNEL several(float *y, double a, int n, float b) {
    if (threadIdx.x == 0) y[n] = float(a) + b;
}

// ---- Wrong

KERNEL reversed_without_barrier(const Work w) {
    __shared__ float all[256];
    all[threadIdx.x] = w.x[threadIdx.x];
    w.y[threadIdx.x] = all[255 - threadIdx.x];
}

KERNEL reads_before_it_writes(const Work w) {
    __shared__ float kept;
    if (threadIdx.x == 0) w.y[blockIdx.x] = kept;
    kept = 1;
}

KERNEL barrier_for_some(const Work w) {
    if (threadIdx.x < 100) __syncthreads();
}

KERNEL barrier_or_shuffle(const Work w) {
    if (threadIdx.x < 31) __syncthreads();
    else w.count[0] = __shfl_sync(~0u, threadIdx.x, 0);
}

KERNEL shuffle_without_lane(const Work w) {
    if (threadIdx.x == 5) return;
    __syncwarp(~(1u << 5));
    w.count[threadIdx.x] = __shfl_sync(~0u, threadIdx.x, 0);
}

KERNEL shuffle_outside_its_mask(const Work w) { w.count[threadIdx.x] = __shfl_sync(0xffffu, threadIdx.x, 0); }

KERNEL shuffle_from_outside_its_mask(const Work w) {
    if (threadIdx.x < 16) w.count[threadIdx.x] = __shfl_down_sync(0xffffu, threadIdx.x, 8);
}

KERNEL misaligned_hint(const Work w) {
    if (threadIdx.x == 1) w.y[0] = __ldcs(reinterpret_cast<const float4 *>(w.x + 1)).x;
}

KERNEL misaligned_plain(const Work w) {
    if (threadIdx.x == 2) *reinterpret_cast<double2 *>(w.y) = *reinterpret_cast<const double2 *>(w.x + 2);
}

KERNEL beyond(const Work w) {
    if (element() <= w.n) w.y[element()] = 0;
}

// ---- Launched from C

struct Case {
    const char *name;
    const void *kernel;
};
static const Case cases[] = {
#define CASE(name) {#name, (const void *)name}
    CASE(where), CASE(arithmetic), CASE(sums_f32), CASE(sums_f64), CASE(total), CASE(lanes), CASE(atomics),
    CASE(reversed),
    CASE(sized_16), CASE(sized_24), CASE(sized_32), CASE(sized_40), CASE(sized_264), CASE(sized_4000),
    CASE(reversed_without_barrier), CASE(reads_before_it_writes), CASE(barrier_for_some), CASE(barrier_or_shuffle),
    CASE(shuffle_without_lane), CASE(shuffle_outside_its_mask), CASE(shuffle_from_outside_its_mask),
    CASE(misaligned_hint), CASE(misaligned_plain), CASE(beyond),
};

extern "C" int launch(const char *name, void *arguments, const unsigned *grid, const unsigned *block) {
    for (const Case &one : cases) {
        const char *a = one.name, *b = name;
        while (*a && *a == *b) a++, b++;
        if (*a != *b) continue;
        void *all[] = {arguments};
        return (int)cudaLaunchKernel(one.kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                                     all, 0, NULL);
    }
    return -1;
}

extern "C" int run_several(float *y, double a, int n, float b, cudaStream_t stream) {
    void *all[] = {&y, &a, &n, &b};
    return (int)cudaLaunchKernel((const void *)several, dim3(1), dim3(32), all, 0, stream);
}

extern "C" int copy_and_back(const float *from, float *to, size_t n, size_t written, cudaStream_t stream) {
    float *device;
    if (cudaMalloc((void **)&device, n * sizeof(float)) != cudaSuccess) return 1;
    cudaMemcpyAsync(device, from, n * sizeof(float), cudaMemcpyHostToDevice, stream);
    cudaMemsetAsync(device, 0, written * sizeof(float), stream);
    cudaStreamSynchronize(stream);
    cudaMemcpy(to, device, n * sizeof(float), cudaMemcpyDeviceToHost);
    cudaFree(device);
    return (int)cudaGetLastError();
}
