// The machine of the emulation, as kernels and the driver see it; machine.cpp has what it is made of.
//
// All of it belongs to the shared library that it is compiled into, whatever else the process has loaded: hence hidden.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "vector_types.h"

namespace emulation __attribute__((visibility("hidden"))) {

constexpr unsigned warp_size = 32, largest_block = 1024;
constexpr int poison = 0x7f;  // in each byte: an enormous float, double or integer

struct Kernel;
struct Launch {
    const Kernel *kernel = nullptr;  // null: nothing is running
    uint3 thread{}, block{};
    dim3 block_size, grid_size;
};
extern Launch now;

[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// ---- Kernels

struct Kernel {
    const char *name;
    const void *address;
    const std::size_t *offsets;  // of the arguments where they lie packed as in a struct
    std::size_t count, packed_size;
    void (*call)(const Kernel &kernel, void **arguments);
    const Kernel *next;
    static const Kernel *first;

    template <class... Arguments>
    Kernel(const char *name, void (*function)(Arguments...))
        : name(name), address(reinterpret_cast<const void *>(function)), count(sizeof...(Arguments)), next(first) {
        static const Packed<Arguments...> packed;
        offsets = packed.offsets;
        packed_size = packed.size;
        call = [](const Kernel &kernel, void **arguments) {
            unpack<Arguments...>(kernel.address, arguments, std::index_sequence_for<Arguments...>{});
        };
        first = this;
    }

private:
    template <class... Arguments>
    struct Packed {
        std::size_t offsets[sizeof...(Arguments) + 1], size = 0;
        Packed() {
            std::size_t i = 0;
            (place(offsets[i++], sizeof(Arguments), alignof(Arguments)), ...);
        }
        void place(std::size_t &offset, std::size_t own, std::size_t alignment) {
            offset = (size + alignment - 1) / alignment * alignment;
            size = offset + own;
        }
    };
    template <class... Arguments, std::size_t... i>
    static void unpack(const void *function, [[maybe_unused]] void **arguments, std::index_sequence<i...>) {
        reinterpret_cast<void (*)(Arguments...)>(function)(*static_cast<Arguments *>(arguments[i])...);
    }
};

void launch(const Kernel &kernel, dim3 grid, dim3 size, void **arguments);

// ---- What a thread calls

enum class Operation { shuffle, vote, join };

unsigned lane();
unsigned threads();  // of the block
unsigned barrier(bool vote = false);  // the number of threads that voted so
std::uint64_t warp_operation(Operation operation, std::uint32_t mask, std::uint64_t value = 0, unsigned source = 0);

// ---- Memory, and what the device claims

void *allocate(std::size_t size);
void release(void *pointer);
int multiprocessors();
int refused(const char *call);  // the error that a call of the driver or the runtime is told to answer

template <class T>
T &aligned(T *pointer) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % alignof(T))
        fail("misaligned access: %p is no multiple of %zu", static_cast<const void *>(pointer), alignof(T));
    return *pointer;
}

}  // namespace emulation

// What the emulated driver calls in a library that it loaded as a module.
#define EMULATION_EXPORT extern "C" [[gnu::visibility("default")]]

EMULATION_EXPORT const void *emulation_find(const char *name);
EMULATION_EXPORT void emulation_launch(const void *found, const unsigned grid[3], const unsigned block[3],
                                       void **arguments, const void *packed, std::size_t packed_size);
