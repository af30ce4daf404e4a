/* optforge.h: what every emitted rule shares: lists of tensors, options, statistics, statuses, and the calls
 * that step them.
 *
 * A rule's own header, NAME.h, includes this one and has typed calls, which are all that most programs need.
 * What stands here is for programs that step several lists at once, let threads of their own do it, or find
 * a rule by its name.
 *
 * This file may be used, changed and distributed without restriction.
 */
#ifndef OPTFORGE_H
#define OPTFORGE_H

/* ---- types, which all emitted files of a program share ------------------------------------------------- */

#include <stddef.h>
#include <stdint.h>

#ifdef OPTFORGE_TYPES
#if OPTFORGE_TYPES != 1
#error "files emitted by different versions of optforge in one program: emit all of them anew"
#endif
#else
#define OPTFORGE_TYPES 1
#define OPTFORGE_VERSION "0.1.0" /* of the generator that the files are from */

#ifdef __cplusplus
extern "C" {
#endif

/* What a call returns. Anything but OPTFORGE_OK and OPTFORGE_SKIPPED was found before the first write. */
enum {
    OPTFORGE_OK = 0,               /* done */
    OPTFORGE_SKIPPED = -1,         /* a gradient is NaN or infinite: nothing was changed, t stays */
    OPTFORGE_ERROR_NULL = 1,       /* a pointer is NULL */
    OPTFORGE_ERROR_SIZE = 2,       /* a tensor has more elements than memory can hold */
    OPTFORGE_ERROR_ALIGNMENT = 3,  /* an array is not aligned to its elements */
    OPTFORGE_ERROR_OVERLAP = 4,    /* two arrays of a tensor overlap */
    OPTFORGE_ERROR_TIME = 5,       /* t counts the steps from 1 */
    OPTFORGE_ERROR_NAN = 6,        /* a hyperparameter is NaN */
    OPTFORGE_ERROR_SCALAR = 7,     /* a scalar has no value: division by zero, overflow, root of a negative */
    OPTFORGE_ERROR_GRAD_SCALE = 8, /* grad_scale is not a positive number with a finite inverse */
    OPTFORGE_ERROR_WORKSPACE = 9,  /* the workspace is too small, or not aligned to doubles */
    OPTFORGE_ERROR_PART = 10,      /* a part is not in its tensor, or begins or ends inside a leaf */
    OPTFORGE_ERROR_GROUP = 11,     /* a tensor's group is none of the groups */
    OPTFORGE_ERROR_NUMBER = 12,    /* a tensor's number is none of the tensors, or two have the same */
    OPTFORGE_ERROR_ABI = 13,       /* a kernel is of another version of optforge, or asks for too much */
    OPTFORGE_ERROR_OPTIONS = 14,   /* the options are of another version: use optforge_options_init */
    OPTFORGE_ERROR_ISA = 15,       /* OPTFORGE_ISA, or what optforge_use is given, is none of this machine */
    OPTFORGE_ERROR_FLUSH = 16,     /* the program flushes subnormal numbers to zero, which changes results */
    OPTFORGE_ERROR_ORDER = 17,     /* begin was not called, or a phase is not the one that is due */
    OPTFORGE_ERROR_SELFTEST = 18,  /* what was compiled computes other bits than it should */
    OPTFORGE_ERROR_MEMORY = 19,    /* optforge.hpp: there is no memory for state, or for the workspace */
    OPTFORGE_ERROR_THREADS = 20,   /* options.threads is negative */
    OPTFORGE_ERROR_DELTA = 21,     /* a list has a delta, and its parameters are neither float nor double */
    OPTFORGE_ERROR_ASSERT = 100    /* the hyperparameters break the rule's first assert; 101: the second */
};

enum {
    OPTFORGE_LEAF = 1024,     /* elements that are added up together: parts of tensors are whole leaves */
    OPTFORGE_PIECE = 256,     /* elements of a piece at most, where a pass adds up */
    OPTFORGE_BLOCK = 256,     /* elements of state of 8 bits that share a scale */
    OPTFORGE_MOST_SUMS = 32,    /* that a kernel can add up in a pass */
    OPTFORGE_MOST_SCRATCH = 24, /* of them from scratch */
    OPTFORGE_MOST_PASSES = 16,  /* over memory */
    OPTFORGE_MOST_ARRAYS = 192  /* of a tensor */
};

/* What a step tells of itself, over all tensors or one. Norms are Euclidean. */
typedef struct optforge_stats {
    double grad_norm;         /* of the gradients, unscaled, before any transform */
    double clipped_grad_norm; /* of the gradients as the rule sees them; NaN after a skipped step */
    double param_norm;        /* of the parameters after the step; NaN after a skipped step */
    double update_norm;       /* of what the step added to the parameters */
    double max_update_ratio;  /* the largest update_norm / param_norm of a tensor */
    uint64_t nan, inf;        /* such elements of the unscaled gradients */
    uint64_t skipped;         /* 1 where the step was skipped */
} optforge_stats;

/* Runs run(work, k, shares) for k from 0 to shares - 1, in any order, at the same time or not, and returns
 * when all are done. */
typedef void (*optforge_parallel)(void *pool, size_t shares,
                                  void (*run)(void *work, size_t k, size_t shares), void *work);

/* How a whole step is done. What is 0 or NULL is not asked for. */
typedef struct optforge_options {
    size_t size;                 /* of this struct, which optforge_options_init fills in */
    double grad_scale;           /* gradients are multiplied by 1 / grad_scale before anything sees them; 1 */
    int skip_nonfinite;          /* with a NaN or an infinity in any gradient nothing is changed */
    int zero_grads;              /* g, which must not be const then, is set to 0, also by a skipped step */
    int threads;                 /* at most so many; 0: as OpenMP has them. Small lists run on one */
    int checked;                 /* these lists were checked by an earlier call and have not changed */
    int allow_flush;             /* leave the processor's flush-to-zero as it is; the bits may differ */
    void *workspace;             /* for sums, skip_nonfinite, statistics, many groups; aligned to doubles */
    size_t workspace_size;       /* in bytes */
    optforge_stats *stats;       /* filled in, over all tensors */
    optforge_stats *tensor_stats;/* filled in, one for each tensor, by its number */
    size_t tensors;              /* where lists have parts, or some are elsewhere: how many whole ones */
    const size_t *sizes;         /* and their numbers of elements */
    uint64_t *applied;           /* advances by 1 with a step that is not skipped */
    uint64_t seed;               /* of stochastic rounding */
    optforge_parallel parallel;  /* whose threads do the step; NULL: OpenMP's, or the caller's */
    void *pool;                  /* its first argument */
} optforge_options;

/* A row of elements, which a kernel is called for: [begin, begin + n) of a tensor. */
typedef struct optforge_piece {
    const void *tensor, *scalars;
    size_t begin, n;
    void *scratch; /* where values go that are to be added up: OPTFORGE_PIECE for each source there */
} optforge_piece;

/* What a pass adds up, lane by lane, over a tensor. */
typedef struct optforge_sum {
    const char *name;
    unsigned char slot;     /* OPTFORGE_GRAD to OPTFORGE_UPDATE, or from OPTFORGE_OWN on */
    unsigned char kind;     /* OPTFORGE_SQUARES, OPTFORGE_SUM, OPTFORGE_MAX */
    unsigned char observed; /* asked for by the statistics, and by no formula */
    signed char source;     /* an array, by its number, or one of these */
} optforge_sum;
enum { OPTFORGE_SQUARES, OPTFORGE_SUM, OPTFORGE_MAX };
enum {
    OPTFORGE_UNSCALED = -1, /* the gradient, unscaled */
    OPTFORGE_CHANGE = -2,   /* what the pass adds to p */
    OPTFORGE_SCRATCH = -3   /* minus k: place k of the scratch memory, where the pass puts it */
};
enum {
    OPTFORGE_GRAD, OPTFORGE_CLIPPED, OPTFORGE_PARAM, OPTFORGE_UPDATE, OPTFORGE_NAN, OPTFORGE_INF,
    OPTFORGE_OWN, OPTFORGE_NONE = 255
};

/* Instruction sets that one object has code for, the best of which is taken when a program runs. */
#if defined(__x86_64__) && defined(__GNUC__)
#define OPTFORGE_SETS 3
#else
#define OPTFORGE_SETS 1
#endif
typedef void (*optforge_run)(const optforge_piece *);

typedef struct optforge_pass {
    optforge_run plain[OPTFORGE_SETS];    /* the elements; NULL: only adds up */
    optforge_run observed[OPTFORGE_SETS]; /* the same where statistics are taken, if it is not plain */
    const optforge_sum *sums;
    unsigned char sum_count;
    unsigned char writes;                 /* whether it changes anything */
    unsigned char zeroes;                 /* the gradient is not read any more */
    const char *uses;                     /* of p, g, state: 'r' read, 'w' written, 'b' both, '.' none */
} optforge_pass;

/* How an array is stored. What has 16 bits is computed with as float, and rounded where it is stored. */
enum {
    OPTFORGE_F32 = 1, OPTFORGE_F64 = 2, OPTFORGE_BF16 = 4, OPTFORGE_F16 = 5,
    OPTFORGE_SCALAR = 3, /* one double per tensor */
    OPTFORGE_LOW = 6,    /* what bfloat16 leaves of a float: float is (p << 16) + low, a signed number */
    OPTFORGE_Q8 = 7, OPTFORGE_UQ8 = 8, /* codes of 8 bits of state, with a sign and without */
    OPTFORGE_ABSMAX = 9  /* the scale of each OPTFORGE_BLOCK codes, the last of which may be fewer: a float */
};

/* How a state begins: as a number, or as the parameter, the gradient, a hyperparameter. */
typedef struct optforge_initial {
    int from;     /* OPTFORGE_FROM_…, or the number of a hyperparameter */
    double value;
} optforge_initial;
enum { OPTFORGE_FROM_VALUE = -1, OPTFORGE_FROM_P = -2, OPTFORGE_FROM_G = -3 };

/* A rule for one combination of formats. A tensor is a struct of its number of elements, a size_t, and of
 * pointers: p, g, the state and maybe a master; hyperparameters are a struct of doubles. `names` end with
 * NULL. */
typedef struct optforge_kernel {
    unsigned abi; /* OPTFORGE_TYPES */
    const char *name, *hash;
    const char *const *hyper_names, *const *state_names, *const *asserts;
    const double *hyper_defaults;
    const optforge_initial *initial; /* of each state */
    size_t hypers;                   /* doubles in a struct of hyperparameters */
    size_t arrays;                   /* p, g, the state, the master if there is one, scales of codes */
    const unsigned char *formats;    /* of each */
    size_t scalars_size;             /* bytes of the scalars of a step */
    unsigned pass_count;
    const optforge_pass *passes;
    unsigned char statistics[4];     /* slots of the statistics, from grad to update */
    int (*begin)(void *scalars, const void *hyper, uint64_t t, double unscale);
    int (*begin_tensor)(void *scalars, const void *tensor, double size, int starting);        /* or NULL */
    void (*behind_step)(void *scalars, unsigned pass, const double *totals);                   /* or NULL */
    void (*behind_tensor)(void *scalars, unsigned pass, const double *sums,
                          const double *totals); /* or NULL */
    void (*finish)(const void *scalars, const void *tensor); /* scalar state advances; or NULL */
    unsigned char master;     /* the array that has p in full, F32 or LOW, which p is rounded from; or 0 */
    unsigned char stochastic; /* whether what has 16 bits, but p beside a master, is rounded at random */
    unsigned bytes;                  /* that a step reads and writes for each element, usually */
    uint64_t golden;                 /* what optforge_selftest finds; 0: this depends on the math library */
} optforge_kernel;

/* Tensors of one kernel, and all that is per tensor. Parts of one tensor in a list that share its scalar
 * state stand behind each other. */
typedef struct optforge_list {
    const optforge_kernel *kernel;
    const void *hyper;             /* a NAME_hyper, or `groups` of them */
    uint64_t t;                    /* number of the step, from 1 */
    const void *tensors;           /* NAME_tensor_…s */
    size_t count;
    size_t groups;                 /* 0 means 1 */
    const size_t *group;           /* of each tensor: which of the hyperparameters are its; NULL: the first */
    const uint64_t *steps;         /* of each tensor: its own t, which may be less; NULL: t */
    const size_t *number;          /* of each tensor: its number among all; NULL: as the lists have them */
    const size_t *part;            /* of each tensor: the element of the whole that it begins at; NULL: 0 */
    const unsigned char *starting; /* of each tensor: whether this is its first step */
    const uint64_t *stream;        /* of each tensor: a number for its stochastic rounding; NULL: `number` */
    void *const *delta;            /* of each tensor: n elements, where what a step would add to p goes, and
                                    * p, float or double, stays as it is, unless the step is skipped; NULL: p
                                    * changes */
} optforge_list;

/* A step under way: for optforge_begin to fill in. Set it to 0 before. */
typedef struct optforge_work {
    int phases, due;                /* how many there are, and which comes next */
    const void *begun;              /* the rest is the runtime's own */
    const optforge_list *lists;
    size_t number;
    const optforge_options *options;
    double unscale;                 /* 1 / grad_scale */
    int scan;                       /* whether phase 0 looks at the gradients before the first pass */
    int adds, observe, skipped, set;
    size_t tensors, leaves;         /* whole ones, and their leaves */
    size_t own_leaves, elements;    /* of the lists */
    size_t sums;                    /* of all phases; each has a double for each leaf and each tensor */
    size_t *first;                  /* leaf of each whole tensor among all, and the end of the last */
    const optforge_kernel **kernels; /* of each whole tensor */
    double *rows;                   /* scalars: of all groups of the first list, of the second, … */
    size_t *row;                    /* of each tensor of the lists, where they have steps */
    double *totals, *tensor_sums, *gathered, *leaf_sums;
    size_t phase_sums[OPTFORGE_MOST_PASSES + 2];               /* where the sums of a phase begin among all */
    short place[OPTFORGE_MOST_PASSES + 1][OPTFORGE_MOST_SUMS]; /* where each is, by its slot */
    double few[128];                /* scalars, where they fit in here */
} optforge_work;

#ifdef __cplusplus
}
#endif
#endif /* OPTFORGE_TYPES */

