// AVX-VNNI: unsigned bytes times int8 codes straight into int32 sums, in 256-bit vectors.
#include <immintrin.h>

#include "bitkernels.h"
#include "isa.h"

namespace bitlab {
namespace {

#include "x86_256.inl"
#include "x86_vnni.inl"

// 16 registers: 8 sums, 2 lanes and their masks; the codes come from memory.
constexpr int kWholeSums = 4;
constexpr int kTokens = 4;
constexpr bool kCodesFromL1 = false;
constexpr bool kPrefetchTwice = false;
// 12 sums, 2 vectors of weights, the codes.
constexpr int kPanelVectors = 2;
constexpr int kPanelTokens = 6;
constexpr int64_t kPanelFrom = 24;

template <int L>
inline void split(Bytes w, int lane, Bytes lanes[L]) {
    for (int i = 0; i < L; ++i) {
        lanes[i] = _mm256_and_si256(w, _mm256_set1_epi8(static_cast<char>(3 << (2 * (lane + i)))));
    }
}
inline Part multiply_add(Part part, Bytes w, Bytes code) { return _mm256_dpbusd_avx_epi32(part, w, code); }
inline Sums widen(Sums sums, Part part) { return _mm256_add_epi32(sums, part); }
// Weights plus 128 are unsigned; the sums' offset comes off by kInt8Offset.
inline Sums multiply_add_i8(Sums sums, Bytes w, Bytes code) {
    return _mm256_dpbusd_avx_epi32(sums, _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80))), code);
}

// In place: from the intrinsic GCC 12 makes a copy of every sum.
inline Part multiply_add_scaled(Part part, Bytes w, Bytes code) {
    asm("%{vex%} vpdpbusd %[code], %[w], %[part]" : [part] "+x"(part) : [w] "x"(w), [code] "x"(code));
    return part;
}
inline Bytes table(const U8x16 *bytes) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(bytes)));
}
template <uint8_t kMask, uint8_t kFlip>
inline Bytes look_up(Bytes table, Bytes w) {
    const Bytes at = _mm256_and_si256(w, _mm256_set1_epi8(kMask));
    return _mm256_shuffle_epi8(table, kFlip == 0 ? at : _mm256_xor_si256(at, _mm256_set1_epi8(kFlip)));
}
inline Bytes high_half(Bytes w) { return _mm256_srli_epi16(w, 4); }

#include "loops.inl"

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni"); }

}  // namespace

extern const Kernels kKernelsAvxVnni = BITLAB_KERNELS("avxvnni", supported);

}  // namespace bitlab
