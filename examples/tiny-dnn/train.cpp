// tiny-dnn learns handwritten digits, with its own Adam or with an emitted kernel of the same formula as its optimizer.
//
//     train DIGITS own|optforge    trains; prints losses and a hash of all parameters
//     train DIGITS time            the time of an update with each, alternating, at 4,194,304 parameters
#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#define CNN_SINGLE_THREAD // gradients of a batch are added up in one order
#include <tiny_dnn/tiny_dnn.h>

// glue: begin
#include "tiny_adam.h"

struct optforge_adam : public tiny_dnn::stateful_optimizer<2> {
    tiny_adam_hyper h;
    float b1_t = 0.9f, b2_t = 0.999f; // multiplied up at each update, as the engine's are

    optforge_adam() { tiny_adam_hyper_init(&h), h.b1 = 0.9f, h.b2 = 0.999f; } // floats, as the engine's are
    void update(const tiny_dnn::vec_t &dW, tiny_dnn::vec_t &W, bool) override
    {
        const tiny_adam_tensor_f32 x = {W.size(), W.data(), dW.data(), get<0>(W).data(), get<1>(W).data()};
        h.b1_t = b1_t *= 0.9f, h.b2_t = b2_t *= 0.999f;
        if (const int status = tiny_adam_step_f32(&h, 1, &x, 1))
            throw tiny_dnn::nn_error(tiny_adam_strerror(status));
    }
};
// glue: end

using tiny_dnn::vec_t;

static void read_digits(const char *path, std::vector<vec_t> &images, std::vector<tiny_dnn::label_t> &labels)
{
    std::ifstream file(path);

    if (!file)
        throw std::runtime_error(std::string("cannot read ") + path);
    for (std::string line; std::getline(file, line);) {
        if (line[0] == '#' || line.size() < 65)
            continue;
        vec_t image;
        for (int k = 0; k < 64; k++)
            image.push_back(static_cast<float>(line[static_cast<std::size_t>(k)] - 'a') / 16.0f);
        images.push_back(image);
        labels.push_back(static_cast<tiny_dnn::label_t>(line[64] - '0'));
    }
}

// FNV-1a of the bits, each number's lowest byte first.
static std::uint64_t hash(std::uint64_t h, const vec_t &values)
{
    for (float value : values) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        for (int shift = 0; shift < 32; shift += 8)
            h = (h ^ (bits >> shift & 0xff)) * UINT64_C(0x100000001b3);
    }
    return h;
}

template <class Optimizer>
static void train(const char *path, Optimizer optimizer)
{
    std::vector<vec_t> images;
    std::vector<tiny_dnn::label_t> labels;
    tiny_dnn::network<tiny_dnn::sequential> net;
    int epoch = 0;

    read_digits(path, images, labels);
    net << tiny_dnn::convolutional_layer<tiny_dnn::activation::tan_h>(8, 8, 3, 1, 8)
        << tiny_dnn::fully_connected_layer<tiny_dnn::activation::tan_h>(6 * 6 * 8, 32)
        << tiny_dnn::fully_connected_layer<tiny_dnn::activation::softmax>(32, 10);
    tiny_dnn::set_random_seed(1);
    optimizer.reset();
    net.template train<tiny_dnn::cross_entropy_multiclass>(
        optimizer, images, labels, 20, 8, [] {},
        [&] {
            const float loss = net.template get_loss<tiny_dnn::cross_entropy_multiclass>(images, [&] {
                std::vector<vec_t> wanted;
                for (auto label : labels) {
                    wanted.emplace_back(10, 0.0f);
                    wanted.back()[label] = 1.0f;
                }
                return wanted;
            }());
            std::printf("epoch %d loss %.9g\n", ++epoch, static_cast<double>(loss));
        });
    std::uint64_t h = UINT64_C(0xcbf29ce484222325);
    for (std::size_t k = 0; k < net.depth(); k++)
        for (const vec_t *weights : net[k]->weights())
            h = hash(h, *weights);
    std::printf("right %d of %d\n", net.test(images, labels).num_success, static_cast<int>(images.size()));
    std::printf("parameters %016" PRIx64 "\n", h);
}

static double seconds()
{
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> values)
{
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

static void print_times()
{
    vec_t parameters(1u << 22), gradients(1u << 22);
    std::vector<double> own_times, times, ratios;
    tiny_dnn::adam own;
    optforge_adam ours;

    for (std::size_t i = 0; i < parameters.size(); i++) {
        parameters[i] = static_cast<float>(i % 1000) / 1000.0f;
        gradients[i] = static_cast<float>(i % 777) / 777.0f - 0.5f;
    }
    own.update(gradients, parameters, false), ours.update(gradients, parameters, false); // makes the state
    for (int k = 0; k < 15; k++) {
        const double begin = seconds();
        own.update(gradients, parameters, false);
        const double between = seconds();
        ours.update(gradients, parameters, false);
        own_times.push_back(between - begin), times.push_back(seconds() - between);
        ratios.push_back(times.back() / own_times.back());
    }
    std::printf("own %.3f ms, optforge %.3f ms, ratio %.2f (median of 15, alternating, %zu parameters)\n",
                1e3 * median(own_times), 1e3 * median(times), median(ratios), parameters.size());
}

int main(int argc, char **argv)
{
    const std::string how = argc == 3 ? argv[2] : "";

    try {
        if (how == "own")
            train(argv[1], tiny_dnn::adam());
        else if (how == "optforge")
            train(argv[1], optforge_adam());
        else if (how == "time")
            print_times();
        else
            return std::fprintf(stderr, "usage: %s DIGITS own|optforge|time\n", argv[0]), 2;
    } catch (const std::exception &problem) {
        return std::fprintf(stderr, "%s\n", problem.what()), 1;
    }
    return 0;
}
