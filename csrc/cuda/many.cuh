// Many tokens, 17 and more: a tile of 32 packed rows (128 outputs) times 16 * kTiles tokens a block, on tensor cores.
//
// Packed rows and tokens come to shared memory by cp.async, 64 columns a stage, kStages of them in flight; four warps
// (two of rows times two of tokens) read them as mma fragments in 16-byte loads. The bytes that a lane needs lie 16
// apart (matmul.cuh), so eight lanes of a load cover 128 bytes in a row where elements have one byte, with no bank
// conflict; where they have two, the 16-byte chunks of odd rows are swapped in pairs to the same end.
#ifndef BITLAB_CUDA_MANY_CUH
#define BITLAB_CUDA_MANY_CUH

#include "epilogue.cuh"

namespace bitlab {

constexpr int kManyThreads = 128;
constexpr int kManyRows = 32;

template <typename Math, int kTiles>
struct ManyLayout {
    static constexpr int kTokens = 16 * kTiles;
    static constexpr uint32_t kRowBytes = 64 * Math::kBytes;
    static constexpr uint32_t kWeightBytes = kManyRows * 64;
    static constexpr uint32_t kPlaneBytes = kTokens * kRowBytes;
    static constexpr uint32_t kMultipliers = kWeightBytes + Math::kPlanes * kPlaneBytes;  // a word for each row
    static constexpr uint32_t kStageBytes = kMultipliers + (Math::kMultiplied ? 4 * kManyRows : 0);
    static constexpr int kStages = 4 * kStageBytes <= kSharedBytes ? 4 : 3;
    static_assert(kStages * kStageBytes <= kSharedBytes, "stages fit without asking for more shared memory");
    using Tile = SumTile<kTokens, kManyRows>;
    static_assert(Tile::kBytes <= kStages * kStageBytes, "a tile of sums fits where the stages were");
};

// Where the 16-byte chunk of a token's row lies in the row.
template <int kBytes>
BK_DEVICE uint32_t swizzle(uint32_t token, uint32_t chunk) {
    return kBytes == 2 ? chunk ^ (token & 1) : chunk;
}

// Starts the copies of block b of K to a stage. Rows and tokens past the end repeat the last one.
template <typename Math, int kTiles, typename Params>
BK_DEVICE void load_stage(const Params &p, int64_t first_row, int64_t first_token, int32_t b, uint32_t stage) {
    using Layout = ManyLayout<Math, kTiles>;
    const int thread = thread_x();
    {
        const int64_t row = first_row + thread / 4;
        const uint8_t *from = p.weight + (row < p.weight_rows ? row : p.weight_rows - 1) * p.K;
        const int32_t k = 64 * b + 16 * (thread % 4);
        const uint32_t to = stage + static_cast<uint32_t>(thread * 16);
        if (p.weight_vector) {
            copy_async_16(to, k < p.K ? from + k : from, k < p.K ? 16 : 0);
        } else {
            store_shared(to, load_weight_16(from, k, p));
        }
    }
    if (Math::kMultiplied && thread < kManyRows) {
        const int64_t row = first_row + thread < p.weight_rows ? first_row + thread : p.weight_rows - 1;
        copy_async_4(stage + Layout::kMultipliers + 4u * static_cast<uint32_t>(thread),
                     p.multipliers + multipliers_of_block(p, b) + row, 4);
    }
    constexpr int kChunks = 4 * Math::kBytes;
    BK_UNROLL
    for (int i = 0; i < Layout::kTokens * kChunks / kManyThreads; ++i) {
        const int at = i * kManyThreads + thread;
        const uint32_t token = static_cast<uint32_t>(at / kChunks), chunk = static_cast<uint32_t>(at % kChunks);
        const int64_t m = first_token + token < p.M ? first_token + token : p.M - 1;
        const uint8_t *from = p.x + p.token(m) * p.x_stride + static_cast<int64_t>(b) * Layout::kRowBytes + chunk * 16;
        const uint32_t to =
            stage + Layout::kWeightBytes + token * Layout::kRowBytes + swizzle<Math::kBytes>(token, chunk) * 16;
        BK_UNROLL
        for (int plane = 0; plane < Math::kPlanes; ++plane) {
            copy_async_16(to + static_cast<uint32_t>(plane) * Layout::kPlaneBytes, from + plane * p.x_plane, 16);
        }
    }
}

template <typename Math, int kTiles>
BK_DEVICE void multiply_stage(uint32_t stage, typename Math::Sum (&sums)[Math::kLanes][kTiles][4]) {
    using Layout = ManyLayout<Math, kTiles>;
    const int warp = thread_x() / kWarp, g = thread_x() % kWarp / 4;
    const uint32_t t = static_cast<uint32_t>(thread_x() % 4);
    const uint32_t row = static_cast<uint32_t>(warp / 2 * 16 + g),
                   token = static_cast<uint32_t>(warp % 2 * 8 * kTiles + g);
    const Bytes16 low = load_shared<Bytes16>(stage + row * 64 + t * 16);
    const Bytes16 high = load_shared<Bytes16>(stage + (row + 8) * 64 + t * 16);
    Multipliers multipliers = {};
    if (Math::kMultiplied) {
        const uint32_t at = stage + Layout::kMultipliers + 4 * row;
        multipliers = {load_shared<uint32_t>(at), load_shared<uint32_t>(at + 4 * 8)};
    }
    Bytes16 x[kTiles][Math::kLoads];
    BK_UNROLL
    for (int n = 0; n < kTiles; ++n) {
        BK_UNROLL
        for (int i = 0; i < Math::kLoads; ++i) {
            const uint32_t own = token + static_cast<uint32_t>(8 * n);
            const uint32_t chunk = t * Math::kBytes + static_cast<uint32_t>(i % Math::kBytes);
            const uint32_t plane = static_cast<uint32_t>(i / Math::kBytes) * Layout::kPlaneBytes;
            x[n][i] = load_shared<Bytes16>(stage + Layout::kWeightBytes + plane + own * Layout::kRowBytes +
                                           swizzle<Math::kBytes>(own, chunk) * 16);
        }
    }
    Math::multiply_block(low, high, multipliers, x, sums);
}

// Adds this lane's terms of a group to its totals; nothing where there is no output.
template <typename Math, int kTiles, typename Params>
BK_DEVICE void add_group(const Params &p, int64_t first_row, int64_t first_token, int column,
                         typename Math::Sum (&sums)[Math::kLanes][kTiles][4],
                         float (&totals)[Math::kLanes][kTiles][4]) {
    const int warp = thread_x() / kWarp, g = thread_x() % kWarp / 4, t = thread_x() % 4;
    BK_UNROLL
    for (int lane = 0; lane < Math::kLanes; ++lane) {
        BK_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            BK_UNROLL
            for (int c = 0; c < 4; ++c) {
                const int64_t row = first_row + warp / 2 * 16 + g + c / 2 * 8, output = row + lane * p.weight_rows;
                const int64_t m = first_token + warp % 2 * 8 * kTiles + 8 * n + 2 * t + c % 2;
                if (row < p.weight_rows && output < p.N && m < p.M) {
                    float &total = totals[lane][n][c];
                    total = add(total, group_term<Math>(p, sums[lane][n][c], lane, m, output, column));
                }
                sums[lane][n][c] = 0;
            }
        }
    }
}

