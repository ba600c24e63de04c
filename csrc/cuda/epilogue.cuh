// From the sums of a tile, held by the lanes as mma leaves them, to outputs in rows.
//
// The sums of one lane of the packed bytes at a time go through shared memory, so that a thread gets four outputs in a
// row and stores them at once. Its loop is small: unrolled over registers, this code took more time than the product,
// most of it waiting for instructions.
#ifndef BITLAB_CUDA_EPILOGUE_CUH
#define BITLAB_CUDA_EPILOGUE_CUH

#include "matmul.cuh"

namespace bitlab {

// Words from token to token of a staged tile: lanes (g, t) that hold rows g of tokens 2 t meet different banks, and
// every row begins at a multiple of 16 bytes.
template <int kRows>
constexpr int kStagedPitch = kRows + 4;

// Outputs n to n + count - 1 of token m, scaled already; at most four.
BK_DEVICE void finish_values(const MatmulParams &p, int64_t m, int64_t n, int count, float (&values)[4]) {
    if (count < 4 || !p.y_vector) {
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i < count) finish_value(p, m, n + i, values[i]);
        }
        return;
    }
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (p.bias) values[i] = add(values[i], load_float(p.bias, p.bias_type, n + i));
    }
    if (p.y_type == BK_CUDA_F32) {
        Bytes16 bits;
        BK_UNROLL
        for (int i = 0; i < 4; ++i) bits.word[i] = float_bits(values[i]);
        store_global(reinterpret_cast<Bytes16 *>(static_cast<float *>(p.y) + m * p.N + n), bits);
    } else {
        Bytes8 bits = {{0, 0}};
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
            const uint32_t half = p.y_type == BK_CUDA_BF16 ? encode_bf16(values[i]) : encode_f16(values[i]);
            bits.word[i / 2] |= half << (16 * (i % 2));
        }
        store_global(reinterpret_cast<Bytes8 *>(static_cast<uint16_t *>(p.y) + m * p.N + n), bits);
    }
}

template <typename T>
BK_DEVICE void store_four(T *to, bool vector, int count, const T (&values)[4]) {
    if (vector && count == 4) {
        Bytes16 bits;
        memcpy(&bits, values, sizeof bits);
        store_global(reinterpret_cast<Bytes16 *>(to), bits);
    } else {
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i < count) store_global(to + i, values[i]);
        }
    }
}

// Four sums in a row over this block's share of K: outputs, or terms for split_kernel.
template <typename Math>
BK_DEVICE void finish_sums(const MatmulParams &p, int64_t m, int64_t n, int count, int lane, int split,
                           typename Math::Sum (&sums)[4]) {
    using Sum = typename Math::Sum;
    const int shift = Math::kLanes == 4 ? lane : 0;
    BK_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] = unshift(sums[i], shift);
    if (p.splits > 1) {
        store_four(static_cast<Sum *>(p.partial) + (split * p.M + m) * p.N + n, p.y_vector, count, sums);
        return;
    }
    BK_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] = true_sum<Math>(p, sums[i], 0, m, 0);
    if (p.y_type == BK_CUDA_I32) {
        store_four(static_cast<Sum *>(p.y) + m * p.N + n, p.y_vector, count, sums);
        return;
    }
    float values[4];
    BK_UNROLL
    for (int i = 0; i < 4; ++i) values[i] = i < count ? scaled(p, m, n + i, sums[i]) : 0.0f;
    finish_values(p, m, n, count, values);
}

// Finishes the staged sums (per group: totals) of one lane of the packed bytes: T [kTokens][kStagedPitch<kRows>] at
// the beginning of shared memory, rows from first_row and tokens from first_token on.
template <typename Math, bool kGrouped, int kRows, int kTokens, int kThreads, typename T>
BK_DEVICE void finish_staged(const MatmulParams &p, int64_t first_row, int64_t first_token, int lane, int split) {
    constexpr int kFours = kRows / 4;
    BK_NO_UNROLL
    for (int at = thread_x(); at < kTokens * kFours; at += kThreads) {
        const int64_t m = first_token + at / kFours, row = first_row + at % kFours * 4, n = row + lane * p.weight_rows;
        const int64_t left = p.weight_rows - row < p.N - n ? p.weight_rows - row : p.N - n;
        if (m >= p.M || left <= 0) continue;
        const int count = left < 4 ? static_cast<int>(left) : 4;
        const uint32_t offset = 4u * static_cast<uint32_t>(at / kFours * kStagedPitch<kRows> + at % kFours * 4);
        const Bytes16 bits = load_shared<Bytes16>(offset);
        T values[4];
        memcpy(values, &bits, sizeof bits);
        if constexpr (kGrouped) {
            BK_UNROLL
            for (int i = 0; i < 4; ++i) values[i] = scaled_groups<Math>(p, m, values[i]);
            finish_values(p, m, n, count, values);
        } else {
            finish_sums<Math>(p, m, n, count, lane, split, values);
        }
    }
}

}  // namespace bitlab

#endif
