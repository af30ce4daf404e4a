// Times replays of CUDA graphs that hold a step of emitted optimizers, so that small models show kernels and not the host.
//
// gpu.py compiles it together with the emitted step.cu (adamw, under the prefix step) and phase.cu (the same behind
// clip_by_global_norm, under the prefix phase):
//
//     replay ROUNDS FILE        FILE has the sizes of the tensors, in float32
//
// A line is a kind of step and its microseconds, a number for each round: events before and behind so many replays as the
// device can have scalars for. With OPTFORGE_NO_GRAPHS, for the emulation, steps are launched one by one and not timed.

#include "phase.cuh"
#include "step.cuh"

#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                          \
    do {                                                                                     \
        const int status = (int)(call);                                                      \
        if (status != 0) {                                                                   \
            std::fprintf(stderr, "%s: status %d, %s\n", #call, status,                       \
                         cudaGetErrorString(cudaGetLastError()));                            \
            return 1;                                                                        \
        }                                                                                    \
    } while (0)

enum { WARM = 4, REPLAYS = OPTFORGE_CUDA_ROWS - WARM, NOISE = 1 << 20, ALIGNED = 64 };

// Arrays of all tensors, each beginning at a multiple of 256 bytes, and what they are filled with.
struct Memory {
    std::vector<size_t> sizes, places;
    size_t elements = 0, room = 0;
    float *array[4];

    int fill() {
        std::vector<float> noise(NOISE);
        for (size_t n : sizes) {
            places.push_back(room);
            elements += n;
            room += (n + ALIGNED - 1) / ALIGNED * ALIGNED;
        }
        unsigned state = 1;
        for (float &x : noise)
            x = ((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.0f;
        for (int a = 0; a < 4; a++) {
            CHECK(cudaMalloc((void **)&array[a], (room + 1) * sizeof(float)));
            CHECK(cudaMemset(array[a], 0, room * sizeof(float)));
            for (size_t at = 0; a < 2 && at < room; at += NOISE) {
                const size_t own = room - at < NOISE ? room - at : NOISE;

                CHECK(cudaMemcpy(array[a] + at, noise.data(), own * sizeof(float), cudaMemcpyHostToDevice));
            }
        }
        return 0;
    }
};

// One kind of step: calls of a rule, and whether it looks for what is not finite, and for statistics.
template <class Plan, class Tensor, class Hyper>
static int replay(const char *name, const Memory &memory, const optforge_cuda_kernel *kernel,
                  void (*begin)(Hyper *), bool skips, bool tells, int rounds)
{
    std::vector<Tensor> tensors(memory.sizes.size());
    for (size_t k = 0; k < tensors.size(); k++) {
        const size_t at = memory.places[k];

        tensors[k] = {memory.sizes[k], memory.array[0] + at, memory.array[1] + at, memory.array[2] + at,
                      memory.array[3] + at};
    }
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    optforge_cuda_options options;
    optforge_cuda_options_init(&options);
    options.workspace_size = optforge_cuda_workspace_size(kernel, memory.elements, tensors.size(), 1);
    CHECK(cudaMalloc(&options.workspace, options.workspace_size));
    CHECK(cudaMalloc((void **)&options.stats, sizeof *options.stats));
    optforge_stats *const stats = options.stats;
    options.skip_nonfinite = skips;
    options.grad_scale = 4.0;
    if (!tells)
        options.stats = NULL;

    Plan plan;
    Hyper hyper;
    begin(&hyper);
    CHECK(optforge_cuda_plan_list(&plan, kernel, tensors.data(), tensors.size(), &options, stream));
    CHECK(optforge_cuda_state_init(&plan, &hyper, stream));
#ifndef OPTFORGE_NO_GRAPHS
    cudaGraph_t graph;
    cudaGraphExec_t captured;
    cudaEvent_t before, behind;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK(optforge_cuda_launch(&plan, &options, stream));
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiateWithFlags(&captured, graph, 0));
    CHECK(cudaEventCreate(&before));
    CHECK(cudaEventCreate(&behind));
#endif
    std::printf("%s", name);
    for (int round = 0; round < rounds; round++) {
        float milliseconds = 0.0f;

        CHECK(optforge_cuda_rows(&plan, &hyper, 1 + (uint64_t)round * OPTFORGE_CUDA_ROWS, OPTFORGE_CUDA_ROWS, 1,
                                 &options, stream));
        for (int k = 0; k < OPTFORGE_CUDA_ROWS; k++) {
#ifndef OPTFORGE_NO_GRAPHS
            if (k == WARM)
                CHECK(cudaEventRecord(before, stream));
            CHECK(cudaGraphLaunch(captured, stream));
#else
            CHECK(optforge_cuda_launch(&plan, &options, stream));
#endif
        }
#ifndef OPTFORGE_NO_GRAPHS
        CHECK(cudaEventRecord(behind, stream));
        CHECK(cudaEventSynchronize(behind));
        CHECK(cudaEventElapsedTime(&milliseconds, before, behind));
#endif
        std::printf(" %.3f", 1e3 * milliseconds / REPLAYS);
    }
    optforge_cuda_control control; // steps that were not done, or not all, would be the fastest
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(&control, plan.control, sizeof control, cudaMemcpyDeviceToHost));
    std::printf("\n");
    std::fflush(stdout);
    if (control.t != (uint64_t)rounds * OPTFORGE_CUDA_ROWS || control.idle || control.skipped) {
        std::fprintf(stderr, "%s: the device did not do its steps\n", name);
        return 1;
    }
    CHECK(cudaFree(options.workspace));
    CHECK(cudaFree(stats));
    return 0;
}

extern "C" int times(const char *file, int rounds)
{
    Memory memory;
    size_t n;
    std::FILE *from = std::fopen(file, "r");
    if (from == NULL)
        return 2;
    while (std::fscanf(from, "%zu", &n) == 1)
        memory.sizes.push_back(n);
    std::fclose(from);
    if (memory.fill())
        return 1;
    return replay<step_cuda_plan, step_cuda_tensor_f32>("step", memory, &step_cuda_kernel_f32, step_cuda_hyper_init,
                                                        false, false, rounds) ||
           replay<phase_cuda_plan, phase_cuda_tensor_f32>("phase", memory, &phase_cuda_kernel_f32,
                                                          phase_cuda_hyper_init, true, false, rounds) ||
           replay<phase_cuda_plan, phase_cuda_tensor_f32>("phase, statistics", memory, &phase_cuda_kernel_f32,
                                                          phase_cuda_hyper_init, true, true, rounds);
}

int main(int count, char **words) { return count == 3 ? times(words[2], std::atoi(words[1])) : 2; }
