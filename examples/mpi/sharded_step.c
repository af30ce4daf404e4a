/* An optimizer sharded over MPI ranks in the manner of ZeRO: each rank holds parameters, gradients and state for a
 * share of all elements. A step is AdamW behind a clipping by the norm of all gradients of all ranks, with a loss scale
 * and with statistics, and is skipped by all ranks together where any has a gradient that is NaN or infinite.
 *
 * The bits do not depend on the number of ranks: with every number of them it prints the same text.
 *
 *     make && mpirun -n 3 build/sharded_step
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mpi.h>

#include "clip_adamw.h"

enum { TENSORS = 5, STEPS = 5, BAD_STEP = 3 };

static const size_t sizes[TENSORS] = {10, 100000, 65536, 7, 300001};

/* What one rank holds: the elements [first, last) of all tensors laid end to end, which are parts of some of them. */
typedef struct {
    size_t first, last;
    float *p, *g, *m, *v;
    size_t count; /* of parts */
    clip_adamw_tensor_f32 tensors[TENSORS];
    size_t number[TENSORS], part[TENSORS]; /* of which tensor each is a part, and where in it that begins */
} shard;

/* Where the share of a rank begins: shares have about as many elements, and tensors are cut between leaves alone. */
static size_t share_begin(int rank, int ranks)
{
    size_t all = 0, offset = 0;

    for (size_t k = 0; k < TENSORS; k++)
        all += sizes[k];
    const size_t cut = all * (size_t)rank / (size_t)ranks;
    for (size_t k = 0; k < TENSORS; offset += sizes[k++])
        if (cut < offset + sizes[k])
            return offset + (cut - offset) / OPTFORGE_LEAF * OPTFORGE_LEAF;
    return all;
}

