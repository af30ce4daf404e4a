/* AdamW in float32, written by hand with the intrinsics of AVX2 and of AVX-512: what the emitted adamw.c and
 * clip_by_global_norm_adamw.c are measured against by hand_written.py.
 *
 * The same operations in the same order as in generator/optforge/rules/adamw.py, each rounded as it stands: no FMA, no
 * reciprocals, no approximations, so that every bit is that of the emitted code. One tensor, one thread.
 *
 *     plain    one step
 *     phase    a scan of the gradients' norm, then in one pass: unscale, clip by global norm, step, norms, zeroing of the
 *              gradients; nothing but zeroing where a gradient is not finite
 *
 * Norms are added up in double, in the tree of the emitted code: 32 lanes, leaves of 1,024 elements, chunks of 32,768.
 *
 * Build: cc -O2 -fPIC -shared -o adamw_intrinsics.so adamw_intrinsics.c -lm
 */
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* A product and a sum stay two operations, in intrinsics too. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f")))
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 32, LEAF = 1024, CHUNK = 32768, SUMS = 3 };

typedef struct {
    double lr, beta1, beta2, eps, weight_decay, max_norm;
} settings;

typedef struct {
    double grad_norm, clipped_grad_norm, param_norm, update_norm;
    uint64_t nan, inf, skipped;
} told;

typedef struct {
    size_t n;
    float *p, *g, *m, *v;
} arrays;

/* What is the same for every element. */
typedef struct {
    float unscale, factor, kept, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, correction, eps;
} scalars;

static scalars scalars_of(const settings *h, uint64_t t, double grad_scale)
{
    const double bias1 = 1.0 - pow(h->beta1, (double)t), bias2 = 1.0 - pow(h->beta2, (double)t);
    const scalars s = {
        (float)(1.0 / grad_scale), 1.0f, (float)(1.0 - h->lr * h->weight_decay),
        (float)h->beta1, (float)(1.0 - h->beta1), (float)h->beta2, (float)(1.0 - h->beta2),
        (float)(h->lr / bias1), (float)bias2, (float)h->eps,
    };

    return s;
}

/* ---- what is added up ---- */

static double fold(double *lanes)
{
    for (size_t width = 16; width > 1; width /= 2)
        for (size_t j = 0; j < width; j++)
            lanes[j] = lanes[j] + lanes[j + width];
    return lanes[0] + lanes[1];
}

/* The sum of up to 32 leaves, or of one alone. */
static double fold_leaves(double *leaves, size_t n)
{
    if (n <= 1)
        return n == 1 ? leaves[0] : 0.0;
    for (size_t j = n; j < LANES; j++)
        leaves[j] = 0.0;
    return fold(leaves);
}

/* The sum of the sums of up to 32,768 chunks. */
static double fold_chunks(const double *chunks, size_t n)
{
    double leaves[LANES];
    size_t leaf = 0;

    if (n <= 1)
        return n == 1 ? chunks[0] : 0.0;
    for (size_t i = 0; i < n; leaf++) {
        const size_t stop = n - i < LEAF ? n : i + LEAF;
        double lanes[LANES] = {0.0};

        for (size_t j = i; j < stop; j++)
            lanes[j % LANES] = lanes[j % LANES] + chunks[j];
        leaves[leaf] = fold(lanes);
        i = stop;
    }
    return fold_leaves(leaves, leaf);
}

/* One element of a step. */
INLINE void update(const scalars *s, float *p, float g, float *m, float *v)
{
    *p = *p * s->kept;
    *m = s->beta1 * *m + s->one_minus_beta1 * g;
    *v = s->beta2 * *v + s->one_minus_beta2 * (g * g);
    *p = *p - s->step_size * *m / (sqrtf(*v / s->correction) + s->eps);
}

/* One element of a phase's second pass; the squares go into the lane of each norm. */
INLINE void update_told(const scalars *s, float *p, float g, float *m, float *v, double *clipped, double *param,
                        double *change)
{
    const float old = *p, x = g * s->unscale * s->factor;
    float moved;

    update(s, p, x, m, v);
    moved = *p - old;
    *clipped += (double)x * (double)x;
    *param += (double)*p * (double)*p;
    *change += (double)moved * (double)moved;
}