// Writes one lane's values to shared memory as finish_tile reads them.
template <typename Tile, int kTiles, typename T>
BK_DEVICE void stage_tile(const T (&values)[kTiles][4]) {
    const int warp = thread_x() / kWarp, g = thread_x() % kWarp / 4, t = thread_x() % 4;
    BK_UNROLL
    for (int n = 0; n < kTiles; ++n) {
        BK_UNROLL
        for (int c = 0; c < 4; ++c) {
            const int row = warp / 2 * 16 + g + c / 2 * 8, token = warp % 2 * 8 * kTiles + 8 * n + 2 * t + c % 2;
            store_shared(Tile::at(token, row), values[n][c]);
        }
    }
}

// The outputs of kManyRows packed rows and a tile of tokens, or a share of K of their sums.
template <typename Math, int kTiles, bool kGrouped, typename Params>
BK_DEVICE void many_tile(const Params &p, int64_t first_row, int64_t first_token, int split) {
    using Sum = typename Math::Sum;
    using Layout = ManyLayout<Math, kTiles>;
    using Tile = typename Layout::Tile;
    constexpr int kStages = Layout::kStages;
    const int32_t first = static_cast<int32_t>(static_cast<int64_t>(p.blocks) * split / p.splits);
    const int32_t last = static_cast<int32_t>(static_cast<int64_t>(p.blocks) * (split + 1) / p.splits);

    BK_UNROLL
    for (int s = 0; s < kStages - 1; ++s) {
        if (first + s < last) {
            load_stage<Math, kTiles>(p, first_row, first_token, first + s,
                                     static_cast<uint32_t>(s) * Layout::kStageBytes);
        }
        commit_async();
    }
    Sum sums[Math::kLanes][kTiles][4] = {};
    float totals[kGrouped ? Math::kLanes : 1][kTiles][4] = {};
    int stage = 0, column = 0, in_group = 0;
    for (int32_t b = first; b < last; ++b) {
        // This thread's copies of block b are there; after the barrier everyone's are, and all have read block b - 1,
        // whose stage is filled next.
        wait_async<kStages - 2>();
        sync_block();
        const int32_t next = b + kStages - 1;
        if (next < last) {
            const int into = stage == 0 ? kStages - 1 : stage - 1;
            load_stage<Math, kTiles>(p, first_row, first_token, next,
                                     static_cast<uint32_t>(into) * Layout::kStageBytes);
        }
        commit_async();
        multiply_stage<Math, kTiles>(static_cast<uint32_t>(stage) * Layout::kStageBytes, sums);
        stage = stage + 1 == kStages ? 0 : stage + 1;
        if constexpr (kGrouped) {
            if (++in_group == p.group_blocks) {
                add_group<Math, kTiles>(p, first_row, first_token, column, sums, totals);
                in_group = 0;
                ++column;
            }
        }
    }
    BK_UNROLL
    for (int lane = 0; lane < Math::kLanes; ++lane) {
        sync_block();  // the last stage has been read, or the tile of the lane before
        if constexpr (kGrouped) {
            stage_tile<Tile>(totals[lane]);
        } else {
            stage_tile<Tile>(sums[lane]);
        }
        sync_block();
        finish_tile<Math, kGrouped, kManyThreads, Layout::kTokens, kManyRows>(p, 0, first_row, first_token, lane,
                                                                              split);
    }
}

template <typename Math, int kTiles, bool kGrouped>
BK_KERNEL(kManyThreads)
many_kernel(MatmulParams p) {
    begin();
    const int64_t row_tiles = (p.weight_rows + kManyRows - 1) / kManyRows;
    const int64_t first_row = block_x() % row_tiles * kManyRows;
    const int64_t first_token = block_x() / row_tiles * ManyLayout<Math, kTiles>::kTokens;
    many_tile<Math, kTiles, kGrouped>(p, first_row, first_token, block_y());
}

}  // namespace bitlab

#endif
