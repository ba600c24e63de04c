// Latent weights to packed ones and back: absmean scales, ternarize-and-pack, unpack; gradients of learned scales.
//
// The float64 sums of a scale have one order everywhere (bitkernels.h): a row is 16 chains of additions, which half a
// warp is, and the rows of a tensor are 256, which the threads of a block are.
#ifndef BITLAB_CUDA_WEIGHTS_CUH
#define BITLAB_CUDA_WEIGHTS_CUH

#include "types.cuh"

namespace bitlab {

constexpr int kWeightThreads = 256;
constexpr int kChains = 16;

struct WeightScaleParams {
    const void *weight;
    int32_t weight_type;
    int32_t width;  // elements of a part: a row or a group
    int64_t parts;
    float *scale;      // [parts], or null if `sums` is given
    double *sums;      // [parts]
    int64_t elements;  // of the tensor, for sum_rows_kernel
};

BK_DEVICE float scale_of(double sum, int64_t count) {
    const float mean = static_cast<float>(divide(sum, static_cast<double>(count)));
    if ((float_bits(mean) & 0x7FFFFFFF) >= 0x7F800000) return bits_float(0x7FC00000);
    return mean > 1e-5f ? mean : 1e-5f;
}

// Adds the sums of half a warp's chains in ascending order. All lanes of a warp call this.
BK_DEVICE double sum_of_chains(double sum) {
    const int lane = thread_x() % kWarp;
    double total = shuffle(sum, lane / kChains * kChains);
    for (int l = 1; l < kChains; ++l) total = add(total, shuffle(sum, lane / kChains * kChains + l));
    return total;
}

// Half a warp sums the magnitudes of `width` elements: lane l adds the elements l, l + 16, ..., then the lanes are
// added in ascending order. All lanes of a warp call this.
BK_DEVICE double sum_of_part(const void *weight, int32_t type, int64_t first, int32_t width) {
    double sum = 0.0;
    BK_UNROLL_BY_16
    for (int32_t k = thread_x() % kChains; k < width; k += kChains) {
        const float value = load_float(weight, type, first + k);
        sum = add(sum, static_cast<double>(bits_float(float_bits(value) & 0x7FFFFFFF)));
    }
    return sum_of_chains(sum);
}

BK_KERNEL(kWeightThreads, 4) part_sums_kernel(WeightScaleParams p) {
    begin();
    const int64_t part = (block_x() * kWeightThreads + thread_x()) / kChains;
    const int64_t clamped = part < p.parts ? part : p.parts - 1;
    const double total = sum_of_part(p.weight, p.weight_type, clamped * p.width, p.width);
    if (thread_x() % kChains != 0 || part >= p.parts) return;
    if (p.sums) {
        store_global(p.sums + part, total);
    } else {
        store_global(p.scale + part, scale_of(total, p.width));
    }
}

// Adds the sums of rows: every thread of a block those that are 256 apart, then the threads in pairs. The result is
// thread 0's.
BK_DEVICE double sum_of_rows(const double *sums, int64_t rows) {
    const int thread = thread_x();
    double total = 0.0;
    for (int64_t row = thread; row < rows; row += kWeightThreads) total = add(total, load_global(sums + row));
    for (int half = kWeightThreads / 2; half > 0; half /= 2) {
        store_shared(8u * static_cast<uint32_t>(thread), total);
        sync_block();
        if (thread < half) total = add(total, load_shared<double>(8u * static_cast<uint32_t>(thread + half)));
        sync_block();
    }
    return total;
}

BK_KERNEL(kWeightThreads) sum_rows_kernel(WeightScaleParams p) {
    begin();
    const double total = sum_of_rows(p.sums, p.parts);
    if (thread_x() == 0) store_global(p.scale, scale_of(total, p.elements));
}

struct LearnedParams {
    const void *dw;
    int32_t dw_type;
    const void *weight;
    int32_t weight_type;
    const float *step;  // [parts], or [1] if `sums` is given
    void *gradient;     // of weight_type
    float *step_gradient;
    double *sums;   // [parts], or null
    int64_t parts;  // rows or groups
    int32_t width;  // elements of one
    double root;    // of the number of elements that share a step
};

// Elements that a lane loads before it stores what it makes of the first: a load does not pass a store.
constexpr int kLearnedLoads = 8;

// Half a warp takes a part: the weight's gradient of its elements, and the sum that the gradient of its step comes
// from, in chains as those of sum_of_part.
BK_KERNEL(kWeightThreads, 4) learned_kernel(LearnedParams p) {
    begin();
    const int64_t part = (block_x() * kWeightThreads + thread_x()) / kChains;
    // Lanes past the last part take part in the shuffles.
    const int32_t width = part < p.parts ? p.width : 0;
    const float inverse = width > 0 ? divide(1.0f, load_global(p.step + (p.sums ? 0 : part))) : 0.0f;
    double sum = 0.0;
    for (int32_t first = thread_x() % kChains; first < width; first += kChains * kLearnedLoads) {
        const int64_t at = part * p.width + first;
        float dw[kLearnedLoads], weight[kLearnedLoads];
        BK_UNROLL
        for (int i = 0; i < kLearnedLoads; ++i) {
            const bool there = first + i * kChains < width;
            dw[i] = there ? load_float(p.dw, p.dw_type, at + i * kChains) : 0.0f;
            weight[i] = there ? load_float(p.weight, p.weight_type, at + i * kChains) : 0.0f;
        }
        BK_UNROLL
        for (int i = 0; i < kLearnedLoads; ++i) {
            if (first + i * kChains >= width) break;
            const float ratio = multiply(weight[i], inverse);
            const float magnitude = bits_float(float_bits(ratio) & 0x7FFFFFFF);
            const float code = ratio > 0.5f ? 1.0f : ratio < -0.5f ? -1.0f : 0.0f;
            // NaN is on neither side of the bound: it passes no gradient, and makes that of the step NaN.
            store_float(p.gradient, p.weight_type, at + i * kChains, magnitude < 1.5f ? dw[i] : 0.0f);
            const float slope = magnitude >= 1.5f ? code : add(code, -ratio);
            sum = add(sum, static_cast<double>(multiply(slope, dw[i])));
        }
    }
    const double total = sum_of_chains(sum);
    if (thread_x() % kChains != 0 || part >= p.parts) return;
    if (p.sums) {
        store_global(p.sums + part, total);
    } else {
        store_global(p.step_gradient + part, static_cast<float>(divide(total, p.root)));
    }
}

BK_KERNEL(kWeightThreads) learned_rows_kernel(LearnedParams p) {
    begin();
    const double total = sum_of_rows(p.sums, p.parts);
    if (thread_x() == 0) store_global(p.step_gradient, static_cast<float>(divide(total, p.root)));
}

struct PackParams {
    const void *weight;  // [N, K]; unpack_kernel writes it
    int32_t weight_type;
    const float *scale;
    int32_t scale_rows;
    int32_t columns;
    const uint8_t *multiplier;  // [N, columns], then there is one scale for each output; or null
    uint8_t *qweight;
    int64_t N;
    int64_t rows;  // ceil(N / 4)
    int32_t K;
    int32_t width;  // K / columns
    bool vector;    // eight columns of every row are aligned to their size, packed or not
};

BK_DEVICE float scale_at(const PackParams &p, int64_t n, int32_t k) {
    return load_global(p.scale + (p.scale_rows == 1 ? 0 : n) * p.columns + k / p.width);
}

// Ternarizes and packs eight columns, which are of one group, of a packed row; inverse_of gives 1 / the step of output
// i of the four. Rounding half to even and clamping to -1..1 is a comparison with one half; a NaN gives 0.
template <typename InverseOf>
BK_DEVICE void pack_eight(const PackParams &p, int64_t row, int32_t k, const InverseOf &inverse_of) {
    Bytes8 packed = {{0, 0}};
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
        const int64_t n = row + i * p.rows;
        float values[8] = {}, inverse = 0.0f;
        if (n < p.N) {
            const auto *weights = static_cast<const uint8_t *>(p.weight) + n * p.K * element_bytes(p.weight_type);
            load_eight(weights, p.weight_type, k, p.K, p.vector, values);
            inverse = inverse_of(i);
        }
        BK_UNROLL
        for (int j = 0; j < 8; ++j) {
            const float ratio = multiply(values[j], inverse);
            const uint32_t code = ratio > 0.5f ? 2 : ratio < -0.5f ? 0 : 1;
            packed.word[j / 4] |= code << (8 * (j % 4) + 2 * i);
        }
    }
    uint8_t *to = p.qweight + row * p.K + k;
    if (p.vector) {
        store_global(reinterpret_cast<Bytes8 *>(to), packed);
    } else {
        BK_UNROLL
        for (int j = 0; j < 8; ++j) {
            if (k + j < p.K) store_global(to + j, static_cast<uint8_t>(packed.word[j / 4] >> (8 * (j % 4))));
        }
    }
}