/* ---- calls --------------------------------------------------------------------------------------------- */

#ifndef OPTFORGE_API
#define OPTFORGE_API /* define it to export the functions: __declspec(dllexport), visibility("default") */
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The text of a status, that of a kernel's own asserts too; never NULL. */
OPTFORGE_API const char *optforge_strerror(int status);
OPTFORGE_API const char *optforge_kernel_strerror(const optforge_kernel *kernel, int status);

/* Fills in the defaults: a plain step. */
OPTFORGE_API void optforge_options_init(optforge_options *o);

/* One step over a list of tensors, in place. Reentrant; expects the default rounding mode, and may raise
 * floating-point exception flags. Tensors of one call must share no memory but gradients (which is not
 * checked). */
OPTFORGE_API int optforge_step(const optforge_kernel *kernel, const void *hyper, uint64_t t,
                               const void *tensors, size_t count, const optforge_options *options);

/* The same with all defaults; the workspace, of any size, is for kernels that add up, else NULL. */
OPTFORGE_API int optforge_plain_step(const optforge_kernel *kernel, const void *hyper, uint64_t t,
                                     const void *tensors, size_t count, void *workspace);

/* One step over lists of several kernels (dtypes, rules): one norm, one decision to skip, one set of
 * statistics. A total over all tensors is over those of all lists whose kernel adds it up. */
