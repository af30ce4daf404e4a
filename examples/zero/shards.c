/* ZeRO, the optimizer's part of it: each of RANKS ranks holds the state of its shard of every matrix, 768 * 768 / 8 =
 * 73,728 elements, and steps that. Clipping is by the norm of all gradients on all ranks; one gradient that is not
 * finite makes all ranks skip. Ranks are threads with memory of their own, which meet to add up and to gather.
 *
 *     shards RANKS     prints norms, and a hash of parameters and moments: the same on any number of ranks
 *     shards own       the same with an AdamW that is written here, over whole matrices
 *     shards time      the time of a step with each, alternating
 */
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* glue: begin */
#include "zero_adamw.h"
/* glue: end */

enum { MOST_RANKS = 8, TENSORS = 3, STEPS = 4, SIDE = 768, BAD_STEP = 3 };

static const size_t sizes[TENSORS] = {SIDE * SIDE, SIDE * SIDE, SIDE}; /* two matrices, and a row for one rank alone */

typedef struct { /* what a rank holds */
    size_t rank, ranks, count;
    float *memory;
    /* glue: begin */
    zero_adamw_tensor_f32 tensors[TENSORS];
    size_t number[TENSORS], part[TENSORS]; /* of which tensor each is a part, and where in it that begins */
    zero_adamw_stats stats;
    /* glue: end */
} shard;

static shard shards[MOST_RANKS];
static pthread_barrier_t meeting;
static double *reduced[MOST_RANKS];

/* Adds up `sums` over all ranks, as MPI_Allreduce or ncclAllReduce does. */
static void all_reduce(size_t rank, size_t ranks, double *sums, size_t n)
{
    reduced[rank] = sums;
    pthread_barrier_wait(&meeting);
    for (size_t i = n * rank / ranks; i < n * (rank + 1) / ranks; i++) {
        double sum = 0.0;

        for (size_t r = 0; r < ranks; r++)
            sum += reduced[r][i];
        for (size_t r = 0; r < ranks; r++)
            reduced[r][i] = sum;
    }
    pthread_barrier_wait(&meeting);
}

static float noise(uint32_t stream, uint32_t element)
{
    uint32_t x = element + stream * 0x9e3779b9u;

    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    x = x ^ x >> 16;
    return (float)(x >> 8) / 16777216.0f - 0.5f;
}

static uint32_t stream_of(size_t tensor, int step) { return (uint32_t)(step * TENSORS) + (uint32_t)tensor; }

/* The gradients of a step, of `n` elements from `begin` on. */
static void fill_gradients(float *g, size_t tensor, int step, size_t begin, size_t n)
{
    for (size_t i = 0; i < n; i++)
        g[i] = noise(stream_of(tensor, step), (uint32_t)(begin + i));
    if (step == BAD_STEP && tensor == 1 && begin + n == sizes[1])
        g[n - 1] = NAN; /* on one rank only */
}

/* What a rank steps: its shard of each tensor. A tensor that has no leaf for each rank is the first rank's. */
static void shard_init(shard *s, size_t rank, size_t ranks)
{
    *s = (shard){.rank = rank, .ranks = ranks};
    s->memory = (float *)calloc(4 * (2 * SIDE * SIDE / ranks + SIDE + 4096), sizeof(float));
    if (s->memory == NULL)
        exit(1);
    float *next = s->memory;
    for (size_t k = 0; k < TENSORS; k++) {
        const size_t leaves = sizes[k] / OPTFORGE_LEAF;
        const size_t begin = leaves * rank / ranks * OPTFORGE_LEAF;
        const size_t end = rank + 1 == ranks ? sizes[k] : leaves * (rank + 1) / ranks * OPTFORGE_LEAF;
        const size_t n = end - begin;

        if (n == 0)
            continue;
        /* glue: begin */
        s->tensors[s->count] = (zero_adamw_tensor_f32){n, next, next + n, next + 2 * n, next + 3 * n};
        s->number[s->count] = k;
        s->part[s->count] = begin;
        /* glue: end */
        for (size_t i = 0; i < n; i++)
            next[i] = noise(stream_of(k, 0), (uint32_t)(begin + i));
        next += 4 * n;
        s->count++;
    }
}

