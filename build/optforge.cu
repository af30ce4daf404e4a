/* optforge.cu: how a step of any rule is planned and launched on a CUDA device.
 *
 * The passes over memory are in optforge.cuh, as templates, and instantiated in the rules' files. Here are
 * the checks, the tables of a plan, and the launches of a step: its begin, and for each phase a pass, of
 * which a warp does a leaf, and behind it, where it adds up, a fold.
 *
 * Build: nvcc -O3 -arch=sm_75 -c optforge.cu    (or the device's architecture; sm_70 is the lowest)
 *
 * This file may be used, changed and distributed without restriction.
 */
#define OPTFORGE_CUDA_COMPILE
#include "optforge.cuh"

/* ---- the tables of a plan ------------------------------------------------------------------------------ */

/* Running totals of what each of `count` tensors takes, from 0 on, by all threads of one block. */
template <typename Taken>
static __device__ void optforge_cuda_running(uint64_t *before, uint64_t count, Taken taken) {
    __shared__ uint64_t sums[OPTFORGE_CUDA_THREADS];
    uint64_t all = 0;

    if (threadIdx.x == 0)
        before[0] = 0;
    for (uint64_t start = 0; start < count; start += OPTFORGE_CUDA_THREADS) {
        const uint64_t k = start + threadIdx.x;

        sums[threadIdx.x] = k < count ? taken(k) : 0;
        __syncthreads();
        for (unsigned distance = 1; distance < OPTFORGE_CUDA_THREADS; distance *= 2) {
            const uint64_t other = threadIdx.x >= distance ? sums[threadIdx.x - distance] : 0;

            __syncthreads();
            sums[threadIdx.x] += other;
            __syncthreads();
        }
        if (k < count)
            before[k + 1] = all + sums[threadIdx.x];
        all += sums[OPTFORGE_CUDA_THREADS - 1];
        __syncthreads();
    }
}

static __host__ __device__ uint64_t optforge_cuda_parts(uint64_t n, uint64_t size) {
    return n / size + (n % size != 0);
}

OPTFORGE_DEVICE uint64_t optforge_cuda_size(const optforge_cuda_plan &w, uint64_t k) {
    return *(const uint64_t *)(w.list + k * w.stride);
}

/* Fills in the columns of a plan. */
OPTFORGE_DEVICE void optforge_cuda_lay_out_tensors(const optforge_cuda_plan &w) {
    const uint64_t chunk = (uint64_t)OPTFORGE_LEAF * OPTFORGE_CUDA_CHUNK;

    for (uint64_t k = threadIdx.x; k < w.count; k += OPTFORGE_CUDA_THREADS) {
        if (w.parted) {
            w.part[k] /= OPTFORGE_LEAF; /* it came as an element */
        } else {
            w.number[k] = k;
            w.part[k] = 0;
            w.sizes[k] = optforge_cuda_size(w, k);
        }
        w.gradients[k] = ((const void *const *)(w.list + k * w.stride))[2];
    }
    __syncthreads();
    optforge_cuda_running(w.before, w.count, [&](uint64_t k) {
        return optforge_cuda_parts(optforge_cuda_size(w, k), OPTFORGE_LEAF);
    });
    optforge_cuda_running(w.first, w.tensors, [&](uint64_t k) {
        return optforge_cuda_parts(w.sizes[k], OPTFORGE_LEAF);
    });
    optforge_cuda_running(w.before_chunk, w.tensors, [&](uint64_t k) {
        return w.sizes[k] > chunk ? optforge_cuda_parts(w.sizes[k], chunk) : 1;
    });
}

/* Lists the leaves of tensors, or the chunks: a warp for each. */
OPTFORGE_DEVICE void optforge_cuda_lay_out_units(const optforge_cuda_plan &w) {
    const uint64_t k = blockIdx.x * (uint64_t)OPTFORGE_CUDA_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;

    if (k < w.count)
        for (uint64_t leaf = lane, begin = w.before[k]; leaf < w.before[k + 1] - begin; leaf += 32)
            w.unit[begin + leaf] = {(uint32_t)k, (uint32_t)leaf};
    if (k < w.tensors)
        for (uint64_t c = lane, begin = w.before_chunk[k]; c < w.before_chunk[k + 1] - begin; c += 32)
            w.chunk[begin + c] = {(uint32_t)k, (uint32_t)c};
}

