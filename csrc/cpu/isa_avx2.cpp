// AVX2: unsigned bytes times int8 codes by vpmaddubsw, added up in int16 and widened in time. The upper two lanes are
// shifted down by 4, so that a pair of products is at most 2 * 8 * 128 = 2^11 in magnitude, negative: 16 of them fit
// int16. Codes of a panel are 0 to 2, a pair 2 * 2 * 128 = 2^9: 64 fit. Widening every pair at once would cost a third
// multiplication; not widening is the defect that bitnet.cpp's I2_S kernel has.
#include <immintrin.h>

#include "bitkernels.h"
#include "isa.h"

namespace bitlab {
namespace {

#include "x86_256.inl"

constexpr int64_t kSplitChunk = 16;
constexpr int64_t kPanelChunk = 64;
constexpr int kLaneShift[4] = {0, 2, 0, 2};
// 16 registers: 8 parts, 2 lanes and their masks, the codes, a product.
constexpr int kWholeSums = 4;
constexpr int kTokens = 4;
constexpr bool kCodesFromL1 = false;
constexpr bool kPrefetchTwice = false;
// 12 parts, 2 vectors of weights, the codes, a product.
constexpr int kPanelVectors = 2;
constexpr int kPanelTokens = 6;
constexpr int64_t kPanelFrom = 20;
constexpr uint32_t kInt8Offset = 0;

template <int L>
inline void split(Bytes w, int lane, Bytes lanes[L]) {
    for (int i = 0; i < L; i += 2) {
        const Bytes pair = lane + i == 0 ? w : _mm256_srli_epi16(w, 4);
        lanes[i] = _mm256_and_si256(pair, _mm256_set1_epi8(0x03));
        lanes[i + 1] = _mm256_and_si256(pair, _mm256_set1_epi8(0x0C));
    }
}
// In one piece: from intrinsics GCC 12 makes a copy of every sum, and spills some.
inline Part multiply_add(Part part, Bytes w, Bytes code) {
    Part product;
    asm("vpmaddubsw %[code], %[w], %[product]\n\tvpaddw %[product], %[part], %[part]"
        : [product] "=&x"(product), [part] "+x"(part)
        : [w] "x"(w), [code] "x"(code));
    return part;
}
inline Sums widen(Sums sums, Part part) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
}
// |w| times the code with w's sign: at most 2 * 127 * 127 for a pair, as quantized codes are never -128.
inline Sums multiply_add_i8(Sums sums, Bytes w, Bytes code) {
    return widen(sums, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(code, w)));
}

inline Part multiply(Bytes w, Bytes code) { return _mm256_maddubs_epi16(w, code); }
inline Sums subtract(Sums from, Sums sums) { return _mm256_sub_epi32(from, sums); }
template <int kBits>
inline Sums shift_right(Sums sums) {
    return _mm256_srai_epi32(sums, kBits);
}
inline Part broadcast_part(int32_t low) { return _mm256_set1_epi32(low & 0xFFFF); }
inline Part all_of(uint32_t multiplier) { return _mm256_set1_epi32(static_cast<int32_t>(multiplier)); }
inline Sums widen_by(Sums sums, Part part, Part multipliers) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(part, multipliers));
}

// 8 parts and 8 sums, of which some spill.
constexpr int kGroupWholeSums = 4;
constexpr int kGroupTokens = 4;
#define BITLAB_WIDENED_GROUPS
#include "loops.inl"

bool supported() { return __builtin_cpu_supports("avx2"); }

}  // namespace

extern const Kernels kKernelsAvx2 = BITLAB_KERNELS("avx2", supported);

}  // namespace bitlab