/* A step on all ranks together; its status, which is the same on all. */
static int sharded_step(shard *s, uint64_t t, double *workspace, size_t workspace_size)
{
    /* glue: begin */
    zero_adamw_hyper hyper;
    optforge_options options;
    optforge_work work = {0};
    zero_adamw_hyper_init(&hyper);
    hyper.max_norm = 100.0, hyper.weight_decay = 0.1;
    optforge_options_init(&options);
    options.skip_nonfinite = 1, options.stats = &s->stats, options.tensors = TENSORS, options.sizes = sizes;
    options.workspace = workspace, options.workspace_size = workspace_size;
    optforge_list list = {.kernel = &zero_adamw_kernel_f32, .hyper = &hyper, .t = t, .tensors = s->tensors,
                          .count = s->count, .number = s->number, .part = s->part};
    int status = optforge_begin(&work, &list, 1, &options);
    for (int phase = 0; phase < work.phases; phase++) {
        size_t n;
        optforge_share(&work, phase, 0, 1);
        double *sums = optforge_partials(&work, phase, &n);
        all_reduce(s->rank, s->ranks, sums, n);
        status = optforge_fold(&work, phase);
    }
    return status;
    /* glue: end */
}

static void *run_rank(void *argument)
{
    shard *s = (shard *)argument;
    const size_t size = zero_adamw_workspace_size(2 * SIDE * SIDE + SIDE, TENSORS); /* as for whole tensors */
    double *workspace = (double *)malloc(size);
    uint64_t t = 1;

    for (int step = 1; step <= STEPS; step++) {
        for (size_t k = 0; k < s->count; k++)
            fill_gradients((float *)(uintptr_t)s->tensors[k].g, s->number[k], step, s->part[k], s->tensors[k].n);
        const int status = sharded_step(s, t, workspace, size);
        if (status != zero_adamw_OK && status != zero_adamw_SKIPPED) {
            fprintf(stderr, "%s\n", zero_adamw_strerror(status));
            exit(1);
        }
        t += status == zero_adamw_OK;
        if (s->rank == 0 && status == zero_adamw_SKIPPED)
            printf("step %d skipped\n", step);
        else if (s->rank == 0)
            printf("step %d grad_norm %a\n", step, s->stats.grad_norm);
    }
    free(workspace);
    return NULL;
}

/* FNV-1a of the bits, each number's lowest byte first. */
static uint64_t hash(uint64_t h, const float *values, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;

        memcpy(&bits, &values[i], sizeof bits);
        for (int shift = 0; shift < 32; shift += 8)
            h = (h ^ (bits >> shift & 0xff)) * UINT64_C(0x100000001b3);
    }
    return h;
}

/* ---- the same, written here, over whole tensors ---- */

typedef struct {
    float *p[TENSORS], *g[TENSORS], *m[TENSORS], *v[TENSORS];
} whole;

static void whole_init(whole *x)
{
    for (size_t k = 0; k < TENSORS; k++) {
        x->p[k] = (float *)calloc(4 * sizes[k], sizeof(float));
        if (x->p[k] == NULL)
            exit(1);
        x->g[k] = x->p[k] + sizes[k], x->m[k] = x->g[k] + sizes[k], x->v[k] = x->m[k] + sizes[k];
        for (size_t i = 0; i < sizes[k]; i++)
            x->p[k][i] = noise(stream_of(k, 0), (uint32_t)i);
    }
}

/* Whether it was done; the norm of the gradients. */
static int own_step(whole *x, int t, double *norm)
{
    const float beta1 = 0.9f, beta2 = (float)0.999, one_minus_beta1 = (float)(1.0 - 0.9), eps = 1e-8f;
    const float one_minus_beta2 = (float)(1.0 - 0.999), keep = (float)(1.0 - 1e-3 * 0.1);
    const float step_size = (float)(1e-3 / (1.0 - pow(0.9, t))), correction = (float)(1.0 - pow(0.999, t));
    double sum = 0.0;

    for (size_t k = 0; k < TENSORS; k++)
        for (size_t i = 0; i < sizes[k]; i++)
            sum += (double)x->g[k][i] * (double)x->g[k][i];
    *norm = sqrt(sum);
    if (!isfinite(*norm))
        return 0;
    const float factor = *norm >= 100.0 ? (float)(100.0 / *norm) : 1.0f;
    for (size_t k = 0; k < TENSORS; k++) {
        float *p = x->p[k], *m = x->m[k], *v = x->v[k];

        for (size_t i = 0; i < sizes[k]; i++) {
            const float g = x->g[k][i] * factor;

            p[i] *= keep;
            m[i] = beta1 * m[i] + one_minus_beta1 * g;
            v[i] = beta2 * v[i] + one_minus_beta2 * (g * g);
            p[i] -= step_size * m[i] / (sqrtf(v[i] / correction) + eps);
        }
    }
    return 1;
}

