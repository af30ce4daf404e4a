/* optforge.cuh: what every emitted rule's CUDA shares: plans, calls, the passes over memory,
 * the summation tree, and whether a step is skipped.
 *
 * A rule's own header, NAME.cuh, includes this one and has typed calls, which are all that most programs
 * need. The passes are templates over a rule's formulas, which NAME.cu instantiates.
 *
 * This file may be used, changed and distributed without restriction.
 */
#ifndef OPTFORGE_CUH
#define OPTFORGE_CUH

#include "optforge.h"

/* ---- types, which all emitted CUDA of a program shares ------------------------------------------------ */

#include <cuda_runtime.h>

#ifdef OPTFORGE_CUDA_TYPES
#if OPTFORGE_CUDA_TYPES != 1
#error "CUDA emitted by different versions of optforge in one program: emit all of it anew"
#endif
#else
#define OPTFORGE_CUDA_TYPES 1

#ifdef __cplusplus
extern "C" {
#endif

/* Statuses that optforge.h has not. */
enum {
    OPTFORGE_ERROR_CUDA = 64,   /* a CUDA call failed; cudaGetLastError tells which */
    OPTFORGE_ERROR_ROWS = 65,   /* the device came to a step whose scalars it was not given */
    OPTFORGE_ERROR_CAPTURE = 66 /* the host hands over nothing in a CUDA graph: only launch is captured */
};

enum { OPTFORGE_CUDA_ROWS = 64 }; /* steps whose scalars the device can have at a time */

/* What the device knows of its steps, at the begin of the workspace: copy it to the host to learn what was
 * skipped. The number of the next step is t + 1 - skipped. */
typedef struct optforge_cuda_control {
    uint64_t t;         /* number of the last step */
    uint32_t skipped;   /* whether it was skipped: t - skipped steps have been applied */
    int32_t status;     /* what became of it */
    uint32_t idle;      /* whether it was not done at all */
    uint32_t done;      /* sums that are added up */
    uint64_t set;       /* what the host tells: whether the count of steps is to be set */
    uint64_t base;      /* to this */
    uint64_t first_row; /* number of the first step whose scalars are there */
    uint64_t rows;      /* how many steps have theirs */
} optforge_cuda_control;

/* A leaf of a tensor of the list, 1,024 elements, which a warp does; or a chunk of a whole tensor. */
typedef struct optforge_cuda_unit {
    uint32_t tensor;
    uint32_t leaf;
} optforge_cuda_unit;

/* A list of tensors as kernels take it, made by optforge_cuda_plan_list. Nothing in it is for the caller. */
typedef struct optforge_cuda_plan {
    const struct optforge_cuda_kernel *kernel; /* on the host; the rest points to memory of the device */
    const char *list;             /* the tensors */
    uint64_t stride;              /* bytes of one */
    uint64_t count;               /* how many */
    const void **gradients;       /* where their gradients are */
    uint64_t units;               /* their leaves */
    optforge_cuda_unit *unit;     /* each of them */
    uint64_t *group;              /* of each tensor: the number of its hyperparameters */
    uint64_t *number;             /* of each tensor: that of its whole one */
    uint64_t *part;               /* of each tensor: the first leaf there */
    uint64_t *before;             /* of each tensor: the leaves of those before */
    uint64_t groups;              /* how many hyperparameters there are */
    const uint64_t *late;         /* on the host, of each group: how many steps less its tensors have had */
    uint64_t *behind;             /* the same on the device */
    uint64_t *stream;             /* of each tensor: a number for stochastic rounding */
    uint64_t tensors;             /* whole ones, of which the list may have parts */
    uint64_t leaves;              /* their leaves */
    uint64_t chunks;              /* their chunks of 32 leaves, at least one of each */
    uint64_t *sizes;              /* of each: its elements */
    uint64_t *first;              /* of each: its first leaf among all, and the end of the last */
    uint64_t *before_chunk;       /* of each: the chunks of those before */
    optforge_cuda_unit *chunk;    /* each chunk */
    double *sums;                 /* of each leaf */
    double *chunk_sums;           /* of each chunk */
    double *tensor_sums;          /* of each whole tensor */
    double *totals;               /* of all */
    uint32_t *arrived;            /* chunks of each tensor, and tensors, that are added up */
    optforge_cuda_control *control;
    uint64_t *rows;               /* the scalars of steps to come, of each group */
    uint64_t *scalars;            /* of the step under way, of each group */
    uint64_t width;               /* words of 8 bytes of the scalars of a group */
    const unsigned char *starting;/* of each tensor: whether this is its first step */
    optforge_stats *stats;        /* filled in */
    optforge_stats *tensor_stats; /* likewise, for each whole tensor */
    uint64_t seed;                /* of stochastic rounding */
    int32_t phase;                /* the phase that is launched */
    int32_t slot;                 /* the first of the sums that are added up */
    int32_t observe;              /* whether statistics are wanted */
    int32_t skip_nonfinite;       /* whether a NaN or an infinity in any gradient skips the step */
    int32_t zero_grads;           /* whether gradients are set to 0 */
    int32_t parted;               /* whether the list has parts of tensors */
    int32_t beside;               /* whether another plan begins the steps and adds up */
} optforge_cuda_plan;

/* How steps are done. What is 0 or NULL is not asked for. The first part is read when a plan is made, and
 * names memory of the host but for the workspace; the second at every step, and names memory of the
 * device. */
typedef struct optforge_cuda_options {
    size_t size;           /* of this struct, which optforge_cuda_options_init fills in */
    void *workspace;       /* on the device, kept as long as the plan, at a multiple of 16 bytes */
    size_t workspace_size; /* in bytes */
    size_t groups;         /* how many hyperparameters the tensors share out; 0 means 1 */
    const size_t *group;   /* of each tensor: which of them are its own; NULL: the first */
    const uint64_t *late;  /* of each group, kept: how many steps fewer its tensors have had; NULL: none */
    size_t tensors;        /* where the list has parts of tensors: how many whole ones there are */
    const size_t *sizes;   /* and their numbers of elements; NULL: the list has whole ones */
    const size_t *number;  /* of each tensor: which whole one it is a part of; parts with one scalar state
                            * are neighbours */
    const size_t *part;    /* of each tensor: the element there that it begins at, between leaves */
    const uint64_t *stream; /* of each tensor: a number for its stochastic rounding; NULL: that among all */
    const optforge_cuda_plan *beside; /* a plan over parts of the same tensors, which begins their steps: this
                            * one's are done phase by phase, each behind the other's */

    double grad_scale;     /* gradients are multiplied by 1 / grad_scale before anything sees them; 1 */
    uint64_t seed;         /* of stochastic rounding */
    int skip_nonfinite;    /* with a NaN or an infinity in any gradient nothing is changed */
    int zero_grads;        /* g, which must not be const then, is set to 0, also by a skipped step */
    optforge_stats *stats; /* filled in, over all tensors */
    optforge_stats *tensor_stats;  /* filled in, one for each tensor, each whole one where there are parts */
    const unsigned char *starting; /* of each tensor: whether this is its first step */
} optforge_cuda_options;

/* What a phase launches, and what it adds up: first what formulas need, then statistics, then counts of NaN
 * and of infinity. */
typedef struct optforge_cuda_phase {
    const void *plain;    /* without statistics */
    const void *observed; /* with them */
    int first;            /* the first of its sums among all */
    int own, all;         /* how many there are, without statistics and with them */
    int scans;            /* it only looks at gradients, where a step may be skipped: `plain` counts alone */
} optforge_cuda_phase;

/* A rule for one format of its arrays. */
typedef struct optforge_cuda_kernel {
    unsigned abi; /* OPTFORGE_CUDA_TYPES */
    const char *const *asserts;      /* their texts, and NULL */
    size_t arrays;                   /* p, g, the state, and the master if there is one */
    const unsigned char *formats;    /* of each, as in optforge.h */
    const optforge_initial *initial; /* of each state */
    size_t hypers;                   /* doubles in a struct of hyperparameters */
    size_t scalars_size;             /* bytes of the scalars of a step */
    int stores;                      /* whether scalar state advances */
    int sums;                        /* of all phases */
    int phase_count;
    const optforge_cuda_phase *phases;
    const void *begin, *fold, *finish, *attempt; /* kernels; the last is NULL where no scalar can fail */
    int (*scalars)(void *scalars, const void *hyper, uint64_t t, double unscale); /* on the host */
    size_t master; /* the array that has p in full, F32 or LOW, which p is rounded from; or 0 */
} optforge_cuda_kernel;

/* Words of scalars that the begin of a step brings along, in so many bytes as any CUDA passes. */
enum { OPTFORGE_CUDA_NEWS = 432 };
typedef struct optforge_cuda_news {
    optforge_cuda_plan plan;
    uint64_t set, base, first_row, rows; /* for the control, if `told` */
    uint64_t at, words;                  /* where among the rows */
    int32_t told, begins;                /* whether a step begins */
    uint64_t word[OPTFORGE_CUDA_NEWS];
} optforge_cuda_news;

#ifdef __cplusplus
}
#endif
#endif /* OPTFORGE_CUDA_TYPES */