OPTFORGE_CUDA_KERNEL(optforge_cuda_lay_tensors, optforge_cuda_plan, optforge_cuda_lay_out_tensors)
OPTFORGE_CUDA_KERNEL(optforge_cuda_lay_units, optforge_cuda_plan, optforge_cuda_lay_out_units)

/* How array `a` of the tensors of a group begins: as p or as g, in their formats, or as a number. */
struct optforge_cuda_beginning {
    optforge_cuda_plan plan;
    uint64_t group;
    double value;
    int32_t a, from, format, format_of_from;
};

static __device__ double optforge_cuda_get(const void *array, int format, uint64_t i) {
    switch (format) {
    case OPTFORGE_F32: return (double)((const float *)array)[i];
    case OPTFORGE_BF16:
    case OPTFORGE_F16: return optforge_cuda_decode(format, ((const uint16_t *)array)[i]).wide();
    default: return ((const double *)array)[i];
    }
}

static __device__ void optforge_cuda_put(void *array, int format, uint64_t i, double value) {
    switch (format) {
    case OPTFORGE_F32: ((float *)array)[i] = optforge_f32(value).x; break;
    case OPTFORGE_BF16:
    case OPTFORGE_F16: ((uint16_t *)array)[i] = optforge_cuda_encode(format, value, false, 0); break;
    case OPTFORGE_LOW: ((uint16_t *)array)[i] = 0; break; /* p leaves nothing at first */
    default: ((double *)array)[i] = value;
    }
}

static __device__ void optforge_cuda_write(const optforge_cuda_beginning &x,
                                           const optforge_cuda_tensor &tensor, uint64_t begin,
                                           uint64_t end, uint64_t step) {
    const void *from = x.from == OPTFORGE_FROM_G ? x.plan.gradients[tensor.k] : tensor.array(0);
    const bool copied = x.from == OPTFORGE_FROM_P || x.from == OPTFORGE_FROM_G;

    for (uint64_t i = begin; i < end; i += step)
        optforge_cuda_put(tensor.array(x.a), x.format, i,
                          copied ? optforge_cuda_get(from, x.format_of_from, i) : x.value);
}

/* Writes initial state: a warp for each leaf, or a thread for each tensor where it is scalar. */
OPTFORGE_DEVICE void optforge_cuda_write_arrays(const optforge_cuda_beginning &x) {
    const optforge_cuda_plan &w = x.plan;
    const uint64_t k = blockIdx.x * (uint64_t)OPTFORGE_CUDA_THREADS + threadIdx.x, u = k / 32, lane = k % 32;

    if (x.format == OPTFORGE_SCALAR) {
        if (k < w.count && w.group[k] == x.group)
            optforge_cuda_write(x, optforge_cuda_tensor(w, k), 0, 1, 1);
    } else if (u < w.units && w.group[w.unit[u].tensor] == x.group) {
        const optforge_cuda_tensor tensor(w, w.unit[u].tensor);
        const uint64_t begin = (uint64_t)w.unit[u].leaf * OPTFORGE_LEAF, n = optforge_cuda_size(w, tensor.k);
        const uint64_t end = n - begin < OPTFORGE_LEAF ? n : begin + OPTFORGE_LEAF;

        optforge_cuda_write(x, tensor, begin + lane, end, 32);
    }
}
OPTFORGE_CUDA_KERNEL(optforge_cuda_write_state, optforge_cuda_beginning, optforge_cuda_write_arrays)

/* ---- the host ------------------------------------------------------------------------------------------ */

/* How many blocks are needed, at least one, if each does so many. */
static uint64_t optforge_cuda_blocks(uint64_t n, uint64_t size) {
    return n > size ? optforge_cuda_parts(n, size) : 1;
}

/* Launches a kernel, if it has any blocks. */
static int optforge_cuda_start(const void *kernel, uint64_t blocks, const void *argument, cudaStream_t stream,
                               unsigned sums = 1) {
    void *arguments[] = {(void *)argument};
    const dim3 grid((unsigned)blocks, sums), block(OPTFORGE_CUDA_THREADS);

    if (blocks == 0 || cudaLaunchKernel(kernel, grid, block, arguments, 0, stream) == cudaSuccess)
        return OPTFORGE_OK;
    return OPTFORGE_ERROR_CUDA;
}

static int optforge_cuda_done(cudaError_t error) { return error == cudaSuccess ? 0 : +OPTFORGE_ERROR_CUDA; }

