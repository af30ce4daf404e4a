// dlib learns handwritten digits, with its own Adam or with an emitted kernel of the same formula as its solver.
//
//     train DIGITS own|optforge|delta    trains; prints losses and a hash of all parameters
//     train DIGITS check                 trains with its own, and does each step with the other two as well
//     train DIGITS time                  the time of a step with each, alternating, at 4,194,304 parameters
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

#include <dlib/dnn.h>

#include "dlib_adam.h"
// glue: begin
#include "dlib_step.h"

// How many parameters of a layer are no biases, which have rates and decays of their own.
template <class Layer> std::size_t weights(const Layer &, std::size_t n) { return n; }
template <unsigned long N> std::size_t weights(const dlib::fc_<N, dlib::FC_HAS_BIAS> &, std::size_t n)
{
    return n - N;
}
template <long N, long R, long C, int Y, int X, int P, int Q>
std::size_t weights(const dlib::con_<N, R, C, Y, X, P, Q> &, std::size_t n)
{
    return n - std::size_t(N);
}

// Hyperparameters of the weights and of the biases, computed as the engine does, in float.
template <class Hyper, class Layer> void set_hypers(Hyper *h, float lr, const Layer &l, float t)
{
    for (int biases = 0; biases < 2; biases++, h++) {
        const double rate = lr * dlib::get_learning_rate_multiplier(l);
        const double decay = 0.0005f * dlib::get_weight_decay_multiplier(l);
        const float own = float(biases ? rate * dlib::get_bias_learning_rate_multiplier(l) : rate);
        h->alpha = own * std::sqrt(1 - std::pow(0.999f, t)) / (1 - std::pow(0.9f, t));
        h->weight_decay = biases ? decay * dlib::get_bias_weight_decay_multiplier(l) : decay;
        h->momentum1 = 0.9f, h->momentum2 = 0.999f, h->eps = 1e-8f;
    }
}

// A step over the weights and the biases of one layer.
inline void step_layer(const optforge_kernel &kernel, const void *hypers, const void *tensors, void *const *delta)
{
    const std::size_t groups[2] = {0, 1};
    double workspace[128];
    optforge_options options;
    optforge_list list = {};
    optforge_options_init(&options), options.workspace = workspace, options.workspace_size = sizeof workspace;
    list.kernel = &kernel, list.hyper = hypers, list.groups = 2, list.group = groups, list.t = 1;
    list.tensors = tensors, list.count = 2, list.delta = delta;
    if (const int status = optforge_step_lists(&list, 1, &options))
        throw dlib::error(optforge_kernel_strerror(&kernel, status));
}

struct optforge_adam {
    dlib::resizable_tensor m, v, s;
    float t = 0;

    template <class Layer> const dlib::tensor &operator()(float lr, const Layer &l, const dlib::tensor &grad)
    {
        const std::size_t n = grad.size(), k = weights(l, n);
        float *w = const_cast<float *>(l.get_layer_params().host()); // is only read
        const float *g = grad.host();
        if (v.size() == 0)
            m.copy_size(grad), m = 0, v.copy_size(grad), v = 0, s.copy_size(grad);
        dlib_step_hyper h[2];
        set_hypers(h, lr, l, ++t);
        const dlib_step_tensor_f32 x[2] = {{k, s.host(), g, m.host(), v.host(), w},
                                           {n - k, s.host() + k, g + k, m.host() + k, v.host() + k, w + k}};
        step_layer(dlib_step_kernel_f32, h, x, NULL);
        return s;
    }
    friend void serialize(const optforge_adam &x, std::ostream &out)
    {
        serialize(x.m, out), serialize(x.v, out), serialize(x.s, out), dlib::serialize(x.t, out);
    }
    friend void deserialize(optforge_adam &x, std::istream &in)
    {
        deserialize(x.m, in), deserialize(x.v, in), deserialize(x.s, in), dlib::deserialize(x.t, in);
    }
    friend std::ostream &operator<<(std::ostream &out, const optforge_adam &) { return out << "optforge_adam"; }
};
// glue: end

// The same with a rule that writes parameters: the kernel puts what it would add to them into the step. A parameter
// that the engine adds this to may differ from the rule's by an ulp.
struct optforge_delta : optforge_adam {
    template <class Layer> const dlib::tensor &operator()(float lr, const Layer &l, const dlib::tensor &grad)
    {
        const std::size_t n = grad.size(), k = weights(l, n);
        float *w = const_cast<float *>(l.get_layer_params().host()); // is only read
        const float *g = grad.host();
        if (v.size() == 0)
            m.copy_size(grad), m = 0, v.copy_size(grad), v = 0, s.copy_size(grad);
        dlib_adam_hyper h[2];
        set_hypers(h, lr, l, ++t);
        const dlib_adam_tensor_f32 x[2] = {{k, w, g, m.host(), v.host()},
                                           {n - k, w + k, g + k, m.host() + k, v.host() + k}};
        void *const steps[2] = {s.host(), s.host() + k};
        step_layer(dlib_adam_kernel_f32, h, x, steps);
        return s;
    }
};

// ---- what checks them

// How far steps are apart: `exact` counts those of the first kernel that differ in any bit; `most` is how far
// parameters behind a step by delta are apart at most, in units of 2^-24 of the larger one of parameter and step.
static struct { std::size_t steps, elements, exact; double most; } found;

static double apart(float a, float b, float scale)
{
    const double larger = std::max({std::fabs(double(a)), std::fabs(double(b)), std::fabs(double(scale))});

    return larger == 0 ? 0 : std::fabs(double(a) - double(b)) / larger * 16777216;
}

struct checked_adam {
    dlib::adam own;
    optforge_adam ours;
    optforge_delta delta;

