// AVX-512 with VNNI: vpdpbusd multiplies unsigned bytes of weights with int8 codes and adds four of them into int32, so
// one load, four ANDs and four vpdpbusd a token do 256 products, with nothing to widen.
#include <immintrin.h>

#include "bitkernels.h"
#include "isa.h"

namespace bitlab {
namespace {

// 4 tokens x 4 lanes = 16 accumulators of the 32 registers.
constexpr int kTokens = 4;

template <int T>
inline void step(__m512i w, const int8_t *x, int64_t x_stride, __m512i acc[4][T]) {
    for (int i = 0; i < 4; ++i) {
        const __m512i lane = _mm512_and_si512(w, _mm512_set1_epi8(static_cast<char>(3 << (2 * i))));
        for (int t = 0; t < T; ++t) {
            acc[i][t] = _mm512_dpbusd_epi32(acc[i][t], lane, _mm512_loadu_si512(x + t * x_stride));
        }
    }
}

template <int T>
void dot(const uint8_t *w, const int8_t *x, int64_t x_stride, int64_t k, int32_t raw[4][T]) {
    __m512i acc[4][T];
    for (int i = 0; i < 4; ++i) {
        for (int t = 0; t < T; ++t) acc[i][t] = _mm512_setzero_si512();
    }
    int64_t p = 0;
    for (; p + 64 <= k; p += 64) {
        _mm_prefetch(reinterpret_cast<const char *>(w + p + 4096), _MM_HINT_T0);
        step<T>(_mm512_loadu_si512(w + p), x + p, x_stride, acc);
    }
    if (p < k) {
        const __mmask64 mask = (1ULL << (k - p)) - 1;
        step<T>(_mm512_maskz_loadu_epi8(mask, w + p), x + p, x_stride, acc);
    }
    for (int i = 0; i < 4; ++i) {
        for (int t = 0; t < T; ++t) raw[i][t] = _mm512_reduce_add_epi32(acc[i][t]);
    }
}

#include "loops.inl"

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Kernels kKernelsAvx512Vnni = {"avx512vnni", supported, absmax, quantize, linear, matmul, abs_sum, pack_row};

}  // namespace bitlab
