// The loops that all instruction sets share. An ISA file opens an anonymous namespace, defines
//
//     constexpr int kTokens;                        tokens per call of dot()
//     template <int T> void dot(const uint8_t *w, const int8_t *x, int64_t x_stride, int64_t k, int32_t raw[4][T]);
//
// includes this file, and fills its row of the dispatch table. dot() adds up one packed row against T tokens:
// raw[i][t] = sum over k of (code_i + 1) * 4^i * x[t], exact in int32 for K <= BK_MAX_IN_FEATURES. The weights are read
// up to k only; the codes of the tokens are padded with zeros. Shifts by 2 i and the offset sum(x) come off afterwards.

#include "convert.inl"

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
                float value = T::load(row[k]) * a;
                value = value > 127.0f ? 127.0f : value;
                value = value < -128.0f ? -128.0f : value;
                const int32_t code = static_cast<int32_t>((value + kRound) - kRound);
                codes[k] = static_cast<int8_t>(code);
                sum += code;
            }
            sums[c] = sum;
        }
        for (int64_t k = K; k < padded_to; ++k) codes[k] = 0;
    });
}

// Fills acc[i][t][j] with the exact sums of packed rows row + j (j < rows) and tokens m + t, over one group of K.
template <int T>
void block_sums(const LinearArgs &args, int64_t row, int64_t rows, int64_t m, int64_t column,
                int32_t acc[4][T][kRowBlock]) {
    const int64_t stride = padded(args.K);
    const int64_t width = args.K / args.x.columns;
    const int8_t *x = args.x.codes + m * stride + column * width;
    for (int64_t j = 0; j < rows; ++j) {
        int32_t raw[4][T];
        dot<T>(args.qweight + (row + j) * args.K + column * width, x, stride, width, raw);
        for (int t = 0; t < T; ++t) {
            const int32_t sum = args.x.sums[(m + t) * args.x.columns + column];
            for (int i = 0; i < 4; ++i) acc[i][t][j] = (raw[i][t] >> (2 * i)) - sum;
        }
    }
}

// Outputs of one lane i and one token, contiguous over the packed rows of the block: n = n0 + j.
template <typename Y, typename B>
void write_outputs(const LinearArgs &args, int64_t m, int64_t n0, int64_t count, const float *sums) {
    const float x_scale = args.x.scale[m];
    const auto *bias = static_cast<const typename B::Storage *>(args.bias);
    auto *y = static_cast<typename Y::Storage *>(args.y) + m * args.N + n0;
    for (int64_t j = 0; j < count; ++j) {
        const float scale = args.grouped ? x_scale : x_scale * args.weight_scale[args.scale_rows == 1 ? 0 : n0 + j];
        float value = sums[j] * scale;
        if (bias) value = value + B::load(bias[n0 + j]);
        y[j] = Y::store(value);
    }
}

template <int T>
void linear_block(const LinearArgs &args, int64_t row, int64_t rows, int64_t m) {
    const int64_t R = (args.N + 3) / 4;
    const int64_t columns = args.x.columns;
    int32_t acc[4][T][kRowBlock];
    float sums[4][T][kRowBlock];
    for (int64_t column = 0; column < columns; ++column) {
        block_sums<T>(args, row, rows, m, column, acc);
        for (int i = 0; i < 4; ++i) {
            for (int t = 0; t < T; ++t) {
                for (int64_t j = 0; j < rows; ++j) {
                    const int64_t n = i * R + row + j;
                    float value = static_cast<float>(acc[i][t][j]);
                    if (args.grouped && n < args.N) {
                        value = value * args.weight_scale[n * columns + column];
                        if (column > 0) value = sums[i][t][j] + value;
                    }
                    sums[i][t][j] = value;
                }
            }
        }
    }
    with_type(args.y_type, [&](auto y_tag) {
        with_type(args.bias_type, [&](auto bias_tag) {
            for (int i = 0; i < 4; ++i) {
                const int64_t n0 = i * R + row;
                const int64_t count = args.N - n0 < rows ? args.N - n0 : rows;
                for (int t = 0; t < T; ++t) {
                    write_outputs<decltype(y_tag), decltype(bias_tag)>(args, m + t, n0, count, sums[i][t]);
                }
            }
        });
    });
}