static void count(const scalars *s, const float *g, size_t n, told *found)
{
    for (size_t i = 0; i < n; i++) {
        const float x = g[i] * s->unscale;

        found->nan += x != x;
        found->inf += x == x && x - x != 0.0f;
    }
}

/* ---- AVX2 ---- */

/* The constants of a step, and the step of 8 elements: gives p, from m and v, which it changes. */
#define CONSTANTS_8(s)                                                                                                 \
    const __m256 kept = _mm256_set1_ps((s)->kept), eps = _mm256_set1_ps((s)->eps);                                     \
    const __m256 beta1 = _mm256_set1_ps((s)->beta1), one_minus_beta1 = _mm256_set1_ps((s)->one_minus_beta1);           \
    const __m256 beta2 = _mm256_set1_ps((s)->beta2), one_minus_beta2 = _mm256_set1_ps((s)->one_minus_beta2);           \
    const __m256 step_size = _mm256_set1_ps((s)->step_size), correction = _mm256_set1_ps((s)->correction)

#define UPDATE_8(p, g, m, v)                                                                                           \
    do {                                                                                                               \
        p = _mm256_mul_ps(p, kept);                                                                                    \
        m = _mm256_add_ps(_mm256_mul_ps(beta1, m), _mm256_mul_ps(one_minus_beta1, g));                                 \
        v = _mm256_add_ps(_mm256_mul_ps(beta2, v), _mm256_mul_ps(one_minus_beta2, _mm256_mul_ps(g, g)));               \
        p = _mm256_sub_ps(p, _mm256_div_ps(_mm256_mul_ps(step_size, m),                                                \
                                           _mm256_add_ps(_mm256_sqrt_ps(_mm256_div_ps(v, correction)), eps)));         \
    } while (0)

/* Adds the squares of 8 elements to the lanes low and high. */
#define SQUARES_8(x, low, high)                                                                                        \
    do {                                                                                                               \
        const __m256d first = _mm256_cvtps_pd(_mm256_castps256_ps128(x));                                              \
        const __m256d second = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));                                           \
                                                                                                                       \
        low = _mm256_add_pd(low, _mm256_mul_pd(first, first));                                                         \
        high = _mm256_add_pd(high, _mm256_mul_pd(second, second));                                                     \
    } while (0)

