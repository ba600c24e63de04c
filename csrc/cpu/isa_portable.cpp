// Plain C++ for any CPU: vectors of one machine's smallest width, element by element.
#include "bitkernels.h"
#include "isa.h"

namespace bitlab {
namespace {

constexpr int kWidth = 16;
constexpr int kRows = 4;
struct Bytes {
    uint8_t at[kWidth];
};
typedef int32_t Sums __attribute__((vector_size(16)));
using Part = Sums;

constexpr int64_t kSplitChunk = int64_t{1} << 20;
constexpr int64_t kPanelChunk = int64_t{1} << 20;
constexpr int kLaneShift[4] = {0, 0, 0, 0};
constexpr int kWholeSums = 4;
constexpr int kTokens = 1;
constexpr bool kCodesFromL1 = false;
constexpr bool kPrefetchTwice = false;
constexpr int kPanelVectors = 1;
constexpr int kPanelTokens = 1;
constexpr int64_t kPanelFrom = 8;
constexpr uint32_t kInt8Offset = 0;

inline void stream(uint8_t *to, const uint8_t (&line)[64]) { __builtin_memcpy(to, line, sizeof(line)); }
inline void stream_end() {}
inline Bytes load(const void *from) {
    Bytes bytes;
    __builtin_memcpy(&bytes, from, kWidth);
    return bytes;
}
inline Bytes broadcast(const int8_t *four) {
    Bytes bytes;
    for (int b = 0; b < kWidth; b += 4) __builtin_memcpy(bytes.at + b, four, 4);
    return bytes;
}
template <typename Vector>
inline void in_order(Vector &) {}
inline U8x16 sixteen(const uint8_t *from, int64_t count) { return copied_16(from, count); }
inline U8x16 permuted(U8x16 bytes, U8x16 by) {
    U8x16 chosen;
    for (int b = 0; b < 16; ++b) chosen[b] = by[b] & 0x80 ? 0 : bytes[by[b] & 0x0F];
    return chosen;
}
inline Part zero_part() { return Part{}; }
inline Sums zero_sums() { return Sums{}; }
inline Sums load_sums(const int32_t *from) {
    Sums sums;
    __builtin_memcpy(&sums, from, kWidth);
    return sums;
}
inline void store_sums(int32_t *to, Sums sums) { __builtin_memcpy(to, &sums, kWidth); }
inline Sums widen(Sums sums, Part part) { return sums + part; }
inline void reduce(const Sums sums[4], int32_t out[4]) {
    for (int i = 0; i < 4; ++i) out[i] = sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
}
template <int L>
inline void split(const Bytes &w, int lane, Bytes lanes[L]) {
    for (int i = 0; i < L; ++i) {
        for (int b = 0; b < kWidth; ++b) lanes[i].at[b] = static_cast<uint8_t>(w.at[b] >> (2 * (lane + i)) & 3);
    }
}
inline Part multiply_add(Part part, const Bytes &w, const Bytes &code) {
    for (int b = 0; b < kWidth; ++b) part[b / 4] += w.at[b] * static_cast<int8_t>(code.at[b]);
    return part;
}
inline Sums multiply_add_i8(Sums sums, const Bytes &w, const Bytes &code) {
    for (int b = 0; b < kWidth; ++b) sums[b / 4] += static_cast<int8_t>(w.at[b]) * static_cast<int8_t>(code.at[b]);
    return sums;
}

constexpr uint32_t kScaledOffset = 128;
inline Part multiply_add_scaled(Part part, const Bytes &w, const Bytes &code) { return multiply_add(part, w, code); }
inline Bytes table(const U8x16 *bytes) { return load(bytes); }
template <uint8_t kMask, uint8_t kFlip>
inline Bytes look_up(const Bytes &table, const Bytes &w) {
    Bytes found;
    for (int b = 0; b < kWidth; ++b) found.at[b] = table.at[(w.at[b] & kMask) ^ kFlip];
    return found;
}
inline Bytes high_half(const Bytes &w) {
    Bytes half;
    for (int b = 0; b < kWidth; ++b) half.at[b] = w.at[b] >> 4;
    return half;
}

#include "loops.inl"

bool supported() { return true; }

}  // namespace

extern const Kernels kKernelsPortable = BITLAB_KERNELS("portable", supported);

}  // namespace bitlab