/* Copies a table from the host, which may change its memory when this returns. */
static int optforge_cuda_bring(void *to, const void *from, uint64_t bytes, cudaStream_t stream) {
    return bytes == 0 ? +OPTFORGE_OK
                      : optforge_cuda_done(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream));
}

static int optforge_cuda_clear(void *to, uint64_t bytes, cudaStream_t stream) {
    return bytes == 0 ? +OPTFORGE_OK : optforge_cuda_done(cudaMemsetAsync(to, 0, bytes, stream));
}

static size_t optforge_cuda_format_size(unsigned char format) {
    return format == OPTFORGE_F32 ? 4 : format >= OPTFORGE_BF16 ? 2 : 8;
}

/* Whether a tensor's arrays are there, aligned, and apart from each other. */
static int optforge_cuda_check_tensor(const optforge_cuda_kernel *kernel, const char *tensor) {
    const size_t n = *(const size_t *)tensor;
    const uintptr_t *arrays = (const uintptr_t *)(tensor + sizeof n);

    for (size_t a = 0; a < kernel->arrays; a++) {
        const size_t size = optforge_cuda_format_size(kernel->formats[a]);
        const size_t bytes = kernel->formats[a] == OPTFORGE_SCALAR ? size : n * size;

        if (n > SIZE_MAX / size || (uint64_t)n > (uint64_t)UINT32_MAX * OPTFORGE_LEAF)
            return OPTFORGE_ERROR_SIZE;
        if (bytes != 0 && arrays[a] == 0)
            return OPTFORGE_ERROR_NULL;
        if (bytes != 0 && arrays[a] % size != 0)
            return OPTFORGE_ERROR_ALIGNMENT;
        for (size_t b = 0; b < a && bytes != 0; b++) {
            const size_t other = (kernel->formats[b] == OPTFORGE_SCALAR ? 1 : n) *
                                 optforge_cuda_format_size(kernel->formats[b]);

            if (other != 0 && (arrays[a] - arrays[b] < other || arrays[b] - arrays[a] < bytes))
                return OPTFORGE_ERROR_OVERLAP;
        }
    }
    return OPTFORGE_OK;
}

/* Whether tensor k of a list is a part of a whole one, between leaves. */
static int optforge_cuda_check_part(const optforge_cuda_options *o, size_t k, size_t n) {
    const size_t number = o->number[k], part = o->part[k];

    if (number >= o->tensors)
        return OPTFORGE_ERROR_NUMBER;
    if (part % OPTFORGE_LEAF != 0 || part > o->sizes[number] || n > o->sizes[number] - part ||
        (n % OPTFORGE_LEAF != 0 && part + n != o->sizes[number]))
        return OPTFORGE_ERROR_PART;
    return OPTFORGE_OK;
}

/* Places a part of the workspace. */
template <typename T>
static void optforge_cuda_take(T **part, char **at, uint64_t number) {
    *part = (T *)*at;
    *at += (number * sizeof(T) + 15) / 16 * 16;
}

/* Places all parts of the workspace; the end of them. What is behind `list` is its own plan's beside
 * another. */
static char *optforge_cuda_place(optforge_cuda_plan *w, char *at) {
    const uint64_t sums = (uint64_t)w->kernel->sums;

    if (!w->beside) {
        optforge_cuda_take(&w->control, &at, 1);
        optforge_cuda_take(&w->rows, &at, OPTFORGE_CUDA_ROWS * w->groups * w->width);
        optforge_cuda_take(&w->scalars, &at, w->groups * w->width);
        optforge_cuda_take(&w->behind, &at, w->groups);
        optforge_cuda_take(&w->sizes, &at, w->tensors);
        optforge_cuda_take(&w->first, &at, w->tensors + 1);
        optforge_cuda_take(&w->before_chunk, &at, w->tensors + 1);
        optforge_cuda_take(&w->chunk, &at, w->chunks);
        optforge_cuda_take(&w->totals, &at, sums);
        optforge_cuda_take(&w->tensor_sums, &at, sums * w->tensors);
        optforge_cuda_take(&w->chunk_sums, &at, sums * w->chunks);
        optforge_cuda_take(&w->sums, &at, sums * w->leaves);
        optforge_cuda_take(&w->arrived, &at, sums * (w->tensors + 1));
    }
    optforge_cuda_take((char **)&w->list, &at, w->count * w->stride);
    optforge_cuda_take(&w->gradients, &at, w->count);
    optforge_cuda_take(&w->group, &at, w->count);
    optforge_cuda_take(&w->number, &at, w->count);
    optforge_cuda_take(&w->part, &at, w->count);
    optforge_cuda_take(&w->before, &at, w->count + 1);
    optforge_cuda_take(&w->stream, &at, w->count);
    optforge_cuda_take(&w->unit, &at, w->units);
    return at;
}