/* ---- calls --------------------------------------------------------------------------------------------- */

#ifndef OPTFORGE_CUDA_API
#define OPTFORGE_CUDA_API /* define it to export the functions, as OPTFORGE_API */
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The text of a status, that of a kernel's own asserts too; never NULL. */
OPTFORGE_CUDA_API const char *optforge_cuda_strerror(const optforge_cuda_kernel *kernel, int status);

/* Fills in the defaults: plain steps. */
OPTFORGE_CUDA_API void optforge_cuda_options_init(optforge_cuda_options *o);

/* Bytes of workspace for so many elements in so many tensors and groups; where the list has parts of
 * tensors, of the whole ones, or of as many as there are parts if those are more. */
OPTFORGE_CUDA_API size_t optforge_cuda_workspace_size(const optforge_cuda_kernel *kernel, uint64_t elements,
                                                      size_t count, size_t groups);

/* Plans steps over a list of tensors: checks it, and enqueues its tables. Its steps are those of one stream
 * at a time. Here and in gradients what the host gives may be changed when the call returns, unless it lies
 * in pinned memory: then when the stream has come so far. */
OPTFORGE_CUDA_API int optforge_cuda_plan_list(optforge_cuda_plan *plan, const optforge_cuda_kernel *kernel,
                                              const void *tensors, size_t count,
                                              const optforge_cuda_options *options, cudaStream_t stream);

/* Other gradients for the tensors of a plan, of the same sizes, so NULL for none but the empty: one copy of
 * their addresses. */
OPTFORGE_CUDA_API int optforge_cuda_gradients(const optforge_cuda_plan *plan, const void *const *gradients,
                                              cudaStream_t stream);

/* Enqueues the initial state of the tensors, to be written once, before their first step; hyper has the
 * hyperparameters of each group, and may be NULL where no state starts as one. */
OPTFORGE_CUDA_API int optforge_cuda_state_init(const optforge_cuda_plan *plan, const void *hyper,
                                               cudaStream_t stream);

/* One step over the list, in place: number t, counted from 1. hyper has the hyperparameters of each group;
 * options may be NULL. It only enqueues work: errors of the arguments are found before, and nothing waits
 * for the device. It brings the scalars of this step, and so has no place in a CUDA graph; launch has. */
OPTFORGE_CUDA_API int optforge_cuda_step(const void *hyper, uint64_t t, const optforge_cuda_plan *plan,
                                         const optforge_cuda_options *options, cudaStream_t stream);

/* The two halves of a step, for steps whose number only the device knows (because some were skipped) and
 * for CUDA graphs, which can capture launch and replay it. rows hands over the scalars of steps [t, t +
 * number), in the place of those that were there, for at most OPTFORGE_CUDA_ROWS steps; of options it
 * takes grad_scale. With `set` the next step becomes number t; otherwise the device counts on. launch does
 * one step; phases does phases [first, last) of it, to be called in order. */
OPTFORGE_CUDA_API int optforge_cuda_rows(const optforge_cuda_plan *plan, const void *hyper, uint64_t t,
                                         size_t number, int set, const optforge_cuda_options *options,
                                         cudaStream_t stream);
OPTFORGE_CUDA_API int optforge_cuda_launch(const optforge_cuda_plan *plan,
                                           const optforge_cuda_options *options, cudaStream_t stream);
OPTFORGE_CUDA_API int optforge_cuda_phases(const optforge_cuda_plan *plan,
                                           const optforge_cuda_options *options, int first, int last,
                                           cudaStream_t stream);

/* Between phases k and k + 1 the sums that phase k left for each leaf can be added over ranks that have
 * parts of the same tensors: they are 0 where a rank has not that leaf, if they were set to 0 before the
 * step, so that the result has the bits of a single rank's. partials gives those sums, on the device, and
 * their number. */
OPTFORGE_CUDA_API double *optforge_cuda_partials(const optforge_cuda_plan *plan, int phase, size_t *number);

#ifdef __cplusplus
}
#endif

#endif /* OPTFORGE_CUH */

/* ---- for the files that compute: numbers, and the passes over memory ---------------------------------- */

#if defined(OPTFORGE_CUDA_COMPILE) && !defined(OPTFORGE_CUDA_COMPILED)
#define OPTFORGE_CUDA_COMPILED

#include <float.h>
#include <math.h>
#include <string.h>

/* Also what the host computes is rounded as it is written. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#if defined(__CUDACC__)
#pragma nv_diag_suppress 1675 /* a pragma for the compiler of the host */
#endif
#pragma GCC optimize("fp-contract=off")
#if defined(__CUDACC__)
#pragma nv_diag_default 1675
#endif
#endif

/* What can be tuned with -D: no bit depends on it. */
#ifndef OPTFORGE_CUDA_MIN_BLOCKS
#define OPTFORGE_CUDA_MIN_BLOCKS 3 /* of float on a multiprocessor, of double half */
#endif
#ifndef OPTFORGE_CUDA_READ
#define OPTFORGE_CUDA_READ(from) (*(from)) /* or __ldcs(from), which asks the caches not to keep it */
#endif
#ifndef OPTFORGE_CUDA_WRITE
#define OPTFORGE_CUDA_WRITE(to, value) (*(to) = (value)) /* or __stcs(to, value) */
#endif

enum {
    OPTFORGE_CUDA_THREADS = 256, /* of a block */
    OPTFORGE_CUDA_WARPS = OPTFORGE_CUDA_THREADS / 32,
    OPTFORGE_CUDA_ROW = 128,     /* elements that a warp does at a time, four a thread */
    OPTFORGE_CUDA_CHUNK = 32,    /* leaves whose sums fold into one */
    OPTFORGE_CUDA_MOST = 1024    /* values of a leaf of the summation tree */
};
static_assert(OPTFORGE_CUDA_MIN_BLOCKS >= 1 && OPTFORGE_CUDA_MIN_BLOCKS <= 8,
              "OPTFORGE_CUDA_MIN_BLOCKS: so many blocks of 256 threads have room on no multiprocessor");
static_assert(sizeof(optforge_cuda_news) <= 4096, "an argument of a kernel has at most 4,096 bytes");

#define OPTFORGE_DEVICE static __device__ __forceinline__

/* Kernels, by the names under which they are launched. Those that pass over memory leave registers for so
 * many blocks on a multiprocessor; a rule's look at the gradients is one kernel with statistics and one
 * without. */
#define OPTFORGE_CUDA_KERNEL(name, argument, ...)                                                      \
    extern "C" __global__ void __launch_bounds__(OPTFORGE_CUDA_THREADS)                                \
        name(const __grid_constant__ argument given) { __VA_ARGS__(given); }
#define OPTFORGE_CUDA_PASS(name, blocks, pass, ...)                                                    \
    extern "C" __global__ void __launch_bounds__(OPTFORGE_CUDA_THREADS, pass::element::blocks)         \
        name(const __grid_constant__ optforge_cuda_plan given) {                                       \
        optforge_cuda_pass<pass, __VA_ARGS__>(given);                                                  \
    }
