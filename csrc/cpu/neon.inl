// 128-bit vectors of Arm. Included inside the anonymous namespace of the NEON files.

constexpr int kWidth = 16;
constexpr int kRows = 4;
using Bytes = uint8x16_t;
using Part = int32x4_t;
using Sums = int32x4_t;

constexpr int64_t kSplitChunk = int64_t{1} << 20;
constexpr int64_t kPanelChunk = int64_t{1} << 20;
// 32 registers: 16 sums, 4 lanes and their masks, the codes.
constexpr int kWholeSums = 16;
constexpr int kTokens = 8;
constexpr bool kCodesFromL1 = false;
constexpr bool kPrefetchTwice = false;
// 24 sums, 4 vectors of weights, the codes.
constexpr int kPanelVectors = 4;
constexpr int kPanelTokens = 6;
constexpr int64_t kPanelFrom = 24;
constexpr uint32_t kInt8Offset = 0;

inline Bytes load(const void *from) { return vld1q_u8(static_cast<const uint8_t *>(from)); }
inline void stream(uint8_t *to, const uint8_t (&line)[64]) { __builtin_memcpy(to, line, sizeof(line)); }
inline void stream_end() {}
inline Bytes broadcast(const int8_t *four) {
    uint32_t quad;
    __builtin_memcpy(&quad, four, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(quad));
}
template <typename Vector>
inline void in_order(Vector &vector) {
    asm volatile("" : "+w"(vector));
}
inline U8x16 sixteen(const uint8_t *from, int64_t count) { return copied_16(from, count); }
inline U8x16 permuted(U8x16 bytes, U8x16 by) {
    return reinterpret_cast<U8x16>(vqtbl1q_u8(reinterpret_cast<uint8x16_t>(bytes), reinterpret_cast<uint8x16_t>(by)));
}
inline Part zero_part() { return vdupq_n_s32(0); }
inline Sums zero_sums() { return vdupq_n_s32(0); }
inline Sums load_sums(const int32_t *from) { return vld1q_s32(from); }
inline void store_sums(int32_t *to, Sums sums) { vst1q_s32(to, sums); }
inline Sums widen(Sums sums, Part part) { return vaddq_s32(sums, part); }

// out[i] = the sum of the lanes of sums[i].
inline void reduce(const Sums sums[4], int32_t out[4]) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3])));
}
inline Bytes table(const U8x16 *bytes) { return vld1q_u8(reinterpret_cast<const uint8_t *>(bytes)); }
template <uint8_t kMask, uint8_t kFlip>
inline Bytes look_up(Bytes table, Bytes w) {
    return vqtbl1q_u8(table, veorq_u8(vandq_u8(w, vdupq_n_u8(kMask)), vdupq_n_u8(kFlip)));
}
inline Bytes high_half(Bytes w) { return vshrq_n_u8(w, 4); }
inline Sums multiply_add_i8(Sums sums, Bytes w, Bytes code) {
    return vdotq_s32(sums, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(code));
}
// Scaled weights are signed: no offset.
constexpr uint32_t kScaledOffset = 0;
inline Part multiply_add_scaled(Part part, Bytes w, Bytes code) { return multiply_add_i8(part, w, code); }
