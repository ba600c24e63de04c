// Few tokens in one launch, on a GPU that has clusters: x to codes, products, and the sum over the shares of K.
//
// The eight blocks of a cluster split K. Each brings its columns of x to shared memory, sends the largest magnitude of
// every token to the other seven, knows all scales after one barrier of the cluster, and makes the codes of its own
// columns: no block needs another's. Then a team of 1, 2, 4 or 8 warps takes 16 packed rows (64 outputs) at a time. A
// warp's sums, over its part of K, go to the block that finishes these outputs, which adds the parts of all eight.
// They are integers, so their order does not matter; nothing is left in memory that a next launch would have to clear.
//
// The packed bytes go by cp.async to where the very lane that asked for them reads them, so no barrier is between:
// kFusedDepth blocks of 64 columns of each warp are on their way while the codes are made and while sums change hands.
// A block takes half of a multiprocessor's registers and, up to K = 8192, of its shared memory, so that the next
// kernel of the stream can start beside it and ask L2 for its weights.
//
// Rejected: every block with all of x (16 tokens of 8192 columns are 256 KB, twice what a block reads of the weights);
// shares of K that meet in global memory (a write, a read, and counters that must be zero again); codes from L2 (at 16
// tokens as many bytes as the weights).
#ifndef BITLAB_CUDA_FUSED_CUH
#define BITLAB_CUDA_FUSED_CUH

#include "activations.cuh"
#include "matmul.cuh"

namespace bitlab {

constexpr int kFusedThreads = 256;
constexpr int kFusedWarps = kFusedThreads / kWarp;
constexpr int kFusedRows = 16;  // packed rows of a team
constexpr int kFusedDepth = 5;

constexpr uint32_t kFusedSlotBytes = 2 * 16 * kFusedThreads;  // of packed rows
constexpr uint32_t kFusedWordBytes = 2 * 4 * kFusedThreads;   // of multipliers

// The tokens of a block, and its shared memory.
template <int kTiles, bool kMultiplied>
struct FusedLayout {
    static constexpr int kTokens = 8 * kTiles;
    // Of each token one for every warp, of all blocks, that has columns of it.
    static constexpr int kMaxima = kClusterBlocks * (kTokens > kFusedWarps ? kTokens : kFusedWarps);
    // A warp's sums for one block: four outputs or two of each lane.
    static constexpr uint32_t kPartBytes = kWarp * 8 * kTiles;
    static constexpr uint32_t kWords = kFusedDepth * kFusedSlotBytes;
    static constexpr uint32_t kSums = kWords + (kMultiplied ? kFusedDepth * kFusedWordBytes : 0);
    static constexpr uint32_t kMost = kSums + kFusedWarps * kClusterBlocks * kPartBytes;
    static constexpr uint32_t kCodeSums = kMost + 4 * kMaxima;
    static constexpr uint32_t kScales = kCodeSums + 4 * kMaxima;
    static constexpr uint32_t kMostInbox = kScales + 64, kSumsInbox = kMostInbox + 8;
    static constexpr uint32_t kTokensAt = kScales + 128;
    static constexpr uint32_t kTokenBytes = 128;  // of 64 columns
    static_assert(kTokensAt % 128 == 0, "tokens lie on banks as they are counted");

    static constexpr int64_t bytes(int64_t K) {
        const int64_t most_blocks = ((K + 63) / 64 + kClusterBlocks - 1) / kClusterBlocks;
        return kTokensAt + most_blocks * kTokens * kTokenBytes;
    }

