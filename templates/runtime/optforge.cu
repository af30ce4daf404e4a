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

/* Running totals of what each of `count` tensors takes, from 0 on, by one warp. */
template <typename Taken>
static __device__ void optforge_cuda_running(uint64_t *before, uint64_t count, Taken taken) {
    const unsigned lane = threadIdx.x % 32;
    uint64_t all = 0;

    for (uint64_t start = 0; start <= count; start += 32) {
        const uint64_t k = start + lane;
        uint64_t sum = 0 < k && k <= count ? taken(k - 1) : 0;

        for (unsigned distance = 1; distance < 32; distance *= 2) {
            const uint64_t other = __shfl_up_sync(0xffffffffu, sum, distance, 32);

            sum += lane >= distance ? other : 0;
        }
        if (k <= count)
            before[k] = all + sum;
        all += __shfl_sync(0xffffffffu, sum, 31, 32);
    }
}

static __host__ __device__ uint64_t optforge_cuda_parts(uint64_t n, uint64_t size) {
    return n / size + (n % size != 0);
}
static __host__ __device__ uint64_t optforge_cuda_leaves(uint64_t n) {
    return optforge_cuda_parts(n, OPTFORGE_LEAF);
}
static __host__ __device__ uint64_t optforge_cuda_chunks(uint64_t n) {
    return n > 0 ? optforge_cuda_parts(n, (uint64_t)OPTFORGE_LEAF * OPTFORGE_CUDA_CHUNK) : 1;
}