OPTFORGE_API int optforge_step_lists(const optforge_list *lists, size_t number,
                                     const optforge_options *options);

/* Everything but the step: OPTFORGE_OK means that a step with the same arguments will succeed. */
OPTFORGE_API int optforge_check(const optforge_list *lists, size_t number, const optforge_options *options);

/* Bytes of workspace that a step of these lists may take; of one kernel with so many elements in so many
 * tensors (or groups, if they are more). 0 where nothing does not say what it is about. */
OPTFORGE_API size_t optforge_workspace_size(const optforge_list *lists, size_t number,
                                            const optforge_options *options);
OPTFORGE_API size_t optforge_kernel_workspace(const optforge_kernel *kernel, uint64_t elements, size_t count);

/* The same step on threads that are running already, over one workspace and one optforge_work: one thread
 * calls begin; then for each phase from 0 to work->phases - 1 all call share, each with its own `ith` of
 * `nth`, and when all are back one calls fold. The last fold ends the step; its status is the step's.
 * Between share and fold the sums of the phase, partials, may be added up over ranks that have parts of
 * the same tensors (options.tensors, options.sizes): one is 0 where a rank has not its leaf. */
OPTFORGE_API int optforge_begin(optforge_work *work, const optforge_list *lists, size_t number,
                                const optforge_options *options);