static optforge_cuda_plan optforge_cuda_empty(const optforge_cuda_kernel *kernel, uint64_t count,
                                              size_t groups) {
    optforge_cuda_plan w;

    memset(&w, 0, sizeof w);
    w.kernel = kernel;
    w.count = w.tensors = count;
    w.groups = groups > 0 ? groups : 1;
    w.stride = sizeof(size_t) + kernel->arrays * sizeof(void *);
    w.width = kernel->scalars_size / sizeof(uint64_t);
    return w;
}

OPTFORGE_CUDA_API size_t optforge_cuda_workspace_size(const optforge_cuda_kernel *kernel, uint64_t elements,
                                                      size_t count, size_t groups) {
    optforge_cuda_plan w = optforge_cuda_empty(kernel, count, groups);

    w.units = w.leaves = elements / OPTFORGE_LEAF + count;
    w.chunks = elements / OPTFORGE_LEAF / OPTFORGE_CUDA_CHUNK + count;
    return (size_t)(optforge_cuda_place(&w, (char *)16) - (char *)16);
}

/* Loads the kernels of a rule, so that its first step can be captured. */
static int optforge_cuda_load_kernels(const optforge_cuda_kernel *kernel) {
    const void *const kernels[] = {kernel->begin, kernel->fold, kernel->finish, kernel->attempt};
    cudaFuncAttributes found;
    cudaError_t error = cudaSuccess;

    for (const void *own : kernels)
        if (own != NULL && error == cudaSuccess)
            error = cudaFuncGetAttributes(&found, own);
    for (int k = 0; k < kernel->phase_count && error == cudaSuccess; k++) {
        error = cudaFuncGetAttributes(&found, kernel->phases[k].plain);
        if (error == cudaSuccess)
            error = cudaFuncGetAttributes(&found, kernel->phases[k].observed);
    }
    return optforge_cuda_done(error);
}

