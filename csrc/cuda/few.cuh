// Few tokens, 1 to 16: y = x @ w.T, read once at the speed of memory.
//
// A block of eight warps takes 16 packed rows (64 outputs); its warps take turns at blocks of 64 columns, straight from
// global memory to mma fragments, without shared memory, each with kDepth blocks in flight. Then the eight sums of each
// output meet in shared memory and are added in the order of the warps. Where rows are too few to fill the chip, K is
// split over the grid's y as well (split_kernel adds the shares). Per group, a warp takes a whole group at a time, and
// the terms of eight groups are added in ascending order before the next eight, or are left to split_kernel. With
// multipliers a block of 64 columns brings those of its group along, two words a lane, and sums stay plain.
#ifndef BITLAB_CUDA_FEW_CUH
#define BITLAB_CUDA_FEW_CUH

#include "matmul.cuh"

namespace bitlab {

constexpr int kFewThreads = 256;
constexpr int kFewWarps = kFewThreads / kWarp;
constexpr int kFewRows = 16;

template <typename Math, int kTiles>
constexpr uint32_t few_shared_bytes() {
    return kFewWarps * Math::kLanes * kFewRows * 8 * kTiles * 4;
}

template <typename Math, int kTiles>
struct FewOperands {
    Bytes16 low, high;
    Multipliers multipliers;
    Bytes16 x[kTiles][Math::kLoads];
};

// The packed rows g and g + 8 of a lane, and where their multipliers begin.
struct FewRows {
    const uint8_t *low, *high;
    const uint32_t *low_multipliers, *high_multipliers;
};

// Block b of this lane's rows and tokens; zero if b is not before `last`.
template <typename Math, int kTiles>
BK_DEVICE void load_operands(const MatmulParams &p, FewRows rows, const uint8_t *const (&tokens)[kTiles], int32_t b,
                             int32_t last, FewOperands<Math, kTiles> &operands) {
    if (b >= last) {
        operands = {};
        return;
    }
    const int32_t k = 64 * b + 16 * (thread_x() % 4);
    operands.low = load_weight_16(rows.low, k, p);
    operands.high = load_weight_16(rows.high, k, p);
    if (Math::kMultiplied) {
        const int64_t of_group = multipliers_of_block(p, b);
        operands.multipliers = {load_global(rows.low_multipliers + of_group),
                                load_global(rows.high_multipliers + of_group)};
    }
    BK_UNROLL
    for (int n = 0; n < kTiles; ++n) {
        BK_UNROLL
        for (int i = 0; i < Math::kLoads; ++i) {
            const uint8_t *x = tokens[n] + i / Math::kBytes * p.x_plane + k * Math::kBytes + 16 * (i % Math::kBytes);
            operands.x[n][i] = load_global(reinterpret_cast<const Bytes16 *>(x));
        }
    }
}

template <typename Math, int kTiles, int kDepth>
BK_DEVICE void multiply_range(const MatmulParams &p, FewRows rows, const uint8_t *const (&tokens)[kTiles],
                              int32_t first, int32_t last, int32_t step,
                              typename Math::Sum (&sums)[Math::kLanes][kTiles][4]) {
    // As soon as a block is multiplied, the one kDepth steps further on is loaded in its place.
    FewOperands<Math, kTiles> operands[kDepth];
    BK_UNROLL
    for (int d = 0; d < kDepth; ++d) {
        load_operands<Math, kTiles>(p, rows, tokens, first + d * step, last, operands[d]);
    }
    for (int32_t b = first; b < last; b += step * kDepth) {
        BK_UNROLL
        for (int d = 0; d < kDepth; ++d) {
            Math::multiply_block(operands[d].low, operands[d].high, operands[d].multipliers, operands[d].x, sums);
            load_operands<Math, kTiles>(p, rows, tokens, b + (kDepth + d) * step, last, operands[d]);
        }
    }
}

// Blocks at once on a multiprocessor that ptxas is told of, or 0: without a word it gives int8 codes with multipliers
// more registers than two blocks have.
template <typename Math>
constexpr int kFewBlocks = Math::kMultiplied && Math::kIsInteger ? 2 : 0;

// The outputs of kFewRows packed rows and all tokens, or a share of K of their sums. kShares: the terms of groups go to
// `partial`, and no block has more than its share of them.
template <typename Math, int kTiles, bool kGrouped, bool kShares, typename Params>
BK_DEVICE void few_tile(const Params &p, int64_t first_row, int split) {
    using Sum = typename Math::Sum;
    // A group of 64 or 128 has no more blocks than two; shares have many warps at work, and no registers to spare.
    constexpr int kMost = kShares ? 1 : kGrouped ? 2 : kFewBlocks<Math> && kTiles > 1 ? 2 : Math::kDepth;
    constexpr int kDepth = Math::kDepth < kMost ? Math::kDepth : kMost;
    constexpr int kTokens = 8 * kTiles;
    constexpr int kOutputs = Math::kLanes * kFewRows * kTokens;
    constexpr int kOwn = (kOutputs + kFewThreads - 1) / kFewThreads;
    const int thread = thread_x(), warp = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
    // Rows and tokens past the end repeat the last one; their sums are dropped.
    const int64_t most = p.weight_rows - 1;
    const int64_t low_row = first_row + g < most ? first_row + g : most;
    const int64_t high_row = first_row + g + 8 < most ? first_row + g + 8 : most;
    FewRows lane_rows = {p.weight + low_row * p.K, p.weight + high_row * p.K, nullptr, nullptr};
    if (Math::kMultiplied) {
        lane_rows.low_multipliers = p.multipliers + low_row;
        lane_rows.high_multipliers = p.multipliers + high_row;
    }
    const uint8_t *tokens[kTiles];
    BK_UNROLL
    for (int n = 0; n < kTiles; ++n) tokens[n] = p.x + p.token(8 * n + g < p.M ? 8 * n + g : p.M - 1) * p.x_stride;

    const int all_rounds = kGrouped ? (p.columns + kFewWarps - 1) / kFewWarps : 1;
    const int first_round = kShares ? all_rounds * split / p.splits : 0;
    const int rounds = kShares ? all_rounds * (split + 1) / p.splits : all_rounds;
    float totals[kOwn] = {};
    for (int round = first_round; round < rounds; ++round) {
        Sum sums[Math::kLanes][kTiles][4] = {};
        if (kGrouped) {
            const int32_t first = (round * kFewWarps + warp) * p.group_blocks;
            const int32_t last = first < p.blocks ? first + p.group_blocks : first;
            multiply_range<Math, kTiles, kDepth>(p, lane_rows, tokens, first, last, 1, sums);
        } else {
            const int32_t first = static_cast<int32_t>(static_cast<int64_t>(p.blocks) * split / p.splits);
            const int32_t last = static_cast<int32_t>(static_cast<int64_t>(p.blocks) * (split + 1) / p.splits);
            multiply_range<Math, kTiles, kDepth>(p, lane_rows, tokens, first + warp, last, kFewWarps, sums);
        }
        BK_UNROLL
        for (int lane = 0; lane < Math::kLanes; ++lane) {
            BK_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                BK_UNROLL
                for (int c = 0; c < 4; ++c) {
                    const int row = g + c / 2 * 8, token = 8 * n + 2 * t + c % 2;
                    const int output = (lane * kFewRows + row) * kTokens + token;
                    store_shared(4u * static_cast<uint32_t>(warp * kOutputs + output), sums[lane][n][c]);
                }
            }
        }
        sync_block();
        BK_UNROLL
        for (int own = 0; own < kOwn; ++own) {
            const int output = own * kFewThreads + thread;
            const int lane = output / (kFewRows * kTokens);
            const int64_t row = first_row + output / kTokens % kFewRows, n = row + lane * p.weight_rows;
            const int64_t m = output % kTokens;
            if (output >= kOutputs || row >= p.weight_rows || n >= p.N || m >= p.M) continue;
            const uint32_t at = 4u * static_cast<uint32_t>(output);
            if (kGrouped) {
                float *terms = static_cast<float *>(p.partial) + (round * kFewWarps * p.M + m) * p.N + n;
                for (int w = 0; w < kFewWarps && round * kFewWarps + w < p.columns; ++w) {
                    const Sum sum = load_shared<Sum>(at + 4u * static_cast<uint32_t>(w * kOutputs));
                    const int column = round * kFewWarps + w;
                    const float term = group_term<Math>(p, sum, lane, m, n, column);
                    if (kShares) {
                        store_global(terms, term);
                        terms += p.M * p.N;
                    } else {
                        totals[own] = add(totals[own], term);
                    }
                }
                if (!kShares && round == rounds - 1) finish_value(p, m, n, scaled_groups<Math>(p, m, totals[own]));
            } else {
                Sum sum = load_shared<Sum>(at);
                BK_UNROLL
                for (int w = 1; w < kFewWarps; ++w) {
                    sum = add(sum, load_shared<Sum>(at + 4u * static_cast<uint32_t>(w * kOutputs)));
                }
                finish_share<Math>(p, m, n, sum, lane, split);
            }
        }
        if (kGrouped) sync_block();
    }
}

template <typename Math, int kTiles, bool kGrouped, bool kShares>
BK_KERNEL(kFewThreads, kFewBlocks<Math>)
few_kernel(MatmulParams p) {
    const int64_t first_row = block_x() * kFewRows;
    // While earlier kernels, the one that makes the codes among them, still run.
    start_next();
    const int64_t rows = p.weight_rows - first_row < kFewRows ? p.weight_rows - first_row : kFewRows;
    prefetch_rows<kFewThreads>(p.weight + first_row * p.K, rows * p.K);
    wait_for_previous();
    few_tile<Math, kTiles, kGrouped, kShares>(p, first_row, block_y());
}

}  // namespace bitlab

#endif