    // Where 64 columns of a token lie, the block's `b`-th: 128 bytes of x, of which the codes then take one half. The
    // halves alternate, so that the eight lanes of a load, at two neighbouring tokens, meet all banks.
    static BK_DEVICE uint32_t token_at(int32_t b, int token) {
        return kTokensAt + static_cast<uint32_t>(b * kTokens + token) * kTokenBytes;
    }
    static BK_DEVICE uint32_t codes_at(int32_t b, int token) {
        return token_at(b, token) + static_cast<uint32_t>(token % 2) * 64;
    }
};

struct FusedParams {
    MatmulParams matmul;  // x, x_sums and x_scale are null
    const uint16_t *x;    // [M, x_stride], rows aligned to 16 bytes
    int64_t x_stride;
    int32_t x_type;
    bool per_tensor;
    const uint8_t *multiplier;   // [N, multiplier_columns], every four of a row aligned; or null
    int32_t multiplier_columns;  // a multiple of four
    int32_t team;                // warps to kFusedRows packed rows
    int32_t steps;               // so many times each team takes some
};

// The packed bytes that a lane multiplies, two rows of a block of 64 columns at a time, in order. Multipliers come
// along four groups at a time, those of its own mask for either row; the four lanes of a row then put their bytes
// together.
template <bool kMultiplied>
struct FusedStream {
    int64_t row, next_rows;                     // this lane's first row; from that of a step to the next one's
    int32_t k, first_k, last_k, end_k, step_k;  // its column; the warp's are before last_k, those of K before end_k
    const uint8_t *low;                         // the row's bytes; the other row is eight further on
    bool has_low, has_high;
    uint32_t slot;  // the oldest: to be multiplied, then filled again

    // Where this lane's bytes of a slot begin; those of its other row are kFusedThreads * 16 further on.
    BK_DEVICE uint32_t bytes_at() const { return slot * kFusedSlotBytes + 16u * static_cast<uint32_t>(thread_x()); }

    // Where its multipliers of the slot's block are, if that brings some; those of the other row as above.
    BK_DEVICE uint32_t words_at() const {
        return FusedLayout<1, true>::kWords + slot * kFusedWordBytes + 4u * static_cast<uint32_t>(thread_x());
    }

    // Whether the block of 64 columns at `of` has its four groups' multipliers come with it: the warp's block before
    // has others.
    BK_DEVICE bool brings_words(const MatmulParams &p, int32_t of) const {
        return of == first_k || of / 256 >> p.group_shift != (of - step_k) / 256 >> p.group_shift;
    }

    BK_DEVICE void begin_row(const MatmulParams &p) {
        low = p.weight + row * p.K;
        has_low = row < p.weight_rows;
        has_high = row + 8 < p.weight_rows;
    }

