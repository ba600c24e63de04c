// What the matrix kernels share: how one warp multiplies 64 columns, and what becomes of a sum.
//
// Weights are the A operand of mma, tokens are its N. A dot product does not care about the order of K, so lane
// (g, t) = (lane / 4, lane % 4) takes the 16 bytes at columns 64 b + 16 t of packed rows g and g + 8, and the same
// columns of token g: every operand comes from memory in 16-byte loads, and no lane needs another's bytes.
#ifndef BITLAB_CUDA_MATMUL_CUH
#define BITLAB_CUDA_MATMUL_CUH

#include "types.cuh"

namespace bitlab {

struct MatmulParams {
    const uint8_t *weight;  // t2: packed rows; int8: rows; K bytes each
    int64_t weight_rows;    // t2: R; int8: N
    bool weight_vector;     // every row is aligned to 16 bytes
    const uint8_t *x;       // tokens: codes or 16-bit planes, rows aligned to 16 bytes, zero from K to the next 64
    int64_t x_stride;       // bytes from token to token
    int64_t x_plane;        // bytes from plane to plane
    const int32_t *x_sums;  // [M, columns]; t2 with codes only
    const float *x_scale;   // [M]; codes only
    const float *weight_scale;
    int32_t scale_rows;           // 1 or N
    int32_t columns;              // groups of K that have a float32 scale each; else 1
    int32_t group_blocks;         // 64-column blocks of a group
    const uint32_t *multipliers;  // [groups of K, multiplier_rows]: of the four outputs of a packed row; see
    int64_t multiplier_rows;      // multipliers.cuh; else null
    int32_t group_shift;          // the group of block b of 64 columns is b >> group_shift
    const void *bias;
    int32_t bias_type;
    void *y;
    int32_t y_type;  // a bk_cuda_type
    int64_t M;
    int64_t N;
    int32_t K;
    int32_t blocks;  // ceil(K / 64)
    int32_t splits;  // over K; with more than one, sums go to `partial` [splits, M, N], terms of groups to `partial`
    void *partial;   // [columns, M, N], and split_kernel ends the work

    // Where in x, x_sums and x_scale token m lies, and which row of y is its. Kernels whose tokens are scattered hide
    // these by their own, in a struct of their own, which the functions below take as Params.
    BK_DEVICE int64_t token(int64_t m) const { return m; }
    BK_DEVICE int64_t row(int64_t m) const { return m; }
};

// Sixteen bytes of a weight row; those past K are zero.
BK_DEVICE Bytes16 load_weight_16(const uint8_t *row, int32_t k, const MatmulParams &p) {
    Bytes16 v = {{0, 0, 0, 0}};
    if (p.weight_vector) return k < p.K ? load_weights(row + k) : v;
    BK_UNROLL
    for (int i = 0; i < 16; ++i) {
        const uint32_t byte = k + i < p.K ? load_global(row + k + i) : 0;
        v.word[i / 4] |= byte << (8 * (i % 4));
    }
    return v;
}

// Brings the beginning of contiguous rows to L2 before they may be read.
constexpr int kPrefetches = 4;  // of 128 bytes, a thread

template <int kThreads>
BK_DEVICE void prefetch_rows(const uint8_t *rows, int64_t bytes) {
    BK_UNROLL
    for (int i = 0; i < kPrefetches; ++i) {
        const int64_t at = (static_cast<int64_t>(i) * kThreads + thread_x()) * 128;
        if (at < bytes) prefetch(rows + at);
    }
}

// Codes times 1, 4, 16 and 64, plus as much, as unsigned bytes: the masks of the four lanes of a packed byte.
BK_DEVICE uint32_t lane_mask(int lane) { return 0x03030303u << (2 * lane); }

// The multipliers of packed rows g and g + 8 for 64 columns: a byte for each of a row's four outputs.
struct Multipliers {
    uint32_t low, high;
};

BK_DEVICE uint32_t multiplier_of(uint32_t four, int lane) { return four >> (8 * lane) & 255; }

// Codes of one output as unsigned bytes 128 + code * m, in one multiplication and addition: with u = code + 1 the bytes
// of (128 - m) + u * m are all of 1 to 255, so none carries over into the next or borrows from it. Left to itself the
// compiler makes it (u - 1) * m + 128, one instruction more for each word.
struct MultipliedCodes {
    uint32_t m, base;

    BK_DEVICE MultipliedCodes(uint32_t four, int lane)
        : m(multiplier_of(four, lane)), base(opaque(0x80808080u - m * 0x01010101u)) {}

