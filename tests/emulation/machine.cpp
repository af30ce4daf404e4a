// What machine.h declares: the fibers, orders, shared and device memory. Compiled once, and linked into every library.
#include "machine.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace emulation __attribute__((visibility("hidden"))) {

Launch now;
const Kernel *Kernel::first = nullptr;
void fail(const char *format, ...) {
    std::fflush(stdout);
    std::fputs("CUDA emulation: ", stderr);
    if (now.kernel)
        std::fprintf(stderr, "%s, block (%u, %u, %u), thread (%u, %u, %u): ", now.kernel->name, now.block.x,
                     now.block.y, now.block.z, now.thread.x, now.thread.y, now.thread.z);
    va_list values;
    va_start(values, format);
    std::vfprintf(stderr, format, values);
    va_end(values);
    std::fputc('\n', stderr);
    std::abort();
}

// ---- Orders

class Order {  // in which things are taken from a set
public:
    explicit Order(const char *variable) {
        const char *value = std::getenv(variable);
        if (!value || std::strcmp(value, "ascending") == 0) return;
        descending = std::strcmp(value, "descending") == 0;
        random = std::strncmp(value, "random:", 7) == 0;
        if (random) state = std::strtoull(value + 7, nullptr, 10);
        if (!descending && !random) fail("%s is %s: not ascending, descending or random:SEED", variable, value);
    }
    unsigned pick(std::uint32_t set) {  // a bit of a set that is not empty
        if (descending) return 31 - __builtin_clz(set);
        if (random)
            for (unsigned skip = below(__builtin_popcount(set)); skip > 0; skip--) set &= set - 1;
        return __builtin_ctz(set);
    }
    std::vector<std::uint64_t> arrange(std::uint64_t count) {
        std::vector<std::uint64_t> all(count);
        for (std::uint64_t i = 0; i < count; i++) all[i] = descending ? count - 1 - i : i;
        if (random)
            for (std::uint64_t i = count; i > 1; i--) std::swap(all[i - 1], all[below(i)]);
        return all;
    }

private:
    bool descending = false, random = false;
    std::uint64_t state = 0;
    std::uint64_t below(std::uint64_t bound) {  // splitmix64
        std::uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return (z ^ z >> 31) % bound;
    }
};

// ---- Fibers

constexpr std::size_t stack_size = 256 << 10;