OPTFORGE_API void optforge_share(optforge_work *work, int phase, size_t ith, size_t nth);
OPTFORGE_API int optforge_fold(optforge_work *work, int phase);
OPTFORGE_API double *optforge_partials(const optforge_work *work, int phase, size_t *number);

/* Writes the initial state of a tensor, once, before its first step. The tensor is not checked. */
OPTFORGE_API void optforge_state_init(const optforge_kernel *kernel, const void *tensor, const void *hyper);

/* Makes `range` the elements [begin, begin + n) of a tensor. Ranges of one tensor are stepped in one call,
 * with a `part` and maybe a `group` of their own, or, where the rule adds up nothing and has no scalar state,
 * in calls of their own, whenever and on whichever thread. */
OPTFORGE_API int optforge_range(const optforge_kernel *kernel, const void *tensor, size_t begin, size_t n,
                                void *range);

/* Bytes of state of a tensor of n elements; SIZE_MAX where they are more than memory can hold. */
OPTFORGE_API size_t optforge_state_size(const optforge_kernel *kernel, size_t n);

/* Replays a short training with each instruction set of this machine, and looks whether it ends in the bits
 * that it should: flags of a compiler that change arithmetic are found here, and not in a training. It needs
 * about 50 KB of stack, and changes nothing. */
