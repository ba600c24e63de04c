// AVX-512 VNNI: unsigned bytes times int8 codes straight into int32 sums, in 512-bit vectors.
#include <immintrin.h>

#include "bitkernels.h"
#include "isa.h"

namespace bitlab {
namespace {

#include "x86_512.inl"
#include "x86_vnni.inl"

// 32 registers: 16 sums, 4 lanes and their masks; the codes come from memory.
constexpr int kWholeSums = 16;
constexpr int kTokens = 8;
constexpr bool kCodesFromL1 = true;
constexpr bool kPrefetchTwice = true;
// 24 sums, 4 vectors of weights: a block's four lanes; the codes are broadcast from memory.
constexpr int kPanelVectors = 4;
constexpr int kPanelTokens = 6;
constexpr int64_t kPanelFrom = 24;

template <int L>
inline void split(Bytes w, int lane, Bytes lanes[L]) {
    for (int i = 0; i < L; ++i) {
        lanes[i] = _mm512_and_si512(w, _mm512_set1_epi8(static_cast<char>(3 << (2 * (lane + i)))));
    }
}
inline Part multiply_add(Part part, Bytes w, Bytes code) { return _mm512_dpbusd_epi32(part, w, code); }
inline Sums widen(Sums sums, Part part) { return _mm512_add_epi32(sums, part); }
// Weights plus 128 are unsigned; the sums' offset comes off by kInt8Offset.
inline Sums multiply_add_i8(Sums sums, Bytes w, Bytes code) {
    return _mm512_dpbusd_epi32(sums, _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80))), code);
}

inline Part multiply_add_scaled(Part part, Bytes w, Bytes code) { return multiply_add(part, w, code); }
inline Bytes choose(Bytes table, Bytes by) { return _mm512_shuffle_epi8(table, by); }
inline Bytes low_half(Bytes w) { return _mm512_and_si512(w, _mm512_set1_epi8(0x0F)); }
inline Bytes high_half(Bytes w) { return low_half(_mm512_srli_epi16(w, 4)); }

// The four tables of a group are one vector.
#define BITLAB_OWN_TABLES
inline void make_tables(const uint8_t *const multipliers[4], int64_t count, uint8_t *tables) {
    alignas(16) uint8_t by_group[16][4];
    // Which lane's multiplier is added to 128 or taken off, in the bytes of its table; -1: none is.
    constexpr char n = -1;
    const __m512i plus = _mm512_set_epi8(n, n, n, n, 3, 3, 3, 3, n, n, n, n, n, n, n, n, n, 2, n, n, n, 2, n, n, n, 2, n, n,
                                         n, 2, n, n, n, n, n, n, 1, 1, 1, 1, n, n, n, n, n, n, n, n, n, 0, n, n, n, 0,
                                         n, n, n, 0, n, n, n, 0, n, n);
    const __m512i minus = _mm512_set_epi8(n, n, n, n, n, n, n, n, n, n, n, n, 3, 3, 3, 3, n, n, n, 2, n, n, n, 2, n, n, n,
                                          2, n, n, n, 2, n, n, n, n, n, n, n, n, n, n, n, n, 1, 1, 1, 1, n, n, n, 0, n,
                                          n, n, 0, n, n, n, 0, n, n, n, 0);
    for (int64_t first = 0; first < count; first += 16) {
        const int64_t size = count - first < 16 ? count - first : 16;
        __m128i lane[4];
        for (int i = 0; i < 4; ++i) {
            alignas(16) uint8_t bytes[16] = {};
            const uint8_t *from = multipliers[i] + first;
            if (size < 16) from = static_cast<uint8_t *>(__builtin_memcpy(bytes, from, static_cast<size_t>(size)));
            lane[i] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
        }
        const __m128i low01 = _mm_unpacklo_epi8(lane[0], lane[1]), high01 = _mm_unpackhi_epi8(lane[0], lane[1]);
        const __m128i low23 = _mm_unpacklo_epi8(lane[2], lane[3]), high23 = _mm_unpackhi_epi8(lane[2], lane[3]);
        auto *to = reinterpret_cast<__m128i *>(by_group);
        _mm_store_si128(to, _mm_unpacklo_epi16(low01, low23));
        _mm_store_si128(to + 1, _mm_unpackhi_epi16(low01, low23));
        _mm_store_si128(to + 2, _mm_unpacklo_epi16(high01, high23));
        _mm_store_si128(to + 3, _mm_unpackhi_epi16(high01, high23));
        for (int64_t g = 0; g < size; ++g) {
            int32_t four;
            __builtin_memcpy(&four, by_group[g], 4);
            const __m512i m = _mm512_set1_epi32(four);
            const __m512i added = _mm512_add_epi8(_mm512_set1_epi8(static_cast<char>(0x80)), _mm512_shuffle_epi8(m, plus));
            _mm512_store_si512(tables + (first + g) * 64, _mm512_sub_epi8(added, _mm512_shuffle_epi8(m, minus)));
        }
    }
}

#include "loops.inl"

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vnni");
}

}  // namespace

extern const Kernels kKernelsAvx512Vnni = BITLAB_KERNELS("avx512vnni", supported);

}  // namespace bitlab