    BK_DEVICE uint32_t bytes(uint32_t word, int lane) const { return (word >> (2 * lane) & 0x03030303u) * m + base; }
};

// t2 weights, int8 codes. A block is eight mma: h = 0, 1 takes words 2h and 2h + 1 as A0/A2 (A1/A3 of row g + 8) and
// B0/B1; a mask makes the same words the A operand of another 16 rows.
struct TernaryInt8 {
    using Sum = int32_t;
    static constexpr bool kIsInteger = true;
    static constexpr bool kMultiplied = false;  // every group's sum is multiplied by an integer of the group
    static constexpr bool kShifted = true;      // sums are of codes times 4 ** lane
    static constexpr int32_t kOffset = 1;       // that much is added to codes (times multipliers) as bytes
    static constexpr int kLanes = 4;            // rows of weights in a byte
    static constexpr int kPlanes = 1;           // of x
    static constexpr int kBytes = 1;            // of an element of a plane
    static constexpr int kLoads = 1;            // 16-byte loads of x for one token
    static constexpr int kDepth = 4;            // blocks in flight in the kernel for few tokens

    template <int kTiles>
    static BK_DEVICE void multiply_block(const Bytes16 &low, const Bytes16 &high, const Multipliers &,
                                         const Bytes16 (&x)[kTiles][kLoads], Sum (&sums)[kLanes][kTiles][4]) {
        BK_UNROLL
        for (int h = 0; h < 2; ++h) {
            BK_UNROLL
            for (int lane = 0; lane < kLanes; ++lane) {
                const uint32_t mask = lane_mask(lane);
                const uint32_t a[4] = {low.word[2 * h] & mask, high.word[2 * h] & mask, low.word[2 * h + 1] & mask,
                                       high.word[2 * h + 1] & mask};
                BK_UNROLL
                for (int n = 0; n < kTiles; ++n) {
                    mma_u8s8(sums[lane][n], a, x[n][0].word[2 * h], x[n][0].word[2 * h + 1]);
                }
            }
        }
    }
};

// The same with a multiplier for each group. Sums of such bytes may wrap around; with the offset off they are right.
struct TernaryInt8Multiplied : TernaryInt8 {
    static constexpr bool kMultiplied = true, kShifted = false;
    static constexpr int32_t kOffset = 128;

    template <int kTiles>
    static BK_DEVICE void multiply_block(const Bytes16 &low, const Bytes16 &high, const Multipliers &multipliers,
                                         const Bytes16 (&x)[kTiles][kLoads], Sum (&sums)[kLanes][kTiles][4]) {
        BK_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) {
            const MultipliedCodes near(multipliers.low, lane), far(multipliers.high, lane);
            BK_UNROLL
            for (int h = 0; h < 2; ++h) {
                const uint32_t a[4] = {near.bytes(low.word[2 * h], lane), far.bytes(high.word[2 * h], lane),
                                       near.bytes(low.word[2 * h + 1], lane), far.bytes(high.word[2 * h + 1], lane)};
                BK_UNROLL
                for (int n = 0; n < kTiles; ++n) {
                    mma_u8s8_wrapping(sums[lane][n], a, x[n][0].word[2 * h], x[n][0].word[2 * h + 1]);
                }
            }
        }
    }
};

// int8 weights, int8 codes: the same with the bytes as they are.
struct Int8Int8 {
    using Sum = int32_t;
    static constexpr bool kIsInteger = true, kMultiplied = false, kShifted = false;
    static constexpr int32_t kOffset = 0;
    static constexpr int kLanes = 1, kPlanes = 1, kBytes = 1, kLoads = 1, kDepth = 4;

    template <int kTiles>
    static BK_DEVICE void multiply_block(const Bytes16 &low, const Bytes16 &high, const Multipliers &,
                                         const Bytes16 (&x)[kTiles][kLoads], Sum (&sums)[kLanes][kTiles][4]) {
        BK_UNROLL
        for (int h = 0; h < 2; ++h) {
            const uint32_t a[4] = {low.word[2 * h], high.word[2 * h], low.word[2 * h + 1], high.word[2 * h + 1]};
            BK_UNROLL
            for (int n = 0; n < kTiles; ++n) mma_s8s8(sums[0][n], a, x[n][0].word[2 * h], x[n][0].word[2 * h + 1]);
        }
    }
};

// A code c of two bits under the exponent of 128 (bfloat16) or 1024 (float16) is the number 128 + c or 1024 + c; one
// packed subtraction leaves c - 1, exactly.
template <bool kIsBf16>
BK_DEVICE uint32_t pair_of_codes(uint32_t word, int lane, uint32_t selector) {
    const uint32_t codes = select_bytes(word >> (2 * lane), 0, selector) & 0x00030003;
    if (kIsBf16) return fma_bf16x2(codes | 0x43004300, 0x3F803F80, 0xC301C301);  // times 1, minus 129
    return fma_f16x2(codes | 0x64006400, 0x3C003C00, 0xE401E401);                // times 1, minus 1025
}

