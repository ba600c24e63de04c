// Many tokens on a GPU that has wgmma: t2 weights in rows aligned to 16 bytes, int8 codes; groups with multipliers.
//
// A block makes 64 packed rows (256 outputs) of 64 tokens: with one warpgroup, two blocks to a multiprocessor; or,
// where that would leave multiprocessors idle, with two warpgroups, which take every other 128 columns each and add up
// their sums. Rows and tokens come to shared memory by cp.async, 128 columns of each warpgroup a step. A warpgroup's
// wgmma takes A from registers: the packed bytes of 64 rows under one of four masks, so each mask has 64 x 64 sums of
// its own and no weight is ever unpacked in memory; and B, the tokens, from shared memory. While the wgmma of one block
// of 64 columns run, the bytes of the next are loaded and masked. With multipliers they are not masked but multiplied,
// which is a shift, a mask and a multiplication with addition for each register (matmul.cuh, MultipliedCodes); the
// words of multipliers of 64 rows come along, one for each row and 64 columns.
//
// The registers of A are those of mma.m16n8k32, which want bytes 4 t and 16 + 4 t of 32 columns; as elsewhere a lane
// takes 16 bytes in a row instead, at columns 16 t of 64. Tensor cores read B by themselves, so here the tokens' codes
// must lie in that order in memory: quantize_kernel writes them so (activations.cuh, place_of_column).
//
// Rejected: waiting for all wgmma before each barrier, so that three stages would do: the tensor cores would stand idle
// at every stage. A stage is filled again two steps after it was multiplied, when one wait that leaves the newest group
// running has shown that nothing reads it. Two warpgroups with rows of their own that share the tokens: a third less to
// read from L2, but an H200 was 3 % slower at K = 4096, where no other block multiplies while one stores its outputs.
#ifndef BITLAB_CUDA_WGMMA_CUH
#define BITLAB_CUDA_WGMMA_CUH

#include "epilogue.cuh"

namespace bitlab {

constexpr int kWarpgroup = 128;
constexpr int kWgmmaTokens = 64;
constexpr int kWgmmaColumns = 128;  // of a part: 128 bytes of each row and each token

// kGroups: warpgroups of a block.
template <int kGroups, bool kMultiplied>
struct WgmmaLayout {
    static constexpr int kThreads = kWarpgroup * kGroups;
    static constexpr int kRows = 64;
    static constexpr uint32_t kWeightBytes = kRows * kWgmmaColumns;
    static constexpr uint32_t kPartBytes = kWeightBytes + kWgmmaTokens * kWgmmaColumns;
    static constexpr uint32_t kStageBytes = kGroups * kPartBytes;
    // A multiprocessor's registers hold two warpgroups, so 192 KiB are shared by two.
    static constexpr int kStages = 96 * 1024 * kGroups / kStageBytes;
    static constexpr uint32_t kStagesBytes = kStages * kStageBytes;
    // After the stages, so that those begin at powers of two: for each part the words of 64 rows, twice.
    static constexpr uint32_t kMultiplierBytes = 2 * kRows * 4;
    static constexpr uint32_t kBytes = kStagesBytes + (kMultiplied ? kStages * kGroups * kMultiplierBytes : 0);
    using Tile = SumTile<kWgmmaTokens, kRows>;
    static_assert(4 * Tile::kBytes <= kStagesBytes, "the sums of all masks fit where the stages were");
    static_assert(kBytes <= kLargeSharedBytes, "shared memory of a block");

