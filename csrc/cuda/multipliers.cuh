// Multipliers of groups, brought into the order that the matrix kernels read: from bytes [N, C], one for each output
// and group of K, to words [C, R], of which one holds those of the four outputs of a packed row.
//
// A lane of the matrix kernels needs the multipliers of all four outputs of two packed rows for 64 or 128 columns: from
// the bytes as they are stored that would be eight loads from eight lines of memory, from these words it is two, and
// the eight rows of a warp lie side by side. The blocks that do it are more blocks of quantize_kernel, so that there is
// no launch more; the kernel for one token reads the bytes themselves, in the order that they have.
#ifndef BITLAB_CUDA_MULTIPLIERS_CUH
#define BITLAB_CUDA_MULTIPLIERS_CUH

#include "types.cuh"

namespace bitlab {

constexpr int kPlaceThreads = 512;
constexpr int kPlacedTogether = 4;  // groups of a thread

struct PlaceParams {
    const uint8_t *multiplier;  // [N, columns]
    uint32_t *words;            // [columns, rows]
    int64_t N;
    int64_t rows;  // ceil(N / 4)
    int32_t columns;
    bool vector;  // every four bytes from a multiple of four on are aligned
};

inline int64_t place_blocks(const PlaceParams &p) {
    const int64_t quads = (p.columns + kPlacedTogether - 1) / kPlacedTogether;
    return quads * ((p.rows + kPlaceThreads - 1) / kPlaceThreads);
}

// A thread takes four groups of one packed row; a row that is not there has multipliers 0.
BK_DEVICE void place_multipliers(const PlaceParams &p, uint32_t block) {
    const auto row_blocks = static_cast<uint32_t>((p.rows + kPlaceThreads - 1) / kPlaceThreads);
    const int64_t row = static_cast<int64_t>(block % row_blocks) * kPlaceThreads + thread_x();
    const auto first = static_cast<int32_t>(block / row_blocks) * kPlacedTogether;
    if (row >= p.rows) return;
    uint32_t four[4] = {};
    BK_UNROLL
    for (int lane = 0; lane < 4; ++lane) {
        const int64_t n = row + lane * p.rows;
        if (n >= p.N) continue;
        const uint8_t *from = p.multiplier + n * p.columns + first;
        if (p.vector) {
            four[lane] = load_global(reinterpret_cast<const uint32_t *>(from));
        } else {
            BK_UNROLL
            for (int i = 0; i < kPlacedTogether; ++i) {
                if (first + i < p.columns) four[lane] |= static_cast<uint32_t>(load_global(from + i)) << (8 * i);
            }
        }
    }
    BK_UNROLL
    for (int i = 0; i < kPlacedTogether; ++i) {
        if (first + i >= p.columns) break;
        uint32_t word = 0;
        BK_UNROLL
        for (int lane = 0; lane < 4; ++lane) word |= (four[lane] >> (8 * i) & 255) << (8 * lane);
        store_global(p.words + static_cast<int64_t>(first + i) * p.rows + row, word);
    }
}

}  // namespace bitlab

#endif
