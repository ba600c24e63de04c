// Activations to codes. Included by each ISA file inside its anonymous namespace.

// Adding and subtracting 1.5 * 2^23 rounds |value| < 2^22 half to even, in the default rounding mode.
constexpr float kRound = 12582912.0f;

float absmax(const void *x, int32_t type, int64_t K) {
    return with_type(type, [=](auto tag) {
        using T = decltype(tag);
        const auto *row = static_cast<const typename T::Storage *>(x);
        // The integer order of the magnitude bits is that of the floats, and puts NaN above infinity.
        uint32_t most = 0;
        for (int64_t k = 0; k < K; ++k) {
            const uint32_t bits = float_to_bits(T::load(row[k])) & 0x7FFFFFFF;
            most = bits > most ? bits : most;
        }
        return bits_to_float(most);
    });
}

void quantize(const void *x, int32_t type, float a, int64_t K, int64_t padded_to, int8_t *codes, int32_t *sums,
              int64_t columns) {
    with_type(type, [=](auto tag) {
        using T = decltype(tag);
        const auto *row = static_cast<const typename T::Storage *>(x);
        const int64_t width = K / columns;
        for (int64_t c = 0; c < columns; ++c) {
            int32_t sum = 0;
            for (int64_t k = c * width; k < (c + 1) * width; ++k) {
                // |x| a is at most 127 (1 + 2^-23)^2, so rounding needs no clamp.
                const int32_t code = static_cast<int32_t>((T::load(row[k]) * a + kRound) - kRound);
                codes[k] = static_cast<int8_t>(code);
                sum += code;
            }
            sums[c] = sum;
        }
        for (int64_t k = K; k < padded_to; ++k) codes[k] = 0;
    });
}

void quantize_planes(const void *x, int32_t type, double factor, int64_t K, int64_t padded_to, int8_t *codes,
                     int32_t *sums, int64_t columns) {
    with_type(type, [=](auto tag) {
        using T = decltype(tag);
        const auto *row = static_cast<const typename T::Storage *>(x);
        const int64_t width = K / columns;
        for (int64_t c = 0; c < columns; ++c) {
            int32_t sum[BK_FLOAT_PLANES] = {};
            for (int64_t k = c * width; k < (c + 1) * width; ++k) {
                // Adding 1.5 * 2^52 rounds half to even and leaves the integer in the low bits.
                const double value = static_cast<double>(T::load(row[k])) * factor + 6755399441055744.0;
                uint64_t bits;
                __builtin_memcpy(&bits, &value, 8);
                // 128 added to each of the three lower digits makes them 0 to 255; the highest is signed.
                const uint32_t digits = (static_cast<uint32_t>(bits) + 0x00808080u) ^ 0x00808080u;
                for (int p = 0; p < BK_FLOAT_PLANES; ++p) {
                    const int8_t code = static_cast<int8_t>(digits >> (8 * p));
                    codes[p * padded_to + k] = code;
                    sum[p] += code;
                }
            }
            for (int p = 0; p < BK_FLOAT_PLANES; ++p) sums[p * columns + c] = sum[p];
        }
        for (int p = 0; p < BK_FLOAT_PLANES; ++p) {
            for (int64_t k = K; k < padded_to; ++k) codes[p * padded_to + k] = 0;
        }
    });
}
