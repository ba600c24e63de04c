// Latent weights to packed ones and back: absmean scales, ternarize-and-pack, unpack.
//
// The float64 sums of a scale have one order everywhere (bitkernels.h), so a row is 16 chains of additions and the rows
// of a tensor are one: sixteen lanes of a warp are the chains, and one thread adds the rows. That is slower than a free
// order (the chain of rows takes a few nanoseconds each) and gives the CPU's bits.
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

// Half a warp sums one part: lane l adds the elements l, l + 16, ..., then the lanes are added in ascending order.
BK_KERNEL(kWeightThreads, 4) part_sums_kernel(WeightScaleParams p) {
    begin();
    const int lane = thread_x() % kWarp, chain = lane % kChains;
    const int64_t part = (block_x() * kWeightThreads + thread_x()) / kChains;
    const int64_t clamped = part < p.parts ? part : p.parts - 1;
    double sum = 0.0;
    BK_UNROLL_BY_16
    for (int32_t k = chain; k < p.width; k += kChains) {
        const float value = load_float(p.weight, p.weight_type, clamped * p.width + k);
        sum = add(sum, static_cast<double>(bits_float(float_bits(value) & 0x7FFFFFFF)));
    }
    double total = shuffle(sum, lane / kChains * kChains);
    for (int l = 1; l < kChains; ++l) total = add(total, shuffle(sum, lane / kChains * kChains + l));
    if (chain != 0 || part >= p.parts) return;
    if (p.sums) {
        store_global(p.sums + part, total);
    } else {
        store_global(p.scale + part, scale_of(total, p.width));
    }
}

// Adds the rows' sums in ascending order: one block fetches them, one of its threads adds, while the others fetch the
// next ones.
BK_KERNEL(kWeightThreads) sum_rows_kernel(WeightScaleParams p) {
    begin();
    const int thread = thread_x();
    double total = 0.0, own = thread < p.parts ? load_global(p.sums + thread) : 0.0;
    for (int64_t first = 0; first < p.parts; first += kWeightThreads) {
        store_shared(8u * static_cast<uint32_t>(thread), own);
        sync_block();
        const int64_t next = first + kWeightThreads + thread;
        if (next < p.parts) own = load_global(p.sums + next);
        if (thread == 0) {
            const int64_t left = p.parts - first;
            const uint32_t count = left < kWeightThreads ? static_cast<uint32_t>(left) : kWeightThreads;
            BK_UNROLL_BY_8
            for (uint32_t i = 0; i < count; ++i) total = add(total, load_shared<double>(8 * i));
        }
        sync_block();
    }
    if (thread == 0) store_global(p.scale, scale_of(total, p.elements));
}

struct PackParams {
    const void *weight;  // [N, K]; unpack_kernel writes it
    int32_t weight_type;
    const float *scale;
    int32_t scale_rows;
    int32_t columns;
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

// A block takes one packed row, a thread eight of its columns at a time, which are of one group. Rounding half to even
// and clamping to -1..1 is a comparison with one half; a NaN gives 0.
BK_KERNEL(kWeightThreads) pack_kernel(PackParams p) {
    begin();
    const int64_t row = block_x();
    for (int32_t k = thread_x() * 8; k < p.K; k += kWeightThreads * 8) {
        Bytes8 packed = {{0, 0}};
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int64_t n = row + i * p.rows;
            float values[8] = {}, inverse = 0.0f;
            if (n < p.N) {
                const auto *weights = static_cast<const uint8_t *>(p.weight) + n * p.K * element_bytes(p.weight_type);
                load_eight(weights, p.weight_type, k, p.K, p.vector, values);
                inverse = divide(1.0f, scale_at(p, n, k));
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
            const float scale = scale_at(p, n, k);
            float values[8];
            BK_UNROLL
            for (int j = 0; j < 8; ++j) {
                const int32_t code = static_cast<int32_t>(packed.word[j / 4] >> (8 * (j % 4) + 2 * i) & 3) - 1;
                values[j] = multiply(static_cast<float>(code), scale);
            }
            store_eight(weight, p.weight_type, n * p.K + k, p.K - k, p.vector, values);
        }
    }
}

}  // namespace bitlab

#endif
