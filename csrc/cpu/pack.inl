// Latent weights to packed ones and back. Included by each ISA file inside its anonymous namespace.

// Both bits of a code set: the low one meets the high one shifted down.
bool has_invalid(const uint8_t *qweight, int64_t count) {
    uint8_t found = 0;
    for (int64_t b = 0; b < count; ++b) found |= static_cast<uint8_t>(qweight[b] & (qweight[b] >> 1) & 0x55);
    return found != 0;
}

// How far ahead of what is read memory is asked for: without it, a core stops at two thirds of what DRAM gives.
constexpr int64_t kWeightsAhead = kPrefetchTwice ? kPrefetchL2 : 4096;

inline void ask_ahead(const void *weights) {
    __builtin_prefetch(static_cast<const char *>(weights) + kWeightsAhead, 0, kPrefetchTwice ? 2 : 3);
}

// lanes[l] += |w| of the weights l, l + 16, ... of a multiple of 16.
inline void add_magnitudes(const float *w, int64_t count, double lanes[16]) {
    for (int64_t k = 0; k < count; k += 16) {
        ask_ahead(w + k);
        for (int l = 0; l < 16; ++l) lanes[l] += static_cast<double>(__builtin_fabsf(w[k + l]));
    }
}

// The same for 16-bit weights: widened in parts that stay in the L1 cache, a loop that GCC 12 turns into vectors, as it
// does the one above; both in one it does not.
template <typename T>
inline void add_magnitudes(const uint16_t *w, int64_t count, double lanes[16]) {
    constexpr int64_t kPart = 512;
    float widened[kPart];
    for (int64_t first = 0; first < count; first += kPart) {
        const int64_t size = count - first < kPart ? count - first : kPart;
        for (int64_t k = 0; k < size; k += 32) ask_ahead(w + first + k);
        for (int64_t k = 0; k < size; ++k) widened[k] = T::load(w[first + k]);
        for (int64_t k = 0; k < size; k += 16) {
            for (int l = 0; l < 16; ++l) lanes[l] += static_cast<double>(__builtin_fabsf(widened[k + l]));
        }
    }
}

// The same for bfloat16, with fewer conversions: the bits of a magnitude at the place of float64's are the value times
// 2^-896, and sums of those are exact where sums of the values are, and rounded alike where they are not. Infinity and
// NaN count as 2^128 and more here: returns false, for the other way, if a sum reaches that.
inline bool add_bfloat16(const uint16_t *w, int64_t count, double lanes[16]) {
    constexpr int kWide = kWidth < 32 ? 32 : kWidth;
    constexpr int kLanes = kWide / 8;
    typedef uint16_t Narrow __attribute__((vector_size(kWide / 4)));
    typedef uint64_t Wide __attribute__((vector_size(kWide)));
    typedef double Doubles __attribute__((vector_size(kWide)));
    Doubles sums[16 / kLanes] = {};
    const auto add = [&](int64_t k) {
        for (int i = 0; i < 16 / kLanes; ++i) {
            Narrow bits;
            __builtin_memcpy(&bits, w + k + kLanes * i, sizeof(bits));
            bits &= Bf16::kMagnitude;
            sums[i] += reinterpret_cast<Doubles>(__builtin_convertvector(bits, Wide) << 45);
        }
    };
    int64_t k = 0;
    for (; k + 32 <= count; k += 32) {
        ask_ahead(w + k);
        add(k);
        add(k + 16);
    }
    if (k < count) add(k);
    bool small = true;
    for (int l = 0; l < 16; ++l) {
        lanes[l] = sums[l / kLanes][l % kLanes] * 0x1p896;
        small = small && lanes[l] < 0x1p128;
    }
    return small;
}

double abs_sum(const void *weight, int32_t type, int64_t offset, int64_t count) {
    return with_type(type, [=](auto tag) {
        using T = decltype(tag);
        const auto *w = static_cast<const typename T::Storage *>(weight) + offset;
        double lanes[16] = {};
        const int64_t whole = count / 16 * 16;
        if constexpr (sizeof(*w) == 4) {
            add_magnitudes(w, whole, lanes);
        } else {
            // The other way is measured with wide vectors only.
            bool added = false;
            if constexpr (T::kInfinity == Bf16::kInfinity && kWidth >= 32) added = add_bfloat16(w, whole, lanes);
            if (!added) {
                for (double &lane : lanes) lane = 0.0;
                add_magnitudes<T>(w, whole, lanes);
            }
        }
        for (int64_t k = whole; k < count; ++k) {
            lanes[k - whole] += static_cast<double>(__builtin_fabsf(T::load(w[k])));
        }
        double sum = lanes[0];
        for (int l = 1; l < 16; ++l) sum += lanes[l];
        return sum;
    });
}

