// One token, quantized by the very kernel that multiplies it: x to codes in shared memory, then packed rows against
// them with dp4a, four masks to a word.
//
// Every block makes all codes for itself: x is in L2, so that costs less than a second launch. The first packed bytes
// are on their way meanwhile. A team of 1, 2, 4, 8 or 16 warps takes one packed row (four outputs) at a time; a lane
// loads 16 bytes of it, kGemvDepth times in flight. Per group, four lanes turn their sums into one sum each of 64
// columns of an output, and a group's lanes add these up; the terms of a row meet in shared memory, and one thread for
// each output adds them in ascending order while the others are at the next row. All that must fit in 48 KiB;
// few_kernel does the rest. With multipliers a lane multiplies the sums of its 16 columns, which are of one group, and
// goes on as without groups. Rejected: mma with one token of eight used. It needs 16 rows to a warp, so fewer rows fill
// the chip.
#ifndef BITLAB_CUDA_GEMV_CUH
#define BITLAB_CUDA_GEMV_CUH

#include "activations.cuh"
#include "matmul.cuh"

namespace bitlab {

// One block to a multiprocessor: two of half the size make the codes twice (a fifth slower on an H200).
constexpr int kGemvThreads = 512;
constexpr int kGemvWarps = kGemvThreads / kWarp;
constexpr int kGemvDepth = 4;
// Shared memory after the codes: maxima, sums, then the teams' partial sums, two sets in turn.
constexpr uint32_t kGemvTail = 64 + 64 + 2 * kGemvWarps * 4 * 4;
constexpr int64_t kGemvMaxK = (kSharedBytes - kGemvTail) / 64 * 64;

struct GemvParams {
    MatmulParams matmul;  // x is null; x_scale and x_sums are made by each block for itself
    const void *x;
    int32_t x_type;
    bool x_vector;
    int32_t team;               // warps to a packed row
    uint32_t terms_stride;      // gemv_terms_stride(team)
    const uint8_t *multiplier;  // [N, multiplier_columns], or null
    int32_t multiplier_columns;
};

inline uint32_t gemv_shared_bytes(int64_t K) { return static_cast<uint32_t>((K + 63) / 64 * 64) + kGemvTail; }

// The lanes of a group must be lanes of one warp, which takes 512 columns at a time.
inline bool is_gemv_group(int64_t group) { return group == 64 || group == 128 || group == 256 || group == 512; }

// From one group's terms to the next one's: 16 bytes for each team, and an odd number of these, so that lanes at
// different groups meet different banks.
inline uint32_t gemv_terms_stride(int team) { return 16u * static_cast<uint32_t>(kGemvWarps / team | 1); }

// Codes, maxima, sums as above, then the sum of every 64 codes, then two sets of terms.
inline uint32_t gemv_grouped_shared_bytes(int64_t K, int64_t columns, int team) {
    return static_cast<uint32_t>(K + 128 + K / 64 * 4 + 2 * columns * gemv_terms_stride(team));
}

BK_DEVICE int32_t unshift(int32_t sum, int lane) { return sum >> (2 * lane); }

struct RowPart {
    Bytes16 at[kGemvDepth];
    float scale[kGemvDepth];            // with groups: of this lane's output, of the group of these columns
    int32_t multiplier[kGemvDepth][4];  // of the four outputs
};

// Which of the four outputs of a packed row a lane keeps the sum of.
BK_DEVICE int kept_output(int lane) { return 2 * (lane & 1) + (lane >> 1 & 1); }

// What the scales of groups are.
enum class GemvGroups { kNone, kFloats, kMultipliers };

// A packed row; with groups the scales of this lane's output, or the multipliers of all four.
struct RowPointers {
    const uint8_t *bytes;
    const float *scales;
    const uint8_t *multipliers[4];
};

template <GemvGroups kGroups>
BK_DEVICE RowPointers pointers_of(const GemvParams &q, int64_t row) {
    const MatmulParams &p = q.matmul;
    RowPointers pointers = {p.weight + row * p.K, nullptr, {}};
    if (kGroups == GemvGroups::kFloats) {
        const int64_t own = row + kept_output(thread_x() % kWarp) * p.weight_rows, n = own < p.N ? own : p.N - 1;
        pointers.scales = p.weight_scale + n * p.columns;
    }
    if (kGroups == GemvGroups::kMultipliers) {
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int64_t own = row + i * p.weight_rows, n = own < p.N ? own : p.N - 1;
            pointers.multipliers[i] = q.multiplier + n * q.multiplier_columns;
        }
    }
    return pointers;
}

