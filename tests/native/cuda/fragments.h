// Which element of a matrix each register byte or half of each lane holds, as the PTX ISA documents mma.
// Index i counts a lane's elements in register order: i / 4 is the register of 8-bit operands, i / 2 of 16-bit ones.
#ifndef BITLAB_TEST_FRAGMENTS_H
#define BITLAB_TEST_FRAGMENTS_H

#include <stdint.h>

namespace emulator {

struct Place {
    int row;
    int column;
};

// mma.m16n8k32, 8-bit: A is 16 x 32 (16 elements a lane), B is 32 x 8 (8 elements a lane).
inline Place a_k32(int lane, int i) {
    const int group = lane / 4, in_group = lane % 4;
    return {group + ((i / 4) % 2) * 8, in_group * 4 + i % 4 + (i / 8) * 16};
}
inline Place b_k32(int lane, int i) { return {(lane % 4) * 4 + i % 4 + (i / 4) * 16, lane / 4}; }

// mma.m16n8k16, 16-bit: A is 16 x 16 (8 elements a lane), B is 16 x 8 (4 elements a lane).
inline Place a_k16(int lane, int i) {
    const int group = lane / 4, in_group = lane % 4;
    return {group + ((i / 2) % 2) * 8, in_group * 2 + i % 2 + (i / 4) * 8};
}
inline Place b_k16(int lane, int i) { return {(lane % 4) * 2 + i % 2 + (i / 2) * 8, lane / 4}; }

// C and D of both are 16 x 8, four elements a lane.
inline Place c_place(int lane, int i) { return {lane / 4 + (i / 2) * 8, (lane % 4) * 2 + i % 2}; }

// wgmma.m64nNk32, 8-bit, of the 128 threads of a warpgroup: A in registers is 64 x 32 (16 elements a thread), D of
// n = 64 is 64 x 64 (32 elements a thread). Each warp has 16 rows.
inline Place wgmma_a(int thread, int i) {
    const int warp = thread / 32, group = thread % 32 / 4, in_group = thread % 4;
    const bool upper = (i >= 4 && i < 8) || i >= 12;
    return {16 * warp + group + (upper ? 8 : 0), 4 * in_group + (i & 3) + (i < 8 ? 0 : 16)};
}
inline Place wgmma_d(int thread, int i) {
    const int warp = thread / 32, group = thread % 32 / 4, in_group = thread % 4;
    return {16 * warp + group + (i & 2 ? 8 : 0), i / 4 * 8 + 2 * in_group + (i & 1)};
}

// Where byte k of row n of B lies in shared memory, for a descriptor with the 128-byte swizzle and K side by side:
// eight rows of 128 bytes, then `stride` bytes to the next eight; bits 4 to 6 of the address are exchanged by bits 7
// to 9.
inline uint32_t swizzled_128(uint32_t start, uint32_t stride, uint32_t n, uint32_t k) {
    const uint32_t at = start + n / 8 * stride + n % 8 * 128 + k;
    return at ^ (at >> 7 & 7) << 4;
}

}  // namespace emulator

#endif