static void *zeros(size_t bytes)
{
    void *memory = calloc(bytes > 0 ? bytes : 1, 1);

    if (memory == NULL) {
        fputs("out of memory\n", stderr);
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    return memory;
}

static void shard_init(shard *s, int rank, int ranks)
{
    const size_t first = share_begin(rank, ranks), last = share_begin(rank + 1, ranks), n = last - first;
    size_t offset = 0; /* of the tensor */

    s->first = first;
    s->last = last;
    s->p = (float *)zeros(4 * n * sizeof(float));
    s->g = s->p + n;
    s->m = s->g + n;
    s->v = s->m + n;
    s->count = 0;
    for (size_t k = 0; k < TENSORS; offset += sizes[k++]) {
        const size_t begin = first > offset ? first : offset;
        const size_t end = last < offset + sizes[k] ? last : offset + sizes[k];
        clip_adamw_tensor_f32 *x = &s->tensors[s->count];

        if (begin >= end)
            continue;
        x->n = end - begin;
        x->p = s->p + (begin - first);
        x->g = s->g + (begin - first);
        x->m = s->m + (begin - first);
        x->v = s->v + (begin - first);
        clip_adamw_state_init_f32(x);
        s->number[s->count] = k;
        s->part[s->count++] = begin - offset;
    }
}

/* Ends all ranks where a status is a mistake. */
static int checked(int status)
{
    if (status != clip_adamw_OK && status != clip_adamw_SKIPPED) {
        fprintf(stderr, "clip_adamw: %s\n", clip_adamw_strerror(status));
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    return status;
}

/* One step on all ranks together; its status, which is the same on all. */
static int sharded_step(const clip_adamw_hyper *hyper, uint64_t t, const shard *s, const clip_adamw_options *options)
{
    optforge_list list = {0};
    optforge_work work = {0};
    int status;

    list.kernel = &clip_adamw_kernel_f32;
    list.hyper = hyper;
    list.t = t;
    list.tensors = s->tensors;
    list.count = s->count;
    list.number = s->number;
    list.part = s->part;
    status = checked(optforge_begin(&work, &list, 1, options));
    for (int phase = 0; phase < work.phases; phase++) {
        size_t n;
        double *sums;

        optforge_share(&work, phase, 0, 1); /* or each thread of a rank its own */
        /* Each sum belongs to one leaf, which one rank has; the others add 0, in whatever order. */
        sums = optforge_partials(&work, phase, &n);
        if (n > 0)
            MPI_Allreduce(MPI_IN_PLACE, sums, (int)n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
        status = checked(optforge_fold(&work, phase));
    }
    return status;
}

/* An evenly distributed number in [-0.5, 0.5) for an element; each stream has its own. */
static float noise(uint32_t stream, size_t element)
{
    uint32_t x = (uint32_t)element + stream * 0x9e3779b9u;

    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    x = x ^ x >> 16;
    return (float)(x >> 8) / 16777216.0f - 0.5f;
}

/* FNV-1a of the bits, each number's lowest byte first. */
static uint64_t hash(const float *values, size_t n)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325);

    for (size_t i = 0; i < n; i++) {
        uint32_t bits;

        memcpy(&bits, &values[i], sizeof bits);
        for (int shift = 0; shift < 32; shift += 8)
            h = (h ^ (bits >> shift & 0xff)) * UINT64_C(0x100000001b3);
    }
    return h;
}

/* All parameters on rank 0, as a checkpoint has them; a trainer would MPI_Allgatherv them behind every step. */
static void print_hash(const shard *s, int rank, int ranks)
{
    const size_t all = share_begin(ranks, ranks);
    float *whole = (float *)zeros(rank == 0 ? all * sizeof(float) : 0);
    int *counts = (int *)zeros((size_t)ranks * sizeof(int)), *begins = (int *)zeros((size_t)ranks * sizeof(int));

    for (int r = 0; r < ranks; r++) {
        begins[r] = (int)share_begin(r, ranks);
        counts[r] = (int)share_begin(r + 1, ranks) - begins[r];
    }
    MPI_Gatherv(s->p, counts[rank], MPI_FLOAT, whole, counts, begins, MPI_FLOAT, 0, MPI_COMM_WORLD);
    if (rank == 0)
        printf("parameters %016" PRIx64 "\n", hash(whole, all));
    free(whole);
    free(counts);
    free(begins);
}

int main(int argc, char **argv)
{
    int rank, ranks;
    shard s;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    shard_init(&s, rank, ranks);
    for (size_t i = s.first; i < s.last; i++)
        s.p[i - s.first] = noise(0, i);

    clip_adamw_hyper hyper;
    clip_adamw_hyper_init(&hyper);
    hyper.max_norm = 1.0;

    clip_adamw_stats stats; /* over all tensors of all ranks, and the same on each */
    clip_adamw_options options;
    clip_adamw_options_init(&options);
    options.grad_scale = 1024.0;
    options.skip_nonfinite = 1;
    options.zero_grads = 1;
    options.stats = &stats;
    options.tensors = TENSORS;
    options.sizes = sizes;
    options.workspace_size = clip_adamw_workspace_size(share_begin(ranks, ranks), TENSORS); /* as for whole tensors */
    options.workspace = zeros(options.workspace_size);

    uint64_t t = 1; /* counts the steps that were not skipped */
    for (int step = 1; step <= STEPS; step++) {
        /* Here a trainer adds up, over micro-batches and ranks, the gradients of the loss times grad_scale. */
        for (size_t i = s.first; i < s.last; i++)
            s.g[i - s.first] += noise((uint32_t)step, i) * (float)options.grad_scale;
        if (step == BAD_STEP && s.first < s.last && s.last == share_begin(ranks, ranks))
            s.g[s.last - 1 - s.first] = NAN; /* on one rank only */

        if (sharded_step(&hyper, t, &s, &options) == clip_adamw_SKIPPED) {
            options.grad_scale /= 2;
            if (rank == 0)
                printf("step %d skipped nan %" PRIu64 " inf %" PRIu64 "\n", step, stats.nan, stats.inf);
        } else {
            t++;
            if (rank == 0)
                printf("step %d grad_norm %a param_norm %a update_norm %a\n", step, stats.grad_norm,
                       stats.param_norm, stats.update_norm);
        }
    }
    print_hash(&s, rank, ranks);

    free(options.workspace);
    free(s.p);
    MPI_Finalize();
    return 0;
}