OPTFORGE_CUDA_API int optforge_cuda_plan_list(optforge_cuda_plan *plan, const optforge_cuda_kernel *kernel,
                                              const void *tensors, size_t count,
                                              const optforge_cuda_options *o, cudaStream_t stream) {
    static_assert(sizeof(size_t) == sizeof(uint64_t), "sizes of the host are copied as they are");
    const uint64_t chunk = (uint64_t)OPTFORGE_LEAF * OPTFORGE_CUDA_CHUNK;

    if (plan == NULL || kernel == NULL || o == NULL || o->workspace == NULL || (tensors == NULL && count > 0))
        return OPTFORGE_ERROR_NULL;
    if (o->size != sizeof *o)
        return OPTFORGE_ERROR_OPTIONS;
    if (kernel->abi != OPTFORGE_CUDA_TYPES || (o->beside != NULL && o->beside->kernel->sums != kernel->sums))
        return OPTFORGE_ERROR_ABI;
    if (o->sizes != NULL && count > 0 && (o->number == NULL || o->part == NULL))
        return OPTFORGE_ERROR_NULL;
    optforge_cuda_plan w = optforge_cuda_empty(kernel, count, o->groups);
    if (o->beside != NULL)
        w = *o->beside;
    w.kernel = kernel;
    w.count = count;
    w.late = o->late;
    w.beside = o->beside != NULL;
    w.parted = o->sizes != NULL;
    w.tensors = w.parted ? o->tensors : count;
    w.units = w.leaves = w.chunks = 0;
    if (count >= UINT32_MAX || w.tensors >= UINT32_MAX)
        return OPTFORGE_ERROR_SIZE;
    for (size_t k = 0; k < count; k++) {
        const char *tensor = (const char *)tensors + k * w.stride;
        int status = optforge_cuda_check_tensor(kernel, tensor);

        if (status == OPTFORGE_OK && w.parted)
            status = optforge_cuda_check_part(o, k, *(const size_t *)tensor);
        if (status == OPTFORGE_OK && o->group != NULL && o->group[k] >= w.groups)
            status = OPTFORGE_ERROR_GROUP;
        if (status != OPTFORGE_OK)
            return status;
        w.units += optforge_cuda_parts(*(const size_t *)tensor, OPTFORGE_LEAF);
    }
    for (size_t k = 0; k < w.tensors; k++) {
        const uint64_t n = w.parted ? o->sizes[k] : *(const size_t *)((const char *)tensors + k * w.stride);

        w.leaves += optforge_cuda_parts(n, OPTFORGE_LEAF);
        w.chunks += n > chunk ? optforge_cuda_parts(n, chunk) : 1;
    }
    char *const space = (char *)o->workspace;
    if ((uintptr_t)space % 16 != 0 || (size_t)(optforge_cuda_place(&w, space) - space) > o->workspace_size)
        return OPTFORGE_ERROR_WORKSPACE;

    const uint64_t counters = (uint64_t)kernel->sums * (w.tensors + 1) * sizeof *w.arrived;
    const uint64_t most = count > w.tensors ? count : w.tensors;
    int status = optforge_cuda_load_kernels(kernel);
    if (status == OPTFORGE_OK && !w.beside)
        status = optforge_cuda_clear(w.control, sizeof *w.control, stream);
    if (status == OPTFORGE_OK && !w.beside)
        status = optforge_cuda_clear(w.arrived, counters, stream);
    if (status == OPTFORGE_OK)
        status = optforge_cuda_bring((void *)w.list, tensors, count * w.stride, stream);
    if (status == OPTFORGE_OK && !w.beside && o->late == NULL)
        status = optforge_cuda_clear(w.behind, w.groups * sizeof *w.behind, stream);
    if (status == OPTFORGE_OK && !w.beside && o->late != NULL)
        status = optforge_cuda_bring(w.behind, o->late, w.groups * sizeof *w.behind, stream);
    if (status == OPTFORGE_OK && o->stream != NULL)
        status = optforge_cuda_bring(w.stream, o->stream, count * sizeof *w.stream, stream);
    if (o->stream == NULL)
        w.stream = NULL;
    if (status == OPTFORGE_OK && o->group == NULL)
        status = optforge_cuda_clear(w.group, count * sizeof *w.group, stream);
    if (status == OPTFORGE_OK && o->group != NULL)
        status = optforge_cuda_bring(w.group, o->group, count * sizeof *w.group, stream);
    if (status == OPTFORGE_OK && w.parted)
        status = optforge_cuda_bring(w.number, o->number, count * sizeof *w.number, stream);
    if (status == OPTFORGE_OK && w.parted)
        status = optforge_cuda_bring(w.part, o->part, count * sizeof *w.part, stream);
    if (status == OPTFORGE_OK && w.parted)
        status = optforge_cuda_bring(w.sizes, o->sizes, w.tensors * sizeof *w.sizes, stream);
    if (status == OPTFORGE_OK)
        status = optforge_cuda_start((const void *)optforge_cuda_lay_tensors, 1, &w, stream);
    if (status == OPTFORGE_OK)
        status = optforge_cuda_start((const void *)optforge_cuda_lay_units,
                                     optforge_cuda_parts(most, OPTFORGE_CUDA_WARPS), &w, stream);
    if (status == OPTFORGE_OK)
        *plan = w;
    return status;
}

OPTFORGE_CUDA_API int optforge_cuda_gradients(const optforge_cuda_plan *plan, const void *const *gradients,
                                              cudaStream_t stream) {
    if (plan == NULL || (gradients == NULL && plan->count > 0))
        return OPTFORGE_ERROR_NULL;
    for (uint64_t k = 0; k < plan->count; k++)
        if ((uintptr_t)gradients[k] % optforge_cuda_format_size(plan->kernel->formats[1]) != 0)
            return OPTFORGE_ERROR_ALIGNMENT;
    return optforge_cuda_bring(plan->gradients, gradients, plan->count * sizeof *gradients, stream);
}

