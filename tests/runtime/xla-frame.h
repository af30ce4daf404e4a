/* xla-frame.h: a call of a handler as XLA makes it, of AdamW over three tensors; what both stand-ins for XLA share.
 * It is included behind the handler. */
#include <stdlib.h>

enum { TENSORS = 3, ARRAYS = 4, STEPS = 20, OPERANDS = 1 + TENSORS * ARRAYS, MOST = 3, ATTRIBUTES = 8 };

static const size_t sizes[TENSORS] = {300001, 17, 0};

typedef struct frame {
    XLA_FFI_Api api;
    XLA_FFI_CallFrame call;
    XLA_FFI_Buffer buffers[OPERANDS + MOST];
    void *args[OPERANDS], *rets[OPERANDS + MOST];
    int64_t dims[TENSORS], results;
    XLA_FFI_ByteSpan spans[ATTRIBUTES], *labels[ATTRIBUTES];
    void *attrs[ATTRIBUTES];
    XLA_FFI_Scalar unscaled, zero, told;
    XLA_FFI_Array numbers, own, traced;
    double hyper[5], grad_scale;
    uint64_t none, flag;
    int32_t kinds[TENSORS];
} frame;

/* Puts a call together; where `flag` is set it skips what is not finite, and tells statistics. */
static void lay_frame(frame *f, int flag) {
    static const char *const names[ATTRIBUTES] = {"grad_scale", "hyper", "kernel", "seed",
                                                  "skip_nonfinite", "stats", "threads", "traced"};
    static const double hyper[5] = {0.01, 0.9, 0.999, 1e-8, 0.1};
    void *const attrs[ATTRIBUTES] = {&f->unscaled, &f->numbers, &f->own, &f->zero,
                                     &f->told, &f->told, &f->zero, &f->traced};
    size_t operand = 1;

    memcpy(f->hyper, hyper, sizeof hyper);
    memcpy(f->attrs, attrs, sizeof attrs);
    memset(f->kinds, 0, sizeof f->kinds);
    f->none = 0;
    f->flag = (uint64_t)flag;
    f->grad_scale = 1;
    f->unscaled.dtype = XLA_FFI_DataType_F64;
    f->unscaled.value = &f->grad_scale;
    f->zero.dtype = f->told.dtype = XLA_FFI_DataType_U64;
    f->zero.value = &f->none;
    f->told.value = &f->flag;
    f->numbers.dtype = XLA_FFI_DataType_F64;
    f->numbers.size = 5;
    f->numbers.data = f->hyper;
    f->own.dtype = f->traced.dtype = XLA_FFI_DataType_S32;
    f->own.size = TENSORS;
    f->own.data = f->kinds;
    f->traced.size = 0;
    f->traced.data = NULL;
    for (size_t k = 0; k < ATTRIBUTES; k++) {
        f->spans[k].ptr = names[k];
        f->spans[k].len = strlen(names[k]);
        f->labels[k] = &f->spans[k];
    }
    f->args[0] = f->rets[0] = &f->buffers[0];
    f->results = 1;
    for (size_t k = 0; k < TENSORS; k++)
        for (size_t a = 0; a < ARRAYS; a++, operand++) {
            f->dims[k] = (int64_t)sizes[k];
            f->buffers[operand].dtype = XLA_FFI_DataType_F32;
            f->buffers[operand].rank = 1;
            f->buffers[operand].dims = &f->dims[k];
            f->args[operand] = &f->buffers[operand];
            if (a != 1)
                f->rets[f->results++] = &f->buffers[operand];
        }
    for (size_t k = flag ? 0 : 2; k < MOST; k++) /* norms, counts, scratch memory */
        f->rets[f->results++] = &f->buffers[OPERANDS + k];
    f->buffers[OPERANDS].dtype = XLA_FFI_DataType_F32;
    f->call.api = &f->api;
    f->call.stage = XLA_FFI_ExecutionStage_EXECUTE;
    f->call.args.size = OPERANDS;
    f->call.args.args = f->args;
    f->call.rets.size = f->results;
    f->call.rets.rets = f->rets;
    f->call.attrs.size = ATTRIBUTES;
    f->call.attrs.names = f->labels;
    f->call.attrs.attrs = f->attrs;
}

/* A call with arrays that have values, from memory that `take` gives. */
static void make_frame(frame *f, int flag, void *(*take)(size_t)) {
    const size_t rows = TENSORS + 1;

    memset(f, 0, sizeof *f);
    f->buffers[0].data = memset(take(sizeof(int32_t)), 0, sizeof(int32_t));
    for (size_t k = 0; k < TENSORS; k++)
        for (size_t a = 0; a < ARRAYS; a++) {
            const size_t bytes = (sizes[k] + 1) * sizeof(float);
            float *const values = (float *)memset(take(bytes), 0, bytes);

            for (size_t i = 0; i < sizes[k] && a < 2; i++)
                values[i] = (float)((i * 7919 + a) % 1009) / 512 - 1;
            f->buffers[1 + k * ARRAYS + a].data = values;
        }
    f->buffers[OPERANDS].data = memset(take(rows * NORMS * sizeof(float)), 0, rows * NORMS * sizeof(float));
    f->buffers[OPERANDS + 1].data = take(rows * COUNTS * sizeof(int32_t));
    lay_frame(f, flag);
}

/* Prints what became of the arrays, and whether norms were told; what the process ends with. */
static int tell_frame(const frame *f, int more) {
    uint64_t hash = 14695981039346656037u; /* FNV-1a */

    for (size_t k = 0; k < TENSORS; k++)
        for (size_t i = 0; i < sizes[k] * sizeof(float); i++)
            hash = (hash ^ ((const unsigned char *)f->buffers[1 + k * ARRAYS].data)[i]) * 1099511628211u;
    printf("%llx %d %d\n", (unsigned long long)hash, *(const float *)f->buffers[OPERANDS].data > 0, more);
    return *(const int32_t *)f->buffers[0].data == STEPS ? 0 : 2;
}