// Loads the 16 bytes at column `at` to slot d; zeros past the end.
template <GemvGroups kGroups>
BK_DEVICE void load_slot(const MatmulParams &p, const RowPointers &row, int32_t at, int d, RowPart &part) {
    part.at[d] = {{0, 0, 0, 0}};
    if (at >= p.K) return;
    part.at[d] = load_weight_16(row.bytes, at, p);
    if (kGroups == GemvGroups::kFloats) part.scale[d] = load_global(row.scales + at / (64 * p.group_blocks));
    if (kGroups == GemvGroups::kMultipliers) {
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
            part.multiplier[d][i] = load_global(row.multipliers[i] + (at / 64 >> p.group_shift));
        }
    }
}

BK_DEVICE void multiply_16(const Bytes16 &weights, const Bytes16 &x, int32_t (&acc)[4]) {
    BK_UNROLL
    for (int w = 0; w < 4; ++w) {
        BK_UNROLL
        for (int i = 0; i < 4; ++i) acc[i] = dot4_us(weights.word[w] & lane_mask(i), x.word[w], acc[i]);
    }
}

// The same, each sum times its group's multiplier.
BK_DEVICE void multiply_group_16(const Bytes16 &weights, const Bytes16 &x, const int32_t (&multiplier)[4],
                                 int32_t (&acc)[4]) {
    int32_t part[4] = {}, offset = 0;
    BK_UNROLL
    for (int w = 0; w < 4; ++w) offset = dot4_us(0x01010101, x.word[w], offset);
    multiply_16(weights, x, part);
    BK_UNROLL
    for (int i = 0; i < 4; ++i) acc[i] += multiplier[i] * (unshift(part[i], i) - offset);
}

// Four sums over four lanes: halve what each lane keeps twice, so that it holds its kept_output's.
BK_DEVICE int32_t sum_of_four(const int32_t (&acc)[4], int lane) {
    const bool upper = lane & 1, second = lane & 2;
    const int32_t a = (upper ? acc[2] : acc[0]) + shuffle_xor(upper ? acc[0] : acc[2], 1);
    const int32_t b = (upper ? acc[3] : acc[1]) + shuffle_xor(upper ? acc[1] : acc[3], 1);
    return (second ? b : a) + shuffle_xor(second ? a : b, 2);
}