    template <class Layer> const dlib::tensor &operator()(float lr, const Layer &l, const dlib::tensor &grad)
    {
        const float *w = l.get_layer_params().host(), *a = own(lr, l, grad).host(), *b = ours(lr, l, grad).host();
        const float *c = delta(lr, l, grad).host();

        found.steps++, found.elements += grad.size();
        for (std::size_t i = 0; i < grad.size(); i++) {
            found.exact += std::memcmp(&a[i], &b[i], sizeof(float)) != 0;
            found.most = std::max(found.most, apart(w[i] + a[i], w[i] + c[i], a[i]));
        }
        return ours.s;
    }
    friend void serialize(const checked_adam &, std::ostream &) {}
    friend void deserialize(checked_adam &, std::istream &) {}
    friend std::ostream &operator<<(std::ostream &out, const checked_adam &) { return out << "checked_adam"; }
};

using image = dlib::matrix<float>;
using network = dlib::loss_multiclass_log<
    dlib::fc<10, dlib::relu<dlib::fc<32, dlib::relu<dlib::con<8, 3, 3, 1, 1, dlib::input<image>>>>>>>;

static void read_digits(const char *path, std::vector<image> &images, std::vector<unsigned long> &labels)
{
    std::ifstream file(path);

    if (!file)
        throw std::runtime_error(std::string("cannot read ") + path);
    for (std::string line; std::getline(file, line);) {
        if (line[0] == '#' || line.size() < 65)
            continue;
        image own(8, 8);
        for (long k = 0; k < 64; k++)
            own(k / 8, k % 8) = float(line[std::size_t(k)] - 'a') / 16.0f;
        images.push_back(own);
        labels.push_back(static_cast<unsigned long>(line[64] - '0'));
    }
}

// FNV-1a of the bits, each number's lowest byte first.
struct hasher {
    std::uint64_t *h;

    void operator()(std::size_t, dlib::tensor &values) const
    {
        for (float value : values) {
            std::uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            for (int shift = 0; shift < 32; shift += 8)
                *h = (*h ^ (bits >> shift & 0xff)) * UINT64_C(0x100000001b3);
        }
    }
};

template <class Solver> static void train(const char *path)
{
    std::vector<image> images;
    std::vector<unsigned long> labels;
    network net;
    std::uint64_t h = UINT64_C(0xcbf29ce484222325);

    read_digits(path, images, labels);
    dlib::dnn_trainer<network, Solver> trainer(net, Solver());
    trainer.set_learning_rate(0.002);
    trainer.set_learning_rate_shrink_factor(1);
    for (int epoch = 1; epoch <= 8; epoch++) {
        for (std::size_t first = 0; first + 20 <= images.size(); first += 20)
            trainer.train_one_step(images.begin() + long(first), images.begin() + long(first) + 20,
                                   labels.begin() + long(first));
        std::printf("epoch %d loss %.9g\n", epoch, trainer.get_average_loss());
        trainer.clear_average_loss();
    }
    trainer.get_net();
    dlib::visit_layer_parameters(net, hasher{&h});
    std::size_t right = 0;
    const std::vector<unsigned long> answers = net(images);
    for (std::size_t k = 0; k < images.size(); k++)
        right += answers[k] == labels[k];
    std::printf("right %zu of %zu\n", right, images.size());
    std::printf("parameters %016" PRIx64 "\n", h);
}

// ---- times

struct flat_layer { // as much of a layer as a solver sees
    dlib::resizable_tensor params;

    const dlib::tensor &get_layer_params() const { return params; }
};

static double seconds()
{
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> values)
{
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

template <class Solver> static void print_times(const char *name)
{
    std::vector<double> own_times, times, ratios;
    dlib::resizable_tensor gradients(1, 1, 1, 1 << 22);
    flat_layer layer;
    dlib::adam own;
    Solver ours;

    layer.params.copy_size(gradients);
    for (std::size_t i = 0; i < gradients.size(); i++) {
        layer.params.host()[i] = float(i % 1000) / 1000.0f;
        gradients.host()[i] = float(i % 777) / 777.0f - 0.5f;
    }
    own(0.001f, layer, gradients), ours(0.001f, layer, gradients); // makes the state
    for (int k = 0; k < 15; k++) {
        const double begin = seconds();
        own(0.001f, layer, gradients);
        const double between = seconds();
        ours(0.001f, layer, gradients);
        own_times.push_back(between - begin), times.push_back(seconds() - between);
        ratios.push_back(times.back() / own_times.back());
    }
    std::printf("own %.3f ms, %s %.3f ms, ratio %.2f (median of 15, alternating, %zu parameters)\n",
                1e3 * median(own_times), name, 1e3 * median(times), median(ratios), gradients.size());
}

int main(int argc, char **argv)
{
    const std::string how = argc == 3 ? argv[2] : "";

    try {
        if (how == "own")
            train<dlib::adam>(argv[1]);
        else if (how == "optforge")
            train<optforge_adam>(argv[1]);
        else if (how == "delta")
            train<optforge_delta>(argv[1]);
        else if (how == "check") {
            train<checked_adam>(argv[1]);
            std::printf("steps %zu elements %zu differing %zu delta apart %.3f\n", found.steps, found.elements,
                        found.exact, found.most);
        } else if (how == "time")
            print_times<optforge_adam>("optforge"), print_times<optforge_delta>("optforge's delta");
        else
            return std::fprintf(stderr, "usage: %s DIGITS own|optforge|delta|check|time\n", argv[0]), 2;
    } catch (const std::exception &problem) {
        return std::fprintf(stderr, "%s\n", problem.what()), 1;
    }
    return 0;
}
