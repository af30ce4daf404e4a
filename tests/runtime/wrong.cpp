/* Wrong calls of optforge.hpp, at random: otherwise valid ones that are spoiled in up to three places.
 *
 *     wrong NUMBER SEED
 *
 * A call that throws must not have changed the parameters, or the count of steps, and says why. Printed is how often
 * there was each status.
 */
#include "optforge_rules.hpp"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

static uint64_t seed;

static uint64_t draw(uint64_t below)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (seed >> 17) % below;
}

static double odd_real()
{
    static const double odd[] = {0.0, -0.0, 1.0, -1.0, 1e308, -1e308, 5e-324, 0.5, 2.0,
                                 std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()};

    return odd[draw(sizeof odd / sizeof *odd)];
}

enum { TENSORS = 3, ROOM = 1700 };

template <class Real> struct Memory {
    std::vector<Real> p[TENSORS], g[TENSORS], delta[TENSORS];

    Memory()
    {
        for (size_t k = 0; k < TENSORS; k++) {
            p[k].assign(ROOM, Real(0.5));
            g[k].assign(ROOM, Real(0.25));
            delta[k].assign(ROOM, Real(7));
        }
    }

    std::vector<optforge::Tensor<Real>> tensors()
    {
        static const size_t lengths[] = {0, 1, 33, 1024, 1025};
        std::vector<optforge::Tensor<Real>> made;

        for (size_t k = 0; k < TENSORS; k++) {
            const size_t n = lengths[draw(5)];
            optforge::Tensor<Real> own = {optforge::span<Real>(p[k].data(), n),
                                          optforge::span<const Real>(g[k].data(), n)};

            switch (draw(60)) {
            case 0: own.p = optforge::span<Real>(p[k].data(), n + 1); break;
            case 1: own.g = optforge::span<const Real>(g[k].data(), n + 7); break;
            case 2: own.p = optforge::span<Real>(); break;
            case 3: own.g = optforge::span<const Real>(static_cast<const Real *>(nullptr), n); break;
            case 4: own.g = optforge::span<const Real>(p[k].data(), n); break;
            case 5: own.g = optforge::span<const Real>(p[k].data() + n / 2, n); break;
            case 6: own.p = optforge::span<Real>(p[k].data(), SIZE_MAX / sizeof(Real)); break;
            case 7:
                own.p = optforge::span<Real>(p[k].data(), SIZE_MAX / 16);
                own.g = optforge::span<const Real>(g[k].data(), SIZE_MAX / 16);
                break;
            case 8: own.p = optforge::span<Real>(odd(p[k].data()), n); break;
            case 9: own.g = optforge::span<const Real>(odd(g[k].data()), n); break;
            default: break;
            }
            made.push_back(own);
        }
        return made;
    }

    /* An address between two elements. */
    static Real *odd(Real *place)
    {
        return reinterpret_cast<Real *>(reinterpret_cast<uintptr_t>(place) + 1 + draw(sizeof(Real) - 1));
    }

    bool is_as_it_was() const
    {
        for (size_t k = 0; k < TENSORS; k++)
            for (size_t i = 0; i < ROOM; i++)
                if (p[k][i] != Real(0.5) || g[k][i] != Real(0.25) || delta[k][i] != Real(7))
                    return false;
        return true;
    }
};

/* What is called goes wrong here, or not. */
static void call(Memory<float> &floats, Memory<double> &doubles, bool &stepped)
{
    optforge::span<const optforge_kernel *const> kernels = optforge::kernels();
    optforge_kernel first = *kernels[draw(kernels.size())], second = *kernels[draw(kernels.size())];
    optforge::Options options;
    double workspace[4];
    std::vector<double> large;

    options.skip_nonfinite = static_cast<int>(draw(2));
    options.zero_grads = static_cast<int>(draw(2));
    if (draw(30) == 0)
        first.abi = static_cast<unsigned>(draw(3));
    if (draw(100) == 0)
        first.pass_count = 99;
    while (first.formats[0] != OPTFORGE_F32 && draw(30) != 0)
        first = *kernels[draw(kernels.size())];
    while (second.formats[0] != OPTFORGE_F64 && draw(30) != 0)
        second = *kernels[draw(kernels.size())];
    optforge::BasicOptimizer<float> a(first, floats.tensors());
    optforge::BasicOptimizer<double> b(second, doubles.tensors());

    if (draw(10) == 0)
        a.set_t(draw(2) ? 0 : UINT64_MAX);
    if (draw(10) == 0)
        for (size_t k = 0; k < TENSORS; k++)
            a.set_delta(k, draw(12) == 0 ? nullptr : draw(12) == 0 ? floats.p[k].data() : floats.delta[k].data());
    if (a.kernel().hypers > 0 && draw(6) == 0)
        *a.find(a.kernel().hyper_names[draw(a.kernel().hypers)]) = odd_real();
    for (uint64_t times = draw(3); times > 0; times--)
        switch (draw(8)) {
        case 0: options.grad_scale = odd_real(); break;
        case 1: options.threads = draw(2) ? -1 : 1000000; break;
        case 2: options.size = static_cast<size_t>(draw(300)); break;
        case 3:
            options.workspace = workspace;
            options.workspace_size = static_cast<size_t>(draw(33));
            break;
        case 4: /* one byte short, or just enough */
            large.resize(40000);
            options.workspace = large.data();
            options.workspace_size = optforge_kernel_workspace(&a.kernel(), 3 * ROOM, TENSORS) - 1 + draw(2);
            break;
        case 5: options.workspace = reinterpret_cast<char *>(workspace) + 1; break;
        default: break;
        }
    stepped = true;
    if (draw(3) == 0) {
        optforge::Shares shares;

        if (draw(20) == 0)
            shares.fold(static_cast<int>(draw(3)) - 1);
        if (draw(2))
            shares.begin(options, a);
        else
            shares.begin(options, a, b);
        for (int phase = draw(20) == 0 ? 1 : 0; phase < shares.phases(); phase++) {
            shares.share(phase, 0, 2);
            shares.share(phase, draw(20) == 0 ? 2 : 1, 2);
            shares.fold(phase);
            stepped = false; /* what follows may fail behind a write: a phase twice */
        }
    } else if (draw(2)) {
        a.step(options);
    } else {
        optforge::step_together(options, a, b);
    }
}

int main(int count, char **words)
{
    const uint64_t number = count > 1 ? std::strtoull(words[1], nullptr, 10) : 1000;
    uint64_t statuses[200] = {0};
    Memory<float> floats;
    Memory<double> doubles;

    seed = count > 2 ? std::strtoull(words[2], nullptr, 10) : 1;
    for (uint64_t k = 0; k < number; k++) {
        bool stepped = true;
        int status = 0;

        try {
            call(floats, doubles, stepped);
        } catch (const optforge::Error &error) {
            status = error.status();
            if (status <= 0 || status >= 200 || *error.what() == '\0') {
                std::printf("call %lu: status %d: %s\n", static_cast<unsigned long>(k), status, error.what());
                return 1;
            }
            if (stepped && !(floats.is_as_it_was() && doubles.is_as_it_was())) {
                std::printf("call %lu: status %d, and something is written\n", static_cast<unsigned long>(k), status);
                return 1;
            }
        }
        statuses[status]++;
        if (status == 0 || !stepped) {
            floats = Memory<float>();
            doubles = Memory<double>();
        }
    }
    for (int status = 0; status < 200; status++)
        if (statuses[status] > 0)
            std::printf("%d %lu\n", status, static_cast<unsigned long>(statuses[status]));
    return 0;
}
