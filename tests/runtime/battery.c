/* Steps many rules over tensors of awkward sizes, and prints a hash of all that each leaves, one line for each case.
 *
 *     battery [steps=1] [threads=N] [pool=reverse|one|posix] [shares] [flush=main|workers] [allow] [few]
 *
 * The lines are the same however the step is done: on how many threads, whose, on which instruction set, with subnormal
 * numbers flushed by the program or not. Data are made of integers, so that nothing here rounds. RULES lists the
 * rules, and emitted.h includes their headers; `shares` needs optforge.h.
 */
#include "emitted.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#define ROOM 101504 /* elements of the largest tensor, and more */
enum { MOST_ARRAYS = 6, MOST_TENSORS = 16, MOST_POOL = 8 };

static const size_t sizes[] = {100001, 0, 31, 1, 32769, 33, 1024, 32, 1023, 32767, 1025, 32768};
static const size_t few_sizes[] = {5121, 0, 31, 1, 33, 1024, 1023, 1025};

/* ---- what is asked for by the command line ---- */

static size_t pool_threads = 1;
static int threads, in_shares, flush_main, flush_workers, allow, few, steps = 2, wrong;
static const char *pool_kind = "";

/* ---- the flush bits of a thread ---- */

static void flush_here(int on)
{
#if defined(__SSE__)
    _mm_setcsr(on ? _mm_getcsr() | 0x8040u : _mm_getcsr() & ~0x8040u);
#else
    (void)on;
#endif
}

static void expect_flush(int on)
{
#if defined(__SSE__)
    if (((_mm_getcsr() & 0x8040u) == 0x8040u) != on || ((_mm_getcsr() & 0x8040u) == 0) == on) {
        fprintf(stderr, "the flush bits of a thread have changed\n");
        __atomic_store_n(&wrong, 1, __ATOMIC_RELAXED);
    }
#else
    (void)on;
#endif
}

/* ---- pools ---- */

typedef struct task {
    void (*run)(void *work, size_t k, size_t shares);
    void *work;
    size_t shares, from, by;
} task;

static void *run_task(void *argument)
{
    const task *own = (const task *)argument;

    flush_here(flush_workers);
    for (size_t k = own->from; k < own->shares; k += own->by)
        own->run(own->work, k, own->shares);
    expect_flush(flush_workers);
    return NULL;
}

static void pool_run(void *pool, size_t shares, void (*run)(void *work, size_t k, size_t shares), void *work)
{
    pthread_t own[MOST_POOL];
    task tasks[MOST_POOL];

    if (pool != &pool_threads)
        abort();
    if (strcmp(pool_kind, "reverse") == 0) {
        for (size_t k = shares; k-- > 0;)
            run(work, k, shares);
        return;
    }
    if (strcmp(pool_kind, "one") == 0) {
        for (size_t k = 0; k < shares; k++)
            run(work, k, shares);
        return;
    }
    for (size_t k = 0; k < pool_threads; k++) {
        tasks[k].run = run;
        tasks[k].work = work;
        tasks[k].shares = shares;
        tasks[k].from = k;
        tasks[k].by = pool_threads;
        if (pthread_create(&own[k], NULL, run_task, &tasks[k]) != 0)
            abort();
    }
    for (size_t k = 0; k < pool_threads; k++)
        pthread_join(own[k], NULL);
}

/* ---- threads that are running already ---- */

#ifdef OPTFORGE_H
typedef struct team {
    optforge_work work;
    pthread_barrier_t barrier;
    size_t nth;
    int status;
} team;
typedef struct member {
    team *all;
    size_t ith;
} member;

static void *take_shares(void *argument)
{
    const member *own = (const member *)argument;
    team *all = own->all;

    flush_here(flush_workers);
    for (int phase = 0; phase < all->work.phases; phase++) {
        optforge_share(&all->work, phase, own->ith, all->nth);
        pthread_barrier_wait(&all->barrier);
        if (own->ith == 0)
            all->status = optforge_fold(&all->work, phase);
        pthread_barrier_wait(&all->barrier);
    }
    expect_flush(flush_workers);
    return NULL;
}

