/* optforge.c: how a step of any rule is done: checks, threads, the summation tree, skipping, statistics.
 *
 * The formulas are in the rules' files, as functions over a piece of a tensor. Here is what calls them. A
 * step has a phase for each pass over memory, and one before them where gradients must be looked at before
 * anything is written. In a phase each thread takes its share of the leaves, which are 1,024 neighbouring
 * elements each, and leaves one double for each leaf and sum; behind it these are folded: to tensors, to
 * totals, to the scalars of the next phase.
 *
 * Build: cc -std=c99 -O2 -c optforge.c    (with -fopenmp a step runs on several threads)
 *
 * This file may be used, changed and distributed without restriction.
 */
#define OPTFORGE_COMPILE
#include "optforge.h"

#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

enum {
    OPTFORGE_LANES = 32,
    OPTFORGE_CHUNK = 32768,       /* elements, or sums, of one node of the summation tree */
    OPTFORGE_THREAD_SIZE = 65536, /* elements per thread below which waking another one does not pay */
    OPTFORGE_MOST_SHARES = 1024,  /* of a step, whatever is asked for */
    OPTFORGE_MOST_SCALARS = 512,  /* doubles of the scalars of a kernel */
    OPTFORGE_WIDE = 8192,         /* floats of a piece whose arrays are stored in fewer bits */
    OPTFORGE_CODES = 64,          /* of 8 bits that are found at once */
    OPTFORGE_TOLD = 6             /* sums that statistics are of: OPTFORGE_GRAD to OPTFORGE_INF */
};

/* ---- what adds up: 32 lanes of doubles, for each instruction set --------------------------------------- */

/* Adds n elements to the lanes, element i to lane i mod 32: of x times `scale`, or of x less `old`. */
typedef void (*optforge_add)(double *lanes, const void *x, const void *old, size_t n, double scale);

OPTFORGE_INLINE double optforge_largest(double a, double b) {
    const double y = a > b ? a : b;
    return a != a ? a : y;
}

/* `value` is what is added of an element, `w` is it in double, `total` what the lane becomes. Squares are
 * of doubles, so that those of floats are exact. Four rows at once leave the lanes in registers; then one
 * row, and what is left. */
#define OPTFORGE_ADD(name, real, value, total)                                                              \
    OPTFORGE_INLINE double name##_one(double lane, real x, real old, real by) {                             \
        const double w = (double)(value);                                                                   \
        (void)old, (void)by;                                                                                \
        return total;                                                                                       \
    }                                                                                                       \
    OPTFORGE_INLINE void name(double *OPTFORGE_RESTRICT lanes, const real *OPTFORGE_RESTRICT x,             \
                              const real *OPTFORGE_RESTRICT old, size_t n, real by) {                       \
        enum { ROW = OPTFORGE_LANES, ROWS = 4 * ROW };                                                      \
        for (; n >= ROWS; n -= ROWS, x += ROWS, old += ROWS)                                                \
            for (size_t j = 0; j < ROW; j++) {                                                              \
                const double one = name##_one(lanes[j], x[j], old[j], by);                                  \
                const double two = name##_one(one, x[j + ROW], old[j + ROW], by);                           \
                const double three = name##_one(two, x[j + 2 * ROW], old[j + 2 * ROW], by);                 \
                lanes[j] = name##_one(three, x[j + 3 * ROW], old[j + 3 * ROW], by);                         \
            }                                                                                               \
        for (; n >= ROW; n -= ROW, x += ROW, old += ROW)                                                    \
            for (size_t j = 0; j < ROW; j++)                                                                \
                lanes[j] = name##_one(lanes[j], x[j], old[j], by);                                          \
        for (size_t j = 0; j < n; j++)                                                                      \
            lanes[j] = name##_one(lanes[j], x[j], old[j], by);                                              \
    }                                                                                                       \
    OPTFORGE_EACH_SET(name, (double *lanes, const void *x, const void *old, size_t n, double scale),        \
                      name(lanes, (const real *)x, (const real *)old, n, (real)scale))

OPTFORGE_ADD(optforge_squares_f32, float, x * by, lane + w * w)
OPTFORGE_ADD(optforge_sum_f32, float, x * by, lane + w)
OPTFORGE_ADD(optforge_max_f32, float, x * by, optforge_largest(lane, fabs(w)))
OPTFORGE_ADD(optforge_change_f32, float, x - old, lane + w * w)
OPTFORGE_ADD(optforge_squares_f64, double, x * by, lane + w * w)
OPTFORGE_ADD(optforge_sum_f64, double, x * by, lane + w)
OPTFORGE_ADD(optforge_max_f64, double, x * by, optforge_largest(lane, fabs(w)))
OPTFORGE_ADD(optforge_change_f64, double, x - old, lane + w * w)

/* By format, kind (the fourth is squares of changes) and instruction set. */
static const optforge_add optforge_adds[2][4][OPTFORGE_SETS] = {
    {OPTFORGE_OF_SETS(optforge_squares_f32), OPTFORGE_OF_SETS(optforge_sum_f32),
     OPTFORGE_OF_SETS(optforge_max_f32), OPTFORGE_OF_SETS(optforge_change_f32)},
    {OPTFORGE_OF_SETS(optforge_squares_f64), OPTFORGE_OF_SETS(optforge_sum_f64),
     OPTFORGE_OF_SETS(optforge_max_f64), OPTFORGE_OF_SETS(optforge_change_f64)}
};

/* ---- numbers of 16 bits, for each instruction set ------------------------------------------------------ */

/* A float and its bits, as a union, through which gcc makes vectors as it does not through memcpy. */
typedef union optforge_word {
    float x;
    uint32_t bits;
} optforge_word;

OPTFORGE_INLINE uint32_t optforge_bits(float x) {
    optforge_word word;
    word.x = x;
    return word.bits;
}

OPTFORGE_INLINE float optforge_float(uint32_t bits) {
    optforge_word word;
    word.bits = bits;
    return word.x;
}

/* What the random bits of stochastic rounding are made of. Element i adds OPTFORGE_TURN * i to the first:
 * neighbours that differed in few bits would have draws that depend on each other. */
typedef struct optforge_draw {
    uint32_t first, second;
} optforge_draw;
#define OPTFORGE_TURN UINT32_C(0x9e3779b9) /* 2^32 over the golden ratio */

static uint64_t optforge_stir(uint64_t x, uint64_t more) {
    x = (x ^ more) + UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* Of an array from element `index` on. Every 2^32 elements have words of their own. */
static optforge_draw optforge_drawing(uint64_t seed, uint64_t t, uint64_t stream, size_t array,
                                      uint64_t index) {
    uint64_t key = optforge_stir(optforge_stir(optforge_stir(optforge_stir(0, seed), t), stream), array);
    optforge_draw draw;
    key = optforge_stir(key, index >> 32);
    draw.first = (uint32_t)key + OPTFORGE_TURN * (uint32_t)index;
    draw.second = (uint32_t)(key >> 32);
    return draw;
}

/* 32 random bits for element i, which turns by OPTFORGE_TURN * i; the upper half is there a step before. */
OPTFORGE_INLINE uint32_t optforge_upper(const optforge_draw *draw, uint32_t turn) {
    uint32_t x = draw->first + turn;
    x = (x ^ x >> 16) * UINT32_C(0x7feb352d) ^ draw->second;
    return (x ^ x >> 15) * UINT32_C(0x846ca68b);
}
OPTFORGE_INLINE uint32_t optforge_random(const optforge_draw *draw, uint32_t turn) {
    const uint32_t x = optforge_upper(draw, turn);
    return x ^ x >> 16;
}

/* What the elements of a row turn by. */
#define OPTFORGE_TURNS(k) \
    OPTFORGE_TURN * k, OPTFORGE_TURN * (k + 1), OPTFORGE_TURN * (k + 2), OPTFORGE_TURN * (k + 3)
static const uint32_t optforge_turns[OPTFORGE_LANES] = {
    OPTFORGE_TURNS(0), OPTFORGE_TURNS(4), OPTFORGE_TURNS(8), OPTFORGE_TURNS(12),
    OPTFORGE_TURNS(16), OPTFORGE_TURNS(20), OPTFORGE_TURNS(24), OPTFORGE_TURNS(28)
};

OPTFORGE_INLINE float optforge_from_bf16(uint16_t x) { return optforge_float((uint32_t)x << 16); }

/* Subnormal numbers are 2^-24 times an integer, which an integer added to the bits of 0.5 is as well. */
OPTFORGE_INLINE float optforge_from_f16(uint16_t x) {
    const uint32_t magnitude = x & 0x7fffu, sign = (uint32_t)(x & 0x8000u) << 16;
    const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00u ? 112u << 23 : 224u << 23);
    const uint32_t small = optforge_bits(optforge_float(magnitude + 0x3f000000u) - 0.5f);
    return optforge_float(sign | (magnitude < 0x400u ? small : normal));
}

/* Rounds by adding to what is dropped, up to the number that carries. NaN is quiet; what is beyond the
 * largest number goes to the nearer of that and infinity, never by chance. Comparisons are of signed numbers,
 * for which all processors have vectors. */
OPTFORGE_INLINE uint16_t optforge_to_bf16(float x, int draws, uint32_t random) {
    const uint32_t bits = optforge_bits(x);
    const int32_t magnitude = (int32_t)(bits & 0x7fffffffu);
    const uint32_t nearest = 0x7fffu + (bits >> 16 & 1u);
    const uint32_t drawn = magnitude <= 0x7f7f0000 ? random >> 16 : 0x8000u;
    const uint32_t rounded = (bits + (draws ? drawn : nearest)) >> 16;
    return (uint16_t)(magnitude > 0x7f800000 ? (bits >> 16 & 0x8000u) | 0x7fc0u : rounded);
}

/* Rounds a row, the first of which turns by `turn`. It is an addition and nothing else but for what is beyond
 * a number. */
OPTFORGE_INLINE void optforge_row_to_bf16(uint16_t *OPTFORGE_RESTRICT stored,
                                          const float *OPTFORGE_RESTRICT wide, size_t n, int draws,
                                          const optforge_draw *draw, uint32_t turn) {
    const int32_t most = draws ? 0x7f7f0000 : 0x7f800000;
    int32_t room = 0; /* negative where there is none */
    for (size_t k = 0; k < n; k++)
        room |= most - (int32_t)(optforge_bits(wide[k]) & 0x7fffffffu);
    if (room >= 0)
        for (size_t k = 0; k < n; k++) {
            const uint32_t bits = optforge_bits(wide[k]), nearest = 0x7fffu + (bits >> 16 & 1u);
            const uint32_t drawn = draws ? optforge_upper(draw, turn + optforge_turns[k]) >> 16 : 0;
            stored[k] = (uint16_t)((bits + (draws ? drawn : nearest)) >> 16);
        }
    else
        for (size_t k = 0; k < n; k++) {
            const uint32_t random = draws ? optforge_random(draw, turn + optforge_turns[k]) : 0;
            stored[k] = optforge_to_bf16(wide[k], draws, random);
        }
}

/* Below the least normal number are multiples of 2^-24, and the fraction between two has 32 bits. All steps
 * to it are exact. Masks choose where a compiler would make a branch, which becomes no vector. */
OPTFORGE_INLINE uint16_t optforge_to_f16(float x, int draws, uint32_t random) {
    const uint32_t bits = optforge_bits(x), magnitude = bits & 0x7fffffffu;
    const uint32_t is_small = 0u - ((magnitude - 0x38800000u) >> 31);
    const uint32_t nan = (0x7f800000u - magnitude) >> 31 << 9;
    const uint32_t nearest = 0xfffu + (magnitude >> 13 & 1u);
    const uint32_t drawn = (int32_t)magnitude <= 0x477fe000 ? random >> 19 : 0x1000u;
    const int32_t rounded = (int32_t)((magnitude + (draws ? drawn : nearest) - (112u << 23)) >> 13);
    const uint32_t normal = (uint32_t)(rounded < 0x7c00 ? rounded : 0x7c00);
    uint32_t small;
    if (draws) {
        const float units = optforge_float(magnitude & is_small) * 16777216.0f;
        const int32_t whole = (int32_t)units;
        const float share = (units - (float)whole) * 65536.0f;
        const int32_t upper = (int32_t)share, lower = (int32_t)((share - (float)upper) * 65536.0f);
        small = (uint32_t)whole + (random < ((uint32_t)upper << 16 | (uint32_t)lower) ? 1u : 0u);
    } else {
        small = optforge_bits(optforge_float(magnitude) + 0.5f) - 0x3f000000u;
    }
    return (uint16_t)((bits >> 16 & 0x8000u) | nan | (normal ^ ((normal ^ small) & is_small)));
}

/* The bits of what is split. A NaN becomes one that rounding cannot make a number of. */
OPTFORGE_INLINE uint32_t optforge_whole_bits(float x) {
    const uint32_t bits = optforge_bits(x);
    return (int32_t)(bits & 0x7fffffffu) > 0x7f800000 ? (bits & 0x80000000u) | 0x7fc00000u : bits;
}