OPTFORGE_CUDA_API int optforge_cuda_state_init(const optforge_cuda_plan *plan, const void *hyper,
                                               cudaStream_t stream) {
    if (plan == NULL)
        return OPTFORGE_ERROR_NULL;
    const optforge_cuda_kernel *kernel = plan->kernel;
    static const optforge_initial as_p = {OPTFORGE_FROM_P, 0.0};
    optforge_cuda_beginning x;
    int status = OPTFORGE_OK;

    for (size_t a = 2; a < kernel->arrays; a++)
        if (a != kernel->master && kernel->initial[a - 2].from >= 0 && hyper == NULL)
            return OPTFORGE_ERROR_NULL;
    x.plan = *plan;
    for (x.group = 0; x.group < plan->groups; x.group++)
        for (size_t a = 2; a < kernel->arrays && status == OPTFORGE_OK; a++) {
            const optforge_initial *initial = a == kernel->master ? &as_p : &kernel->initial[a - 2];

            x.a = (int32_t)a;
            x.from = initial->from;
            x.format = kernel->formats[a];
            x.format_of_from = kernel->formats[x.from == OPTFORGE_FROM_G];
            x.value = x.from >= 0 ? ((const double *)hyper)[x.group * kernel->hypers + (size_t)x.from]
                                  : initial->value;
            status = optforge_cuda_start(
                (const void *)optforge_cuda_write_state,
                x.format == OPTFORGE_SCALAR ? optforge_cuda_parts(plan->count, OPTFORGE_CUDA_THREADS)
                                            : optforge_cuda_parts(plan->units, OPTFORGE_CUDA_WARPS),
                &x, stream);
        }
    return status;
}

/* ---- steps --------------------------------------------------------------------------------------------- */

/* The scalars of row k of those of steps from t on: each step has one for each group. */
static int optforge_cuda_row(const optforge_cuda_plan *plan, const void *hyper, uint64_t t, uint64_t k,
                             double unscale, uint64_t *row) {
    const uint64_t group = k % plan->groups, late = plan->late != NULL ? plan->late[group] : 0;
    const double *own = (const double *)hyper + group * plan->kernel->hypers;

    t += k / plan->groups;
    if (t == 0 || late >= t)
        return OPTFORGE_ERROR_TIME;
    for (size_t i = 0; i < plan->kernel->hypers; i++)
        if (own[i] != own[i])
            return OPTFORGE_ERROR_NAN;
    return plan->kernel->scalars(row, own, t - late, unscale);
}

/* Hands over the scalars of steps, as arguments of kernels that store them; the last may begin a step. */
static int optforge_cuda_tell_rows(optforge_cuda_news *news, const void *hyper, uint64_t t, size_t number,
                                   double unscale, cudaStream_t stream) {
    const optforge_cuda_plan *plan = &news->plan;
    const uint64_t width = plan->width, all = number * plan->groups, most = OPTFORGE_CUDA_NEWS / width;
    const int begins = news->begins;
    int status = OPTFORGE_OK;

    if (width > OPTFORGE_CUDA_NEWS)
        return OPTFORGE_ERROR_ABI;
    for (uint64_t k = 0; k < all && status == OPTFORGE_OK; k++) /* first whether all have values */
        status = optforge_cuda_row(plan, hyper, t, k, unscale, news->word);
    news->first_row = t;
    news->rows = number;
    for (uint64_t k = 0; k < all && status == OPTFORGE_OK; k += most) {
        const uint64_t own = all - k < most ? all - k : most;

        for (uint64_t r = 0; r < own; r++)
            (void)optforge_cuda_row(plan, hyper, t, k + r, unscale, news->word + r * width);
        news->at = k * width;
        news->words = own * width;
        news->told = k + own == all;
        news->begins = begins && news->told;
        status = optforge_cuda_start(plan->kernel->begin, 1, news, stream);
    }
    return status;
}

/* Whether scalars can be handed over in a stream now. */
static int optforge_cuda_check_step(const optforge_cuda_plan *plan, const void *hyper, double grad_scale,
                                    cudaStream_t stream) {
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;

    if (plan == NULL || (hyper == NULL && plan->kernel->hypers > 0))
        return OPTFORGE_ERROR_NULL;
    if (!(grad_scale > 0.0 && 1.0 / grad_scale > 0.0 && 1.0 / grad_scale - 1.0 / grad_scale == 0.0))
        return OPTFORGE_ERROR_GRAD_SCALE;
    if (cudaStreamIsCapturing(stream, &capturing) != cudaSuccess)
        return OPTFORGE_ERROR_CUDA;
    return capturing == cudaStreamCaptureStatusNone ? 0 : +OPTFORGE_ERROR_CAPTURE;
}

OPTFORGE_CUDA_API int optforge_cuda_rows(const optforge_cuda_plan *plan, const void *hyper, uint64_t t,
                                         size_t number, int set, const optforge_cuda_options *options,
                                         cudaStream_t stream) {
    const double grad_scale = options != NULL ? options->grad_scale : 1.0;
    const int status = optforge_cuda_check_step(plan, hyper, grad_scale, stream);
    optforge_cuda_news news;

    if (status != OPTFORGE_OK)
        return status;
    if (number == 0 || number > OPTFORGE_CUDA_ROWS)
        return OPTFORGE_ERROR_ROWS;
    news.plan = *plan;
    news.set = set != 0;
    news.base = t - 1;
    news.begins = 0;
    return optforge_cuda_tell_rows(&news, hyper, t, number, 1.0 / grad_scale, stream);
}