static void run_own(void)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    double norm;
    whole x;

    whole_init(&x);
    for (int step = 1, t = 1; step <= STEPS; step++) {
        for (size_t k = 0; k < TENSORS; k++)
            fill_gradients(x.g[k], k, step, 0, sizes[k]);
        if (own_step(&x, t, &norm)) {
            printf("step %d grad_norm %a\n", step, norm);
            t++;
        } else {
            printf("step %d skipped\n", step);
        }
    }
    for (size_t k = 0; k < TENSORS; k++) {
        h = hash(h, x.p[k], sizes[k]);
        h = hash(h, x.m[k], sizes[k]);
        h = hash(h, x.v[k], sizes[k]);
        free(x.p[k]);
    }
    printf("parameters and moments %016" PRIx64 "\n", h);
}

/* ---- times ---- */

static double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* One rank does what eight do beside each other. */
static void print_times(void)
{
    enum { ROUNDS = 15 };
    const size_t size = zero_adamw_workspace_size(2 * SIDE * SIDE + SIDE, TENSORS);
    double own[ROUNDS], ours[ROUNDS], ratios[ROUNDS], norm, *workspace = (double *)malloc(size);
    whole x;

    pthread_barrier_init(&meeting, NULL, 1);
    whole_init(&x);
    shard_init(&shards[0], 0, 1);
    for (size_t k = 0; k < TENSORS; k++) {
        fill_gradients(x.g[k], k, 1, 0, sizes[k]);
        fill_gradients((float *)(uintptr_t)shards[0].tensors[k].g, k, 1, 0, sizes[k]);
    }
    for (int k = -1; k < ROUNDS; k++) {
        double begin = seconds(), between;

        own_step(&x, k + 2, &norm);
        between = seconds();
        sharded_step(&shards[0], (uint64_t)(k + 2), workspace, size);
        if (k < 0)
            continue;
        own[k] = between - begin, ours[k] = seconds() - between, ratios[k] = ours[k] / own[k];
    }
    qsort(own, ROUNDS, sizeof(double), compare), qsort(ours, ROUNDS, sizeof(double), compare);
    qsort(ratios, ROUNDS, sizeof(double), compare);
    printf("own %.3f ms, optforge %.3f ms, ratio %.2f (median of %d, alternating, one rank)\n", 1e3 * own[ROUNDS / 2],
           1e3 * ours[ROUNDS / 2], ratios[ROUNDS / 2], ROUNDS);
    free(workspace), free(shards[0].memory);
    for (size_t k = 0; k < TENSORS; k++)
        free(x.p[k]);
}

int main(int argc, char **argv)
{
    const int ranks = argc == 2 ? atoi(argv[1]) : 0;
    pthread_t threads[MOST_RANKS];
    uint64_t h = UINT64_C(0xcbf29ce484222325);

    if (argc == 2 && strcmp(argv[1], "own") == 0)
        return run_own(), 0;
    if (argc == 2 && strcmp(argv[1], "time") == 0)
        return print_times(), 0;
    if (ranks < 1 || ranks > MOST_RANKS) {
        fprintf(stderr, "usage: %s RANKS|own|time\n", argv[0]);
        return 2;
    }
    pthread_barrier_init(&meeting, NULL, (unsigned)ranks);
    for (size_t r = 0; r < (size_t)ranks; r++)
        shard_init(&shards[r], r, (size_t)ranks);
    for (size_t r = 0; r < (size_t)ranks; r++)
        if (pthread_create(&threads[r], NULL, run_rank, &shards[r]) != 0)
            return 1;
    for (size_t r = 0; r < (size_t)ranks; r++)
        pthread_join(threads[r], NULL);
    for (size_t k = 0; k < TENSORS; k++) /* in the order of the whole tensors */
        for (int array = 0; array < 3; array++)
            for (size_t r = 0; r < (size_t)ranks; r++)
                for (size_t j = 0; j < shards[r].count; j++) {
                    const zero_adamw_tensor_f32 *x = &shards[r].tensors[j];

                    if (shards[r].number[j] == k)
                        h = hash(h, array == 0 ? x->p : array == 1 ? x->m : x->v, x->n);
                }
    fprintf(stderr, "%d ranks, shards of %zu elements\n", ranks, shards[0].tensors[0].n);
    printf("parameters and moments %016" PRIx64 "\n", h);
    for (size_t r = 0; r < (size_t)ranks; r++)
        free(shards[r].memory);
    return 0;
}
