/* xla-handler.cu: a step as a call of XLA's foreign function interface, which is how JAX runs it on a GPU.
 * The operands and results stand in xla-call.h; the last result is scratch memory.
 *
 * How many steps there were stands in the device's memory, and so may hyperparameters. But scalars such as
 * beta^t are computed on the host, for its pow has bits of its own. So a step goes
 *
 *     ask       a kernel writes the count and the hyperparameters into memory that both sides see, the mail;
 *     answer    a function of the host, which CUDA calls when the stream is there, writes the scalars behind;
 *     receive   a kernel takes them from there into the plan's tables;
 *     the passes of the step, as optforge.cu launches them;
 *     tell      a kernel writes the count, statistics, and into the mail what went wrong.
 *
 * All of it is enqueued in XLA's stream, and nothing waits for the device. A stream has one piece of mail,
 * allocated at its first step: its order keeps steps from each other. A step cannot be captured in a command
 * buffer, whose loops allow no functions of the host, and does not say that it can be.
 */
#define OPTFORGE_CUDA_COMPILE
#include "xla-call.h"

#include <fenv.h>
#include <limits.h>
#include <stdlib.h>

#include <mutex>

/* ---- tables, which reach the device as arguments of kernels: a copy of pageable memory may wait -------- */

enum { WORDS = 500 }; /* of a launch, so that it has less than the 4,096 bytes that any CUDA passes */
struct words {
    uint64_t *to, number, word[WORDS];
};
OPTFORGE_DEVICE void store(const words &given) {
    for (uint64_t k = threadIdx.x; k < given.number; k += OPTFORGE_CUDA_THREADS)
        given.to[k] = given.word[k];
}
OPTFORGE_CUDA_KERNEL(optforge_xla_store, words, store)

static cudaError_t launch(const void *kernel, uint64_t threads, const void *argument, cudaStream_t stream) {
    void *arguments[] = {(void *)argument};
    const unsigned blocks = (unsigned)((threads + OPTFORGE_CUDA_THREADS - 1) / OPTFORGE_CUDA_THREADS);

    return cudaLaunchKernel(kernel, dim3(blocks), dim3(OPTFORGE_CUDA_THREADS), arguments, 0, stream);
}

static cudaError_t optforge_xla_bring(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                                      cudaStream_t stream) {
    const size_t all = bytes / sizeof(uint64_t);
    cudaError_t error = cudaSuccess;
    words given;

    for (size_t k = 0; k < all && error == cudaSuccess; k += WORDS) {
        given.to = (uint64_t *)to + k;
        given.number = all - k < WORDS ? all - k : +WORDS;
        memcpy(given.word, (const uint64_t *)from + k, given.number * sizeof(uint64_t));
        error = launch((const void *)optforge_xla_store, 1, &given, stream);
    }
    return error;
}

#define cudaMemcpyAsync optforge_xla_bring
#include "optforge.cu"
#undef cudaMemcpyAsync

/* ---- the mail ------------------------------------------------------------------------------------------ */

/* Memory of the host that the device sees too. The arrays lie behind it. */
struct mail {
    cudaStream_t stream;
    mail *next;
    double *number; /* what is traced, as the device has it */
    double *hyper;  /* all hyperparameters */
    uint64_t *row;  /* the scalars of the step */
    int32_t count;  /* steps before it */
    int32_t status; /* whether the scalars have values */
    volatile uint64_t failed_at; /* what went wrong since the host last looked */
    volatile int32_t failed;
};

static std::mutex at_a_time; /* threads of XLA may enqueue in one stream: each its whole step */
static mail *boxes;

static size_t hypers(void) { return kernels[0]->hypers; }
static size_t width(void) { return kernels[0]->scalars_size / sizeof(uint64_t); }

/* The mail of a stream; NULL where there is no memory for it. */
static mail *mail_of(cudaStream_t stream) {
    const size_t size = sizeof(mail) + (2 * hypers() + 1 + width()) * sizeof(double);
    void *block;
    mail *m = boxes;

    while (m != NULL && m->stream != stream)
        m = m->next;
    if (m != NULL)
        return m;
    if (cudaHostAlloc(&block, size, cudaHostAllocPortable) != cudaSuccess)
        return NULL;
    memset(block, 0, sizeof *m);
    m = (mail *)block;
    m->stream = stream;
    m->next = boxes;
    m->number = (double *)(m + 1);
    m->hyper = m->number + hypers() + 1;
    m->row = (uint64_t *)(m->hyper + hypers());
    return boxes = m;
}