OPTFORGE_API int optforge_selftest(const optforge_kernel *kernel);

/* The instruction set in use: "x86-64", "x86-64-v3", "x86-64-v4", "neon" or "plain"; and to use another,
 * which the environment variable OPTFORGE_ISA does as well. None changes a bit. */
OPTFORGE_API const char *optforge_isa(void);
OPTFORGE_API int optforge_use(const char *name);

#ifdef __cplusplus
}
#endif
#endif /* OPTFORGE_H */

/* ---- for the files that compute: arithmetic as it is written, and code for several instruction sets ---- */

#if defined(OPTFORGE_COMPILE) && !defined(OPTFORGE_INLINE)

#include <float.h>
#include <math.h>
#include <string.h>

#if defined(__FAST_MATH__) || defined(_M_FP_FAST) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "compile this file without -ffast-math: it changes the results"
#endif
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "compile this file for arithmetic without excess precision: -msse2 -mfpmath=sse on 32-bit x86"
#endif

#if defined(__GNUC__)
#define OPTFORGE_INLINE static inline __attribute__((always_inline))
#define OPTFORGE_RESTRICT __restrict__
#elif defined(_MSC_VER)
#define OPTFORGE_INLINE static __forceinline
#define OPTFORGE_RESTRICT __restrict
#else
#define OPTFORGE_INLINE static inline
#define OPTFORGE_RESTRICT
#endif

