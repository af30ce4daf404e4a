/* Wrong calls of the runtime, at random: otherwise valid ones that are spoiled in up to three places.
 *
 *     fuzz NUMBER SEED
 *
 * A call that gives an error must not have written to the tensors, the statistics or the count of steps; no call may
 * touch what is not its own, which the sanitizers see.
 */
#include "emitted.h"

#include <stdio.h>
#include <stdlib.h>

enum { TENSORS = 4, WORDS = 6, ROOM = 2304 }; /* the last word is for what a step adds */

static uint64_t seed;

static uint64_t draw(uint64_t below)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (seed >> 17) % below;
}

static const uint64_t odd[] = {0, 1, 2, 3, 7, 8, 31, 255, 1024, 1025, 4096, 0x7fffffff, 0x80000000u, 0xffffffffu,
                               (uint64_t)1 << 52, (uint64_t)1 << 61, (uint64_t)1 << 62, (uint64_t)1 << 63,
                               UINT64_MAX - 1023, UINT64_MAX - 7, UINT64_MAX};
static const double odd_reals[] = {0.0, -0.0, 1.0, -1.0, 1e308, -1e308, 5e-324, 1e-310, 0.5, 2.0};

static uint64_t odd_one(void)
{
    return odd[draw(sizeof odd / sizeof *odd)];
}

static double odd_real(void)
{
    const uint64_t k = draw(sizeof odd_reals / sizeof *odd_reals + 3);
    const double zero = odd_reals[0];

    if (k < sizeof odd_reals / sizeof *odd_reals)
        return odd_reals[k];
    return k % 3 == 0 ? 1.0 / zero : k % 3 == 1 ? -1.0 / zero : zero / zero;
}