/* ---- ask ----------------------------------------------------------------------------------------------- */

enum { NUMBERS = 128 }; /* that one launch asks for */
struct asked {
    mail *to;
    const int32_t *count;
    size_t first, numbers;
    const void *number[NUMBERS];
    unsigned char wide[NUMBERS];
};
OPTFORGE_DEVICE void ask(const asked &given) {
    const unsigned k = threadIdx.x;

    if (k == 0)
        given.to->count = *given.count;
    if (k < given.numbers)
        given.to->number[given.first + k] =
            given.wide[k] ? *(const double *)given.number[k] : (double)*(const float *)given.number[k];
}
OPTFORGE_CUDA_KERNEL(optforge_xla_ask, asked, ask)

/* ---- answer -------------------------------------------------------------------------------------------- */

/* What the answer needs beside the mail; it frees it. Hyperparameters lie behind, then which are traced. */
struct question {
    mail *in;
    double grad_scale;
    size_t traced;
    double *hyper;
    int32_t *which;
};

static question *question_of(mail *in, const XLA_FFI_Attrs *attrs) {
    const XLA_FFI_Array *hyper = array(attrs, "hyper"), *traced = array(attrs, "traced");
    const size_t doubles = hypers() * sizeof(double), numbers = traced->size * sizeof(int32_t);
    question *q = (question *)malloc(sizeof *q + doubles + numbers);

    if (q == NULL)
        return NULL;
    q->in = in;
    q->grad_scale = scale(attrs);
    q->traced = traced->size;
    q->hyper = (double *)(q + 1);
    q->which = (int32_t *)(q->hyper + hypers());
    memcpy(q->hyper, hyper->data, doubles);
    memcpy(q->which, traced->data, numbers);
    return q;
}

/* The scalars of the step, if all have values. */
static int scalars_of(const question *q) {
    mail *const m = q->in;
    double grad_scale = q->grad_scale, unscale;

    memcpy(m->hyper, q->hyper, hypers() * sizeof(double));
    for (size_t k = 0; k < q->traced; k++)
        *(q->which[k] < 0 ? &grad_scale : &m->hyper[q->which[k]]) = m->number[k];
    unscale = 1.0 / grad_scale;
    if (!(grad_scale > 0.0 && unscale > 0.0 && unscale - unscale == 0.0))
        return OPTFORGE_ERROR_GRAD_SCALE;
    for (size_t k = 0; k < hypers(); k++)
        if (m->hyper[k] != m->hyper[k])
            return OPTFORGE_ERROR_NAN;
    if (m->count < 0)
        return OPTFORGE_ERROR_TIME;
    return kernels[0]->scalars(m->row, m->hyper, (uint64_t)m->count + 1, unscale);
}

/* What CUDA calls. Its thread may have been set to flush subnormal numbers by whoever began it. */
static void CUDART_CB answer(void *given) {
    question *const q = (question *)given;
    fenv_t before;

    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    q->in->status = scalars_of(q);
    fesetenv(&before);
    free(q);
}

/* ---- receive ------------------------------------------------------------------------------------------- */

struct received {
    optforge_cuda_plan plan;
    const mail *from;
    unsigned char *starting; /* of each tensor: whether this is its first step */
    uint64_t tensors;
};
OPTFORGE_DEVICE void receive(const received &given) {
    const uint64_t k = blockIdx.x * (uint64_t)OPTFORGE_CUDA_THREADS + threadIdx.x;
    const volatile mail *const m = given.from;
    const int32_t count = m->count;

    if (k == 0) {
        given.plan.control->t = (uint64_t)count;
        given.plan.control->first_row = (uint64_t)count + 1;
        given.plan.control->rows = m->status == OPTFORGE_OK; /* without scalars the step is not done */
    }
    if (blockIdx.x == 0)
        for (uint64_t i = k; i < given.plan.width; i += OPTFORGE_CUDA_THREADS)
            given.plan.rows[i] = ((const volatile uint64_t *)m->row)[i];
    if (k < given.tensors)
        given.starting[k] = count == 0;
}
OPTFORGE_CUDA_KERNEL(optforge_xla_receive, received, receive)

