/* timing.c: steps of a kernel, the streams of its phases and its divider, each timed by the same clock.
 *
 * A profile compiles it beside the kernel that it measures. Nothing here depends on the rule.
 */
#define _POSIX_C_SOURCE 200112L
#include "optforge.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define OPTFORGE_COMPILE
#include "optforge.h"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
#endif

enum { LEAF = OPTFORGE_LEAF, MOST_PHASES = OPTFORGE_MOST_PASSES + 2 };

typedef void (*profile_step)(void *context);
typedef void (*profile_pass)(void *const *arrays, size_t begin, size_t n, uint64_t *seen);
typedef void (*profile_divide)(const void *from, void *to, size_t n);

static double seconds(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Seconds per step of each of up to `count` batches of steps; gives how many were done when `most` seconds were over,
 * one at least. What the caches held is written over before each where there are bytes to evict it with. */
size_t profile_time(profile_step step, void *context, size_t batch, size_t count, double most, unsigned char *evict,
                    size_t bytes, double *times) {
    const double start = seconds();
    size_t k = 0;

    while (k < count) {
        double begun, ended;

        for (size_t i = 0; i < bytes; i += 64)
            evict[i]++;
        begun = seconds();
        for (size_t j = 0; j < batch; j++)
            step(context);
        ended = seconds();
        times[k++] = (ended - begun) / (double)batch;
        if (ended - start > most)
            break;
    }
    return k;
}

/* ---- the kernel ---- */

typedef struct kernel_steps {
    optforge_list list;
    optforge_options options;
    optforge_stats stats;
    int status;
} kernel_steps;

/* A kernel over tensors whose state is initialised here; with `phase` it unscales, looks for what is not finite, and
 * takes statistics. NULL: there is no memory. */
void *profile_open(const void *kernel, const double *hyper, const void *tensors, size_t count, int threads, int phase) {
    kernel_steps *s = (kernel_steps *)calloc(1, sizeof *s);
    const optforge_kernel *k = (const optforge_kernel *)kernel;
    const size_t stride = sizeof(size_t) + k->arrays * sizeof(void *);

    if (s == NULL)
        return NULL;
    s->list.kernel = k;
    s->list.hyper = hyper;
    s->list.tensors = tensors;
    s->list.count = count;
    optforge_options_init(&s->options);
    s->options.threads = threads;
    if (phase) {
        s->options.grad_scale = 1024.0;
        s->options.skip_nonfinite = 1;
        s->options.stats = &s->stats;
    }
    s->options.workspace_size = optforge_workspace_size(&s->list, 1, &s->options);
    s->options.workspace = s->options.workspace_size ? malloc(s->options.workspace_size) : NULL;
    if (s->options.workspace_size && s->options.workspace == NULL) {
        free(s);
        return NULL;
    }
    for (size_t j = 0; j < count; j++)
        optforge_state_init(k, (const char *)tensors + j * stride, hyper);
    return s;
}

void profile_close(void *context) {
    free(((kernel_steps *)context)->options.workspace);
    free(context);
}

void profile_kernel_step(void *context) {
    kernel_steps *s = (kernel_steps *)context;
    int status;

    s->list.t++;
    status = optforge_step_lists(&s->list, 1, &s->options);
    if (status != OPTFORGE_OK)
        s->status = status;
    s->options.checked = 1;
}

int profile_status(const void *context) { return ((const kernel_steps *)context)->status; }

/* Seconds of each phase of one step; gives how many there are, or minus a status. */
int profile_phases(void *context, size_t shares, double *times) {
    kernel_steps *s = (kernel_steps *)context;
    optforge_work work;
    int status, phases;

    memset(&work, 0, sizeof work);
    s->list.t++;
    status = optforge_begin(&work, &s->list, 1, &s->options);
    phases = work.phases;
    for (int phase = 0; status == OPTFORGE_OK && phase < phases; phase++) {
        const double begun = seconds();

#ifdef _OPENMP
#pragma omp parallel for num_threads((int)shares) schedule(static, 1) if (shares > 1)
#endif
        for (size_t k = 0; k < shares; k++)
            optforge_share(&work, phase, k, shares);
        status = optforge_fold(&work, phase);
        times[phase] = seconds() - begun;
    }
    return status == OPTFORGE_OK ? phases : -status;
}

/* ---- its streams ---- */

typedef struct streams {
    const size_t *tensors; /* rows: elements, then addresses */
    size_t stride, count, shares, passes;
    profile_pass pass[MOST_PHASES];
    size_t *first, *begin; /* of each share, and behind the last: a tensor, and an element of it */
    uint64_t *seen;
} streams;

/* The passes over the same tensors, in equal shares of leaves. */
void *profile_open_streams(const void *tensors, size_t arrays, size_t count, size_t shares, size_t passes,
                           const profile_pass *pass) {
    streams *s = (streams *)calloc(1, sizeof *s);
    size_t leaves = 0, before = 0, share = 0;

    if (s == NULL || passes > MOST_PHASES)
        return free(s), NULL;
    s->tensors = (const size_t *)tensors;
    s->stride = 1 + arrays;
    s->count = count;
    s->shares = shares;
    s->passes = passes;
    memcpy(s->pass, pass, passes * sizeof *pass);
    s->first = (size_t *)calloc(shares + 1, sizeof(size_t));
    s->begin = (size_t *)calloc(shares + 1, sizeof(size_t));
    s->seen = (uint64_t *)calloc(8 * shares, sizeof(uint64_t));
    for (size_t k = 0; k < count; k++)
        leaves += (s->tensors[k * s->stride] + LEAF - 1) / LEAF;
    for (size_t k = 0; k < count; k++) {
        const size_t own = (s->tensors[k * s->stride] + LEAF - 1) / LEAF;

        for (; share < shares && leaves * share / shares < before + own; share++) {
            s->first[share] = k;
            s->begin[share] = (leaves * share / shares - before) * LEAF;
        }
        before += own;
    }
    for (; share <= shares; share++)
        s->first[share] = count;
    return s;
}

void profile_close_streams(void *context) {
    streams *s = (streams *)context;

    free(s->first);
    free(s->begin);
    free(s->seen);
    free(s);
}

static void share_of_streams(const streams *s, profile_pass pass, size_t share) {
    uint64_t seen = 0;

    for (size_t k = s->first[share]; k < s->count && k <= s->first[share + 1]; k++) {
        const size_t *row = s->tensors + k * s->stride;
        const size_t begin = k == s->first[share] ? s->begin[share] : 0;
        const size_t end = k == s->first[share + 1] ? s->begin[share + 1] : row[0];

        if (begin < end)
            pass((void *const *)(row + 1), begin, end - begin, &seen);
    }
    s->seen[8 * share] ^= seen;
}

void profile_streams_step(void *context) {
    streams *s = (streams *)context;

    if (s->shares == 1) {
        for (size_t p = 0; p < s->passes; p++)
            share_of_streams(s, s->pass[p], 0);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads((int)s->shares)
#endif
    for (size_t p = 0; p < s->passes; p++) {
#ifdef _OPENMP
#pragma omp for schedule(static, 1)
#endif
        for (size_t k = 0; k < s->shares; k++)
            share_of_streams(s, s->pass[p], k);
    }
}

/* ---- its divider ---- */

typedef struct divider {
    profile_divide divide;
    double data[2 * LEAF]; /* a leaf to read, and one to write */
} divider;

enum { DIVIDED_LEAVES = 16 }; /* in a step */

void *profile_open_divider(profile_divide divide, int single) {
    divider *d = (divider *)calloc(1, sizeof *d);

    if (d == NULL)
        return NULL;
    d->divide = divide;
    for (size_t k = 0; k < LEAF; k++) {
        const double value = 1.0 + (double)(k * 37 % LEAF) / LEAF;

        if (single)
            ((float *)d->data)[k] = (float)value;
        else
            d->data[k] = value;
    }
    return d;
}

void profile_close_divider(void *context) { free(context); }

void profile_divider_step(void *context) {
    divider *d = (divider *)context;

    for (size_t j = 0; j < DIVIDED_LEAVES; j++)
        d->divide(d->data, d->data + LEAF, LEAF);
}

/* ---- the machine ---- */

typedef struct bandwidth {
    int kind; /* 0: read, 1: copy, 2: triad */
    size_t shares, n, set, repeats;
    double *data; /* three arrays of n, for each share */
    double seen;
} bandwidth;

OPTFORGE_INLINE void move(int kind, double *OPTFORGE_RESTRICT a, const double *OPTFORGE_RESTRICT b,
                          const double *OPTFORGE_RESTRICT c, size_t n, uint64_t *seen) {
    if (kind == 0) {
        uint64_t x[64] = {0}; /* n is a multiple of 64 */

        for (size_t i = 0; i < n; i += 64)
            for (size_t j = 0; j < 64; j++)
                x[j] ^= ((const uint64_t *)(const void *)b)[i + j];
        for (size_t j = 0; j < 64; j++)
            *seen ^= x[j];
    } else if (kind == 1) {
        for (size_t i = 0; i < n; i++)
            a[i] = b[i] + 0.0;
    } else {
        for (size_t i = 0; i < n; i++)
            a[i] = b[i] + 3.0 * c[i];
    }
}
OPTFORGE_EACH_SET(move, (int kind, double *a, const double *b, const double *c, size_t n, uint64_t *seen),
                  move(kind, a, b, c, n, seen))

/* Each step does as often as makes some MB. */
void *profile_open_bandwidth(int kind, size_t shares, size_t n, size_t set, double *data) {
    bandwidth *w = (bandwidth *)calloc(1, sizeof *w);

    if (w == NULL)
        return NULL;
    w->kind = kind;
    w->shares = shares;
    w->n = n;
    w->set = set;
    w->repeats = 1 + (1 << 18) / (3 * n + 1);
    w->data = data;
    return w;
}

void profile_close_bandwidth(void *context) { free(context); }

double profile_bandwidth_repeats(const void *context) { return (double)((const bandwidth *)context)->repeats; }

static void share_of_bandwidth(const bandwidth *w, size_t share) {
    static void (*const moves[OPTFORGE_SETS])(int, double *, const double *, const double *, size_t, uint64_t *) =
            OPTFORGE_OF_SETS(move);
    static volatile uint64_t sink;
    double *own = w->data + 3 * w->n * share;
    uint64_t seen = 0;

    for (size_t k = 0; k < w->repeats; k++)
        moves[w->set](w->kind, own, own + w->n, own + 2 * w->n, w->n, &seen);
    if (seen == 1)
        sink = seen;
}

void profile_bandwidth_step(void *context) {
    const bandwidth *w = (const bandwidth *)context;

#ifdef _OPENMP
    if (w->shares > 1) {
#pragma omp parallel for num_threads((int)w->shares) schedule(static, 1)
        for (size_t k = 0; k < w->shares; k++)
            share_of_bandwidth(w, k);
        return;
    }
#endif
    for (size_t k = 0; k < w->shares; k++)
        share_of_bandwidth(w, k);
}

#define OPTFORGE_COMPILE_END
#include "optforge.h"