AVX2 static double fold_avx2(const double *lanes)
{
    __m256d sum[4];
    __m128d half;

    for (int k = 0; k < 4; k++)
        sum[k] = _mm256_add_pd(_mm256_loadu_pd(lanes + 4 * k), _mm256_loadu_pd(lanes + 4 * k + 16));
    sum[0] = _mm256_add_pd(_mm256_add_pd(sum[0], sum[2]), _mm256_add_pd(sum[1], sum[3]));
    half = _mm_add_pd(_mm256_castpd256_pd128(sum[0]), _mm256_extractf128_pd(sum[0], 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}

AVX2 void plain_avx2(const arrays *a, const settings *h, uint64_t t)
{
    const scalars s = scalars_of(h, t, 1.0);
    float *const pp = a->p, *const mm = a->m, *const vv = a->v;
    const float *const gg = a->g;
    size_t i = 0;
    CONSTANTS_8(&s);

    for (; a->n - i >= 8; i += 8) {
        __m256 p = _mm256_loadu_ps(pp + i), m = _mm256_loadu_ps(mm + i), v = _mm256_loadu_ps(vv + i);
        const __m256 g = _mm256_loadu_ps(gg + i);

        UPDATE_8(p, g, m, v);
        _mm256_storeu_ps(pp + i, p);
        _mm256_storeu_ps(mm + i, m);
        _mm256_storeu_ps(vv + i, v);
    }
    for (; i < a->n; i++)
        update(&s, pp + i, gg[i], mm + i, vv + i);
}

/* The sum of the squares of a leaf's unscaled gradients. */
AVX2 static double scan_leaf_avx2(const scalars *s, const float *g, size_t n)
{
    const __m256 unscale = _mm256_set1_ps(s->unscale);
    __m256d sum[8];
    double lanes[LANES];
    size_t i = 0;

    for (int k = 0; k < 8; k++)
        sum[k] = _mm256_setzero_pd();
    for (; n - i >= LANES; i += LANES) {
        const __m256 a = _mm256_mul_ps(_mm256_loadu_ps(g + i), unscale);
        const __m256 b = _mm256_mul_ps(_mm256_loadu_ps(g + i + 8), unscale);
        const __m256 c = _mm256_mul_ps(_mm256_loadu_ps(g + i + 16), unscale);
        const __m256 d = _mm256_mul_ps(_mm256_loadu_ps(g + i + 24), unscale);

        SQUARES_8(a, sum[0], sum[1]);
        SQUARES_8(b, sum[2], sum[3]);
        SQUARES_8(c, sum[4], sum[5]);
        SQUARES_8(d, sum[6], sum[7]);
    }
    for (int k = 0; k < 8; k++)
        _mm256_storeu_pd(lanes + 4 * k, sum[k]);
    for (size_t j = 0; i < n; i++, j++) {
        const float x = g[i] * s->unscale;

        lanes[j] += (double)x * (double)x;
    }
    return fold_avx2(lanes);
}

/* The step of a leaf, and its sums. It goes through the leaf, which is in the nearest cache, four times, for 8 of the 32
 * lanes at a time: there are registers for so many. */
AVX2 static void update_leaf_avx2(const scalars *s, float *pp, const float *gg, float *mm, float *vv, size_t n,
                                  double *sums)
{
    const size_t whole = n - n % LANES;
    const __m256 unscale = _mm256_set1_ps(s->unscale), factor = _mm256_set1_ps(s->factor);
    double lanes[SUMS][LANES];
    CONSTANTS_8(s);

    for (size_t lane = 0; lane < LANES; lane += 8) {
        __m256d clipped[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
        __m256d param[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
        __m256d change[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};

        for (size_t i = lane; i < whole; i += LANES) {
            __m256 p = _mm256_loadu_ps(pp + i), m = _mm256_loadu_ps(mm + i), v = _mm256_loadu_ps(vv + i);
            const __m256 old = p;
            const __m256 g = _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(gg + i), unscale), factor);
            __m256 moved;

            UPDATE_8(p, g, m, v);
            _mm256_storeu_ps(pp + i, p);
            _mm256_storeu_ps(mm + i, m);
            _mm256_storeu_ps(vv + i, v);
            moved = _mm256_sub_ps(p, old);
            SQUARES_8(g, clipped[0], clipped[1]);
            SQUARES_8(p, param[0], param[1]);
            SQUARES_8(moved, change[0], change[1]);
        }
        for (int k = 0; k < 2; k++) {
            _mm256_storeu_pd(lanes[0] + lane + 4 * k, clipped[k]);
            _mm256_storeu_pd(lanes[1] + lane + 4 * k, param[k]);
            _mm256_storeu_pd(lanes[2] + lane + 4 * k, change[k]);
        }
    }
    for (size_t i = whole, j = 0; i < n; i++, j++)
        update_told(s, pp + i, gg[i], mm + i, vv + i, lanes[0] + j, lanes[1] + j, lanes[2] + j);
    for (int k = 0; k < SUMS; k++)
        sums[k] = fold_avx2(lanes[k]);
}

/* ---- AVX-512 ---- */

#define CONSTANTS_16(s)                                                                                                \
    const __m512 kept = _mm512_set1_ps((s)->kept), eps = _mm512_set1_ps((s)->eps);                                     \
    const __m512 beta1 = _mm512_set1_ps((s)->beta1), one_minus_beta1 = _mm512_set1_ps((s)->one_minus_beta1);           \
    const __m512 beta2 = _mm512_set1_ps((s)->beta2), one_minus_beta2 = _mm512_set1_ps((s)->one_minus_beta2);           \
    const __m512 step_size = _mm512_set1_ps((s)->step_size), correction = _mm512_set1_ps((s)->correction)

#define UPDATE_16(p, g, m, v)                                                                                          \
    do {                                                                                                               \
        p = _mm512_mul_ps(p, kept);                                                                                    \
        m = _mm512_add_ps(_mm512_mul_ps(beta1, m), _mm512_mul_ps(one_minus_beta1, g));                                 \
        v = _mm512_add_ps(_mm512_mul_ps(beta2, v), _mm512_mul_ps(one_minus_beta2, _mm512_mul_ps(g, g)));               \
        p = _mm512_sub_ps(p, _mm512_div_ps(_mm512_mul_ps(step_size, m),                                                \
                                           _mm512_add_ps(_mm512_sqrt_ps(_mm512_div_ps(v, correction)), eps)));         \
    } while (0)

#define SQUARES_16(x, low, high)                                                                                       \
    do {                                                                                                               \
        const __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(x));                                              \
        const __m512d second = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));      \
                                                                                                                       \
        low = _mm512_add_pd(low, _mm512_mul_pd(first, first));                                                         \
        high = _mm512_add_pd(high, _mm512_mul_pd(second, second));                                                     \
    } while (0)

