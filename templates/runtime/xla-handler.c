/* xla-handler.c: a step as a call of XLA's foreign function interface, which is how JAX runs it
 * on the CPU. The operands and results stand in xla-call.h.
 */
#define _POSIX_C_SOURCE 200809L /* sched_yield */
#include "xla-call.h"

#include <sched.h>
#include <stdlib.h>

enum {
    FINER = 4,       /* shares for each thread: one that starts late takes fewer */
    ALONE = 1 << 18  /* elements below which waking another thread costs more than it brings */
};

static double value(const XLA_FFI_Buffer *x) {
    return x->dtype == XLA_FFI_DataType_F64 ? *(const double *)x->data : (double)*(const float *)x->data;
}

/* Statistics as arrays: norms as floats or doubles, counts as int32. */
static void tell(const optforge_stats *stats, size_t rows, const XLA_FFI_Buffer *norms, int32_t *counts) {
    for (size_t k = 0; k < rows; k++) {
        const optforge_stats *x = &stats[k];
        const double own[NORMS] = {x->grad_norm, x->clipped_grad_norm, x->param_norm, x->update_norm,
                                   x->max_update_ratio};
        const uint64_t found[COUNTS] = {x->nan, x->inf, x->skipped};
        for (size_t j = 0; j < NORMS; j++) {
            if (norms->dtype == XLA_FFI_DataType_F64)
                ((double *)norms->data)[k * NORMS + j] = own[j];
            else
                ((float *)norms->data)[k * NORMS + j] = (float)own[j];
        }
        for (size_t j = 0; j < COUNTS; j++)
            counts[k * COUNTS + j] = found[j] < INT32_MAX ? (int32_t)found[j] : INT32_MAX;
    }
}

/* ---- XLA's threads ------------------------------------------------------------------------------------- */

/* The threads of a call: the one that it comes on, and `helpers` more. */
typedef struct team {
    const XLA_FFI_Api *api;
    XLA_FFI_ExecutionContext *context;
    size_t helpers;
} team;

/* Work in shares, which whoever comes takes. Who comes late finds none, when the call may be over. */
typedef struct crowd {
    void (*run)(void *work, size_t k, size_t shares);
    void *work;
    size_t shares, next, done, users;
} crowd;

static void take_shares(crowd *c) {
    size_t k;
    while ((k = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED)) < c->shares) {
        c->run(c->work, k, c->shares);
        __atomic_fetch_add(&c->done, 1, __ATOMIC_RELEASE);
    }
}

static void leave(crowd *c) {
    if (__atomic_sub_fetch(&c->users, 1, __ATOMIC_ACQ_REL) == 0)
        free(c);
}

static void help(void *data) {
    take_shares((crowd *)data);
    leave((crowd *)data);
}

/* Whether an answer of XLA is no error. */
static int good(const XLA_FFI_Api *api, XLA_FFI_Error *error) {
    XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
    if (error != NULL)
        api->XLA_FFI_Error_Destroy(&args);
    return error == NULL;
}

/* Nothing waits for a share that nobody has taken, so this ends on a pool whose threads are all busy, too. */
static void run_shares(void *pool, size_t shares, void (*run)(void *work, size_t k, size_t shares),
                       void *work) {
    const team *const t = (const team *)pool;
    crowd *const c = (crowd *)calloc(1, sizeof *c);
    if (c == NULL) {
        for (size_t k = 0; k < shares; k++)
            run(work, k, shares);
        return;
    }
    c->run = run;
    c->work = work;
    c->shares = shares;
    c->users = 1;
    for (size_t k = 0; k < t->helpers && k + 1 < shares; k++) {
        XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL,
                                                 t->context, help, c};
        __atomic_add_fetch(&c->users, 1, __ATOMIC_RELAXED);
        if (!good(t->api, t->api->XLA_FFI_ThreadPool_Schedule(&args)))
            leave(c);
    }
    take_shares(c);
    while (__atomic_load_n(&c->done, __ATOMIC_ACQUIRE) < shares)
        sched_yield();
    leave(c);
}

/* Let a step over so many elements run on XLA's threads, at most so many of them; 0: all. */
static void choose_threads(optforge_options *o, team *t, const XLA_FFI_CallFrame *call, size_t all,
                           size_t most) {
    int64_t threads = 1;
    XLA_FFI_ThreadPool_NumThreads_Args args = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL,
                                               call->ctx, &threads};
    o->threads = 1;
    if (all < ALONE || !good(call->api, call->api->XLA_FFI_ThreadPool_NumThreads(&args)))
        return;
    if (most == 0 || (int64_t)most > threads)
        most = threads > 1 ? (size_t)threads : 1;
    t->api = call->api;
    t->context = call->ctx;
    t->helpers = most - 1;
    if (t->helpers > 0) {
        o->threads = (int)(FINER * most);
        o->parallel = run_shares;
        o->pool = t;
    }
}

/* ---- a step -------------------------------------------------------------------------------------------- */

/* All that a step needs, in one block of memory. */
typedef struct step {
    optforge_list *lists;     /* one for each kernel */
    double *hyper;
    uintptr_t *tables;        /* tensors as the lists have them: a row is the size and the addresses */
    size_t *numbers;          /* of the tensors in them */
    unsigned char *starting;
    optforge_stats *stats;    /* of all, and of each */
} step;

