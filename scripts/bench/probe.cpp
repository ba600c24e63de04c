/*
 * What this machine can do at most, for the benchmarks: compiled on the spot by scripts/bench/common.py with
 * -march=native, never part of the library.
 */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef uint64_t u64x8 __attribute__((vector_size(64)));

/* Reads [data, data + bytes) once with all threads, prefetching `ahead` bytes (0: not at all). */
template <bool kPrefetch>
static uint64_t read_part(const char *data, int64_t bytes, int64_t ahead) {
    u64x8 sum[4] = {};
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        for (int j = 0; j < 4; ++j) {
            if (kPrefetch) __builtin_prefetch(data + i + 64 * j + ahead);
            u64x8 line;
            memcpy(&line, data + i + 64 * j, 64);
            sum[j] += line;
        }
    }
    const u64x8 total = sum[0] + sum[1] + sum[2] + sum[3];
    uint64_t result = 0;
    for (int j = 0; j < 8; ++j) result += total[j];
    return result;
}

extern "C" uint64_t probe_read(const void *data, int64_t bytes, int64_t ahead, int32_t num_threads) {
    uint64_t result = 0;
    const int64_t part = bytes / num_threads / 4096 * 4096;
#pragma omp parallel for num_threads(num_threads) schedule(static, 1) reduction(+ : result)
    for (int32_t t = 0; t < num_threads; ++t) {
        const char *begin = (const char *)data + t * part;
        const int64_t size = t + 1 == num_threads ? bytes - t * part : part;
        result += ahead > 0 ? read_part<true>(begin, size, ahead) : read_part<false>(begin, size, 0);
    }
    return result;
}

/*
 * The loop below holds nothing but 8-bit multiply-adds in registers, in assembler, so that the compiler neither merges
 * equal chains nor moves the products out of the loop.
 */
#if defined(__AVX512VNNI__)
#define PROBE_NAME "vpdpbusd, 512 bits"
#define MULTIPLY_ADD "vpdpbusd %[b], %[a], %[acc]"
typedef __m512i Lanes;
#elif defined(__AVXVNNI__)
#define PROBE_NAME "vpdpbusd, 256 bits"
#define MULTIPLY_ADD "%{vex%} vpdpbusd %[b], %[a], %[acc]"
typedef __m256i Lanes;
#elif defined(__AVX2__)
#define PROBE_NAME "vpmaddubsw + vpaddw, 256 bits"
#define MULTIPLY_ADD "vpmaddubsw %[b], %[a], %[product]\n\tvpaddw %[product], %[acc], %[acc]"
typedef __m256i Lanes;
#endif

#ifdef PROBE_NAME
static const int kChains = 12;
static const int64_t kMacs = kChains * sizeof(Lanes);
static void multiply(int64_t iterations) {
    Lanes acc[kChains] = {}, a = {}, b = {}, product;
    for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 12
        for (int j = 0; j < kChains; ++j)
            __asm__ volatile(MULTIPLY_ADD : [acc] "+v"(acc[j]), [product] "=&v"(product) : [a] "v"(a), [b] "v"(b));
}
#else
#define PROBE_NAME ""
static const int64_t kMacs = 0;
static void multiply(int64_t) {}
#endif

/* What probe_multiply multiplies with; empty where it is not written for this CPU. */
extern "C" const char *probe_name(void) { return PROBE_NAME; }

/* Returns the int8 multiply-accumulates done by all threads together. */
extern "C" int64_t probe_multiply(int64_t iterations, int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
    for (int32_t t = 0; t < num_threads; ++t) multiply(iterations);
    return kMacs * iterations * num_threads;
}
