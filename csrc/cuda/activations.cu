// The kernels that come before a product, and their launches.
#include "activations.cuh"

namespace bitlab {

BK_KERNEL(kQuantizeThreads) quantize_kernel(QuantizeParams p) {
    begin();
    if (block_x() >= p.tokens) {
        place_multipliers(p.place, static_cast<uint32_t>(block_x() - p.tokens));
        return;
    }
    quantize_token(p, block_x(), block_x(), [&](uint32_t own) {
        if (!p.maxima) return own;
        uint32_t most = 0;
        for (int i = thread_x(); i < p.maxima_count; i += kQuantizeThreads) {
            const uint32_t other = load_global(p.maxima + i);
            most = other > most ? other : most;
        }
        return most;
    });
}

// The bits of max|x| over the tokens of each block.
BK_KERNEL(kQuantizeThreads) absmax_kernel(AbsmaxParams p) {
    begin();
    uint32_t most = 0;
    for (int64_t token = block_x(); token < p.M; token += grid_x()) {
        const void *row = static_cast<const uint8_t *>(p.x) + token * p.x_stride * element_bytes(p.x_type);
        for (int32_t k = thread_x() * 8; k < p.K; k += kQuantizeThreads * 8) {
            float values[8];
            load_eight(row, p.x_type, k, p.K, p.x_vector, values);
            most = most_of(values, most);
        }
    }
    most = block_max(most, 0, kQuantizeThreads);
    if (thread_x() == 0) store_global(p.maxima + block_x(), most);
}

// A float32 value becomes three bfloat16 ones whose sum it is: its first, second and last 8 bits, each cut off and not
// rounded, so that none overflows. 16-bit values are copied. Columns past K are zero.
BK_KERNEL(kQuantizeThreads) planes_kernel(PlanesParams p) {
    begin();
    const int64_t token = block_x();
    const void *row = static_cast<const uint8_t *>(p.x) + token * p.x_stride * element_bytes(p.x_type);
    const int32_t padded = (p.K + 63) / 64 * 64;
    for (int32_t k = thread_x() * 8; k < padded; k += kQuantizeThreads * 8) {
        uint16_t *out = p.planes + token * padded + k;
        if (p.x_type != BK_CUDA_F32) {
            Bytes16 bits = {{0, 0, 0, 0}};
            const auto *source = static_cast<const uint16_t *>(row) + k;
            if (p.x_vector && k + 8 <= p.K) {
                bits = load_global(reinterpret_cast<const Bytes16 *>(source));
            } else {
                BK_UNROLL
                for (int i = 0; i < 8; ++i) {
                    const uint32_t half = k + i < p.K ? load_global(source + i) : 0;
                    bits.word[i / 2] |= half << (16 * (i % 2));
                }
            }
            store_global(reinterpret_cast<Bytes16 *>(out), bits);
            continue;
        }
        float values[8];
        load_eight(row, p.x_type, k, p.K, p.x_vector, values);
        BK_UNROLL
        for (int plane = 0; plane < 3; ++plane) {
            Bytes16 bits;
            BK_UNROLL
            for (int i = 0; i < 8; i += 2) {
                const uint32_t low = float_bits(values[i]) & 0xFFFF0000, high = float_bits(values[i + 1]) & 0xFFFF0000;
                bits.word[i / 2] = low >> 16 | high;
                values[i] = add(values[i], -bits_float(low));
                values[i + 1] = add(values[i + 1], -bits_float(high));
            }
            store_global(reinterpret_cast<Bytes16 *>(out + plane * p.M * padded), bits);
        }
    }
}

// Multipliers by themselves, before kernels that need no codes.
BK_KERNEL(kPlaceThreads) place_kernel(PlaceParams p) {
    begin();
    place_multipliers(p, static_cast<uint32_t>(block_x()));
}

const char *run_quantize(const QuantizeParams &params, int64_t blocks, void *stream) {
    return launch(quantize_kernel, Grid{blocks, 1}, kQuantizeThreads, quantize_shared_bytes(params.K), stream, params);
}

const char *run_absmax(const AbsmaxParams &params, int64_t blocks, void *stream) {
    return launch(absmax_kernel, Grid{blocks, 1}, kQuantizeThreads, 128, stream, params);
}

const char *run_planes(const PlanesParams &params, void *stream) {
    return launch(planes_kernel, Grid{params.M, 1}, kQuantizeThreads, 0, stream, params);
}

const char *run_place(const PlaceParams &params, void *stream) {
    return launch(place_kernel, Grid{place_blocks(params), 1}, kPlaceThreads, 0, stream, params);
}

}  // namespace bitlab
