// Latent weights to packed ones and back. Included by each ISA file inside its anonymous namespace.

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

// Rounding half to even and clamping to -1..1 is a comparison with one half.
inline int32_t ternary(float ratio) { return (ratio > 0.5f) - (ratio < -0.5f) + 1; }

// One byte of codes for each of `count` columns of up to four rows; a missing row (null) is padding.
template <typename T>
inline void pack_columns(const typename T::Storage *const rows[4], const float inverse[4], int64_t count,
                         uint8_t *out) {
    constexpr int64_t kStep = 64;
    for (int64_t k0 = 0; k0 < count; k0 += kStep) {
        uint8_t codes[4][kStep];
        const int64_t step = count - k0 < kStep ? count - k0 : kStep;
        for (int i = 0; i < 4; ++i) {
            if (!rows[i]) {
                for (int64_t k = 0; k < kStep; ++k) codes[i][k] = 1;
            } else if (step == kStep) {
                const auto *w = rows[i] + k0;
                for (int64_t k = 0; k < kStep; ++k) {
                    codes[i][k] = static_cast<uint8_t>(ternary(T::load(w[k]) * inverse[i]));
                }
            } else {
                for (int64_t k = 0; k < step; ++k) {
                    codes[i][k] = static_cast<uint8_t>(ternary(T::load(rows[i][k0 + k]) * inverse[i]));
                }
            }
        }
        for (int64_t k = 0; k < step; ++k) {
            out[k0 + k] = static_cast<uint8_t>(codes[0][k] | codes[1][k] << 2 | codes[2][k] << 4 | codes[3][k] << 6);
        }
    }
}

void pack(const PackArgs &args, int64_t first, int64_t last) {
    with_type(args.type, [&](auto tag) {
        using T = decltype(tag);
        using Storage = typename T::Storage;
        const int64_t R = (args.N + 3) / 4;
        const int64_t width = args.K / args.columns;
        const auto *weight = static_cast<const Storage *>(args.weight);
        for (int64_t r = first; r < last; ++r) {
            for (int64_t c = 0; c < args.columns; ++c) {
                const Storage *rows[4];
                float inverse[4];
                for (int i = 0; i < 4; ++i) {
                    const int64_t n = r + i * R;
                    rows[i] = n < args.N ? weight + n * args.K + c * width : nullptr;
                    const int64_t scale = (args.scale_rows == 1 ? 0 : n) * args.columns + c;
                    inverse[i] = n < args.N ? 1.0f / args.weight_scale[scale] : 0.0f;
                }
                pack_columns<T>(rows, inverse, width, args.qweight + r * args.K + c * width);
            }
        }
    });
}

void unpack(const PackArgs &args, const Block &block, int64_t first, int64_t last) {
    with_type(args.type, [&](auto tag) {
        using T = decltype(tag);
        const int64_t R = (args.N + 3) / 4;
        const int64_t width = args.K / args.columns;
        const int64_t count = block.last_column - block.first_column;
        auto *weight = static_cast<typename T::Storage *>(const_cast<void *>(args.weight));
        for (int64_t r = first; r < last; ++r) {
            const uint8_t *packed = args.qweight + r * args.K;
            for (int i = 0; i < 4; ++i) {
                const int64_t n = r + i * R;
                if (n >= args.N) continue;
                auto *out = weight + (i * (block.last_row - block.first_row) + r - block.first_row) * count;
                const float *scales = args.weight_scale + (args.scale_rows == 1 ? 0 : n) * args.columns;
                for (int64_t k = block.first_column; k < block.last_column;) {
                    const int64_t group_end = (k / width + 1) * width;
                    const int64_t end = group_end < block.last_column ? group_end : block.last_column;
                    const float scale = scales[k / width];
                    for (; k < end; ++k) {
                        const int32_t code = ((packed[k] >> (2 * i)) & 3) - 1;
                        out[k - block.first_column] = T::store(static_cast<float>(code) * scale);
                    }
                }
            }
        }
    });
}