/* Fills in the columns of a plan. */
OPTFORGE_DEVICE void optforge_cuda_lay_out_tensors(const optforge_cuda_plan &w) {
    const uint64_t warp = threadIdx.x / 32;

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
    if (warp == 0)
        optforge_cuda_running(w.before, w.count,
                              [&](uint64_t k) { return optforge_cuda_leaves(optforge_cuda_size(w, k)); });
    if (warp == 1)
        optforge_cuda_running(w.first, w.tensors,
                              [&](uint64_t k) { return optforge_cuda_leaves(w.sizes[k]); });
    if (warp == 2)
        optforge_cuda_running(w.before_chunk, w.tensors,
                              [&](uint64_t k) { return optforge_cuda_chunks(w.sizes[k]); });
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

/* How array `a` of the tensors begins: as p or as g, in their formats, as a number, or, where `from` is a
 * hyperparameter, those of a group as a number of their own. */
struct optforge_cuda_beginning {
    optforge_cuda_plan plan;
    uint64_t group;
    double value;
    int32_t a, from, format, format_of_from, scales;
};

static __device__ void optforge_cuda_put(void *array, int format, uint64_t i, double value) {
    if (format == OPTFORGE_LOW)
        ((uint16_t *)array)[i] = 0; /* p leaves nothing at first */
    else if (optforge_cuda_narrow(format))
        ((uint16_t *)array)[i] = optforge_cuda_encode(format, value, false, 0);
    else if (format == OPTFORGE_F32)
        ((float *)array)[i] = optforge_f32(value).x;
    else
        ((double *)array)[i] = value;
}

/* Writes initial state: a warp for each leaf, or a thread for each tensor where it is scalar. */
OPTFORGE_DEVICE void optforge_cuda_write_arrays(const optforge_cuda_beginning &x) {
    const optforge_cuda_plan &w = x.plan;
    const uint64_t thread = blockIdx.x * (uint64_t)OPTFORGE_CUDA_THREADS + threadIdx.x;
    const bool scalar = x.format == OPTFORGE_SCALAR;
    __shared__ optforge_cuda_map map;

    if (optforge_cuda_blocks(x.format))
        optforge_cuda_fill_map(map, x.format == OPTFORGE_Q8);
    if (thread / (scalar ? 1 : 32) >= (scalar ? w.count : w.units))
        return;
    const optforge_cuda_unit at = scalar ? optforge_cuda_unit{(uint32_t)thread, 0} : w.unit[thread / 32];
    const optforge_cuda_tensor tensor(w, at.tensor);
    const uint64_t n = scalar ? 1 : optforge_cuda_size(w, at.tensor), step = scalar ? 1 : 32;
    const uint64_t begin = (uint64_t)at.leaf * OPTFORGE_LEAF;
    const uint64_t end = n - begin < OPTFORGE_LEAF ? n : begin + OPTFORGE_LEAF;
    const void *from = x.from == OPTFORGE_FROM_G ? w.gradients[tensor.k] : tensor.array(0);
    const bool copied = x.from == OPTFORGE_FROM_P || x.from == OPTFORGE_FROM_G;

    if (x.from >= 0 && w.group[tensor.k] != x.group)
        return;
    if (optforge_cuda_blocks(x.format)) {
        for (uint64_t at = begin; at < end; at += OPTFORGE_BLOCK) {
            optforge_f32 values[2][4];
            int live[2];

            for (int k = 0; k < 8; k++) {
                const uint64_t first = at + k / 4 * OPTFORGE_CUDA_ROW + 4 * (thread % 32), i = first + k % 4;
                const bool there = copied && i < end;

                values[k / 4][k % 4] =
                    optforge_f32(there ? optforge_cuda_get(from, x.format_of_from, i) : x.value);
                live[k / 4] = first >= end ? 0 : end - first < 4 ? (int)(end - first) : 4;
            }
            optforge_cuda_store_block((uint8_t *)tensor.array(x.a) + at,
                                      (float *)tensor.array(x.scales) + at / OPTFORGE_BLOCK, values, live,
                                      map, x.format == OPTFORGE_Q8);
        }
        return;
    }
    for (uint64_t i = begin + thread % step; i < end; i += step)
        optforge_cuda_put(tensor.array(x.a), x.format, i,
                          copied ? optforge_cuda_get(from, x.format_of_from, i) : x.value);
}
OPTFORGE_CUDA_KERNEL(optforge_cuda_write_state, optforge_cuda_beginning, optforge_cuda_write_arrays)

/* ---- the host ------------------------------------------------------------------------------------------ */

/* Work for the device, in order, of which nothing is enqueued behind what fails. */
struct optforge_cuda_queue {
    cudaStream_t stream;
    int status;

    void check(cudaError_t error) {
        if (error != cudaSuccess)
            status = OPTFORGE_ERROR_CUDA;
    }
    /* Copies a table from the host, which may change its memory when this returns; NULL brings zeros. */
    void bring(void *to, const void *from, uint64_t bytes) {
        if (status != OPTFORGE_OK || bytes == 0)
            return;
        check(from == NULL ? cudaMemsetAsync(to, 0, bytes, stream)
                           : cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream));
    }
    /* A kernel, whose blocks do so many things each, if there are any. */
    void launch(const void *kernel, const void *argument, uint64_t things, uint64_t each, unsigned sums = 1) {
        void *arguments[] = {const_cast<void *>(argument)};
        const dim3 grid((unsigned)optforge_cuda_parts(things, each), sums), block(OPTFORGE_CUDA_THREADS);

        if (status == OPTFORGE_OK && grid.x > 0)
            check(cudaLaunchKernel(kernel, grid, block, arguments, 0, stream));
    }
};

/* Bytes of array `a` of a tensor of n elements. */
static size_t optforge_cuda_bytes(const optforge_cuda_kernel *kernel, size_t n, size_t a) {
    const unsigned char format = kernel->formats[a];
    const size_t count = format == OPTFORGE_ABSMAX ? n / OPTFORGE_BLOCK + (n % OPTFORGE_BLOCK != 0) : n;

    return (format == OPTFORGE_SCALAR ? 1 : count) * optforge_cuda_size_of(format);
}