    // Starts the copies of the block that comes next. Rows past the end are zeros.
    BK_DEVICE void copy(const FusedParams &q) {
        const MatmulParams &p = q.matmul;
        const bool inside = k < end_k, near = inside && has_low, far = inside && has_high;
        copy_async_16(bytes_at(), near ? low + k : p.weight, near ? 16 : 0);
        copy_async_16(bytes_at() + 16 * kFusedThreads, far ? low + 8 * static_cast<int64_t>(p.K) + k : p.weight,
                      far ? 16 : 0);
        if (kMultiplied && brings_words(p, k)) {
            const int64_t n = row + k % 64 / 16 * p.weight_rows;
            const uint8_t *from = q.multiplier + n * q.multiplier_columns + (k / 256 >> p.group_shift) * 4;
            const bool near_word = near && n < p.N, far_word = far && n + 8 < p.N;
            copy_async_4(words_at(), near_word ? from : q.multiplier, near_word ? 4 : 0);
            copy_async_4(words_at() + 4 * kFusedThreads,
                         far_word ? from + 8 * static_cast<int64_t>(q.multiplier_columns) : q.multiplier,
                         far_word ? 4 : 0);
        }
        commit_async();
        slot = slot + 1 == kFusedDepth ? 0 : slot + 1;
        k += step_k;
        if (k >= last_k) {
            k = first_k;
            row += next_rows;
            begin_row(p);
        }
    }
};

// What a thread quantizes: eight columns of one token every `step`.
struct FusedToken {
    int token;
    bool inside;  // there is such a token
    int32_t k;    // of the first eight columns; those of the block begin at `begin` and end before `end`
    int32_t step, begin, end;
    int lanes;     // of a warp that have this token
    int parts;     // warps that have it, of all blocks
    int own_part;  // this one of all parts of all tokens
};

#if BK_HAS_CLUSTERS
// `width` threads have a token, a power of two, so that all tokens have some.
BK_DEVICE FusedToken token_of_thread(int tokens, int32_t first, int32_t last) {
    int width = kFusedThreads;
    while (width * tokens > kFusedThreads) width /= 2;
    const int thread = thread_x(), token = thread / width, lanes = width < kWarp ? width : kWarp;
    const int warps = width / lanes, parts = warps * kClusterBlocks;
    const int own_part = token * parts + cluster_rank() * warps + thread % width / lanes;
    return {token, token < tokens, 64 * first + thread % width * 8, 8 * width, 64 * first, 64 * last, lanes,
            parts, own_part};
}

BK_DEVICE uint32_t most_of_lanes(uint32_t value, int lanes) {
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
        const uint32_t other = shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    return value;
}

// Gives a word of each warp's token to all blocks of the cluster.
BK_DEVICE void send_part(const FusedToken &own, uint32_t to, uint32_t value, uint32_t inbox) {
    const int lane = thread_x() % kWarp % own.lanes;
    if (own.inside && lane < kClusterBlocks) send(lane, to + 4u * static_cast<uint32_t>(own.own_part), value, inbox);
}

// The bytes of a lane's four, one of each mask, put together for all lanes of a row.
BK_DEVICE uint32_t multipliers_of_row(uint32_t four_groups, int group, int t) {
    uint32_t four_masks = (four_groups >> (8 * (group % 4)) & 255) << (8 * t);
    four_masks |= shuffle_xor(four_masks, 1);
    return four_masks | shuffle_xor(four_masks, 2);
}

// From x in shared memory to codes in its place, their sums on the way to all blocks, the scales of all tokens.
template <typename Layout>
BK_DEVICE void quantize_share(const FusedParams &q, const FusedToken &own, int tokens) {
    const auto load = [&](int32_t k, float(&values)[8]) {
        const uint32_t at = Layout::token_at((k - own.begin) / 64, own.token) + static_cast<uint32_t>(k % 64 * 2);
        decode_eight(load_shared<Bytes16>(at), q.x_type, values);
    };
    float values[8];
    uint32_t most = 0;
    for (int32_t k = own.k; own.inside && k < own.end; k += own.step) {
        load(k, values);
        most = most_of(values, most);
    }
    most = most_of_lanes(most, own.lanes);
    cluster_wait();  // all blocks have begun
    send_part(own, Layout::kMost, most, Layout::kMostInbox);
    wait_inbox(Layout::kMostInbox, 0);

    const int first = q.per_tensor ? 0 : own.token * own.parts, count = q.per_tensor ? tokens * own.parts : own.parts;
    most = 0;
    for (int i = thread_x() % own.lanes; own.inside && i < count; i += own.lanes) {
        const uint32_t other = load_shared<uint32_t>(Layout::kMost + 4u * static_cast<uint32_t>(first + i));
        most = other > most ? other : most;
    }
    const Scaling by = scaling_of(most_of_lanes(most, own.lanes));
    if (own.inside && own.k == own.begin) {
        store_shared(Layout::kScales + 4u * static_cast<uint32_t>(own.token), by.scale);
    }
    int32_t sum = 0;
    // All lanes take part in the barrier between the loads of 64 columns of x and the stores of their codes.
    for (int32_t begin = own.begin; begin < own.end; begin += own.step) {
        const int32_t k = own.k - own.begin + begin;
        const bool inside = own.inside && k < own.end;
        if (inside) load(k, values);
        sync_warp();
        if (inside) {
            const uint32_t at = Layout::codes_at((k - own.begin) / 64, own.token) + static_cast<uint32_t>(k % 64);
            store_shared(at, encode_eight(values, by, sum));
        }
    }
    for (int mask = own.lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    send_part(own, Layout::kCodeSums, static_cast<uint32_t>(sum), Layout::kSumsInbox);
}
#endif

template <typename Math, int kTiles>
BK_KERNEL(kFusedThreads, 2)
fused_kernel(FusedParams q) {
#if BK_HAS_CLUSTERS
    using Layout = FusedLayout<kTiles, Math::kMultiplied>;
    using Sum = typename Math::Sum;
    using Sums = typename Pick<kTiles == 1, Bytes8, Bytes16>::Type;
    const MatmulParams &p = q.matmul;
    const int thread = thread_x(), warp = thread / kWarp, lane = thread % kWarp, g = lane / 4, t = lane % 4;
    const int rank = cluster_rank(), teams = kFusedWarps / q.team, part = warp % q.team;
    const int32_t first = p.blocks * rank / kClusterBlocks, last = p.blocks * (rank + 1) / kClusterBlocks;
    const int64_t cluster = block_x() / kClusterBlocks, clusters = grid_x() / kClusterBlocks;
    const int64_t first_token = static_cast<int64_t>(block_y()) * Layout::kTokens, left = p.M - first_token;
    const int tokens = left < Layout::kTokens ? static_cast<int>(left) : Layout::kTokens;

    const FusedToken own = token_of_thread(tokens, first, last);
    // What this block finishes: the outputs of one mask, for every other token; with two tiles of tokens, nearly all of
    // which are there, what all lanes have.
    const int mask = rank % 4, parity = rank / 4;
    const auto has_token = [&](int odd) { return kTiles > 1 || 2 * t + odd < tokens; };
    const int pairs = kTiles > 1 ? 4 : (tokens + 1 - parity) / 2;
    const auto sums_bytes = static_cast<uint32_t>(pairs) * 8 * sizeof(Sums) * kFusedWarps * kClusterBlocks;
    if (thread == 0) {
        const auto word_bytes = static_cast<uint32_t>(4 * tokens * own.parts);
        open_inbox(Layout::kMostInbox);
        open_inbox(Layout::kSumsInbox);
        expect(Layout::kMostInbox, word_bytes);
        expect(Layout::kSumsInbox, word_bytes + sums_bytes);
    }
    cluster_arrive();
    start_next();
    // While earlier kernels still run: the rows of the first step to L2.
    const int64_t first_row = cluster * teams * kFusedRows;
    const int32_t lines = (last - first + 1) / 2;
    for (int i = 0, line = thread; i < kPrefetches && line < teams * kFusedRows * lines; ++i, line += kFusedThreads) {
        const int64_t row = first_row + line / lines;
        if (row < p.weight_rows) prefetch(p.weight + row * p.K + 64 * first + line % lines * 128);
    }
    wait_for_previous();

    // x comes first, for all waits for it; the weights are many more bytes.
    for (int32_t k = own.k; own.inside && k < own.end; k += own.step) {
        const uint32_t at = Layout::token_at(k / 64 - first, own.token) + static_cast<uint32_t>(k % 64 * 2);
        copy_async_16(at, k < p.K ? q.x + (first_token + own.token) * q.x_stride + k : q.x, k < p.K ? 16 : 0);
    }
    commit_async();
    FusedStream<Math::kMultiplied> stream = {};
    stream.row = first_row + warp / q.team * kFusedRows + g;
    stream.next_rows = clusters * teams * kFusedRows;
    stream.k = stream.first_k = 64 * (first + part) + 16 * t;
    stream.last_k = 64 * last;
    stream.end_k = stream.last_k < p.K ? stream.last_k : p.K;
    stream.step_k = 64 * q.team;
    stream.begin_row(p);
    BK_NO_UNROLL
    for (int d = 0; d < kFusedDepth; ++d) stream.copy(q);
    wait_async<kFusedDepth>();
    quantize_share<Layout>(q, own, tokens);
    sync_block();

    const bool finishes = warp < teams && has_token(parity);
    int32_t x_sum[kTiles] = {};
    float x_scale[kTiles] = {};
    for (int32_t step = 0; step < q.steps; ++step) {
        Sum sums[Math::kLanes][kTiles][4] = {};
        uint32_t near_words = 0, far_words = 0;
        for (int32_t b = first + part; b < last; b += q.team) {
            wait_async<kFusedDepth - 1>();
            const Bytes16 low = load_shared<Bytes16>(stream.bytes_at());
            const Bytes16 high = load_shared<Bytes16>(stream.bytes_at() + 16 * kFusedThreads);
            Bytes16 x[kTiles][1];
            BK_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                // Tokens past the end repeat the last one; their sums are dropped.
                const int token = 8 * n + g < tokens ? 8 * n + g : tokens - 1;
                x[n][0] = load_shared<Bytes16>(Layout::codes_at(b - first, token) + 16u * static_cast<uint32_t>(t));
            }
            Multipliers multipliers = {};
            if constexpr (Math::kMultiplied) {
                if (stream.brings_words(p, 64 * b + 16 * t)) {
                    near_words = load_shared<uint32_t>(stream.words_at());
                    far_words = load_shared<uint32_t>(stream.words_at() + 4 * kFusedThreads);
                }
                const int group = b >> p.group_shift;
                multipliers = {multipliers_of_row(near_words, group, t), multipliers_of_row(far_words, group, t)};
            }
            Math::template multiply_block<kTiles>(low, high, multipliers, x, sums);
            stream.copy(q);
        }

        const int64_t row = ((step * clusters + cluster) * teams + warp) * kFusedRows + g;
        float scale[2] = {};
        BK_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int64_t n = row + 8 * half + mask * p.weight_rows;
            if (finishes && n < p.N) scale[half] = load_global(p.weight_scale + (p.scale_rows == 1 ? 0 : n));
        }
        if (step > 0) cluster_wait();  // every block has read the sums of the step before
        const auto from_part = static_cast<uint32_t>((warp / q.team * kClusterBlocks + rank) * q.team + part);
        const uint32_t of_lane = Layout::kSums + static_cast<uint32_t>(lane) * sizeof(Sums);
        BK_UNROLL
        for (int to = 0; to < kClusterBlocks; ++to) {
            Sums values;
            BK_UNROLL
            for (int i = 0; i < 2 * kTiles; ++i) {
                values.word[i] = static_cast<uint32_t>(sums[to % 4][i / 2][i % 2 * 2 + to / 4]);
            }
            if (has_token(to / 4)) send(to, of_lane + from_part * Layout::kPartBytes, values, Layout::kSumsInbox);
        }
        const bool more = step + 1 < q.steps;
        if (warp < teams) {
            wait_inbox(Layout::kSumsInbox, step);
            if (thread == 0 && more) expect(Layout::kSumsInbox, sums_bytes);
        }
        int32_t total[2 * kTiles] = {};
        if (finishes) {
            BK_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                const int m = 8 * n + 2 * t + parity;
                if (step > 0 || m >= tokens) continue;
                x_scale[n] = load_shared<float>(Layout::kScales + 4u * static_cast<uint32_t>(m));
                for (int i = m * own.parts; i < (m + 1) * own.parts; ++i) {
                    x_sum[n] += load_shared<int32_t>(Layout::kCodeSums + 4u * static_cast<uint32_t>(i));
                }
            }
            const int parts = kClusterBlocks * q.team;
            BK_UNROLL_BY_8
            for (int i = warp * parts; i < (warp + 1) * parts; ++i) {
                const Sums values = load_shared<Sums>(of_lane + static_cast<uint32_t>(i) * Layout::kPartBytes);
                BK_UNROLL
                for (int j = 0; j < 2 * kTiles; ++j) total[j] = add(total[j], static_cast<int32_t>(values.word[j]));
            }
        }
        if (more) cluster_arrive();
        if (finishes) {
            BK_UNROLL
            for (int j = 0; j < 2 * kTiles; ++j) {
                const int m = 8 * (j / 2) + 2 * t + parity;
                const int64_t packed_row = row + j % 2 * 8, n = packed_row + mask * p.weight_rows;
                if (m >= tokens || packed_row >= p.weight_rows || n >= p.N) continue;
                const int32_t sum = without_offset<Math>(share_of<Math>(total[j], mask), x_sum[j / 2]);
                const float by = multiply(x_scale[j / 2], scale[j % 2]);
                finish_value(p, first_token + m, n, multiply(static_cast<float>(sum), by));
            }
        }
    }
#endif
}

// Shared memory of a block.
inline int64_t fused_shared_bytes(int tiles, bool multiplied, int64_t K) {
    return tiles == 1 ? (multiplied ? FusedLayout<1, true>::bytes(K) : FusedLayout<1, false>::bytes(K))
                      : (multiplied ? FusedLayout<2, true>::bytes(K) : FusedLayout<2, false>::bytes(K));
}

// Queues fused_kernel of one or two tiles of eight tokens, grid.x in clusters.
const char *run_fused(const FusedParams &params, int tiles, Grid grid, void *stream);

}  // namespace bitlab

#endif