static void *prepare(step *s, size_t kernels, size_t hypers, size_t words, size_t tensors) {
    const size_t lists = kernels * sizeof *s->lists, hyper = hypers * sizeof *s->hyper;
    const size_t stats = (tensors + 1) * sizeof *s->stats, tables = words * sizeof *s->tables;
    char *block = (char *)calloc(1, lists + hyper + stats + tables + tensors * (sizeof *s->numbers + 1));
    if (block == NULL)
        return NULL;
    s->lists = (optforge_list *)block;
    s->hyper = (double *)(block + lists);
    s->stats = (optforge_stats *)(block + lists + hyper);
    s->tables = (uintptr_t *)(block + lists + hyper + stats);
    s->numbers = (size_t *)(block + lists + hyper + stats + tables);
    s->starting = (unsigned char *)(s->numbers + tensors);
    return block;
}

/* State that is a number and begins as a hyperparameter gets it here, where its value is known in full. */
static void begin_scalars(const optforge_kernel *kernel, const uintptr_t *row, const double *hyper) {
    for (size_t a = 2; a < kernel->arrays; a++)
        if (kernel->formats[a] == OPTFORGE_SCALAR && kernel->initial[a - 2].from >= 0)
            *(double *)row[1 + a] = hyper[kernel->initial[a - 2].from];
}

static XLA_FFI_Error *take_step(XLA_FFI_CallFrame *call) {
    const XLA_FFI_Attrs *attrs = &call->attrs;
    const XLA_FFI_Array *own = array(attrs, "kernel"), *hyper = array(attrs, "hyper");
    const XLA_FFI_Array *traced = array(attrs, "traced");
    const XLA_FFI_Buffer *const *args = (const XLA_FFI_Buffer *const *)call->args.args;
    const XLA_FFI_Buffer *const *rets = (const XLA_FFI_Buffer *const *)call->rets.rets;
    const int32_t *kind = (const int32_t *)own->data, *which = (const int32_t *)traced->data;
    const size_t tensors = own->size, first = 1 + traced->size;
    const int stats = (int)number(attrs, "stats");
    int32_t *const count = (int32_t *)rets[0]->data;
    uint64_t t = (uint64_t)*(const int32_t *)args[0]->data;
    size_t words = 0, operand = first, result = 1, row = 0, lists = 0, all = 0, size;
    char message[MESSAGE];
    optforge_options o;
    team threads;
    step s;
    void *block;
    int status;

    for (size_t k = 0; k < tensors; k++)
        words += 1 + kernels[kind[k]]->arrays;
    block = prepare(&s, KINDS, hyper->size, words, tensors);
    if (block == NULL)
        return failure(call->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "optforge: no memory for a step");
    optforge_options_init(&o);
    memcpy(s.hyper, hyper->data, hyper->size * sizeof *s.hyper);
    o.grad_scale = scale(attrs);
    for (size_t k = 0; k < traced->size; k++)
        *(which[k] < 0 ? &o.grad_scale : &s.hyper[which[k]]) = value(args[1 + k]);

    /* A list for each kernel, of the tensors that are its. */
    for (size_t j = 0; j < KINDS; j++) {
        optforge_list *const list = &s.lists[lists];
        const size_t arrays = kernels[j]->arrays, before = row;
        operand = first;
        list->tensors = s.tables;
        list->number = s.numbers + row;
        list->starting = s.starting + row;
        for (size_t k = 0; k < tensors; operand += kernels[kind[k++]]->arrays) {
            if ((size_t)kind[k] != j)
                continue;
            s.numbers[row] = k;
            s.starting[row++] = t == 0;
            *s.tables = elements(args[operand]);
            all += *s.tables;
            for (size_t a = 0; a < arrays; a++)
                s.tables[1 + a] = (uintptr_t)args[operand + a]->data;
            if (t == 0)
                begin_scalars(kernels[j], s.tables, s.hyper);
            s.tables += 1 + arrays;
        }
        list->kernel = kernels[j];
        list->hyper = s.hyper;
        list->t = t + 1;
        list->count = row - before;
        lists += list->count > 0;
    }
    for (size_t k = 0; k < tensors; k++)
        result += kernels[kind[k]]->arrays - 1;

    o.skip_nonfinite = (int)number(attrs, "skip_nonfinite");
    choose_threads(&o, &threads, call, all, (size_t)number(attrs, "threads"));
    o.seed = number(attrs, "seed");
    o.applied = &t;
    if (stats) {
        o.stats = s.stats;
        o.tensor_stats = s.stats + 1;
    }
    size = optforge_workspace_size(s.lists, lists, &o);
    if (size > 0)
        o.workspace = malloc(size);
    o.workspace_size = o.workspace == NULL ? 0 : size;
    status = optforge_step_lists(s.lists, lists, &o);
    free(o.workspace);
    *count = t < INT32_MAX ? (int32_t)t : INT32_MAX;
    if (stats)
        tell(s.stats, tensors + 1, rets[result], (int32_t *)rets[result + 1]->data);
    free(block);
    if (status <= OPTFORGE_OK)
        return NULL;
    snprintf(message, sizeof message, "rule '%s': %s (at t=%llu)", rule_name,
             optforge_kernel_strerror(kernels[0], status), (unsigned long long)t + 1);
    return failure(call->api, XLA_FFI_Error_Code_INVALID_ARGUMENT, message);
}

XLA_FFI_Error *optforge_xla_step(XLA_FFI_CallFrame *call) {
    return told_version(call) ? NULL : take_step(call);
}
