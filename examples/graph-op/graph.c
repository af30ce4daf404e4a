/* An optimizer as a node of a graph, in the manner of ggml: the engine has threads of its own, all of which run every
 * node, each the part `ith` of `nth`, and meet at a barrier behind it. One graph is a whole training step with
 * clipping by the norm of all gradients. The optimizer is the engine's own, or an emitted kernel of the same formula.
 *
 *     graph own|optforge THREADS    trains; prints losses and a hash of all parameters
 *     graph time THREADS            the time of the optimizer's nodes of each, alternating
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
#include "graph_adamw.h"
/* glue: end */

enum { MOST_THREADS = 64, MOST_NODES = 8, TENSORS = 6, STEPS = 30 };

typedef struct { /* what is learnt, and what a node of the engine's own optimizer reads and writes */
    size_t n;
    float *data, *grad, *m, *v, *target;
} tensor;

typedef struct graph graph;
typedef void (*operation)(graph *x, size_t ith, size_t nth);

struct graph {
    tensor tensors[TENSORS];
    size_t node_count, nth;
    operation nodes[MOST_NODES];
    pthread_barrier_t barrier;
    int t;
    float alpha, beta1, beta2, eps, wd, max_norm;
    double partial[MOST_THREADS], norm, loss[MOST_THREADS];
    /* glue: begin */
    graph_adamw_tensor_f32 list_tensors[TENSORS];
    graph_adamw_hyper hyper;
    optforge_list list;
    optforge_options options;
    optforge_work work;
    int status;
    /* glue: end */
};

/* ---- the engine: its pool, and its own nodes ---- */

typedef struct {
    graph *owner;
    size_t ith;
} worker;

static void *run_nodes(void *argument)
{
    const worker *own = (const worker *)argument;

    for (size_t k = 0; k < own->owner->node_count; k++) {
        own->owner->nodes[k](own->owner, own->ith, own->owner->nth);
        pthread_barrier_wait(&own->owner->barrier);
    }
    return NULL;
}

static void graph_compute(graph *x)
{
    pthread_t threads[MOST_THREADS];
    worker workers[MOST_THREADS];

    for (size_t k = 0; k < x->nth; k++) {
        workers[k] = (worker){x, k};
        if (k > 0 && pthread_create(&threads[k], NULL, run_nodes, &workers[k]) != 0) {
            fputs("no thread can be started\n", stderr);
            exit(1);
        }
    }
    run_nodes(&workers[0]);
    for (size_t k = 1; k < x->nth; k++)
        pthread_join(threads[k], NULL);
}

/* The elements of a tensor that thread `ith` does. */
static void share(size_t n, size_t ith, size_t nth, size_t *begin, size_t *end)
{
    *begin = n * ith / nth;
    *end = n * (ith + 1) / nth;
}

/* The gradient of a loss whose minimum is where data are the target, and steep. */
static void op_grad(graph *x, size_t ith, size_t nth)
{
    x->loss[ith] = 0.0;
    for (size_t k = 0; k < TENSORS; k++) {
        tensor *own = &x->tensors[k];
        size_t begin, end;

        share(own->n, ith, nth, &begin, &end);
        for (size_t i = begin; i < end; i++) {
            const float error = own->data[i] - own->target[i];

            own->grad[i] = 4.0f * error * error * error + 0.1f * error;
            x->loss[ith] += (double)(error * error);
        }
    }
}

static void op_norm_partial(graph *x, size_t ith, size_t nth)
{
    x->partial[ith] = 0.0;
    for (size_t k = 0; k < TENSORS; k++) {
        size_t begin, end;

        share(x->tensors[k].n, ith, nth, &begin, &end);
        for (size_t i = begin; i < end; i++)
            x->partial[ith] += (double)x->tensors[k].grad[i] * (double)x->tensors[k].grad[i];
    }
}

