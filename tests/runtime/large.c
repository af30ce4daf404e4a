/* One step of a tensor of more elements than 32 bits count, and whether it is right.
 *
 *     large N
 *
 * KERNEL is the kernel, of a rule behind a clipping by the norm; ELEMENT the bytes of an element, 2 (bfloat16) or 4.
 * Data have a period, of which 2^31 and 2^32 are no multiples. Gradients are one period of memory that is mapped again
 * and again, so that they take none; parameters and state must be as those of a tensor of one period behind its step.
 */
#define _GNU_SOURCE
#include "large.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PERIOD = 3 << 20, ARRAYS = 3 };

static void failed(const char *what)
{
    perror(what);
    exit(1);
}

static void *room(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (memory == MAP_FAILED)
        failed("mmap");
    madvise(memory, size, MADV_HUGEPAGE);
    return memory;
}

/* Memory of `size` bytes, a multiple of PERIOD elements, which is one period. */
static void *repeated(size_t size)
{
    const size_t period = (size_t)PERIOD * ELEMENT;
    const int file = memfd_create("gradients", 0);
    char *memory = (char *)mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (file < 0 || ftruncate(file, (off_t)period) != 0 || memory == MAP_FAILED)
        failed("gradients");
    for (size_t begin = 0; begin < size; begin += period)
        if (mmap(memory + begin, period, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED)
            failed("mmap of a period");
    close(file);
    return memory;
}

/* A float is written as its upper bits where elements have two bytes. */
static void put(char *memory, size_t i, float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    bits >>= 32 - 8 * ELEMENT;
    memcpy(memory + i * ELEMENT, &bits, ELEMENT);
}

typedef struct {
    size_t n;
    void *array[ARRAYS];
} tensor;

static void fill(const tensor *x, uint32_t seed)
{
    for (size_t i = 0; i < PERIOD; i++) {
        seed = seed * 1664525u + 1013904223u;
        put((char *)x->array[0], i, (float)((int)(seed >> 24) - 128) / 64.0f);
        put((char *)x->array[1], i, seed & 1u << 20 ? 0.5f : -0.5f);
    }
}

/* A step that halves gradients: their norm is sqrt(n) / 2. */
static optforge_stats step(tensor *x)
{
    const optforge_kernel *kernel = &KERNEL;
    double hyper[16];
    optforge_stats stats;
    optforge_options options;
    int status;

    memcpy(hyper, kernel->hyper_defaults, kernel->hypers * sizeof *hyper);
    for (size_t k = 0; k < kernel->hypers; k++)
        if (strcmp(kernel->hyper_names[k], "max_norm") == 0)
            hyper[k] = sqrt((double)x->n) / 4;
    optforge_options_init(&options);
    options.stats = &stats;
    options.skip_nonfinite = 1;
    options.workspace_size = optforge_kernel_workspace(kernel, x->n, 1);
    options.workspace = room(options.workspace_size);
    status = optforge_step(kernel, hyper, 1, x, 1, &options);
    if (status != OPTFORGE_OK) {
        fprintf(stderr, "%s\n", optforge_kernel_strerror(kernel, status));
        exit(1);
    }
    munmap(options.workspace, options.workspace_size);
    return stats;
}

int main(int argc, char **argv)
{
    const size_t n = argc == 2 ? (size_t)strtoull(argv[1], NULL, 10) : 0, period = (size_t)PERIOD * ELEMENT;
    const size_t periods = (n + PERIOD - 1) / PERIOD, states = KERNEL.arrays - 2;
    tensor whole = {n, {NULL}}, one = {PERIOD, {NULL}};
    optforge_stats stats;

    if (n < PERIOD || states > 1)
        return 2;
    for (size_t a = 0; a < 2 + states; a++) {
        one.array[a] = room(period);
        whole.array[a] = a == 1 ? repeated(periods * period) : room(periods * period);
    }
    fill(&whole, 7);
    fill(&one, 7);
    void *const before = room(period);
    memcpy(before, one.array[0], period);
    for (size_t k = 1; k < periods; k++)
        memcpy((char *)whole.array[0] + k * period, whole.array[0], period);
    stats = step(&whole);
    if (stats.grad_norm != sqrt((double)n) / 2 || stats.clipped_grad_norm != sqrt((double)n) / 4 ||
        stats.nan + stats.inf != 0) {
        fprintf(stderr, "norms are %a and %a\n", stats.grad_norm, stats.clipped_grad_norm);
        return 1;
    }
    step(&one);
    for (size_t a = 0; a < 2 + states; a++)
        for (size_t k = 0; a != 1 && k < periods; k++) {
            const size_t left = (n - k * PERIOD < PERIOD ? n - k * PERIOD : PERIOD) * ELEMENT;

            if (memcmp((char *)whole.array[a] + k * period, one.array[a], left) != 0) {
                fprintf(stderr, "array %zu differs in period %zu\n", a, k);
                return 1;
            }
        }
    const size_t left = n % PERIOD * ELEMENT; /* what is behind the tensor is as it was */
    if (memcmp((char *)whole.array[0] + n * ELEMENT, (char *)before + left, period - left) != 0)
        return 1;
    printf("%zu elements\n", n);
    return 0;
}
