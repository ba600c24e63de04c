// AVX-512 without VNNI: as AVX2 (see there why int16 sums cannot overflow), in 512-bit vectors.
#include <immintrin.h>

#include "bitkernels.h"
#include "isa.h"

namespace bitlab {
namespace {

#include "x86_512.inl"

constexpr int64_t kSplitChunk = 16;
constexpr int64_t kPanelChunk = 64;
constexpr int kLaneShift[4] = {0, 2, 0, 2};
// 32 registers: 16 parts, 4 lanes and 2 masks, the codes, a product.
constexpr int kWholeSums = 16;
constexpr int kTokens = 8;
constexpr bool kCodesFromL1 = false;
constexpr bool kPrefetchTwice = false;
// 24 parts, 4 vectors of weights, the codes, a product.
constexpr int kPanelVectors = 4;
constexpr int kPanelTokens = 6;
constexpr int64_t kPanelFrom = 24;
constexpr uint32_t kInt8Offset = 0;

template <int L>
inline void split(Bytes w, int lane, Bytes lanes[L]) {
    for (int i = 0; i < L; i += 2) {
        const Bytes pair = lane + i == 0 ? w : _mm512_srli_epi16(w, 4);
        lanes[i] = _mm512_and_si512(pair, _mm512_set1_epi8(0x03));
        lanes[i + 1] = _mm512_and_si512(pair, _mm512_set1_epi8(0x0C));
    }
}
inline Part multiply_add(Part part, Bytes w, Bytes code) {
    return _mm512_add_epi16(part, _mm512_maddubs_epi16(w, code));
}
inline Sums widen(Sums sums, Part part) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(part, _mm512_set1_epi16(1)));
}
// |w| times the code with w's sign: at most 2 * 127 * 127 for a pair, as quantized codes are never -128.
inline Sums multiply_add_i8(Sums sums, Bytes w, Bytes code) {
    const __m512i negative = _mm512_mask_sub_epi8(code, _mm512_movepi8_mask(w), _mm512_setzero_si512(), code);
    return widen(sums, _mm512_maddubs_epi16(_mm512_abs_epi8(w), negative));
}

inline Part multiply(Bytes w, Bytes code) { return _mm512_maddubs_epi16(w, code); }
inline Sums subtract(Sums from, Sums sums) { return _mm512_sub_epi32(from, sums); }
template <int kBits>
inline Sums shift_right(Sums sums) {
    return _mm512_srai_epi32(sums, kBits);
}
inline Part broadcast_part(int32_t low) { return _mm512_set1_epi32(low & 0xFFFF); }
inline Part all_of(uint32_t multiplier) { return _mm512_set1_epi32(static_cast<int32_t>(multiplier)); }
inline Sums widen_by(Sums sums, Part part, Part multipliers) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(part, multipliers));
}

// 12 parts and 12 sums, 2 lanes and 2 masks, the codes, a product.
constexpr int kGroupWholeSums = 8;
constexpr int kGroupTokens = 6;
#define BITLAB_WIDENED_GROUPS
#include "loops.inl"

bool supported() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }

}  // namespace

extern const Kernels kKernelsAvx512Bw = BITLAB_KERNELS("avx512bw", supported);

}  // namespace bitlab