/* The same text for each instruction set: OPTFORGE_EACH_SET(f, (parameters), call) defines f for all of
 * them, which OPTFORGE_OF_SETS(f) lists. */
#if OPTFORGE_SETS == 3
#define OPTFORGE_V3 __attribute__((target("avx2")))
#define OPTFORGE_V4 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq")))
#define OPTFORGE_EACH_SET(name, parameters, call)      \
    static void name##_v1 parameters { call; }             \
    static OPTFORGE_V3 void name##_v3 parameters { call; } \
    static OPTFORGE_V4 void name##_v4 parameters { call; }
#define OPTFORGE_OF_SETS(name) {name##_v1, name##_v3, name##_v4}
#define OPTFORGE_NO_SETS {NULL, NULL, NULL}
#else
#define OPTFORGE_EACH_SET(name, parameters, call) \
    static void name##_v1 parameters { call; }
#define OPTFORGE_OF_SETS(name) {name##_v1}
#define OPTFORGE_NO_SETS {NULL}
#endif

/* A pass of a rule: `call` for 32 elements at a time from element i on, and for the n that are left. In it t
 * is the tensor, s its scalars, and scratch where values go that are to be added up. */
#define OPTFORGE_PASS(name, rule, suffix, real, call)                                        \
    OPTFORGE_INLINE void name##_all(const optforge_piece *x) {                               \
        const rule##_tensor_##suffix *t = (const rule##_tensor_##suffix *)x->tensor;         \
        const rule##_scalars *s = (const rule##_scalars *)x->scalars;                        \
        real *scratch = (real *)x->scratch;                                                  \
        size_t i = x->begin;                                                                 \
        (void)t, (void)s;                                                                    \
        for (; x->begin + x->n - i >= 32; i += 32, scratch += 32) {                          \
            const size_t n = 32;                                                             \
            call;                                                                            \
        }                                                                                    \
        {                                                                                    \
            const size_t n = x->begin + x->n - i;                                            \
            call;                                                                            \
        }                                                                                    \
    }                                                                                        \
    OPTFORGE_EACH_SET(name, (const optforge_piece *x), name##_all(x))

/* Array number `array` of a tensor, which is scalar state. */
OPTFORGE_INLINE double *optforge_double(const void *tensor, size_t array) {
    double *state;

    memcpy(&state, (const char *)tensor + sizeof(size_t) + array * sizeof state, sizeof state);
    return state;
}

/* A square root that does not set errno can be vectorised. */
#if defined(__GNUC__) && !defined(__cplusplus)
extern float sqrtf(float) __attribute__((const));
extern double sqrt(double) __attribute__((const));
#elif defined(__GLIBC__) && __cplusplus >= 201103L
extern "C" float sqrtf(float) noexcept __attribute__((const));
extern "C" double sqrt(double) noexcept __attribute__((const));
#endif

#endif /* OPTFORGE_COMPILE */

/* Arithmetic as it is written, to the end of the file that computes. */
#if defined(OPTFORGE_COMPILE_END)
#if defined(__clang__) && (defined(__x86_64__) || (defined(__aarch64__) && __clang_major__ >= 16))
#pragma float_control(pop)
#elif defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#elif defined(_MSC_VER)
#pragma float_control(pop)
#endif
#undef OPTFORGE_COMPILE
#undef OPTFORGE_COMPILE_END
#elif defined(OPTFORGE_COMPILE)
#if defined(__clang__)
#if defined(__x86_64__) || (defined(__aarch64__) && __clang_major__ >= 16)
#pragma float_control(push)
#pragma float_control(precise, on)
#endif
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off", "no-unsafe-math-optimizations", "no-associative-math")
#pragma GCC optimize("no-reciprocal-math", "signed-zeros", "no-trapping-math")
#elif defined(_MSC_VER)
#pragma float_control(precise, on, push)
#pragma fp_contract(off)
#endif
#endif
