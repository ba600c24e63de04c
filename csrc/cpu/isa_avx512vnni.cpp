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
constexpr int64_t kPanelFrom = 48;

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

// In place: from the intrinsic GCC 12 makes a copy of every sum.
inline Part multiply_add_scaled(Part part, Bytes w, Bytes code) {
    asm("vpdpbusd %[code], %[w], %[part]" : [part] "+v"(part) : [w] "v"(w), [code] "v"(code));
    return part;
}
inline Bytes table(const U8x16 *bytes) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i *>(bytes)));
}
template <uint8_t kMask, uint8_t kFlip>
inline Bytes look_up(Bytes table, Bytes w) {
    const Bytes mask = _mm512_set1_epi8(kMask), flip = _mm512_set1_epi8(kFlip);
    // (w & mask) ^ flip
    constexpr int kAndXor = 0x6A;
    const Bytes at = kFlip == 0 ? _mm512_and_si512(w, mask) : _mm512_ternarylogic_epi32(w, mask, flip, kAndXor);
    return _mm512_shuffle_epi8(table, at);
}
inline Bytes high_half(Bytes w) { return _mm512_srli_epi16(w, 4); }

#include "loops.inl"

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vnni");
}

}  // namespace

extern const Kernels kKernelsAvx512Vnni = BITLAB_KERNELS("avx512vnni", supported);

}  // namespace bitlab
