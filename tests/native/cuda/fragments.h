// Which element of a matrix each register byte or half of each lane holds, as the PTX ISA documents mma.
// Index i counts a lane's elements in register order: i / 4 is the register of 8-bit operands, i / 2 of 16-bit ones.
#ifndef BITLAB_TEST_FRAGMENTS_H
#define BITLAB_TEST_FRAGMENTS_H

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

}  // namespace emulator

#endif