AVX512 void plain_avx512(const arrays *a, const settings *h, uint64_t t)
{
    const scalars s = scalars_of(h, t, 1.0);
    float *const pp = a->p, *const mm = a->m, *const vv = a->v;
    const float *const gg = a->g;
    size_t i = 0;
    CONSTANTS_16(&s);

    for (; a->n - i >= 16; i += 16) {
        __m512 p = _mm512_loadu_ps(pp + i), m = _mm512_loadu_ps(mm + i), v = _mm512_loadu_ps(vv + i);
        const __m512 g = _mm512_loadu_ps(gg + i);

        UPDATE_16(p, g, m, v);
        _mm512_storeu_ps(pp + i, p);
        _mm512_storeu_ps(mm + i, m);
        _mm512_storeu_ps(vv + i, v);
    }
    for (; i < a->n; i++)
        update(&s, pp + i, gg[i], mm + i, vv + i);
}

AVX512 static double scan_leaf_avx512(const scalars *s, const float *g, size_t n)
{
    const __m512 unscale = _mm512_set1_ps(s->unscale);
    __m512d sum[4];
    double lanes[LANES];
    size_t i = 0;

    for (int k = 0; k < 4; k++)
        sum[k] = _mm512_setzero_pd();
    for (; n - i >= LANES; i += LANES) {
        const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(g + i), unscale);
        const __m512 b = _mm512_mul_ps(_mm512_loadu_ps(g + i + 16), unscale);

        SQUARES_16(a, sum[0], sum[1]);
        SQUARES_16(b, sum[2], sum[3]);
    }
    for (int k = 0; k < 4; k++)
        _mm512_storeu_pd(lanes + 8 * k, sum[k]);
    for (size_t j = 0; i < n; i++, j++) {
        const float x = g[i] * s->unscale;

        lanes[j] += (double)x * (double)x;
    }
    return fold(lanes);
}

/* Here all 32 lanes of the three sums stay in registers. */
AVX512 static void update_leaf_avx512(const scalars *s, float *pp, const float *gg, float *mm, float *vv, size_t n,
                                      double *sums)
{
    const __m512 unscale = _mm512_set1_ps(s->unscale), factor = _mm512_set1_ps(s->factor);
    __m512d sum[SUMS][4];
    double lanes[SUMS][LANES];
    size_t i = 0;
    CONSTANTS_16(s);

    for (int k = 0; k < SUMS; k++)
        sum[k][0] = sum[k][1] = sum[k][2] = sum[k][3] = _mm512_setzero_pd();
#define HALF(at, low, high)                                                                                            \
    do {                                                                                                               \
        __m512 p = _mm512_loadu_ps(pp + at), m = _mm512_loadu_ps(mm + at), v = _mm512_loadu_ps(vv + at);               \
        const __m512 old = p;                                                                                          \
        const __m512 g = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(gg + at), unscale), factor);                      \
        __m512 moved;                                                                                                  \
                                                                                                                       \
        UPDATE_16(p, g, m, v);                                                                                         \
        _mm512_storeu_ps(pp + at, p);                                                                                  \
        _mm512_storeu_ps(mm + at, m);                                                                                  \
        _mm512_storeu_ps(vv + at, v);                                                                                  \
        moved = _mm512_sub_ps(p, old);                                                                                 \
        SQUARES_16(g, sum[0][low], sum[0][high]);                                                                      \
        SQUARES_16(p, sum[1][low], sum[1][high]);                                                                      \
        SQUARES_16(moved, sum[2][low], sum[2][high]);                                                                  \
    } while (0)
    for (; n - i >= LANES; i += LANES) {
        HALF(i, 0, 1);
        HALF(i + 16, 2, 3);
    }