static void op_norm(graph *x, size_t ith, size_t nth)
{
    double sum = 0.0;

    if (ith != 0)
        return;
    for (size_t k = 0; k < nth; k++)
        sum += x->partial[k];
    x->norm = sqrt(sum);
}

static void op_adamw(graph *x, size_t ith, size_t nth)
{
    const float keep = 1.0f - x->alpha * x->wd;
    const float beta1h = 1.0f / (1.0f - powf(x->beta1, (float)x->t));
    const float beta2h = 1.0f / (1.0f - powf(x->beta2, (float)x->t));
    const float factor = x->norm >= (double)x->max_norm ? (float)((double)x->max_norm / x->norm) : 1.0f;

    for (size_t k = 0; k < TENSORS; k++) {
        tensor *own = &x->tensors[k];
        size_t begin, end;

        share(own->n, ith, nth, &begin, &end);
        for (size_t i = begin; i < end; i++) {
            const float g = own->grad[i] * factor;

            own->m[i] = own->m[i] * x->beta1 + g * (1.0f - x->beta1);
            own->v[i] = own->v[i] * x->beta2 + g * g * (1.0f - x->beta2);
            own->data[i] = own->data[i] * keep - x->alpha * (own->m[i] * beta1h) / (sqrtf(own->v[i] * beta2h) + x->eps);
        }
    }
}

/* ---- the kernel as nodes ---- */

/* glue: begin */
static void op_optforge_begin(graph *x, size_t ith, size_t nth)
{
    if (ith != 0)
        return;
    x->hyper = (graph_adamw_hyper){x->alpha, x->beta1, x->beta2, x->eps, 1.0f - x->alpha * x->wd,
                                   1.0f / (1.0f - powf(x->beta1, (float)x->t)),
                                   1.0f / (1.0f - powf(x->beta2, (float)x->t)), x->max_norm};
    x->list.t = (uint64_t)x->t;
    x->status = optforge_begin(&x->work, &x->list, 1, &x->options);
    (void)nth;
}

static void op_optforge_step(graph *x, size_t ith, size_t nth)
{
    for (int phase = 0; phase < x->work.phases; phase++) {
        optforge_share(&x->work, phase, ith, nth);
        pthread_barrier_wait(&x->barrier);
        if (ith == 0)
            x->status = optforge_fold(&x->work, phase);
        pthread_barrier_wait(&x->barrier);
    }
}

static void graph_use_optforge(graph *x)
{
    for (size_t k = 0; k < TENSORS; k++)
        x->list_tensors[k] = (graph_adamw_tensor_f32){x->tensors[k].n, x->tensors[k].data, x->tensors[k].grad,
                                                      x->tensors[k].m, x->tensors[k].v};
    x->list = (optforge_list){.kernel = &graph_adamw_kernel_f32, .hyper = &x->hyper, .tensors = x->list_tensors,
                              .count = TENSORS};
    optforge_options_init(&x->options);
    x->options.workspace_size = optforge_workspace_size(&x->list, 1, &x->options);
    x->options.workspace = malloc(x->options.workspace_size);
}
/* glue: end */

/* ---- a training ---- */

static const size_t sizes[TENSORS] = {147456, 96, 73728, 768, 1, 300001};

static float noise(uint32_t *x)
{
    *x = *x * 1664525u + 1013904223u;
    return (float)(*x >> 8) / 16777216.0f - 0.5f;
}

static void graph_init(graph *x, size_t nth, size_t scale)
{
    uint32_t seed = 1;

    memset(x, 0, sizeof *x);
    x->nth = nth;
    x->alpha = 0.02f, x->beta1 = 0.9f, x->beta2 = 0.999f, x->eps = 1e-8f, x->wd = 0.05f, x->max_norm = 30.0f;
    pthread_barrier_init(&x->barrier, NULL, (unsigned)nth);
    for (size_t k = 0; k < TENSORS; k++) {
        tensor *own = &x->tensors[k];
        float *memory = (float *)calloc(5 * sizes[k] * scale, sizeof(float));

        if (memory == NULL) {
            fputs("out of memory\n", stderr);
            exit(1);
        }
        own->n = sizes[k] * scale;
        own->data = memory, own->grad = own->data + own->n, own->m = own->grad + own->n, own->v = own->m + own->n;
        own->target = own->v + own->n;
        for (size_t i = 0; i < own->n; i++)
            own->data[i] = noise(&seed), own->target[i] = noise(&seed) + 0.3f;
    }
    graph_use_optforge(x);
}