static int step_in_shares(const optforge_kernel *kernel, const void *hyper, uint64_t t, const void *tensors, size_t count,
                          const optforge_options *o)
{
    static team all;
    optforge_list list;
    pthread_t own[MOST_POOL];
    member members[MOST_POOL];

    memset(&list, 0, sizeof list);
    list.kernel = kernel;
    list.hyper = hyper;
    list.t = t;
    list.tensors = tensors;
    list.count = count;
    memset(&all, 0, sizeof all);
    all.nth = pool_threads;
    all.status = optforge_begin(&all.work, &list, 1, o);
    if (all.status != OPTFORGE_OK)
        return all.status;
    pthread_barrier_init(&all.barrier, NULL, (unsigned)pool_threads);
    for (size_t k = 0; k < pool_threads; k++) {
        members[k].all = &all;
        members[k].ith = k;
        if (pthread_create(&own[k], NULL, take_shares, &members[k]) != 0)
            abort();
    }
    for (size_t k = 0; k < pool_threads; k++)
        pthread_join(own[k], NULL);
    pthread_barrier_destroy(&all.barrier);
    return all.status;
}
#endif

/* ---- data ---- */

static uint64_t seed;

static uint64_t draw(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return seed >> 11;
}

/* A number of either sign, from 2^-2 to 2^2; where asked for a subnormal one, or one whose square is as a double (among
 * double ones all are, so that their sums are subnormal, too). */
static void put(void *array, int format, size_t i, int positive, int tiny)
{
    const uint64_t x = draw();
    const uint64_t sign = positive ? 0 : x & 1;
    const int small = tiny && (format != OPTFORGE_F32 || x % 3 != 0);

    if (format == OPTFORGE_F32) {
        const uint32_t exponent = small ? (x >> 40) % 2 ? 0 : 64 - 40 : 125 + (uint32_t)((x >> 40) % 4);
        const uint32_t bits = (uint32_t)sign << 31 | exponent << 23 | (uint32_t)(x >> 3 & 0x7fffff);

        memcpy((char *)array + i * sizeof bits, &bits, sizeof bits);
    } else {
        const uint64_t exponent = small ? (x >> 40) % 2 ? 0 : 1023 - 535 : 1021 + (x >> 40) % 4;
        const uint64_t bits = sign << 63 | exponent << 52 | (x << 8 & 0xfffffffffffffu);

        memcpy((char *)array + i * sizeof bits, &bits, sizeof bits);
    }
}

static uint64_t hash_of(uint64_t hash, const void *memory, size_t size)
{
    const unsigned char *bytes = (const unsigned char *)memory;

    for (size_t i = 0; i < size; i++)
        hash = (hash ^ bytes[i]) * 1099511628211u;
    return hash;
}

/* All NaN alike: which one comes of an operation is the machine's own. */
static uint64_t hash_reals(uint64_t hash, const void *memory, int format, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = 0, nan = 0x7ff8000000000000u;

        if (format == OPTFORGE_F32) {
            uint32_t narrow;

            memcpy(&narrow, (const char *)memory + i * sizeof narrow, sizeof narrow);
            bits = (narrow & 0x7fffffffu) > 0x7f800000u ? nan : narrow;
        } else {
            memcpy(&bits, (const char *)memory + i * sizeof bits, sizeof bits);
            bits = (bits & 0x7fffffffffffffffu) > 0x7ff0000000000000u ? nan : bits;
        }
        hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
    }
    return hash;
}

static uint64_t hash_stats(uint64_t hash, const optforge_stats *stats)
{
    hash = hash_reals(hash, &stats->grad_norm, OPTFORGE_F64, 5);
    return hash_of(hash, &stats->nan, 3 * sizeof stats->nan);
}

/* ---- cases ---- */

