// Device helpers on float types, and reductions over a block. Types are bk_type values, the same for a whole launch.
#ifndef BITLAB_CUDA_TYPES_CUH
#define BITLAB_CUDA_TYPES_CUH

#include "bitkernels_cuda.h"
#include "device.h"

namespace bitlab {

BK_DEVICE int64_t element_bytes(int32_t type) { return type == BK_CUDA_F32 ? 4 : type == BK_CUDA_I8 ? 1 : 2; }

// One element of a float tensor, or of int8 codes.
BK_DEVICE float load_float(const void *p, int32_t type, int64_t index) {
    if (type == BK_CUDA_I8) return static_cast<float>(load_global(static_cast<const int8_t *>(p) + index));
    if (type == BK_CUDA_F32) return load_global(static_cast<const float *>(p) + index);
    const uint16_t bits = load_global(static_cast<const uint16_t *>(p) + index);
    return type == BK_CUDA_BF16 ? bits_float(static_cast<uint32_t>(bits) << 16) : decode_f16(bits);
}

BK_DEVICE void store_float(void *p, int32_t type, int64_t index, float value) {
    if (type == BK_CUDA_F32) {
        store_global(static_cast<float *>(p) + index, value);
    } else {
        store_global(static_cast<uint16_t *>(p) + index, type == BK_CUDA_BF16 ? encode_bf16(value) : encode_f16(value));
    }
}

// Sixteen bytes of 16-bit floats.
BK_DEVICE void decode_eight(const Bytes16 &v, int32_t type, float (&values)[8]) {
    BK_UNROLL
    for (int i = 0; i < 8; ++i) {
        const uint32_t bits = (v.word[i / 2] >> (16 * (i % 2))) & 0xFFFF;
        values[i] = type == BK_CUDA_BF16 ? bits_float(bits << 16) : decode_f16(static_cast<uint16_t>(bits));
    }
}

// Elements index to index + 7 of a row of `count`; those past its end are zero. vector: the row is aligned to 16 bytes.
BK_DEVICE void load_eight(const void *row, int32_t type, int32_t index, int32_t count, bool vector,
                          float (&values)[8]) {
    if (!vector || index + 8 > count) {
        BK_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = index + i < count ? load_float(row, type, index + i) : 0.0f;
    } else if (type == BK_CUDA_F32) {
        BK_UNROLL
        for (int half = 0; half < 2; ++half) {
            const auto *p = reinterpret_cast<const Bytes16 *>(static_cast<const float *>(row) + index + 4 * half);
            const Bytes16 v = load_global(p);
            BK_UNROLL
            for (int i = 0; i < 4; ++i) values[4 * half + i] = bits_float(v.word[i]);
        }
    } else {
        const auto *p = reinterpret_cast<const Bytes16 *>(static_cast<const uint16_t *>(row) + index);
        decode_eight(load_global(p), type, values);
    }
}

// Stores elements index to index + 7 of a tensor, or the first `count` of them.
BK_DEVICE void store_eight(void *p, int32_t type, int64_t index, int32_t count, bool vector, const float (&values)[8]) {
    if (!vector || count < 8) {
        BK_UNROLL
        for (int i = 0; i < 8; ++i) {
            if (i < count) store_float(p, type, index + i, values[i]);
        }
    } else if (type == BK_CUDA_F32) {
        BK_UNROLL
        for (int half = 0; half < 2; ++half) {
            Bytes16 bits;
            BK_UNROLL
            for (int i = 0; i < 4; ++i) bits.word[i] = float_bits(values[4 * half + i]);
            store_global(reinterpret_cast<Bytes16 *>(static_cast<float *>(p) + index + 4 * half), bits);
        }
    } else {
        Bytes16 bits = {{0, 0, 0, 0}};
        BK_UNROLL
        for (int i = 0; i < 8; ++i) {
            const uint32_t half = type == BK_CUDA_BF16 ? encode_bf16(values[i]) : encode_f16(values[i]);
            bits.word[i / 2] |= half << (16 * (i % 2));
        }
        store_global(reinterpret_cast<Bytes16 *>(static_cast<uint16_t *>(p) + index), bits);
    }
}

// Largest of all threads' values; `offset` has 4 bytes of shared memory for each warp, not used since the last barrier.
BK_DEVICE uint32_t block_max(uint32_t value, uint32_t offset, int threads) {
    BK_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
        const uint32_t other = shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    if (thread_x() % kWarp == 0) store_shared(offset + 4u * static_cast<uint32_t>(thread_x() / kWarp), value);
    sync_block();
    value = 0;
    for (int w = 0; w < threads / kWarp; ++w) {
        const uint32_t other = load_shared<uint32_t>(offset + 4u * static_cast<uint32_t>(w));
        value = other > value ? other : value;
    }
    return value;
}

// Sum of all threads' values, exact; memory as for block_max.
BK_DEVICE int32_t block_sum(int32_t value, uint32_t offset, int threads) {
    BK_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    if (thread_x() % kWarp == 0) store_shared(offset + 4u * static_cast<uint32_t>(thread_x() / kWarp), value);
    sync_block();
    value = 0;
    for (int w = 0; w < threads / kWarp; ++w) value += load_shared<int32_t>(offset + 4u * static_cast<uint32_t>(w));
    return value;
}

}  // namespace bitlab

#endif
