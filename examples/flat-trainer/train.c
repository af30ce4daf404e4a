/* A trainer in one file, in the manner of llm.c: all parameters in one buffer, gradients and moments in others of the
 * same size, loops shared by OpenMP, a Makefile with -Ofast. A network of two layers learns handwritten digits, with
 * the trainer's own AdamW or with an emitted kernel of the same formula.
 *
 *     train DIGITS own|optforge     trains; prints losses and a hash of all parameters
 *     train DIGITS check            trains, and does each step with both: prints how far they are apart at most
 *     train DIGITS time             the time of a step with each, alternating, at 16,777,216 parameters
 */
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* glue: begin */
#include "flat_adamw.h"
/* glue: end */

enum { PIXELS = 64, HIDDEN = 96, DIGITS = 10, MOST_IMAGES = 500, BATCH = 50, EPOCHS = 20 };
enum { PARAMETERS = PIXELS * HIDDEN + HIDDEN + HIDDEN * DIGITS + DIGITS };

typedef struct {
    size_t n;
    float *params, *grads, *m, *v; /* one buffer each */
    float *w1, *b1, *w2, *b2;      /* in params */
    float *dw1, *db1, *dw2, *db2;  /* in grads */
} model;

static float images[MOST_IMAGES][PIXELS];
static int labels[MOST_IMAGES];
static int image_count;

static const float lr = 3e-3f, beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, decay = 0.02f;

/* ---- data and memory ---- */

static void *zeros(size_t bytes)
{
    void *memory = calloc(bytes, 1);

    if (memory == NULL) {
        fputs("out of memory\n", stderr);
        exit(1);
    }
    return memory;
}

static void read_digits(const char *path)
{
    char line[160];
    FILE *file = fopen(path, "r");

    if (file == NULL) {
        perror(path);
        exit(1);
    }
    while (image_count < MOST_IMAGES && fgets(line, sizeof line, file) != NULL) {
        if (line[0] == '#' || strlen(line) < PIXELS + 1)
            continue;
        for (int k = 0; k < PIXELS; k++)
            images[image_count][k] = (float)(line[k] - 'a') / 16.0f;
        labels[image_count++] = line[PIXELS] - '0';
    }
    fclose(file);
}

static float noise(uint32_t *x)
{
    *x = *x * 1664525u + 1013904223u;
    return (float)(*x >> 8) / 16777216.0f - 0.5f;
}

static void model_init(model *x, size_t n)
{
    uint32_t seed = 1;

    x->n = n;
    x->params = (float *)zeros(n * sizeof(float));
    x->grads = (float *)zeros(n * sizeof(float));
    x->m = (float *)zeros(n * sizeof(float));
    x->v = (float *)zeros(n * sizeof(float));
    x->w1 = x->params, x->dw1 = x->grads;
    x->b1 = x->w1 + PIXELS * HIDDEN, x->db1 = x->dw1 + PIXELS * HIDDEN;
    x->w2 = x->b1 + HIDDEN, x->dw2 = x->db1 + HIDDEN;
    x->b2 = x->w2 + HIDDEN * DIGITS, x->db2 = x->dw2 + HIDDEN * DIGITS;
    for (size_t i = 0; i < n; i++)
        x->params[i] = noise(&seed) * 0.25f;
}

static void model_free(model *x)
{
    free(x->params), free(x->grads), free(x->m), free(x->v);
}

/* ---- the network ---- */

/* The gradients of a batch, and its mean loss. */
static float model_backward(model *x, int first)
{
    static float hidden[BATCH][HIDDEN], out[BATCH][DIGITS], dhidden[BATCH][HIDDEN];
    float loss = 0.0f;

#pragma omp parallel for
    for (int b = 0; b < BATCH; b++) {
        const float *image = images[first + b];
        float largest = -1e30f, sum = 0.0f;

        for (int h = 0; h < HIDDEN; h++) {
            float a = x->b1[h];
            for (int k = 0; k < PIXELS; k++)
                a += x->w1[h * PIXELS + k] * image[k];
            hidden[b][h] = a > 0.0f ? a : 0.0f;
        }
        for (int d = 0; d < DIGITS; d++) {
            float a = x->b2[d];
            for (int h = 0; h < HIDDEN; h++)
                a += x->w2[d * HIDDEN + h] * hidden[b][h];
            out[b][d] = a;
            largest = a > largest ? a : largest;
        }
        for (int d = 0; d < DIGITS; d++)
            sum += out[b][d] = expf(out[b][d] - largest);
        for (int d = 0; d < DIGITS; d++)
            out[b][d] /= sum;
    }
    for (int b = 0; b < BATCH; b++) {
        loss -= logf(out[b][labels[first + b]] + 1e-20f) / BATCH;
        for (int d = 0; d < DIGITS; d++)
            out[b][d] = (out[b][d] - (d == labels[first + b])) / BATCH;
        for (int h = 0; h < HIDDEN; h++) {
            float a = 0.0f;
            for (int d = 0; d < DIGITS; d++)
                a += x->w2[d * HIDDEN + h] * out[b][d];
            dhidden[b][h] = hidden[b][h] > 0.0f ? a : 0.0f;
        }
    }
#pragma omp parallel for
    for (int h = 0; h < HIDDEN; h++)
        for (int b = 0; b < BATCH; b++) {
            x->db1[h] += dhidden[b][h];
            for (int k = 0; k < PIXELS; k++)
                x->dw1[h * PIXELS + k] += dhidden[b][h] * images[first + b][k];
            for (int d = 0; d < DIGITS; d++)
                x->dw2[d * HIDDEN + h] += out[b][d] * hidden[b][h];
        }
    for (int b = 0; b < BATCH; b++)
        for (int d = 0; d < DIGITS; d++)
            x->db2[d] += out[b][d];
    return loss;
}