typedef int (*step_with)(const void *hyper, uint64_t t, const void *tensors, size_t count, const optforge_options *o);

typedef struct tested {
    const char *name;
    const optforge_kernel *kernel;
    step_with step;
} tested;

#define CALLS(rule, dtype)                                                                                             \
    static int rule##_call_##dtype(const void *h, uint64_t t, const void *tensors, size_t count, const optforge_options *o) \
    {                                                                                                                  \
        return rule##_step_with_##dtype((const rule##_hyper *)h, t, (const rule##_tensor_##dtype *)tensors, count, o); \
    }
#define BOTH_CALLS(rule) CALLS(rule, f32) CALLS(rule, f64)
#define BOTH_ROWS(rule) {#rule " f32", &rule##_kernel_f32, rule##_call_f32}, {#rule " f64", &rule##_kernel_f64, rule##_call_f64},
RULES(BOTH_CALLS)
static const tested all_tested[] = {RULES(BOTH_ROWS){NULL, NULL, NULL}};

typedef struct tensor {
    size_t n;
    void *array[MOST_ARRAYS];
} tensor;

static char *memory;
static double *workspace;
static const size_t workspace_size = (size_t)4 << 20;

enum { STATS = 1, SKIP = 2, ZERO = 4, SCALE = 8, TINY = 16, NONFINITE = 32 };
static const unsigned cases[] = {
    0, STATS, SKIP | ZERO, SCALE, STATS | SKIP | ZERO | SCALE, TINY, TINY | STATS | SCALE, TINY | STATS | SKIP, NONFINITE | ZERO,
    NONFINITE | STATS | SCALE, NONFINITE | SKIP | STATS | ZERO, NONFINITE | SKIP | SCALE
};

static void run_case(const tested *own, unsigned flags)
{
    const optforge_kernel *kernel = own->kernel;
    const size_t count = few ? sizeof few_sizes / sizeof *few_sizes : sizeof sizes / sizeof *sizes;
    const size_t words = 1 + kernel->arrays;
    void *table[MOST_TENSORS * (MOST_ARRAYS + 1)];
    uint64_t hash = 14695981039346656037u, applied = 0;
    optforge_stats total, each[MOST_TENSORS];
    optforge_options o;
    char *next = memory;

    memset(&o, 0, sizeof o);
    memset(&total, 0, sizeof total);
    memset(each, 0, sizeof each);
    o.size = sizeof o;
    o.grad_scale = flags & SCALE ? 192.0 : 1.0;
    o.skip_nonfinite = (flags & SKIP) != 0;
    o.zero_grads = (flags & ZERO) != 0;
    o.threads = threads;
    o.allow_flush = allow;
    o.workspace = workspace;
    o.workspace_size = workspace_size;
    o.applied = &applied;
    if (flags & STATS) {
        o.stats = &total;
        o.tensor_stats = each;
    }
    if (*pool_kind != '\0') {
        o.parallel = pool_run;
        o.pool = &pool_threads;
    }
    seed = 7 + flags;
    memset(workspace, 0xff, workspace_size);
    for (size_t k = 0; k < count; k++) {
        const size_t n = few ? few_sizes[k] : sizes[k];

        memcpy(&table[k * words], &n, sizeof n);
        for (size_t a = 0; a < kernel->arrays; a++) {
            const int format = kernel->formats[a];
            const size_t size = format == OPTFORGE_F32 ? 4 : 8, number = format == OPTFORGE_SCALAR ? 1 : n;

            table[k * words + 1 + a] = next;
            next += (number * size + 7) / 8 * 8 + 8;
            for (size_t i = 0; i < number; i++)
                put(table[k * words + 1 + a], format, i, a >= 2, (flags & TINY) != 0);
        }
    }
    for (uint64_t t = 1; t <= (uint64_t)steps; t++) {
        int status;

        for (size_t k = 0; k < count; k++)
            for (size_t i = 0; i < (few ? few_sizes[k] : sizes[k]); i++)
                put(table[k * words + 2], kernel->formats[1], i, 0, (flags & TINY) != 0);
        if (flags & NONFINITE && (t == 2 || !(flags & SKIP))) {
            const uint64_t infinite = kernel->formats[1] == OPTFORGE_F32 ? 0x7f8000007fc00000u : 0x7ff0000000000000u;

            memcpy(table[3 * words + 2], &infinite, kernel->formats[1] == OPTFORGE_F32 ? 4 : 8);
            memcpy((char *)table[4 * words + 2] + 64, &infinite, 8);
        }
        flush_here(flush_main);
#ifdef OPTFORGE_H
        if (in_shares)
            status = step_in_shares(kernel, kernel->hyper_defaults, t, table, count, &o);
        else
#endif
            status = own->step(kernel->hyper_defaults, t, table, count, &o);
        expect_flush(flush_main);
        flush_here(0);
        hash = hash_of(hash, &status, sizeof status);
        hash = hash_of(hash, &applied, sizeof applied);
        if (status > 0)
            printf("%s %u: status %d\n", own->name, flags, status);
        for (size_t k = 0; k < count; k++)
            for (size_t a = 0; a < kernel->arrays; a++)
                hash = hash_reals(hash, table[k * words + 1 + a], kernel->formats[a],
                                  kernel->formats[a] == OPTFORGE_SCALAR ? 1 : few ? few_sizes[k] : sizes[k]);
        if (flags & STATS) {
            hash = hash_stats(hash, &total);
            for (size_t k = 0; k < count; k++)
                hash = hash_stats(hash, &each[k]);
        }
    }
    printf("%s %u %016llx\n", own->name, flags, (unsigned long long)hash);
}