int main(int count, char **words)
{
    const optforge_kernel *const kernels[] = {RULES(KERNELS) NULL};
    const uint64_t number = count > 1 ? strtoull(words[1], NULL, 10) : 1000;
    uint64_t statuses[200] = {0}, total = 0;
    const size_t kinds = sizeof kernels / sizeof *kernels - 1, size = (size_t)TENSORS * WORDS * ROOM * 8;
    char *memory = (char *)malloc(size), *before = (char *)malloc(size);

    seed = count > 2 ? strtoull(words[2], NULL, 10) : 1;
    if (memory == NULL || before == NULL)
        return 2;
    for (uint64_t call = 0; call < number; call++) {
        optforge_kernel kernel = *kernels[draw(kinds)];
        const size_t width = 1 + kernel.arrays, tensors = 1 + (size_t)draw(TENSORS);
        void *delta[TENSORS];
        size_t table[TENSORS * (WORDS + 1)], group[TENSORS], numbers[TENSORS], part[TENSORS], sizes[TENSORS];
        uint64_t steps[TENSORS], applied = 5;
        unsigned char starting[TENSORS];
        double hyper[2][16];
        optforge_stats stats[1 + TENSORS], stats_before[1 + TENSORS];
        optforge_list list;
        optforge_options o;
        double *workspace = NULL;
        size_t room;
        int status;

        memset(&list, 0, sizeof list);
        memset(stats, 0x5a, sizeof stats);
        for (size_t k = 0; k < 2; k++)
            memcpy(hyper[k], kernel.hyper_defaults, kernel.hypers * sizeof(double));
        memmove(hyper[0] + kernel.hypers, hyper[1], kernel.hypers * sizeof(double));
        for (size_t k = 0; k < tensors; k++) {
            static const size_t lengths[] = {0, 1, 33, 1023, 1024, 1025, 2049};

            sizes[k] = table[k * width] = lengths[draw(7)];
            for (size_t a = 0; a < kernel.arrays; a++)
                table[k * width + 1 + a] = (size_t)(uintptr_t)(memory + (k * WORDS + a) * ROOM * 8);
            delta[k] = memory + (k * WORDS + WORDS - 1) * ROOM * 8;
            group[k] = draw(2);
            numbers[k] = tensors - 1 - k;
            part[k] = 0;
            steps[k] = 1 + draw(3);
            starting[k] = (unsigned char)draw(2);
        }
        for (size_t k = 0; k < size; k += 8) {
            const float near[2] = {0.5f, 0.25f};

            memcpy(memory + k, near, 8);
        }
        list.kernel = &kernel;
        list.hyper = hyper[0];
        list.t = 3;
        list.tensors = table;
        list.count = tensors;
        if (draw(2)) {
            list.group = group;
            list.groups = 2;
        }
        if (draw(3) == 0)
            list.steps = steps;
        if (draw(2))
            list.number = numbers;
        if (draw(3) == 0)
            list.starting = starting;
        if (draw(4) == 0)
            list.delta = delta;
        memset(&o, 0, sizeof o);
        o.size = sizeof o;
        o.grad_scale = 1.0;
        o.skip_nonfinite = (int)draw(2);
        o.zero_grads = (int)draw(2);
        o.threads = draw(8) != 0 ? (int)draw(4) : draw(2) ? -1 : 1000000;
        o.applied = draw(2) ? &applied : NULL;
        if (draw(2))
            o.stats = stats;
        if (draw(2))
            o.tensor_stats = stats + 1;
        if (draw(4) == 0) {
            size_t turned[TENSORS];

            list.part = part;
            for (size_t k = 0; k < tensors; k++)
                turned[list.number != NULL ? numbers[k] : k] = sizes[k];
            memcpy(sizes, turned, tensors * sizeof *sizes);
            o.sizes = sizes;
            o.tensors = tensors;
        }
        room = optforge_workspace_size(&list, 1, &o);
        for (uint64_t times = draw(4); times > 0; times--) {
            const size_t k = (size_t)draw(tensors);

            switch (draw(27)) {
            case 0: kernel.abi = (unsigned)odd_one(); break;
            case 1: kernel.pass_count = kernel.pass_count + 16u + (unsigned)draw(100); break;
            case 2: kernel.scalars_size = (size_t)odd_one() | 4097u; break;
            case 3: o.size = (size_t)odd_one(); break;
            case 4: o.grad_scale = odd_real(); break;
            case 5: list.t = odd_one(); break;
            case 6: steps[k] = odd_one(); break;
            case 7: group[k] = (size_t)odd_one(); break;
            case 8: numbers[k] = (size_t)odd_one(); break;
            case 9: part[k] = (size_t)odd_one(); break;
            case 10: sizes[k] = (size_t)odd_one(); break;
            case 11: hyper[0][draw(kernel.hypers + 1)] = odd_real(); break;
            case 12: table[k * width] = (size_t)odd_one() | (size_t)1 << 40; break;
            case 13: table[k * width + 1 + draw(width - 1)] = 0; break;
            case 14: table[k * width + 2] += table[k * width + 2] != 0 ? (size_t)draw(8) : 0; break;
            case 15: table[k * width + 1] = table[k * width + 2 + draw(width - 2)]; break;
            case 16: list.kernel = NULL; break;
            case 17: list.hyper = NULL; break;
            case 18: list.tensors = NULL; break;
            case 19: room -= draw(room + 1); break;
            case 20: kernel.arrays = (size_t)odd_one() % 3 == 0 ? 0 : 1; break;
            case 21: kernel.passes = NULL; break;
            case 22: kernel.begin = NULL; break;
            case 23: delta[k] = NULL; break;
            case 24: delta[k] = (void *)(uintptr_t)table[k * width + 1 + draw(width - 1)]; break;
            case 25: delta[k] = delta[k] != NULL ? (char *)delta[k] + draw(8) : NULL; break;
            default: table[k * width] = (size_t)draw(2050); break;
            }
        }
        workspace = (double *)malloc(room + 8);
        if (workspace == NULL)
            return 2;
        memset(workspace, 0xff, room + 8);
        o.workspace = draw(40) == 0 ? NULL : (char *)workspace + (draw(40) == 0 ? draw(8) : 0);
        o.workspace_size = room;
        memcpy(before, memory, size);
        memcpy(stats_before, stats, sizeof stats);
        status = optforge_step_lists(&list, 1, &o);
        if (status > 0 && (memcmp(before, memory, size) != 0 || memcmp(stats_before, stats, sizeof stats) != 0 || applied != 5)) {
            printf("call %llu: status %d, and something is written\n", (unsigned long long)call, status);
            return 1;
        }
        if (status < -1 || status >= 200 || *optforge_strerror(status) == '\0')
            return 1;
        statuses[status + 1]++;
        total++;
        free(workspace);
    }
    for (size_t k = 0; k < 200; k++)
        if (statuses[k] > 0)
            printf("%d %llu\n", (int)k - 1, (unsigned long long)statuses[k]);
    free(memory);
    free(before);
    return total == number ? 0 : 1;
}
