// From a tile of sums in shared memory to outputs, four at a time.
//
// The registers of a tensor core's sums are scattered over rows and tokens. Through shared memory a thread takes four
// consecutive outputs of one token: a row of a tile is written to memory as whole lines, and one short loop does what
// unrolled over all registers of a thread would be more code than the instruction cache holds.
#ifndef BITLAB_CUDA_EPILOGUE_CUH
#define BITLAB_CUDA_EPILOGUE_CUH

#include "matmul.cuh"

namespace bitlab {

// Sums of kTokens tokens times kOutputs outputs, four bytes each, the outputs of a token side by side. The padding
// puts the eight outputs and four pairs of tokens that a warp's mma sums lie in on 32 banks.
template <int kTokens, int kOutputs>
struct SumTile {
    static constexpr uint32_t kStride = 4 * (kOutputs + 4);
    static constexpr uint32_t kBytes = kTokens * kStride;
    static_assert(kOutputs % 32 == 0, "rows of two tokens are 8 banks apart");

    static BK_DEVICE uint32_t at(int token, int output) {
        return static_cast<uint32_t>(token) * kStride + 4u * static_cast<uint32_t>(output);
    }
};

BK_DEVICE float sum_value(uint32_t bits, int32_t) { return static_cast<float>(static_cast<int32_t>(bits)); }
BK_DEVICE float sum_value(uint32_t bits, float) { return bits_float(bits); }

// Writes `count` of four 32-bit values to consecutive places.
BK_DEVICE void store_words(void *p, int64_t index, const Bytes16 &values, int count) {
    auto *to = static_cast<uint32_t *>(p) + index;
    if (count == 4 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        store_global(reinterpret_cast<Bytes16 *>(to), values);
        return;
    }
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (i < count) store_global(to + i, values.word[i]);
    }
}

// The same of four float32 values, converted to `type`.
BK_DEVICE void store_floats(void *p, int32_t type, int64_t index, const Bytes16 &values, int count) {
    if (type == BK_CUDA_F32) {
        store_words(p, index, values, count);
        return;
    }
    uint32_t half[4];
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
        const float value = bits_float(values.word[i]);
        half[i] = type == BK_CUDA_BF16 ? encode_bf16(value) : encode_f16(value);
    }
    auto *to = static_cast<uint16_t *>(p) + index;
    if (count == 4 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
        store_global(reinterpret_cast<Bytes8 *>(to), Bytes8{{half[0] | half[1] << 16, half[2] | half[3] << 16}});
        return;
    }
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (i < count) store_global(to + i, static_cast<uint16_t>(half[i]));
    }
}

// Finishes the sums of one mask's outputs (per group: the totals of the groups' terms), or stores the sums as a share
// of K; see finish_share. The tile lies at offset `tile`; its first output is packed row `first_row` under mask `lane`.
// All of the block's kThreads threads call this,
// with a barrier before it.
template <typename Math, bool kGrouped, int kThreads, int kTokens, int kOutputs, typename Params>
BK_DEVICE void finish_tile(const Params &p, uint32_t tile, int64_t first_row, int64_t first_token, int lane,
                           int split) {
    using Sum = typename Pick<kGrouped, float, typename Math::Sum>::Type;
    using Tile = SumTile<kTokens, kOutputs>;
    constexpr bool kIsCodes = !kGrouped && Math::kOffset != 0;
    constexpr int kQuads = kOutputs / 4, kTokensAtOnce = kThreads / kQuads;
    constexpr int kTogether = kTokens / kTokensAtOnce < 4 ? kTokens / kTokensAtOnce : 4;
    static_assert(kThreads % kQuads == 0 && kTokens % (kTogether * kTokensAtOnce) == 0, "a thread keeps its outputs");
    const int quad = thread_x() % kQuads;
    const int64_t row = first_row + 4 * quad, output = row + lane * p.weight_rows;
    const int64_t rows = p.weight_rows - row, outputs = p.N - output, valid = rows < outputs ? rows : outputs;
    const int count = valid < 4 ? static_cast<int>(valid) : 4;
    if (count <= 0) return;
    const bool is_share = !kGrouped && p.splits > 1, is_float = !is_share && p.y_type != BK_CUDA_I32;
    float scale[4] = {}, bias[4] = {};
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (is_float && i < count) {
            scale[i] = kGrouped ? 1.0f : load_global(p.weight_scale + (p.scale_rows == 1 ? 0 : output + i));
            if (p.bias) bias[i] = load_float(p.bias, p.bias_type, output + i);
        }
    }
    // kTogether tokens at a time, whose loads come first, so that their latencies are one.
    BK_NO_UNROLL
    for (int first = thread_x() / kQuads; first < kTokens; first += kTogether * kTokensAtOnce) {
        Bytes16 values[kTogether];
        int32_t x_sum[kTogether];
        float x_scale[kTogether];
        BK_UNROLL
        for (int j = 0; j < kTogether; ++j) {
            const int token = first + j * kTokensAtOnce;
            const int64_t m = first_token + token < p.M ? first_token + token : p.M - 1;
            values[j] = load_shared<Bytes16>(tile + Tile::at(token, 4 * quad));
            x_sum[j] = kIsCodes && !is_share ? load_global(p.x_sums + p.token(m)) : 0;
            x_scale[j] = Math::kIsInteger && is_float ? load_global(p.x_scale + p.token(m)) : 0.0f;
        }
        BK_UNROLL
        for (int j = 0; j < kTogether; ++j) {
            const int64_t m = first_token + first + j * kTokensAtOnce;
            if (m >= p.M) break;
            const int64_t index = p.row(m) * p.N + output;
            if constexpr (kIsCodes) {
                BK_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int32_t share = share_of<Math>(static_cast<int32_t>(values[j].word[i]), lane);
                    values[j].word[i] = static_cast<uint32_t>(without_offset<Math>(share, x_sum[j]));
                }
            }
            if (is_share) {
                store_words(p.partial, split * p.M * p.N + index, values[j], count);
            } else if (!is_float) {
                store_words(p.y, index, values[j], count);
            } else {
                // The order of the float operations is that of finish().
                BK_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float factor = Math::kIsInteger ? multiply(x_scale[j], scale[i]) : scale[i];
                    float value = multiply(sum_value(values[j].word[i], Sum{}), factor);
                    if (p.bias) value = add(value, bias[i]);
                    values[j].word[i] = float_bits(value);
                }
                store_floats(p.y, p.y_type, index, values[j], count);
            }
        }
    }
}

}  // namespace bitlab

#endif