/* State that is a number and begins as a hyperparameter gets it here, where its value is known in full. */
struct beginning {
    optforge_cuda_plan plan;
    const mail *from;
    int32_t a, hyper;
};
OPTFORGE_DEVICE void begin_scalar(const beginning &given) {
    const uint64_t k = blockIdx.x * (uint64_t)OPTFORGE_CUDA_THREADS + threadIdx.x;
    const volatile mail *const m = given.from;

    const volatile double *const hyper = m->hyper;

    if (k < given.plan.count && m->count == 0 && m->status == OPTFORGE_OK)
        *optforge_cuda_tensor(given.plan, k).state(given.a) = hyper[given.hyper];
}
OPTFORGE_CUDA_KERNEL(optforge_xla_begin_scalar, beginning, begin_scalar)

static cudaError_t begin_scalars(const optforge_cuda_plan *plan, const mail *from, cudaStream_t stream) {
    const optforge_cuda_kernel *kernel = plan->kernel;
    cudaError_t error = cudaSuccess;
    beginning given = {*plan, from, 0, 0};

    for (size_t a = 2; a < kernel->arrays && error == cudaSuccess; a++) {
        if (kernel->formats[a] != OPTFORGE_SCALAR || kernel->initial[a - 2].from < 0 || plan->count == 0)
            continue;
        given.a = (int32_t)a;
        given.hyper = kernel->initial[a - 2].from;
        error = launch((const void *)optforge_xla_begin_scalar, plan->count, &given, stream);
    }
    return error;
}

/* ---- tell ---------------------------------------------------------------------------------------------- */

struct told {
    const optforge_cuda_control *control;
    mail *to;
    int32_t *count;
    const optforge_stats *stats; /* of all, and of each; NULL: not asked for */
    uint64_t rows;
    void *norms;
    int32_t *counts;
    int32_t wide;
};
OPTFORGE_DEVICE void tell(const told &given) {
    const uint64_t k = blockIdx.x * (uint64_t)OPTFORGE_CUDA_THREADS + threadIdx.x;
    const optforge_cuda_control *c = given.control;

    if (k == 0) {
        const uint64_t applied = c->t - c->skipped;
        mail *const m = given.to;

        *given.count = applied < INT_MAX ? (int32_t)applied : INT_MAX;
        if (c->status != OPTFORGE_OK && m->failed == OPTFORGE_OK) {
            const int32_t asked = ((const volatile mail *)m)->status;

            m->failed_at = c->t;
            __threadfence_system();
            m->failed = c->status == OPTFORGE_ERROR_ROWS ? asked : c->status;
        }
    }
    if (given.stats != NULL && k < given.rows) {
        const optforge_stats *const x = &given.stats[k];
        const double own[NORMS] = {x->grad_norm, x->clipped_grad_norm, x->param_norm, x->update_norm,
                                   x->max_update_ratio};
        const uint64_t found[COUNTS] = {x->nan, x->inf, x->skipped};

        for (int j = 0; j < NORMS; j++) {
            if (given.wide)
                ((double *)given.norms)[k * NORMS + j] = own[j];
            else
                ((float *)given.norms)[k * NORMS + j] = __double2float_rn(own[j]);
        }
        for (int j = 0; j < COUNTS; j++)
            given.counts[k * COUNTS + j] = found[j] < INT_MAX ? (int32_t)found[j] : INT_MAX;
    }
}
OPTFORGE_CUDA_KERNEL(optforge_xla_tell, told, tell)

/* ---- a step -------------------------------------------------------------------------------------------- */

/* Bytes at a multiple of 16. */
static size_t rounded(size_t bytes) { return (bytes + 15) / 16 * 16; }

/* Bytes of scratch memory for so many elements in so many tensors. */
extern "C" size_t optforge_xla_scratch_size(uint64_t elements, size_t tensors) {
    size_t size = rounded((tensors + 1) * sizeof(optforge_stats)) + rounded(tensors + 1);

    for (size_t j = 0; j < KINDS; j++)
        size += rounded(optforge_cuda_workspace_size(kernels[j], elements, tensors, 1));
    return size;
}

/* The tensors of a call: a row is the size and the addresses, those of one kernel behind each other. */
struct tables {
    uint64_t *rows[KINDS];
    size_t counts[KINDS];
    size_t *sizes, *number, *part; /* of all; and of those in the rows, where there are several kernels */
    size_t tensors, operands, results;
    uint64_t elements;
};