#define OPTFORGE_CUDA_SCAN(rule, suffix, storage)                                                      \
    typedef optforge_cuda_scan<rule##_rule, storage::real> rule##_scan_of_##suffix;                    \
    OPTFORGE_CUDA_PASS(rule##_scan_##suffix, BLOCKS, rule##_scan_of_##suffix, true, storage)           \
    OPTFORGE_CUDA_PASS(rule##_look_##suffix, MORE_BLOCKS, rule##_scan_of_##suffix, false, storage)

/* Numbers whose operations are rounded as they are written: no compiler flag fuses them or takes others
 * for them. */
#define OPTFORGE_CUDA_OPERATORS(self, letter)                                                  \
    friend __device__ self operator+(self a, self b) { return __##letter##add_rn(a.x, b.x); } \
    friend __device__ self operator-(self a, self b) { return __##letter##sub_rn(a.x, b.x); } \
    friend __device__ self operator*(self a, self b) { return __##letter##mul_rn(a.x, b.x); } \
    friend __device__ self operator/(self a, self b) { return __##letter##div_rn(a.x, b.x); } \
    friend __device__ self operator-(self a) { return -a.x; }                                  \
    friend __device__ self &operator+=(self &a, self b) { return a = a + b; }                  \
    friend __device__ bool operator<(self a, self b) { return a.x < b.x; }                     \
    friend __device__ bool operator<=(self a, self b) { return a.x <= b.x; }                   \
    friend __device__ bool operator>(self a, self b) { return a.x > b.x; }                     \
    friend __device__ bool operator>=(self a, self b) { return a.x >= b.x; }                   \
    friend __device__ bool operator==(self a, self b) { return a.x == b.x; }                   \
    friend __device__ bool operator!=(self a, self b) { return a.x != b.x; }                   \
    friend __device__ self sqrt(self a) { return __##letter##sqrt_rn(a.x); }

struct optforge_f64 {
    typedef double number;
    enum { FORMAT = OPTFORGE_F64 };
    enum { BLOCKS = (OPTFORGE_CUDA_MIN_BLOCKS + 1) / 2, MORE_BLOCKS = OPTFORGE_CUDA_MIN_BLOCKS / 2 + 1 };
    enum { FEWER_BLOCKS = 1 };
    double x;

    optforge_f64() = default;
    __host__ __device__ optforge_f64(double value) : x(value) {}
    OPTFORGE_CUDA_OPERATORS(optforge_f64, d)
    friend __device__ optforge_f64 fabs(optforge_f64 a) { return ::fabs(a.x); }
    friend __device__ optforge_f64 copysign(optforge_f64 a, optforge_f64 b) { return ::copysign(a.x, b.x); }

    __device__ double wide() const { return x; }
    __device__ double add_square(double sum) const { return __dadd_rn(sum, __dmul_rn(x, x)); }
    __device__ bool finite() const { return (__double_as_longlong(x) >> 52 & 0x7ff) != 0x7ff; }
};

struct optforge_f32 {
    typedef float number;
    enum { FORMAT = OPTFORGE_F32 };
    enum { BLOCKS = OPTFORGE_CUDA_MIN_BLOCKS };
    enum { MORE_BLOCKS = BLOCKS < 8 ? BLOCKS + 1 : 8 };  /* where a pass is small */
    enum { FEWER_BLOCKS = BLOCKS > 1 ? BLOCKS - 1 : 1 }; /* where it is large */
    float x;

    optforge_f32() = default;
    __device__ optforge_f32(float value) : x(value) {}
    __device__ optforge_f32(double value) { x = __double2float_rn(value); }
    explicit __device__ optforge_f32(optforge_f64 value) { x = __double2float_rn(value.x); }
    OPTFORGE_CUDA_OPERATORS(optforge_f32, f)
    friend __device__ optforge_f32 fabs(optforge_f32 a) { return ::fabsf(a.x); }

    /* As a double. Most GPUs convert slowly; a normal float only needs its exponent in another place. */
    __device__ double wide() const {
        const unsigned u = __float_as_uint(x), low = u << 29;
        const unsigned high = (u & 0x80000000u) | ((u >> 3 & 0x0fffffffu) + 0x38000000u);

        if ((u >> 23 & 0xff) - 1 < 0xfe)
            return __longlong_as_double((long long)((unsigned long long)high << 32 | low));
        return x;
    }
    /* The square of a float is exact in double, so that nothing is lost when it is added at once. */
    __device__ double add_square(double sum) const {
        const double w = wide();

        return __fma_rn(w, w, sum);
    }
    __device__ bool finite() const { return (__float_as_uint(x) >> 23 & 0xff) != 0xff; }
};

/* Of CUDA's own library, and maybe off in the last bits. */
#define OPTFORGE_CUDA_LIBRARY(name)                                                                        \
    inline __device__ __noinline__ float optforge_cuda_library_##name##f(float a) { return name##f(a); }   \
    inline __device__ __noinline__ double optforge_cuda_library_##name(double a) { return name(a); }       \
    inline __device__ optforge_f32 name(optforge_f32 a) { return optforge_cuda_library_##name##f(a.x); }   \
    inline __device__ optforge_f64 name(optforge_f64 a) { return optforge_cuda_library_##name(a.x); }
#define OPTFORGE_CUDA_LIBRARY_OF_TWO(name)                                                                 \
    inline __device__ __noinline__ double optforge_library_##name(double a, double b) { return name(a, b); } \
    inline __device__ optforge_f64 name(optforge_f64 a, optforge_f64 b) {                                  \
        return optforge_library_##name(a.x, b.x);                                                          \
    }
OPTFORGE_CUDA_LIBRARY(exp)
OPTFORGE_CUDA_LIBRARY(expm1)
OPTFORGE_CUDA_LIBRARY(log)
OPTFORGE_CUDA_LIBRARY(log1p)
OPTFORGE_CUDA_LIBRARY(sin)
OPTFORGE_CUDA_LIBRARY(cos)
OPTFORGE_CUDA_LIBRARY(tan)
OPTFORGE_CUDA_LIBRARY(tanh)
OPTFORGE_CUDA_LIBRARY(atan)
OPTFORGE_CUDA_LIBRARY(erf)
OPTFORGE_CUDA_LIBRARY_OF_TWO(pow)
OPTFORGE_CUDA_LIBRARY_OF_TWO(fmod)

/* ---- four neighbouring elements, as vectors where there are four and they lie so ---- */

template <typename T> struct optforge_cuda_vector;
template <> struct optforge_cuda_vector<optforge_f32> { typedef float4 type; };
template <> struct optforge_cuda_vector<optforge_f64> { typedef double2 type; };
template <> struct optforge_cuda_vector<uint16_t> { typedef ushort4 type; };
template <> struct optforge_cuda_vector<uint8_t> { typedef uchar4 type; };

template <typename T>
OPTFORGE_DEVICE bool optforge_cuda_aligned(const T *at) {
    return (uintptr_t)at % sizeof(typename optforge_cuda_vector<T>::type) == 0;
}

/* `live` of the four are there. */
template <typename T>
OPTFORGE_DEVICE void optforge_cuda_load(T (&to)[4], const T *from, int live) {
    typedef typename optforge_cuda_vector<T>::type vector;

    if (live == 4 && optforge_cuda_aligned(from)) {
#pragma unroll
        for (int k = 0; k < 4; k += sizeof(vector) / sizeof(T)) {
            const vector v = OPTFORGE_CUDA_READ((const vector *)(from + k));

            memcpy(to + k, &v, sizeof v);
        }
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++)
            to[k] = k < live ? from[k] : T();
    }
}

template <typename T>
OPTFORGE_DEVICE void optforge_cuda_store(T *to, const T (&from)[4], int live) {
    typedef typename optforge_cuda_vector<T>::type vector;

    if (live == 4 && optforge_cuda_aligned(to)) {
#pragma unroll
        for (int k = 0; k < 4; k += sizeof(vector) / sizeof(T)) {
            vector v;

            memcpy(&v, from + k, sizeof v);
            OPTFORGE_CUDA_WRITE((vector *)(to + k), v);
        }
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < live)
                to[k] = from[k];
    }
}

/* ---- storage: what arrays are stored as, whatever is computed with ---- */

/* How the arrays of a tensor are stored, by number, unless a rule says otherwise: as what is computed with.
 * MASTER is the format of the array beside p that has it in full, F32 or LOW. */
template <typename Real>
struct optforge_cuda_storage {
    typedef Real real;
    enum { MASTER = 0, STOCHASTIC = 0 };

    static __device__ constexpr int format(int) { return Real::FORMAT; }
};

static __host__ __device__ constexpr bool optforge_cuda_blocks(int format) {
    return format == OPTFORGE_Q8 || format == OPTFORGE_UQ8;
}
static __host__ __device__ constexpr bool optforge_cuda_narrow(int format) {
    return format >= OPTFORGE_BF16 && format != OPTFORGE_ABSMAX;
}
static __host__ __device__ constexpr unsigned optforge_cuda_size_of(int format) {
    return optforge_cuda_blocks(format) ? 1
           : optforge_cuda_narrow(format) ? 2
           : format == OPTFORGE_F32 || format == OPTFORGE_ABSMAX ? 4 : 8;
}

/* What the random bits of stochastic rounding are made of; optforge.c says the same for the host. */
struct optforge_cuda_draw {
    uint32_t first, second;

    __device__ uint32_t operator()(uint32_t element) const {
        uint32_t x = first + UINT32_C(0x9e3779b9) * element;

        x = (x ^ x >> 16) * UINT32_C(0x7feb352d) ^ second;
        x = (x ^ x >> 15) * UINT32_C(0x846ca68b);
        return x ^ x >> 16;
    }
};

OPTFORGE_DEVICE uint64_t optforge_cuda_stir(uint64_t x, uint64_t more) {
    x = (x ^ more) + UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* What 16 bits are. Subnormal numbers of half precision are 2^-24 times an integer. */
OPTFORGE_DEVICE optforge_f32 optforge_cuda_decode(int format, uint16_t x) {
    const uint32_t magnitude = x & 0x7fffu, sign = (uint32_t)(x & 0x8000u) << 16;
    const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00u ? 112u << 23 : 224u << 23);
    const optforge_f32 small = optforge_f32(__uint_as_float(magnitude + 0x3f000000u)) - optforge_f32(0.5f);

    if (format == OPTFORGE_BF16)
        return __uint_as_float((uint32_t)x << 16);
    return __uint_as_float(sign | (magnitude < 0x400u ? __float_as_uint(small.x) : normal));
}

/* Rounds to nearest even by adding to what is dropped, up to the number that carries, or at random. NaN is
 * quiet; what is beyond the largest number goes to the nearer of that and infinity, never by chance. */
OPTFORGE_DEVICE uint16_t optforge_cuda_encode(int format, optforge_f32 x, bool draws, uint32_t random) {
    const uint32_t bits = __float_as_uint(x.x), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;

    if (format == OPTFORGE_BF16) {
        const uint32_t drawn = magnitude <= 0x7f7f0000u ? random >> 16 : 0x8000u;
        const uint32_t rounded = (bits + (draws ? drawn : 0x7fffu + (bits >> 16 & 1u))) >> 16;

        return (uint16_t)(magnitude > 0x7f800000u ? sign | 0x7fc0u : rounded);
    }
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x38800000u) {
        const uint32_t drawn = magnitude <= 0x477fe000u ? random >> 19 : 0x1000u;
        const uint32_t add = draws ? drawn : 0xfffu + (magnitude >> 13 & 1u);
        const uint32_t rounded = (magnitude + add - (112u << 23)) >> 13;

        return (uint16_t)(sign | (rounded < 0x7c00u ? rounded : 0x7c00u));
    }
    if (!draws) {
        const optforge_f32 half = optforge_f32(__uint_as_float(magnitude)) + optforge_f32(0.5f);

        return (uint16_t)(sign | (__float_as_uint(half.x) - 0x3f000000u));
    }
    /* Multiples of 2^-24, and the fraction between two in 32 bits, of which each half is exact. */
    const optforge_f32 units = optforge_f32(__uint_as_float(magnitude)) * optforge_f32(16777216.0f);
    const uint32_t whole = (uint32_t)units.x;
    const optforge_f32 share = (units - optforge_f32((float)whole)) * optforge_f32(65536.0f);
    const uint32_t upper = (uint32_t)share.x;
    const optforge_f32 rest = (share - optforge_f32((float)upper)) * optforge_f32(65536.0f);

    return (uint16_t)(sign | (whole + (random < (upper << 16 | (uint32_t)rest.x) ? 1u : 0u)));
}

/* A float that bfloat16 and what it leaves are together, and the two of a float: ties go away from zero, and
 * a NaN becomes one that rounding cannot make a number of. */
OPTFORGE_DEVICE optforge_f32 optforge_cuda_join(uint16_t p, uint16_t low) {
    return __uint_as_float(((uint32_t)p << 16) + (uint32_t)(int32_t)(int16_t)low);
}
OPTFORGE_DEVICE void optforge_cuda_split(optforge_f32 x, uint16_t *p, uint16_t *low) {
    const uint32_t given = __float_as_uint(x.x);
    const uint32_t bits = (given & 0x7fffffffu) > 0x7f800000u ? (given & 0x80000000u) | 0x7fc00000u : given;

    *p = (uint16_t)((bits + 0x8000u) >> 16);
    *low = (uint16_t)bits;
}

/* An element of an array that is no scalar's, as a double. */
static __device__ double optforge_cuda_get(const void *array, int format, uint64_t i) {
    if (optforge_cuda_narrow(format))
        return optforge_cuda_decode(format, ((const uint16_t *)array)[i]).wide();
    return format == OPTFORGE_F32 ? (double)((const float *)array)[i] : ((const double *)array)[i];
}

/* State of 8 bits, in blocks of two rows of a warp: what codes stand for, and the largest floats that are
 * nearer to what is below a code. A thread of a block makes those of one code; optforge.c says the same. */
struct optforge_cuda_map {
    float number[256], above[256];

    __device__ void fill_number(int code, bool is_signed) {
        const bool below = is_signed && code < 127;
        const unsigned place = !is_signed ? code + 1 : below ? 127 - code : code - 127; /* in all parts */
        unsigned parts = is_signed ? 1 : 2, k = place;
        optforge_f32 ten(1e-6f), middle(1.0f);

        if (place == (is_signed ? 0u : 1u)) {
            middle = optforge_f32(0.0f);
        } else if (code < 255) {
            const float tens[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
            int decade = 0;

            for (; place >= 2 * parts; parts *= 2)
                decade++;
            ten = optforge_f32(tens[decade]);
            k = place - parts;
            middle = ten * ((edge(k, parts) + edge(k + 1, parts)) * optforge_f32(0.5f));
        }
        number[code] = below ? -middle.x : middle.x;
    }
    static __device__ optforge_f32 edge(unsigned k, unsigned parts) { /* rounded once: the rest is exact */
        const optforge_f64 step = (double)(optforge_f32(0.9f) / optforge_f32((float)parts)).x;
        const bool low = k < (parts + 1) / 2;
        const optforge_f64 way = step * optforge_f64((double)(low ? k : parts - k));

        return optforge_f32(low ? optforge_f64((double)0.1f) + way : optforge_f64(1.0) - way);
    }
    __device__ void fill_above(int code) {
        const optforge_f64 below((double)number[code > 0 ? code - 1 : 0]);
        const optforge_f64 middle = (below + optforge_f64((double)number[code])) * optforge_f64(0.5);
        const optforge_f32 rounded(middle);
        const unsigned before = __float_as_uint(rounded.x) + (rounded.x < 0.0f ? 1u : ~0u);

        above[code] = code == 0 ? -2.0f : (double)rounded.x > middle.x ? __uint_as_float(before) : rounded.x;
    }
    /* The code that is nearest to x, from -1 to 1: near a line of each decade, or the one below that. */
    __device__ uint8_t nearest(optforge_f32 x, bool is_signed) const {
        const unsigned bits = __float_as_uint(x.x);
        const optforge_f32 size = __uint_as_float(bits & 0x7fffffffu), start(0.8f / 0.9f);
        const optforge_f32 five(5.0f), half(0.5f);
        optforge_f32 ten(320.0f / 0.9f), from(32.0f);
        optforge_f32 place = optforge_f32(64.0f / 0.9f) * size + optforge_f32(64.0f) * start;

#pragma unroll
        for (int decade = 0; decade < 6; decade++, ten = ten * five, from = from * half)
            place = ::fminf(place.x, (ten * size + from * start).x);
        place = is_signed ? place - optforge_f32(0.25f) : optforge_f32(2.0f) * place - optforge_f32(1.25f);
        const int near = (int)place.x;
        const int code = (near ^ ((int)bits >> 31)) + (is_signed ? 128 : 1);

        return (uint8_t)(code - (x.x > above[code] ? 0 : 1));
    }
};

/* The elements of tensor k of the list. */
OPTFORGE_DEVICE uint64_t optforge_cuda_size(const optforge_cuda_plan &w, uint64_t k) {
    return *(const uint64_t *)(w.list + k * w.stride);
}

/* Where a warp works. `left` elements begin at element `begin` of the arrays. */
struct optforge_cuda_leaf {
    uint64_t tensor, begin;
    double *sums; /* the first of this leaf's; the next stands w.leaves behind */
    int lane, left;
    bool skipped;

    /* Whether there is anything to do for this warp. */
    __device__ bool find(const optforge_cuda_plan &w, int slot) {
        const uint64_t u = blockIdx.x * (uint64_t)OPTFORGE_CUDA_WARPS + threadIdx.x / 32;

        if (u >= w.units || w.control->idle)
            return false;
        const optforge_cuda_unit at = w.unit[u];
        const uint64_t n = optforge_cuda_size(w, at.tensor);

        lane = threadIdx.x % 32;
        tensor = at.tensor;
        begin = (uint64_t)at.leaf * OPTFORGE_LEAF;
        left = n - begin < OPTFORGE_LEAF ? (int)(n - begin) : +OPTFORGE_LEAF;
        sums = w.sums + slot * w.leaves + w.first[w.number[tensor]] + w.part[tensor] + at.leaf;
        skipped = w.control->skipped != 0;
        return true;
    }
    /* How many of a thread's four elements of a row exist. */
    __device__ int live(int row) const {
        const int i = left - row - 4 * lane;

        return i <= 0 ? 0 : i < 4 ? i : 4;
    }
};

OPTFORGE_DEVICE void optforge_cuda_fill_map(optforge_cuda_map &map, bool is_signed) {
    map.fill_number(threadIdx.x, is_signed);
    __syncthreads();
    map.fill_above(threadIdx.x);
    __syncthreads();
}

OPTFORGE_DEVICE double optforge_cuda_fold_lanes(double value, bool largest);

/* Stores a block: four neighbours in each of two rows for a thread. The scale is the largest magnitude, NaN
 * where one is or is infinite. */
OPTFORGE_DEVICE void optforge_cuda_store_block(uint8_t *codes, float *scale, const optforge_f32 (&x)[2][4],
                                               const int (&live)[2], const optforge_cuda_map &map,
                                               bool is_signed) {
    uint32_t most = 0;
    float positive[2][4];

#pragma unroll
    for (int k = 0; k < 8; k++) {
        const uint32_t bits = __float_as_uint(x[k / 4][k % 4].x), size = bits & 0x7fffffffu;
        const bool dropped = !is_signed && bits >> 31 != 0 && size < 0x7f800000u;

        positive[k / 4][k % 4] = dropped ? 0.0f : x[k / 4][k % 4].x;
        if (k % 4 < live[k / 4] && !dropped)
            most = size > most ? size : most;
    }
    most = (uint32_t)optforge_cuda_fold_lanes((double)most, true);
    const bool plain = most > 0 && most < 0x7f800000u;
    const optforge_f32 largest(__uint_as_float(plain ? most : 0x3f800000u));

#pragma unroll
    for (int row = 0; row < 2; row++) {
        uint8_t code[4];

#pragma unroll
        for (int k = 0; k < 4; k++) {
            const optforge_f32 share = optforge_f32(positive[row][k]) / largest;

            code[k] = is_signed ? 127 : 0;
            if (plain && k < live[row])
                code[k] = map.nearest(share, is_signed);
        }
        optforge_cuda_store(codes + row * OPTFORGE_CUDA_ROW + 4 * (threadIdx.x % 32), code, live[row]);
    }
    if (threadIdx.x % 32 == 0)
        *scale = plain ? largest.x : most == 0 ? 0.0f : __uint_as_float(0x7fc00000u);
}

/* The arrays of a tensor from a leaf on, the master behind the others, then scales; and what its stochastic
 * rounding is made of. */
template <class Storage, int arrays>
struct optforge_cuda_arrays {
    typedef typename Storage::real real;
    enum { SPLIT = Storage::MASTER == OPTFORGE_LOW };
    char *array[arrays + 1];
    float *scales[arrays]; /* of those in blocks */
    const optforge_cuda_map *map;
    optforge_cuda_draw draw[Storage::STOCHASTIC ? arrays : 1];
    uint32_t element; /* the leaf's first in the whole tensor, modulo 2^32 */

    static __device__ constexpr int format(int a) {
        return a < arrays ? Storage::format(a) : +Storage::MASTER;
    }
    static __device__ constexpr bool narrow(int a) { return optforge_cuda_narrow(format(a)); }
    static __device__ constexpr bool mastered(int a) { return Storage::MASTER != 0 && a == 0; }
    static __device__ constexpr bool rounds(int a) { return narrow(a) && !mastered(a); }
    static __device__ constexpr bool blocks(int a) { return optforge_cuda_blocks(format(a)); }
    /* How many of the arrays before are in blocks. */
    static __device__ constexpr int in_blocks(int a) { return a == 0 ? 0 : in_blocks(a - 1) + blocks(a - 1); }
    /* Where an array is in full: in the master, unless that only has the lower half. */
    static __device__ constexpr int full(int a) { return mastered(a) && !SPLIT ? arrays : a; }

    __device__ void take(int a, void *from, uint64_t begin) {
        array[a] = (char *)from + begin * optforge_cuda_size_of(format(a));
    }
    __device__ void take_scales(int a, void *from, uint64_t begin) {
        scales[a] = (float *)from + begin / OPTFORGE_BLOCK;
    }
    /* The words of each array: a thread of the warp makes those of one. */
    __device__ void begin_drawing(uint64_t seed, uint64_t t, uint64_t stream, uint64_t first) {
        uint64_t key = optforge_cuda_stir(optforge_cuda_stir(optforge_cuda_stir(0, seed), t), stream);

        key = optforge_cuda_stir(optforge_cuda_stir(key, threadIdx.x % 32), first >> 32);
        element = (uint32_t)first;
#pragma unroll
        for (int a = 0; a < arrays; a++) {
            draw[Storage::STOCHASTIC ? a : 0].first = __shfl_sync(0xffffffffu, (uint32_t)key, a, 32);
            draw[Storage::STOCHASTIC ? a : 0].second = __shfl_sync(0xffffffffu, (uint32_t)(key >> 32), a, 32);
        }
    }
    /* Four elements of an array, from the leaf's element i on. */
    __device__ void load(real (&to)[4], int a, int i, int live) const {
        uint16_t code[4], low[4];

        if (!narrow(full(a))) {
            optforge_cuda_load(to, (const real *)array[full(a)] + i, live);
            return;
        }
        if (blocks(a)) {
            uint8_t codes[4];

            optforge_cuda_load(codes, (const uint8_t *)array[a] + i, live);
            const optforge_f32 scale(live > 0 ? scales[a][i / OPTFORGE_BLOCK] : 0.0f);
#pragma unroll
            for (int k = 0; k < 4; k++)
                to[k] = real((optforge_f32(map[format(a) == OPTFORGE_UQ8].number[codes[k]]) * scale).x);
            return;
        }
        optforge_cuda_load(code, (const uint16_t *)array[a] + i, live);
        if (mastered(a))
            optforge_cuda_load(low, (const uint16_t *)array[arrays] + i, live);
#pragma unroll
        for (int k = 0; k < 4; k++)
            to[k] = real((mastered(a) ? optforge_cuda_join(code[k], low[k])
                                      : optforge_cuda_decode(format(a), code[k])).x);
    }
    __device__ uint16_t encode(real x, int a, int i) const {
        const bool draws = Storage::STOCHASTIC && !mastered(a);
        const uint32_t random = draws ? draw[draws ? a : 0](element + (uint32_t)i) : 0;

        return optforge_cuda_encode(format(a), optforge_f32(x.x), draws, random);
    }
    /* What is left of a number where its array holds it rounded. */
    __device__ real kept(real x, int a, int i) const {
        return real(optforge_cuda_decode(format(a), encode(x, a, i)).x);
    }
    __device__ void store(const real (&from)[4], int a, int i, int live) const {
        uint16_t code[4], low[4];

        if (!narrow(full(a)))
            optforge_cuda_store((real *)array[full(a)] + i, from, live);
        if (!narrow(a) || blocks(a))
            return;
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (mastered(a) && SPLIT)
                optforge_cuda_split(optforge_f32(from[k].x), &code[k], &low[k]);
            else
                code[k] = encode(from[k], a, i + k);
        optforge_cuda_store((uint16_t *)array[a] + i, code, live);
        if (mastered(a) && SPLIT)
            optforge_cuda_store((uint16_t *)array[arrays] + i, low, live);
    }
    /* Keeps a row of what is in blocks, and stores the block with the second, or with the last. */
    __device__ void hold(optforge_f32 (&held)[2][4], int (&lives)[2], const real (&from)[4], int a, int row,
                         int left, int live) const {
        const int second = row / OPTFORGE_CUDA_ROW % 2, begin = row - second * OPTFORGE_CUDA_ROW;

#pragma unroll
        for (int k = 0; k < 4; k++) {
            held[0][k] = second ? held[0][k] : optforge_f32(from[k].x);
            held[1][k] = optforge_f32(from[k].x);
        }
        lives[0] = second ? lives[0] : live;
        lives[1] = second ? live : 0;
        if (second || row + OPTFORGE_CUDA_ROW >= left)
            optforge_cuda_store_block((uint8_t *)array[a] + begin, scales[a] + begin / OPTFORGE_BLOCK, held,
                                      lives, map[format(a) == OPTFORGE_UQ8], format(a) == OPTFORGE_Q8);
    }
    __device__ void clear(int a, const optforge_cuda_leaf &leaf) const {
        const uint16_t zeros[4] = {};
        const real none[4] = {};

        for (int row = 0; row < leaf.left; row += OPTFORGE_CUDA_ROW) {
            const int i = row + 4 * leaf.lane, live = leaf.live(row);

            if (narrow(a))
                optforge_cuda_store((uint16_t *)array[a] + i, zeros, live);
            else
                optforge_cuda_store((real *)array[a] + i, none, live);
        }
    }
};

/* ---- the summation tree: one fixed order, whatever the grid: 32 lanes, leaf by leaf, chunk by chunk, and
 * the sums of chunks and of tensors in the same way ---- */

OPTFORGE_DEVICE double optforge_cuda_combine(double a, double b, bool largest) {
    if (!largest)
        return __dadd_rn(a, b);
    return a != a || a > b ? a : b;
}

/* The values of a warp as one, which all its threads have. */
OPTFORGE_DEVICE double optforge_cuda_fold_lanes(double value, bool largest) {
#pragma unroll
    for (int h = 16; h > 0; h /= 2)
        value = optforge_cuda_combine(value, __shfl_down_sync(0xffffffffu, value, h, 32), largest);
    return __shfl_sync(0xffffffffu, value, 0, 32);
}

/* The total of n values that other warps have written: of chunks, or of tensors. */
static __device__ double optforge_cuda_tree(const double *values, uint64_t n, bool largest) {
    const uint64_t lane = threadIdx.x % 32, size = (uint64_t)OPTFORGE_CUDA_MOST * 32;
    const uint64_t nodes = (n + size - 1) / size;
    double lanes = 0.0, upper = 0.0, total = 0.0; /* lane by lane: totals of nodes, and of 1,024 nodes */

    if (n <= 1)
        return n == 1 ? __ldcg(values) : 0.0;
    for (uint64_t node = 0; node < nodes; node++) {
        double leaves = 0.0;

        for (uint64_t leaf = 0; leaf < 32 && node * size + leaf * OPTFORGE_CUDA_MOST < n; leaf++) {
            const uint64_t start = node * size + leaf * OPTFORGE_CUDA_MOST + lane;
            double value = 0.0;

#pragma unroll 8
            for (uint64_t i = start; i < start + OPTFORGE_CUDA_MOST && i < n; i += 32)
                value = optforge_cuda_combine(value, __ldcg(values + i), largest);
            value = optforge_cuda_fold_lanes(value, largest);
            leaves = lane == leaf ? value : leaves;
        }
        total = optforge_cuda_fold_lanes(leaves, largest);
        if (nodes == 1)
            return total;
        if (lane == node % 32)
            lanes = optforge_cuda_combine(lanes, total, largest);
        if (node % OPTFORGE_CUDA_MOST == OPTFORGE_CUDA_MOST - 1 || node == nodes - 1) {
            total = optforge_cuda_fold_lanes(lanes, largest);
            upper = lane == node / OPTFORGE_CUDA_MOST ? total : upper;
            lanes = 0.0;
        }
    }
    return optforge_cuda_fold_lanes(upper, largest);
}

/* Whether this warp is the last of so many that come here; what all have written before is seen then. */
OPTFORGE_DEVICE bool optforge_cuda_last(uint32_t *arrived, uint64_t number) {
    unsigned before = 0;

    if (threadIdx.x % 32 == 0) {
        __threadfence();
        before = atomicAdd(arrived, 1u);
        if (before == number - 1)
            *arrived = 0;
    }
    before = __shfl_sync(0xffffffffu, before, 0, 32);
    __threadfence();
    return before == number - 1;
}

/* ---- the begin of a step ---- */

/* Stores scalars of steps to come; begins a step: finds its number, and its scalars among them. */
OPTFORGE_DEVICE void optforge_cuda_begin(const optforge_cuda_news &given) {
    const optforge_cuda_plan &w = given.plan;
    optforge_cuda_control *c = w.control;
    const uint64_t words = w.groups * w.width;
    __shared__ uint64_t row;

    for (uint64_t i = threadIdx.x; i < given.words; i += OPTFORGE_CUDA_THREADS)
        w.rows[given.at + i] = given.word[i];
    if (threadIdx.x == 0 && given.told) {
        if (given.set) { /* else one that no step has followed yet still holds */
            c->set = 1;
            c->base = given.base;
        }
        c->first_row = given.first_row;
        c->rows = given.rows;
    }
    if (!given.begins)
        return;
    if (threadIdx.x == 0) {
        const uint64_t t = (c->set ? c->base : c->t - c->skipped) + 1;
        volatile float least = FLT_MIN;

        row = t - c->first_row;
        c->t = t;
        c->set = 0;
        c->status = OPTFORGE_OK;
        if (row >= c->rows)
            c->status = OPTFORGE_ERROR_ROWS;
        least = __fmul_rn(least, 0.5f);
        if (least == 0.0f)
            c->status = OPTFORGE_ERROR_FLUSH; /* as --use_fast_math has it */
        c->idle = c->skipped = c->status != OPTFORGE_OK;
    }
    __syncthreads();
    for (uint64_t i = threadIdx.x; i < words && row < c->rows; i += OPTFORGE_CUDA_THREADS)
        w.scalars[i] = w.rows[row * words + i];
}

/* Tensor k of the list, for what depends on it. */
struct optforge_cuda_tensor {
    const optforge_cuda_plan &w;
    const char *at;
    uint64_t k, number;

    __device__ optforge_cuda_tensor(const optforge_cuda_plan &plan, uint64_t place)
        : w(plan), at(plan.list + place * plan.stride), k(place), number(plan.number[place]) {
    }
    __device__ void *array(int a) const { return ((void *const *)(at + sizeof(uint64_t)))[a]; }
    __device__ double *state(int a) const { return (double *)array(a); }
    __device__ optforge_f64 size() const { return (double)w.sizes[number]; }
    __device__ uint64_t step() const { return w.control->t - w.behind[w.group[k]]; } /* its own count */
    __device__ uint64_t stream() const { return w.stream[k]; }
    __device__ uint64_t part() const { return w.part[k] * OPTFORGE_LEAF; } /* where it begins in the whole */
    __device__ int starting() const { return w.starting != NULL && w.starting[k] != 0; }
    __device__ optforge_f64 sum(int slot) const { return w.tensor_sums[slot * w.tensors + number]; }
    __device__ optforge_f64 total(int slot) const { return w.totals[slot]; }
    template <class scalars>
    __device__ scalars *row() const {
        return (scalars *)(w.scalars + w.group[k] * w.width);
    }
};

/* Totals over all tensors, by their numbers. */
struct optforge_cuda_totals {
    const double *totals;

    __device__ optforge_f64 operator()(int slot) const { return __ldcg(totals + slot); }
};

/* What a rule says of itself, unless it says otherwise: whether it has scalars of a tensor's OWN, and
 * scalar state that it STORES; which sums are of largest values; and what is computed between passes. */
template <class Scalars>
struct optforge_cuda_rule {
    typedef Scalars scalars;
    enum { OWN = 0, STORES = 0, FIRST_SCALAR = 0, UPDATE = -1 };

    static __device__ constexpr bool largest(int) { return false; }
    static __device__ scalars own(const optforge_cuda_tensor &x, int) { return *x.row<scalars>(); }
    static __device__ void behind(int, scalars *, const optforge_cuda_totals &) {}
    static __device__ void finish(const optforge_cuda_tensor &) {}
};

/* Looks for tensors with a scalar that has no value; the step is not done then. */
template <class Rule>
OPTFORGE_DEVICE void optforge_cuda_attempt(const optforge_cuda_plan &w) {
    const uint64_t k = blockIdx.x * (uint64_t)OPTFORGE_CUDA_THREADS + threadIdx.x;

    if (k < w.count && Rule::attempt(optforge_cuda_tensor(w, k)) != OPTFORGE_OK) {
        w.control->status = OPTFORGE_ERROR_SCALAR;
        w.control->idle = w.control->skipped = 1;
    }
}

/* ---- a pass over memory: a warp does a leaf, in rows of 128 elements ---- */

/* Counts NaN and infinity among the unscaled gradients of a leaf, where any may be. */
template <typename real>
static __device__ __noinline__ void optforge_cuda_count(const void *g, int format, real unscale, int left,
                                                        double *sums, uint64_t leaves) {
    int nan = 0, inf = 0;

    for (int i = threadIdx.x % 32; i < left; i += 32) {
        const real x = real(optforge_cuda_get(g, format, i)) * unscale;

        nan += x != x;
        inf += x == x && !x.finite();
    }
    const double nans = optforge_cuda_fold_lanes(nan, false), infs = optforge_cuda_fold_lanes(inf, false);

    if (threadIdx.x % 32 == 0) {
        sums[0] = nans;
        sums[leaves] = infs;
    }
}

/* Adds a row to the lanes: through shared memory, for element i of a tensor is in lane i mod 32. */
template <typename real>
OPTFORGE_DEVICE double optforge_cuda_add(double sum, real *stage, const real (&value)[4], int live,
                                         int kind) {
    struct __align__(16) four { real x[4]; } own;
    const int lane = threadIdx.x % 32;

#pragma unroll
    for (int k = 0; k < 4; k++)
        own.x[k] = k < live ? value[k] : real(0.0);
    __syncwarp(); /* all have read what was there */
    ((four *)stage)[lane] = own;
    __syncwarp();
#pragma unroll
    for (int q = 0; q < OPTFORGE_CUDA_ROW; q += 32) {
        const real x = stage[q + lane];

        if (kind == OPTFORGE_SQUARES)
            sum = x.add_square(sum);
        else if (kind == OPTFORGE_SUM)
            sum = __dadd_rn(sum, x.wide());
        else
            sum = optforge_cuda_combine(sum, ::fabs(x.wide()), true);
    }
    return sum;
}

/* What a pass says of itself, unless it says otherwise: NUMBER and OWN, ALL, FIRST of its sums, the one
 * with which NaN and infinity are COUNTED, whether it LOOKS for them without statistics too, whether the
 * gradient is not read any more and set to 0 (ZEROES), and how many rows are read AT_ONCE, before one is
 * used, so that memory has enough to do; which of its sums are of the PARAMETER as it is stored and of its
 * CHANGE; and about arrays and sums, by number. */
template <class Rule, typename real>
struct optforge_cuda_pass_of {
    typedef Rule rule;
    typedef real element;
    enum { COUNTED = -1, LOOKS = 0, ZEROES = 0, AT_ONCE = 1, PARAMETER = -1, CHANGE = -1 };

    static __device__ constexpr bool stores(int) { return false; }
    static __device__ constexpr int kind(int) { return OPTFORGE_SQUARES; }
};

/* A pass of a rule over one leaf for each warp. Nothing in it waits for other warps. */
template <class Pass, bool observe, class Storage = optforge_cuda_storage<typename Pass::element>>
OPTFORGE_DEVICE void optforge_cuda_pass(const optforge_cuda_plan &w) {
    typedef typename Pass::element real;
    typedef typename Pass::rule rule;
    typedef typename rule::scalars scalars;
    typedef optforge_cuda_arrays<Storage, rule::ARRAYS> stored;
    enum {
        ARRAYS = rule::ARRAYS,
        SUMS = observe ? +Pass::ALL : +Pass::OWN,
        OWN = rule::OWN && !Pass::LOOKS,
        COUNTED = observe || Pass::LOOKS ? +Pass::COUNTED : -1,
        AT_ONCE = Pass::AT_ONCE,
        PARAMETER = observe && stored::rounds(0) ? +Pass::PARAMETER : -1,
        CHANGE = observe && stored::rounds(0) ? +Pass::CHANGE : -1
    };
    __shared__ __align__(16) real stages[OPTFORGE_CUDA_WARPS][SUMS > 0 ? +OPTFORGE_CUDA_ROW : 4];
    __shared__ __align__(8) char own[OPTFORGE_CUDA_WARPS][OWN ? sizeof(scalars) : 8];
    real *const stage = stages[threadIdx.x / 32];
    enum { BLOCKS = stored::in_blocks(ARRAYS) };
    __shared__ __align__(8) char maps[BLOCKS > 0 ? 2 * sizeof(optforge_cuda_map) : 8];
    optforge_f32 held[BLOCKS > 0 ? ARRAYS : 1][2][4];
    int lives[BLOCKS > 0 ? ARRAYS : 1][2];
    stored arrays;
    double sum[SUMS + 1];
    bool finite = true;
    optforge_cuda_leaf leaf;

    if (BLOCKS > 0) {
        optforge_cuda_map *const own_maps = (optforge_cuda_map *)maps;

        optforge_cuda_fill_map(own_maps[0], true);
        optforge_cuda_fill_map(own_maps[1], false);
        arrays.map = own_maps;
    }
    if (!leaf.find(w, Pass::FIRST))
        return;
    arrays.take(1, (void *)w.gradients[leaf.tensor], leaf.begin);
    if (leaf.skipped) {
        if (Pass::ZEROES && w.zero_grads)
            arrays.clear(1, leaf);
        return;
    }
    const optforge_cuda_tensor tensor(w, leaf.tensor);
    const scalars *from = tensor.row<scalars>();

    if (OWN) {
        if (leaf.lane == 0)
            *(scalars *)own[threadIdx.x / 32] = rule::own(tensor, Pass::NUMBER);
        __syncwarp();
        from = (const scalars *)own[threadIdx.x / 32];
    }
    const scalars s = *from;

#pragma unroll
    for (int a = 0; a < ARRAYS; a++)
        if (a != 1 && (Pass::loads(a) || Pass::stores(a)))
            arrays.take(a, tensor.array(a), leaf.begin);
    int scales = ARRAYS + (Storage::MASTER != 0);
#pragma unroll
    for (int a = 0; a < ARRAYS; a++)
        if (stored::blocks(a))
            arrays.take_scales(a, tensor.array(scales++), leaf.begin);
    if (Storage::MASTER && (Pass::loads(0) || Pass::stores(0)))
        arrays.take(ARRAYS, tensor.array(ARRAYS), leaf.begin);
    if (Storage::STOCHASTIC)
        arrays.begin_drawing(w.seed, tensor.step(), tensor.stream(), tensor.part() + leaf.begin);
#pragma unroll
    for (int k = 0; k < SUMS; k++)
        sum[k] = 0.0;

    for (int start = 0; start < leaf.left; start += AT_ONCE * OPTFORGE_CUDA_ROW) {
        real x[AT_ONCE][ARRAYS][4];
        int live[AT_ONCE];

#pragma unroll
        for (int r = 0; r < AT_ONCE; r++) {
            const int row = start + r * OPTFORGE_CUDA_ROW;

            live[r] = leaf.live(row);
#pragma unroll
            for (int a = 0; a < ARRAYS; a++)
                if (Pass::loads(a))
                    arrays.load(x[r][a], a, row + 4 * leaf.lane, live[r]);
        }
#pragma unroll
        for (int r = 0; r < AT_ONCE; r++) {
            const int i = start + r * OPTFORGE_CUDA_ROW + 4 * leaf.lane;
            real added[Pass::ALL + 1][4], old[4];

#pragma unroll
            for (int k = 0; k < 4; k++)
                old[k] = CHANGE >= 0 ? x[r][0][k] : real(0.0);
            Pass::template run<observe>(s, x[r], added);
#pragma unroll
            for (int a = 0; a < ARRAYS; a++)
                if (Pass::stores(a) && stored::blocks(a))
                    arrays.hold(held[BLOCKS > 0 ? a : 0], lives[BLOCKS > 0 ? a : 0], x[r][a], a,
                                i - 4 * leaf.lane, leaf.left, live[r]);
                else if (Pass::stores(a))
                    arrays.store(x[r][a], a, i, live[r]);
#pragma unroll
            for (int k = 0; k < 4; k++) { /* statistics are of what is stored */
                if (PARAMETER >= 0)
                    added[PARAMETER >= 0 ? +PARAMETER : 0][k] = arrays.kept(x[r][0][k], 0, i + k);
                if (CHANGE >= 0)
                    added[CHANGE >= 0 ? +CHANGE : 0][k] = arrays.kept(x[r][0][k], 0, i + k) - old[k];
                if (Pass::LOOKS && !observe)
                    finite &= added[0][k].finite();
            }
#pragma unroll
            for (int k = 0; k < SUMS; k++)
                sum[k] = optforge_cuda_add(sum[k], stage, added[k], live[r], Pass::kind(k));
        }
    }
#pragma unroll
    for (int k = 0; k < SUMS; k++) {
        sum[k] = optforge_cuda_fold_lanes(sum[k], Pass::kind(k) == OPTFORGE_MAX);
        if (leaf.lane == 0)
            leaf.sums[k * w.leaves] = sum[k];
    }
    if (COUNTED >= 0) {
        double *const counts = leaf.sums + Pass::ALL * w.leaves;

        if (observe) /* a square that is not finite is of no finite float */
            finite = optforge_f64(sum[observe && COUNTED >= 0 ? +COUNTED : 0]).finite();
        else
            finite = optforge_cuda_fold_lanes(finite ? 0.0 : 1.0, false) == 0.0;
        if (!finite)
            optforge_cuda_count(arrays.array[1], Storage::format(1), real(rule::unscale(s)), leaf.left,
                                counts, w.leaves);
        else if (leaf.lane < 2)
            counts[leaf.lane * w.leaves] = 0.0;
    }
    if (Pass::ZEROES && w.zero_grads)
        arrays.clear(1, leaf);
}

/* The look at the gradients before the first pass, where a step may be skipped. Without statistics it adds up
 * no squares. */
template <class Rule, typename real>
struct optforge_cuda_scan : optforge_cuda_pass_of<Rule, real> {
    enum { NUMBER = 0, FIRST = 0, OWN = 0, ALL = 1, COUNTED = 0, LOOKS = 1, AT_ONCE = 4 };

    static __device__ constexpr bool loads(int a) { return a == 1; }
    template <bool observe>
    OPTFORGE_DEVICE void run(const typename Rule::scalars &s, real (&x)[Rule::ARRAYS][4],
                             real (&added)[2][4]) {
        const real unscale(Rule::unscale(s));

#pragma unroll
        for (int k = 0; k < 4; k++)
            added[0][k] = x[1][k] * unscale;
    }
};

/* ---- behind a pass ---- */

/* Adds up what a pass left: a warp for each chunk and sum. The last of a tensor goes on over its chunks,
 * the last of a sum over all tensors, and the last of all to the scalars of the next phase. */
template <class Rule>
OPTFORGE_DEVICE void optforge_cuda_fold(const optforge_cuda_plan &w) {
    const uint64_t c = blockIdx.x * (uint64_t)OPTFORGE_CUDA_WARPS + threadIdx.x / 32;
    const uint64_t lane = threadIdx.x % 32, slot = w.slot + blockIdx.y;
    const bool largest = Rule::largest((int)slot);
    uint32_t *const arrived = w.arrived + slot * (w.tensors + 1);
    optforge_cuda_control *const control = w.control;
    const optforge_cuda_totals total = {w.totals};
    double value;

    if (control->idle || control->skipped || (c >= w.chunks && c > 0))
        return;
    if (c < w.chunks) {
        const optforge_cuda_unit at = w.chunk[c];
        const uint64_t first = w.first[at.tensor], end = w.first[at.tensor + 1];
        const uint64_t leaf = first + (uint64_t)at.leaf * OPTFORGE_CUDA_CHUNK + lane;
        const uint64_t chunks = (end - first + OPTFORGE_CUDA_CHUNK - 1) / OPTFORGE_CUDA_CHUNK;

        value = leaf < end ? w.sums[slot * w.leaves + leaf] : 0.0;
        value = optforge_cuda_fold_lanes(value, largest);
        if (chunks > 1) {
            double *const sum = w.chunk_sums + slot * w.chunks + c;

            if (lane == 0)
                *sum = value;
            if (!optforge_cuda_last(arrived + at.tensor, chunks))
                return;
            value = optforge_cuda_tree(sum - at.leaf, chunks, largest);
        }
        if (lane == 0)
            w.tensor_sums[slot * w.tensors + at.tensor] = value;
        if (!optforge_cuda_last(arrived + w.tensors, w.tensors))
            return;
    }
    value = optforge_cuda_tree(w.tensor_sums + slot * w.tensors, w.tensors, largest);
    if (lane == 0)
        w.totals[slot] = value;
    if (!optforge_cuda_last(&control->done, gridDim.y))
        return;
    if (lane == 0 && w.phase == 0 && w.skip_nonfinite)
        control->skipped = total(Rule::FIRST_NAN) > 0.0 || total(Rule::FIRST_NAN + 1) > 0.0;
    for (uint64_t k = lane; k < w.groups; k += 32)
        Rule::behind(w.phase, (typename Rule::scalars *)(w.scalars + k * w.width), total);
}

/* The norms of one tensor, or of all, from the sums of squares. */
template <class Rule>
OPTFORGE_DEVICE optforge_stats optforge_cuda_tell(const double *sums, uint64_t stride, bool skipped) {
    const auto norm = [&](int sum) { return sqrt(optforge_f64(sums[sum * stride])).x; };
    const int nan = skipped ? +Rule::FIRST_NAN : +Rule::GRAD_NAN;
    optforge_stats own;

    memset(&own, 0, sizeof own);
    own.grad_norm = norm(skipped ? +Rule::FIRST_GRAD : +Rule::GRAD);
    own.clipped_grad_norm = skipped ? (double)NAN : norm(Rule::CLIPPED);
    own.param_norm = skipped ? (double)NAN : norm(Rule::PARAM);
    if (Rule::UPDATE >= 0 && !skipped)
        own.update_norm = norm(Rule::UPDATE);
    if (own.update_norm != 0.0)
        own.max_update_ratio = (optforge_f64(own.update_norm) / own.param_norm).x;
    own.nan = (uint64_t)sums[nan * stride];
    own.inf = (uint64_t)sums[(nan + 1) * stride];
    own.skipped = skipped;
    return own;
}

/* Tells the statistics, and lets scalar state advance, when all elements of all tensors are done. */
template <class Rule>
OPTFORGE_DEVICE void optforge_cuda_finish(const optforge_cuda_plan &w) {
    const uint64_t k = blockIdx.x * (uint64_t)OPTFORGE_CUDA_THREADS + threadIdx.x;
    const bool skipped = w.control->skipped != 0;
    __shared__ double largest[OPTFORGE_CUDA_WARPS];

    if (w.control->idle)
        return;
    if (w.observe && w.tensor_stats != NULL && k < w.tensors)
        w.tensor_stats[k] = optforge_cuda_tell<Rule>(w.tensor_sums + k, w.tensors, skipped);
    if (w.observe && w.stats != NULL && blockIdx.x == 0) {
        double most = 0.0;

        for (uint64_t j = threadIdx.x; j < w.tensors && !skipped; j += OPTFORGE_CUDA_THREADS) {
            const optforge_stats own = optforge_cuda_tell<Rule>(w.tensor_sums + j, w.tensors, skipped);

            most = optforge_cuda_combine(most, own.max_update_ratio, true);
        }
        most = optforge_cuda_fold_lanes(most, true);
        if (threadIdx.x % 32 == 0)
            largest[threadIdx.x / 32] = most;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int warp = 1; warp < OPTFORGE_CUDA_WARPS; warp++)
                most = optforge_cuda_combine(most, largest[warp], true);
            *w.stats = optforge_cuda_tell<Rule>(w.totals, 1, skipped);
            w.stats->max_update_ratio = most;
        }
    }
    if (Rule::STORES && k < w.count && !skipped) {
        const optforge_cuda_tensor tensor(w, k);
        const void *const before = k > 0 ? optforge_cuda_tensor(w, k - 1).array(Rule::FIRST_SCALAR) : NULL;

        if (tensor.array(Rule::FIRST_SCALAR) != before) /* else another part of the tensor has advanced it */
            Rule::finish(tensor);
    }
}

#endif /* OPTFORGE_CUDA_COMPILE */