// The multipliers of outputs `first` and `second` of a packed row as such a pair: 128 + m or 1024 + m, less 128 or
// 1024.
template <bool kIsBf16>
BK_DEVICE uint32_t pair_of_multipliers(uint32_t four, int first, int second) {
    const uint32_t pair = multiplier_of(four, first) | multiplier_of(four, second) << 16;
    if (kIsBf16) return fma_bf16x2(pair | 0x43004300, 0x3F803F80, 0xC300C300);
    return fma_f16x2(pair | 0x64006400, 0x3C003C00, 0xE400E400);
}

template <bool kIsBf16>
BK_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
    return kIsBf16 ? fma_bf16x2(a, b, 0x80008000) : fma_f16x2(a, b, 0x80008000);
}

// t2 weights, bfloat16 or float16 tokens, or float32 ones in three bfloat16 planes. A block is four mma of 16 columns:
// word q holds columns 4 q to 4 q + 3 of a row, the first two are A0 (A1), the others A2 (A3).
// With multipliers each register is multiplied by its output's, of 7 bits, which is exact in either type.
template <bool kIsBf16, int kPlaneCount, bool kHasMultipliers = false>
struct TernaryFloat {
    using Sum = float;
    static constexpr bool kIsInteger = false, kMultiplied = kHasMultipliers, kShifted = false;
    static constexpr int32_t kOffset = 0;
    static constexpr int kLanes = 4, kPlanes = kPlaneCount, kBytes = 2, kLoads = 2 * kPlaneCount;
    static constexpr int kDepth = kPlaneCount == 1 ? 2 : 1;

    template <int kTiles>
    static BK_DEVICE void multiply_block(const Bytes16 &low, const Bytes16 &high, const Multipliers &multipliers,
                                         const Bytes16 (&x)[kTiles][kLoads], Sum (&sums)[kLanes][kTiles][4]) {
        BK_UNROLL
        for (int q = 0; q < 4; ++q) {
            BK_UNROLL
            for (int lane = 0; lane < kLanes; ++lane) {
                uint32_t a[4] = {pair_of_codes<kIsBf16>(low.word[q], lane, 0x4140),
                                 pair_of_codes<kIsBf16>(high.word[q], lane, 0x4140),
                                 pair_of_codes<kIsBf16>(low.word[q], lane, 0x4342),
                                 pair_of_codes<kIsBf16>(high.word[q], lane, 0x4342)};
                if (kMultiplied) {
                    const uint32_t near = pair_of_multipliers<kIsBf16>(multipliers.low, lane, lane);
                    const uint32_t far = pair_of_multipliers<kIsBf16>(multipliers.high, lane, lane);
                    a[0] = multiply_pair<kIsBf16>(a[0], near);
                    a[1] = multiply_pair<kIsBf16>(a[1], far);
                    a[2] = multiply_pair<kIsBf16>(a[2], near);
                    a[3] = multiply_pair<kIsBf16>(a[3], far);
                }
                BK_UNROLL
                for (int n = 0; n < kTiles; ++n) {
                    // The smallest plane first, so that the most is kept of it.
                    BK_UNROLL
                    for (int plane = kPlanes - 1; plane >= 0; --plane) {
                        const Bytes16 &v = x[n][2 * plane + q / 2];
                        if (kIsBf16) {
                            mma_bf16(sums[lane][n], a, v.word[2 * (q % 2)], v.word[2 * (q % 2) + 1]);
                        } else {
                            mma_f16(sums[lane][n], a, v.word[2 * (q % 2)], v.word[2 * (q % 2) + 1]);
                        }
                    }
                }
            }
        }
    }
};

template <bool kMultiplied>
using TernaryBf16 = TernaryFloat<true, 1, kMultiplied>;
template <bool kMultiplied>
using TernaryF16 = TernaryFloat<false, 1, kMultiplied>;
template <bool kMultiplied>
using TernaryF32 = TernaryFloat<true, 3, kMultiplied>;

// Where in p.multipliers those of block b of 64 columns begin.
BK_DEVICE int64_t multipliers_of_block(const MatmulParams &p, int32_t b) {
    return (b >> p.group_shift) * p.multiplier_rows;
}

