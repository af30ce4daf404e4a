/* optforge.hpp: optimizers that own their state and workspace, for C++11 and later, over optforge.h.
 *
 *     #include "adamw.hpp"
 *
 *     std::vector<optforge::Tensor<float>> tensors = {{weights, gradients}};      // the memory is yours
 *     optforge::Optimizer<optforge::rules::adamw<float>> optimizer(tensors);
 *
 *     optimizer.hyper().lr = 3e-4;
 *     optimizer.step();
 *
 * A mistake is an optforge::Error, thrown before anything is written. Without exceptions (-fno-exceptions)
 * every call returns the same as an optforge::Result, and a constructor leaves it in `status()`.
 *
 * This file may be used, changed and distributed without restriction.
 */
#ifndef OPTFORGE_HPP
#define OPTFORGE_HPP

#include "optforge.h"

#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#if __cplusplus >= 202002L || (defined(_MSVC_LANG) && _MSVC_LANG >= 202002L)
#include <span>
#define OPTFORGE_STD_SPAN 1
#else
#define OPTFORGE_STD_SPAN 0
#endif

#ifndef OPTFORGE_EXCEPTIONS
#if defined(__cpp_exceptions) || defined(__EXCEPTIONS) || defined(_CPPUNWIND)
#define OPTFORGE_EXCEPTIONS 1
#else
#define OPTFORGE_EXCEPTIONS 0
#endif
#endif
#if OPTFORGE_EXCEPTIONS
#include <stdexcept>
#include <string>
#endif