/* Reads or writes n numbers: `beside` is what a split p leaves, or scales; `by` is an optforge_draw for
 * stochastic rounding, or the two maps of codes. */
typedef void (*optforge_convert)(void *stored, void *beside, float *wide, size_t n, const void *by);

/* In rows of n elements from i on, which a compiler knows the number of but for the last. */
#define OPTFORGE_CONVERT(name, convert)                                                                     \
    OPTFORGE_INLINE void name##_row(uint16_t *OPTFORGE_RESTRICT stored, uint16_t *OPTFORGE_RESTRICT low,    \
                                    float *OPTFORGE_RESTRICT wide, size_t i, size_t n,                      \
                                    const optforge_draw *draw) {                                            \
        const uint32_t turn = OPTFORGE_TURN * (uint32_t)i;                                                  \
        (void)low, (void)draw, (void)turn;                                                                  \
        convert;                                                                                            \
    }                                                                                                       \
    OPTFORGE_INLINE void name(uint16_t *stored, uint16_t *low, float *wide, size_t n,                       \
                              const optforge_draw *draw) {                                                  \
        size_t i = 0;                                                                                       \
        for (; n - i >= OPTFORGE_LANES; i += OPTFORGE_LANES)                                                \
            name##_row(stored, low, wide, i, OPTFORGE_LANES, draw);                                         \
        name##_row(stored, low, wide, i, n - i, draw);                                                      \
    }                                                                                                       \
    OPTFORGE_EACH_SET(name, (void *stored, void *beside, float *wide, size_t n, const void *by),            \
                      name((uint16_t *)stored, (uint16_t *)beside, wide, n, (const optforge_draw *)by))
#define OPTFORGE_EACH_OF_ROW(each)        \
    for (size_t k = 0; k < n; k++, i++) { \
        each;                             \
    }

OPTFORGE_CONVERT(optforge_load_bf16, OPTFORGE_EACH_OF_ROW(wide[i] = optforge_from_bf16(stored[i])))
OPTFORGE_CONVERT(optforge_load_f16, OPTFORGE_EACH_OF_ROW(wide[i] = optforge_from_f16(stored[i])))
OPTFORGE_CONVERT(optforge_load_split, OPTFORGE_EACH_OF_ROW(
    wide[i] = optforge_float(((uint32_t)stored[i] << 16) + (uint32_t)(int32_t)(int16_t)low[i])))
OPTFORGE_CONVERT(optforge_store_bf16, optforge_row_to_bf16(stored + i, wide + i, n, 0, NULL, 0))
OPTFORGE_CONVERT(optforge_store_f16, OPTFORGE_EACH_OF_ROW(stored[i] = optforge_to_f16(wide[i], 0, 0)))
OPTFORGE_CONVERT(optforge_store_split, OPTFORGE_EACH_OF_ROW(
    const uint32_t bits = optforge_whole_bits(wide[i]);
    stored[i] = (uint16_t)((bits + 0x8000u) >> 16);
    low[i] = (uint16_t)bits))
OPTFORGE_CONVERT(optforge_draw_bf16, optforge_row_to_bf16(stored + i, wide + i, n, 1, draw, turn))
OPTFORGE_CONVERT(optforge_draw_f16, OPTFORGE_EACH_OF_ROW(
    stored[i] = optforge_to_f16(wide[i], 1, optforge_random(draw, turn + optforge_turns[k]))))

/* ---- state of 8 bits, in blocks that share a scale ----------------------------------------------------- */

/* What codes stand for, ascending; `above[c]` is the largest float that is nearer to what is below c. */
typedef struct optforge_map {
    float number[256], above[256];
} optforge_map;