static void graph_free(graph *x)
{
    for (size_t k = 0; k < TENSORS; k++)
        free(x->tensors[k].data);
    free(x->options.workspace);
    pthread_barrier_destroy(&x->barrier);
}

static void graph_nodes(graph *x, int own, int grad)
{
    x->node_count = 0;
    if (grad)
        x->nodes[x->node_count++] = op_grad;
    if (own) {
        x->nodes[x->node_count++] = op_norm_partial;
        x->nodes[x->node_count++] = op_norm;
        x->nodes[x->node_count++] = op_adamw;
    } else {
        /* glue: begin */
        x->nodes[x->node_count++] = op_optforge_begin;
        x->nodes[x->node_count++] = op_optforge_step;
        /* glue: end */
    }
}

static void graph_step(graph *x)
{
    x->t++;
    graph_compute(x);
    /* glue: begin */
    if (x->status != graph_adamw_OK) {
        fprintf(stderr, "%s\n", graph_adamw_strerror(x->status));
        exit(1);
    }
    /* glue: end */
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

static void print_times(size_t nth)
{
    enum { ROUNDS = 15 };
    double times[2][ROUNDS], ratios[ROUNDS];
    static graph x;

    graph_init(&x, nth, 16);
    graph_nodes(&x, 1, 1);
    graph_step(&x);
    for (int k = 0; k < ROUNDS; k++) {
        for (int own = 0; own < 2; own++) {
            graph_nodes(&x, own, 0);
            times[own][k] = -seconds();
            graph_step(&x);
            times[own][k] += seconds();
        }
        ratios[k] = times[0][k] / times[1][k];
    }
    for (int own = 0; own < 2; own++)
        qsort(times[own], ROUNDS, sizeof(double), compare);
    qsort(ratios, ROUNDS, sizeof(double), compare);
    printf("own %.3f ms, optforge %.3f ms, ratio %.2f (median of %d, alternating, %zu threads)\n",
           1e3 * times[1][ROUNDS / 2], 1e3 * times[0][ROUNDS / 2], ratios[ROUNDS / 2], ROUNDS, nth);
    graph_free(&x);
}

int main(int argc, char **argv)
{
    const char *how = argc > 2 ? argv[1] : "";
    const int nth = argc > 2 ? atoi(argv[2]) : 0;
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    static graph x;

    if (nth < 1 || nth > MOST_THREADS || (strcmp(how, "own") && strcmp(how, "optforge") && strcmp(how, "time"))) {
        fprintf(stderr, "usage: %s own|optforge|time THREADS\n", argv[0]);
        return 2;
    }
    if (strcmp(how, "time") == 0) {
        print_times((size_t)nth);
        return 0;
    }
    graph_init(&x, (size_t)nth, 1);
    graph_nodes(&x, strcmp(how, "own") == 0, 1);
    for (int step = 1; step <= STEPS; step++) {
        double loss = 0.0;

        graph_step(&x);
        for (int k = 0; k < nth; k++)
            loss += x.loss[k];
        if (step % 10 == 0)
            printf("step %d loss %.6g\n", step, loss);
    }
    for (size_t k = 0; k < TENSORS; k++) {
        h = hash(h, x.tensors[k].data, x.tensors[k].n);
        h = hash(h, x.tensors[k].m, x.tensors[k].n);
        h = hash(h, x.tensors[k].v, x.tensors[k].n);
    }
    printf("parameters and moments %016" PRIx64 "\n", h);
    graph_free(&x);
    return 0;
}