template <GemvGroups kGroups>
BK_KERNEL(kGemvThreads, 1)
gemv_kernel(GemvParams q) {
    constexpr bool kGrouped = kGroups == GemvGroups::kFloats, kMultiplied = kGroups == GemvGroups::kMultipliers;
    const MatmulParams &p = q.matmul;
    const int thread = thread_x(), warp = thread / kWarp, lane = thread % kWarp;
    const int teams = kGemvWarps / q.team, team = warp / q.team;
    const int32_t padded = (p.K + 63) / 64 * 64;
    const int32_t first_k = (warp % q.team * kWarp + lane) * 16, step = q.team * kWarp * 16;
    const uint32_t maxima = static_cast<uint32_t>(padded), sums_at = maxima + 64, partial = maxima + 128;
    const uint32_t block_sums = partial, stride = q.terms_stride;
    const uint32_t terms = block_sums + 4u * static_cast<uint32_t>(p.blocks);

    begin();
    int64_t row = block_x() * teams + team;
    RowPart part = {};
    const RowPointers own = pointers_of<kGroups>(q, row < p.weight_rows ? row : p.weight_rows - 1);
    BK_UNROLL
    for (int d = 0; d < kGemvDepth; ++d) load_slot<kGroups>(p, own, first_k + d * step, d, part);

    uint32_t most = 0;
    float values[8];
    for (int32_t k = thread * 8; k < p.K; k += kGemvThreads * 8) {
        load_eight(q.x, q.x_type, k, p.K, q.x_vector, values);
        most = most_of(values, most);
    }
    const Scaling by = scaling_of(block_max(most, maxima, kGemvThreads));
    int32_t sum = 0;
    // Every thread of a warp takes part in the shuffles, whether it still has columns or not.
    for (int32_t first = 0; first < padded; first += kGemvThreads * 8) {
        const int32_t k = first + thread * 8;
        int32_t eight = 0;
        load_eight(q.x, q.x_type, k, p.K, q.x_vector, values);
        const Bytes8 codes = encode_eight(values, by, eight);
        if (k < padded) store_shared(static_cast<uint32_t>(k), codes);
        sum += eight;
        if (kGrouped) {
            BK_UNROLL
            for (int mask = 1; mask < 8; mask *= 2) eight += shuffle_xor(eight, mask);
            if (thread % 8 == 0 && k < padded) store_shared(block_sums + static_cast<uint32_t>(k / 16), eight);
        }
    }
    // Its barrier is also the one between writing the codes and reading them.
    sum = block_sum(sum, sums_at, kGemvThreads);

    int set = 0;
    for (int64_t first_row = block_x() * teams; first_row < p.weight_rows; first_row += grid_x() * teams) {
        row = first_row + team;
        const int64_t clamped = row < p.weight_rows ? row : p.weight_rows - 1;
        int32_t acc[4] = {};
        const uint32_t slot = partial + static_cast<uint32_t>(set * kGemvWarps * 16);
        const uint32_t own_terms = terms + static_cast<uint32_t>(set * p.columns) * stride;
        for (int32_t first = first_k - lane * 16; first < p.K; first += kGemvDepth * step) {
            const int32_t k = first + lane * 16;
            // As soon as a slot's bytes are multiplied, those that are next take their place: of this row or of the
            // next one.
            const bool more = first + kGemvDepth * step < p.K;
            const int64_t next_row = more ? clamped : row + grid_x() * teams;
            const bool is_last = next_row >= p.weight_rows;
            const int32_t next_k = is_last ? p.K : more ? k + kGemvDepth * step : first_k;
            const RowPointers next = pointers_of<kGroups>(q, is_last ? clamped : next_row);
            BK_UNROLL
            for (int d = 0; d < kGemvDepth; ++d) {
                const int32_t at = k + d * step;
                const bool inside = at < p.K;
                if (inside) {
                    const Bytes16 x = load_shared<Bytes16>(static_cast<uint32_t>(at));
                    if (kMultiplied) {
                        multiply_group_16(part.at[d], x, part.multiplier[d], acc);
                    } else {
                        multiply_16(part.at[d], x, acc);
                    }
                }
                const float scale = part.scale[d];
                load_slot<kGroups>(p, next, next_k + d * step, d, part);
                if (!kGrouped) continue;
                int32_t group_sum = unshift(sum_of_four(acc, lane), kept_output(lane));
                if (inside) group_sum -= load_shared<int32_t>(block_sums + 4u * static_cast<uint32_t>(at / 64));
                for (int mask = 4; mask < 4 * p.group_blocks; mask *= 2) group_sum += shuffle_xor(group_sum, mask);
                if (inside && lane % (4 * p.group_blocks) < 4) {
                    const uint32_t group = static_cast<uint32_t>(at / (64 * p.group_blocks));
                    store_shared(own_terms + group * stride + static_cast<uint32_t>(team * 16 + kept_output(lane) * 4),
                                 multiply(static_cast<float>(group_sum), scale));
                }
                BK_UNROLL
                for (int i = 0; i < 4; ++i) acc[i] = 0;
            }
        }

        if (!kGrouped) {
            int32_t a = sum_of_four(acc, lane);
            a += shuffle_xor(a, 4);
            a += shuffle_xor(a, 8);
            a += shuffle_xor(a, 16);
            if (lane < 4) store_shared(slot + static_cast<uint32_t>(warp * 16 + kept_output(lane) * 4), a);
        }
        sync_block();
        if (thread < teams * 4) {
            const int i = thread % 4;
            const int64_t r = first_row + thread / 4, n = r + i * p.weight_rows;
            if (kGrouped && r < p.weight_rows && n < p.N) {
                float total = 0.0f;
                BK_UNROLL_BY_8
                for (int32_t group = 0; group < p.columns; ++group) {
                    total = add(total, load_shared<float>(own_terms + static_cast<uint32_t>(group) * stride +
                                                          4u * static_cast<uint32_t>(thread)));
                }
                finish_value(p, 0, n, multiply(total, by.scale));
            }
            if (!kGrouped) {
                int32_t total = 0;
                for (int w = 0; w < q.team; ++w) {
                    total += load_shared<int32_t>(slot + static_cast<uint32_t>((thread / 4 * q.team + w) * 16 + i * 4));
                }
                if (r < p.weight_rows && n < p.N) {
                    const float scale = load_global(p.weight_scale + (p.scale_rows == 1 ? 0 : n));
                    const float value = static_cast<float>(kMultiplied ? total : unshift(total, i) - sum);
                    finish_value(p, 0, n, multiply(value, multiply(by.scale, scale)));
                }
            }
        }
        // The next row's sums or terms go to the other set, so that one barrier a row is enough.
        set ^= 1;
    }
}

}  // namespace bitlab

#endif