    // Where the words of the part at an offset lie.
    static BK_DEVICE uint32_t multipliers_at(uint32_t part) {
        return kStagesBytes + part / (kPartBytes / kMultiplierBytes);
    }
};

// Where the 16-byte chunk of a packed row lies in the row: eight lanes read four chunks of two rows at once.
BK_DEVICE uint32_t weight_chunk(uint32_t row, uint32_t chunk) { return chunk ^ (row % 2 * 4); }

// Where the 16-byte chunk of a token lies in its 128 bytes: the 128-byte swizzle of the PTX ISA.
BK_DEVICE uint32_t token_chunk(uint32_t token, uint32_t chunk) { return chunk ^ (token % 8); }

// The matrix descriptor of 64 tokens at an offset of shared memory: rows of 128 bytes, the swizzle above, 1024 bytes
// from eight rows to the next eight. Tiles begin at multiples of 1024; columns are added to the offset.
BK_DEVICE uint64_t token_descriptor(uint32_t offset) {
    constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = 1024 / 16, kUnused = 1;
    return kSwizzle128 | kEightRows << 32 | kUnused << 16 | (shared_address(offset) & 0x3FFFF) / 16;
}

// What a thread copies to every stage: 16 bytes of each of some packed rows and tokens, in bytes from the first column
// of the block's first row or token (scattered ones have one tile, whose first token is 0). Rows and tokens past the
// end repeat the last one.
template <typename Layout, int kGroups, bool kMultiplied>
struct WgmmaCopies {
    static constexpr int kAtOnce = Layout::kThreads / 8;
    static constexpr int kRowCopies = Layout::kRows / kAtOnce, kTokenCopies = kWgmmaTokens / kAtOnce;

    const uint8_t *rows, *tokens;
    uint32_t row[kRowCopies], token[kTokenCopies];
    uint32_t to_row, to_token;  // in a stage, of the first of each; the others follow kAtOnce rows apart
    int32_t row_end, token_end;
    const uint32_t *multipliers;  // of this thread's row
    int64_t multiplier_rows;
    int32_t group_shift;

    template <typename Params>
    BK_DEVICE WgmmaCopies(const Params &p, int64_t first_row, int64_t first_token)
        : rows(p.weight + first_row * p.K),
          tokens(p.x + first_token * p.x_stride),
          row_end(p.K),
          token_end(64 * p.blocks),
          multipliers(nullptr),
          multiplier_rows(p.multiplier_rows),
          group_shift(p.group_shift) {
        const int r = thread_x() / 8;
        if (kMultiplied) {
            const int64_t own = first_row + thread_x() % Layout::kRows;
            multipliers = p.multipliers + (own < p.weight_rows ? own : p.weight_rows - 1);
        }
        BK_UNROLL
        for (int i = 0; i < kRowCopies; ++i) {
            row[i] = static_cast<uint32_t>(at_most(r + i * kAtOnce, p.weight_rows - first_row) * p.K);
        }
        BK_UNROLL
        for (int i = 0; i < kTokenCopies; ++i) {
            const int64_t at = p.token(first_token + at_most(r + i * kAtOnce, p.M - first_token));
            token[i] = static_cast<uint32_t>((at - first_token) * p.x_stride);
        }
        // kAtOnce is a multiple of eight, so the chunk lies alike in all.
        const uint32_t at = static_cast<uint32_t>(r), chunk = static_cast<uint32_t>(thread_x() % 8);
        to_row = at * kWgmmaColumns + weight_chunk(at, chunk) * 16;
        to_token = Layout::kWeightBytes + at * kWgmmaColumns + token_chunk(at, chunk) * 16;
    }

    static BK_DEVICE int64_t at_most(int r, int64_t count) { return r < count ? r : count - 1; }

