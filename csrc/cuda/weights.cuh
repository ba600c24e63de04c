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
BK_KERNEL(kWeightThreads) part_sums_kernel(WeightScaleParams p) {
    begin();
    const int lane = thread_x() % kWarp, chain = lane % kChains;
    const int64_t part = (block_x() * kWeightThreads + thread_x()) / kChains;
    const int64_t clamped = part < p.parts ? part : p.parts - 1;
    double sum = 0.0;
    BK_UNROLL_BY_8
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

// Adds the rows' sums in ascending order: one block fetches them, one of its threads adds.
BK_KERNEL(kWeightThreads) sum_rows_kernel(WeightScaleParams p) {
    begin();
    double total = 0.0;
    for (int64_t first = 0; first < p.parts; first += kWeightThreads) {
        const int64_t row = first + thread_x();
        if (row < p.parts) store_shared(8u * static_cast<uint32_t>(thread_x()), load_global(p.sums + row));
        sync_block();
        if (thread_x() == 0) {
            for (uint32_t i = 0; i < kWeightThreads && first + i < p.parts; ++i) {
                total = add(total, load_shared<double>(8 * i));
            }
        }
        sync_block();
    }
    if (thread_x() == 0) store_global(p.scale, scale_of(total, p.elements));
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
};

BK_DEVICE float scale_at(const PackParams &p, int64_t n, int32_t k) {
    return load_global(p.scale + (p.scale_rows == 1 ? 0 : n) * p.columns + k / p.width);
}

// One byte a thread: up to four weights in, four codes out. Rounding half to even and clamping to -1..1 is a comparison
// with one half; a NaN gives 0.
BK_KERNEL(kWeightThreads) pack_kernel(PackParams p) {
    begin();
    const int64_t bytes = p.rows * p.K;
    for (int64_t at = block_x() * kWeightThreads + thread_x(); at < bytes; at += grid_x() * kWeightThreads) {
        const int64_t row = at / p.K;
        const int32_t k = static_cast<int32_t>(at % p.K);
        uint32_t byte = 0;
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int64_t n = row + i * p.rows;
            uint32_t code = 1;
            if (n < p.N) {
                const float weight = load_float(p.weight, p.weight_type, n * p.K + k);
                const float ratio = multiply(weight, divide(1.0f, scale_at(p, n, k)));
                code = ratio > 0.5f ? 2 : ratio < -0.5f ? 0 : 1;
            }
            byte |= code << (2 * i);
        }
        store_global(p.qweight + at, static_cast<uint8_t>(byte));
    }
}

BK_KERNEL(kWeightThreads) unpack_kernel(PackParams p) {
    begin();
    const int64_t bytes = p.rows * p.K;
    void *weight = const_cast<void *>(p.weight);
    for (int64_t at = block_x() * kWeightThreads + thread_x(); at < bytes; at += grid_x() * kWeightThreads) {
        const int64_t row = at / p.K;
        const int32_t k = static_cast<int32_t>(at % p.K);
        const uint32_t byte = load_global(const_cast<const uint8_t *>(p.qweight) + at);
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int64_t n = row + i * p.rows;
            if (n >= p.N) continue;
            const int32_t code = static_cast<int32_t>(byte >> (2 * i) & 3) - 1;
            store_float(weight, p.weight_type, n * p.K + k, multiply(static_cast<float>(code), scale_at(p, n, k)));
        }
    }
}

}  // namespace bitlab

#endif