/* A plan as the kernels of this step take it. */
static optforge_cuda_plan optforge_cuda_asked(const optforge_cuda_plan *plan,
                                              const optforge_cuda_options *o) {
    optforge_cuda_plan w = *plan;

    if (o != NULL) {
        w.observe = o->stats != NULL || o->tensor_stats != NULL;
        w.skip_nonfinite = o->skip_nonfinite;
        w.zero_grads = o->zero_grads;
        w.stats = o->stats;
        w.tensor_stats = o->tensor_stats;
        w.starting = o->starting;
        w.seed = o->seed;
    }
    return w;
}

/* Does phases of a step that has begun, and the last, which only finishes. */
static int optforge_cuda_go_on(optforge_cuda_plan w, int first, int last, cudaStream_t stream) {
    const optforge_cuda_kernel *kernel = w.kernel;
    const uint64_t blocks = optforge_cuda_parts(w.units, OPTFORGE_CUDA_WARPS);
    int status = OPTFORGE_OK;

    for (int phase = first; phase < last && phase <= kernel->phase_count && status == OPTFORGE_OK; phase++) {
        if (phase > 0 && !w.beside) { /* what the phase before left */
            const optforge_cuda_phase *own = &kernel->phases[phase - 1];
            const bool looks = w.skip_nonfinite && phase == 1, scans = own->scans && !w.observe;
            int sums = w.observe || looks ? own->all : own->own;

            w.phase = phase - 1;
            w.slot = own->first + scans;
            if (sums > 0)
                status = optforge_cuda_start(
                    kernel->fold, optforge_cuda_blocks(w.chunks, OPTFORGE_CUDA_WARPS), &w, stream,
                    (unsigned)(sums - scans));
        }
        if (status != OPTFORGE_OK)
            break;
        if (phase == kernel->phase_count) {
            const uint64_t most = w.count > w.tensors ? w.count : w.tensors;

            if (w.observe || kernel->stores)
                status = optforge_cuda_start(
                    kernel->finish, optforge_cuda_blocks(most, OPTFORGE_CUDA_THREADS), &w, stream);
        } else {
            const optforge_cuda_phase *own = &kernel->phases[phase];
            const bool observed = w.observe || (w.skip_nonfinite && phase == 0 && !own->scans);

            if (!own->scans || w.skip_nonfinite)
                status = optforge_cuda_start(observed ? own->observed : own->plain, blocks, &w, stream);
        }
    }
    return status;
}

/* Looks for scalars without value, where there may be such, when a step has begun. */
static int optforge_cuda_attempted(const optforge_cuda_plan *w, cudaStream_t stream) {
    const void *const kernel = w->kernel->attempt;
    const uint64_t blocks = kernel != NULL ? optforge_cuda_parts(w->count, OPTFORGE_CUDA_THREADS) : 0;

    return optforge_cuda_start(kernel, blocks, w, stream);
}

OPTFORGE_CUDA_API int optforge_cuda_phases(const optforge_cuda_plan *plan,
                                           const optforge_cuda_options *options, int first, int last,
                                           cudaStream_t stream) {
    optforge_cuda_news news;
    int status = OPTFORGE_OK;

    if (plan == NULL)
        return OPTFORGE_ERROR_NULL;
    if (first < 0 || first > plan->kernel->phase_count || last < first)
        return OPTFORGE_ERROR_ORDER;
    news.plan = optforge_cuda_asked(plan, options);
    news.words = 0;
    news.told = 0;
    news.begins = 1;
    if (first == 0 && !plan->beside)
        status = optforge_cuda_start(plan->kernel->begin, 1, &news, stream);
    if (first == 0 && status == OPTFORGE_OK)
        status = optforge_cuda_attempted(&news.plan, stream);
    return status == OPTFORGE_OK ? optforge_cuda_go_on(news.plan, first, last, stream) : status;
}

OPTFORGE_CUDA_API int optforge_cuda_launch(const optforge_cuda_plan *plan,
                                           const optforge_cuda_options *options, cudaStream_t stream) {
    return optforge_cuda_phases(plan, options, 0, plan != NULL ? plan->kernel->phase_count + 1 : 0, stream);
}