// A block takes one packed row, a thread eight of its columns at a time.
BK_KERNEL(kWeightThreads) pack_kernel(PackParams p) {
    begin();
    const int64_t row = block_x();
    for (int32_t k = thread_x() * 8; k < p.K; k += kWeightThreads * 8) {
        pack_eight(p, row, k, [&](int i) { return divide(1.0f, scale_at(p, row + i * p.rows, k)); });
    }
}

// The same way back.
BK_KERNEL(kWeightThreads) unpack_kernel(PackParams p) {
    begin();
    const int64_t row = block_x();
    void *weight = const_cast<void *>(p.weight);
    for (int32_t k = thread_x() * 8; k < p.K; k += kWeightThreads * 8) {
        const uint8_t *from = p.qweight + row * p.K + k;
        Bytes8 packed = {{0, 0}};
        if (p.vector) {
            packed = load_global(reinterpret_cast<const Bytes8 *>(from));
        } else {
            BK_UNROLL
            for (int j = 0; j < 8; ++j) {
                const uint32_t byte = k + j < p.K ? load_global(from + j) : 0;
                packed.word[j / 4] |= byte << (8 * (j % 4));
            }
        }
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int64_t n = row + i * p.rows;
            if (n >= p.N) continue;
            const float scale = p.multiplier ? load_global(p.scale + n) : scale_at(p, n, k);
            const int32_t m = p.multiplier ? load_global(p.multiplier + n * p.columns + k / p.width) : 1;
            float values[8];
            BK_UNROLL
            for (int j = 0; j < 8; ++j) {
                const int32_t code = static_cast<int32_t>(packed.word[j / 4] >> (8 * (j % 4) + 2 * i) & 3) - 1;
                values[j] = multiply(static_cast<float>(code * m), scale);
            }
            store_eight(weight, p.weight_type, n * p.K + k, p.K - k, p.vector, values);
        }
    }
}

