// Activations: float to int8 codes with their sums, or to 16-bit planes, padded for the matrix kernels.
//
// One block takes one token. Its elements are read once, eight to a thread and step, and kept in registers while the
// largest is found (from K = 8192 on, the rest is read a second time, from L2); codes go out as they are made.
// Rejected: two kernels, one for the largest and one for the codes, which reads x twice and launches twice.
#ifndef BITLAB_CUDA_ACTIVATIONS_CUH
#define BITLAB_CUDA_ACTIVATIONS_CUH

#include "multipliers.cuh"
#include "types.cuh"

namespace bitlab {

constexpr int kQuantizeThreads = 512;
constexpr int kHeldSteps = 2;
constexpr uint32_t kInfinityBits = 0x7F800000;
constexpr int kMaxMaxima = 1024;
static_assert(kPlaceThreads == kQuantizeThreads, "blocks of quantize_kernel place multipliers");

struct QuantizeParams {
    const void *x;
    int64_t x_stride;
    int32_t x_type;  // BK_CUDA_I8: codes already, which are only copied and summed
    bool x_vector;
    int8_t *codes;           // [M, code_stride], or null; columns from K to code_stride are written as zero
    int64_t code_stride;     // a multiple of 64 if code_vector, else K
    bool code_vector;        // codes are aligned to 8 bytes
    int8_t *placed;          // [M, K padded to 64]: the codes in the order of place_of_column, or null
    int32_t *sums;           // [M, columns], or null
    float *scale;            // [M], or null
    const uint32_t *maxima;  // per tensor: bits of the largest of each block of absmax_kernel; else null
    int32_t maxima_count;
    int32_t K;
    int32_t columns;  // groups of K, each of a multiple of 64; 1 without groups
    int64_t tokens;   // M: further blocks place multipliers
    PlaceParams place;
};

BK_DEVICE uint32_t most_of(const float (&values)[8], uint32_t most) {
    // The integer order of the magnitude bits is that of the floats, and puts NaN above infinity.
    BK_UNROLL
    for (int i = 0; i < 8; ++i) {
        const uint32_t bits = float_bits(values[i]) & 0x7FFFFFFF;
        most = bits > most ? bits : most;
    }
    return most;
}

struct Scaling {
    float factor;
    float scale;
    bool finite;
};

BK_DEVICE Scaling scaling_of(uint32_t most_bits) {
    const bool finite = most_bits < kInfinityBits;
    const float most = bits_float(most_bits);
    const float m = most > 1e-5f ? most : 1e-5f;
    return {divide(127.0f, m), finite ? divide(m, 127.0f) : bits_float(0x7FC00000), finite};
}

// Eight codes, and their sum added to `sum`; a token that is not finite has codes 0.
//
// Between 2^23 and 2^24 a float32 is an integer, so a sum there is rounded to one, half to even, and its last byte is
// the code. No value is cut off at -128 or 127: with m the largest, 127 / m and its product with m are each rounded
// once, and 127 (1 + 2^-24)^2 is 127 as an integer; codes that are given have the factor 1.
BK_DEVICE Bytes8 encode_eight(const float (&values)[8], Scaling by, int32_t &sum) {
    Bytes8 codes;
    BK_UNROLL
    for (int w = 0; w < 2; ++w) {
        uint32_t bits[4];
        BK_UNROLL
        for (int i = 0; i < 4; ++i) bits[i] = float_bits(add(multiply(values[4 * w + i], by.factor), 0x1.8p23f));
        const uint32_t low = select_bytes(bits[0], bits[1], 0x0040), high = select_bytes(bits[2], bits[3], 0x0040);
        codes.word[w] = by.finite ? select_bytes(low, high, 0x5410) : 0;
        sum = dot4_us(0x01010101, codes.word[w], sum);
    }
    return codes;
}

// Where wgmma_kernel wants column c of each 64: columns 16 t + 8 h + 4 w + j at 32 h + 16 w + 4 t + j.
BK_DEVICE int32_t place_of_column(int32_t c) {
    return c / 64 * 64 + c / 8 % 2 * 32 + c / 4 % 2 * 16 + c / 16 % 4 * 4 + c % 4;
}

// Stores a thread's eight codes, those of columns k to k + 7, in that order: two words that belong 16 bytes apart.
// Lanes whose words are neighbours there exchange one, so that each stores eight bytes. All lanes of a warp call this.
BK_DEVICE void store_placed(int8_t *row, int32_t k, int32_t padded, const Bytes8 &eight) {
    const bool odd = k / 16 % 2 != 0;
    // Not eight.word[odd ? 0 : 1], for which a compiler may take local memory.
    const uint32_t other = shuffle_xor(odd ? eight.word[0] : eight.word[1], 2);
    const Bytes8 pair = odd ? Bytes8{{other, eight.word[1]}} : Bytes8{{eight.word[0], other}};
    if (k < padded) {
        store_global(reinterpret_cast<Bytes8 *>(row + (odd ? place_of_column(k - 16 + 4) : place_of_column(k))), pair);
    }
}

// Bytes of shared memory: maxima of the warps, then a sum for every 64 columns.
inline uint32_t quantize_shared_bytes(int64_t K) { return static_cast<uint32_t>(128 + 4 * ((K + 63) / 64)); }

// Quantizes a token of x by this block to row `to` of the codes. Of the largest magnitude bits that a thread finds,
// `largest` makes those that it brings to the block's.
template <typename Largest>
BK_DEVICE void quantize_token(const QuantizeParams &p, int64_t token, int64_t to, const Largest &largest) {
    const int thread = thread_x();
    const void *row = static_cast<const uint8_t *>(p.x) + token * p.x_stride * element_bytes(p.x_type);
    const int32_t padded = (p.K + 63) / 64 * 64;
    constexpr int32_t kStep = kQuantizeThreads * 8;

    float held[kHeldSteps][8];
    uint32_t most = 0;
    BK_UNROLL
    for (int step = 0; step < kHeldSteps; ++step) {
        load_eight(row, p.x_type, step * kStep + thread * 8, p.K, p.x_vector, held[step]);
        most = most_of(held[step], most);
    }
    for (int32_t k = kHeldSteps * kStep + thread * 8; k < p.K; k += kStep) {
        float values[8];
        load_eight(row, p.x_type, k, p.K, p.x_vector, values);
        most = most_of(values, most);
    }
    Scaling by = scaling_of(block_max(largest(most), 0, kQuantizeThreads));
    if (p.x_type == BK_CUDA_I8) by = {1.0f, 1.0f, true};
    if (thread == 0 && p.scale) store_global(p.scale + to, by.scale);

    int8_t *codes = p.codes + to * p.code_stride;
    const auto finish = [&](int32_t k, const float(&values)[8]) {
        int32_t sum = 0;
        const Bytes8 eight = encode_eight(values, by, sum);
        if (p.placed) store_placed(p.placed + to * padded, k, padded, eight);
        if (p.codes && p.code_vector) {
            if (k < padded) store_global(reinterpret_cast<Bytes8 *>(codes + k), eight);
        } else if (p.codes) {
            BK_UNROLL
            for (int i = 0; i < 8; ++i) {
                if (k + i < p.K) store_global(codes + k + i, static_cast<int8_t>(eight.word[i / 4] >> (8 * (i % 4))));
            }
        }
        // Eight lanes hold 64 columns.
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        sum += shuffle_xor(sum, 4);
        if (p.sums && thread % 8 == 0 && k < padded) store_shared(128u + static_cast<uint32_t>(k / 16), sum);
    };
    BK_UNROLL
    for (int step = 0; step < kHeldSteps; ++step) {
        if (step * kStep < padded) finish(step * kStep + thread * 8, held[step]);
    }
    // Every thread of the block takes part in the shuffles, whether it still has columns or not.
    for (int32_t first = kHeldSteps * kStep; first < padded; first += kStep) {
        float values[8];
        load_eight(row, p.x_type, first + thread * 8, p.K, p.x_vector, values);
        finish(first + thread * 8, values);
    }
    if (!p.sums) return;
    sync_block();
    if (p.columns == 1) {
        int32_t sum = 0;
        for (int b = thread; b < padded / 64; b += kQuantizeThreads) {
            sum += load_shared<int32_t>(128u + 4u * static_cast<uint32_t>(b));
        }
        sum = block_sum(sum, 64, kQuantizeThreads);
        if (thread == 0) store_global(p.sums + to, sum);
        return;
    }
    const int per_group = p.K / p.columns / 64;
    for (int column = thread; column < p.columns; column += kQuantizeThreads) {
        int32_t sum = 0;
        for (int b = 0; b < per_group; ++b) {
            sum += load_shared<int32_t>(128u + 4u * static_cast<uint32_t>(column * per_group + b));
        }
        store_global(p.sums + to * p.columns + column, sum);
    }
}

struct AbsmaxParams {
    const void *x;
    int64_t x_stride;
    int32_t x_type;
    bool x_vector;
    uint32_t *maxima;  // [grid]
    int64_t M;
    int32_t K;
};

struct PlanesParams {
    const void *x;
    int64_t x_stride;
    int32_t x_type;
    bool x_vector;
    uint16_t *planes;  // [1 or 3, M, padded K]
    int64_t M;
    int32_t K;
};

// Queue the kernels of activations.cu, of so many blocks.
const char *run_quantize(const QuantizeParams &params, int64_t blocks, void *stream);
const char *run_absmax(const AbsmaxParams &params, int64_t blocks, void *stream);
const char *run_planes(const PlanesParams &params, void *stream);
const char *run_place(const PlaceParams &params, void *stream);

}  // namespace bitlab

#endif