OPTFORGE_CUDA_API int optforge_cuda_step(const void *hyper, uint64_t t, const optforge_cuda_plan *plan,
                                         const optforge_cuda_options *options, cudaStream_t stream) {
    const double grad_scale = options != NULL ? options->grad_scale : 1.0;
    int status = optforge_cuda_check_step(plan, hyper, grad_scale, stream);
    optforge_cuda_news news;

    if (status != OPTFORGE_OK)
        return status;
    news.plan = optforge_cuda_asked(plan, options);
    news.set = 1;
    news.base = t - 1;
    news.begins = 1;
    status = optforge_cuda_tell_rows(&news, hyper, t, 1, 1.0 / grad_scale, stream);
    if (status == OPTFORGE_OK)
        status = optforge_cuda_attempted(&news.plan, stream);
    if (status == OPTFORGE_OK)
        status = optforge_cuda_go_on(news.plan, 0, plan->kernel->phase_count + 1, stream);
    return status;
}

OPTFORGE_CUDA_API double *optforge_cuda_partials(const optforge_cuda_plan *plan, int phase, size_t *number) {
    if (number == NULL)
        return NULL;
    *number = 0;
    if (plan == NULL || phase < 0 || phase >= plan->kernel->phase_count)
        return NULL;
    const optforge_cuda_phase *own = &plan->kernel->phases[phase];
    *number = (size_t)(own->all * plan->leaves);
    return plan->sums + own->first * plan->leaves;
}

/* ---- small things -------------------------------------------------------------------------------------- */

OPTFORGE_CUDA_API void optforge_cuda_options_init(optforge_cuda_options *o) {
    memset(o, 0, sizeof *o);
    o->size = sizeof *o;
    o->grad_scale = 1.0;
}

OPTFORGE_CUDA_API const char *optforge_cuda_strerror(const optforge_cuda_kernel *kernel, int status) {
    static const struct {
        int status;
        const char *text;
    } texts[] = {
        {OPTFORGE_OK, "done"},
        {OPTFORGE_SKIPPED, "a gradient is NaN or infinite, so nothing was changed, and t does not advance"},
        {OPTFORGE_ERROR_NULL, "a pointer is NULL"},
        {OPTFORGE_ERROR_SIZE, "a tensor has more elements than memory can hold"},
        {OPTFORGE_ERROR_ALIGNMENT, "an array is not aligned to its elements"},
        {OPTFORGE_ERROR_OVERLAP, "two arrays of a tensor overlap"},
        {OPTFORGE_ERROR_TIME, "t counts the steps from 1"},
        {OPTFORGE_ERROR_NAN, "a hyperparameter is NaN"},
        {OPTFORGE_ERROR_SCALAR, "a scalar has no value: division by zero, overflow, root of a negative"},
        {OPTFORGE_ERROR_GRAD_SCALE, "grad_scale is not a positive number with a finite inverse"},
        {OPTFORGE_ERROR_WORKSPACE, "the workspace is too small, or not aligned to 16 bytes"},
        {OPTFORGE_ERROR_PART, "a part is not in its tensor, or begins or ends inside a leaf"},
        {OPTFORGE_ERROR_GROUP, "a tensor's group is none of the groups"},
        {OPTFORGE_ERROR_NUMBER, "a tensor's number is none of the tensors"},
        {OPTFORGE_ERROR_ABI, "a kernel is of another version of optforge, or asks for too much"},
        {OPTFORGE_ERROR_OPTIONS, "the options are of another version: use the function that fills them in"},
        {OPTFORGE_ERROR_FLUSH, "the kernels are compiled to flush subnormal numbers, which changes results"},
        {OPTFORGE_ERROR_ORDER, "the phases to be done are not among those of a step"},
        {OPTFORGE_ERROR_CUDA, "a CUDA call failed; cudaGetLastError tells which"},
        {OPTFORGE_ERROR_ROWS, "the device came to a step whose scalars it was not given"},
        {OPTFORGE_ERROR_CAPTURE, "a step brings its scalars along, so a CUDA graph can capture launch alone"},
    };

    for (int k = 0; kernel != NULL && status >= OPTFORGE_ERROR_ASSERT && kernel->asserts[k] != NULL; k++)
        if (status == OPTFORGE_ERROR_ASSERT + k)
            return kernel->asserts[k];
    for (const auto &own : texts)
        if (own.status == status)
            return own.text;
    return "unknown status";
}