static void model_zero_grad(model *x) { memset(x->grads, 0, x->n * sizeof(float)); }

/* ---- the step ---- */

static void own_update(model *x, int t)
{
    const float correction1 = 1.0f - powf(beta1, (float)t), correction2 = 1.0f - powf(beta2, (float)t);

#pragma omp parallel for
    for (size_t i = 0; i < x->n; i++) {
        const float grad = x->grads[i], param = x->params[i];
        const float m = beta1 * x->m[i] + (1.0f - beta1) * grad;
        const float v = beta2 * x->v[i] + (1.0f - beta2) * grad * grad;
        const float m_hat = m / correction1, v_hat = v / correction2;

        x->m[i] = m;
        x->v[i] = v;
        x->params[i] = param - lr * (m_hat / (sqrtf(v_hat) + eps) + decay * param);
    }
}

static void optforge_update(model *x, int t)
{
    /* glue: begin */
    flat_adamw_hyper h = {lr, beta1, beta2, eps, decay, 1.0f - powf(beta1, (float)t), 1.0f - powf(beta2, (float)t)};
    flat_adamw_tensor_f32 tensor = {x->n, x->params, x->grads, x->m, x->v};
    int status = flat_adamw_step_f32(&h, (uint64_t)t, &tensor, 1);
    if (status != flat_adamw_OK)
        fprintf(stderr, "%s\n", flat_adamw_strerror(status)), exit(1);
    /* glue: end */
}

/* ---- what is printed ---- */

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

/* How far two numbers are apart, in units of 2^-24 of the larger one of `scale` and them. */
static double apart(float a, float b, float scale)
{
    const double larger = fmax(fmax(fabs((double)a), fabs((double)b)), fabs((double)scale));

    return larger == 0.0 ? 0.0 : fabs((double)a - (double)b) / larger * 16777216.0;
}

/* Does a step with the kernel on a copy of what `x` holds, and on `x` by itself; how far they are then apart. */
static void check_step(model *x, int t, double *p, double *m, double *v)
{
    const size_t bytes = x->n * sizeof(float);
    model other = *x;

    other.params = (float *)zeros(bytes), other.m = (float *)zeros(bytes), other.v = (float *)zeros(bytes);
    memcpy(other.params, x->params, bytes), memcpy(other.m, x->m, bytes), memcpy(other.v, x->v, bytes);
    optforge_update(&other, t);
    own_update(x, t);
    for (size_t i = 0; i < x->n; i++) {
        *p = fmax(*p, apart(other.params[i], x->params[i], lr));
        *m = fmax(*m, apart(other.m[i], x->m[i], x->grads[i]));
        *v = fmax(*v, apart(other.v[i], x->v[i], FLT_MIN * 16777216.0f)); /* the engine flushes what is less */
    }
    free(other.params), free(other.m), free(other.v);
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

static void print_times(void)
{
    enum { ROUNDS = 15 };
    double own[ROUNDS], ours[ROUNDS], ratios[ROUNDS];
    uint32_t seed = 7;
    model x;

    model_init(&x, (size_t)1 << 24);
    for (size_t i = 0; i < x.n; i++)
        x.grads[i] = noise(&seed);
    own_update(&x, 1);
    for (int k = 0; k < ROUNDS; k++) {
        double begin = seconds();
        own_update(&x, 2 + k);
        own[k] = seconds() - begin;
        begin = seconds();
        optforge_update(&x, 2 + k);
        ours[k] = seconds() - begin;
        ratios[k] = ours[k] / own[k];
    }
    qsort(own, ROUNDS, sizeof(double), compare), qsort(ours, ROUNDS, sizeof(double), compare);
    qsort(ratios, ROUNDS, sizeof(double), compare);
    printf("own %.3f ms, optforge %.3f ms, ratio %.2f (median of %d, alternating, %zu parameters)\n",
           1e3 * own[ROUNDS / 2], 1e3 * ours[ROUNDS / 2], ratios[ROUNDS / 2], ROUNDS, x.n);
    model_free(&x);
}

int main(int argc, char **argv)
{
    const char *how = argc > 2 ? argv[2] : "";
    double p = 0.0, m = 0.0, v = 0.0;
    model x;

    if (argc != 3 || (strcmp(how, "own") && strcmp(how, "optforge") && strcmp(how, "check") && strcmp(how, "time"))) {
        fprintf(stderr, "usage: %s DIGITS own|optforge|check|time\n", argv[0]);
        return 2;
    }
    /* glue: begin */
    if (flat_adamw_selftest() != flat_adamw_OK)
        return fputs("flat_adamw.c was compiled with flags that change its arithmetic\n", stderr), 1;
    /* glue: end */
    if (strcmp(how, "time") == 0) {
        print_times();
        return 0;
    }
    read_digits(argv[1]);
    model_init(&x, PARAMETERS);
    for (int epoch = 1, t = 0; epoch <= EPOCHS; epoch++) {
        float loss = 0.0f;

        for (int first = 0; first + BATCH <= image_count; first += BATCH) {
            model_zero_grad(&x);
            loss += model_backward(&x, first) * BATCH / (float)image_count;
            t++;
            if (strcmp(how, "own") == 0)
                own_update(&x, t);
            else if (strcmp(how, "optforge") == 0)
                optforge_update(&x, t);
            else
                check_step(&x, t, &p, &m, &v);
        }
        printf("epoch %d loss %.9g\n", epoch, (double)loss);
    }
    if (strcmp(how, "check") == 0)
        printf("apart p %.3f m %.3f v %.3f\n", p, m, v);
    printf("parameters %016" PRIx64 "\n", hash(x.params, x.n));
    model_free(&x);
    return 0;
}