static void read_argument(const char *word)
{
    if (strncmp(word, "threads=", 8) == 0) {
        threads = atoi(word + 8);
        pool_threads = (size_t)threads;
    } else if (strncmp(word, "pool=", 5) == 0)
        pool_kind = word + 5;
    else if (strncmp(word, "steps=", 6) == 0)
        steps = atoi(word + 6);
    else if (strcmp(word, "shares") == 0)
        in_shares = 1;
    else if (strcmp(word, "flush=main") == 0)
        flush_main = 1;
    else if (strcmp(word, "flush=workers") == 0)
        flush_workers = 1;
    else if (strcmp(word, "allow") == 0)
        allow = 1;
    else if (strcmp(word, "few") == 0)
        few = 1;
    else
        abort();
}

#ifdef _OPENMP
/* OpenMP's threads stay: what one of them sets holds until it sets another. */
static void flush_team(int on)
{
#pragma omp parallel num_threads(threads)
    if (omp_get_thread_num() > 0)
        flush_here(on);
}

static void expect_team(int on)
{
#pragma omp parallel num_threads(threads)
    if (omp_get_thread_num() > 0)
        expect_flush(on);
}
#endif

int main(int count, char **words)
{
    for (int k = 1; k < count; k++)
        read_argument(words[k]);
    if (pool_threads < 1 || pool_threads > MOST_POOL)
        return 2;
#if defined(__SSE__)
    /* A program that is linked with -Ofast begins so; the data are made of integers, and the hashes too. */
    if (_mm_getcsr() & 0x8040u)
        flush_main = flush_workers = 1;
#endif
    memory = (char *)malloc((size_t)MOST_ARRAYS * 8 * (4 * ROOM + 1024));
    workspace = (double *)malloc(workspace_size);
    if (memory == NULL || workspace == NULL)
        return 2;
#ifdef _OPENMP
    if (threads > 1) /* before this thread sets anything, which threads that it makes would inherit */
        flush_team(flush_workers);
#endif
    for (const tested *own = all_tested; own->name != NULL; own++)
        for (size_t k = 0; k < sizeof cases / sizeof *cases; k++)
            run_case(own, cases[k]);
#ifdef _OPENMP
    if (threads > 1)
        expect_team(flush_workers);
#endif
    free(memory);
    free(workspace);
    return wrong;
}