static void *tables_of(tables *x, const XLA_FFI_CallFrame *call) {
    const XLA_FFI_Array *own = array(&call->attrs, "kernel");
    const int32_t *kind = (const int32_t *)own->data;
    const size_t first = 1 + array(&call->attrs, "traced")->size;
    size_t words = 0, row = 0;
    uint64_t *at;

    memset(x, 0, sizeof *x);
    x->tensors = own->size;
    for (size_t k = 0; k < x->tensors; k++)
        words += 1 + kernels[kind[k]]->arrays;
    at = (uint64_t *)calloc(words + 3 * x->tensors + 1, sizeof *at);
    if (at == NULL)
        return NULL;
    void *const block = at;
    x->sizes = (size_t *)(at + words);
    x->number = x->sizes + x->tensors;
    x->part = x->number + x->tensors;
    for (size_t j = 0; j < KINDS; j++) {
        x->rows[j] = at;
        x->operands = first;
        x->results = 1;
        for (size_t k = 0; k < x->tensors; k++) {
            const size_t arrays = kernels[kind[k]]->arrays;

            if ((size_t)kind[k] == j) {
                x->number[row++] = k;
                x->counts[j]++;
                *at++ = x->sizes[k] = elements((const XLA_FFI_Buffer *)call->args.args[x->operands]);
                x->elements += x->sizes[k];
                for (size_t a = 0; a < arrays; a++)
                    *at++ = (uint64_t)((const XLA_FFI_Buffer *)call->args.args[x->operands + a])->data;
            }
            x->operands += arrays;
            x->results += arrays - 1;
        }
    }
    return block;
}

/* Plans a step over each of the lists; those behind the first are beside it. */
static int plan_lists(optforge_cuda_plan *plans, const tables *x, char *scratch, cudaStream_t stream) {
    int status = OPTFORGE_OK;
    size_t before = 0;
    optforge_cuda_options o;

    for (size_t j = 0; j < KINDS && status == OPTFORGE_OK; j++) {
        optforge_cuda_options_init(&o);
        o.workspace = scratch;
        o.workspace_size = optforge_cuda_workspace_size(kernels[j], x->elements, x->tensors, 1);
        scratch += rounded(o.workspace_size);
        if (KINDS > 1) {
            o.tensors = x->tensors;
            o.sizes = x->sizes;
            o.number = x->number + before;
            o.part = x->part + before;
            o.beside = j > 0 ? &plans[0] : NULL;
        }
        status = optforge_cuda_plan_list(&plans[j], kernels[j], x->rows[j], x->counts[j], &o, stream);
        before += x->counts[j];
    }
    return status;
}

/* Enqueues the scalars' way: to the host, and back to the plans. */
static int send_scalars(const XLA_FFI_CallFrame *call, const optforge_cuda_plan *plans, mail *m,
                        unsigned char *starting, size_t tensors, cudaStream_t stream) {
    const size_t traced = array(&call->attrs, "traced")->size;
    const XLA_FFI_Buffer *const *args = (const XLA_FFI_Buffer *const *)call->args.args;
    received back = {plans[0], m, starting, tensors};
    cudaError_t error = cudaSuccess;
    question *q;
    asked given;

    given.to = m;
    given.count = (const int32_t *)args[0]->data;
    given.first = 0;
    do {
        given.numbers = traced - given.first < NUMBERS ? traced - given.first : +NUMBERS;
        for (size_t k = 0; k < given.numbers; k++) {
            given.number[k] = args[1 + given.first + k]->data;
            given.wide[k] = args[1 + given.first + k]->dtype == XLA_FFI_DataType_F64;
        }
        error = launch((const void *)optforge_xla_ask, 1, &given, stream);
        given.first += given.numbers;
    } while (error == cudaSuccess && given.first < traced);
    if (error != cudaSuccess)
        return OPTFORGE_ERROR_CUDA;
    q = question_of(m, &call->attrs);
    if (q == NULL)
        return OPTFORGE_ERROR_WORKSPACE;
    error = cudaLaunchHostFunc(stream, answer, q);
    if (error != cudaSuccess)
        free(q);
    else
        error = launch((const void *)optforge_xla_receive, tensors + 1, &back, stream);
    for (size_t j = 0; j < KINDS && error == cudaSuccess; j++)
        error = begin_scalars(&plans[j], m, stream);
    return error == cudaSuccess ? OPTFORGE_OK : +OPTFORGE_ERROR_CUDA;
}

