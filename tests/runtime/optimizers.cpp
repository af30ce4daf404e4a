/* Optimizers of optforge.hpp against the calls of C, in one program; each line that it prints is a failure. */
#include "optforge_rules.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <thread>
#include <vector>

using optforge::BasicOptimizer;
using optforge::Optimizer;
using optforge::Options;
using optforge::Result;
using optforge::Tensor;
namespace rules = optforge::rules;

static int failures;

#define EXPECT(condition)                                               \
    do {                                                                \
        if (!(condition)) {                                             \
            std::printf("line %d: %s\n", __LINE__, #condition);         \
            failures++;                                                 \
        }                                                               \
    } while (0)

/* That a call ends with an error, however errors are told. */
template <class Call> static void expect_error(int line, int status, const char *text, Call call)
{
    Result result = {0, ""};
#if OPTFORGE_EXCEPTIONS
    std::string told;

    try {
        call();
    } catch (const optforge::Error &error) {
        told = error.what();
        result.status = error.status();
        result.text = told.c_str();
    }
#else
    result = call();
#endif
    if (result.status != status || std::string(result.text).find(text) == std::string::npos) {
        std::printf("line %d: status %d, \"%s\"\n", line, result.status, result.text);
        failures++;
    }
}

template <class Real> struct Data {
    std::vector<std::vector<Real>> p, g;

    explicit Data(std::initializer_list<size_t> sizes)
    {
        unsigned x = 1;

        for (size_t n : sizes) {
            p.emplace_back(n);
            g.emplace_back(n);
            for (size_t i = 0; i < n; i++) {
                x = x * 1664525u + 1013904223u;
                p.back()[i] = static_cast<Real>(x >> 8) / 8388608 - 1;
                x = x * 1664525u + 1013904223u;
                g.back()[i] = static_cast<Real>(x >> 8) / 8388608 - 1;
            }
        }
    }

    std::vector<Tensor<Real>> tensors()
    {
        std::vector<Tensor<Real>> made;

        for (size_t k = 0; k < p.size(); k++)
            made.push_back({p[k], g[k]});
        return made;
    }
};

/* ---- one optimizer ---- */

template <class Real> struct C;
template <> struct C<float> {
    typedef adamw_tensor_f32 tensor;
    static void init(const tensor *own) { adamw_state_init_f32(own); }
    static int step(const adamw_hyper *h, uint64_t t, const tensor *own) { return adamw_step_f32(h, t, own, 2); }
};
template <> struct C<double> {
    typedef adamw_tensor_f64 tensor;
    static void init(const tensor *own) { adamw_state_init_f64(own); }
    static int step(const adamw_hyper *h, uint64_t t, const tensor *own) { return adamw_step_f64(h, t, own, 2); }
};

template <class Real> static void like_c()
{
    Data<Real> ours({5000, 33}), theirs({5000, 33});
    std::vector<Real> m0(5000), v0(5000), m1(33), v1(33);
    const typename C<Real>::tensor tensors[] = {{5000, theirs.p[0].data(), theirs.g[0].data(), m0.data(), v0.data()},
                                                {33, theirs.p[1].data(), theirs.g[1].data(), m1.data(), v1.data()}};
    adamw_hyper hyper;
    Optimizer<rules::adamw<Real>> optimizer(ours.tensors());

    adamw_hyper_init(&hyper);
    EXPECT(optimizer.hyper().beta2 == hyper.beta2);
    hyper.lr = optimizer.hyper().lr = 0.125;
    *optimizer.find("weight_decay") = hyper.weight_decay = 0.5;
    EXPECT(optimizer.find("nothing") == nullptr);
    for (const auto &own : tensors)
        C<Real>::init(&own);
    for (uint64_t t = 1; t <= 3; t++) {
        EXPECT(optimizer.step().applied() && optimizer.t() == t);
        EXPECT(C<Real>::step(&hyper, t, tensors) == OPTFORGE_OK);
    }
    EXPECT(ours.p == theirs.p);
    EXPECT(std::vector<Real>(optimizer.state(0, "m").begin(), optimizer.state(0, "m").end()) == m0);
    EXPECT(std::vector<Real>(optimizer.state(1, "v").begin(), optimizer.state(1, "v").end()) == v1);
    EXPECT(optimizer.state(0, "x").empty() && optimizer.scalar_state(0, "m") == nullptr);
    EXPECT(optimizer.state_size() == 2 * 5033 * sizeof(Real));
    EXPECT(optimizer.parameter(1).data() == ours.p[1].data() && optimizer.parameter(1).size() == 33);

    /* It goes on where its state is put into another one, and where it is moved to. */
    Data<Real> again({5000, 33});
    Optimizer<rules::adamw<Real>> resumed(again.tensors(), optimizer.hyper());
    again.p = ours.p;
    for (size_t k = 0; k < 2; k++)
        for (const char *name : {"m", "v"})
            for (size_t i = 0; i < again.p[k].size(); i++)
                resumed.state(k, name)[i] = optimizer.state(k, name)[i];
    resumed.set_t(3);
    resumed.step();
    Optimizer<rules::adamw<Real>> moved(std::move(optimizer));
    EXPECT(moved.step().applied() && moved.t() == 4);
    EXPECT(again.p == ours.p);
    EXPECT(optimizer.size() == 0 && optimizer.state_size() == 0); // NOLINT: what is moved from is empty
    moved = std::move(resumed);
    EXPECT(moved.step().applied() && moved.t() == 5 && again.p != ours.p);

    /* Gradients elsewhere. */
    std::vector<Real> other(ours.g[0].size(), 0);
    moved.set_gradient(0, other.data());
    moved.set_gradient(1, other.data());
    moved.hyper().weight_decay = 0;
    moved.hyper().lr = 0;
    const std::vector<std::vector<Real>> before = again.p;
    moved.step();
    EXPECT(again.p == before);
}

static void initial_state()
{
    /* State begins with the first step that is applied. */
    Data<float> data({40});
    Optimizer<rules::started<float>> optimizer(data.tensors());
    Options options;
    const float good = data.g[0][3];

    options.skip_nonfinite = 1;
    data.g[0][3] = std::numeric_limits<float>::infinity();
    EXPECT(optimizer.step(options).skipped() && optimizer.t() == 0);
    data.g[0][3] = good;
    EXPECT(optimizer.step(options).applied() && optimizer.t() == 1);
    EXPECT(optimizer.state(0, "first")[3] == good && optimizer.state(0, "first")[7] == data.g[0][7]);
    EXPECT(*optimizer.scalar_state(0, "s") == 1.5 && optimizer.scalar_state(0, "first") == nullptr);
    data.g[0][3] = 9;
    optimizer.step(options);
    EXPECT(optimizer.state(0, "first")[3] == good && *optimizer.scalar_state(0, "s") == 1.75);
}

/* ---- several ---- */

static void together()
{
    Data<float> a({3000}), b({3000});
    Data<double> c({70, 5}), d({70, 5});
    Options options;
    optforge::Stats stats, by_hand;
    Optimizer<rules::clipped<float>> first(a.tensors());
    BasicOptimizer<double> second(*optforge::find_kernel<double>(optforge::kernels(), "lamb"), c.tensors());

    options.skip_nonfinite = 1;
    options.stats = &stats;
    EXPECT(optforge::step_together(options, first, second).applied());
    EXPECT(first.t() == 1 && second.t() == 1);

    std::vector<float> m(3000);
    std::vector<double> m0(70), v0(70), m1(5), v1(5), workspace(20000);
    const clipped_tensor_f32 floats[] = {{3000, b.p[0].data(), b.g[0].data(), m.data()}};
    const lamb_tensor_f64 doubles[] = {{70, d.p[0].data(), d.g[0].data(), m0.data(), v0.data()},
                                       {5, d.p[1].data(), d.g[1].data(), m1.data(), v1.data()}};
    clipped_hyper clipped;
    lamb_hyper lamb;
    optforge_list lists[2] = {};

    clipped_hyper_init(&clipped);
    lamb_hyper_init(&lamb);
    lists[0].kernel = &clipped_kernel_f32;
    lists[0].hyper = &clipped;
    lists[0].tensors = floats;
    lists[1].kernel = &lamb_kernel_f64;
    lists[1].hyper = &lamb;
    lists[1].tensors = doubles;
    lists[0].t = lists[1].t = 1;
    lists[0].count = 1;
    lists[1].count = 2;
    options.stats = &by_hand;
    options.workspace = workspace.data();
    options.workspace_size = workspace.size() * sizeof(double);
    EXPECT(optforge_step_lists(lists, 2, &options) == OPTFORGE_OK);
    EXPECT(a.p == b.p && c.p == d.p && std::memcmp(&stats, &by_hand, sizeof stats) == 0);

    /* Nothing of any is changed where one gradient is infinite, or one rule's hyperparameters are wrong. */
    Options skipping;
    skipping.skip_nonfinite = 1;
    c.g[1][2] = -std::numeric_limits<double>::infinity();
    EXPECT(optforge::step_together(skipping, first, second).skipped());
    EXPECT(a.p == b.p && c.p == d.p && first.t() == 1 && second.t() == 1);
    c.g[1][2] = 0;
    *second.find("beta1") = 1.5;
    expect_error(__LINE__, OPTFORGE_ERROR_ASSERT, "0 <= beta1 < 1 and 0 <= beta2 < 1",
                 [&] { return optforge::step_together(skipping, first, second); });
    EXPECT(a.p == b.p && c.p == d.p && first.t() == 1);
    EXPECT(optforge::AnyOptimizer::step_all(nullptr, 0, Options()).applied());
}

static void by_name()
{
    EXPECT(optforge::find_kernel<float>(optforge::kernels(), "nothing") == nullptr);
    for (const optforge_kernel *kernel : optforge::kernels()) {
        const bool single = kernel->formats[0] == OPTFORGE_F32;

        EXPECT(kernel == (single ? optforge::find_kernel<float>(optforge::kernels(), kernel->name)
                                 : optforge::find_kernel<double>(optforge::kernels(), kernel->name)));
        EXPECT(optforge_selftest(kernel) == OPTFORGE_OK);
    }
    EXPECT(optforge::selftest<rules::adamw<float>>().applied());
}

/* ---- threads ---- */

struct Pool {
    size_t calls;

    template <class F> void operator()(size_t shares, F f)
    {
        std::vector<std::thread> threads;

        calls++;
        for (size_t k = 0; k < shares; k++)
            threads.emplace_back(f, k);
        for (std::thread &own : threads)
            own.join();
    }
};

static void threads()
{
    Data<float> a({100001, 77}), b({100001, 77}), c({100001, 77});
    Optimizer<rules::lamb<float>> plain(a.tensors()), pooled(b.tensors()), shared(c.tensors());
    Pool pool = {0};
    optforge::Shares shares;
    Options options, many;

    options.threads = 3;
    options.run_on(pool);
    for (int t = 0; t < 2; t++) {
        plain.step();
        pooled.step(options);
        shares.begin(many, shared);
        for (int phase = 0; phase < shares.phases(); phase++) {
            pool(4, [&](size_t k) { shares.share(phase, k, 4); });
            EXPECT(!shares.sums(phase).empty());
            EXPECT(shares.fold(phase).applied());
        }
    }
    EXPECT(pool.calls == 8 && a.p == b.p && a.p == c.p && shared.t() == 2);
    expect_error(__LINE__, OPTFORGE_ERROR_ORDER, "not the one that is due", [&] { return shares.fold(0); });
}

/* ---- ranks ---- */

static void ranks()
{
    static const size_t whole = 5000, part[] = {0, 2048}, number[] = {0, 0};
    Data<float> a({whole}), b({whole});
    Optimizer<rules::lamb<float>> one(a.tensors());
    const Tensor<float> halves[] = {
        {optforge::span<float>(b.p[0].data(), 2048), optforge::span<const float>(b.g[0].data(), 2048)},
        {optforge::span<float>(b.p[0].data() + 2048, 2952), optforge::span<const float>(b.g[0].data() + 2048, 2952)}};
    Optimizer<rules::lamb<float>> first(optforge::span<const Tensor<float>>(halves, 1));
    Optimizer<rules::lamb<float>> second(optforge::span<const Tensor<float>>(halves + 1, 1));
    Options options;
    optforge::Shares of_first, of_second;

    options.sizes = &whole;
    options.tensors = 1;
    first.set_parts(part, number);
    second.set_parts(part + 1, number);
    for (int t = 0; t < 3; t++) {
        one.step();
        of_first.begin(options, first);
        of_second.begin(options, second);
        for (int phase = 0; phase < of_first.phases(); phase++) {
            of_first.share(phase, 0, 1);
            of_second.share(phase, 0, 1);
            for (size_t k = 0; k < of_first.sums(phase).size(); k++) {
                const double sum = of_first.sums(phase)[k] + of_second.sums(phase)[k];

                of_first.sums(phase)[k] = of_second.sums(phase)[k] = sum;
            }
            EXPECT(of_first.fold(phase).applied() && of_second.fold(phase).applied());
        }
    }
    EXPECT(a.p == b.p);
    static const size_t inside[] = {100}; /* a leaf */
    first.set_parts(inside, number);
    expect_error(__LINE__, OPTFORGE_ERROR_PART, "inside a leaf", [&] { return of_first.begin(options, first); });
}

/* ---- what a step adds ---- */

static void deltas()
{
    Data<float> a({300, 3}), b({300, 3});
    std::vector<float> first(300), second(3);
    Optimizer<rules::adamw<float>> plain(a.tensors()), other(b.tensors());
    const std::vector<std::vector<float>> before = b.p;

    other.set_delta(0, first.data());
    expect_error(__LINE__, OPTFORGE_ERROR_NULL, "a pointer is NULL", [&] { return other.step(); });
    other.set_delta(1, second.data());
    plain.step();
    EXPECT(other.step().applied() && b.p == before);
    for (size_t i = 0; i < 300; i++)
        EXPECT(first[i] == a.p[0][i] - before[0][i]);
}

/* ---- mistakes ---- */

static void mistakes()
{
    Data<float> data({40, 3});
    std::vector<Tensor<float>> tensors = data.tensors(), uneven = tensors, overlapping = tensors, nothing = tensors;
    std::vector<std::vector<float>> before = data.p;
    Options scale, old, no_threads, little;
    double small[1];

    uneven[1].g = optforge::span<const float>(data.g[1].data(), 2);
    overlapping[1].p = optforge::span<float>(data.p[0].data(), 3);
    overlapping[1].g = optforge::span<const float>(data.p[0].data() + 1, 3);
    nothing[0].p = optforge::span<float>(static_cast<float *>(nullptr), 40);
    expect_error(__LINE__, OPTFORGE_ERROR_SIZE, "different numbers of elements", [&] {
        Optimizer<rules::adamw<float>> own(uneven);
        return own.status();
    });
    expect_error(__LINE__, OPTFORGE_ERROR_SIZE, "different numbers of elements", [&] {
        Optimizer<rules::adamw<float>> own(uneven);
        return own.step();
    });
    expect_error(__LINE__, OPTFORGE_ERROR_OVERLAP, "overlap", [&] {
        return Optimizer<rules::started<float>>(overlapping).step();
    });
    expect_error(__LINE__, OPTFORGE_ERROR_NULL, "NULL", [&] {
        return Optimizer<rules::started<float>>(nothing).step();
    });
    expect_error(__LINE__, OPTFORGE_ERROR_ABI, "another type", [&] {
        BasicOptimizer<float> own(adamw_kernel_f64, tensors);
        EXPECT(own.size() == 0 && own.state(0, "m").empty() && own.state_size() == 0);
        return own.status();
    });
    const unsigned char narrow[] = {OPTFORGE_F32, OPTFORGE_F32, OPTFORGE_BF16, OPTFORGE_F32};
    optforge_kernel mixed = adamw_kernel_f32;
    mixed.formats = narrow;
    const BasicOptimizer<float> stored(mixed, tensors);
    EXPECT(stored.size() > 0 && stored.state(0, "m").empty() && !stored.state(0, "v").empty());
    const unsigned char half[] = {OPTFORGE_F32, OPTFORGE_BF16, OPTFORGE_F32, OPTFORGE_F32};
    mixed.formats = half;
    expect_error(__LINE__, OPTFORGE_ERROR_ABI, "another type", [&] {
        BasicOptimizer<float> own(mixed, tensors);
        return own.status();
    });
    optforge_kernel future = adamw_kernel_f32;
    future.abi++;
    expect_error(__LINE__, OPTFORGE_ERROR_ABI, "another version", [&] {
        BasicOptimizer<float> own(future, tensors);
        return own.status();
    });
    const Tensor<float> huge = {optforge::span<float>(data.p[0].data(), SIZE_MAX / 4),
                                optforge::span<const float>(data.g[0].data(), SIZE_MAX / 4)};
    expect_error(__LINE__, OPTFORGE_ERROR_MEMORY, "no memory", [&] {
        BasicOptimizer<float> own(adamw_kernel_f32, optforge::span<const Tensor<float>>(&huge, 1));
        return own.status();
    });

    Optimizer<rules::lamb<float>> optimizer(tensors);
    scale.grad_scale = 0;
    old.size = 8;
    no_threads.threads = -1;
    little.workspace = small;
    little.workspace_size = sizeof small;
    expect_error(__LINE__, OPTFORGE_ERROR_GRAD_SCALE, "grad_scale", [&] { return optimizer.step(scale); });
    expect_error(__LINE__, OPTFORGE_ERROR_OPTIONS, "version", [&] { return optimizer.step(old); });
    expect_error(__LINE__, OPTFORGE_ERROR_THREADS, "negative", [&] { return optimizer.step(no_threads); });
    expect_error(__LINE__, OPTFORGE_ERROR_WORKSPACE, "too small", [&] { return optimizer.step(little); });
    optimizer.hyper().eps = std::nan("");
    expect_error(__LINE__, OPTFORGE_ERROR_NAN, "NaN", [&] { return optimizer.step(); });
    optimizer.hyper().eps = -1;
    expect_error(__LINE__, OPTFORGE_ERROR_ASSERT, "eps >= 0", [&] { return optimizer.step(); });
    EXPECT(data.p == before && optimizer.t() == 0);
    optimizer.hyper().eps = 1e-6;
    EXPECT(optimizer.step().applied() && data.p != before);

    /* Tensors and names that are not there. */
    float *const null = nullptr;
    optforge::AnyOptimizer *const none[] = {&optimizer, nullptr};
    expect_error(__LINE__, OPTFORGE_ERROR_NUMBER, "number", [&] { return optimizer.set_gradient(2, null); });
    expect_error(__LINE__, OPTFORGE_ERROR_NUMBER, "number", [&] { return optimizer.set_parameter(2, null); });
    expect_error(__LINE__, OPTFORGE_ERROR_NUMBER, "number", [&] { return optimizer.set_delta(SIZE_MAX, null); });
    expect_error(__LINE__, OPTFORGE_ERROR_NULL, "NULL",
                 [&] { return optforge::AnyOptimizer::step_all(none, 2, Options()); });
    expect_error(__LINE__, OPTFORGE_ERROR_NULL, "NULL",
                 [&] { return optforge::AnyOptimizer::step_all(none + 1, 1, Options()); });
    EXPECT(optimizer.parameter(2).empty() && optimizer.state(2, "m").empty() && optimizer.state(0, nullptr).empty());
    EXPECT(optimizer.find(nullptr) == nullptr && optimizer.scalar_state(0, nullptr) == nullptr);
    EXPECT(optforge::find_kernel<float>(optforge::kernels(), nullptr) == nullptr);

    /* None at all. */
    Optimizer<rules::adamw<float>> empty((optforge::span<const Tensor<float>>()));
    EXPECT(empty.step().applied() && empty.t() == 1);
    Optimizer<rules::plain<float>> bare(tensors);
    EXPECT(bare.step().applied());
}

int main()
{
    like_c<float>();
    like_c<double>();
    initial_state();
    together();
    by_name();
    threads();
    ranks();
    deltas();
    mistakes();
    if (failures == 0)
        std::printf("good\n");
    return failures != 0;
}
