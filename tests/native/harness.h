// What the self-test's checks share: memory with guards, the instruction sets, comparison, failures with coordinates.
#ifndef BITLAB_TESTS_HARNESS_H
#define BITLAB_TESTS_HARNESS_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "bitkernels.h"
#include "reference.h"

namespace harness {

// Element types of outputs besides bk_type.
constexpr int32_t kI8 = 16, kI32 = 17;
constexpr int64_t kGuard = 64;
constexpr unsigned char kPoison = 0xA5;
#ifdef _OPENMP
constexpr int32_t kMostThreads = 2;
#else
constexpr int32_t kMostThreads = 1;
#endif

struct Isa {
    char name[32];
    long long calls, values, failures;
};

struct Output {
    unsigned char *data;
    int64_t size, offset;  // offset: bytes past a multiple of 64
};

inline Isa isas[8];
inline int isa_count = 0;
inline Isa *isa = nullptr;
inline int32_t threads = 1;
inline char what[160] = "";

// An input ends where the memory does: its fence's last page, as large as pages come, is not to be touched.
constexpr int64_t kPage = 1 << 16;
struct alignas(kPage) Fence {
    unsigned char memory[1 << 20];
    unsigned char beyond[kPage];
};
inline Fence fences[6];
inline int fence_count = 0;

alignas(64) inline unsigned char arena[24 << 20];
inline int64_t arena_used = 0;
inline Output outputs[4];
inline int output_count = 0;

// Starts a case: its name for failures, and empty memory.
inline void begin(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof(what), format, arguments);
    va_end(arguments);
    arena_used = 0;
    fence_count = 0;
    output_count = 0;
}

inline bool raise_fences() {
    bool raised = true;
    for (Fence &fence : fences) raised = raised && mprotect(fence.beyond, sizeof(fence.beyond), PROT_NONE) == 0;
    return raised;
}

inline void fail(const char *text, int64_t row, int64_t column, uint32_t got, uint32_t want) {
    if (++isa->failures > 10) return;
    printf("FAIL %s, %d threads, %s: %s at [%lld, %lld]: got %08x, want %08x\n", isa->name, threads, what, text,
           static_cast<long long>(row), static_cast<long long>(column), got, want);
}

// Memory of the test's own.
template <typename T>
T *array(int64_t count) {
    unsigned char *start = arena + arena_used;
    arena_used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    if (arena_used > static_cast<int64_t>(sizeof(arena))) __builtin_trap();
    return reinterpret_cast<T *>(start);
}

// Memory for an input of the kernels: a fence behind it, and no alignment but its elements'.
template <typename T>
T *input(int64_t count) {
    Fence &fence = fences[fence_count++];
    const int64_t size = count * static_cast<int64_t>(sizeof(T));
    if (size > static_cast<int64_t>(sizeof(fence.memory))) __builtin_trap();
    return reinterpret_cast<T *>(fence.beyond - size);
}

// Memory for an output, with guards around it, `offset` bytes past a multiple of 64.
inline unsigned char *output(int64_t size, int64_t offset) {
    auto *start = array<unsigned char>(size + offset + 2 * kGuard);
    outputs[output_count++] = {start + kGuard + offset, size, offset};
    return start + kGuard + offset;
}
inline void *workspace(int64_t M, int64_t K, int64_t scale_columns, int32_t planes) {
    return output(bk_cpu_linear_workspace(M, K, scale_columns, planes, kMostThreads), 0);
}

inline void poison() {
    for (int i = 0; i < output_count; ++i) {
        const Output &y = outputs[i];
        memset(y.data - y.offset - kGuard, kPoison, static_cast<size_t>(y.size + y.offset + 2 * kGuard));
    }
}
inline void check_guards() {
    for (int i = 0; i < output_count; ++i) {
        const Output &y = outputs[i];
        for (int64_t at = -kGuard - y.offset; at < 0; ++at) {
            if (y.data[at] != kPoison) fail("written before the output", i, at, y.data[at], kPoison);
        }
        for (int64_t at = y.size; at < y.size + kGuard; ++at) {
            if (y.data[at] != kPoison) fail("written past the output", i, at, y.data[at], kPoison);
        }
    }
}

// Calls call(), which returns a status, on every instruction set and number of threads, then check().
template <typename Call, typename Check>
void on_every_isa(Call call, Check check) {
    for (int i = 0; i < isa_count; ++i) {
        isa = &isas[i];
        if (bk_cpu_select_isa(isa->name) != BK_OK || strcmp(bk_cpu_isa(), isa->name) != 0) {
            fail("not selected", 0, 0, 0, 0);
        }
        for (threads = 1; threads <= kMostThreads; ++threads) {
            poison();
            const int32_t status = call();
            ++isa->calls;
            if (status != BK_OK) fail("status", 0, 0, static_cast<uint32_t>(status), BK_OK);
            check_guards();
            check();
        }
    }
}

inline int64_t size_of(int32_t type) { return type == kI8 ? 1 : type == kI32 ? 4 : reference::size_of(type); }
inline uint32_t element(const void *data, int32_t type, int64_t i) {
    uint32_t bits = 0;
    memcpy(&bits, static_cast<const unsigned char *>(data) + i * size_of(type), static_cast<size_t>(size_of(type)));
    return bits;
}
inline bool is_nan(const void *data, int32_t type, int64_t i) {
    if (type >= kI8) return false;
    const float value = reference::load(data, type, i);
    return value != value;
}

// Every bit of got [rows, columns] is as in want; a NaN only has to be one.
inline void expect(const void *got, const void *want, int32_t type, int64_t rows, int64_t columns) {
    isa->values += rows * columns;
    if (memcmp(got, want, static_cast<size_t>(rows * columns * size_of(type))) == 0) return;
    for (int64_t i = 0; i < rows * columns; ++i) {
        if (element(got, type, i) == element(want, type, i)) continue;
        if (is_nan(got, type, i) && is_nan(want, type, i)) continue;
        fail("value", i / columns, i % columns, element(got, type, i), element(want, type, i));
    }
}

// xorshift64*
inline uint64_t random_state = 0x9E3779B97F4A7C15u;
inline uint32_t random_bits() {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return static_cast<uint32_t>(random_state * 0x2545F4914F6CDD1Du >> 32);
}
// Uniform in [-1, 1), times a power of two from 2^0 down to 2^(1 - binades).
inline float random_float(uint32_t binades) {
    const double unit = static_cast<double>(static_cast<int32_t>(random_bits())) * reference::pow2(-31);
    return static_cast<float>(unit * reference::pow2(-static_cast<int>(random_bits() % binades)));
}
inline void fill_codes(int8_t *codes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(random_bits() >> 24);
}
inline void fill_ternary(int8_t *weights, int64_t count) {
    for (int64_t i = 0; i < count; ++i) weights[i] = static_cast<int8_t>(static_cast<int>(random_bits() % 3) - 1);
}
inline void fill_floats(void *values, int32_t type, int64_t count, uint32_t binades) {
    for (int64_t i = 0; i < count; ++i) reference::store(values, type, i, random_float(binades));
}
inline void fill_scales(float *scales, int64_t count) {
    for (int64_t i = 0; i < count; ++i) scales[i] = 0.04f + 0.03f * random_float(1);
}

}  // namespace harness

#endif