/* Enqueues a whole step. */
static int enqueue(const XLA_FFI_CallFrame *call, const tables *x, mail *m, cudaStream_t stream) {
    const XLA_FFI_Buffer *const *rets = (const XLA_FFI_Buffer *const *)call->rets.rets;
    const int wanted = (int)number(&call->attrs, "stats");
    char *const scratch = (char *)rets[x->results + (wanted ? 2 : 0)]->data;
    optforge_stats *const stats = (optforge_stats *)scratch;
    unsigned char *const starting = (unsigned char *)scratch + rounded((x->tensors + 1) * sizeof *stats);
    optforge_cuda_plan plans[KINDS];
    optforge_cuda_options o;
    int status = plan_lists(plans, x, (char *)starting + rounded(x->tensors + 1), stream);

    if (status == OPTFORGE_OK)
        status = send_scalars(call, plans, m, starting, x->tensors, stream);
    optforge_cuda_options_init(&o);
    o.skip_nonfinite = (int)number(&call->attrs, "skip_nonfinite");
    o.seed = number(&call->attrs, "seed");
    o.starting = starting;
    if (wanted) {
        o.stats = stats;
        o.tensor_stats = stats + 1;
        if (status == OPTFORGE_OK && /* for a step that is not done */
            cudaMemsetAsync(stats, 0, (x->tensors + 1) * sizeof *stats, stream) != cudaSuccess)
            status = OPTFORGE_ERROR_CUDA;
    }
    for (int phase = 0; phase <= kernels[0]->phase_count; phase++)
        for (size_t j = 0; j < KINDS && status == OPTFORGE_OK; j++)
            status = optforge_cuda_phases(&plans[j], &o, phase, phase + 1, stream);
    if (status == OPTFORGE_OK) {
        told last = {plans[0].control, m, (int32_t *)rets[0]->data, NULL, x->tensors + 1, NULL, NULL, 0};

        if (wanted) {
            last.stats = stats;
            last.norms = rets[x->results]->data;
            last.wide = rets[x->results]->dtype == XLA_FFI_DataType_F64;
            last.counts = (int32_t *)rets[x->results + 1]->data;
        }
        if (launch((const void *)optforge_xla_tell, x->tensors + 1, &last, stream) != cudaSuccess)
            status = OPTFORGE_ERROR_CUDA;
    }
    return status;
}

static XLA_FFI_Error *explained(const XLA_FFI_CallFrame *call, int status, const char *where) {
    const char *const text = status == OPTFORGE_ERROR_CUDA ? cudaGetErrorString(cudaGetLastError())
                                                           : optforge_cuda_strerror(kernels[0], status);
    char message[MESSAGE];

    snprintf(message, sizeof message, "rule '%s': %s%s", rule_name, text, where);
    return failure(call->api, XLA_FFI_Error_Code_INVALID_ARGUMENT, message);
}

static XLA_FFI_Error *take_step(XLA_FFI_CallFrame *call) {
    XLA_FFI_Stream_Get_Args args = {XLA_FFI_Stream_Get_Args_STRUCT_SIZE, NULL, call->ctx, NULL};
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    XLA_FFI_Error *error = call->api->XLA_FFI_Stream_Get(&args);
    const cudaStream_t stream = (cudaStream_t)args.stream;
    int status = OPTFORGE_ERROR_CUDA;
    char where[MESSAGE / 2] = "";
    void *block;
    tables x;
    mail *m;

    if (error != NULL)
        return error;
    if (cudaStreamIsCapturing(stream, &capturing) != cudaSuccess)
        return explained(call, OPTFORGE_ERROR_CUDA, "");
    if (capturing != cudaStreamCaptureStatusNone)
        return failure(call->api, XLA_FFI_Error_Code_UNIMPLEMENTED,
                       "optforge: a step cannot be captured in a command buffer");
    const std::lock_guard<std::mutex> lock(at_a_time);
    m = mail_of(stream);
    block = m != NULL ? tables_of(&x, call) : NULL;
    if (block == NULL)
        return failure(call->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "optforge: no memory for a step");
    if (m->failed != OPTFORGE_OK) { /* of a step before, which is told here because nobody waits for steps */
        status = m->failed;
        snprintf(where, sizeof where, " (at t=%llu, in a step before this one, which changed nothing)",
                 (unsigned long long)m->failed_at);
        m->failed = OPTFORGE_OK;
    } else {
        status = enqueue(call, &x, m, stream);
    }
    free(block);
    return status == OPTFORGE_OK ? NULL : explained(call, status, where);
}

extern "C" XLA_FFI_Error *optforge_xla_step(XLA_FFI_CallFrame *call) {
    return told_version(call) ? NULL : take_step(call);
}