#if defined(__x86_64__) && !defined(OPTFORGE_EMULATION_UCONTEXT)  // swapcontext makes a system call at every switch
using Context = void *;  // the stack pointer; whatever else a call preserves lies on the stack
extern "C" void emulation_switch(Context *from, Context to) __attribute__((visibility("hidden")));
asm(R"(
    .text
    .globl emulation_switch
    .hidden emulation_switch
    .type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
static void switch_context(Context &from, Context &to) { emulation_switch(&from, to); }
static void prepare(Context &context, char *top, void (*entry)()) {
    void **stack = reinterpret_cast<void **>(top) - 8;  // six registers, where to return to, and an end
    std::fill(stack, stack + 8, nullptr);
    stack[6] = reinterpret_cast<void *>(entry);
    context = stack;
}
#else
}  // namespace emulation
#include <ucontext.h>
namespace emulation __attribute__((visibility("hidden"))) {
using Context = ucontext_t;
static void switch_context(Context &from, Context &to) { swapcontext(&from, &to); }
static void prepare(Context &context, char *top, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = top - stack_size / 2;
    context.uc_stack.ss_size = stack_size / 2;
    makecontext(&context, entry, 0);
}
#endif

// ---- A block and its threads

struct Thread {
    Context context;
    uint3 index;
    struct {
        Operation operation;
        std::uint32_t mask;
        unsigned source;  // a lane
        std::uint64_t value;
    } request;  // while it waits in a warp operation
    std::uint64_t result;
};

struct Block {
    std::vector<Thread> threads{largest_block + 1};  // the last is whoever launched
    unsigned size, current;
    std::uint32_t ready_warps, ready[warp_size], in_warp[warp_size], running[warp_size];  // sets of warps, of lanes
    unsigned at_barrier, finished, votes, result;
    Order order{"OPTFORGE_EMULATION_THREADS"};
    void **arguments;
};
static Block *block;

static void make_ready(unsigned warp, std::uint32_t lanes) {
    block->ready[warp] |= lanes;
    block->ready_warps |= 1u << warp;
}

static void go_on() {  // with a thread that can run, or back to the launch where all have finished
    Block &b = *block;
    unsigned next = largest_block;
    if (b.ready_warps) {
        const unsigned warp = b.order.pick(b.ready_warps), lane = b.order.pick(b.ready[warp]);
        if (!(b.ready[warp] &= ~(1u << lane))) b.ready_warps &= ~(1u << warp);
        next = warp * warp_size + lane;
    } else if (b.finished < b.size) {
        const unsigned in_warp = b.size - b.finished - b.at_barrier;
        fail("no thread can go on: of %u threads, %u wait in __syncthreads, %u in a warp operation, %u have returned",
             b.size, b.at_barrier, in_warp, b.finished);
    }
    const unsigned last = std::exchange(b.current, next);
    now.thread = b.threads[next].index;
    if (next != last) switch_context(b.threads[last].context, b.threads[next].context);
}

static void run_thread() {
    for (;;) {  // once for each block
        now.kernel->call(*now.kernel, block->arguments);
        block->running[block->current / warp_size] &= ~(1u << block->current % warp_size);
        block->finished++;
        go_on();
    }
}

unsigned lane() { return block->current % warp_size; }

unsigned threads() { return block->size; }

unsigned barrier(bool vote) {
    Block &b = *block;
    b.votes += vote;
    if (++b.at_barrier == b.size) {
        b.result = std::exchange(b.votes, 0);
        b.at_barrier = 0;
        for (unsigned warp = 0; warp * warp_size < b.size; warp++) make_ready(warp, b.running[warp]);
    }
    go_on();
    return b.result;
}

std::uint64_t warp_operation(Operation operation, std::uint32_t mask, std::uint64_t value, unsigned source) {
    Block &b = *block;
    Thread &self = b.threads[b.current];
    const unsigned warp = b.current / warp_size, lane = b.current % warp_size;
    if (!(mask >> lane & 1))
        fail("the mask %08x of a warp operation does not name lane %u, which calls it", mask, lane);
    if (const std::uint32_t absent = mask & ~b.running[warp])
        fail("the mask %08x of a warp operation names lane %d, which has returned or is not in the block", mask,
             __builtin_ctz(absent));
    if (operation == Operation::shuffle && !(mask >> source & 1))
        fail("a shuffle reads lane %u, which its mask %08x does not name", source, mask);
    self.request = {operation, mask, source, value};
    b.in_warp[warp] |= 1u << lane;

    Thread *const lanes = &b.threads[warp * warp_size];
    std::uint32_t came = 0, ballot = 0;
    if ((b.in_warp[warp] & mask) == mask)
        for (std::uint32_t rest = mask; rest; rest &= rest - 1) {
            const unsigned i = __builtin_ctz(rest);
            came |= std::uint32_t(lanes[i].request.operation == operation && lanes[i].request.mask == mask) << i;
            ballot |= std::uint32_t(lanes[i].request.value != 0) << i;
        }
    if (came != mask) {  // the last one to come completes the operation
        go_on();
        return self.result;
    }
    for (std::uint32_t rest = mask; rest; rest &= rest - 1) {
        Thread &other = lanes[__builtin_ctz(rest)];
        other.result = operation == Operation::vote ? ballot : lanes[other.request.source].request.value;
    }
    b.in_warp[warp] &= ~mask;
    make_ready(warp, mask);
    go_on();
    return self.result;
}

struct Memory {
    char *start;
    std::size_t size;
};

static thread_local char shared_anchor;  // so that the library has thread-local variables in any case

static Memory shared_memory() {  // all __shared__ variables: the thread-local ones of this library and this thread
    volatile char *const anchor = &shared_anchor;
    *anchor = 0;  // makes them exist
    Memory found{const_cast<char *>(anchor), 1};
    const auto compare = [](dl_phdr_info *library, std::size_t, void *data) {
        Memory &found = *static_cast<Memory *>(data);
        char *const start = static_cast<char *>(library->dlpi_tls_data);
        for (int i = 0; start && i < library->dlpi_phnum; i++) {
            const std::size_t size = library->dlpi_phdr[i].p_memsz;
            if (library->dlpi_phdr[i].p_type != PT_TLS || found.start < start || found.start >= start + size) continue;
            found = {start, size};
            return 1;
        }
        return 0;
    };
    dl_iterate_phdr(compare, &found);
    return found;
}

// The threads' stacks, for as long as the library is loaded.
struct Stacks {
    char *start;

    Stacks() {
        void *all = mmap(nullptr, stack_size * largest_block, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (all == MAP_FAILED) fail("no memory for the threads' stacks");
        start = static_cast<char *>(all);
    }
    ~Stacks() { munmap(start, stack_size * largest_block); }

    // Guard pages would be mappings, of which a process has no more than some tens of thousands.
    static constexpr std::uint64_t canary = 0x5ca1ab1e0ddba11;
    std::uint64_t &end(unsigned thread) const { return *reinterpret_cast<std::uint64_t *>(start + thread * stack_size); }
};

static const Stacks &stacks() {
    static const Stacks all;
    return all;
}

static char *stack_top(unsigned thread) {  // a little apart from its neighbours in the cache
    return stacks().start + (thread + 1) * stack_size - thread % 64 * 192;
}

void launch(const Kernel &kernel, dim3 grid, dim3 size, void **arguments) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const std::uint64_t threads = std::uint64_t(size.x) * size.y * size.z;
    if (threads == 0 || threads > largest_block || size.z > 64)
        fail("%s: blocks of (%u, %u, %u) threads are impossible", kernel.name, size.x, size.y, size.z);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff)
        fail("%s: a grid of (%u, %u, %u) blocks is impossible", kernel.name, grid.x, grid.y, grid.z);