template <int T>
void matmul_block(const LinearArgs &args, int32_t *out, int64_t row, int64_t rows, int64_t m) {
    const int64_t R = (args.N + 3) / 4;
    int32_t acc[4][T][kRowBlock];
    block_sums<T>(args, row, rows, m, 0, acc);
    for (int i = 0; i < 4; ++i) {
        const int64_t n0 = i * R + row;
        for (int t = 0; t < T; ++t) {
            for (int64_t j = 0; j < rows && n0 + j < args.N; ++j) out[(m + t) * args.N + n0 + j] = acc[i][t][j];
        }
    }
}

// Walks the packed rows in blocks and, inside, the tokens: a block of weights stays in cache while all tokens pass.
template <typename Many, typename One>
void walk(const LinearArgs &args, int64_t first, int64_t last, Many &&many, One &&one) {
    for (int64_t row = first; row < last; row += kRowBlock) {
        const int64_t rows = last - row < kRowBlock ? last - row : kRowBlock;
        int64_t m = 0;
        for (; m + kTokens <= args.M; m += kTokens) many(row, rows, m);
        for (; m < args.M; ++m) one(row, rows, m);
    }
}

void linear(const LinearArgs &args, int64_t first, int64_t last) {
    walk(
        args, first, last, [&](int64_t row, int64_t rows, int64_t m) { linear_block<kTokens>(args, row, rows, m); },
        [&](int64_t row, int64_t rows, int64_t m) { linear_block<1>(args, row, rows, m); });
}

void matmul(const LinearArgs &args, int32_t *acc, int64_t first, int64_t last) {
    walk(
        args, first, last,
        [&](int64_t row, int64_t rows, int64_t m) { matmul_block<kTokens>(args, acc, row, rows, m); },
        [&](int64_t row, int64_t rows, int64_t m) { matmul_block<1>(args, acc, row, rows, m); });
}

double abs_sum(const void *weight, int32_t type, int64_t offset, int64_t count) {
    return with_type(type, [=](auto tag) {
        using T = decltype(tag);
        const auto *w = static_cast<const typename T::Storage *>(weight) + offset;
        double lanes[16] = {};
        int64_t k = 0;
        for (; k + 16 <= count; k += 16) {
            for (int l = 0; l < 16; ++l) lanes[l] += static_cast<double>(__builtin_fabsf(T::load(w[k + l])));
        }
        for (int l = 0; k + l < count; ++l) lanes[l] += static_cast<double>(__builtin_fabsf(T::load(w[k + l])));
        double sum = lanes[0];
        for (int l = 1; l < 16; ++l) sum += lanes[l];
        return sum;
    });
}

void pack_row(const void *weight, int32_t type, const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
              uint8_t *qweight, int64_t N, int64_t K, int64_t r) {
    with_type(type, [=](auto tag) {
        using T = decltype(tag);
        const int64_t R = (N + 3) / 4;
        const int64_t width = K / scale_columns;
        uint8_t *out = qweight + r * K;
        for (int i = 0; i < 4; ++i) {
            const int64_t n = r + i * R;
            const auto *w = static_cast<const typename T::Storage *>(weight) + n * K;
            for (int64_t c = 0; c < scale_columns; ++c) {
                uint8_t *part = out + c * width;
                if (n >= N) {
                    for (int64_t k = 0; k < width; ++k) part[k] = static_cast<uint8_t>(part[k] | 1 << (2 * i));
                    continue;
                }
                const float inverse = 1.0f / weight_scale[(scale_rows == 1 ? 0 : n) * scale_columns + c];
                for (int64_t k = 0; k < width; ++k) {
                    // Rounding half to even and clamping to -1..1 is a comparison with one half.
                    const float ratio = T::load(w[c * width + k]) * inverse;
                    const int code = (ratio > 0.5f) - (ratio < -0.5f) + 1;
                    const int kept = i == 0 ? 0 : part[k];
                    part[k] = static_cast<uint8_t>(kept | code << (2 * i));
                }
            }
        }
    });
}