// Returns the bits of the least positive weight whose code is 1, or those after infinity's if there is none. A rounded
// product grows with its factor and rounding it to a code is a comparison with one half, so that a code is a comparison
// of the weight's bits: neither a product nor a wider type for each weight.
template <typename T>
inline typename T::Bits threshold(float inverse) {
    using Bits = typename T::Bits;
    const auto exceeds = [=](Bits bits) { return T::from_bits(bits) * inverse > 0.5f; };
    const Bits guess = T::to_bits(0.5f / inverse) & T::kMagnitude;
    // exceeds(low - 1) is false and exceeds(high) true, with zero and what follows infinity at the ends.
    Bits low = 1, high = T::kInfinity + 1;
    if (guess > 2 && guess + 2 <= T::kInfinity) {
        if (!exceeds(guess - 2)) low = guess - 1;
        if (exceeds(guess + 2)) high = guess + 2;
    }
    while (low < high) {
        const Bits middle = static_cast<Bits>(low + (high - low) / 2);
        if (exceeds(middle)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// One byte of codes for each of `count` columns of four rows; kAsks: they are not in a cache yet.
template <typename T, bool kAsks>
inline void pack_columns(const typename T::Storage *const rows[4], const typename T::Bits thresholds[4], int64_t count,
                         uint8_t *out) {
    using Bits = typename T::Bits;
    // As many bytes of codes as the widest vectors hold: from a line of float32 at a time, GCC 12 makes 128-bit ones.
    constexpr int64_t kColumns = 64;
    constexpr Bits kPast = T::kInfinity + 1;
    const auto code = [&](int i, int64_t k) {
        Bits bits;
        __builtin_memcpy(&bits, rows[i] + k, sizeof(bits));
        const Bits beyond = static_cast<Bits>((bits & T::kMagnitude) - thresholds[i]);
        const bool one = beyond < static_cast<Bits>(kPast - thresholds[i]);
        return static_cast<Bits>(one ? (bits > T::kMagnitude ? 0 : 2) : 1);
    };
    const auto pack_some = [&](int64_t first, int64_t size, uint8_t *to) {
        for (int64_t j = 0; j < size; ++j) {
            const int64_t k = first + j;
            to[j] = static_cast<uint8_t>(code(0, k) | code(1, k) << 2 | code(2, k) << 4 | code(3, k) << 6);
        }
    };
    int64_t k = 0;
    for (; k + kColumns <= count; k += kColumns) {
        for (int i = 0; kAsks && i < 4; ++i) {
            constexpr int64_t kLineColumns = kLine / sizeof(Bits);
            for (int64_t line = 0; line < kColumns; line += kLineColumns) ask_ahead(rows[i] + k + line);
        }
        alignas(64) uint8_t line[kColumns];
        pack_some(k, kColumns, line);
        stream(out + k, line);
    }
    pack_some(k, count - k, out + k);
}

// The codes of one of the four rows with the other sign: what a negative scale gives, which nobody should have.
void negate_row(uint8_t *packed, int64_t count, int row) {
    const int shift = 2 * row;
    for (int64_t k = 0; k < count; ++k) {
        const int code = packed[k] >> shift & 3;
        packed[k] = static_cast<uint8_t>((packed[k] & ~(3 << shift)) | (2 - code) << shift);
    }
}

void pack(const PackArgs &args, int64_t first, int64_t last) {
    with_type(args.type, [&](auto tag) {
        using T = decltype(tag);
        const int64_t R = (args.N + 3) / 4;
        const int64_t width = args.K / args.columns;
        const auto *weight = static_cast<const typename T::Storage *>(args.weight);
        const bool per_tensor = args.scale_rows == 1 && args.columns == 1;
        const auto threshold_of = [&](int64_t scale) {
            return threshold<T>(__builtin_fabsf(1.0f / args.weight_scale[scale]));
        };
        const auto whole = per_tensor ? threshold_of(0) : T::kInfinity;
        for (int64_t r = first; r < last; ++r) {
            for (int64_t c = 0; c < args.columns; ++c) {
                const typename T::Storage *rows[4];
                typename T::Bits thresholds[4];
                bool negative[4];
                for (int i = 0; i < 4; ++i) {
                    // A row that is missing is padding: no weight of any other row gets a code for it.
                    const int64_t n = r + i * R;
                    const bool there = n < args.N;
                    rows[i] = weight + (there ? n : r) * args.K + c * width;
                    thresholds[i] = T::kInfinity + 1;
                    negative[i] = false;
                    if (there) {
                        const int64_t scale = (args.scale_rows == 1 ? 0 : n) * args.columns + c;
                        thresholds[i] = per_tensor ? whole : threshold_of(scale);
                        negative[i] = 1.0f / args.weight_scale[scale] < 0.0f;
                    }
                }
                uint8_t *packed = args.qweight + r * args.K + c * width;
                pack_columns<T, true>(rows, thresholds, width, packed);
                for (int i = 0; i < 4; ++i) {
                    if (negative[i]) negate_row(packed, width, i);
                }
            }
        }
        stream_end();
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
                const uint8_t *multipliers = args.multiplier ? args.multiplier + n * args.columns : nullptr;
                const float *scales =
                    args.weight_scale + (args.scale_rows == 1 ? 0 : n) * (multipliers ? 1 : args.columns);
                for (int64_t k = block.first_column; k < block.last_column;) {
                    const int64_t group_end = (k / width + 1) * width;
                    const int64_t end = group_end < block.last_column ? group_end : block.last_column;
                    const float scale = scales[multipliers ? 0 : k / width];
                    const int32_t factor = multipliers ? multipliers[k / width] : 1;
                    for (; k < end; ++k) {
                        const int32_t code = ((packed[k] >> (2 * i)) & 3) - 1;
                        out[k - block.first_column] = T::store(static_cast<float>(code * factor) * scale);
                    }
                }
            }
        }
    });
}
