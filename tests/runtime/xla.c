/* xla.c: the handler that JAX calls, called by a stand-in for XLA whose threads come late, come early, or cannot
 * be had, for the sanitizers. Prints the bits of the parameters, which none of that changes. */
#define _POSIX_C_SOURCE 200809L
#include "xla-handler.c"

#include <pthread.h>
#include <time.h>

enum { TENSORS = 3, ARRAYS = 4, STEPS = 20 };

static int scheduled, refused;
static int64_t threads;

typedef struct job {
    XLA_FFI_Task *task;
    void *data;
    int late;
} job;

static void *run_job(void *given) {
    job own = *(job *)given;
    const struct timespec pause = {0, 2000000};
    free(given);
    if (own.late)
        nanosleep(&pause, NULL);
    own.task(own.data);
    return NULL;
}

static XLA_FFI_Error *schedule(XLA_FFI_ThreadPool_Schedule_Args *args) {
    pthread_attr_t detached;
    pthread_t thread;
    job *own;
    if (refused)
        return (XLA_FFI_Error *)&refused;
    own = (job *)malloc(sizeof *own);
    own->task = args->task;
    own->data = args->data;
    own->late = scheduled++ % 3 == 0;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    return pthread_create(&thread, &detached, run_job, own) == 0 ? NULL : (XLA_FFI_Error *)&refused;
}

static XLA_FFI_Error *count_threads(XLA_FFI_ThreadPool_NumThreads_Args *args) {
    if (threads == 0)
        return (XLA_FFI_Error *)&threads;
    *args->num_threads = threads;
    return NULL;
}

static void destroy(XLA_FFI_Error_Destroy_Args *args) { (void)args; }

int main(int argc, char **argv) {
    static const size_t sizes[TENSORS] = {300001, 17, 0};
    static int32_t count, kinds[TENSORS];
    static double hyper[5] = {0.01, 0.9, 0.999, 1e-8, 0.1}, scale = 1;
    static uint64_t none, flag;
    static const char *const names[] = {"grad_scale", "hyper", "kernel", "seed",
                                        "skip_nonfinite", "stats", "threads", "traced"};
    XLA_FFI_Scalar unscaled = {XLA_FFI_DataType_F64, &scale}, zero = {XLA_FFI_DataType_U64, &none};
    XLA_FFI_Scalar set = {XLA_FFI_DataType_U64, &flag};
    XLA_FFI_Array numbers = {XLA_FFI_DataType_F64, 5, hyper}, own = {XLA_FFI_DataType_S32, TENSORS, kinds};
    XLA_FFI_Array empty = {XLA_FFI_DataType_S32, 0, NULL};
    void *attrs[] = {&unscaled, &numbers, &own, &zero, &set, &set, &zero, &empty};
    XLA_FFI_ByteSpan spans[8], *labels[8];
    XLA_FFI_Buffer buffers[3 + TENSORS * ARRAYS];
    void *args[1 + TENSORS * ARRAYS], *rets[3 + TENSORS * (ARRAYS - 1)];
    int64_t dims[1 + TENSORS];
    static float norms[(TENSORS + 1) * NORMS];
    static int32_t counts[(TENSORS + 1) * COUNTS];
    size_t operands = 0, results = 0;
    XLA_FFI_Api api;
    XLA_FFI_CallFrame call;

    memset(&api, 0, sizeof api);
    memset(&call, 0, sizeof call);
    memset(buffers, 0, sizeof buffers);
    threads = argc > 1 ? atoi(argv[1]) : 4;
    refused = argc > 2 && strcmp(argv[2], "refused") == 0;
    flag = argc > 2 && strcmp(argv[2], "told") == 0; /* statistics, and skipping */
    api.XLA_FFI_ThreadPool_Schedule = schedule;
    api.XLA_FFI_ThreadPool_NumThreads = count_threads;
    api.XLA_FFI_Error_Destroy = destroy;
    buffers[0].data = &count;
    args[operands++] = rets[results++] = &buffers[0];
    for (size_t k = 0; k < TENSORS; k++)
        for (size_t a = 0; a < ARRAYS; a++) {
            XLA_FFI_Buffer *x = &buffers[operands];
            float *values = (float *)calloc(sizes[k] + 1, sizeof *values);
            for (size_t i = 0; i < sizes[k] && a < 2; i++)
                values[i] = (float)((i * 7919 + a) % 1009) / 512 - 1;
            dims[k] = (int64_t)sizes[k];
            x->dtype = XLA_FFI_DataType_F32;
            x->data = values;
            x->rank = 1;
            x->dims = &dims[k];
            args[operands++] = x;
            if (a != 1)
                rets[results++] = x;
        }
    buffers[operands].dtype = XLA_FFI_DataType_F32;
    buffers[operands].data = norms;
    buffers[operands + 1].data = counts;
    rets[results] = &buffers[operands];
    rets[results + 1] = &buffers[operands + 1];
    for (size_t k = 0; k < 8; k++) {
        spans[k].ptr = names[k];
        spans[k].len = strlen(names[k]);
        labels[k] = &spans[k];
    }
    call.api = &api;
    call.stage = XLA_FFI_ExecutionStage_EXECUTE;
    call.args.size = (int64_t)operands;
    call.args.args = args;
    call.rets.size = (int64_t)results + 2;
    call.rets.rets = rets;
    call.attrs.size = 8;
    call.attrs.names = labels;
    call.attrs.attrs = attrs;
    for (int k = 0; k < STEPS; k++)
        if (optforge_xla_step(&call) != NULL)
            return 1;
    if (count != STEPS)
        return 2;
    {
        uint64_t hash = 14695981039346656037u; /* FNV-1a */
        for (size_t k = 0; k < TENSORS; k++)
            for (size_t i = 0; i < sizes[k] * sizeof(float); i++)
                hash = (hash ^ ((const unsigned char *)buffers[1 + k * ARRAYS].data)[i]) * 1099511628211u;
        printf("%llx %d %d\n", (unsigned long long)hash, (int)(norms[0] > 0), scheduled > 0);
    }
    { /* late threads find nothing, and free what they were given */
        const struct timespec pause = {0, 200000000};
        nanosleep(&pause, NULL);
    }
    for (size_t k = 1; k < operands; k++)
        free(buffers[k].data);
    return 0;
}
