/* optforge.c: how a step of any rule is done: checks, threads, the summation tree, skipping, statistics.
 *
 * Read it from the end: optforge_step_lists begins a step, and for each phase lets every thread take its share of the
 * leaves, which are 1,024 neighbouring elements each, and folds what they have added up. The formulas are in the rule's
 * file, as functions over a piece of a leaf.
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
    OPTFORGE_CHUNK = 32768,      /* elements, or sums, of one node of the summation tree */
    OPTFORGE_THREAD_SIZE = 65536, /* elements per thread below which waking another one does not pay */
    OPTFORGE_MOST_SCALARS = 512  /* doubles of the scalars of a kernel */
};

/* ---- what adds up: 32 lanes of doubles, for each instruction set ------------------------------------------------- */

/* Adds n elements to the lanes, element i to lane i mod 32: of x times `scale`, or of x less `old`. Squares are of
 * doubles. */
typedef void (*optforge_add)(double *lanes, const void *x, const void *old, size_t n, double scale);

OPTFORGE_INLINE double optforge_largest(double a, double b)
{
    const double y = a > b ? a : b;

    return a != a ? a : y;
}

/* `value` is what is added of an element, `w` is it in double, `total` what the lane becomes: four rows at once, one
 * row, and what is left. */
#define OPTFORGE_ADD(name, real, value, total)                                                             \
    OPTFORGE_INLINE double name##_one(double lane, real x, real old, real by)                              \
    {                                                                                                      \
        const double w = (double)(value);                                                                  \
                                                                                                           \
        (void)old, (void)by;                                                                               \
        return total;                                                                                      \
    }                                                                                                      \
    OPTFORGE_INLINE void name(double *OPTFORGE_RESTRICT lanes, const real *OPTFORGE_RESTRICT x,            \
                              const real *OPTFORGE_RESTRICT old, size_t n, real by)                        \
    {                                                                                                      \
        for (; n >= 4 * OPTFORGE_LANES; n -= 4 * OPTFORGE_LANES, x += 4 * OPTFORGE_LANES, old += 4 * OPTFORGE_LANES) \
            for (size_t j = 0; j < OPTFORGE_LANES; j++) {                                                  \
                const double one = name##_one(lanes[j], x[j], old[j], by);                                 \
                const double two = name##_one(one, x[j + 32], old[j + 32], by);                            \
                const double three = name##_one(two, x[j + 64], old[j + 64], by);                          \
                                                                                                           \
                lanes[j] = name##_one(three, x[j + 96], old[j + 96], by);                                  \
            }                                                                                              \
        for (; n >= OPTFORGE_LANES; n -= OPTFORGE_LANES, x += OPTFORGE_LANES, old += OPTFORGE_LANES)       \
            for (size_t j = 0; j < OPTFORGE_LANES; j++)                                                    \
                lanes[j] = name##_one(lanes[j], x[j], old[j], by);                                         \
        for (size_t j = 0; j < n; j++)                                                                     \
            lanes[j] = name##_one(lanes[j], x[j], old[j], by);                                             \
    }                                                                                                      \
    OPTFORGE_EACH_SET(name, (double *lanes, const void *x, const void *old, size_t n, double scale),       \
                      name(lanes, (const real *)x, (const real *)old, n, (real)scale))

OPTFORGE_ADD(optforge_squares_f32, float, x * by, lane + w * w)
OPTFORGE_ADD(optforge_sum_f32, float, x * by, lane + w)
OPTFORGE_ADD(optforge_max_f32, float, x * by, optforge_largest(lane, fabs(w)))
OPTFORGE_ADD(optforge_change_f32, float, x - old, lane + w * w)
OPTFORGE_ADD(optforge_squares_f64, double, x * by, lane + w * w)
OPTFORGE_ADD(optforge_sum_f64, double, x * by, lane + w)
OPTFORGE_ADD(optforge_max_f64, double, x * by, optforge_largest(lane, fabs(w)))
OPTFORGE_ADD(optforge_change_f64, double, x - old, lane + w * w)

/* By format and instruction set: squares, sums, largest values, and squares of changes. */
static const optforge_add optforge_adds[2][4][OPTFORGE_SETS] = {
    {OPTFORGE_OF_SETS(optforge_squares_f32), OPTFORGE_OF_SETS(optforge_sum_f32), OPTFORGE_OF_SETS(optforge_max_f32),
     OPTFORGE_OF_SETS(optforge_change_f32)},
    {OPTFORGE_OF_SETS(optforge_squares_f64), OPTFORGE_OF_SETS(optforge_sum_f64), OPTFORGE_OF_SETS(optforge_max_f64),
     OPTFORGE_OF_SETS(optforge_change_f64)}
};

/* ---- the summation tree ------------------------------------------------------------------------------------------ */

static size_t optforge_least(size_t a, size_t b)
{
    return a < b ? a : b;
}

static double optforge_both(double a, double b, int kind)
{
    return kind == OPTFORGE_MAX ? optforge_largest(a, b) : a + b;
}

/* Folds 32 lanes into one, the upper half on the lower half again and again; lanes from `used` on are 0. */
static double optforge_fold_lanes(double *lanes, size_t used, int kind)
{
    for (size_t h = OPTFORGE_LANES / 2; h > 0; h /= 2)
        if (used > h)
            for (size_t j = 0; j < h; j++)
                lanes[j] = optforge_both(lanes[j], lanes[j + h], kind);
    return lanes[0];
}

/* A node of the tree: at most 32,768 values, lane by lane in leaves of 1,024, whose sums fold. */
static double optforge_node(const double *values, size_t n, int kind)
{
    double leaves[OPTFORGE_LANES] = {0.0};
    size_t number = 0;

    for (size_t i = 0; i < n; i += OPTFORGE_LEAF, number++) {
        const size_t stop = i + optforge_least(n - i, OPTFORGE_LEAF);
        double lanes[OPTFORGE_LANES] = {0.0};

        for (size_t j = i; j < stop; j++)
            lanes[j % OPTFORGE_LANES] = optforge_both(lanes[j % OPTFORGE_LANES], values[j], kind);
        leaves[number] = optforge_fold_lanes(lanes, stop - i, kind);
    }
    return optforge_fold_lanes(leaves, number, kind);
}

/* The total of values, which are overwritten. */
static double optforge_tree(double *values, size_t n, int kind)
{
    while (n > 1) {
        size_t nodes = 0;

        for (size_t i = 0; i < n; i += OPTFORGE_CHUNK, nodes++)
            values[nodes] = optforge_node(values + i, optforge_least(n - i, OPTFORGE_CHUNK), kind);
        n = nodes;
    }
    return n == 1 ? values[0] : 0.0;
}

/* The total of a tensor from the sums of its leaves, which are overwritten: 32 leaves fold into a chunk first. */
static double optforge_tensor_total(double *leaves, size_t n, int kind)
{
    size_t chunks = 0;

    if (n == 1)
        return leaves[0];
    for (size_t i = 0; i < n; i += OPTFORGE_LANES, chunks++) {
        const size_t own = optforge_least(n - i, OPTFORGE_LANES);
        double lanes[OPTFORGE_LANES] = {0.0};

        memcpy(lanes, leaves + i, own * sizeof *lanes);
        leaves[chunks] = optforge_fold_lanes(lanes, own, kind);
    }
    return optforge_tree(leaves, chunks, kind);
}

