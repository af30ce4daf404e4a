// Steps of an emitted optimizer (clip_by_global_norm:adam, under the prefix adam), captured in a CUDA graph and replayed.
//
// gpu_parts.py compiles it together with the emitted adam.cu, and compares what it writes with the kernels of another
// target. The first launch of all is captured: the capture fails if it waits for the device, loads a kernel, or does
// anything else that no graph can hold. A step, which brings scalars, is refused meanwhile. With OPTFORGE_NO_GRAPHS, for
// the emulation, steps are launched one by one.

#include "adam.cuh"

#include <cstdio>
#include <cstdlib>
#include <vector>

#define CUDA(call)                                                                       \
    do {                                                                                 \
        const cudaError_t error = (call);                                                \
        if (error != cudaSuccess) {                                                      \
            std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));          \
            return 1;                                                                    \
        }                                                                                \
    } while (0)
#define ADAM(call)                                                                       \
    do {                                                                                 \
        const int status = (call);                                                       \
        if (status != adam_cuda_OK) {                                                    \
            std::fprintf(stderr, "%s: %s\n", #call, adam_cuda_strerror(status));         \
            return 1;                                                                    \
        }                                                                                \
    } while (0)

// Reads parameters, then the gradients of each step, and writes parameters and both averages, then the last statistics.
extern "C" int replay(const char *input, const char *output, int steps, int count, const size_t *sizes)
{
    size_t elements = 0, where = 0;
    for (int k = 0; k < count; k++)
        elements += sizes[k];
    std::vector<float> given(elements * (1 + steps));
    std::FILE *file = std::fopen(input, "rb");
    if (file == NULL || std::fread(given.data(), sizeof(float), given.size(), file) != given.size())
        return 2;
    std::fclose(file);

    float *p, *g, *m, *v;
    adam_cuda_stats *stats;
    for (float **array : {&p, &g, &m, &v})
        CUDA(cudaMalloc((void **)array, elements * sizeof(float)));
    CUDA(cudaMalloc((void **)&stats, sizeof *stats));
    std::vector<adam_cuda_tensor_f32> tensors(count);
    for (int k = 0; k < count; where += sizes[k++])
        tensors[k] = {sizes[k], p + where, g + where, m + where, v + where};

    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    CUDA(cudaMemcpyAsync(p, given.data(), elements * sizeof(float), cudaMemcpyHostToDevice, stream));

    adam_cuda_options options;
    adam_cuda_options_init(&options);
    options.workspace_size = adam_cuda_workspace_size(elements, (size_t)count, 1);
    CUDA(cudaMalloc(&options.workspace, options.workspace_size));
    options.skip_nonfinite = 1;
    options.stats = stats;
    options.grad_scale = 4.0;

    adam_cuda_plan plan;
    adam_cuda_hyper hyper;
    adam_cuda_hyper_init(&hyper);
    hyper.max_norm = 1.5;
    ADAM(adam_cuda_plan_f32(&plan, tensors.data(), (size_t)count, &options, stream));
    ADAM(adam_cuda_state_init(&plan, &hyper, stream));
    // Enough rows for every step; one that is skipped leaves the last unused.
    ADAM(adam_cuda_rows(&plan, &hyper, 1, (size_t)steps, 1, &options, stream));

#ifndef OPTFORGE_NO_GRAPHS
    cudaGraph_t graph;
    cudaGraphExec_t captured;
    size_t nodes = 0;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    if (adam_cuda_step(&hyper, 1, &plan, &options, stream) != OPTFORGE_ERROR_CAPTURE) {
        std::fprintf(stderr, "a step is captured, and its scalars with it\n");
        return 1;
    }
    ADAM(adam_cuda_launch(&plan, &options, stream));
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphGetNodes(graph, NULL, &nodes));
    CUDA(cudaGraphInstantiateWithFlags(&captured, graph, 0));
    std::printf("a graph of %zu nodes, replayed\n", nodes);
#endif
    const float *grads = given.data();
    for (int t = 1; t <= steps; t++) {
        grads += elements;
        CUDA(cudaMemcpyAsync(g, grads, elements * sizeof(float), cudaMemcpyHostToDevice, stream));
#ifndef OPTFORGE_NO_GRAPHS
        CUDA(cudaGraphLaunch(captured, stream));
#else
        ADAM(adam_cuda_launch(&plan, &options, stream));
#endif
    }
    CUDA(cudaStreamSynchronize(stream));

    file = std::fopen(output, "wb");
    if (file == NULL)
        return 2;
    for (const float *array : {p, m, v}) {
        CUDA(cudaMemcpy(given.data(), array, elements * sizeof(float), cudaMemcpyDeviceToHost));
        std::fwrite(given.data(), sizeof(float), elements, file);
    }
    adam_cuda_stats told;
    CUDA(cudaMemcpy(&told, stats, sizeof told, cudaMemcpyDeviceToHost));
    std::fwrite(&told, sizeof told, 1, file);
    return std::fclose(file) == 0 ? 0 : 2;
}

int main(int count, char **words)
{
    std::vector<size_t> sizes;
    for (int k = 4; k < count; k++)
        sizes.push_back(std::strtoull(words[k], NULL, 10));
    return count > 4 ? replay(words[1], words[2], std::atoi(words[3]), (int)sizes.size(), sizes.data()) : 2;
}