namespace optforge {

/* Files that are compiled with exceptions and without may be in one program. */
#if OPTFORGE_EXCEPTIONS
inline namespace throwing {
#else
inline namespace returning {
#endif

/* ---- views of memory ----------------------------------------------------------------------------------- */

#if OPTFORGE_STD_SPAN
template <class T> using span = std::span<T>;
#else
/* What is needed of std::span. */
template <class T> class span {
public:
    span() noexcept : data_(nullptr), size_(0) {}
    span(T *data, size_t size) noexcept : data_(data), size_(size) {}
    template <size_t N> span(T (&array)[N]) noexcept : data_(array), size_(N) {}
    template <class Container, class = typename std::enable_if<std::is_convertible<
                  decltype(std::declval<Container &>().data()), T *>::value>::type>
    span(Container &container) noexcept : data_(container.data()), size_(container.size())
    {
    }
    template <class Container, class = typename std::enable_if<std::is_convertible<
                  decltype(std::declval<const Container &>().data()), T *>::value>::type>
    span(const Container &container) noexcept : data_(container.data()), size_(container.size())
    {
    }

    T *data() const noexcept { return data_; }
    size_t size() const noexcept { return size_; }
    bool empty() const noexcept { return size_ == 0; }
    T *begin() const noexcept { return data_; }
    T *end() const noexcept { return data_ + size_; }
    T &operator[](size_t i) const noexcept { return data_[i]; }

private:
    T *data_;
    size_t size_;
};
#endif

/* A parameter and its gradient, which have as many elements. */
template <class Real> struct Tensor {
    span<Real> p;
    span<const Real> g;
};

/* ---- outcomes ------------------------------------------------------------------------------------------ */

/* What a call ends with: a status of optforge.h. */
struct Result {
    int status;
    const char *text;

    bool applied() const noexcept { return status == OPTFORGE_OK; }
    bool skipped() const noexcept { return status == OPTFORGE_SKIPPED; }
    bool failed() const noexcept { return status > 0; }
    explicit operator bool() const noexcept { return !failed(); }
};

#if OPTFORGE_EXCEPTIONS
class Error : public std::runtime_error {
public:
    explicit Error(const Result &result) : std::runtime_error(result.text), status_(result.status) {}
    int status() const noexcept { return status_; }

private:
    int status_;
};
#endif

/* The result of a call, thrown if it is an error. */
inline Result checked(const Result &result)
{
#if OPTFORGE_EXCEPTIONS
    if (result.failed())
        throw Error(result);
#endif
    return result;
}

inline Result result_of(const optforge_kernel *kernel, int status) noexcept
{
    return Result{status, optforge_kernel_strerror(kernel, status)};
}

/* ---- options ------------------------------------------------------------------------------------------- */

typedef optforge_stats Stats;

/* How a step is done: optforge_options, whose fields may be set. A workspace is found where none is given. */
struct Options : optforge_options {
    Options() noexcept { optforge_options_init(this); }

    /* Steps run on your threads: for_each(shares, f) calls f(k) for k from 0 to shares - 1, in any order, at
     * the same time or not, and returns when all are done. It must live as long as the options. */
    template <class ForEach> Options &run_on(ForEach &for_each) noexcept
    {
        pool = &for_each;
        parallel = [](void *own, size_t shares, void (*run)(void *, size_t, size_t), void *work) {
            (*static_cast<ForEach *>(own))(shares, [=](size_t k) { run(work, k, shares); });
        };
        return *this;
    }
};

/* ---- optimizers ---------------------------------------------------------------------------------------- */

/* Memory that is not written to before it is used; nothing where there is none. */
class Memory {
public:
    double *get() const noexcept { return doubles_.get(); }
    size_t bytes() const noexcept { return size_ * sizeof(double); }

    bool grow(size_t size) noexcept
    {
        if (size <= bytes())
            return true;
        size_ = 0;
        doubles_.reset(); /* the old one first: there may be no room for both */
        if (size > SIZE_MAX / 2)
            return false;
        doubles_.reset(new (std::nothrow) double[(size + sizeof(double) - 1) / sizeof(double)]);
        if (doubles_)
            size_ = (size + sizeof(double) - 1) / sizeof(double);
        return doubles_ != nullptr;
    }

private:
    std::unique_ptr<double[]> doubles_;
    size_t size_ = 0;
};

class Shares;

/* What optimizers of all rules and types have in common. It can be moved, and not copied. */
class AnyOptimizer {
public:
    AnyOptimizer(AnyOptimizer &&) noexcept = default;
    AnyOptimizer &operator=(AnyOptimizer &&) noexcept = default;

    const optforge_kernel &kernel() const noexcept { return *kernel_; }
    size_t size() const noexcept { return count_.n; } /* tensors */

    /* What the constructor has to say; behind an error there are no tensors. */
    Result status() const noexcept
    {
        if (status_ == OPTFORGE_ERROR_SIZE)
            return Result{status_, "a parameter and its gradient have different numbers of elements"};
        if (status_ == OPTFORGE_ERROR_ABI && kernel_->abi == OPTFORGE_TYPES)
            return Result{status_, "the kernel is for parameters or gradients of another type"};
        return result_of(kernel_, status_);
    }

    /* How many steps were applied; to set it, as after state was loaded, makes the next step n + 1. */
    uint64_t t() const noexcept { return t_; }
    void set_t(uint64_t n) noexcept
    {
        t_ = n;
        started_ = n > 0;
    }

    /* A hyperparameter by its name; null where the rule has none of it. */
    double *find(const char *name) const noexcept
    {
        const size_t k = place(kernel_->hyper_names, name);

        return hyper_.get() != nullptr && kernel_->hyper_names[k] != nullptr ? hyper_.get() + k : nullptr;
    }

    /* Says that the tensors are parts of larger ones, others of which may be on other ranks: the element that
     * each begins at, and the number of the whole among all, whose sizes Options has. The arrays stay
     * yours. */
    void set_parts(const size_t *part, const size_t *number) noexcept
    {
        part_ = part;
        number_ = number;
    }

    /* Bytes of state. */
    size_t state_size() const noexcept
    {
        size_t bytes = 0;

        for (size_t k = 0; k < size(); k++)
            bytes += optforge_state_size(kernel_, elements(k));
        return bytes;
    }

    /* One step: applied, or skipped, which changes nothing. */
    Result step(const Options &options = Options())
    {
        AnyOptimizer *const one = this;

        return step_all(&one, 1, options);
    }

    /* One step of several optimizers, of any rules and types: one norm, one decision to skip. */
    static Result step_all(AnyOptimizer *const *all, size_t number, const Options &options);

protected:
    AnyOptimizer(const optforge_kernel &kernel, size_t count) noexcept : kernel_(&kernel), count_(count)
    {
        const size_t hypers = kernel.hypers > 0 ? kernel.hypers : 1;
        const size_t most = SIZE_MAX / 2 / (width() + 1);

        if (kernel.abi != OPTFORGE_TYPES)
            fail(OPTFORGE_ERROR_ABI);
        else if (count > most || !hyper_.grow(hypers * sizeof(double)) || !table_.grow(count * width() + 1) ||
                 !flags_.grow(count + 1))
            fail(OPTFORGE_ERROR_MEMORY);
        else if (kernel.hypers > 0)
            std::memcpy(hyper_.get(), kernel.hyper_defaults, kernel.hypers * sizeof(double));
    }

    /* Takes the arrays of tensor k. */
    void place_tensor(size_t k, size_t n, const void *p, size_t g_size, const void *g) noexcept
    {
        if (status_ != OPTFORGE_OK)
            return;
        uneven_ = uneven_ || n != g_size;
        std::memcpy(row(k), &n, sizeof n);
        set_array(k, 0, p);
        set_array(k, 1, g);
    }

    /* Lays out the state for arrays of this format, aligned to cache lines among itself, and not to pages. */
    Result place_state(unsigned char format) noexcept
    {
        size_t used = 0;

        if (status_ == OPTFORGE_OK && (kernel_->formats[0] != format || kernel_->formats[1] != format))
            fail(OPTFORGE_ERROR_ABI);
        for (int twice = 0; twice < 2 && status_ == OPTFORGE_OK; twice++, used = 0) {
            for (size_t k = 0; k < size(); k++)
                for (size_t a = 2; a < kernel_->arrays; a++) {
                    const bool scalar = kernel_->formats[a] == OPTFORGE_SCALAR;
                    const size_t each = kernel_->formats[a] == OPTFORGE_F32 ? sizeof(float) : sizeof(double);
                    const size_t n = scalar ? 1 : elements(k);

                    if (n > SIZE_MAX / 4 / sizeof(double) || used > SIZE_MAX / 4) {
                        fail(OPTFORGE_ERROR_MEMORY);
                        return status();
                    }
                    if (twice == 1)
                        set_array(k, a, reinterpret_cast<char *>(state_.get()) + used);
                    used += (n * each + 63) / 64 * 64 + (n * each >= 16384 ? 192 : 0);
                }
            if (twice == 0 && !state_.grow(used))
                fail(OPTFORGE_ERROR_MEMORY);
        }
        if (status_ == OPTFORGE_OK && uneven_)
            fail(OPTFORGE_ERROR_SIZE);
        return status();
    }

    size_t elements(size_t k) const noexcept
    {
        size_t n;

        std::memcpy(&n, row(k), sizeof n);
        return n;
    }

    void *array(size_t k, size_t a) const noexcept
    {
        void *found;

        std::memcpy(&found, row(k) + sizeof(size_t) + a * sizeof found, sizeof found);
        return found;
    }

    void set_array(size_t k, size_t a, const void *own) noexcept
    {
        std::memcpy(row(k) + sizeof(size_t) + a * sizeof own, &own, sizeof own);
        checked_ = false;
    }

    /* Sends what is added to p of tensor k to other memory; p then stays as it is. */
    Result place_delta(size_t k, void *own) noexcept
    {
        if (k >= size())
            return result_of(kernel_, OPTFORGE_ERROR_NUMBER);
        if (!delta_) {
            delta_.reset(new (std::nothrow) void *[count_.n]());
            if (!delta_)
                return result_of(kernel_, OPTFORGE_ERROR_MEMORY);
        }
        delta_[k] = own;
        checked_ = false;
        return result_of(kernel_, OPTFORGE_OK);
    }

    void fail(int status) noexcept
    {
        status_ = status;
        count_.n = 0;
    }

    /* Takes another array for tensor k. */
    Result change(size_t k, size_t a, const void *own) noexcept
    {
        if (k >= size())
            return result_of(kernel_, OPTFORGE_ERROR_NUMBER);
        set_array(k, a, own);
        return result_of(kernel_, OPTFORGE_OK);
    }

    /* The number of an array of state, of this kind; 0 where there is none. */
    size_t find_state(size_t k, const char *name, bool scalar) const noexcept
    {
        const size_t a = 2 + place(kernel_->state_names, name);
        const bool there = k < size() && a < kernel_->arrays;
        const unsigned char kind = scalar ? static_cast<unsigned char>(OPTFORGE_SCALAR) : kernel_->formats[0];

        return there && kernel_->formats[a] == kind ? a : 0;
    }

    /* The place of a name in a list that ends with null. */
    static size_t place(const char *const *names, const char *name) noexcept
    {
        size_t k = 0;

        while (names[k] != nullptr && (name == nullptr || std::strcmp(names[k], name) != 0))
            k++;
        return k;
    }

    double *hyper_memory() const noexcept { return hyper_.get(); }

private:
    friend class Shares;

    size_t width() const noexcept { return sizeof(size_t) + kernel_->arrays * sizeof(void *); }
    char *row(size_t k) const noexcept { return reinterpret_cast<char *>(table_.get()) + k * width(); }

    /* Whether array `a` of tensor k, p or g, can be read; where it cannot, the check of the step says so. */
    bool readable(size_t k, size_t a) const noexcept
    {
        const unsigned char format = kernel_->formats[a];
        const size_t size = format == OPTFORGE_F64 ? 8 : format == OPTFORGE_F32 ? 4 : 2;

        return array(k, a) != nullptr && reinterpret_cast<uintptr_t>(array(k, a)) % size == 0;
    }

    /* State begins with the first step that is applied, from p and g where the rule says so. */
    void begin_state() noexcept
    {
        for (size_t k = 0; k < size() && !started_; k++)
            if (elements(k) == 0 || (readable(k, 0) && readable(k, 1)))
                optforge_state_init(kernel_, row(k), hyper_.get());
    }

    optforge_list list() const noexcept
    {
        optforge_list own = optforge_list();

        own.kernel = kernel_;
        own.hyper = hyper_.get();
        own.t = t_ + 1;
        own.tensors = table_.get();
        own.count = size();
        own.starting = reinterpret_cast<unsigned char *>(flags_.get());
        own.delta = delta_.get();
        own.part = part_;
        own.number = number_;
        return own;
    }

    /* Fills in the lists of a step, and gives it memory. */
    static int prepare(AnyOptimizer *const *all, size_t number, optforge_list *lists,
                       optforge_options *options, Memory *workspace) noexcept
    {
        bool every = true;

        for (size_t i = 0; i < number; i++) {
            if (all[i] == nullptr)
                return OPTFORGE_ERROR_NULL;
            if (all[i]->status_ != OPTFORGE_OK)
                return all[i]->status_;
            if (all[i]->size() > 0)
                std::memset(all[i]->flags_.get(), !all[i]->started_, all[i]->size());
            all[i]->begin_state();
            lists[i] = all[i]->list();
            every = every && all[i]->checked_;
        }
        options->checked |= every;
        if (options->workspace == nullptr) {
            const size_t size = optforge_workspace_size(lists, number, options);

            if (size > 0 && !workspace->grow(size))
                return OPTFORGE_ERROR_MEMORY;
            options->workspace = workspace->get();
            options->workspace_size = workspace->bytes();
        }
        return OPTFORGE_OK;
    }

    /* Counts an applied step. */
    static void count(AnyOptimizer *const *all, size_t number) noexcept
    {
        for (size_t i = 0; i < number; i++) {
            all[i]->t_++;
            all[i]->started_ = all[i]->checked_ = true;
        }
    }

    /* The result of a step of all; an assert is of the first rule whose hyperparameters break one. */
    static Result result(AnyOptimizer *const *all, size_t number, int status,
                         const optforge_options &options) noexcept
    {
        size_t i = 0;

        for (size_t k = 0; k < number; k++)
            if (all[k] == nullptr)
                return result_of(nullptr, status);
            else if (all[k]->status_ != OPTFORGE_OK)
                return all[k]->status();
        while (status >= OPTFORGE_ERROR_ASSERT && i + 1 < number) {
            const optforge_list own = all[i]->list();

            if (optforge_check(&own, 1, &options) == status)
                break;
            i++;
        }
        return result_of(number > 0 ? all[i]->kernel_ : nullptr, status);
    }

    /* A number of tensors, which is 0 in what was moved from. */
    struct Count {
        size_t n;

        explicit Count(size_t number) noexcept : n(number) {}
        Count(Count &&other) noexcept : n(other.n) { other.n = 0; }
        Count &operator=(Count &&other) noexcept
        {
            std::swap(n, other.n);
            return *this;
        }
    };

    const optforge_kernel *kernel_;
    Count count_;
    int status_ = OPTFORGE_OK;
    bool uneven_ = false, started_ = false, checked_ = false;
    uint64_t t_ = 0;
    const size_t *part_ = nullptr, *number_ = nullptr;
    Memory table_, hyper_, flags_, state_, workspace_, lists_;
    std::unique_ptr<void *[]> delta_;
};

inline Result AnyOptimizer::step_all(AnyOptimizer *const *all, size_t number, const Options &options)
{
    optforge_options own = options;
    optforge_list one = optforge_list(), *lists = &one;
    int status = OPTFORGE_OK;

    if (number > 0 && (all == nullptr || all[0] == nullptr))
        return checked(result_of(nullptr, OPTFORGE_ERROR_NULL));
    if (number > 1) {
        if (!all[0]->lists_.grow(number * sizeof one))
            return checked(result_of(nullptr, OPTFORGE_ERROR_MEMORY));
        lists = reinterpret_cast<optforge_list *>(all[0]->lists_.get());
    }
    if (number > 0)
        status = prepare(all, number, lists, &own, &all[0]->workspace_);
    if (status == OPTFORGE_OK)
        status = optforge_step_lists(lists, number, &own);
    if (status == OPTFORGE_OK)
        count(all, number);
    return checked(result(all, number, status, own));
}

/* One step of several optimizers: step_together(options, matrices, biases). */
template <class... Optimizers> Result step_together(const Options &options, Optimizers &...optimizers)
{
    AnyOptimizer *const all[] = {&optimizers...};

    return AnyOptimizer::step_all(all, sizeof...(optimizers), options);
}

/* An optimizer over arrays of Real, float or double, whose rule is known when the program runs. */
template <class Real> class BasicOptimizer : public AnyOptimizer {
public:
    static_assert(std::is_same<Real, float>::value || std::is_same<Real, double>::value, "float or double");

    BasicOptimizer(const optforge_kernel &kernel, span<const Tensor<Real>> tensors)
        : AnyOptimizer(kernel, tensors.size())
    {
        const unsigned char format = sizeof(Real) == sizeof(float) ? OPTFORGE_F32 : OPTFORGE_F64;

        for (size_t k = 0; k < tensors.size(); k++)
            place_tensor(k, tensors[k].p.size(), tensors[k].p.data(), tensors[k].g.size(),
                         tensors[k].g.data());
        (void)checked(place_state(format));
    }

    span<Real> parameter(size_t k) const noexcept
    {
        return k < size() ? span<Real>(static_cast<Real *>(array(k, 0)), elements(k)) : span<Real>();
    }

    /* Other memory with the parameter, or the gradient, of tensor k. */
    Result set_parameter(size_t k, Real *p) { return checked(change(k, 0, p)); }
    Result set_gradient(size_t k, const Real *g) { return checked(change(k, 1, g)); }

    /* What a step adds to the parameter of tensor k goes to `delta`, and the parameter stays as it is. All
     * tensors of an optimizer need one. */
    Result set_delta(size_t k, Real *delta) { return checked(this->place_delta(k, delta)); }

    /* State of tensor k by its name, empty where the rule has none of it, or it is stored as another type. A
     * scalar is one double. */
    span<Real> state(size_t k, const char *name) const noexcept
    {
        const size_t a = find_state(k, name, false);

        return a > 0 ? span<Real>(static_cast<Real *>(array(k, a)), elements(k)) : span<Real>();
    }
    double *scalar_state(size_t k, const char *name) const noexcept
    {
        const size_t a = find_state(k, name, true);

        return a > 0 ? static_cast<double *>(array(k, a)) : nullptr;
    }
};

/* An optimizer of one rule: Optimizer<rules::adamw<float>>. */
template <class Rule> class Optimizer : public BasicOptimizer<typename Rule::real> {
public:
    typedef typename Rule::real real;
    typedef typename Rule::hyper_struct hyper_struct;

    explicit Optimizer(span<const Tensor<real>> tensors, const hyper_struct &hyper = typename Rule::hyper())
        : BasicOptimizer<real>(Rule::kernel(), tensors)
    {
        set_hyper(hyper);
    }

    /* The hyperparameters, which hold from the next step on. */
    hyper_struct &hyper() const noexcept { return *reinterpret_cast<hyper_struct *>(this->hyper_memory()); }
    void set_hyper(const hyper_struct &hyper) noexcept
    {
        if (this->hyper_memory() != nullptr)
            this->hyper() = hyper;
    }
};

/* ---- steps on threads that are running already --------------------------------------------------------- */

/* One thread calls begin; then for each phase all call share, each with its own `ith` of `nth`, and when all
 * are back one calls fold. The last fold ends the step. */
class Shares {
public:
    Shares() noexcept : work_(), number_(0) {}
    Shares(const Shares &) = delete;
    Shares &operator=(const Shares &) = delete;

    template <class... Optimizers> Result begin(const Options &options, Optimizers &...optimizers)
    {
        AnyOptimizer *const all[] = {&optimizers...};
        const size_t number = sizeof...(optimizers);
        int status = OPTFORGE_ERROR_MEMORY;

        options_ = options;
        number_ = 0;
        work_.begun = nullptr;
        if (lists_.grow(number * sizeof(optforge_list)) && optimizers_.grow(sizeof all)) {
            optforge_list *const lists = reinterpret_cast<optforge_list *>(lists_.get());

            std::memcpy(optimizers_.get(), all, sizeof all);
            number_ = number;
            status = AnyOptimizer::prepare(all, number, lists, &options_, &workspace_);
            if (status == OPTFORGE_OK)
                status = optforge_begin(&work_, lists, number, &options_);
        }
        return checked(AnyOptimizer::result(all, number, status, options_));
    }

    int phases() const noexcept { return work_.begun != nullptr ? work_.phases : 0; }
    void share(int phase, size_t ith, size_t nth) noexcept { optforge_share(&work_, phase, ith, nth); }

    Result fold(int phase)
    {
        AnyOptimizer *const *all = reinterpret_cast<AnyOptimizer *const *>(optimizers_.get());
        const int status = optforge_fold(&work_, phase);

        if (status == OPTFORGE_OK && work_.due == work_.phases)
            AnyOptimizer::count(all, number_);
        return checked(AnyOptimizer::result(all, number_, status, options_));
    }

    /* The sums of a phase, between share and fold, which ranks that have parts of tensors add up. */
    span<double> sums(int phase) const noexcept
    {
        size_t number;
        double *const first = optforge_partials(&work_, phase, &number);

        return span<double>(first, number);
    }

private:
    optforge_work work_;
    Options options_;
    Memory lists_, optimizers_, workspace_;
    size_t number_;
};

/* ---- rules by name ------------------------------------------------------------------------------------- */

/* The kernel of this name for arrays of Real; null where there is none. */
template <class Real>
const optforge_kernel *find_kernel(span<const optforge_kernel *const> kernels, const char *name)
{
    for (size_t k = 0; name != nullptr && k < kernels.size(); k++)
        if (std::strcmp(kernels[k]->name, name) == 0 &&
            kernels[k]->formats[0] == (sizeof(Real) == sizeof(float) ? OPTFORGE_F32 : OPTFORGE_F64))
            return kernels[k];
    return nullptr;
}

/* Whether this build computes the bits that it should, with each instruction set of this machine. */
template <class Rule> Result selftest()
{
    return checked(result_of(&Rule::kernel(), optforge_selftest(&Rule::kernel())));
}

} /* inline namespace */
} /* namespace optforge */

#endif /* OPTFORGE_HPP */
