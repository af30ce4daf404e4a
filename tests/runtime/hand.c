/* A kernel written by hand, which has all that a kernel can have. With g the unscaled gradient:
 *
 *     m = momentum * m + g
 *     size = norm(m) over the tensor,  all = norm(m) over all tensors,  along = sum(m * p),  gap = max|m - p|
 *     by = lr * (bound / all if all > bound else 1) / (1 + size)
 *     drift = along / (1 + gap) / n + mean(p)
 *     p = p - by * m - decay * drift
 *     s = size / 2 + s / 2, a scalar of the tensor, which begins as 1
 *
 * decay is s / 8 as it was before the step; lr >= 0 and 0 <= momentum < 1 are asserted.
 */
#define OPTFORGE_COMPILE
#include "optforge.h"

typedef struct hand_hyper {
    double lr, momentum, bound;
} hand_hyper;

typedef struct hand_scalars {
    double unscale, lr, momentum, bound, n, s, decay, clip, by, drift;
} hand_scalars;

enum { HAND_SIZE = OPTFORGE_OWN, HAND_ALONG, HAND_GAP, HAND_P };

#define HAND(real, suffix)                                                                                           \
    typedef struct hand_tensor_##suffix {                                                                            \
        size_t n;                                                                                                    \
        real *p;                                                                                                     \
        const real *g;                                                                                               \
        real *m;                                                                                                     \
        double *s;                                                                                                   \
    } hand_tensor_##suffix;                                                                                          \
    OPTFORGE_INLINE void hand_first_##suffix(const optforge_piece *x)                                                \
    {                                                                                                                \
        const hand_tensor_##suffix *t = (const hand_tensor_##suffix *)x->tensor;                                     \
        const hand_scalars *s = (const hand_scalars *)x->scalars;                                                    \
        const real unscale = (real)s->unscale, momentum = (real)s->momentum;                                         \
        real *added = (real *)x->scratch;                                                                            \
        for (size_t j = 0; j < x->n; j++) {                                                                          \
            const real p = t->p[x->begin + j];                                                                       \
            const real m = momentum * t->m[x->begin + j] + t->g[x->begin + j] * unscale;                             \
            t->m[x->begin + j] = m;                                                                                  \
            added[j] = m * p;                                                                                        \
            added[OPTFORGE_PIECE + j] = m - p;                                                                       \
            added[2 * OPTFORGE_PIECE + j] = m;                                                                       \
        }                                                                                                            \
    }                                                                                                                \
    OPTFORGE_INLINE void hand_second_##suffix(const optforge_piece *x)                                               \
    {                                                                                                                \
        const hand_tensor_##suffix *t = (const hand_tensor_##suffix *)x->tensor;                                     \
        const hand_scalars *s = (const hand_scalars *)x->scalars;                                                    \
        const real by = (real)s->by, decay = (real)s->decay, drift = (real)s->drift;                                 \
        for (size_t j = x->begin; j < x->begin + x->n; j++)                                                          \
            t->p[j] = t->p[j] - by * t->m[j] - decay * drift;                                                        \
    }                                                                                                                \
    OPTFORGE_EACH_SET(hand_run_1_##suffix, (const optforge_piece *x), hand_first_##suffix(x))                        \
    OPTFORGE_EACH_SET(hand_run_2_##suffix, (const optforge_piece *x), hand_second_##suffix(x))                       \
    static const optforge_pass hand_passes_##suffix[] = {                                                            \
        {OPTFORGE_OF_SETS(hand_run_1_##suffix), OPTFORGE_OF_SETS(hand_run_1_##suffix), hand_sums_1, 5, 1, 1, "rrb."},\
        {OPTFORGE_OF_SETS(hand_run_2_##suffix), OPTFORGE_OF_SETS(hand_run_2_##suffix), hand_sums_2, 2, 1, 0, "b.r."} \
    };

static const optforge_sum hand_sums_1[] = {
    {"size", HAND_SIZE, OPTFORGE_SQUARES, 0, OPTFORGE_SCRATCH - 2},
    {"along", HAND_ALONG, OPTFORGE_SUM, 0, OPTFORGE_SCRATCH - 0},
    {"gap", HAND_GAP, OPTFORGE_MAX, 0, OPTFORGE_SCRATCH - 1},
    {"p", HAND_P, OPTFORGE_SUM, 0, 0},
    {"grad_squares", OPTFORGE_GRAD, OPTFORGE_SQUARES, 1, OPTFORGE_UNSCALED}
};
static const optforge_sum hand_sums_2[] = {
    {"param_squares", OPTFORGE_PARAM, OPTFORGE_SQUARES, 1, 0},
    {"update_squares", OPTFORGE_UPDATE, OPTFORGE_SQUARES, 1, OPTFORGE_CHANGE}
};

HAND(float, f32)
HAND(double, f64)

static int hand_begin(void *scalars, const void *hyper, uint64_t t, double unscale)
{
    hand_scalars *s = (hand_scalars *)scalars;
    const hand_hyper *h = (const hand_hyper *)hyper;

    (void)t;
    if (!(h->lr >= 0.0))
        return OPTFORGE_ERROR_ASSERT;
    if (!(0.0 <= h->momentum && h->momentum < 1.0))
        return OPTFORGE_ERROR_ASSERT + 1;
    s->unscale = unscale;
    s->lr = h->lr;
    s->momentum = h->momentum;
    s->bound = h->bound;
    return OPTFORGE_OK;
}

static int hand_begin_tensor(void *scalars, const void *tensor, double size, int starting)
{
    hand_scalars *s = (hand_scalars *)scalars;

    s->n = size;
    s->s = starting ? 1.0 : *optforge_double(tensor, 3);
    s->decay = s->s / 8.0;
    return s->s >= 0.0 ? OPTFORGE_OK : OPTFORGE_ERROR_SCALAR;
}

static void hand_behind_step(void *scalars, unsigned pass, const double *totals)
{
    hand_scalars *s = (hand_scalars *)scalars;

    if (pass == 0) {
        const double all = sqrt(totals[HAND_SIZE]);

        s->clip = all > s->bound ? s->bound / all : 1.0;
    }
}

static void hand_behind_tensor(void *scalars, unsigned pass, const double *sums, const double *totals)
{
    hand_scalars *s = (hand_scalars *)scalars;

    (void)totals;
    if (pass == 0) {
        const double size = sqrt(sums[HAND_SIZE]);

        s->by = s->lr * s->clip / (1.0 + size);
        s->drift = sums[HAND_ALONG] / (1.0 + sums[HAND_GAP]) / s->n + sums[HAND_P] / s->n;
        s->s = size / 2.0 + s->s / 2.0;
    }
}

static void hand_finish(const void *scalars, const void *tensor)
{
    *optforge_double(tensor, 3) = ((const hand_scalars *)scalars)->s;
}

static const char *const hand_hypers[] = {"lr", "momentum", "bound", NULL};
static const char *const hand_states[] = {"m", "s", NULL};
static const char *const hand_asserts[] = {"lr >= 0", "0 <= momentum < 1", NULL};
static const double hand_defaults[] = {0.25, 0.75, 2.0};
static const optforge_initial hand_initial[] = {{OPTFORGE_FROM_VALUE, 0.0}, {OPTFORGE_FROM_VALUE, 1.0}};
static const unsigned char hand_formats_f32[] = {OPTFORGE_F32, OPTFORGE_F32, OPTFORGE_F32, OPTFORGE_SCALAR};
static const unsigned char hand_formats_f64[] = {OPTFORGE_F64, OPTFORGE_F64, OPTFORGE_F64, OPTFORGE_SCALAR};

#define HAND_KERNEL(suffix)                                                                                         \
    extern const optforge_kernel hand_kernel_##suffix;                                                              \
    const optforge_kernel hand_kernel_##suffix = {                                                                  \
        OPTFORGE_TYPES, "hand", "", hand_hypers, hand_states, hand_asserts, hand_defaults, hand_initial, 3, 4,      \
        hand_formats_##suffix, sizeof(hand_scalars), 2, hand_passes_##suffix,                                       \
        {OPTFORGE_GRAD, OPTFORGE_GRAD, OPTFORGE_PARAM, OPTFORGE_UPDATE}, hand_begin, hand_begin_tensor,             \
        hand_behind_step, hand_behind_tensor, hand_finish, 0, 0, 24, 0                                              \
    };
HAND_KERNEL(f32)
HAND_KERNEL(f64)

#define OPTFORGE_COMPILE_END
#include "optforge.h"