    Block b;
    block = &b;
    b.size = threads;
    b.arguments = arguments;
    for (unsigned i = 0; i < b.size; i++) {
        b.threads[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        prepare(b.threads[i].context, stack_top(i), run_thread);
        stacks().end(i) = Stacks::canary;
    }
    const Memory shared = shared_memory();
    now = {&kernel, {}, {}, size, grid};
    const std::uint64_t blocks = std::uint64_t(grid.x) * grid.y * grid.z;
    const char *const only_last = std::getenv("OPTFORGE_EMULATION_ONLY_LAST");
    const std::uint64_t left_out = only_last ? blocks - std::min<std::uint64_t>(blocks, std::atoi(only_last)) : 0;
    for (const std::uint64_t i : Order("OPTFORGE_EMULATION_BLOCKS").arrange(blocks)) {
        if (i < left_out) continue;
        std::memset(shared.start, poison, shared.size);
        now.block = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
        b.ready_warps = b.at_barrier = b.finished = b.votes = 0;
        for (unsigned warp = 0; warp * warp_size < b.size; warp++) {
            b.running[warp] = b.size - warp * warp_size >= warp_size ? ~0u : (1u << b.size % warp_size) - 1;
            b.ready[warp] = b.in_warp[warp] = 0;
            make_ready(warp, b.running[warp]);
        }
        b.current = largest_block;
        go_on();
    }
    for (unsigned i = 0; i < b.size; i++)
        if (stacks().end(i) != Stacks::canary) fail("%s: thread %u needs more stack than there is", kernel.name, i);
    now.kernel = nullptr;
}

// ---- Memory, and what the device claims

int multiprocessors() {
    const char *value = std::getenv("OPTFORGE_EMULATION_MULTIPROCESSORS");
    return value ? std::atoi(value) : 4;
}

int refused(const char *call) {
    const char *value = std::getenv("OPTFORGE_EMULATION_REFUSE");
    const std::size_t length = std::strlen(call);
    return value && std::strncmp(value, call, length) == 0 && value[length] == ':' ? std::atoi(value + length + 1) : 0;
}

constexpr std::size_t guard = 256;  // bytes on both sides of an allocation, the first of which tell its size

void *allocate(std::size_t size) {
    char *const all = static_cast<char *>(std::aligned_alloc(guard, (size + 3 * guard - 1) / guard * guard));
    if (!all) return nullptr;
    std::memset(all, poison, size + 2 * guard);
    std::memcpy(all, &size, sizeof size);
    return all + guard;
}

void release(void *pointer) {
    if (!pointer) return;
    char *const all = static_cast<char *>(pointer) - guard;
    std::size_t size;
    std::memcpy(&size, all, sizeof size);
    const auto untouched = [](char byte) { return byte == poison; };
    if (!std::all_of(all + sizeof size, all + guard, untouched) ||
        !std::all_of(all + guard + size, all + 2 * guard + size, untouched))
        fail("memory beside the allocation of %zu bytes at %p was overwritten, or it is no allocation", size, pointer);
    std::memset(all, poison, size + guard);  // for whoever reads it afterwards, whatever the compiler thinks of that
    asm volatile("" : : "r"(all) : "memory");
    std::free(all);
}

}  // namespace emulation

// What code compiled with -fsanitize=alignment calls where a plain access is misaligned.
extern "C" [[gnu::visibility("hidden")]] void __ubsan_handle_type_mismatch_v1_abort(
    const void *what, std::uintptr_t pointer) {
    struct { const char *file; std::uint32_t line, column; const char *type; unsigned char alignment; } where;
    std::memcpy(&where, what, sizeof where);
    emulation::fail("%s:%u: misaligned access: %#zx is no multiple of %u, as %s needs", where.file, where.line,
                    static_cast<std::size_t>(pointer), 1u << where.alignment, where.type + 4);
}

EMULATION_EXPORT const void *emulation_find(const char *name) {
    const emulation::Kernel *kernel = emulation::Kernel::first;
    while (kernel && std::strcmp(kernel->name, name) != 0) kernel = kernel->next;
    return kernel;
}

EMULATION_EXPORT void emulation_launch(const void *found, const unsigned grid[3], const unsigned block[3],
                                       void **arguments, const void *packed, std::size_t packed_size) {
    const emulation::Kernel &kernel = *static_cast<const emulation::Kernel *>(found);
    std::vector<std::max_align_t> copy((packed_size + sizeof(std::max_align_t)) / sizeof(std::max_align_t));
    std::vector<void *> pointers;
    if (!arguments) {
        if (packed_size != kernel.packed_size)
            emulation::fail("%s takes %zu bytes of arguments and is launched with %zu", kernel.name,
                            kernel.packed_size, packed_size);
        if (packed) std::memcpy(copy.data(), packed, packed_size);
        char *const start = reinterpret_cast<char *>(copy.data());
        for (std::size_t i = 0; i < kernel.count; i++) pointers.push_back(start + kernel.offsets[i]);
        arguments = pointers.data();
    }
    emulation::launch(kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, arguments);
}