/* Each decade from 1e-7 to 1 has twice as many parts as the one below, and codes for their middles. */
static void optforge_fill_map(optforge_map *map, int is_signed) {
    static const float tens[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    size_t zero = is_signed ? 127 : 0, code = 0;
    map->number[zero] = 0.0f;
    map->number[255] = 1.0f;
    for (size_t decade = 0; decade < 7; decade++) {
        const size_t parts = (size_t)(is_signed ? 1 : 2) << decade;
        const double step = (double)((1.0f - 0.1f) / (float)parts);
        float lower = 0.1f;
        for (size_t k = 1; k <= parts; k++) {
            const double edge = k < (parts + 1) / 2 ? (double)0.1f + step * (double)k
                                                    : 1.0 - step * (double)(parts - k);
            const float middle = tens[decade] * ((lower + (float)edge) / 2.0f);
            lower = (float)edge;
            map->number[zero + ++code] = middle;
            if (is_signed)
                map->number[zero - code] = -middle;
        }
    }
    map->above[0] = -2.0f;
    for (code = 1; code < 256; code++) {
        const double middle = ((double)map->number[code - 1] + (double)map->number[code]) / 2.0;
        const float rounded = (float)middle;
        const uint32_t before = optforge_bits(rounded) + (rounded < 0.0f ? 1u : UINT32_MAX);
        map->above[code] = (double)rounded > middle ? optforge_float(before) : rounded;
    }
}

/* Loads blocks, of the last of which there may be a part; the floats have room for all of it. */
OPTFORGE_INLINE void optforge_load_blocks(const uint8_t *stored, const float *scales,
                                          float *OPTFORGE_RESTRICT wide, size_t n,
                                          const float *OPTFORGE_RESTRICT number) {
    for (; n > 0; stored += OPTFORGE_BLOCK, wide += OPTFORGE_BLOCK, scales++) {
        uint8_t codes[OPTFORGE_BLOCK] = {0};
        const size_t own = n < OPTFORGE_BLOCK ? n : (size_t)OPTFORGE_BLOCK;
        memcpy(codes, stored, own);
        for (size_t i = 0; i < OPTFORGE_BLOCK; i++)
            wide[i] = number[codes[i]] * *scales;
        n -= own;
    }
}

/* The lesser of a positive float, by its bits, and a line. */
OPTFORGE_INLINE int32_t optforge_lesser(int32_t bits, float line) {
    const int32_t own = (int32_t)optforge_bits(line);
    return own < bits ? own : bits;
}

/* The place of a magnitude up to 1 among those that codes stand for, or the place before: those of a decade
 * are on a line, and the lines on a concave curve. */
OPTFORGE_INLINE int32_t optforge_near(float x, int is_signed) {
    int32_t bits = (int32_t)optforge_bits(64.0f / 0.9f * x + 64.0f * (0.8f / 0.9f));
    bits = optforge_lesser(bits, 320.0f / 0.9f * x + 32.0f * (0.8f / 0.9f));
    bits = optforge_lesser(bits, 1.6e3f / 0.9f * x + 16.0f * (0.8f / 0.9f));
    bits = optforge_lesser(bits, 8e3f / 0.9f * x + 8.0f * (0.8f / 0.9f));
    bits = optforge_lesser(bits, 4e4f / 0.9f * x + 4.0f * (0.8f / 0.9f));
    bits = optforge_lesser(bits, 2e5f / 0.9f * x + 2.0f * (0.8f / 0.9f));
    bits = optforge_lesser(bits, 1e6f / 0.9f * x + 0.8f / 0.9f);
    x = optforge_float((uint32_t)bits);
    return (int32_t)(is_signed ? x - 0.25f : 2.0f * x - 1.25f);
}

/* What is nearest to numbers from -1 to 1. In loops of their own, and so short that compilers make vectors of
 * all but the look at the table. */
OPTFORGE_INLINE void optforge_store_codes(uint8_t *OPTFORGE_RESTRICT codes, const float *OPTFORGE_RESTRICT x,
                                          const float *OPTFORGE_RESTRICT above, int is_signed) {
    int32_t code[OPTFORGE_CODES];
    float line[OPTFORGE_CODES];
    for (size_t i = 0; i < OPTFORGE_CODES; i++) {
        const uint32_t bits = optforge_bits(x[i]);
        const int32_t near = optforge_near(optforge_float(bits & 0x7fffffffu), is_signed);
        code[i] = (near ^ ((int32_t)bits >> 31)) + (is_signed ? 128 : 1);
    }
    for (size_t i = 0; i < OPTFORGE_CODES; i++)
        line[i] = above[code[i]];
    for (size_t i = 0; i < OPTFORGE_CODES; i++) /* this one, or the one below */
        codes[i] = (uint8_t)(code[i] - (x[i] > line[i] ? 0 : 1));
}

/* Stores a block, which it changes: what is nearest to a number over the scale, the largest magnitude. That
 * is NaN where one is, or is infinite. Without a sign what is below 0 becomes 0. */
OPTFORGE_INLINE float optforge_store_block(uint8_t *OPTFORGE_RESTRICT codes, float *OPTFORGE_RESTRICT wide,
                                           const float *OPTFORGE_RESTRICT above, int is_signed) {
    int32_t lanes[OPTFORGE_LANES] = {0}, most = 0;
    float scale;
    for (size_t i = 0; i < OPTFORGE_BLOCK; i += OPTFORGE_LANES)
        for (size_t j = 0; j < OPTFORGE_LANES; j++) {
            const int32_t bits = (int32_t)optforge_bits(wide[i + j]), size = bits & 0x7fffffff;
            const int32_t own = is_signed || bits >= 0 || size >= 0x7f800000 ? size : 0;
            lanes[j] = own > lanes[j] ? own : lanes[j];
        }
    for (size_t j = 0; j < OPTFORGE_LANES; j++)
        most = lanes[j] > most ? lanes[j] : most;
    if (most == 0 || most >= 0x7f800000) {
        memset(codes, is_signed ? 127 : 0, OPTFORGE_BLOCK);
        return most == 0 ? 0.0f : (float)NAN;
    }
    scale = optforge_float((uint32_t)most);
    for (size_t i = 0; i < OPTFORGE_BLOCK; i++)
        wide[i] = (is_signed || wide[i] > 0.0f ? wide[i] : 0.0f) / scale;
    for (size_t i = 0; i < OPTFORGE_BLOCK; i += OPTFORGE_CODES)
        optforge_store_codes(codes + i, wide + i, above, is_signed);
    return scale;
}

OPTFORGE_INLINE void optforge_store_blocks(uint8_t *stored, float *scales, float *wide, size_t n,
                                           const float *above, int is_signed) {
    for (; n > 0; stored += OPTFORGE_BLOCK, wide += OPTFORGE_BLOCK) {
        uint8_t codes[OPTFORGE_BLOCK];
        const size_t own = n < OPTFORGE_BLOCK ? n : (size_t)OPTFORGE_BLOCK;
        memset(wide + own, 0, (OPTFORGE_BLOCK - own) * sizeof *wide);
        *scales++ = optforge_store_block(codes, wide, above, is_signed);
        memcpy(stored, codes, own);
        n -= own;
    }
}

#define OPTFORGE_BLOCKS(name, load, is_signed)                                                              \
    OPTFORGE_INLINE void name(uint8_t *codes, float *scales, float *wide, size_t n,                         \
                              const optforge_map *maps) {                                                   \
        const optforge_map *map = maps + !is_signed;                                                        \
        if (load)                                                                                           \
            optforge_load_blocks(codes, scales, wide, n, map->number);                                      \
        else                                                                                                \
            optforge_store_blocks(codes, scales, wide, n, map->above, is_signed);                           \
    }                                                                                                       \
    OPTFORGE_EACH_SET(name, (void *stored, void *beside, float *wide, size_t n, const void *by),            \
                      name((uint8_t *)stored, (float *)beside, wide, n, (const optforge_map *)by))
OPTFORGE_BLOCKS(optforge_load_q8, 1, 1)
OPTFORGE_BLOCKS(optforge_load_uq8, 1, 0)
OPTFORGE_BLOCKS(optforge_store_q8, 0, 1)
OPTFORGE_BLOCKS(optforge_store_uq8, 0, 0)

/* Loading, storing to nearest, storing at random; by format from bfloat16 on, the third is a split p. */
static const optforge_convert optforge_converts[3][5][OPTFORGE_SETS] = {
    {OPTFORGE_OF_SETS(optforge_load_bf16), OPTFORGE_OF_SETS(optforge_load_f16),
     OPTFORGE_OF_SETS(optforge_load_split), OPTFORGE_OF_SETS(optforge_load_q8),
     OPTFORGE_OF_SETS(optforge_load_uq8)},
    {OPTFORGE_OF_SETS(optforge_store_bf16), OPTFORGE_OF_SETS(optforge_store_f16),
     OPTFORGE_OF_SETS(optforge_store_split), OPTFORGE_OF_SETS(optforge_store_q8),
     OPTFORGE_OF_SETS(optforge_store_uq8)},
    {OPTFORGE_OF_SETS(optforge_draw_bf16), OPTFORGE_OF_SETS(optforge_draw_f16), OPTFORGE_NO_SETS,
     OPTFORGE_NO_SETS, OPTFORGE_NO_SETS}
};

/* ---- the summation tree -------------------------------------------------------------------------------- */

static size_t optforge_least(size_t a, size_t b) { return a < b ? a : b; }

/* Adds the upper half of 2 * h lanes to the lower; lanes from `used` on are 0, and change nothing. */
OPTFORGE_INLINE void optforge_halve(double *lanes, size_t h, size_t used, int kind) {
    for (size_t j = 0; used > h && j < h; j++)
        lanes[j] = kind == OPTFORGE_MAX ? optforge_largest(lanes[j], lanes[j + h]) : lanes[j] + lanes[j + h];
}

/* Folds 32 lanes into one. That h is known lets a compiler make vectors of it. */
static double optforge_fold_lanes(double *lanes, size_t used, int kind) {
    optforge_halve(lanes, 16, used, kind);
    optforge_halve(lanes, 8, used, kind);
    optforge_halve(lanes, 4, used, kind);
    optforge_halve(lanes, 2, used, kind);
    optforge_halve(lanes, 1, used, kind);
    return lanes[0];
}

/* A node of the tree: at most 32,768 values, lane by lane in leaves of 1,024, whose sums fold. */
static double optforge_node(const double *values, size_t n, int kind, int set) {
    const optforge_add add = optforge_adds[1][kind == OPTFORGE_MAX ? OPTFORGE_MAX : OPTFORGE_SUM][set];
    double leaves[OPTFORGE_LANES] = {0.0};
    size_t number = 0;
    for (size_t i = 0; i < n; i += OPTFORGE_LEAF) {
        const size_t own = optforge_least(n - i, OPTFORGE_LEAF);
        double lanes[OPTFORGE_LANES] = {0.0};
        add(lanes, values + i, values + i, own, 1.0);
        leaves[number++] = optforge_fold_lanes(lanes, own, kind);
    }
    return optforge_fold_lanes(leaves, number, kind);
}

/* The total of values, which are overwritten. */
static double optforge_tree(double *values, size_t n, int kind, int set) {
    while (n > 1) {
        size_t nodes = 0;
        for (size_t i = 0; i < n; i += OPTFORGE_CHUNK)
            values[nodes++] = optforge_node(values + i, optforge_least(n - i, OPTFORGE_CHUNK), kind, set);
        n = nodes;
    }
    return n == 1 ? values[0] : 0.0;
}

/* The total of a tensor from the sums of its leaves, which are overwritten: 32 leaves fold into a chunk
 * first. */
static double optforge_tensor_total(double *leaves, size_t n, int kind, int set) {
    size_t chunks = 0;
    if (n == 1)
        return leaves[0];
    for (size_t i = 0; i < n; i += OPTFORGE_LANES) {
        const size_t own = optforge_least(n - i, OPTFORGE_LANES);
        double lanes[OPTFORGE_LANES] = {0.0};
        memcpy(lanes, leaves + i, own * sizeof *lanes);
        leaves[chunks++] = optforge_fold_lanes(lanes, own, kind);
    }
    return optforge_tree(leaves, chunks, kind, set);
}

/* ---- instruction sets ---------------------------------------------------------------------------------- */

static const char *const optforge_sets[] = {
#if OPTFORGE_SETS == 3
    "x86-64", "x86-64-v3", "x86-64-v4"
#elif defined(__ARM_NEON)
    "neon"
#else
    "plain"
#endif
};

static int optforge_chosen = -1; /* the instruction set in use; -1: none yet; -2: OPTFORGE_ISA names none */

#if defined(__GNUC__)
static int optforge_load_chosen(void) { return __atomic_load_n(&optforge_chosen, __ATOMIC_RELAXED); }
static void optforge_choose(int set) { __atomic_store_n(&optforge_chosen, set, __ATOMIC_RELAXED); }
#else
static int optforge_load_chosen(void) { return optforge_chosen; }
static void optforge_choose(int set) { optforge_chosen = set; }
#endif

/* Whether this machine has an instruction set. */
static int optforge_has(int set) {
#if OPTFORGE_SETS == 3
    __builtin_cpu_init();
    if (set == 1)
        return __builtin_cpu_supports("avx2") != 0;
    if (set == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
    return set == 0;
}

OPTFORGE_API int optforge_use(const char *name) {
    if (name == NULL)
        return OPTFORGE_ERROR_NULL;
    for (int set = 0; set < OPTFORGE_SETS; set++)
        if (strcmp(name, optforge_sets[set]) == 0 && optforge_has(set)) {
            optforge_choose(set);
            return OPTFORGE_OK;
        }
    return OPTFORGE_ERROR_ISA;
}

/* The instruction set in use, chosen at the first call; -2 where the environment names none of this
 * machine. */
static int optforge_set(void) {
    if (optforge_load_chosen() == -1) {
        const char *named = getenv("OPTFORGE_ISA");
        int set = OPTFORGE_SETS - 1;
        while (!optforge_has(set))
            set--;
        if (named == NULL || *named == '\0')
            optforge_choose(set);
        else if (optforge_use(named) != OPTFORGE_OK)
            optforge_choose(-2);
    }
    return optforge_load_chosen();
}

OPTFORGE_API const char *optforge_isa(void) {
    const int set = optforge_set();
    return set < 0 ? "" : optforge_sets[set];
}

/* ---- flush to zero ------------------------------------------------------------------------------------- */

/* The floating-point control of this thread, and the bits of it with which subnormal numbers are flushed
 * to zero. They are set in programs that are linked with -ffast-math, and by libraries. */
#if defined(__SSE__) || defined(_M_X64)
enum { OPTFORGE_FLUSH_BITS = 0x8040 };
static uint64_t optforge_control(void) { return _mm_getcsr(); }
static void optforge_set_control(uint64_t control) { _mm_setcsr((unsigned)control); }
#elif defined(__aarch64__) && defined(__GNUC__)
enum { OPTFORGE_FLUSH_BITS = 0x1080000 };
static uint64_t optforge_control(void) {
    uint64_t control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    return control;
}
static void optforge_set_control(uint64_t control) { __asm__ volatile("msr fpcr, %0" : : "r"(control)); }
#else
enum { OPTFORGE_FLUSH_BITS = 0 }; /* out of reach */
static uint64_t optforge_control(void) { return 0; }
static void optforge_set_control(uint64_t control) { (void)control; }
#endif

/* Lets this thread compute with subnormal numbers; gives what restores it. */
static uint64_t optforge_keep_subnormals(const optforge_options *o) {
    const uint64_t before = optforge_control();
    if ((before & OPTFORGE_FLUSH_BITS) != 0 && !o->allow_flush)
        optforge_set_control(before & ~(uint64_t)OPTFORGE_FLUSH_BITS);
    return before;
}

static void optforge_restore_flush(uint64_t before) {
    if ((before & OPTFORGE_FLUSH_BITS) != 0)
        optforge_set_control(before);
}

/* Whether this thread flushes all the same. Where the bits can be cleared it does not, and is not asked:
 * to make a subnormal number takes longer than all else in a step of one small tensor. */
static int optforge_flushes(void) {
    volatile float least = FLT_MIN;
    if (OPTFORGE_FLUSH_BITS == 0)
        least = least * 0.5f;
    return least == 0.0f;
}

/* ---- tensors ------------------------------------------------------------------------------------------- */

/* Sums and products of sizes: where they are too large, the largest number. */
static size_t optforge_plus(size_t a, size_t b) { return a > SIZE_MAX - b ? SIZE_MAX : a + b; }
static size_t optforge_times(size_t a, size_t b) { return b != 0 && a > SIZE_MAX / b ? SIZE_MAX : a * b; }

static size_t optforge_format_size(unsigned char format) {
    static const unsigned char sizes[] = {0, 4, 8, 8, 2, 2, 2, 1, 1, 4};
    return sizes[format];
}

static size_t optforge_leaves(size_t n) { return n / OPTFORGE_LEAF + (n % OPTFORGE_LEAF != 0); }

static size_t optforge_elements(const void *tensor) { return *(const size_t *)tensor; } /* its first member */

/* Array number `a` of a tensor: 0 is p, 1 is g, then the state. */
static void *optforge_array(const void *tensor, size_t a) {
    void *array;
    memcpy(&array, (const char *)tensor + sizeof(size_t) + a * sizeof array, sizeof array);
    return array;
}

/* What is computed with: double where p is, else float. */
static unsigned char optforge_real(const optforge_kernel *kernel) {
    return kernel->formats[0] == OPTFORGE_F64 ? OPTFORGE_F64 : OPTFORGE_F32;
}

/* One number of an array, and such a number stored to nearest. */
static double optforge_read(const void *array, unsigned char format, size_t i) {
    switch (format) {
    case OPTFORGE_F32:
    case OPTFORGE_ABSMAX: return (double)((const float *)array)[i];
    case OPTFORGE_BF16: return (double)optforge_from_bf16(((const uint16_t *)array)[i]);
    case OPTFORGE_F16: return (double)optforge_from_f16(((const uint16_t *)array)[i]);
    case OPTFORGE_LOW: return (double)((const uint16_t *)array)[i];
    case OPTFORGE_Q8:
    case OPTFORGE_UQ8: return (double)((const uint8_t *)array)[i]; /* the code */
    default: return ((const double *)array)[i];
    }
}

static void optforge_write(void *array, unsigned char format, size_t i, double value) {
    switch (format) {
    case OPTFORGE_F32: ((float *)array)[i] = (float)value; break;
    case OPTFORGE_BF16: ((uint16_t *)array)[i] = optforge_to_bf16((float)value, 0, 0); break;
    case OPTFORGE_F16: ((uint16_t *)array)[i] = optforge_to_f16((float)value, 0, 0); break;
    default: ((double *)array)[i] = value;
    }
}

/* Elements, and bytes, of array `a` of a tensor of n elements. */
static size_t optforge_count_of(const optforge_kernel *kernel, size_t n, size_t a) {
    const unsigned char format = kernel->formats[a];
    if (format == OPTFORGE_ABSMAX)
        return n / OPTFORGE_BLOCK + (n % OPTFORGE_BLOCK != 0);
    return format == OPTFORGE_SCALAR ? 1 : n;
}

static size_t optforge_bytes(const optforge_kernel *kernel, size_t n, size_t a) {
    return optforge_count_of(kernel, n, a) * optforge_format_size(kernel->formats[a]);
}

/* Whether a format is codes in blocks; and the first array of scales, behind all others. */
static int optforge_is_blocks(unsigned char format) {
    return format == OPTFORGE_Q8 || format == OPTFORGE_UQ8;
}

static size_t optforge_scales(const optforge_kernel *kernel) {
    size_t a = kernel->arrays;
    while (kernel->formats[a - 1] == OPTFORGE_ABSMAX)
        a--;
    return a;
}

/* What is beside array `a` from element `begin` on: p has a master, codes have scales; else NULL. */
static void *optforge_beside(const optforge_kernel *kernel, const void *tensor, size_t a, size_t begin) {
    size_t beside = a == 0 ? kernel->master : 0;
    if (optforge_is_blocks(kernel->formats[a])) {
        beside = optforge_scales(kernel);
        for (size_t b = 0; b < a; b++)
            beside += (size_t)optforge_is_blocks(kernel->formats[b]);
    }
    return beside > 0 ? (char *)optforge_array(tensor, beside) + optforge_bytes(kernel, begin, beside) : NULL;
}

/* Doubles of a row of scalars, and one more for what optforge_begin_rows keeps there. */
static size_t optforge_width(const optforge_kernel *kernel) {
    return (kernel->scalars_size + sizeof(double) - 1) / sizeof(double) + 1;
}

/* Rows of scalars of a list: one for each group; at most one for each tensor where these have counts of
 * their own. */
static size_t optforge_rows(const optforge_list *l) {
    if (l->steps != NULL)
        return l->count;
    return l->group != NULL && l->groups > 1 ? l->groups : 1;
}

static size_t optforge_row_doubles(const optforge_list *l) {
    return optforge_times(optforge_rows(l), optforge_width(l->kernel));
}

/* A tensor of the lists, and where it stands among all. */
typedef struct optforge_place {
    size_t i, k;               /* it is tensor k of list i */
    const optforge_list *list;
    const void *tensor;
    size_t n, number;          /* its elements, and its number */
    size_t before, rows;       /* tensors, and doubles of rows, of the lists before */
    size_t leaf;               /* leaves of the tensors before */
} optforge_place;
static const optforge_place optforge_start = {0, 0, NULL, NULL, 0, 0, 0, 0, 0};

/* Goes from the start to the first tensor, or on to the next; 0 behind the last. */
static int optforge_next(const optforge_work *w, optforge_place *x) {
    if (x->tensor != NULL) {
        x->leaf += optforge_leaves(x->n);
        x->k++;
    }
    for (; x->i < w->number; x->i++, x->k = 0) {
        const optforge_list *l = &w->lists[x->i];
        if (x->k < l->count) {
            x->list = l;
            x->tensor = (const char *)l->tensors +
                        x->k * (sizeof(size_t) + l->kernel->arrays * sizeof(void *));
            x->n = optforge_elements(x->tensor);
            x->number = l->number != NULL ? l->number[x->k] : x->before + x->k;
            return 1;
        }
        x->before += l->count;
        x->rows += optforge_row_doubles(l);
    }
    return 0;
}

/* Elements of the whole tensor of which this one is a part. */
static size_t optforge_whole(const optforge_work *w, const optforge_place *x) {
    return w->options->sizes != NULL ? w->options->sizes[x->number] : x->n;
}

/* The look at the gradients before the first pass, which is a phase where a step may be skipped. */
static const optforge_sum optforge_scanned = {"g", OPTFORGE_GRAD, OPTFORGE_SQUARES, 1, OPTFORGE_UNSCALED};
static const optforge_pass optforge_scan = {
    OPTFORGE_NO_SETS, OPTFORGE_NO_SETS, &optforge_scanned, 1, 0, 0, NULL
};

/* The pass that a kernel does in a phase, or NULL. */
static const optforge_pass *optforge_pass_of(const optforge_work *w, const optforge_kernel *kernel,
                                             int phase) {
    if (phase < w->scan)
        return &optforge_scan;
    return phase - w->scan < (int)kernel->pass_count ? &kernel->passes[phase - w->scan] : NULL;
}

/* What a phase has added up in a slot, by the numbers of tensors. */
static double *optforge_sums_of(const optforge_work *w, int phase, unsigned slot) {
    return w->tensor_sums + (size_t)w->place[phase][slot] * w->tensors;
}

/* The scalars of a tensor as pass `pass` needs them: its row, or a copy in `own` with what is the
 * tensor's. */
static int optforge_scalars(const optforge_work *w, const optforge_place *x, unsigned pass, double *own,
                            const void **scalars) {
    const optforge_list *l = x->list;
    const optforge_kernel *kernel = l->kernel;
    const size_t group = l->group != NULL ? l->group[x->k] : 0;
    const size_t row = l->steps != NULL ? w->row[x->before + x->k] : x->rows + group * optforge_width(kernel);
    int status = OPTFORGE_OK;
    *scalars = w->rows + row;
    if (kernel->begin_tensor == NULL && kernel->behind_tensor == NULL)
        return status;
    *scalars = memcpy(own, w->rows + row, kernel->scalars_size);
    if (kernel->begin_tensor != NULL)
        status = kernel->begin_tensor(own, x->tensor, (double)optforge_whole(w, x),
                                      l->starting != NULL && l->starting[x->k] != 0);
    for (unsigned p = 0; kernel->behind_tensor != NULL && p < pass; p++) {
        double sums[OPTFORGE_MOST_SUMS];
        for (size_t s = 0; s < kernel->passes[p].sum_count; s++) {
            const unsigned slot = kernel->passes[p].sums[s].slot;
            sums[slot] = optforge_sums_of(w, (int)p + w->scan, slot)[x->number];
        }
        kernel->behind_tensor(own, p, sums, w->totals + x->i * OPTFORGE_MOST_SUMS);
    }
    return status;
}

/* ---- checks -------------------------------------------------------------------------------------------- */

/* Whether an array is converted where it is read and written. */
static int optforge_narrow(const optforge_kernel *kernel, size_t a) {
    const unsigned char format = kernel->formats[a];
    return format >= OPTFORGE_BF16 && format != OPTFORGE_LOW && format != OPTFORGE_ABSMAX;
}

static int optforge_check_kernel(const optforge_kernel *kernel) {
    size_t narrow = 0, blocks = 0, scales = 0;
    if (kernel == NULL)
        return OPTFORGE_ERROR_NULL;
    if (kernel->abi != OPTFORGE_TYPES || kernel->formats == NULL || kernel->passes == NULL ||
        kernel->begin == NULL || kernel->arrays < 2 || kernel->arrays > OPTFORGE_MOST_ARRAYS ||
        kernel->master >= kernel->arrays || kernel->pass_count < 1 ||
        kernel->pass_count > OPTFORGE_MOST_PASSES ||
        kernel->scalars_size > OPTFORGE_MOST_SCALARS * sizeof(double))
        return OPTFORGE_ERROR_ABI;
    for (size_t a = 0; a < kernel->arrays; a++) {
        const unsigned char format = kernel->formats[a];
        const int fits = (format == OPTFORGE_F64) == (kernel->formats[0] == OPTFORGE_F64);
        if (format == OPTFORGE_SCALAR ? a < 2
                                      : format < OPTFORGE_F32 || format > OPTFORGE_ABSMAX || !fits ||
                                            (format == OPTFORGE_LOW && a != kernel->master) ||
                                            (format > OPTFORGE_LOW && a < 2))
            return OPTFORGE_ERROR_ABI;
        narrow += (size_t)optforge_narrow(kernel, a);
        blocks += (size_t)optforge_is_blocks(format);
        scales += format == OPTFORGE_ABSMAX;
    }
    if (scales != blocks || scales != kernel->arrays - optforge_scales(kernel) ||
        (blocks > 0 && narrow > (size_t)OPTFORGE_WIDE / OPTFORGE_BLOCK))
        return OPTFORGE_ERROR_ABI;
    if (kernel->master > 0 &&
        (kernel->master < 2 || kernel->formats[0] < OPTFORGE_BF16 ||
         (kernel->formats[kernel->master] != OPTFORGE_F32 &&
          (kernel->formats[kernel->master] != OPTFORGE_LOW || kernel->formats[0] != OPTFORGE_BF16))))
        return OPTFORGE_ERROR_ABI;
    for (unsigned p = 0; p < kernel->pass_count; p++) {
        const optforge_pass *pass = &kernel->passes[p];
        if (pass->sum_count > OPTFORGE_MOST_SUMS)
            return OPTFORGE_ERROR_ABI;
        for (size_t s = 0; s < pass->sum_count; s++) {
            const optforge_sum *sum = &pass->sums[s];
            const int array = sum->source == OPTFORGE_UNSCALED ? 1 : sum->source > 0 ? sum->source : 0;
            if (sum->slot >= OPTFORGE_MOST_SUMS || sum->slot == OPTFORGE_NAN || sum->slot == OPTFORGE_INF ||
                sum->kind > OPTFORGE_MAX || sum->source <= (int)OPTFORGE_SCRATCH - OPTFORGE_MOST_SCRATCH ||
                (size_t)array >= kernel->arrays || kernel->formats[array] == OPTFORGE_SCALAR ||
                kernel->formats[array] == OPTFORGE_LOW || kernel->formats[array] == OPTFORGE_ABSMAX)
                return OPTFORGE_ERROR_ABI;
        }
    }
    return OPTFORGE_OK;
}

/* Whether a tensor's arrays are there, aligned, and apart from each other. */
static int optforge_check_tensor(const optforge_kernel *kernel, const void *tensor) {
    const size_t n = optforge_elements(tensor);
    for (size_t a = 0; a < kernel->arrays; a++) {
        const size_t size = optforge_format_size(kernel->formats[a]);
        const size_t bytes = optforge_bytes(kernel, n, a);
        const uintptr_t own = (uintptr_t)optforge_array(tensor, a);
        if (n > SIZE_MAX / sizeof(double) && n > SIZE_MAX / size)
            return OPTFORGE_ERROR_SIZE;
        if (bytes == 0)
            continue;
        if (own == 0)
            return OPTFORGE_ERROR_NULL;
        if ((own & (size - 1)) != 0)
            return OPTFORGE_ERROR_ALIGNMENT;
        for (size_t b = 0; b < a; b++) {
            const uintptr_t other = (uintptr_t)optforge_array(tensor, b);
            const size_t other_bytes = optforge_bytes(kernel, n, b);
            if (other_bytes != 0 && (own - other < other_bytes || other - own < bytes))
                return OPTFORGE_ERROR_OVERLAP;
        }
    }
    return OPTFORGE_OK;
}

/* The tensor with another array for p, in memory for OPTFORGE_MOST_ARRAYS of them and the size. */
static const void *optforge_instead(const optforge_kernel *kernel, const void *tensor, void *p,
                                    double *memory) {
    memcpy(memory, tensor, sizeof(size_t) + kernel->arrays * sizeof p);
    memcpy((char *)memory + sizeof(size_t), &p, sizeof p);
    return memory;
}

/* Whether what a step adds can go to `delta`: that is like p, and apart from p as well. */
static int optforge_check_delta(const optforge_kernel *kernel, const void *tensor, void *delta) {
    double memory[OPTFORGE_MOST_ARRAYS + 1];
    const size_t bytes = optforge_bytes(kernel, optforge_elements(tensor), 0);
    const uintptr_t p = (uintptr_t)optforge_array(tensor, 0), own = (uintptr_t)delta;
    if (bytes != 0 && own != 0 && (own - p < bytes || p - own < bytes))
        return OPTFORGE_ERROR_OVERLAP;
    return optforge_check_tensor(kernel, optforge_instead(kernel, tensor, delta, memory));
}

/* Whether a tensor's group, number and part are in order. */
static int optforge_check_place(const optforge_work *w, const optforge_place *x) {
    const optforge_list *l = x->list;
    const size_t part = l->part != NULL ? l->part[x->k] : 0;
    if (l->group != NULL && l->group[x->k] >= (l->groups > 1 ? l->groups : 1))
        return OPTFORGE_ERROR_GROUP;
    if (x->number >= w->tensors)
        return OPTFORGE_ERROR_NUMBER;
    if (w->options->sizes != NULL || part != 0) {
        const size_t whole = optforge_whole(w, x);
        if (part > whole || x->n > whole - part)
            return OPTFORGE_ERROR_PART;
        if ((w->sums > 0 || optforge_scales(l->kernel) < l->kernel->arrays) &&
            (part % OPTFORGE_LEAF != 0 || (x->n % OPTFORGE_LEAF != 0 && part + x->n != whole)))
            return OPTFORGE_ERROR_PART;
    }
    return OPTFORGE_OK;
}

/* Whether two kernels add up the same for their formulas, so that they share totals. */
static int optforge_alike(const optforge_kernel *a, const optforge_kernel *b) {
    if (a == b)
        return 1;
    if (a->pass_count != b->pass_count)
        return 0;
    for (unsigned p = 0; p < a->pass_count; p++) {
        if (a->passes[p].sum_count != b->passes[p].sum_count)
            return 0;
        for (size_t s = 0; s < a->passes[p].sum_count; s++) {
            const optforge_sum *x = &a->passes[p].sums[s], *y = &b->passes[p].sums[s];
            if (x->slot != y->slot || x->kind != y->kind || x->observed != y->observed ||
                strcmp(x->name, y->name) != 0)
                return 0;
        }
    }
    return 1;
}

/* ---- the begin of a step ------------------------------------------------------------------------------- */

/* Whether gradients must be looked at before the first pass if a step may be skipped: it writes, or does
 * not add them up. */
static int optforge_scans(const optforge_pass *first) {
    for (size_t s = 0; s < first->sum_count; s++)
        if (first->sums[s].slot == OPTFORGE_GRAD)
            return first->writes;
    return 1;
}

/* Counts phases, tensors and leaves, and looks whether anything is added up in this step. */
static int optforge_count(optforge_work *w) {
    const optforge_options *o = w->options;
    optforge_place x = optforge_start;
    size_t whole = 0;
    w->observe = o->stats != NULL || o->tensor_stats != NULL;
    w->adds = w->observe || o->skip_nonfinite;
    w->phases = w->number == 0; /* a step of nothing has a phase, too, which ends it */
    for (size_t i = 0; i < w->number; i++) {
        const optforge_list *l = &w->lists[i];
        const int status = optforge_check_kernel(l->kernel);
        if (status != OPTFORGE_OK)
            return status;
        if (l->tensors == NULL && l->count > 0)
            return OPTFORGE_ERROR_NULL;
        if (w->phases < (int)l->kernel->pass_count)
            w->phases = (int)l->kernel->pass_count;
        w->scan |= o->skip_nonfinite && optforge_scans(&l->kernel->passes[0]);
        for (unsigned p = 0; p < l->kernel->pass_count; p++)
            for (size_t s = 0; s < l->kernel->passes[p].sum_count; s++)
                w->adds |= !l->kernel->passes[p].sums[s].observed;
        w->tensors += l->count;
    }
    w->phases += w->scan;
    while (optforge_next(w, &x)) {
        w->elements = optforge_plus(w->elements, x.n);
        w->own_leaves = optforge_plus(w->own_leaves, optforge_leaves(x.n));
    }
    w->leaves = w->own_leaves;
    if (o->sizes != NULL && w->number > 0) { /* some may be elsewhere */
        w->tensors = o->tensors;
        w->leaves = 0;
        whole = o->tensors > SIZE_MAX / sizeof *o->sizes ? SIZE_MAX : 0;
        for (size_t k = 0; whole < SIZE_MAX && k < o->tensors; k++) {
            whole = optforge_plus(whole, o->sizes[k]);
            w->leaves = optforge_plus(w->leaves, optforge_leaves(o->sizes[k]));
        }
    }
    if (w->elements > SIZE_MAX / sizeof(double) || whole > SIZE_MAX / sizeof(double))
        return OPTFORGE_ERROR_SIZE;
    return OPTFORGE_OK;
}

/* Numbers what each phase adds up: `place` of a slot among all. */
static void optforge_place_sums(optforge_work *w) {
    for (int phase = 0; phase < w->phases; phase++) {
        short *place = w->place[phase];
        memset(place, -1, sizeof w->place[phase]);
        w->phase_sums[phase] = w->sums;
        for (size_t i = 0; i < w->number; i++) {
            const optforge_pass *pass = optforge_pass_of(w, w->lists[i].kernel, phase);
            for (size_t s = 0; pass != NULL && s < pass->sum_count; s++)
                if (place[pass->sums[s].slot] < 0)
                    place[pass->sums[s].slot] = (short)w->sums++;
        }
        if (place[OPTFORGE_GRAD] >= 0) {
            place[OPTFORGE_NAN] = (short)w->sums++;
            place[OPTFORGE_INF] = (short)w->sums++;
        }
    }
    w->phase_sums[w->phases] = w->sums;
}

/* Memory to lay out, in doubles, in which pointers and sizes fit as well. What is beyond it is counted
 * only. */
typedef struct optforge_room {
    void *memory;
    size_t size, used;
} optforge_room;

static void *optforge_take(optforge_room *room, size_t count) {
    const size_t begin = room->used;
    room->used = optforge_plus(begin, count);
    return room->memory != NULL && room->used <= room->size ? (double *)room->memory + begin : NULL;
}

static void optforge_lay_out(optforge_work *w, optforge_room *room) {
    size_t doubles = 0, count = 0;
    int tracks = 0;
    for (size_t i = 0; i < w->number; i++) {
        doubles = optforge_plus(doubles, optforge_row_doubles(&w->lists[i]));
        count += w->lists[i].count;
        tracks |= w->lists[i].steps != NULL;
    }
    w->rows = w->few;
    if (doubles > sizeof w->few / sizeof *w->few)
        w->rows = (double *)optforge_take(room, doubles);
    if (tracks)
        w->row = (size_t *)optforge_take(room, count);
    if (!w->adds)
        return;
    optforge_place_sums(w);
    w->first = (size_t *)optforge_take(room, optforge_plus(w->tensors, 1));
    w->kernels = (const optforge_kernel **)optforge_take(room, w->tensors);
    w->totals = (double *)optforge_take(room, optforge_times(w->number, OPTFORGE_MOST_SUMS));
    w->gathered = (double *)optforge_take(room, w->tensors);
    w->tensor_sums = (double *)optforge_take(room, optforge_times(w->sums, w->tensors));
    w->leaf_sums = (double *)optforge_take(room, optforge_times(w->sums, w->leaves));
}

OPTFORGE_API size_t optforge_workspace_size(const optforge_list *lists, size_t number,
                                            const optforge_options *options) {
    optforge_room room = {NULL, 0, 0};
    optforge_work w;
    if (options == NULL || (lists == NULL && number > 0))
        return 0;
    memset(&w, 0, offsetof(optforge_work, phase_sums));
    w.lists = lists;
    w.number = number;
    w.options = options;
    if (optforge_count(&w) != OPTFORGE_OK)
        return 0;
    optforge_lay_out(&w, &room);
    return optforge_times(room.used, sizeof(double));
}

OPTFORGE_API size_t optforge_kernel_workspace(const optforge_kernel *kernel, uint64_t elements,
                                              size_t count) {
    const size_t whole = elements / OPTFORGE_LEAF < SIZE_MAX ? (size_t)(elements / OPTFORGE_LEAF) : SIZE_MAX;
    const size_t leaves = optforge_plus(whole, count);
    size_t sums = 3, doubles = 1 + OPTFORGE_MOST_SUMS;
    if (optforge_check_kernel(kernel) != OPTFORGE_OK)
        return 0;
    for (unsigned p = 0; p < kernel->pass_count; p++)
        sums += kernel->passes[p].sum_count + 2u;
    doubles = optforge_plus(doubles, optforge_times(optforge_width(kernel) + 5, count));
    doubles = optforge_plus(doubles, optforge_times(sums, optforge_plus(count, leaves)));
    return optforge_times(doubles, sizeof(double));
}

/* What the hyperparameters of a group and t give, in a row. */
static int optforge_begin_row(const optforge_work *w, const optforge_list *l, size_t group, uint64_t t,
                              double *row) {
    const double *hyper = (const double *)l->hyper + group * l->kernel->hypers;
    for (size_t k = 0; k < l->kernel->hypers; k++)
        if (hyper[k] != hyper[k])
            return OPTFORGE_ERROR_NAN;
    if (t == 0)
        return OPTFORGE_ERROR_TIME;
    return l->kernel->begin(row, hyper, t, w->unscale);
}

/* The scalars of a list, from `rows` on; where tensors have counts of their own, `row` tells where those
 * of each are. */
static int optforge_begin_rows(const optforge_work *w, const optforge_list *l, double *rows, size_t *row) {
    const size_t width = optforge_width(l->kernel), groups = optforge_rows(l);
    size_t used = 0;
    int status = OPTFORGE_OK;
    if (l->steps == NULL) {
        for (size_t g = 0; g < groups && status == OPTFORGE_OK; g++)
            status = optforge_begin_row(w, l, g, l->t, rows + g * width);
        return status;
    }
    for (size_t k = 0; k < l->count && status == OPTFORGE_OK; k++) {
        const size_t group = l->group != NULL ? l->group[k] : 0;
        size_t r = used;
        for (; r > 0; r--) { /* the last row is the most likely one */
            const size_t same = (size_t)rows[r * width - 1];

            if (l->steps[same] == l->steps[k] && (l->group == NULL || l->group[same] == group))
                break;
        }
        if (r == 0) {
            r = ++used;
            status = optforge_begin_row(w, l, group, l->steps[k], rows + (r - 1) * width);
            rows[r * width - 1] = (double)k;
        }
        row[k] = (size_t)(rows - w->rows) + (r - 1) * width;
    }
    return status;
}

/* Of each whole tensor, the leaf that it begins at among all, and a kernel that it is stepped with. */
static int optforge_number_leaves(optforge_work *w) {
    optforge_place x = optforge_start;
    size_t leaf = 0;
    for (size_t k = 0; k < w->tensors; k++) {
        w->kernels[k] = w->options->sizes != NULL ? w->lists[0].kernel : NULL;
        w->first[k] = w->options->sizes != NULL ? optforge_leaves(w->options->sizes[k]) : 0;
    }
    while (w->options->sizes == NULL && optforge_next(w, &x)) {
        if (w->kernels[x.number] != NULL)
            return OPTFORGE_ERROR_NUMBER;
        w->kernels[x.number] = x.list->kernel;
        w->first[x.number] = optforge_leaves(x.n);
    }
    for (size_t k = 0; k < w->tensors; k++) {
        const size_t own = w->first[k];
        w->first[k] = leaf;
        leaf += own;
    }
    w->first[w->tensors] = leaf;
    return OPTFORGE_OK;
}

/* All checks of a step, and its first scalars. */
static int optforge_prepare(optforge_work *w) {
    const optforge_options *o = w->options;
    optforge_room room = {NULL, 0, 0};
    optforge_place checked = optforge_start, begun = optforge_start;
    size_t rows = 0, before = 0;
    int status, again = 0;
    w->unscale = 1.0 / o->grad_scale;
    if (!(o->grad_scale > 0.0 && w->unscale > 0.0 && w->unscale - w->unscale == 0.0))
        return OPTFORGE_ERROR_GRAD_SCALE;
    if (o->threads < 0)
        return OPTFORGE_ERROR_THREADS;
    w->set = optforge_set();
    if (w->set < 0)
        return OPTFORGE_ERROR_ISA;
    if (!o->allow_flush && optforge_flushes())
        return OPTFORGE_ERROR_FLUSH;
    status = optforge_count(w);
    if (status != OPTFORGE_OK)
        return status;
    for (size_t i = 0; i < w->number; i++) {
        if (w->lists[i].hyper == NULL && w->lists[i].kernel->hypers > 0)
            return OPTFORGE_ERROR_NULL;
        if (o->sizes != NULL && !optforge_alike(w->lists[i].kernel, w->lists[0].kernel))
            return OPTFORGE_ERROR_PART;
    }
    if (o->workspace != NULL && (uintptr_t)o->workspace % sizeof(double) == 0) {
        room.memory = o->workspace;
        room.size = o->workspace_size / sizeof(double);
    }
    optforge_lay_out(w, &room);
    if (room.used > SIZE_MAX / sizeof(double)) /* more than memory can hold */
        return OPTFORGE_ERROR_WORKSPACE;
    if (room.used > room.size)
        return o->workspace == NULL ? OPTFORGE_ERROR_NULL : OPTFORGE_ERROR_WORKSPACE;
    while (status == OPTFORGE_OK && optforge_next(w, &checked)) {
        status = optforge_check_place(w, &checked);
        if (status == OPTFORGE_OK && !o->checked)
            status = optforge_check_tensor(checked.list->kernel, checked.tensor);
        if (status == OPTFORGE_OK && checked.list->delta != NULL &&
            checked.list->kernel->formats[0] > OPTFORGE_F64)
            status = OPTFORGE_ERROR_DELTA; /* it is for what is stored as it is computed */
        if (status == OPTFORGE_OK && !o->checked && checked.list->delta != NULL)
            status = optforge_check_delta(checked.list->kernel, checked.tensor,
                                          checked.list->delta[checked.k]);
    }
    for (size_t i = 0; i < w->number && status == OPTFORGE_OK; i++) {
        const optforge_list *l = &w->lists[i];
        status = optforge_begin_rows(w, l, w->rows + rows, w->row != NULL ? w->row + before : NULL);
        again |= l->kernel->begin_tensor != NULL;
        rows += optforge_row_doubles(l);
        before += l->count;
    }
    while (again && status == OPTFORGE_OK && optforge_next(w, &begun)) {
        double own[OPTFORGE_MOST_SCALARS];
        const void *scalars;
        status = optforge_scalars(w, &begun, 0, own, &scalars); /* whether those of a tensor have values */
    }
    if (status == OPTFORGE_OK && w->adds)
        status = optforge_number_leaves(w);
    if (status == OPTFORGE_OK && w->adds && o->sizes != NULL) /* of leaves that are elsewhere */
        memset(w->leaf_sums, 0, w->sums * w->leaves * sizeof *w->leaf_sums);
    return status;
}

OPTFORGE_API int optforge_begin(optforge_work *w, const optforge_list *lists, size_t number,
                                const optforge_options *options) {
    uint64_t flush;
    int status;
    if (w == NULL)
        return OPTFORGE_ERROR_NULL;
    memset(w, 0, offsetof(optforge_work, phase_sums)); /* the tables are filled in as far as they are used */
    w->lists = lists;
    w->number = number;
    w->options = options;
    if (options == NULL || (lists == NULL && number > 0))
        return OPTFORGE_ERROR_NULL;
    if (options->size != sizeof *options)
        return OPTFORGE_ERROR_OPTIONS;
    flush = optforge_keep_subnormals(options);
    status = optforge_prepare(w);
    optforge_restore_flush(flush);
    w->begun = status == OPTFORGE_OK ? w : NULL;
    return status;
}

OPTFORGE_API int optforge_check(const optforge_list *lists, size_t number, const optforge_options *options) {
    optforge_work w;
    return optforge_begin(&w, lists, number, options);
}

/* ---- the elements -------------------------------------------------------------------------------------- */

/* What a phase does with the tensors of a kernel. */
typedef struct optforge_span {
    const optforge_kernel *kernel;
    optforge_run run; /* the elements, or NULL */
    int changes;      /* whether p before the pass is asked for */
    int zeroes;
    size_t piece;     /* elements that it does at once */
    int narrow;       /* arrays that are stored in fewer bits than they are computed with, */
    char use[OPTFORGE_MOST_ARRAYS]; /* and what it does with them: optforge_pass.uses */
    int blocks;       /* whether some are in blocks */
    int first, last;  /* whether the pass is the kernel's first, or last */
    size_t lanes;     /* sums that are added up lane by lane */
    size_t sums;      /* with NaN and infinity, which come behind them where they are counted */
    const optforge_sum *sum[OPTFORGE_MOST_SUMS + 2];
    double *leaf_sums[OPTFORGE_MOST_SUMS + 2], *tensor_sums[OPTFORGE_MOST_SUMS + 2];
} optforge_span;

static const optforge_sum optforge_counted[] = {
    {"nan", OPTFORGE_NAN, OPTFORGE_SUM, 1, OPTFORGE_UNSCALED},
    {"inf", OPTFORGE_INF, OPTFORGE_SUM, 1, OPTFORGE_UNSCALED}
};

static void optforge_plan_sum(const optforge_work *w, int phase, const optforge_sum *sum,
                              optforge_span *span) {
    span->sum[span->sums] = sum;
    span->leaf_sums[span->sums] = w->leaf_sums + (size_t)w->place[phase][sum->slot] * w->leaves;
    span->tensor_sums[span->sums] = optforge_sums_of(w, phase, sum->slot);
    span->sums++;
}

/* What is to be converted in a pass, which reads what it adds up as well, and in pieces of what size. */
static void optforge_plan_uses(const optforge_kernel *kernel, const optforge_pass *pass,
                               optforge_span *span) {
    for (size_t a = 0; a < kernel->arrays; a++) {
        const int narrow = optforge_narrow(kernel, a);
        span->narrow += narrow;
        span->blocks |= optforge_is_blocks(kernel->formats[a]);
        span->use[a] = (char)(narrow && span->run != NULL && pass->uses != NULL ? pass->uses[a] : '.');
    }
    if (span->narrow)
        span->piece = OPTFORGE_PIECE; /* what is widened stays in the first cache */
    while (span->piece * (size_t)span->narrow > OPTFORGE_WIDE)
        span->piece /= 2;
    if (span->changes && span->use[0] == 'w')
        span->use[0] = 'b'; /* what p was is asked for */
    for (size_t s = 0; s < span->lanes; s++) {
        const int source = span->sum[s]->source;
        const size_t array = source == OPTFORGE_UNSCALED ? 1 : source > 0 ? (size_t)source : 0;
        if (source > OPTFORGE_SCRATCH && span->use[array] == '.')
            span->use[array] = 'r';
    }
}

static void optforge_plan(const optforge_work *w, int phase, const optforge_kernel *kernel,
                          optforge_span *span) {
    const optforge_pass *pass = optforge_pass_of(w, kernel, phase);
    /* Whether NaN and infinity are counted with gradients, which are not told of again where a scan has
     * been. */
    const int counting = phase == 0 ? w->observe || w->options->skip_nonfinite : w->observe && !w->scan;
    int counts = 0;

    span->kernel = kernel;
    span->run = NULL;
    span->changes = span->narrow = span->blocks = 0;
    span->piece = OPTFORGE_LEAF;
    span->first = phase == w->scan && !w->skipped;
    span->last = phase - w->scan == (int)kernel->pass_count - 1 && !w->skipped;
    span->zeroes = pass != NULL && pass->zeroes && w->options->zero_grads;
    span->lanes = span->sums = 0;
    if (pass == NULL || w->skipped)
        return;
    span->run = (w->observe && pass->observed[0] != NULL ? pass->observed : pass->plain)[w->set];
    for (size_t s = 0; s < pass->sum_count; s++) {
        const optforge_sum *sum = &pass->sums[s];
        const int gradients = sum->slot == OPTFORGE_GRAD;
        if (sum->observed && !(gradients ? counting : w->observe))
            continue;
        optforge_plan_sum(w, phase, sum, span);
        span->changes |= sum->source == OPTFORGE_CHANGE;
        counts |= gradients && counting;
    }
    span->lanes = span->sums;
    if (span->lanes > 0)
        span->piece = OPTFORGE_PIECE; /* it stays in the cache */
    optforge_plan_uses(kernel, pass, span);
    for (size_t c = 0; counts && c < 2; c++)
        optforge_plan_sum(w, phase, &optforge_counted[c], span);
}

/* Counts NaN and infinity among n unscaled gradients. */
static void optforge_count_nonfinite(const optforge_work *w, const optforge_kernel *kernel,
                                     const void *tensor, size_t begin, size_t n, double *nan, double *inf) {
    const void *g = optforge_array(tensor, 1);
    for (size_t i = begin; i < begin + n; i++) {
        const double raw = optforge_read(g, kernel->formats[1], i);
        const double value = optforge_real(kernel) == OPTFORGE_F64 ? raw * w->unscale
                                                                   : (double)((float)raw * (float)w->unscale);
        *nan += value != value;
        *inf += value == value && value - value != 0.0;
    }
}

/* A piece of a tensor where arrays are stored in fewer bits: as a tensor of its own, with those widened. */
typedef struct optforge_wide {
    size_t n;
    void *array[OPTFORGE_MOST_ARRAYS];
    float memory[OPTFORGE_WIDE];
    optforge_map maps[2]; /* of codes with a sign, and without, where there are any */
} optforge_wide;

/* How array `a` is converted: the row of a table of optforge_converts. */
static int optforge_conversion(const optforge_kernel *kernel, size_t a) {
    const int split = a == 0 && kernel->master > 0 && kernel->formats[kernel->master] == OPTFORGE_LOW;
    return split ? 2 : kernel->formats[a] - OPTFORGE_BF16;
}

/* Turns to a piece that is widened, and begins at 0. */
static void optforge_widen(const optforge_work *w, const optforge_span *span, optforge_piece *x,
                           optforge_wide *wide) {
    const optforge_kernel *kernel = span->kernel;
    float *room = wide->memory;
    wide->n = x->n;
    for (size_t a = 0; a < kernel->arrays; a++) {
        char *own = (char *)optforge_array(x->tensor, a);
        void *beside;
        if (kernel->formats[a] != OPTFORGE_SCALAR && own != NULL)
            own += x->begin * optforge_format_size(kernel->formats[a]);
        wide->array[a] = own;
        if (!optforge_narrow(kernel, a) || span->use[a] == '.')
            continue;
        wide->array[a] = room;
        beside = optforge_beside(kernel, x->tensor, a, x->begin);
        if (a == 0 && beside != NULL && kernel->formats[kernel->master] == OPTFORGE_F32)
            wide->array[a] = beside;
        else if (span->use[a] != 'w')
            optforge_converts[0][optforge_conversion(kernel, a)][w->set](own, beside, room, x->n, wide->maps);
        room += span->piece;
    }
    x->tensor = wide;
    x->begin = 0;
}

/* Stores what a pass has written of a widened piece, which begins at element `begin` of `place`. What is
 * added up of it is what is stored. */
static void optforge_store(const optforge_work *w, const optforge_span *span, const optforge_place *place,
                           size_t begin, const optforge_wide *wide) {
    const optforge_kernel *kernel = span->kernel;
    const optforge_list *l = place->list;
    const uint64_t t = l->steps != NULL ? l->steps[place->k] : l->t;
    const uint64_t stream = l->stream != NULL ? l->stream[place->k] : place->number;
    const uint64_t index = (l->part != NULL ? l->part[place->k] : 0) + (uint64_t)begin;
    for (size_t a = 0; a < kernel->arrays; a++) {
        const int row = optforge_conversion(kernel, a);
        uint16_t *stored;
        float *floats = (float *)wide->array[a];
        void *beside;
        if (!optforge_narrow(kernel, a) || span->use[a] == '.' || span->use[a] == 'r')
            continue;
        beside = optforge_beside(kernel, place->tensor, a, begin);
        stored = (uint16_t *)optforge_array(place->tensor, a);
        stored = (uint16_t *)(void *)((char *)stored + optforge_bytes(kernel, begin, a));
        if (beside != NULL) {
            optforge_converts[1][row][w->set](stored, beside, floats, wide->n, wide->maps);
            continue;
        }
        if (!kernel->stochastic)
            optforge_converts[1][row][w->set](stored, NULL, floats, wide->n, NULL);
        for (size_t i = 0, n; kernel->stochastic && i < wide->n; i += n) {
            const optforge_draw draw = optforge_drawing(w->options->seed, t, stream, a, index + i);
            const uint64_t same = UINT64_C(0x100000000) - (uint32_t)(index + i); /* have the same words */
            n = same < wide->n - i ? (size_t)same : wide->n - i;
            optforge_converts[2][row][w->set](stored + i, NULL, floats + i, n, &draw);
        }
        if (span->lanes > 0)
            optforge_converts[0][row][w->set](stored, NULL, floats, wide->n, NULL);
    }
}

/* Adds up what a pass has left of a piece. `old` is p before the pass. */
static void optforge_add_up(const optforge_work *w, const optforge_span *span, const optforge_piece *x,
                            const void *old, double (*lanes)[OPTFORGE_LANES]) {
    const unsigned char real = optforge_real(span->kernel);
    const size_t size = optforge_format_size(real);
    for (size_t s = 0; s < span->lanes; s++) {
        const int source = span->sum[s]->source, kind = source == OPTFORGE_CHANGE ? 3 : span->sum[s]->kind;
        const double scale = source == OPTFORGE_UNSCALED ? w->unscale : 1.0;
        const char *values;
        if (source <= OPTFORGE_SCRATCH) {
            values = (const char *)x->scratch + (size_t)(OPTFORGE_SCRATCH - source) * OPTFORGE_PIECE * size;
        } else {
            const size_t array = source == OPTFORGE_UNSCALED ? 1 : source > 0 ? (size_t)source : 0;
            values = (const char *)optforge_array(x->tensor, array) + x->begin * size;
        }
        optforge_adds[real - OPTFORGE_F32][kind][w->set](lanes[s], values, old, x->n, scale);
    }
}

#define OPTFORGE_LESS(name, real)                                                                           \
    OPTFORGE_INLINE void name(real *OPTFORGE_RESTRICT x, const real *OPTFORGE_RESTRICT p, size_t n) {       \
        for (; n >= OPTFORGE_LANES; n -= OPTFORGE_LANES, x += OPTFORGE_LANES, p += OPTFORGE_LANES)          \
            for (size_t j = 0; j < OPTFORGE_LANES; j++)                                                     \
                x[j] = x[j] - p[j];                                                                         \
        for (size_t j = 0; j < n; j++)                                                                      \
            x[j] = x[j] - p[j];                                                                             \
    }
OPTFORGE_LESS(optforge_less_f32, float)
OPTFORGE_LESS(optforge_less_f64, double)

/* Makes the parameter behind a step, n elements from `begin` on, what the step has added to it. */
static void optforge_subtract(const optforge_kernel *kernel, void *delta, const void *p, size_t begin,
                              size_t n) {
    if (kernel->formats[0] == OPTFORGE_F32)
        optforge_less_f32((float *)delta + begin, (const float *)p + begin, n);
    else
        optforge_less_f64((double *)delta + begin, (const double *)p + begin, n);
}

/* The leaf of a tensor that begins at element `begin`, and is number `leaf` of all leaves that are added
 * up. Where what a step adds to p is asked for instead, `tensor` has the memory for that as its p, and `p` is
 * the parameter; else it is NULL. */
static void optforge_leaf(const optforge_work *w, const optforge_span *span, const optforge_place *place,
                          const void *tensor, const void *p, const void *scalars, void *scratch,
                          size_t begin, size_t leaf, optforge_wide *wide) {
    const optforge_kernel *kernel = span->kernel;
    const size_t n = optforge_least(place->n - begin, OPTFORGE_LEAF), stop = begin + n;
    const size_t size = optforge_format_size(optforge_real(kernel));
    double lanes[OPTFORGE_MOST_SUMS][OPTFORGE_LANES], old[OPTFORGE_PIECE];
    int finite = 1;
    if (p != NULL && span->first)
        memcpy((char *)optforge_array(tensor, 0) + begin * size, (const char *)p + begin * size, n * size);
    for (size_t s = 0; s < span->lanes; s++)
        memset(lanes[s], 0, sizeof lanes[s]);
    for (size_t at = begin; at < stop; at += span->piece) {
        optforge_piece x = {tensor, scalars, at, optforge_least(stop - at, span->piece), scratch};
        if (span->narrow)
            optforge_widen(w, span, &x, wide);
        if (span->changes)
            memcpy(old, (const char *)optforge_array(x.tensor, 0) + x.begin * size, x.n * size);
        if (span->run != NULL)
            span->run(&x);
        if (span->narrow)
            optforge_store(w, span, place, at, wide);
        optforge_add_up(w, span, &x, old, lanes);
    }
    if (p != NULL && span->last)
        optforge_subtract(kernel, optforge_array(tensor, 0), p, begin, n);
    for (size_t s = 0; s < span->lanes; s++) {
        const double total = optforge_fold_lanes(lanes[s], n, span->sum[s]->kind);
        span->leaf_sums[s][leaf] = total;
        finite &= total - total == 0.0 || span->sum[s]->slot != OPTFORGE_GRAD;
    }
    if (span->sums > span->lanes) {
        double nan = 0.0, inf = 0.0;
        if (!finite) /* a sum of squares is where an element is not, or by overflow */
            optforge_count_nonfinite(w, kernel, tensor, begin, n, &nan, &inf);
        span->leaf_sums[span->lanes][leaf] = nan;
        span->leaf_sums[span->lanes + 1][leaf] = inf;
    }
    if (span->zeroes) {
        const size_t bytes = optforge_format_size(kernel->formats[1]);
        memset((char *)optforge_array(tensor, 1) + begin * bytes, 0, n * bytes);
    }
}

/* Where share k of a number of leaves, or of tensors, begins. */
static size_t optforge_split(size_t all, size_t k, size_t parts) {
    return all / parts * k + all % parts * k / parts;
}

OPTFORGE_API void optforge_share(optforge_work *w, int phase, size_t ith, size_t nth) {
    double own[OPTFORGE_MOST_SCALARS], scratch[OPTFORGE_MOST_SCRATCH * OPTFORGE_PIECE];
    double instead[OPTFORGE_MOST_ARRAYS + 1];
    optforge_place x = optforge_start;
    const optforge_list *list = NULL;
    optforge_span span;
    optforge_wide wide;
    size_t from, to;
    uint64_t flush;
    if (w == NULL || w->begun != w || phase != w->due || phase >= w->phases || ith >= nth)
        return;
    from = optforge_split(w->own_leaves, ith, nth);
    to = optforge_split(w->own_leaves, ith + 1, nth);
    flush = optforge_keep_subnormals(w->options);
    while (optforge_next(w, &x) && x.leaf < to) {
        const size_t first = from > x.leaf ? from - x.leaf : 0;
        const size_t last = optforge_least(to - x.leaf, optforge_leaves(x.n));
        const void *scalars = NULL, *tensor = x.tensor, *p = NULL;
        size_t leaf = 0;
        if (x.list != list)
            optforge_plan(w, phase, x.list->kernel, &span);
        if (x.list != list && span.blocks)
            optforge_fill_map(wide.maps, 1), optforge_fill_map(wide.maps + 1, 0);
        list = x.list;
        if (list->delta != NULL && x.n > 0) {
            p = optforge_array(x.tensor, 0);
            tensor = optforge_instead(list->kernel, x.tensor, list->delta[x.k], instead);
        }
        if (first >= last || (span.run == NULL && span.sums == 0 && !span.zeroes && p == NULL))
            continue;
        if (span.run != NULL)
            (void)optforge_scalars(w, &x, (unsigned)(phase - w->scan), own, &scalars);
        if (span.sums > 0)
            leaf = w->first[x.number] + (list->part != NULL ? list->part[x.k] / OPTFORGE_LEAF : 0);
        for (size_t k = first; k < last; k++)
            optforge_leaf(w, &span, &x, tensor, p, scalars, scratch, k * OPTFORGE_LEAF, leaf + k, &wide);
    }
    optforge_restore_flush(flush);
}

/* ---- behind a phase ------------------------------------------------------------------------------------ */

/* Adds up the leaves of share `ith` of the tensors. */
static void optforge_fold_tensors(const optforge_work *w, int phase, size_t ith, size_t nth) {
    const optforge_kernel *kernel = NULL;
    optforge_span span;
    if (!w->adds || w->skipped)
        return;
    for (size_t k = optforge_split(w->tensors, ith, nth); k < optforge_split(w->tensors, ith + 1, nth); k++) {
        if (w->kernels[k] != kernel)
            optforge_plan(w, phase, w->kernels[k], &span);
        kernel = w->kernels[k];
        for (size_t s = 0; s < span.sums; s++) {
            double *leaves = span.leaf_sums[s] + w->first[k];
            const size_t number = w->first[k + 1] - w->first[k];
            span.tensor_sums[s][k] = optforge_tensor_total(leaves, number, span.sum[s]->kind, w->set);
        }
    }
}

/* Where a kernel adds up statistic q, or what it calls like `sum`, for a formula, in phase `due`: by the
 * numbers of its tensors. NULL: nowhere. NaN and infinity are counted with the gradients. */
static const double *optforge_find(const optforge_work *w, const optforge_kernel *kernel, unsigned q,
                                   const optforge_sum *sum) {
    const int counts = q == OPTFORGE_NAN || q == OPTFORGE_INF;
    const unsigned statistic = counts ? (unsigned)OPTFORGE_GRAD : q;
    const unsigned slot = q <= OPTFORGE_INF ? kernel->statistics[statistic] : (unsigned)OPTFORGE_NONE;
    for (int phase = sum != NULL ? w->due : 0; phase < w->phases; phase++) {
        const optforge_pass *pass = optforge_pass_of(w, kernel, phase);
        for (size_t s = 0; pass != NULL && s < pass->sum_count; s++) {
            const optforge_sum *own = &pass->sums[s];
            if (sum == NULL ? own->slot == slot
                            : own->kind == sum->kind && !own->observed && strcmp(own->name, sum->name) == 0)
                return optforge_sums_of(w, phase, counts ? q : own->slot);
        }
        if (sum != NULL || w->skipped) /* which only the first phase was for */
            break;
    }
    return NULL;
}

/* The total over all tensors of statistic q, or of `sum`. */
static double optforge_total(const optforge_work *w, unsigned q, const optforge_sum *sum) {
    const optforge_kernel *kernel = NULL;
    const double *sums = NULL;
    for (size_t k = 0; k < w->tensors; k++) {
        if (w->kernels[k] != kernel)
            sums = optforge_find(w, w->kernels[k], q, sum);
        kernel = w->kernels[k];
        w->gathered[k] = sums != NULL ? sums[k] : 0.0;
    }
    return optforge_tree(w->gathered, w->tensors, sum != NULL ? (int)sum->kind : (int)OPTFORGE_SUM, w->set);
}

/* What a step tells of one tensor, or of all, from its sums. */
static void optforge_tell(const optforge_work *w, const double *sums, optforge_stats *stats) {
    stats->grad_norm = sqrt(sums[OPTFORGE_GRAD]);
    stats->clipped_grad_norm = w->skipped ? (double)NAN : sqrt(sums[OPTFORGE_CLIPPED]);
    stats->param_norm = w->skipped ? (double)NAN : sqrt(sums[OPTFORGE_PARAM]);
    stats->update_norm = w->skipped ? 0.0 : sqrt(sums[OPTFORGE_UPDATE]);
    stats->max_update_ratio = stats->update_norm != 0.0 ? stats->update_norm / stats->param_norm : 0.0;
    stats->nan = (uint64_t)sums[OPTFORGE_NAN];
    stats->inf = (uint64_t)sums[OPTFORGE_INF];
    stats->skipped = (uint64_t)w->skipped;
}

static void optforge_tell_all(const optforge_work *w) {
    const optforge_options *o = w->options;
    const optforge_kernel *kernel = NULL;
    const double *sums[OPTFORGE_TOLD] = {NULL};
    double all[OPTFORGE_TOLD] = {0.0}, largest = 0.0;
    for (size_t k = 0; k < w->tensors; k++) {
        double own[OPTFORGE_TOLD];
        optforge_stats told;
        for (unsigned q = 0; w->kernels[k] != kernel && q < OPTFORGE_TOLD; q++)
            sums[q] = optforge_find(w, w->kernels[k], q, NULL);
        kernel = w->kernels[k];
        for (unsigned q = 0; q < OPTFORGE_TOLD; q++)
            own[q] = sums[q] != NULL ? sums[q][k] : 0.0;
        optforge_tell(w, own, &told);
        if (largest == largest && !(told.max_update_ratio <= largest)) /* NaN stays */
            largest = told.max_update_ratio;
        all[OPTFORGE_NAN] += own[OPTFORGE_NAN];
        all[OPTFORGE_INF] += own[OPTFORGE_INF];
        if (o->tensor_stats != NULL)
            o->tensor_stats[k] = told;
    }
    if (o->stats != NULL) {
        for (unsigned q = OPTFORGE_GRAD; q <= OPTFORGE_UPDATE; q++)
            all[q] = optforge_total(w, q, NULL);
        optforge_tell(w, all, o->stats);
        o->stats->max_update_ratio = largest;
    }
}

/* The totals behind a pass, and the scalars that follow from them. */
static void optforge_go_on(optforge_work *w, int phase) {
    double *rows = w->rows, *totals = w->totals;
    for (size_t i = 0; i < w->number; i++) {
        const optforge_list *l = &w->lists[i];
        const optforge_kernel *kernel = l->kernel;
        const optforge_pass *pass = optforge_pass_of(w, kernel, phase);
        const int alike = i > 0 && optforge_alike(kernel, w->lists[0].kernel);
        for (size_t s = 0; pass != NULL && s < pass->sum_count; s++) {
            const unsigned slot = pass->sums[s].slot;
            if (!pass->sums[s].observed)
                totals[slot] = alike ? w->totals[slot] : optforge_total(w, slot, &pass->sums[s]);
        }
        for (size_t r = 0; pass != NULL && kernel->behind_step != NULL && r < optforge_rows(l); r++)
            kernel->behind_step(rows + r * optforge_width(kernel), (unsigned)(phase - w->scan), totals);
        rows += optforge_row_doubles(l);
        totals += OPTFORGE_MOST_SUMS;
    }
}

/* The first array of a kernel that is scalar state. */
static size_t optforge_first_scalar(const optforge_kernel *kernel) {
    size_t a = 0;
    while (a + 1 < kernel->arrays && kernel->formats[a] != OPTFORGE_SCALAR)
        a++;
    return a;
}

/* Decides, and goes on, behind a phase whose tensors are added up; the status of the step behind the last. */
static int optforge_fold_all(optforge_work *w, int phase) {
    optforge_place x = optforge_start;
    const void *advanced = NULL; /* scalar state that has */
    double nonfinite = 0.0;
    if (phase == 0 && w->options->skip_nonfinite && w->sums > 0) {
        for (size_t k = 0; k < w->tensors; k++)
            nonfinite += optforge_sums_of(w, 0, OPTFORGE_NAN)[k] + optforge_sums_of(w, 0, OPTFORGE_INF)[k];
        w->skipped = nonfinite > 0.0;
    }
    if (w->adds && !w->skipped && phase >= w->scan)
        optforge_go_on(w, phase);
    w->due = phase + 1;
    if (w->due < w->phases)
        return OPTFORGE_OK;
    if (w->observe)
        optforge_tell_all(w);
    if (w->skipped)
        return OPTFORGE_SKIPPED;
    while (optforge_next(w, &x)) {
        const optforge_kernel *kernel = x.list->kernel;
        double own[OPTFORGE_MOST_SCALARS];
        const void *scalars, *state;
        if (kernel->finish == NULL)
            continue;
        state = optforge_array(x.tensor, optforge_first_scalar(kernel));
        if (state != advanced) { /* else this is another part of the tensor before */
            (void)optforge_scalars(w, &x, kernel->pass_count, own, &scalars);
            kernel->finish(scalars, x.tensor);
        }
        advanced = state;
    }
    if (w->options->applied != NULL)
        ++*w->options->applied;
    return OPTFORGE_OK;
}

OPTFORGE_API int optforge_fold(optforge_work *w, int phase) {
    uint64_t flush;
    int status;
    if (w == NULL)
        return OPTFORGE_ERROR_NULL;
    if (w->begun != w || phase != w->due || phase >= w->phases)
        return OPTFORGE_ERROR_ORDER;
    flush = optforge_keep_subnormals(w->options);
    optforge_fold_tensors(w, phase, 0, 1);
    status = optforge_fold_all(w, phase);
    optforge_restore_flush(flush);
    return status;
}

OPTFORGE_API double *optforge_partials(const optforge_work *w, int phase, size_t *number) {
    if (number == NULL)
        return NULL;
    *number = 0;
    if (w == NULL || w->begun != w || phase < 0 || phase >= w->phases || w->sums == 0)
        return NULL;
    *number = (w->phase_sums[phase + 1] - w->phase_sums[phase]) * w->leaves;
    return w->leaf_sums + w->phase_sums[phase] * w->leaves;
}

/* ---- a step -------------------------------------------------------------------------------------------- */

/* How many shares a step is worth: of the caller's threads, or of OpenMP's. */
static size_t optforge_shares(const optforge_work *w) {
    const size_t worth = 1 + w->elements / OPTFORGE_THREAD_SIZE;
    size_t most = w->options->parallel != NULL ? 256 : 1;
    if (w->options->threads > 0)
        most = (size_t)w->options->threads;
#ifdef _OPENMP
    else if (w->options->parallel == NULL && worth > 1)
        most = (size_t)omp_get_max_threads();
#endif
    return optforge_least(optforge_least(most, OPTFORGE_MOST_SHARES), worth);
}

static void optforge_run_due(void *work, size_t k, size_t shares) {
    optforge_share((optforge_work *)work, ((optforge_work *)work)->due, k, shares);
}

OPTFORGE_API int optforge_step_lists(const optforge_list *lists, size_t number,
                                     const optforge_options *options) {
    optforge_work w;
    int status = optforge_begin(&w, lists, number, options);
    const size_t shares = status == OPTFORGE_OK ? optforge_shares(&w) : 0;
    if (status != OPTFORGE_OK)
        return status;
#ifdef _OPENMP
    if (options->parallel == NULL && shares > 1) {
        const int last = w.phases - 1;
        const uint64_t before = optforge_keep_subnormals(options);
#pragma omp parallel num_threads((int)shares)
        {
            const size_t k = (size_t)omp_get_thread_num(), all = (size_t)omp_get_num_threads();
            const uint64_t flush = optforge_keep_subnormals(options);
            for (int phase = 0; phase <= last; phase++) {
                optforge_share(&w, phase, k, all);
                if (w.adds) {
#pragma omp barrier
                    optforge_fold_tensors(&w, phase, k, all);
                }
                if (phase < last) {
#pragma omp barrier
#pragma omp single
                    (void)optforge_fold_all(&w, phase);
                }
            }
            optforge_restore_flush(flush);
        }
        status = optforge_fold_all(&w, last);
        optforge_restore_flush(before);
        return status;
    }
#endif
    for (int phase = 0; phase < w.phases; phase++) {
        if (options->parallel != NULL && shares > 1)
            options->parallel(options->pool, shares, optforge_run_due, &w);
        else
            optforge_share(&w, phase, 0, 1);
        status = optforge_fold(&w, phase);
    }
    return status;
}

OPTFORGE_API int optforge_step(const optforge_kernel *kernel, const void *hyper, uint64_t t,
                               const void *tensors, size_t count, const optforge_options *options) {
    optforge_list list;
    memset(&list, 0, sizeof list);
    list.kernel = kernel;
    list.hyper = hyper;
    list.t = t;
    list.tensors = tensors;
    list.count = count;
    return optforge_step_lists(&list, 1, options);
}

OPTFORGE_API int optforge_plain_step(const optforge_kernel *kernel, const void *hyper, uint64_t t,
                                     const void *tensors, size_t count, void *workspace) {
    optforge_options o;
    optforge_options_init(&o);
    o.workspace = workspace;
    o.workspace_size = SIZE_MAX;
    return optforge_step(kernel, hyper, t, tensors, count, &o);
}

/* ---- the self-test ------------------------------------------------------------------------------------- */

enum {
    OPTFORGE_TEST_STEPS = 3,
    OPTFORGE_TEST_SIZE = 164,    /* elements at most: four rows of lanes, one, and a part of one */
    OPTFORGE_TEST_ARRAYS = 4096, /* doubles for all of them, and for sums and scalars */
    OPTFORGE_TEST_SUMS = 2048
};

static uint64_t optforge_hash(uint64_t hash, double value) {
    uint64_t bits = 0x7ff8000000000000u; /* any NaN */
    if (value == value)
        memcpy(&bits, &value, sizeof bits);
    hash ^= bits;
    return (hash << 29 | hash >> 35) * 0x9e3779b97f4a7c15u;
}

/* Numbers from -1 to 1, of 24 bits; each sixteenth is a small multiple of the least one that there is. */
static uint32_t optforge_fill(void *array, unsigned char format, size_t n, uint32_t x, double tiny) {
    for (size_t i = 0; i < n; i++) {
        x = x * 1664525u + 1013904223u;
        optforge_write(array, format, i,
                     i % 16 == 5 ? (x >> 24) * tiny : (x >> 8) / 8388608.0 - 1.0);
    }
    return x;
}

/* The three leading bits of a number, whose powers are exact: they are the same with any math library. */
static double optforge_coarse(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits &= 0xfffc000000000000u;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A training of one tensor with an instruction set: what parameter, state and statistics hash to. The
 * hyperparameters are the defaults, coarse ones where the rule takes them. */
static int optforge_replay(const optforge_kernel *kernel, int set, uint64_t *hash) {
    const int doubles = optforge_real(kernel) == OPTFORGE_F64;
    const double tiny = doubles ? DBL_MIN * DBL_EPSILON : (double)FLT_MIN * (double)FLT_EPSILON;
    const size_t n = optforge_least(OPTFORGE_TEST_SIZE, OPTFORGE_TEST_ARRAYS / kernel->arrays);
    double hyper[OPTFORGE_MOST_SCALARS], tensor[OPTFORGE_MOST_ARRAYS + 1];
    double memory[OPTFORGE_TEST_ARRAYS], workspace[OPTFORGE_TEST_SUMS];
    unsigned char starting = 1;
    uint32_t x = 1;
    optforge_stats stats;
    optforge_options o;
    optforge_list list;
    optforge_work w;
    int status;
    if (kernel->hypers > OPTFORGE_MOST_SCALARS)
        return OPTFORGE_ERROR_ABI;
    memcpy(tensor, &n, sizeof n);
    for (size_t a = 0; a < kernel->arrays; a++) {
        void *const array = memory + a * n;
        memcpy((char *)tensor + sizeof n + a * sizeof array, &array, sizeof array);
    }
    optforge_options_init(&o);
    o.stats = &stats;
    o.workspace = workspace;
    o.workspace_size = sizeof workspace;
    memset(&list, 0, sizeof list);
    list.kernel = kernel;
    list.hyper = hyper;
    list.t = 1;
    list.tensors = tensor;
    list.count = 1;
    list.starting = &starting;
    for (size_t k = 0; k < kernel->hypers; k++)
        hyper[k] = optforge_coarse(kernel->hyper_defaults[k]);
    memset(memory, 0, sizeof memory);
    x = optforge_fill(memory, kernel->formats[0], n, x, tiny);
    x = optforge_fill(memory + n, kernel->formats[1], n, x, tiny);
    optforge_state_init(kernel, tensor, hyper);
    status = optforge_begin(&w, &list, 1, &o);
    if (status == OPTFORGE_ERROR_SCALAR || status >= OPTFORGE_ERROR_ASSERT) {
        memcpy(hyper, kernel->hyper_defaults, kernel->hypers * sizeof *hyper);
        optforge_state_init(kernel, tensor, hyper);
    }
    for (*hash = 0; list.t <= OPTFORGE_TEST_STEPS; list.t++, starting = 0) {
        status = optforge_begin(&w, &list, 1, &o);
        if (status != OPTFORGE_OK)
            return status;
        w.set = set;
        for (int phase = 0; phase < w.phases; phase++) {
            optforge_share(&w, phase, 0, 1);
            status = optforge_fold(&w, phase);
        }
        *hash = optforge_hash(*hash, stats.grad_norm);
        *hash = optforge_hash(*hash, stats.clipped_grad_norm);
        *hash = optforge_hash(*hash, stats.param_norm);
        *hash = optforge_hash(*hash, stats.update_norm);
        x = optforge_fill(memory + n, kernel->formats[1], n, x, tiny);
    }
    for (size_t a = 0; a < kernel->arrays; a++)
        for (size_t i = 0; a != 1 && i < optforge_count_of(kernel, n, a); i++)
            *hash = optforge_hash(*hash, optforge_read(memory + a * n, kernel->formats[a], i));
    return status;
}

OPTFORGE_API int optforge_selftest(const optforge_kernel *kernel) {
    int status = optforge_check_kernel(kernel);
    uint64_t expected = status == OPTFORGE_OK ? kernel->golden : 0;
    optforge_options o;
    uint64_t flush;
    if (status != OPTFORGE_OK)
        return status;
    optforge_options_init(&o);
    flush = optforge_keep_subnormals(&o);
    for (int set = 0; set < OPTFORGE_SETS && status == OPTFORGE_OK; set++) {
        uint64_t found;
        if (!optforge_has(set))
            continue;
        status = optforge_replay(kernel, set, &found);
        if (expected == 0)
            expected = found;
        if (status == OPTFORGE_OK && found != expected)
            status = OPTFORGE_ERROR_SELFTEST;
    }
    optforge_restore_flush(flush);
    return status;
}

/* ---- small things -------------------------------------------------------------------------------------- */

OPTFORGE_API void optforge_options_init(optforge_options *o) {
    memset(o, 0, sizeof *o);
    o->size = sizeof *o;
    o->grad_scale = 1.0;
}

OPTFORGE_API void optforge_state_init(const optforge_kernel *kernel, const void *tensor, const void *hyper) {
    const unsigned char *formats = kernel->formats;
    const size_t end = optforge_scales(kernel);
    optforge_map maps[2];
    if (end < kernel->arrays)
        optforge_fill_map(maps, 1), optforge_fill_map(maps + 1, 0);
    for (size_t a = 2; a < end; a++) {
        static const optforge_initial as_p = {OPTFORGE_FROM_P, 0.0};
        const optforge_initial *initial = a == kernel->master ? &as_p : &kernel->initial[a - 2];
        const double value = initial->from >= 0 ? ((const double *)hyper)[initial->from] : initial->value;
        const size_t n = optforge_count_of(kernel, optforge_elements(tensor), a);
        const size_t other = initial->from == OPTFORGE_FROM_G; /* the array that it may be a copy of */
        const int copied = other == 1 || initial->from == OPTFORGE_FROM_P;
        void *const state = optforge_array(tensor, a), *const from = optforge_array(tensor, other);
        if (formats[a] == OPTFORGE_LOW && n > 0)
            memset(state, 0, n * sizeof(uint16_t)); /* p leaves nothing at first */
        for (size_t i = 0; optforge_is_blocks(formats[a]) && i < n; i += OPTFORGE_BLOCK) {
            const size_t own = optforge_least(n - i, OPTFORGE_BLOCK);
            float floats[OPTFORGE_BLOCK];
            for (size_t k = 0; k < own; k++)
                floats[k] = (float)(copied ? optforge_read(from, formats[other], i + k) : value);
            optforge_converts[1][optforge_conversion(kernel, a)][0](
                (uint8_t *)state + i, optforge_beside(kernel, tensor, a, i), floats, own, maps);
        }
        for (size_t i = 0; formats[a] < OPTFORGE_LOW && i < n; i++)
            optforge_write(state, formats[a], i, copied ? optforge_read(from, formats[other], i) : value);
    }
}

OPTFORGE_API int optforge_range(const optforge_kernel *kernel, const void *tensor, size_t begin, size_t n,
                                 void *range) {
    const int status = optforge_check_kernel(kernel);
    double memory[OPTFORGE_MOST_ARRAYS + 1];
    if (status != OPTFORGE_OK)
        return status;
    if (tensor == NULL || range == NULL)
        return OPTFORGE_ERROR_NULL;
    if (begin > optforge_elements(tensor) || n > optforge_elements(tensor) - begin)
        return OPTFORGE_ERROR_PART;
    if (optforge_scales(kernel) < kernel->arrays && /* blocks are whole */
        (begin % OPTFORGE_LEAF != 0 || (n % OPTFORGE_LEAF != 0 && begin + n != optforge_elements(tensor))))
        return OPTFORGE_ERROR_PART;
    memcpy(memory, &n, sizeof n);
    for (size_t a = 0; a < kernel->arrays; a++) {
        char *array = (char *)optforge_array(tensor, a);
        if (array != NULL && kernel->formats[a] != OPTFORGE_SCALAR)
            array += optforge_bytes(kernel, begin, a);
        memcpy((char *)memory + sizeof n + a * sizeof array, &array, sizeof array);
    }
    memcpy(range, memory, sizeof n + kernel->arrays * sizeof(void *));
    return OPTFORGE_OK;
}

OPTFORGE_API size_t optforge_state_size(const optforge_kernel *kernel, size_t n) {
    size_t bytes = 0;
    if (optforge_check_kernel(kernel) != OPTFORGE_OK)
        return 0;
    for (size_t a = 2; a < kernel->arrays; a++) {
        const size_t count = optforge_count_of(kernel, n, a);
        bytes = optforge_plus(bytes, optforge_times(count, optforge_format_size(kernel->formats[a])));
    }
    return bytes;
}

OPTFORGE_API const char *optforge_strerror(int status) {
    static const char *const texts[] = {
        "done",
        "a pointer is NULL",
        "a tensor has more elements than memory can hold",
        "an array is not aligned to its elements",
        "two arrays of a tensor overlap",
        "t counts the steps from 1",
        "a hyperparameter is NaN",
        "a scalar has no value: division by zero, overflow, root of a negative number",
        "grad_scale is not a positive number with a finite inverse",
        "the workspace is too small, or not aligned to doubles",
        "a part is not in its tensor, or begins or ends inside a leaf of 1024 elements",
        "a tensor's group is none of the groups",
        "a tensor's number is none of the tensors, or two have the same",
        "a kernel is of another version of optforge, or asks for more than the runtime has",
        "the options are of another version: fill them in with optforge_options_init",
        "OPTFORGE_ISA, or the argument of optforge_use, is no instruction set of this machine",
        "this program flushes subnormal numbers to zero, which changes the results",
        "optforge_begin was not called, or this phase is not the one that is due",
        "this build computes other bits than it should: compile without flags that change arithmetic",
        "there is no memory for the state, or for the workspace",
        "options.threads is negative",
        "delta is for parameters that are float or double"
    };

    if (status == OPTFORGE_SKIPPED)
        return "a gradient is NaN or infinite, so nothing was changed, and t does not advance";
    if (status >= OPTFORGE_ERROR_ASSERT)
        return "the hyperparameters break an assert of the rule";
    return status >= 0 && (size_t)status < sizeof texts / sizeof *texts ? texts[status] : "unknown status";
}

OPTFORGE_API const char *optforge_kernel_strerror(const optforge_kernel *kernel, int status) {
    for (int k = 0; kernel != NULL && kernel->asserts[k] != NULL; k++)
        if (status == OPTFORGE_ERROR_ASSERT + k)
            return kernel->asserts[k];
    return kernel != NULL && status >= OPTFORGE_ERROR_ASSERT ? "unknown status" : optforge_strerror(status);
}

#define OPTFORGE_COMPILE_END
#include "optforge.h"