#undef HALF
    for (int k = 0; k < SUMS; k++)
        for (int j = 0; j < 4; j++)
            _mm512_storeu_pd(lanes[k] + 8 * j, sum[k][j]);
    for (size_t j = 0; i < n; i++, j++)
        update_told(s, pp + i, gg[i], mm + i, vv + i, lanes[0] + j, lanes[1] + j, lanes[2] + j);
    for (int k = 0; k < SUMS; k++)
        sums[k] = fold(lanes[k]);
}

/* ---- the phase ---- */

typedef double scan_leaf(const scalars *s, const float *g, size_t n);
typedef void update_leaf(const scalars *s, float *p, const float *g, float *m, float *v, size_t n, double *sums);

/* `room` has three doubles for each chunk. */
static void phase(const arrays *a, const settings *h, uint64_t t, double grad_scale, double *room, told *found,
                  scan_leaf *scan, update_leaf *step)
{
    const size_t chunks = a->n / CHUNK + (a->n % CHUNK != 0);
    scalars s = scalars_of(h, t, grad_scale);
    double leaves[SUMS][LANES];
    double norm;

    memset(found, 0, sizeof *found);
    for (size_t c = 0; c < chunks; c++) {
        const size_t end = a->n - c * CHUNK < CHUNK ? a->n : (c + 1) * CHUNK;
        size_t leaf = 0;

        for (size_t i = c * CHUNK; i < end; i += LEAF, leaf++) {
            const size_t n = end - i < LEAF ? end - i : LEAF;

            leaves[0][leaf] = scan(&s, a->g + i, n);
            if (leaves[0][leaf] - leaves[0][leaf] != 0.0)
                count(&s, a->g + i, n, found);
        }
        room[c] = fold_leaves(leaves[0], leaf);
    }
    norm = sqrt(fold_chunks(room, chunks));
    found->grad_norm = norm;
    found->skipped = found->nan > 0 || found->inf > 0;
    if (found->skipped) {
        found->clipped_grad_norm = found->param_norm = NAN;
        memset(a->g, 0, a->n * sizeof(float));
        return;
    }
    s.factor = norm >= h->max_norm ? (float)(h->max_norm / norm) : 1.0f;
    for (size_t c = 0; c < chunks; c++) {
        const size_t end = a->n - c * CHUNK < CHUNK ? a->n : (c + 1) * CHUNK;
        size_t leaf = 0;

        for (size_t i = c * CHUNK; i < end; i += LEAF, leaf++) {
            const size_t n = end - i < LEAF ? end - i : LEAF;
            double sums[SUMS];

            step(&s, a->p + i, a->g + i, a->m + i, a->v + i, n, sums);
            memset(a->g + i, 0, n * sizeof(float));
            for (int k = 0; k < SUMS; k++)
                leaves[k][leaf] = sums[k];
        }
        for (int k = 0; k < SUMS; k++)
            room[(size_t)k * chunks + c] = fold_leaves(leaves[k], leaf);
    }
    found->clipped_grad_norm = sqrt(fold_chunks(room, chunks));
    found->param_norm = sqrt(fold_chunks(room + chunks, chunks));
    found->update_norm = sqrt(fold_chunks(room + 2 * chunks, chunks));
}

void phase_avx2(const arrays *a, const settings *h, uint64_t t, double grad_scale, double *room, told *found)
{
    phase(a, h, t, grad_scale, room, found, scan_leaf_avx2, update_leaf_avx2);
}

void phase_avx512(const arrays *a, const settings *h, uint64_t t, double grad_scale, double *room, told *found)
{
    phase(a, h, t, grad_scale, room, found, scan_leaf_avx512, update_leaf_avx512);
}

int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") != 0;
}

int has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") != 0;
}
