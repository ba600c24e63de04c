// The input gradient, dx = dy @ (w_q * weight_scale), through packed weights on tensor cores.
//
// The sum runs over the outputs N, so columns of the packed matrix are the 16 rows of mma's A. A lane (g, t) =
// (lane / 4, lane % 4) loads the words of packed row 4 s + t at columns 4 g and 32 + 4 g of the warp's 64: byte j of
// both is rows g and g + 8 of the A operand of tile j, and the four codes of a byte are four of the sixteen terms of
// step s. So the terms come in the order (row of the step, lane of the byte), and dy is laid out in shared memory so.
// Multipliers of groups are factors of A, exact in bfloat16, so that dy is multiplied by its output's one scale.
#ifndef BITLAB_CUDA_GRADIENT_CUH
#define BITLAB_CUDA_GRADIENT_CUH

#include "matmul.cuh"

namespace bitlab {

constexpr int kGradientThreads = 128;
constexpr int kGradientRows = 16;      // packed rows a step
constexpr int kGradientColumns = 128;  // of dx, two warps
constexpr int kGradientTokens = 64;    // two warps
constexpr int kGradientTiles = kGradientTokens / 16;
// Rows in shared memory are 32 bytes longer than their content, so that the lanes of a load meet different banks.
constexpr uint32_t kGradientWeightRow = kGradientColumns + 32;
constexpr uint32_t kGradientTokenRow = kGradientRows * 4 * 2 + 32;
// After the packed rows: with multipliers a word for each row and half of the columns.
constexpr uint32_t kGradientMultipliers = kGradientRows * kGradientWeightRow;
constexpr uint32_t kGradientWeightBytes = kGradientMultipliers + 2 * kGradientRows * 4;
constexpr uint32_t kGradientPlane = kGradientTokens * kGradientTokenRow;

struct GradientParams {
    const void *dy;
    int64_t dy_stride;
    int32_t dy_type;
    const uint8_t *qweight;
    bool weight_words;  // packed rows are aligned to 4 bytes
    const float *weight_scale;
    int32_t scale_rows;         // 1: the scale multiplies the sum; else dy is multiplied by its output's scale
    const uint8_t *multiplier;  // [N, columns], then there is one scale for each output; or null
    int32_t columns;            // groups of K; 1 without groups
    int32_t group;              // K / columns
    void *dx;
    int32_t dx_type;
    int64_t M;
    int64_t N;
    int64_t rows;  // ceil(N / 4)
    int32_t K;
};

template <int kPlanes>
constexpr uint32_t gradient_shared_bytes() {
    return kGradientWeightBytes + kPlanes * kGradientPlane;
}

// The codes of one byte, two of its four lanes, as a pair of 16-bit floats; see pair_of_codes in matmul.cuh.
template <bool kIsBf16>
BK_DEVICE uint32_t pair_of_lanes(uint32_t byte, int first_lane) {
    const uint32_t bits = byte >> (2 * first_lane);
    const uint32_t codes = (bits & 3) | (bits & 12) << 14;
    if (kIsBf16) return fma_bf16x2(codes | 0x43004300, 0x3F803F80, 0xC301C301);
    return fma_f16x2(codes | 0x64006400, 0x3C003C00, 0xE401E401);
}

// The group of a column; those past K are dropped in the end.
BK_DEVICE int32_t group_of_column(const GradientParams &p, int32_t k) {
    return p.columns > 1 ? (k < p.K ? k : p.K - 1) / p.group : 0;
}

template <bool kIsBf16, int kPlanes, bool kMultiplied>
BK_KERNEL(kGradientThreads)
gradient_kernel(GradientParams p) {
    begin();
    const int thread = thread_x(), warp = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
    const int64_t column_tiles = (p.K + kGradientColumns - 1) / kGradientColumns;
    const int32_t first_column = static_cast<int32_t>(block_x() % column_tiles) * kGradientColumns;
    const int64_t first_token = block_x() / column_tiles * kGradientTokens;
    // A group is a multiple of 64 columns, but two groups may share this block's 128: each warp's 64 have one, and dy
    // is laid out for both where they differ; then each half of the block is a pass of its own.
    const int passes = !kMultiplied && p.columns > 1 && p.group % kGradientColumns != 0 ? 2 : 1;
    const int scale_columns = kMultiplied ? 1 : p.columns;

    float sums[4][kGradientTiles][4] = {};
    for (int pass = 0; pass < passes; ++pass) {
        const int32_t group = kMultiplied ? 0 : group_of_column(p, first_column + 64 * pass);
        for (int64_t first_row = 0; first_row < p.rows; first_row += kGradientRows) {
            // Packed rows: sixteen of 128 bytes, a word at a time; past the end code 0 of columns that are dropped.
            for (int i = thread; i < kGradientRows * kGradientColumns / 4; i += kGradientThreads) {
                const int row = i / (kGradientColumns / 4), word = i % (kGradientColumns / 4);
                const int32_t k = first_column + 4 * word;
                const int64_t from = first_row + row < p.rows ? first_row + row : p.rows - 1;
                const uint8_t *bytes = p.qweight + from * p.K + k;
                uint32_t value = 0;
                if (p.weight_words && k + 4 <= p.K) {
                    value = load_global(reinterpret_cast<const uint32_t *>(bytes));
                } else {
                    BK_UNROLL
                    for (int b = 0; b < 4; ++b) {
                        if (k + b < p.K) value |= static_cast<uint32_t>(load_global(bytes + b)) << (8 * b);
                    }
                }
                store_shared(static_cast<uint32_t>(row) * kGradientWeightRow + static_cast<uint32_t>(word) * 4, value);
            }
            if (kMultiplied && thread < 2 * kGradientRows) {
                const int64_t row = first_row + thread % kGradientRows;
                const int32_t column = group_of_column(p, first_column + thread / kGradientRows * 64);
                uint32_t four = 0;
                BK_UNROLL
                for (int lane = 0; lane < 4; ++lane) {
                    const int64_t n = row + lane * p.rows;
                    if (row >= p.rows || n >= p.N) continue;
                    four |= static_cast<uint32_t>(load_global(p.multiplier + n * p.columns + column)) << (8 * lane);
                }
                store_shared(kGradientMultipliers + 4u * static_cast<uint32_t>(thread), four);
            }
            // dy, times the scale of its output unless one serves all; zero where there is no output.
            for (int i = thread; i < kGradientTokens * kGradientRows * 4; i += kGradientThreads) {
                const int token = i / (kGradientRows * 4), lane = i / kGradientRows % 4, row = i % kGradientRows;
                const int64_t n = first_row + row + lane * p.rows, m = first_token + token;
                float value = 0.0f;
                if (first_row + row < p.rows && n < p.N && m < p.M) {
                    value = load_float(p.dy, p.dy_type, m * p.dy_stride + n);
                    if (p.scale_rows != 1)
                        value = multiply(value, load_global(p.weight_scale + n * scale_columns + group));
                }
                const uint32_t to = kGradientWeightBytes + static_cast<uint32_t>(token) * kGradientTokenRow +
                                    static_cast<uint32_t>(row * 4 + lane) * 2;
                if (kPlanes == 1) {
                    store_shared(to, kIsBf16 ? encode_bf16(value) : encode_f16(value));
                } else {
                    BK_UNROLL
                    for (int plane = 0; plane < kPlanes; ++plane) {
                        const uint32_t high = float_bits(value) & 0xFFFF0000;
                        store_shared(to + static_cast<uint32_t>(plane) * kGradientPlane,
                                     static_cast<uint16_t>(high >> 16));
                        value = add(value, -bits_float(high));
                    }
                }
            }
            sync_block();
            if (passes == 1 || warp / 2 == pass) {
                BK_UNROLL
                for (int s = 0; s < kGradientRows / 4; ++s) {
                    const uint32_t row = static_cast<uint32_t>(4 * s + t);
                    const uint32_t at = row * kGradientWeightRow + static_cast<uint32_t>(warp / 2 * 64 + 4 * g);
                    const uint32_t low = load_shared<uint32_t>(at), high = load_shared<uint32_t>(at + 32);
                    uint32_t four = 0;
                    if (kMultiplied) {
                        const auto half = static_cast<uint32_t>(warp / 2 * kGradientRows);
                        four = load_shared<uint32_t>(kGradientMultipliers + 4 * (half + row));
                    }
                    BK_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        const uint32_t near = low >> (8 * j) & 255, far = high >> (8 * j) & 255;
                        uint32_t a[4] = {pair_of_lanes<kIsBf16>(near, 0), pair_of_lanes<kIsBf16>(far, 0),
                                         pair_of_lanes<kIsBf16>(near, 2), pair_of_lanes<kIsBf16>(far, 2)};
                        if (kMultiplied) {
                            const uint32_t first = pair_of_multipliers<kIsBf16>(four, 0, 1);
                            const uint32_t second = pair_of_multipliers<kIsBf16>(four, 2, 3);
                            a[0] = multiply_pair<kIsBf16>(a[0], first);
                            a[1] = multiply_pair<kIsBf16>(a[1], first);
                            a[2] = multiply_pair<kIsBf16>(a[2], second);
                            a[3] = multiply_pair<kIsBf16>(a[3], second);
                        }
                        BK_UNROLL
                        for (int n = 0; n < kGradientTiles; ++n) {
                            const uint32_t token = static_cast<uint32_t>(warp % 2 * 8 * kGradientTiles + 8 * n + g);
                            BK_UNROLL
                            for (int plane = kPlanes - 1; plane >= 0; --plane) {
                                const Bytes8 b = load_shared<Bytes8>(kGradientWeightBytes +
                                                                     static_cast<uint32_t>(plane) * kGradientPlane +
                                                                     token * kGradientTokenRow + row * 8);
                                if (kIsBf16) {
                                    mma_bf16(sums[j][n], a, b.word[0], b.word[1]);
                                } else {
                                    mma_f16(sums[j][n], a, b.word[0], b.word[1]);
                                }
                            }
                        }
                    }
                }
            }
            sync_block();
        }
    }
    const float scale = p.scale_rows == 1 ? load_global(p.weight_scale) : 1.0f;
    BK_UNROLL
    for (int n = 0; n < kGradientTiles; ++n) {
        BK_UNROLL
        for (int c = 0; c < 4; ++c) {
            const int64_t m = first_token + warp % 2 * 8 * kGradientTiles + 8 * n + 2 * t + c % 2;
            BK_UNROLL
            for (int j = 0; j < 4; ++j) {
                const int32_t k = first_column + warp / 2 * 64 + c / 2 * 32 + 4 * g + j;
                if (m < p.M && k < p.K) store_float(p.dx, p.dx_type, m * p.K + k, multiply(sums[j][n][c], scale));
            }
        }
    }
}

}  // namespace bitlab

#endif
