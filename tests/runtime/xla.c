/* xla.c: the handler that JAX calls, called by a stand-in for XLA whose threads come late, come early, or cannot
 * be had, for the sanitizers. Prints the bits of the parameters, which none of that changes. */
#define _POSIX_C_SOURCE 200809L
#include "xla-handler.c"
#include "xla-frame.h"

#include <pthread.h>
#include <time.h>

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
    const struct timespec pause = {0, 200000000};
    static frame f;
    int status;

    threads = argc > 1 ? atoi(argv[1]) : 4;
    refused = argc > 2 && strcmp(argv[2], "refused") == 0;
    make_frame(&f, argc > 2 && strcmp(argv[2], "told") == 0, malloc);
    f.api.XLA_FFI_ThreadPool_Schedule = schedule;
    f.api.XLA_FFI_ThreadPool_NumThreads = count_threads;
    f.api.XLA_FFI_Error_Destroy = destroy;
    for (int k = 0; k < STEPS; k++)
        if (optforge_xla_step(&f.call) != NULL)
            return 1;
    status = tell_frame(&f, scheduled > 0);
    nanosleep(&pause, NULL); /* late threads find nothing, and free what they were given */
    for (size_t k = 0; k < OPERANDS + 2; k++)
        free(f.buffers[k].data);
    return status;
}