struct PackGroupsParams {
    PackParams pack;
    float *scale;         // [N]
    uint8_t *multiplier;  // [N, columns]
};

// Maxima of the warps, then a number for each output and group of a packed row: its scale, then 1 / its step.
constexpr uint32_t kGroupScales = 4 * 4 * kWeightThreads / kWarp;

inline uint32_t pack_groups_shared_bytes(int64_t columns) {
    return kGroupScales + 4 * 4 * static_cast<uint32_t>(columns);
}

// Absmean scales of groups in two levels, and packing. A block takes one packed row: its four outputs are read from
// memory once for the scales of their groups, and again, from the caches, for the codes.
BK_KERNEL(kWeightThreads, 4) pack_groups_kernel(PackGroupsParams q) {
    begin();
    const PackParams &p = q.pack;
    const int thread = thread_x();
    const int64_t row = block_x();
    const int parts = 4 * p.columns;
    // Output by output, so that a warp reads two groups side by side. Every lane takes part in the shuffles.
    for (int first = 0; first < parts; first += kWeightThreads / kChains) {
        const int part = first + thread / kChains < parts ? first + thread / kChains : parts - 1;
        const int64_t n = row + part / p.columns * p.rows;
        const int64_t from = (n < p.N ? n : p.N - 1) * p.K + static_cast<int64_t>(part % p.columns) * p.width;
        const double total = sum_of_part(p.weight, p.weight_type, from, p.width);
        if (thread % kChains == 0 && first + thread / kChains < parts) {
            store_shared(kGroupScales + 4u * static_cast<uint32_t>(part), scale_of(total, p.width));
        }
    }
    sync_block();
    BK_NO_UNROLL
    for (int i = 0; i < 4; ++i) {
        const int64_t n = row + i * p.rows;
        if (n >= p.N) break;
        const uint32_t scales = kGroupScales + 4u * static_cast<uint32_t>(i * p.columns);
        // Scales are positive or NaN, whose bits are above all of theirs.
        uint32_t most = 0;
        for (int column = thread; column < p.columns; column += kWeightThreads) {
            const auto bits = load_shared<uint32_t>(scales + 4u * static_cast<uint32_t>(column));
            most = bits > most ? bits : most;
        }
        most = block_max(most, static_cast<uint32_t>(i) * 4 * kWeightThreads / kWarp, kWeightThreads);
        const bool finite = most < 0x7F800000;
        const float scale = finite ? divide(bits_float(most), 127.0f) : bits_float(0x7FC00000);
        if (thread == 0) store_global(q.scale + n, scale);
        for (int column = thread; column < p.columns; column += kWeightThreads) {
            const uint32_t at = scales + 4u * static_cast<uint32_t>(column);
            const int32_t ratio = finite ? round_even(divide(load_shared<float>(at), scale)) : 1;
            const int32_t m = ratio < 1 ? 1 : ratio > 127 ? 127 : ratio;
            store_global(q.multiplier + n * p.columns + column, static_cast<uint8_t>(m));
            store_shared(at, divide(1.0f, multiply(static_cast<float>(m), scale)));
        }
    }
    sync_block();
    for (int32_t k = thread * 8; k < p.K; k += kWeightThreads * 8) {
        const auto column = static_cast<uint32_t>(k / p.width);
        pack_eight(p, row, k, [&](int i) {
            return load_shared<float>(kGroupScales + 4u * (static_cast<uint32_t>(i * p.columns) + column));
        });
    }
}

}  // namespace bitlab

#endif
