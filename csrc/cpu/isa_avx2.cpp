// AVX2: bytes of weights (at most 128) times int8 codes by vpmaddubsw. A pair is at most 2 * 128 * 128 in magnitude and
// reaches that only as -32768, so it never saturates; vpmaddwd widens every pair at once, because summing lane 3 even
// twice in int16 would overflow (the defect that bitnet.cpp's I2_S kernel has).
#include <immintrin.h>

#include "bitkernels.h"
#include "isa.h"

namespace bitlab {
namespace {

// 2 tokens x 4 lanes = 8 accumulators, 4 masks, the weights, a token, one and a product: 16 registers.
constexpr int kTokens = 2;

inline int32_t sum_of(__m256i v) {
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i quarter = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0xB1)));
}

template <int T>
inline void step(__m256i w, const int8_t *x, int64_t x_stride, __m256i acc[4][T]) {
    const __m256i one = _mm256_set1_epi16(1);
    for (int i = 0; i < 4; ++i) {
        const __m256i lane = _mm256_and_si256(w, _mm256_set1_epi8(static_cast<char>(3 << (2 * i))));
        for (int t = 0; t < T; ++t) {
            const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x + t * x_stride));
            acc[i][t] = _mm256_add_epi32(acc[i][t], _mm256_madd_epi16(_mm256_maddubs_epi16(lane, code), one));
        }
    }
}

template <int T>
void dot(const uint8_t *w, const int8_t *x, int64_t x_stride, int64_t k, int32_t raw[4][T]) {
    __m256i acc[4][T];
    for (int i = 0; i < 4; ++i) {
        for (int t = 0; t < T; ++t) acc[i][t] = _mm256_setzero_si256();
    }
    int64_t p = 0;
    for (; p + 32 <= k; p += 32) {
        _mm_prefetch(reinterpret_cast<const char *>(w + p + 4096), _MM_HINT_T0);
        step<T>(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(w + p)), x + p, x_stride, acc);
    }
    if (p < k) {
        alignas(32) uint8_t tail[32] = {};
        __builtin_memcpy(tail, w + p, static_cast<size_t>(k - p));
        step<T>(_mm256_load_si256(reinterpret_cast<const __m256i *>(tail)), x + p, x_stride, acc);
    }
    for (int i = 0; i < 4; ++i) {
        for (int t = 0; t < T; ++t) raw[i][t] = sum_of(acc[i][t]);
    }
}

#include "loops.inl"

bool supported() { return __builtin_cpu_supports("avx2"); }

}  // namespace

const Kernels kKernelsAvx2 = {"avx2", supported, absmax, quantize, linear, matmul, abs_sum, pack_row};

}  // namespace bitlab