// Sums of integers, which wrap around: int32 in C++ must not.
BK_DEVICE int32_t add(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

// A sum without its mask's factor: what a share of K is stored as.
template <typename Math>
BK_DEVICE typename Math::Sum share_of(typename Math::Sum sum, int lane) {
    if constexpr (Math::kShifted) {
        return sum >> (2 * lane);
    } else {
        return sum;
    }
}

// A share without what the bytes' offset added; x_sum is the sum of the token's codes.
template <typename Math>
BK_DEVICE typename Math::Sum without_offset(typename Math::Sum share, int32_t x_sum) {
    if constexpr (Math::kOffset != 0) {
        return add(share, -Math::kOffset * x_sum);
    } else {
        return share;
    }
}

// The value of one group, or of the whole of K without groups: what the mask's factor and the codes' offset added is
// taken off, exactly.
template <typename Math, typename Params>
BK_DEVICE typename Math::Sum true_sum(const Params &p, typename Math::Sum sum, int lane, int64_t m, int column) {
    const int32_t x_sum = Math::kOffset ? load_global(p.x_sums + p.token(m) * p.columns + column) : 0;
    return without_offset<Math>(share_of<Math>(sum, lane), x_sum);
}

template <typename Params>
BK_DEVICE void finish_value(const Params &p, int64_t m, int64_t n, float value) {
    if (p.bias) value = add(value, load_float(p.bias, p.bias_type, n));
    store_float(p.y, p.y_type, p.row(m) * p.N + n, value);
}

// A true sum over all of K, scaled. The order of the float operations is the specification's.
template <typename Params>
BK_DEVICE float scaled(const Params &p, int64_t m, int64_t n, int32_t sum) {
    const float scale = load_global(p.weight_scale + (p.scale_rows == 1 ? 0 : n));
    return multiply(static_cast<float>(sum), multiply(load_global(p.x_scale + p.token(m)), scale));
}
template <typename Params>
BK_DEVICE float scaled(const Params &p, int64_t, int64_t n, float sum) {
    return multiply(sum, load_global(p.weight_scale + (p.scale_rows == 1 ? 0 : n)));
}

// From a true sum over all of K to the output.
template <typename Params, typename Sum>
BK_DEVICE void finish(const Params &p, int64_t m, int64_t n, Sum sum) {
    if (p.y_type == BK_CUDA_I32) {
        store_global(static_cast<int32_t *>(p.y) + p.row(m) * p.N + n, static_cast<int32_t>(sum));
    } else {
        finish_value(p, m, n, scaled(p, m, n, sum));
    }
}

// One group's term of an output.
template <typename Math, typename Params>
BK_DEVICE float group_term(const Params &p, typename Math::Sum sum, int lane, int64_t m, int64_t n, int column) {
    const float value = static_cast<float>(true_sum<Math>(p, sum, lane, m, column));
    return multiply(value, load_global(p.weight_scale + n * p.columns + column));
}

// The total of all groups' terms, scaled.
template <typename Math, typename Params>
BK_DEVICE float scaled_groups(const Params &p, int64_t m, float total) {
    return Math::kIsInteger ? multiply(total, load_global(p.x_scale + p.token(m))) : total;
}

// A sum over this block's share of K: the output, or one term for split_kernel.
template <typename Math, typename Params>
BK_DEVICE void finish_share(const Params &p, int64_t m, int64_t n, typename Math::Sum sum, int lane, int split) {
    if (p.splits == 1) {
        finish(p, m, n, true_sum<Math>(p, sum, lane, m, 0));
    } else {
        auto *partial = static_cast<typename Math::Sum *>(p.partial);
        store_global(partial + (split * p.M + m) * p.N + n, share_of<Math>(sum, lane));
    }
}

constexpr int kSplitThreads = 256;

template <bool kFirst, typename First, typename Second>
struct Pick {
    using Type = First;
};
template <typename First, typename Second>
struct Pick<false, First, Second> {
    using Type = Second;
};

// Adds the shares of K, or the terms of groups, in ascending order, the same bits every run, and finishes the outputs.
template <typename Math, bool kGrouped>
BK_KERNEL(kSplitThreads)
split_kernel(MatmulParams p) {
    begin();
    using Part = typename Pick<kGrouped, float, typename Math::Sum>::Type;
    const auto *partial = static_cast<const Part *>(p.partial);
    const int64_t outputs = p.M * p.N;
    const int32_t parts = kGrouped ? p.columns : p.splits;
    for (int64_t i = block_x() * kSplitThreads + thread_x(); i < outputs; i += grid_x() * kSplitThreads) {
        Part sum = load_global(partial + i);
        for (int32_t part = 1; part < parts; ++part) sum = add(sum, load_global(partial + part * outputs + i));
        if (kGrouped) {
            finish_value(p, i / p.N, i % p.N, scaled_groups<Math>(p, i / p.N, static_cast<float>(sum)));
        } else {
            // Shares are without their masks' factors already: as if of lane 0.
            const auto share = static_cast<typename Math::Sum>(sum);
            finish(p, i / p.N, i % p.N, true_sum<Math>(p, share, 0, i / p.N, 0));
        }
    }
}

}  // namespace bitlab

#endif