/* ---- instruction sets -------------------------------------------------------------------------------------------- */

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

/* Whether this machine has an instruction set. */
static int optforge_has(int set)
{
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

static int optforge_load_chosen(void)
{
#if defined(__GNUC__)
    return __atomic_load_n(&optforge_chosen, __ATOMIC_RELAXED);
#else
    return optforge_chosen;
#endif
}

static void optforge_choose(int set)
{
#if defined(__GNUC__)
    __atomic_store_n(&optforge_chosen, set, __ATOMIC_RELAXED);
#else
    optforge_chosen = set;
#endif
}

OPTFORGE_API int optforge_use(const char *name)
{
    if (name == NULL)
        return OPTFORGE_ERROR_NULL;
    for (int set = 0; set < OPTFORGE_SETS; set++)
        if (strcmp(name, optforge_sets[set]) == 0 && optforge_has(set)) {
            optforge_choose(set);
            return OPTFORGE_OK;
        }
    return OPTFORGE_ERROR_ISA;
}

/* The instruction set in use, chosen at the first call; -2 where the environment names none of this machine. */
static int optforge_set(void)
{
    int set = optforge_load_chosen();

    if (set == -1) {
        const char *named = getenv("OPTFORGE_ISA");

        if (named != NULL && *named != '\0') {
            if (optforge_use(named) != OPTFORGE_OK)
                optforge_choose(-2);
        } else {
            for (set = OPTFORGE_SETS - 1; !optforge_has(set); set--)
                ;
            optforge_choose(set);
        }
        set = optforge_load_chosen();
    }
    return set;
}

OPTFORGE_API const char *optforge_isa(void)
{
    const int set = optforge_set();

    return set < 0 ? "" : optforge_sets[set];
}

/* ---- flush to zero ----------------------------------------------------------------------------------------------- */

/* Lets this thread compute with subnormal numbers; gives what restores it. Programs that are linked with -ffast-math,
 * and libraries, switch them off. */
static uint64_t optforge_keep_subnormals(const optforge_options *o)
{
#if defined(__SSE__) || defined(_M_X64)
    const unsigned before = _mm_getcsr();

    if ((before & 0x8040u) != 0 && !o->allow_flush)
        _mm_setcsr(before & ~0x8040u);
    return before;
#elif defined(__aarch64__) && defined(__GNUC__)
    uint64_t before;

    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    if ((before & 0x1080000u) != 0 && !o->allow_flush)
        __asm__ volatile("msr fpcr, %0" : : "r"(before & ~(uint64_t)0x1080000u));
    return before;
#else
    (void)o;
    return 0;
#endif
}

static void optforge_restore_flush(uint64_t before)
{
#if defined(__SSE__) || defined(_M_X64)
    if (((unsigned)before & 0x8040u) != 0)
        _mm_setcsr((unsigned)before);
#elif defined(__aarch64__) && defined(__GNUC__)
    if ((before & 0x1080000u) != 0)
        __asm__ volatile("msr fpcr, %0" : : "r"(before));
#else
    (void)before;
#endif
}

/* Whether this thread computes without subnormal numbers all the same. */
static int optforge_flushes(void)
{
    volatile float least = FLT_MIN;
    volatile float half = least * 0.5f;

    return half == 0.0f;
}

/* ---- tensors as words -------------------------------------------------------------------------------------------- */

static const void *optforge_tensor(const optforge_list *l, size_t k)
{
    return (const char *)l->tensors + k * (sizeof(size_t) + l->kernel->arrays * sizeof(void *));
}

static size_t optforge_elements(const void *tensor)
{
    size_t n;

    memcpy(&n, tensor, sizeof n);
    return n;
}

/* Array number `a` of a tensor: 0 is p, 1 is g, then the state. */
static void *optforge_array(const void *tensor, size_t a)
{
    void *array;

    memcpy(&array, (const char *)tensor + sizeof(size_t) + a * sizeof array, sizeof array);
    return array;
}

static size_t optforge_leaves(size_t n)
{
    return n / OPTFORGE_LEAF + (n % OPTFORGE_LEAF != 0);
}

static size_t optforge_format_size(unsigned char format)
{
    return format == OPTFORGE_F32 ? sizeof(float) : sizeof(double);
}

static size_t optforge_groups(const optforge_list *l)
{
    return l->group != NULL && l->groups > 1 ? l->groups : 1;
}

/* The number of tensor k of a list among all, where lists before it have `before`. */
static size_t optforge_number(const optforge_list *l, size_t k, size_t before)
{
    return l->number != NULL ? l->number[k] : before + k;
}

/* Doubles of the scalars of a kernel. */
static size_t optforge_width(const optforge_kernel *kernel)
{
    return (kernel->scalars_size + sizeof(double) - 1) / sizeof(double);
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static int optforge_check_kernel(const optforge_kernel *kernel)
{
    if (kernel == NULL)
        return OPTFORGE_ERROR_NULL;
    if (kernel->abi != OPTFORGE_TYPES || kernel->formats == NULL || kernel->passes == NULL || kernel->begin == NULL ||
        kernel->arrays < 2 || kernel->arrays > 128 || kernel->pass_count < 1 || kernel->pass_count > OPTFORGE_MOST_PASSES ||
        kernel->scalars_size > OPTFORGE_MOST_SCALARS * sizeof(double))
        return OPTFORGE_ERROR_ABI;
    for (size_t a = 0; a < kernel->arrays; a++)
        if (kernel->formats[a] < OPTFORGE_F32 || kernel->formats[a] > (a < 2 ? OPTFORGE_F64 : OPTFORGE_SCALAR))
            return OPTFORGE_ERROR_ABI;
    for (unsigned p = 0; p < kernel->pass_count; p++) {
        const optforge_pass *pass = &kernel->passes[p];

        if (pass->sum_count > OPTFORGE_MOST_SUMS)
            return OPTFORGE_ERROR_ABI;
        for (size_t s = 0; s < pass->sum_count; s++) {
            const optforge_sum *sum = &pass->sums[s];
            const int array = sum->source == OPTFORGE_UNSCALED ? 1 : sum->source > 0 ? sum->source : 0;

            if (sum->slot >= OPTFORGE_MOST_SUMS || sum->slot == OPTFORGE_NAN || sum->slot == OPTFORGE_INF ||
                sum->kind > OPTFORGE_MAX || sum->source <= OPTFORGE_SCRATCH - OPTFORGE_MOST_SCRATCH ||
                (size_t)array >= kernel->arrays || kernel->formats[array] != kernel->formats[0])
                return OPTFORGE_ERROR_ABI;
        }
    }
    return OPTFORGE_OK;
}

/* Whether a tensor's arrays are there, aligned, and apart from each other. */
static int optforge_check_tensor(const optforge_kernel *kernel, const void *tensor)
{
    const size_t n = optforge_elements(tensor);

    for (size_t a = 0; a < kernel->arrays; a++) {
        const size_t size = optforge_format_size(kernel->formats[a]);
        const size_t bytes = kernel->formats[a] == OPTFORGE_SCALAR ? size : n * size;
        const uintptr_t own = (uintptr_t)optforge_array(tensor, a);

        if (n > SIZE_MAX / size)
            return OPTFORGE_ERROR_SIZE;
        if (bytes == 0)
            continue;
        if (own == 0)
            return OPTFORGE_ERROR_NULL;
        if (own % size != 0)
            return OPTFORGE_ERROR_ALIGNMENT;
        for (size_t b = 0; b < a; b++) {
            const size_t other_size = optforge_format_size(kernel->formats[b]);
            const size_t other_bytes = kernel->formats[b] == OPTFORGE_SCALAR ? other_size : n * other_size;
            const uintptr_t other = (uintptr_t)optforge_array(tensor, b);

            if (other_bytes != 0 && (own - other < other_bytes || other - own < bytes))
                return OPTFORGE_ERROR_OVERLAP;
        }
    }
    return OPTFORGE_OK;
}

/* Whether any pass of any list adds up something in this step. */
static int optforge_adds_up(const optforge_list *lists, size_t number, const optforge_options *o)
{
    if (o->skip_nonfinite || o->stats != NULL || o->tensor_stats != NULL)
        return 1;
    for (size_t i = 0; i < number; i++)
        for (unsigned p = 0; p < lists[i].kernel->pass_count; p++)
            for (size_t s = 0; s < lists[i].kernel->passes[p].sum_count; s++)
                if (!lists[i].kernel->passes[p].sums[s].observed)
                    return 1;
    return 0;
}

/* ---- the begin of a step ----------------------------------------------------------------------------------------- */

/* Memory to lay out; a workspace that is only measured has none. */
typedef struct optforge_room {
    char *memory;
    size_t used;
} optforge_room;

static void *optforge_take(optforge_room *room, size_t count, size_t size)
{
    void *taken = room->memory != NULL ? room->memory + room->used : NULL;

    room->used += (count * size + sizeof(double) - 1) / sizeof(double) * sizeof(double);
    return taken;
}

/* Numbers what each phase adds up: `place` of a sum among all. Phase 0 is the scan, where there is one. */
static void optforge_place_sums(optforge_work *w)
{
    size_t next = 0;

    memset(w->place, -1, sizeof w->place);
    for (int phase = 0; phase < w->phases; phase++) {
        const int p = phase - w->scan;

        w->phase_sums[phase] = next;
        if (p < 0)
            w->place[0][OPTFORGE_GRAD] = (short)next++;
        for (size_t i = 0; p >= 0 && i < w->number; i++) {
            const optforge_kernel *kernel = w->lists[i].kernel;

            for (size_t s = 0; p < (int)kernel->pass_count && s < kernel->passes[p].sum_count; s++)
                if (w->place[phase][kernel->passes[p].sums[s].slot] < 0)
                    w->place[phase][kernel->passes[p].sums[s].slot] = (short)next++;
        }
        if (w->place[phase][OPTFORGE_GRAD] >= 0) {
            w->place[phase][OPTFORGE_NAN] = (short)next++;
            w->place[phase][OPTFORGE_INF] = (short)next++;
        }
    }
    w->phase_sums[w->phases] = w->sums = next;
}

/* Doubles of a row of scalars: where tensors have counts of their own, the number of the row's first tensor follows. */
static size_t optforge_row_width(const optforge_list *l)
{
    return optforge_width(l->kernel) + (l->steps != NULL);
}

static size_t optforge_row_count(const optforge_list *l)
{
    const size_t groups = optforge_groups(l);

    return l->steps != NULL && l->count > groups ? l->count : groups;
}

/* Whether gradients have to be looked at before the first pass, to decide on skipping: it writes, or does not add
 * them up. */
static int optforge_scans(const optforge_kernel *kernel)
{
    const optforge_pass *first = &kernel->passes[0];
    int adds = 0;

    for (size_t s = 0; s < first->sum_count; s++)
        adds |= first->sums[s].slot == OPTFORGE_GRAD;
    return first->writes || !adds;
}

/* The sum of numbers of elements, SIZE_MAX where it is more. */
static size_t optforge_and(size_t a, size_t b)
{
    return b > SIZE_MAX - a ? SIZE_MAX : a + b;
}

/* Counts tensors, leaves and sums, and lays out the workspace; an error where there are more than can be counted. */
static int optforge_lay_out(optforge_work *w, optforge_room *room)
{
    const optforge_options *o = w->options;
    size_t width = 0, count = 0, whole = 0;

    w->phases = w->scan = w->tracks = 0;
    w->own_leaves = w->elements = 0;
    for (size_t i = 0; i < w->number; i++) {
        const optforge_list *l = &w->lists[i];

        width += optforge_row_count(l) * optforge_row_width(l);
        count += l->count;
        w->tracks |= l->steps != NULL;
        w->scan |= o->skip_nonfinite && optforge_scans(l->kernel);
        if ((int)l->kernel->pass_count > w->phases)
            w->phases = (int)l->kernel->pass_count;
        for (size_t k = 0; k < l->count; k++) {
            w->elements = optforge_and(w->elements, optforge_elements(optforge_tensor(l, k)));
            w->own_leaves += optforge_leaves(optforge_elements(optforge_tensor(l, k)));
        }
    }
    w->phases += w->scan + (w->number == 0); /* a step of nothing has a phase, too, which ends it */
    w->tensors = o->sizes != NULL ? o->tensors : count;
    w->leaves = o->sizes != NULL ? 0 : w->own_leaves;
    for (size_t k = 0; o->sizes != NULL && k < o->tensors; k++) {
        w->leaves += optforge_leaves(o->sizes[k]);
        whole = optforge_and(whole, o->sizes[k]);
    }
    if (w->elements > SIZE_MAX / sizeof(double) || whole > SIZE_MAX / sizeof(double))
        return OPTFORGE_ERROR_SIZE;
    w->rows = w->few;
    if (width > sizeof w->few / sizeof *w->few)
        w->rows = (double *)optforge_take(room, width, sizeof(double));
    w->row = w->tracks ? (size_t *)optforge_take(room, count, sizeof(size_t)) : NULL;
    optforge_place_sums(w);
    if (!optforge_adds_up(w->lists, w->number, o)) {
        w->sums = 0;
        return OPTFORGE_OK;
    }
    w->first = (size_t *)optforge_take(room, w->tensors + 1, sizeof(size_t));
    w->totals = (double *)optforge_take(room, w->number * OPTFORGE_MOST_SUMS, sizeof(double));
    w->tensor_sums = (double *)optforge_take(room, w->sums * w->tensors, sizeof(double));
    w->gathered = (double *)optforge_take(room, w->tensors, sizeof(double));
    w->leaf_sums = (double *)optforge_take(room, w->sums * w->leaves, sizeof(double));
    return OPTFORGE_OK;
}

OPTFORGE_API size_t optforge_workspace_size(const optforge_list *lists, size_t number, const optforge_options *options)
{
    optforge_work w;
    optforge_room room = {NULL, 0};

    if (options == NULL || (lists == NULL && number > 0))
        return 0;
    for (size_t i = 0; i < number; i++)
        if (optforge_check_kernel(lists[i].kernel) != OPTFORGE_OK || (lists[i].tensors == NULL && lists[i].count > 0))
            return 0;
    w.lists = lists;
    w.number = number;
    w.options = options;
    return optforge_lay_out(&w, &room) == OPTFORGE_OK ? room.used : 0;
}

OPTFORGE_API size_t optforge_kernel_workspace(const optforge_kernel *kernel, uint64_t elements, size_t count)
{
    const size_t leaves = (size_t)(elements / OPTFORGE_LEAF) + count;
    size_t sums = 3;

    if (optforge_check_kernel(kernel) != OPTFORGE_OK)
        return 0;
    for (unsigned p = 0; p < kernel->pass_count; p++)
        sums += kernel->passes[p].sum_count + 2u;
    return sizeof(double) * ((optforge_width(kernel) + 4) * count + 1 + OPTFORGE_MOST_SUMS + sums * (count + leaves));
}

/* Whether the hyperparameters of a list are numbers, and what they and t give for a row. */
static int optforge_begin_row(const optforge_list *l, size_t group, uint64_t t, double unscale, double *row)
{
    const double *hyper = (const double *)l->hyper + group * l->kernel->hypers;

    for (size_t k = 0; k < l->kernel->hypers; k++)
        if (hyper[k] != hyper[k])
            return OPTFORGE_ERROR_NAN;
    if (t == 0)
        return OPTFORGE_ERROR_TIME;
    return l->kernel->begin(row, hyper, t, unscale);
}

/* The scalars of all groups of a list; where tensors have counts of their own, once for each group and count. */
static int optforge_begin_rows(optforge_work *w, const optforge_list *l, double *rows, size_t *row)
{
    const size_t width = optforge_row_width(l);
    const double unscale = 1.0 / w->options->grad_scale;
    size_t used = 0;
    int status = OPTFORGE_OK;

    for (size_t g = 0; l->steps == NULL && g < optforge_groups(l) && status == OPTFORGE_OK; g++)
        status = optforge_begin_row(l, g, l->t, unscale, rows + g * width);
    for (size_t k = 0; l->steps != NULL && k < l->count && status == OPTFORGE_OK; k++) {
        const size_t group = l->group != NULL ? l->group[k] : 0;
        size_t r = used;

        while (r > 0) {
            const size_t same = (size_t)rows[r * width - 1];

            if (l->steps[same] == l->steps[k] && (l->group == NULL || l->group[same] == group))
                break;
            r--;
        }
        if (r == 0) {
            r = ++used;
            status = optforge_begin_row(l, group, l->steps[k], unscale, rows + (r - 1) * width);
            rows[r * width - 1] = (double)k;
        }
        row[k] = (size_t)(rows - w->rows) + (r - 1) * width;
    }
    return status;
}

/* Elements of the whole tensor of which tensor k of a list is a part. */
static size_t optforge_whole(const optforge_work *w, const optforge_list *l, size_t k, size_t before)
{
    return w->options->sizes != NULL ? w->options->sizes[optforge_number(l, k, before)]
                                     : optforge_elements(optforge_tensor(l, k));
}

/* Whether tensor k of a list is in order: its number, its group, its part, its arrays. */
static int optforge_check_place(const optforge_work *w, const optforge_list *l, size_t k, size_t before)
{
    const void *tensor = optforge_tensor(l, k);
    const size_t n = optforge_elements(tensor), part = l->part != NULL ? l->part[k] : 0;

    if (l->group != NULL && l->group[k] >= (l->groups > 1 ? l->groups : 1))
        return OPTFORGE_ERROR_GROUP;
    if (optforge_number(l, k, before) >= w->tensors)
        return OPTFORGE_ERROR_NUMBER;
    if (w->options->sizes != NULL || part != 0) {
        const size_t whole = optforge_whole(w, l, k, before);

        if (part > whole || n > whole - part)
            return OPTFORGE_ERROR_PART;
        if (w->sums > 0 && (part % OPTFORGE_LEAF != 0 || (n % OPTFORGE_LEAF != 0 && part + n != whole)))
            return OPTFORGE_ERROR_PART;
    }
    return w->options->checked ? OPTFORGE_OK : optforge_check_tensor(l->kernel, tensor);
}

/* Where the leaves of each whole tensor begin among all. */
static int optforge_number_leaves(optforge_work *w)
{
    size_t before = 0, leaves = 0;

    memset(w->first, -1, (w->tensors + 1) * sizeof *w->first);
    for (size_t k = 0; w->options->sizes != NULL && k < w->tensors; k++)
        w->first[k] = optforge_leaves(w->options->sizes[k]);
    for (size_t i = 0; w->options->sizes == NULL && i < w->number; before += w->lists[i].count, i++)
        for (size_t k = 0; k < w->lists[i].count; k++) {
            size_t *own = &w->first[optforge_number(&w->lists[i], k, before)];

            if (*own != (size_t)-1)
                return OPTFORGE_ERROR_NUMBER;
            *own = optforge_leaves(optforge_elements(optforge_tensor(&w->lists[i], k)));
        }
    for (size_t k = 0; k < w->tensors; k++) {
        const size_t own = w->first[k];

        w->first[k] = leaves;
        leaves += own;
    }
    w->first[w->tensors] = leaves;
    return OPTFORGE_OK;
}

/* Whether two kernels add up the same, so that they share totals. */
static int optforge_alike(const optforge_kernel *a, const optforge_kernel *b)
{
    if (a == b)
        return 1;
    if (a->pass_count != b->pass_count)
        return 0;
    for (unsigned p = 0; p < a->pass_count; p++) {
        if (a->passes[p].sum_count != b->passes[p].sum_count)
            return 0;
        for (size_t s = 0; s < a->passes[p].sum_count; s++) {
            const optforge_sum *x = &a->passes[p].sums[s], *y = &b->passes[p].sums[s];

            if (x->slot != y->slot || x->kind != y->kind || x->observed != y->observed || strcmp(x->name, y->name) != 0)
                return 0;
        }
    }
    return 1;
}

/* The row of scalars of tensor k of list i, whose rows and tensors begin at `rows` and `before`. */
static double *optforge_row(const optforge_work *w, const optforge_list *l, size_t k, size_t rows, size_t before)
{
    if (l->steps != NULL)
        return w->rows + w->row[before + k];
    return w->rows + rows + (l->group != NULL && l->groups > 1 ? l->group[k] * optforge_row_width(l) : 0);
}

/* All checks of a step, and its first scalars. */
static int optforge_prepare(optforge_work *w)
{
    const optforge_options *o = w->options;
    optforge_room room = {NULL, 0};
    size_t rows = 0, before = 0;
    int status = OPTFORGE_OK;

    if (o == NULL || (w->lists == NULL && w->number > 0))
        return OPTFORGE_ERROR_NULL;
    if (o->size != sizeof *o)
        return OPTFORGE_ERROR_OPTIONS;
    if (!(o->grad_scale > 0.0 && 1.0 / o->grad_scale > 0.0 && 1.0 / o->grad_scale - 1.0 / o->grad_scale == 0.0))
        return OPTFORGE_ERROR_GRAD_SCALE;
    w->set = optforge_set();
    if (w->set < 0)
        return OPTFORGE_ERROR_ISA;
    if (optforge_flushes() && !o->allow_flush)
        return OPTFORGE_ERROR_FLUSH;
    for (size_t i = 0; i < w->number; i++) {
        const optforge_list *l = &w->lists[i];

        status = optforge_check_kernel(l->kernel);
        if (status != OPTFORGE_OK)
            return status;
        if ((l->hyper == NULL && l->kernel->hypers > 0) || (l->tensors == NULL && l->count > 0))
            return OPTFORGE_ERROR_NULL;
        if (o->sizes != NULL && !optforge_alike(l->kernel, w->lists[0].kernel))
            return OPTFORGE_ERROR_PART;
        if (optforge_row_count(l) > SIZE_MAX / sizeof(double) / (2 * OPTFORGE_MOST_SCALARS))
            return OPTFORGE_ERROR_WORKSPACE; /* more scalars than memory can hold */
    }
    status = optforge_lay_out(w, &room);
    if (status != OPTFORGE_OK)
        return status;
    if (room.used > 0) {
        if (o->workspace == NULL)
            return OPTFORGE_ERROR_NULL;
        if (o->workspace_size < room.used || (uintptr_t)o->workspace % sizeof(double) != 0)
            return OPTFORGE_ERROR_WORKSPACE;
        room.memory = (char *)o->workspace;
        room.used = 0;
        (void)optforge_lay_out(w, &room);
    }
    for (size_t i = 0; i < w->number; i++) {
        const optforge_list *l = &w->lists[i];

        for (size_t k = 0; k < l->count && status == OPTFORGE_OK; k++)
            status = optforge_check_place(w, l, k, before);
        if (status == OPTFORGE_OK)
            status = optforge_begin_rows(w, l, w->rows + rows, w->row != NULL ? w->row + before : NULL);
        for (size_t k = 0; l->kernel->begin_tensor != NULL && k < l->count && status == OPTFORGE_OK; k++) {
            double own[OPTFORGE_MOST_SCALARS];

            memcpy(own, optforge_row(w, l, k, rows, before), l->kernel->scalars_size);
            status = l->kernel->begin_tensor(own, optforge_tensor(l, k), (double)optforge_whole(w, l, k, before),
                                             l->starting != NULL && l->starting[k] != 0);
        }
        if (status != OPTFORGE_OK)
            return status;
        rows += optforge_row_count(l) * optforge_row_width(l);
        before += l->count;
    }
    if (w->sums > 0) {
        status = optforge_number_leaves(w);
        if (o->sizes != NULL)
            memset(w->leaf_sums, 0, w->sums * w->leaves * sizeof *w->leaf_sums);
    }
    return status;
}

OPTFORGE_API int optforge_begin(optforge_work *w, const optforge_list *lists, size_t number,
                                const optforge_options *options)
{
    uint64_t flush = 0;
    int status;

    if (w == NULL)
        return OPTFORGE_ERROR_NULL;
    memset(w, 0, offsetof(optforge_work, few));
    w->lists = lists;
    w->number = number;
    w->options = options;
    if (options != NULL)
        flush = optforge_keep_subnormals(options);
    status = optforge_prepare(w);
    if (options != NULL)
        optforge_restore_flush(flush);
    if (status == OPTFORGE_OK) {
        w->observe = options->stats != NULL || options->tensor_stats != NULL;
        w->begun = w;
    }
    return status;
}

OPTFORGE_API int optforge_check(const optforge_list *lists, size_t number, const optforge_options *options)
{
    optforge_work w;

    return optforge_begin(&w, lists, number, options);
}

/* ---- the elements ------------------------------------------------------------------------------------------------ */

/* Where the sums of phase `phase` of a slot are, for all tensors. */
static double *optforge_sums_of(const optforge_work *w, int phase, unsigned slot)
{
    return w->tensor_sums + (size_t)w->place[phase][slot] * w->tensors;
}

/* The scalars of tensor k of list i as a pass needs them: the group's row, or a copy in `own` with the tensor's. */
static const double *optforge_scalars(const optforge_work *w, size_t i, size_t k, size_t rows, size_t before,
                                      unsigned pass, double *own)
{
    const optforge_list *l = &w->lists[i];
    const optforge_kernel *kernel = l->kernel;
    const double *row = optforge_row(w, l, k, rows, before);

    if (kernel->begin_tensor == NULL && kernel->behind_tensor == NULL)
        return row;
    memcpy(own, row, kernel->scalars_size);
    if (kernel->begin_tensor != NULL)
        (void)kernel->begin_tensor(own, optforge_tensor(l, k), (double)optforge_whole(w, l, k, before),
                                   l->starting != NULL && l->starting[k] != 0);
    for (unsigned p = 0; kernel->behind_tensor != NULL && p < pass; p++) {
        double sums[OPTFORGE_MOST_SUMS];

        for (size_t s = 0; s < kernel->passes[p].sum_count; s++) {
            const unsigned slot = kernel->passes[p].sums[s].slot;

            sums[slot] = optforge_sums_of(w, (int)p + w->scan, slot)[optforge_number(l, k, before)];
        }
        kernel->behind_tensor(own, p, sums, w->totals + i * OPTFORGE_MOST_SUMS);
    }
    return own;
}

/* Counts NaN and infinity among unscaled gradients. */
static void optforge_count(const void *g, unsigned char format, size_t begin, size_t n, double unscale, double *nan,
                           double *inf)
{
    *nan = *inf = 0.0;
    for (size_t i = begin; i < begin + n; i++) {
        const double x = format == OPTFORGE_F32 ? (double)(((const float *)g)[i] * (float)unscale)
                                                : ((const double *)g)[i] * unscale;

        *nan += x != x;
        *inf += x == x && x - x != 0.0;
    }
}

/* What is the same for all leaves of a tensor in a phase. */
typedef struct optforge_span {
    const optforge_kernel *kernel;
    const optforge_pass *pass; /* NULL: the scan */
    optforge_run run;
    const optforge_sum *sums[OPTFORGE_MOST_SUMS];
    size_t sum_count;
    int counts;  /* whether NaN and infinity are counted */
    int changes; /* whether p before the pass is asked for */
    int zeroes;
    size_t leaf; /* of the tensor's first element among all leaves */
} optforge_span;

static const optforge_sum optforge_scanned = {"g", OPTFORGE_GRAD, OPTFORGE_SQUARES, 1, OPTFORGE_UNSCALED};

/* What a phase does with a tensor. */
static void optforge_plan_span(const optforge_work *w, int phase, const optforge_kernel *kernel, optforge_span *span)
{
    const int p = phase - w->scan;
    const int counting = w->observe || (w->options->skip_nonfinite && phase == 0);

    memset(span, 0, sizeof *span);
    span->kernel = kernel;
    if (p >= (int)kernel->pass_count)
        return;
    if (p < 0) {
        span->sums[span->sum_count++] = &optforge_scanned;
        span->counts = 1;
        return;
    }
    span->pass = &kernel->passes[p];
    span->zeroes = span->pass->zeroes && w->options->zero_grads;
    if (w->skipped)
        return;
    span->run = (w->observe ? span->pass->observed : span->pass->plain)[w->set];
    for (size_t s = 0; s < span->pass->sum_count; s++) {
        const optforge_sum *sum = &span->pass->sums[s];
        const int again = sum->slot == OPTFORGE_GRAD && w->scan; /* the scan has added it up */

        if (!sum->observed || (!again && (sum->slot == OPTFORGE_GRAD ? counting : w->observe))) {
            span->sums[span->sum_count++] = sum;
            span->counts |= sum->slot == OPTFORGE_GRAD && counting && !again;
            span->changes |= sum->source == OPTFORGE_CHANGE;
        }
    }
}

/* Adds up what a pass has left of a piece. `old` is p before the pass. */
static void optforge_add_up(const optforge_work *w, const optforge_span *span, const optforge_piece *x, const void *old,
                            double (*lanes)[OPTFORGE_LANES])
{
    const unsigned char real = span->kernel->formats[0];
    const size_t size = optforge_format_size(real);

    for (size_t s = 0; s < span->sum_count; s++) {
        const int source = span->sums[s]->source, kind = source == OPTFORGE_CHANGE ? 3 : span->sums[s]->kind;
        const size_t array = source == OPTFORGE_UNSCALED ? 1 : source > 0 ? (size_t)source : 0;
        const char *values = (const char *)optforge_array(x->tensor, array) + x->begin * size;

        if (source <= OPTFORGE_SCRATCH)
            values = (const char *)x->scratch + (size_t)(OPTFORGE_SCRATCH - source) * OPTFORGE_PIECE * size;
        optforge_adds[real - OPTFORGE_F32][kind][w->set](
            lanes[s], values, old, x->n, source == OPTFORGE_UNSCALED ? 1.0 / w->options->grad_scale : 1.0);
    }
}

/* Leaf number `leaf` of a tensor. */
static void optforge_leaf(const optforge_work *w, int phase, const optforge_span *span, optforge_piece *x, size_t leaf)
{
    const optforge_kernel *kernel = span->kernel;
    const size_t n = optforge_elements(x->tensor), begin = leaf * OPTFORGE_LEAF;
    const size_t stop = begin + optforge_least(n - begin, OPTFORGE_LEAF);
    const size_t most = span->sum_count > 0 ? OPTFORGE_PIECE : OPTFORGE_LEAF;
    const size_t size = optforge_format_size(kernel->formats[0]);
    double lanes[OPTFORGE_MOST_SUMS][OPTFORGE_LANES], old[OPTFORGE_PIECE];

    for (size_t s = 0; s < span->sum_count; s++)
        memset(lanes[s], 0, sizeof lanes[s]);
    for (x->begin = begin; x->begin < stop; x->begin += most) {
        x->n = optforge_least(stop - x->begin, most);
        if (span->changes)
            memcpy(old, (const char *)optforge_array(x->tensor, 0) + x->begin * size, x->n * size);
        if (span->run != NULL)
            span->run(x);
        optforge_add_up(w, span, x, old, lanes);
    }
    for (size_t s = 0; s < span->sum_count; s++) {
        const unsigned slot = span->sums[s]->slot;
        const double total = optforge_fold_lanes(lanes[s], stop - begin, span->sums[s]->kind);

        w->leaf_sums[(size_t)w->place[phase][slot] * w->leaves + span->leaf + leaf] = total;
        if (slot == OPTFORGE_GRAD && span->counts) {
            double nan = 0.0, inf = 0.0;

            if (total - total != 0.0)
                optforge_count(optforge_array(x->tensor, 1), kernel->formats[1], begin, stop - begin,
                               1.0 / w->options->grad_scale, &nan, &inf);
            w->leaf_sums[(size_t)w->place[phase][OPTFORGE_NAN] * w->leaves + span->leaf + leaf] = nan;
            w->leaf_sums[(size_t)w->place[phase][OPTFORGE_INF] * w->leaves + span->leaf + leaf] = inf;
        }
    }
    if (span->zeroes)
        memset((char *)optforge_array(x->tensor, 1) + begin * optforge_format_size(kernel->formats[1]), 0,
               (stop - begin) * optforge_format_size(kernel->formats[1]));
}

/* Where share k of a number of leaves begins. */
static size_t optforge_split(size_t all, size_t k, size_t parts)
{
    return all / parts * k + all % parts * k / parts;
}

/* The leaves [from, to) of all leaves of the lists. */
static void optforge_leaves_of(const optforge_work *w, int phase, size_t from, size_t to)
{
    double own[OPTFORGE_MOST_SCALARS], scratch[OPTFORGE_MOST_SCRATCH * OPTFORGE_PIECE];
    size_t leaf = 0, rows = 0, before = 0;

    for (size_t i = 0; i < w->number && leaf < to; i++) {
        const optforge_list *l = &w->lists[i];
        optforge_span span;

        optforge_plan_span(w, phase, l->kernel, &span);
        for (size_t k = 0; k < l->count && leaf < to; k++) {
            const void *tensor = optforge_tensor(l, k);
            const size_t number = optforge_leaves(optforge_elements(tensor));
            const size_t first = from > leaf ? from - leaf : 0, last = to - leaf < number ? to - leaf : number;

            if (first < last && (span.run != NULL || span.sum_count > 0 || span.zeroes)) {
                optforge_piece x = {tensor, NULL, 0, 0, scratch};

                if (span.run != NULL)
                    x.scalars = optforge_scalars(w, i, k, rows, before, (unsigned)(phase - w->scan), own);
                if (span.sum_count > 0)
                    span.leaf = w->first[optforge_number(l, k, before)] +
                                (l->part != NULL ? l->part[k] / OPTFORGE_LEAF : 0);
                for (size_t own_leaf = first; own_leaf < last; own_leaf++)
                    optforge_leaf(w, phase, &span, &x, own_leaf);
            }
            leaf += number;
        }
        rows += optforge_row_count(l) * optforge_row_width(l);
        before += l->count;
    }
}

OPTFORGE_API void optforge_share(optforge_work *w, int phase, size_t ith, size_t nth)
{
    if (w != NULL && w->begun == w && phase == w->due && ith < nth) {
        const uint64_t flush = optforge_keep_subnormals(w->options);

        optforge_leaves_of(w, phase, optforge_split(w->own_leaves, ith, nth),
                           optforge_split(w->own_leaves, ith + 1, nth));
        optforge_restore_flush(flush);
    }
}

/* ---- behind a phase ---------------------------------------------------------------------------------------------- */

/* Adds up the leaves of those tensors whose first leaf is in share `ith`. */
static void optforge_fold_tensor(const optforge_work *w, int phase, const optforge_kernel *kernel, size_t number)
{
    optforge_span span;
    const size_t first = w->first[number], leaves = w->first[number + 1] - first;

    optforge_plan_span(w, phase, kernel, &span);
    for (size_t s = 0; s < span.sum_count; s++) {
        const unsigned slot = span.sums[s]->slot;

        optforge_sums_of(w, phase, slot)[number] =
            optforge_tensor_total(w->leaf_sums + (size_t)w->place[phase][slot] * w->leaves + first, leaves,
                                  span.sums[s]->kind);
    }
    for (unsigned slot = OPTFORGE_NAN; span.counts && slot <= OPTFORGE_INF; slot++)
        optforge_sums_of(w, phase, slot)[number] = optforge_tensor_total(
            w->leaf_sums + (size_t)w->place[phase][slot] * w->leaves + first, leaves, OPTFORGE_SUM);
}

static void optforge_fold_tensors(const optforge_work *w, int phase, size_t ith, size_t nth)
{
    const size_t from = optforge_split(w->leaves, ith, nth);
    const size_t to = ith + 1 < nth ? optforge_split(w->leaves, ith + 1, nth) : (size_t)-1;
    size_t before = 0;

    if (w->sums == 0 || w->skipped)
        return;
    for (size_t k = 0; w->options->sizes != NULL && w->number > 0 && k < w->tensors; k++)
        if (w->first[k] >= from && w->first[k] < to)
            optforge_fold_tensor(w, phase, w->lists[0].kernel, k);
    for (size_t i = 0; w->options->sizes == NULL && i < w->number; before += w->lists[i].count, i++)
        for (size_t k = 0; k < w->lists[i].count; k++) {
            const size_t number = optforge_number(&w->lists[i], k, before);

            if (w->first[number] >= from && w->first[number] < to)
                optforge_fold_tensor(w, phase, w->lists[i].kernel, number);
        }
}

/* The slot of a kernel's statistic, or of one of its sums that is called as another kernel's; -1 where it has none. */
static int optforge_slot(const optforge_kernel *kernel, int statistic, unsigned pass, const optforge_sum *sum)
{
    if (sum == NULL)
        return kernel->statistics[statistic] < OPTFORGE_MOST_SUMS ? kernel->statistics[statistic] : -1;
    for (size_t s = 0; pass < kernel->pass_count && s < kernel->passes[pass].sum_count; s++) {
        const optforge_sum *own = &kernel->passes[pass].sums[s];

        if (own->kind == sum->kind && !own->observed && strcmp(own->name, sum->name) == 0)
            return own->slot;
    }
    return -1;
}

/* The phase in which a kernel adds up a slot. */
static int optforge_phase_of(const optforge_work *w, const optforge_kernel *kernel, int slot)
{
    if (w->scan && slot == OPTFORGE_GRAD)
        return 0;
    for (unsigned p = 0; p < kernel->pass_count; p++)
        for (size_t s = 0; s < kernel->passes[p].sum_count; s++)
            if (kernel->passes[p].sums[s].slot == slot)
                return (int)p + w->scan;
    return 0;
}

/* The total over all tensors of a statistic, or of a sum of a pass. */
static double optforge_total(const optforge_work *w, int statistic, unsigned pass, const optforge_sum *sum)
{
    size_t before = 0;

    memset(w->gathered, 0, w->tensors * sizeof *w->gathered);
    for (size_t i = 0; i < w->number; before += w->lists[i].count, i++) {
        const optforge_list *l = &w->lists[i];
        const int slot = optforge_slot(l->kernel, statistic, pass, sum);
        const double *sums;

        if (slot < 0)
            continue;
        sums = optforge_sums_of(w, sum != NULL ? (int)pass + w->scan : optforge_phase_of(w, l->kernel, slot),
                                (unsigned)slot);
        if (w->options->sizes != NULL) { /* of all tensors, those elsewhere too */
            memcpy(w->gathered, sums, w->tensors * sizeof *sums);
            break;
        }
        for (size_t k = 0; k < l->count; k++)
            w->gathered[optforge_number(l, k, before)] = sums[optforge_number(l, k, before)];
    }
    return optforge_tree(w->gathered, w->tensors, sum != NULL ? (int)sum->kind : (int)OPTFORGE_SUM);
}

/* How many NaN or infinities a tensor of this kernel has: they are counted where its gradient is added up. */
static double optforge_counted(const optforge_work *w, const optforge_kernel *kernel, unsigned slot, size_t number)
{
    const int phase = optforge_phase_of(w, kernel, OPTFORGE_GRAD);

    return w->place[phase][slot] >= 0 ? optforge_sums_of(w, phase, slot)[number] : 0.0;
}

/* What a step tells of one tensor, or of all, from four sums of squares and two counts. */
static void optforge_tell(optforge_stats *stats, const double *squares, double nan, double inf, int skipped)
{
    stats->grad_norm = sqrt(squares[OPTFORGE_GRAD]);
    stats->clipped_grad_norm = skipped ? (double)NAN : sqrt(squares[OPTFORGE_CLIPPED]);
    stats->param_norm = skipped ? (double)NAN : sqrt(squares[OPTFORGE_PARAM]);
    stats->update_norm = skipped ? 0.0 : sqrt(squares[OPTFORGE_UPDATE]);
    stats->max_update_ratio = stats->update_norm != 0.0 ? stats->update_norm / stats->param_norm : 0.0;
    stats->nan = (uint64_t)nan;
    stats->inf = (uint64_t)inf;
    stats->skipped = (uint64_t)skipped;
}

/* The sums of squares of tensor `number`, which is of this kernel. */
static void optforge_squares(const optforge_work *w, const optforge_kernel *kernel, size_t number, double *squares)
{
    for (int q = 0; q < 4; q++) {
        const int slot = optforge_slot(kernel, q, 0, NULL);

        squares[q] = 0.0;
        if (slot >= 0 && (!w->skipped || q == OPTFORGE_GRAD))
            squares[q] = optforge_sums_of(w, optforge_phase_of(w, kernel, slot), (unsigned)slot)[number];
    }
}

/* Tells the statistics of one tensor; keeps the largest ratio, in which NaN stays, and the sums of the counts. */
static void optforge_tell_tensor(const optforge_work *w, const optforge_kernel *kernel, size_t number,
                                 optforge_stats *all)
{
    double squares[4];
    optforge_stats own;

    optforge_squares(w, kernel, number, squares);
    optforge_tell(&own, squares, optforge_counted(w, kernel, OPTFORGE_NAN, number),
                  optforge_counted(w, kernel, OPTFORGE_INF, number), w->skipped);
    if (all->max_update_ratio == all->max_update_ratio && !(own.max_update_ratio <= all->max_update_ratio))
        all->max_update_ratio = own.max_update_ratio;
    all->nan += own.nan;
    all->inf += own.inf;
    if (w->options->tensor_stats != NULL)
        w->options->tensor_stats[number] = own;
}

static void optforge_tell_all(const optforge_work *w)
{
    double squares[4] = {0.0, 0.0, 0.0, 0.0};
    optforge_stats all;
    size_t before = 0;

    memset(&all, 0, sizeof all);
    for (size_t k = 0; w->options->sizes != NULL && w->number > 0 && k < w->tensors; k++)
        optforge_tell_tensor(w, w->lists[0].kernel, k, &all);
    for (size_t i = 0; w->options->sizes == NULL && i < w->number; before += w->lists[i].count, i++)
        for (size_t k = 0; k < w->lists[i].count; k++)
            optforge_tell_tensor(w, w->lists[i].kernel, optforge_number(&w->lists[i], k, before), &all);
    if (w->options->stats == NULL)
        return;
    for (int q = 0; q < 4; q++)
        if (!w->skipped || q == OPTFORGE_GRAD)
            squares[q] = optforge_total(w, q, 0, NULL);
    optforge_tell(w->options->stats, squares, (double)all.nan, (double)all.inf, w->skipped);
    w->options->stats->max_update_ratio = all.max_update_ratio;
}

/* Whether a gradient was NaN or infinite: all kernels have counted in phase 0. */
static int optforge_nonfinite(const optforge_work *w)
{
    double found = 0.0;

    for (unsigned slot = OPTFORGE_NAN; slot <= OPTFORGE_INF; slot++)
        for (size_t k = 0; w->sums > 0 && k < w->tensors; k++)
            found += optforge_sums_of(w, 0, slot)[k];
    return found > 0.0;
}

/* The totals behind a pass, and the scalars of all groups that follow from them. */
static void optforge_go_on(optforge_work *w, unsigned pass)
{
    size_t rows = 0;

    for (size_t i = 0; i < w->number; i++) {
        const optforge_list *l = &w->lists[i];
        double *totals = w->totals + i * OPTFORGE_MOST_SUMS;

        if (pass < l->kernel->pass_count && (l->kernel->behind_step != NULL || l->kernel->behind_tensor != NULL)) {
            for (size_t s = 0; s < l->kernel->passes[pass].sum_count; s++) {
                const optforge_sum *sum = &l->kernel->passes[pass].sums[s];

                if (!sum->observed)
                    totals[sum->slot] = i > 0 && optforge_alike(l->kernel, w->lists[0].kernel)
                                            ? w->totals[sum->slot]
                                            : optforge_total(w, 0, pass, sum);
            }
            for (size_t r = 0; l->kernel->behind_step != NULL && r < optforge_row_count(l); r++)
                l->kernel->behind_step(w->rows + rows + r * optforge_row_width(l), pass, totals);
        }
        rows += optforge_row_count(l) * optforge_row_width(l);
    }
}

/* Scalar state advances, once per tensor, when all elements of all tensors are done. */
static void optforge_finish(const optforge_work *w)
{
    size_t rows = 0, before = 0;

    for (size_t i = 0; i < w->number; i++) {
        const optforge_list *l = &w->lists[i];
        double own[OPTFORGE_MOST_SCALARS];

        for (size_t k = 0; l->kernel->finish != NULL && k < l->count; k++)
            l->kernel->finish(optforge_scalars(w, i, k, rows, before, l->kernel->pass_count, own),
                              optforge_tensor(l, k));
        rows += optforge_row_count(l) * optforge_row_width(l);
        before += l->count;
    }
    if (w->options->applied != NULL)
        ++*w->options->applied;
}

/* Decides, and goes on, behind a phase whose tensors are added up; the status of the step behind the last. */
static int optforge_fold_all(optforge_work *w, int phase)
{
    if (phase == 0 && w->options->skip_nonfinite)
        w->skipped = optforge_nonfinite(w);
    if (!w->skipped && phase >= w->scan && w->sums > 0)
        optforge_go_on(w, (unsigned)(phase - w->scan));
    w->due = phase + 1;
    if (w->due < w->phases)
        return OPTFORGE_OK;
    if (w->observe)
        optforge_tell_all(w);
    if (!w->skipped)
        optforge_finish(w);
    return w->skipped ? OPTFORGE_SKIPPED : OPTFORGE_OK;
}

OPTFORGE_API int optforge_fold(optforge_work *w, int phase)
{
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

OPTFORGE_API double *optforge_partials(const optforge_work *w, int phase, size_t *number)
{
    if (number == NULL)
        return NULL;
    *number = 0;
    if (w == NULL || w->begun != w || phase < 0 || phase >= w->phases || w->sums == 0)
        return NULL;
    *number = (w->phase_sums[phase + 1] - w->phase_sums[phase]) * w->leaves;
    return w->leaf_sums + w->phase_sums[phase] * w->leaves;
}

/* ---- a step ------------------------------------------------------------------------------------------------------ */

static void optforge_run_share(void *work, size_t k, size_t shares)
{
    optforge_work *w = (optforge_work *)work;

    optforge_share(w, w->due, k, shares);
}

OPTFORGE_API int optforge_step_lists(const optforge_list *lists, size_t number, const optforge_options *options)
{
    optforge_work w;
    int status = optforge_begin(&w, lists, number, options);
    size_t shares = 1;

    if (status != OPTFORGE_OK)
        return status;
#ifdef _OPENMP
    shares = options->parallel == NULL && options->threads <= 0 ? (size_t)omp_get_max_threads() : 1;
#endif
    if (options->threads > 0 || options->parallel != NULL)
        shares = options->threads > 0 ? (size_t)options->threads : 256;
    if (shares > 1 + w.elements / OPTFORGE_THREAD_SIZE)
        shares = 1 + w.elements / OPTFORGE_THREAD_SIZE;
#ifdef _OPENMP
    if (options->parallel == NULL && shares > 1) {
#pragma omp parallel num_threads((int)shares)
        {
            const size_t k = (size_t)omp_get_thread_num(), all = (size_t)omp_get_num_threads();
            const uint64_t flush = optforge_keep_subnormals(options);

            for (int phase = 0; phase < w.phases; phase++) {
                optforge_share(&w, phase, k, all);
#pragma omp barrier
                optforge_fold_tensors(&w, phase, k, all);
#pragma omp barrier
#pragma omp single
                status = optforge_fold_all(&w, phase);
            }
            optforge_restore_flush(flush);
        }
        return status;
    }
#endif
    for (int phase = 0; phase < w.phases; phase++) {
        if (options->parallel != NULL && shares > 1)
            options->parallel(options->pool, shares, optforge_run_share, &w);
        else
            optforge_share(&w, phase, 0, 1);
        status = optforge_fold(&w, phase);
    }
    return status;
}

OPTFORGE_API int optforge_step(const optforge_kernel *kernel, const void *hyper, uint64_t t, const void *tensors,
                               size_t count, const optforge_options *options)
{
    optforge_list list;

    memset(&list, 0, sizeof list);
    list.kernel = kernel;
    list.hyper = hyper;
    list.t = t;
    list.tensors = tensors;
    list.count = count;
    return optforge_step_lists(&list, 1, options);
}

OPTFORGE_API int optforge_plain_step(const optforge_kernel *kernel, const void *hyper, uint64_t t, const void *tensors,
                                     size_t count, void *workspace)
{
    optforge_options o;

    optforge_options_init(&o);
    o.workspace = workspace;
    o.workspace_size = SIZE_MAX;
    return optforge_step(kernel, hyper, t, tensors, count, &o);
}

/* ---- small things ------------------------------------------------------------------------------------------------ */

OPTFORGE_API void optforge_options_init(optforge_options *o)
{
    memset(o, 0, sizeof *o);
    o->size = sizeof *o;
    o->grad_scale = 1.0;
}

OPTFORGE_API void optforge_state_init(const optforge_kernel *kernel, const void *tensor, const void *hyper)
{
    for (size_t a = 2; a < kernel->arrays; a++) {
        const optforge_initial *initial = &kernel->initial[a - 2];
        const size_t n = kernel->formats[a] == OPTFORGE_SCALAR ? 1 : optforge_elements(tensor);
        const int copied = initial->from == OPTFORGE_FROM_P || initial->from == OPTFORGE_FROM_G;
        const double value = initial->from >= 0 ? ((const double *)hyper)[initial->from] : initial->value;
        void *const state = optforge_array(tensor, a);

        if (copied && n > 0)
            memcpy(state, optforge_array(tensor, initial->from == OPTFORGE_FROM_P ? 0 : 1),
                   n * optforge_format_size(kernel->formats[a]));
        for (size_t i = 0; !copied && i < n; i++)
            if (kernel->formats[a] == OPTFORGE_F32)
                ((float *)state)[i] = (float)value;
            else
                ((double *)state)[i] = value;
    }
}

OPTFORGE_API const char *optforge_strerror(int status)
{
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
        "optforge_begin was not called, or this phase is not the one that is due"
    };

    if (status == OPTFORGE_SKIPPED)
        return "a gradient is NaN or infinite, so nothing was changed, and t does not advance";
    if (status >= OPTFORGE_ERROR_ASSERT)
        return "the hyperparameters break an assert of the rule";
    return status >= 0 && (size_t)status < sizeof texts / sizeof *texts ? texts[status] : "unknown status";
}

OPTFORGE_API const char *optforge_kernel_strerror(const optforge_kernel *kernel, int status)
{
    for (int k = 0; kernel != NULL && kernel->asserts[k] != NULL; k++)
        if (status == OPTFORGE_ERROR_ASSERT + k)
            return kernel->asserts[k];
    return kernel != NULL && status >= OPTFORGE_ERROR_ASSERT ? "unknown status" : optforge_strerror(status);
}

#define OPTFORGE_COMPILE_END
#include "optforge.h"
