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
constexpr bool kMaskedBytes = false;
inline U8x16 sixteen(const uint8_t *from, int64_t) {
    U8x16 bytes;
    __builtin_memcpy(&bytes, from, 16);
    return bytes;
}
// kRows bytes as words.
typedef uint32_t Words __attribute__((vector_size(kRows * 4)));
inline Words widened(const uint8_t *from) { return Words{from[0], from[1], from[2], from[3]}; }
inline Part zero_part() { return vdupq_n_s32(0); }
inline Sums zero_sums() { return vdupq_n_s32(0); }
inline Sums load_sums(const int32_t *from) { return vld1q_s32(from); }
inline void store_sums(int32_t *to, Sums sums) { vst1q_s32(to, sums); }
inline Sums widen(Sums sums, Part part) { return vaddq_s32(sums, part); }

// out[i] = the sum of the lanes of sums[i].
inline void reduce(const Sums sums[4], int32_t out[4]) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3])));
}
inline Bytes table(const uint32_t *words) { return vreinterpretq_u8_u32(vld1q_u32(words)); }
template <int kLane>
inline Bytes choose(Bytes table, Bytes w) {
    const Bytes at = vandq_u8(kLane == 0 ? w : vshrq_n_u8(w, kLane == 0 ? 1 : 2 * kLane), vdupq_n_u8(3));
    return vqtbl1q_u8(table, vorrq_u8(at, vdupq_n_u8(4 * kLane)));
}
inline Sums multiply_add_i8(Sums sums, Bytes w, Bytes code) {
    return vdotq_s32(sums, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(code));
}
// Scaled weights are signed: no offset.
constexpr uint32_t kScaledOffset = 0;
inline Part multiply_add_scaled(Part part, Bytes w, Bytes code) { return multiply_add_i8(part, w, code); }