    // Starts the copies of a step to a stage; of zeros from step `last` on. A branch instead of the zeros, between
    // wgmma that run, makes ptxas wait for each of them.
    BK_DEVICE void start(int32_t step, int32_t last, uint32_t stage) const {
        BK_UNROLL
        for (int part = 0; part < kGroups; ++part) {
            const int32_t column = kWgmmaColumns * (kGroups * step + part) + 16 * (thread_x() % 8);
            const int32_t k = step < last ? column : 0x7FFFFFFF;
            const uint8_t *from_rows = rows + (k < row_end ? k : 0), *from_tokens = tokens + (k < token_end ? k : 0);
            const uint32_t to = stage + static_cast<uint32_t>(part) * Layout::kPartBytes;
            BK_UNROLL
            for (int i = 0; i < kRowCopies; ++i) {
                copy_async_16(to + to_row + static_cast<uint32_t>(i * kAtOnce * kWgmmaColumns), from_rows + row[i],
                              k < row_end ? 16 : 0);
            }
            BK_UNROLL
            for (int i = 0; i < kTokenCopies; ++i) {
                copy_async_16(to + to_token + static_cast<uint32_t>(i * kAtOnce * kWgmmaColumns),
                              from_tokens + token[i], k < token_end ? 16 : 0);
            }
        }
        if (kMultiplied) {
            // Every thread has one of kGroups * 2 * 64 words.
            const int32_t block = 2 * kGroups * step + thread_x() / Layout::kRows;
            const bool valid = step < last && 64 * block < row_end;
            copy_async_4(Layout::multipliers_at(stage) + 4u * static_cast<uint32_t>(thread_x()),
                         multipliers + (valid ? block >> group_shift : 0) * multiplier_rows, valid ? 4 : 0);
        }
    }
};

#if BK_HAS_WGMMA
// Multiplies 64 of a part's columns, `half` 0 or 1. Until the wait of the next but one call, `a` may not be touched.
template <typename Layout, bool kMultiplied>
BK_DEVICE void multiply_half(uint32_t part, int half, bool is_first, uint32_t (&a)[2][4][4], int32_t (&sums)[4][32]) {
    const uint32_t thread = static_cast<uint32_t>(thread_x() % kWarpgroup);
    const uint32_t row = thread / kWarp * 16 + thread % kWarp / 4, t = thread % 4;
    const uint32_t from = part + row * kWgmmaColumns + weight_chunk(row, 4u * static_cast<uint32_t>(half) + t) * 16;
    const Bytes16 low = load_shared<Bytes16>(from);
    const Bytes16 high = load_shared<Bytes16>(from + 8 * kWgmmaColumns);
    Multipliers multipliers = {};
    if (kMultiplied) {
        const uint32_t at = Layout::multipliers_at(part) + 4 * (static_cast<uint32_t>(half) * Layout::kRows + row);
        multipliers = {load_shared<uint32_t>(at), load_shared<uint32_t>(at + 4 * 8)};
    }
    // The group that read these registers is done; the newest one, which reads the others, runs on.
    wgmma_wait<1>();
    BK_UNROLL
    for (int lane = 0; lane < 4; ++lane) {
        const uint32_t mask = lane_mask(lane);
        const MultipliedCodes near(multipliers.low, lane), far(multipliers.high, lane);
        BK_UNROLL
        for (int h = 0; h < 2; ++h) {
            BK_UNROLL
            for (int i = 0; i < 2; ++i) {
                const uint32_t near_word = low.word[2 * h + i], far_word = high.word[2 * h + i];
                a[h][lane][2 * i] = kMultiplied ? near.bytes(near_word, lane) : near_word & mask;
                a[h][lane][2 * i + 1] = kMultiplied ? far.bytes(far_word, lane) : far_word & mask;
            }
        }
    }
    wgmma_fence();
    BK_UNROLL
    for (int h = 0; h < 2; ++h) {
        const uint64_t tokens = token_descriptor(part + Layout::kWeightBytes + 64u * static_cast<uint32_t>(half) +
                                                 32u * static_cast<uint32_t>(h));
        BK_UNROLL
        for (int lane = 0; lane < 4; ++lane) {
            const bool onto = h == 1 || !is_first;
            if (kMultiplied) {
                wgmma_u8s8_wrapping(sums[lane], a[h][lane], tokens, onto);
            } else {
                wgmma_u8s8(sums[lane], a[h][lane], tokens, onto);
            }
        }
    }
    wgmma_commit();
}
#endif

// Where sum i of this thread lies in a tile.
template <typename Tile>
BK_DEVICE uint32_t wgmma_sum_at(int i) {
    const int thread = thread_x() % kWarpgroup, g = thread % kWarp / 4, t = thread % 4;
    return Tile::at(i / 4 * 8 + 2 * t + i % 2, thread / kWarp * 16 + g + i % 4 / 2 * 8);
}

#if BK_HAS_WGMMA
// The outputs of 64 packed rows and 64 tokens, or a share of K of their sums.
template <int kGroups, bool kMultiplied, typename Params>
BK_DEVICE void wgmma_tile(const Params &p, int64_t first_row, int64_t first_token, int split) {
    using Layout = WgmmaLayout<kGroups, kMultiplied>;
    using Math = typename Pick<kMultiplied, TernaryInt8Multiplied, TernaryInt8>::Type;
    using Tile = typename Layout::Tile;
    constexpr int kAhead = Layout::kStages - 2;
    const int64_t steps = (p.blocks + 2 * kGroups - 1) / (2 * kGroups);
    const int32_t first = static_cast<int32_t>(steps * split / p.splits);
    const int32_t last = static_cast<int32_t>(steps * (split + 1) / p.splits);
    // The shuffle tells the compiler that a warp has one value, which descriptors need.
    const int group = shuffle(thread_x() / kWarpgroup, 0);
    const uint32_t group_part = kGroups > 1 ? static_cast<uint32_t>(group) * Layout::kPartBytes : 0;

    const WgmmaCopies<Layout, kGroups, kMultiplied> copies(p, first_row, first_token);
    BK_UNROLL
    for (int s = 0; s < kAhead; ++s) {
        copies.start(first + s, last, static_cast<uint32_t>(s) * Layout::kStageBytes);
        commit_async();
    }
    int32_t sums[4][32];
    uint32_t a[2][2][4][4];
    uint32_t stage = 0, into = kAhead * Layout::kStageBytes;
    for (int32_t step = first; step < last; ++step) {
        // This thread's copies of this step are there, and shown to the tensor cores; after the barrier everyone's are,
        // and all have waited for the wgmma of the step before last, whose stage is filled next.
        wait_async<kAhead - 1>();
        fence_async_proxy();
        sync_block();
        multiply_half<Layout, kMultiplied>(stage + group_part, 0, step == first, a[0], sums);
        // Here, not right after the barrier: the tensor cores have the first half to do meanwhile.
        copies.start(step + kAhead, last, into);
        commit_async();
        multiply_half<Layout, kMultiplied>(stage + group_part, 1, false, a[1], sums);
        stage = stage + Layout::kStageBytes == Layout::kStagesBytes ? 0 : stage + Layout::kStageBytes;
        into = into + Layout::kStageBytes == Layout::kStagesBytes ? 0 : into + Layout::kStageBytes;
    }
    wgmma_wait<0>();
    wait_async<0>();
    BK_UNROLL
    for (int lane = 0; lane < 4; ++lane) wgmma_take(sums[lane]);
    sync_block();
    // One of two warpgroups writes the tiles of two masks, then adds its sums to the other two.
    BK_UNROLL
    for (int lane = 0; lane < 4; ++lane) {
        if (kGroups > 1 && lane / 2 == group) continue;
        BK_UNROLL
        for (int i = 0; i < 32; ++i) {
            store_shared(static_cast<uint32_t>(lane) * Tile::kBytes + wgmma_sum_at<Tile>(i), sums[lane][i]);
        }
    }
    sync_block();
    if (kGroups > 1) {
        BK_UNROLL
        for (int lane = 0; lane < 4; ++lane) {
            if (lane / 2 != group) continue;
            BK_UNROLL
            for (int i = 0; i < 32; ++i) {
                const uint32_t at = static_cast<uint32_t>(lane) * Tile::kBytes + wgmma_sum_at<Tile>(i);
                store_shared(at, add(load_shared<int32_t>(at), sums[lane][i]));
            }
        }
        sync_block();
    }
    BK_NO_UNROLL
    for (int lane = 0; lane < 4; ++lane) {
        finish_tile<Math, false, Layout::kThreads, kWgmmaTokens, Layout::kRows>(
            p, static_cast<uint32_t>(lane) * Tile::kBytes, first_row, first_token, lane, split);
    }
}
#endif

template <int kGroups, bool kMultiplied>
BK_KERNEL(WgmmaLayout<kGroups, kMultiplied>::kThreads)
wgmma_kernel(MatmulParams p) {
#if BK_HAS_WGMMA
    begin();
    constexpr int kRows = WgmmaLayout<kGroups, kMultiplied>::kRows;
    const int64_t row_tiles = (p.weight_rows + kRows - 1) / kRows;
    const int64_t first_row = block_x() % row_tiles * kRows, first_token = block_x() / row_tiles * kWgmmaTokens;
    wgmma_tile<kGroups, kMultiplied>(p, first_row, first_token, block_y());
#endif
}

}  // namespace bitlab

#endif