/* Whether the host can hand something over in a stream now: a graph would read its memory at every replay. */
static int optforge_cuda_check_stream(cudaStream_t stream) {
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;

    if (cudaStreamIsCapturing(stream, &capturing) != cudaSuccess)
        return OPTFORGE_ERROR_CUDA;
    return capturing == cudaStreamCaptureStatusNone ? OPTFORGE_OK : +OPTFORGE_ERROR_CAPTURE;
}

static uint64_t optforge_cuda_larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* Whether a tensor's arrays are there, aligned, and apart from each other. */
static int optforge_cuda_check_tensor(const optforge_cuda_kernel *kernel, const char *tensor) {
    const size_t n = *(const size_t *)tensor;
    const uintptr_t *arrays = (const uintptr_t *)(tensor + sizeof n);

    for (size_t a = 0; a < kernel->arrays; a++) {
        const size_t size = optforge_cuda_size_of(kernel->formats[a]);
        const size_t bytes = optforge_cuda_bytes(kernel, n, a);

        if (n > SIZE_MAX / size || (uint64_t)n > (uint64_t)UINT32_MAX * OPTFORGE_LEAF)
            return OPTFORGE_ERROR_SIZE;
        if (bytes != 0 && arrays[a] == 0)
            return OPTFORGE_ERROR_NULL;
        if (bytes != 0 && arrays[a] % size != 0)
            return OPTFORGE_ERROR_ALIGNMENT;
        for (size_t b = 0; b < a && bytes != 0; b++) {
            const size_t other = optforge_cuda_bytes(kernel, n, b);

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

/* Bytes of a tensor in a list. */
static uint64_t optforge_cuda_stride(const optforge_cuda_kernel *kernel) {
    return sizeof(size_t) + kernel->arrays * sizeof(void *);
}

/* Whether parts with one scalar state are neighbours, among which it advances once. */
static int optforge_cuda_check_neighbours(const optforge_cuda_kernel *kernel, const char *tensors,
                                          size_t count, const size_t *number) {
    const void *const scalar = memchr(kernel->formats, OPTFORGE_SCALAR, kernel->arrays);
    const size_t a = (size_t)((const unsigned char *)scalar - kernel->formats);
    const uint64_t stride = optforge_cuda_stride(kernel);
    const auto state = [&](size_t k) { return ((void *const *)(tensors + k * stride + sizeof(size_t)))[a]; };
    uint64_t next = 0; /* above all numbers so far */

    for (size_t k = 0; k < count; k++) {
        for (size_t j = 0; j + 1 < k && number[k] < next && state(k) != state(k - 1); j++)
            if (state(k) == state(j))
                return OPTFORGE_ERROR_PART;
        next = optforge_cuda_larger(next, (uint64_t)number[k] + 1);
    }
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
    optforge_cuda_take(&w->list, &at, w->count * w->stride);
    optforge_cuda_take(&w->gradients, &at, w->count);
    optforge_cuda_take(&w->group, &at, w->count);
    optforge_cuda_take(&w->number, &at, w->count);
    optforge_cuda_take(&w->part, &at, w->count);
    optforge_cuda_take(&w->before, &at, w->count + 1);
    optforge_cuda_take(&w->stream, &at, w->count);
    optforge_cuda_take(&w->unit, &at, w->units);
    return at;
}

/* Whether a kernel can do its steps with the sums and the scalars of a plan. */
static bool optforge_cuda_alike(const optforge_cuda_kernel *kernel, const optforge_cuda_plan *plan) {
    return plan->kernel->sums == kernel->sums && plan->kernel->scalars_size == kernel->scalars_size &&
           plan->kernel->hypers == kernel->hypers;
}

static optforge_cuda_plan optforge_cuda_empty(const optforge_cuda_kernel *kernel, uint64_t count,
                                              size_t groups) {
    optforge_cuda_plan w;

    memset(&w, 0, sizeof w);
    w.kernel = kernel;
    w.count = w.tensors = count;
    w.groups = groups > 0 ? groups : 1;
    w.stride = optforge_cuda_stride(kernel);
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
    optforge_cuda_queue queue = {NULL, OPTFORGE_OK};
    cudaFuncAttributes found;
    const auto load = [&](const void *own) {
        if (own != NULL)
            queue.check(cudaFuncGetAttributes(&found, own));
    };

    for (const void *own : {kernel->begin, kernel->fold, kernel->finish, kernel->attempt})
        load(own);
    for (int k = 0; k < kernel->phase_count; k++) {
        load(kernel->phases[k].plain);
        load(kernel->phases[k].observed);
    }
    return queue.status;
}

OPTFORGE_CUDA_API int optforge_cuda_plan_list(optforge_cuda_plan *plan, const optforge_cuda_kernel *kernel,
                                              const void *tensors, size_t count,
                                              const optforge_cuda_options *o, cudaStream_t stream) {
    static_assert(sizeof(size_t) == sizeof(uint64_t), "sizes of the host are copied as they are");

    if (plan == NULL || kernel == NULL || o == NULL || o->workspace == NULL || (tensors == NULL && count > 0))
        return OPTFORGE_ERROR_NULL;
    if (o->size != sizeof *o)
        return OPTFORGE_ERROR_OPTIONS;
    if (kernel->abi != OPTFORGE_CUDA_TYPES || (o->beside != NULL && !optforge_cuda_alike(kernel, o->beside)))
        return OPTFORGE_ERROR_ABI;
    if (o->sizes == NULL ? o->beside != NULL : count > 0 && (o->number == NULL || o->part == NULL))
        return OPTFORGE_ERROR_NULL;
    if (o->beside != NULL && o->tensors != o->beside->tensors)
        return OPTFORGE_ERROR_NUMBER;
    optforge_cuda_plan w = optforge_cuda_empty(kernel, count, o->groups);
    if (o->beside != NULL) {
        w = *o->beside;
        w.kernel = kernel;
        w.stride = optforge_cuda_stride(kernel);
        w.count = count;
    }
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
        w.units += optforge_cuda_leaves(*(const size_t *)tensor);
    }
    for (size_t k = 0; k < w.tensors; k++) {
        const uint64_t n = w.parted ? o->sizes[k] : *(const size_t *)((const char *)tensors + k * w.stride);

        w.leaves += optforge_cuda_leaves(n);
        w.chunks += optforge_cuda_chunks(n);
    }
    if (w.beside && (w.leaves != o->beside->leaves || w.chunks != o->beside->chunks))
        return OPTFORGE_ERROR_PART;
    if (w.parted && kernel->stores &&
        optforge_cuda_check_neighbours(kernel, (const char *)tensors, count, o->number) != OPTFORGE_OK)
        return OPTFORGE_ERROR_PART;
    char *const space = (char *)o->workspace;
    if ((uintptr_t)space % 16 != 0 || (size_t)(optforge_cuda_place(&w, space) - space) > o->workspace_size)
        return OPTFORGE_ERROR_WORKSPACE;

    const uint64_t counters = (uint64_t)kernel->sums * (w.tensors + 1), word = sizeof(uint64_t);
    optforge_cuda_queue queue = {stream, optforge_cuda_check_stream(stream)};
    if (queue.status == OPTFORGE_OK)
        queue.status = optforge_cuda_load_kernels(kernel);
    if (!w.beside) {
        queue.bring(w.control, NULL, sizeof *w.control);
        queue.bring(w.arrived, NULL, counters * sizeof *w.arrived);
        queue.bring(w.behind, o->late, w.groups * word);
    }
    queue.bring(const_cast<char *>(w.list), tensors, count * w.stride);
    queue.bring(w.group, o->group, count * word);
    if (o->stream != NULL)
        queue.bring(w.stream, o->stream, count * word);
    else
        w.stream = w.number;
    if (w.parted) {
        queue.bring(w.number, o->number, count * word);
        queue.bring(w.part, o->part, count * word);
        queue.bring(w.sizes, o->sizes, w.tensors * word);
    }
    queue.launch((const void *)optforge_cuda_lay_tensors, &w, 1, 1);
    queue.launch((const void *)optforge_cuda_lay_units, &w, optforge_cuda_larger(count, w.tensors),
                 OPTFORGE_CUDA_WARPS);
    if (queue.status == OPTFORGE_OK)
        *plan = w;
    return queue.status;
}

OPTFORGE_CUDA_API int optforge_cuda_gradients(const optforge_cuda_plan *plan, const void *const *gradients,
                                              cudaStream_t stream) {
    if (plan == NULL || (gradients == NULL && plan->count > 0))
        return OPTFORGE_ERROR_NULL;
    for (uint64_t k = 0; k < plan->count; k++)
        if ((uintptr_t)gradients[k] % optforge_cuda_size_of(plan->kernel->formats[1]) != 0)
            return OPTFORGE_ERROR_ALIGNMENT;
    optforge_cuda_queue queue = {stream, optforge_cuda_check_stream(stream)};
    queue.bring(plan->gradients, gradients, plan->count * sizeof *gradients);
    return queue.status;
}

OPTFORGE_CUDA_API int optforge_cuda_state_init(const optforge_cuda_plan *plan, const void *hyper,
                                               cudaStream_t stream) {
    if (plan == NULL)
        return OPTFORGE_ERROR_NULL;
    static const optforge_initial as_p = {OPTFORGE_FROM_P, 0.0};
    const optforge_cuda_kernel *kernel = plan->kernel;
    optforge_cuda_queue queue = {stream, OPTFORGE_OK};
    optforge_cuda_beginning x;
    size_t end = kernel->arrays;

    x.plan = *plan;
    while (kernel->formats[end - 1] == OPTFORGE_ABSMAX) /* they begin with their codes */
        end--;
    for (size_t a = 2; a < end; a++)
        if (a != kernel->master && kernel->initial[a - 2].from >= 0 && hyper == NULL)
            return OPTFORGE_ERROR_NULL;
    x.scales = (int32_t)end;
    for (size_t a = 2; a < end; a++) {
        const optforge_initial *initial = a == kernel->master ? &as_p : &kernel->initial[a - 2];
        const uint64_t groups = initial->from >= 0 ? plan->groups : 1;

        x.a = (int32_t)a;
        x.from = initial->from;
        x.format = kernel->formats[a];
        x.format_of_from = kernel->formats[x.from == OPTFORGE_FROM_G];
        for (x.group = 0; x.group < groups; x.group++) {
            x.value = x.from >= 0 ? ((const double *)hyper)[x.group * kernel->hypers + (size_t)x.from]
                                  : initial->value;
            if (x.format == OPTFORGE_SCALAR)
                queue.launch((const void *)optforge_cuda_write_state, &x, plan->count, OPTFORGE_CUDA_THREADS);
            else
                queue.launch((const void *)optforge_cuda_write_state, &x, plan->units, OPTFORGE_CUDA_WARPS);
        }
        x.scales += optforge_cuda_blocks(x.format);
    }
    return queue.status;
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
static void optforge_cuda_tell_rows(optforge_cuda_queue *queue, optforge_cuda_news *news, const void *hyper,
                                    uint64_t t, size_t number, double unscale) {
    const optforge_cuda_plan *plan = &news->plan;
    const uint64_t width = plan->width, all = number * plan->groups, most = OPTFORGE_CUDA_NEWS / width;
    const int begins = news->begins;

    if (width > OPTFORGE_CUDA_NEWS)
        queue->status = OPTFORGE_ERROR_ABI;
    for (uint64_t k = 0; k < all && queue->status == OPTFORGE_OK; k++) /* first whether all have values */
        queue->status = optforge_cuda_row(plan, hyper, t, k, unscale, news->word);
    news->base = t - 1;
    news->first_row = t;
    news->rows = number;
    for (uint64_t k = 0; k < all && queue->status == OPTFORGE_OK; k += most) {
        const uint64_t own = all - k < most ? all - k : most;

        for (uint64_t r = 0; r < own; r++)
            (void)optforge_cuda_row(plan, hyper, t, k + r, unscale, news->word + r * width);
        news->at = k * width;
        news->words = own * width;
        news->told = k + own == all;
        news->begins = begins && news->told;
        queue->launch(plan->kernel->begin, news, 1, 1);
    }
}

/* What gradients are multiplied by. */
static double optforge_cuda_unscale(const optforge_cuda_options *o) {
    return o != NULL ? 1.0 / o->grad_scale : 1.0;
}

/* Whether scalars can be handed over in a stream now. */
static int optforge_cuda_check_step(const optforge_cuda_plan *plan, const void *hyper,
                                    const optforge_cuda_options *o, cudaStream_t stream) {
    if (plan == NULL || (hyper == NULL && plan->kernel->hypers > 0))
        return OPTFORGE_ERROR_NULL;
    if (o != NULL && o->size != sizeof *o)
        return OPTFORGE_ERROR_OPTIONS;
    const double unscale = optforge_cuda_unscale(o);
    if (!(unscale > 0.0 && unscale - unscale == 0.0))
        return OPTFORGE_ERROR_GRAD_SCALE;
    return optforge_cuda_check_stream(stream);
}

OPTFORGE_CUDA_API int optforge_cuda_rows(const optforge_cuda_plan *plan, const void *hyper, uint64_t t,
                                         size_t number, int set, const optforge_cuda_options *options,
                                         cudaStream_t stream) {
    optforge_cuda_queue queue = {stream, optforge_cuda_check_step(plan, hyper, options, stream)};
    optforge_cuda_news news;

    if (queue.status != OPTFORGE_OK)
        return queue.status;
    if (number == 0 || number > OPTFORGE_CUDA_ROWS)
        return OPTFORGE_ERROR_ROWS;
    news.plan = *plan;
    news.set = set != 0;
    news.begins = 0;
    optforge_cuda_tell_rows(&queue, &news, hyper, t, number, optforge_cuda_unscale(options));
    return queue.status;
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

/* Adds up what a phase left. */
static void optforge_cuda_add_up(optforge_cuda_queue *queue, optforge_cuda_plan w, int phase) {
    const optforge_cuda_phase *own = &w.kernel->phases[phase];
    const bool looks = own->scans && !w.observe; /* which adds up no squares */
    const int sums = w.observe || (w.skip_nonfinite && phase == 0) ? own->all : own->own;

    w.phase = phase;
    w.slot = own->first + looks;
    if (sums > 0)
        queue->launch(w.kernel->fold, &w, optforge_cuda_larger(w.chunks, 1), OPTFORGE_CUDA_WARPS,
                      (unsigned)(sums - looks));
}

/* Does phases of a step that has begun, and the last, which only finishes. */
static void optforge_cuda_go_on(optforge_cuda_queue *queue, const optforge_cuda_plan &w, int first,
                                int last) {
    const optforge_cuda_kernel *kernel = w.kernel;

    if (first == 0 && kernel->attempt != NULL)
        queue->launch(kernel->attempt, &w, w.count, OPTFORGE_CUDA_THREADS);
    for (int phase = first; phase < last; phase++) {
        if (phase > 0 && !w.beside)
            optforge_cuda_add_up(queue, w, phase - 1);
        if (phase < kernel->phase_count) {
            const optforge_cuda_phase *own = &kernel->phases[phase];
            const bool observed = w.observe || (w.skip_nonfinite && phase == 0 && !own->scans);

            if (!own->scans || w.skip_nonfinite)
                queue->launch(observed ? own->observed : own->plain, &w, w.units, OPTFORGE_CUDA_WARPS);
        } else if (w.observe || kernel->stores) {
            const uint64_t most = optforge_cuda_larger(w.count, w.tensors);

            queue->launch(kernel->finish, &w, optforge_cuda_larger(most, 1), OPTFORGE_CUDA_THREADS);
        }
    }
}

OPTFORGE_CUDA_API int optforge_cuda_phases(const optforge_cuda_plan *plan,
                                           const optforge_cuda_options *options, int first, int last,
                                           cudaStream_t stream) {
    optforge_cuda_queue queue = {stream, OPTFORGE_OK};
    optforge_cuda_news news;

    if (plan == NULL)
        return OPTFORGE_ERROR_NULL;
    if (options != NULL && options->size != sizeof *options)
        return OPTFORGE_ERROR_OPTIONS;
    const int end = plan->kernel->phase_count + 1;
    if (first < 0 || first >= end || last < first || last > end)
        return OPTFORGE_ERROR_ORDER;
    news.plan = optforge_cuda_asked(plan, options);
    news.words = 0;
    news.told = 0;
    news.begins = 1;
    if (first == 0 && !plan->beside)
        queue.launch(plan->kernel->begin, &news, 1, 1);
    optforge_cuda_go_on(&queue, news.plan, first, last);
    return queue.status;
}

OPTFORGE_CUDA_API int optforge_cuda_launch(const optforge_cuda_plan *plan,
                                           const optforge_cuda_options *options, cudaStream_t stream) {
    return optforge_cuda_phases(plan, options, 0, plan != NULL ? plan->kernel->phase_count + 1 : 0, stream);
}

OPTFORGE_CUDA_API int optforge_cuda_step(const void *hyper, uint64_t t, const optforge_cuda_plan *plan,
                                         const optforge_cuda_options *options, cudaStream_t stream) {
    optforge_cuda_queue queue = {stream, optforge_cuda_check_step(plan, hyper, options, stream)};
    optforge_cuda_news news;

    if (queue.status != OPTFORGE_OK)
        return queue.status;
    if (plan->beside)
        return OPTFORGE_ERROR_ORDER;
    news.plan = optforge_cuda_asked(plan, options);
    news.set = 1;
    news.begins = 1;
    optforge_cuda_tell_rows(&queue, &news, hyper, t, 1, optforge_cuda_unscale(options));
    optforge_cuda_go_on(&queue, news.plan, 0, plan->kernel->phase_count + 1);
    return queue.status;
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
        {OPTFORGE_ERROR_PART,
         "a part is not in its tensor, cuts a leaf, or does not follow another with its scalar state"},
        {OPTFORGE_ERROR_GROUP, "a tensor's group is none of the groups"},
        {OPTFORGE_ERROR_NUMBER, "a tensor's number is none of the tensors"},
        {OPTFORGE_ERROR_ABI, "a kernel is of another version of optforge, or asks for too much"},
        {OPTFORGE_ERROR_OPTIONS, "the options are of another version: use the function that fills them in"},
        {OPTFORGE_ERROR_FLUSH, "the kernels are compiled to flush subnormal numbers, which changes results"},
        {OPTFORGE_ERROR_ORDER, "the phases to be done are not among those of a step"},
        {OPTFORGE_ERROR_CUDA, "a CUDA call failed; cudaGetLastError tells which"},
        {OPTFORGE_ERROR_ROWS, "the device came to a step whose scalars it was not given"},
        {OPTFORGE_ERROR_CAPTURE, "the host hands something over, so a CUDA graph can capture launch alone"},
    };

    for (int k = 0; kernel != NULL && status >= OPTFORGE_ERROR_ASSERT && kernel->asserts[k] != NULL; k++)
        if (status == OPTFORGE_ERROR_ASSERT + k)
            return kernel->asserts[k];
    for (const auto &own : texts)
        if (own.status == status)
            return own.text;
    return "unknown status";
}
