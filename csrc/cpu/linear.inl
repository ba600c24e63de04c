// The fused linear: sums by matmul.inl, then scales, bias and the output's type, in the order that bitkernels.h fixes.
// Included by each ISA file inside its anonymous namespace.

// What one block of packed rows needs to know of its place.
struct Place {
    int64_t row, rows;  // packed rows
    int64_t m, count;   // rows of codes
    int32_t *acc;       // [count, 4, kBlock]
    float *totals;      // the same, as float32, or float64 for count / planes: sums of the groups so far
};

inline double pow2(float exponent) {
    if (exponent != exponent) return static_cast<double>(exponent);
    const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(exponent) + 1023) << 52;
    double value;
    __builtin_memcpy(&value, &bits, 8);
    return value;
}

// The value of a token's digits, an integer of less than 2^55, rounded once; acc holds their sums kBlockOutputs apart.
inline double from_digits(const int32_t *acc) {
    int64_t value = 0;
    for (int p = BK_FLOAT_PLANES - 1; p >= 0; --p) value = value * 256 + acc[p * kBlockOutputs];
    return static_cast<double>(value);
}

// totals (+)= the sums of one group times its scale.
inline void add_group(const LinearArgs &args, const Place &place, int64_t column) {
    const int64_t R = (args.N + 3) / 4;
    float scales[kBlockOutputs] = {};
    for (int i = 0; i < 4; ++i) {
        for (int64_t j = 0; j < place.rows; ++j) {
            const int64_t n = i * R + place.row + j;
            if (n < args.N) scales[i * kBlock + j] = args.weight_scale[n * args.x.columns + column];
        }
    }
    if (args.x.planes == 1) {
        for (int64_t m = 0; m < place.count; ++m) {
            float *totals = place.totals + m * kBlockOutputs;
            const int32_t *acc = place.acc + m * kBlockOutputs;
            for (int64_t o = 0; o < kBlockOutputs; ++o) {
                const float value = static_cast<float>(acc[o]) * scales[o];
                totals[o] = column == 0 ? value : totals[o] + value;
            }
        }
        return;
    }
    for (int64_t m = 0; m < place.count / BK_FLOAT_PLANES; ++m) {
        double *totals = reinterpret_cast<double *>(place.totals) + m * kBlockOutputs;
        const int32_t *acc = place.acc + m * BK_FLOAT_PLANES * kBlockOutputs;
        for (int64_t o = 0; o < kBlockOutputs; ++o) {
            const double value = from_digits(acc + o) * static_cast<double>(scales[o]);
            totals[o] = column == 0 ? value : totals[o] + value;
        }
    }
}

// One lane's outputs of one token: contiguous, `count` of them from row n0 on. count is constant where it is kBlock.
template <typename Y, typename B>
inline void write_run(const LinearArgs &args, const Place &place, int64_t m, int64_t at, int64_t n0, int64_t count) {
    const auto *bias = static_cast<const typename B::Storage *>(args.bias);
    auto *y = static_cast<typename Y::Storage *>(args.y);
    const bool per_row = args.scale_rows != 1;
    const float *scales = args.weight_scale + (per_row ? n0 : 0);
    if (args.x.planes == 1) {
        const float x_scale = args.x.scale[place.m + m];
        const int32_t *acc = place.acc + m * kBlockOutputs + at;
        const float *totals = place.totals + m * kBlockOutputs + at;
        const int64_t token = place.m + m;
        y += (args.rows ? args.rows[token] : token) * args.N + n0;
        float values[kBlock];
        if (args.grouped) {
            for (int64_t j = 0; j < count; ++j) values[j] = totals[j] * x_scale;
        } else if (per_row) {
            for (int64_t j = 0; j < count; ++j) values[j] = static_cast<float>(acc[j]) * (x_scale * scales[j]);
        } else {
            const float scale = x_scale * scales[0];
            for (int64_t j = 0; j < count; ++j) values[j] = static_cast<float>(acc[j]) * scale;
        }
        if (bias) {
            for (int64_t j = 0; j < count; ++j) values[j] = values[j] + B::load(bias[n0 + j]);
        }
        for (int64_t j = 0; j < count; ++j) y[j] = Y::store(values[j]);
        return;
    }
    const int64_t token = place.m / BK_FLOAT_PLANES + m;
    const double x_scale = pow2(args.x.scale[token]);
    const int32_t *acc = place.acc + m * BK_FLOAT_PLANES * kBlockOutputs + at;
    const double *totals = reinterpret_cast<const double *>(place.totals) + m * kBlockOutputs + at;
    y += token * args.N + n0;
    for (int64_t j = 0; j < count; ++j) {
        double value = args.grouped ? totals[j] * x_scale
                                    : from_digits(acc + j) * (x_scale * static_cast<double>(scales[per_row ? j : 0]));
        if (bias) value = value + static_cast<double>(B::load(bias[n0 + j]));
        y[j] = Y::store(static_cast<float>(value));
    }
}

inline void write_sums(const LinearArgs &args, const Place &place) {
    const int64_t R = (args.N + 3) / 4;
    for (int64_t m = 0; m < place.count; ++m) {
        for (int i = 0; i < 4; ++i) {
            int32_t *y = static_cast<int32_t *>(args.y) + (place.m + m) * args.N;
            for (int64_t j = 0; j < place.rows && i * R + place.row + j < args.N; ++j) {
                y[i * R + place.row + j] = place.acc[m * kBlockOutputs + i * kBlock + j];
            }
        }
    }
}

inline void write_block(const LinearArgs &args, const Place &place) {
    if (args.y_type == kI32) {
        write_sums(args, place);
        return;
    }
    const int64_t R = (args.N + 3) / 4;
    with_type(args.y_type, [&](auto y_tag) {
        with_type(args.bias_type, [&](auto bias_tag) {
            using Y = decltype(y_tag);
            using B = decltype(bias_tag);
            for (int64_t m = 0; m < place.count / args.x.planes; ++m) {
                for (int i = 0; i < 4; ++i) {
                    const int64_t n0 = i * R + place.row;
                    const int64_t count = args.N - n0 < place.rows ? args.N - n0 : place.rows;
                    if (count == kBlock) {
                        write_run<Y, B>(args, place, m, i * kBlock, n0, kBlock);
                    } else if (count > 0) {
                        write_run<Y, B>(args, place, m, i * kBlock, n0, count);
                    }
                }
            }
        });
    });
}

// The sums of all groups, exact: nothing is left of the groups.
template <int64_t G>
inline void multiply_groups(const LinearArgs &args, const Place &place, uint8_t *panel) {
    const int32_t *sums = args.x.sums + place.m * args.x.columns;
    for (int64_t m = 0; m < place.count; ++m) {
        const uint32_t offset = kGroupSums ? 0 : kScaledOffset * static_cast<uint32_t>(sums[m]);
        for (int64_t o = 0; o < kBlockOutputs; ++o) place.acc[m * kBlockOutputs + o] = static_cast<int32_t>(-offset);
    }
    const int64_t at = place.m * padded(args.K);
    if (panel) {
        add_group_panels<G>(args, place.row, place.rows, args.x.panels + at, sums, place.count, panel, place.acc);
    } else {
        add_group_rows<G>(args, place.row, place.rows, args.x.codes + at, sums, place.count, place.acc);
    }
}

inline void linear_block(const LinearArgs &args, const Place &place, uint8_t *panel) {
    if (args.multiplier) {
        if (args.group == kGroup) {
            multiply_groups<kGroup>(args, place, panel);
        } else {
            multiply_groups<2 * kGroup>(args, place, panel);
        }
        write_block(args, place);
        return;
    }
    const int64_t stride = padded(args.K);
    const int64_t width = args.K / args.x.columns;
    for (int64_t column = 0; column < args.x.columns; ++column) {
        for (int64_t m = 0; m < place.count; ++m) {
            // (code + 1) x is what is added up: the sum of the codes comes off here.
            const int32_t sum = args.x.sums[(place.m + m) * args.x.columns + column];
            for (int64_t o = 0; o < kBlockOutputs; ++o) place.acc[m * kBlockOutputs + o] = -sum;
        }
        const uint8_t *w = args.qweight + place.row * args.K + column * width;
        if (panel) {
            const int8_t *x = args.x.panels + place.m * stride + column * width * kPanelTokens;
            add_panels(w, args.K, place.rows, x, stride, place.count, width, panel, place.acc);
        } else {
            const int8_t *x = args.x.codes + place.m * stride + column * width;
            add_rows(w, args.K, place.rows, x, stride, place.count, width, place.acc);
        }
        if (args.grouped) add_group(args, place, column);
    }
    write_block(args, place);
}

void linear(const LinearArgs &args, int64_t first, int64_t last, Scratch *scratch) {
    const int64_t total = args.M * args.x.planes;
    alignas(64) int32_t few_acc[kMostDirect * kBlockOutputs];
    alignas(64) float few_totals[kMostDirect * kBlockOutputs];
    static_assert(kPanelFrom >= kLeastPanel && kPanelFrom <= kMostDirect, "scratch and stack suffice");
    static_assert(kPanelTokens <= kMostPanelTokens, "the workspace holds whole panels");
    const bool few = !args.x.panels;
    // Parts of equal size, whole tiles but for the last.
    const int64_t parts = few ? 1 : (total + kMostTokens - 1) / kMostTokens;
    constexpr int64_t kUnit = kPanelTokens * BK_FLOAT_PLANES;
    static_assert(kMostTokens % kUnit == 0, "a part is at most kMostTokens");
    const int64_t size = few ? total : ((total + parts - 1) / parts + kUnit - 1) / kUnit * kUnit;
    for (int64_t row = first; row < last; row += kBlock) {
        const int64_t rows = last - row < kBlock ? last - row : kBlock;
        for (int64_t m = 0; m < total; m += size) {
            const Place place = {row,
                                 rows,
                                 m,
                                 total - m < size ? total - m : size,
                                 few ? few_acc : scratch->acc,
                                 few ? few_totals : scratch->totals};
            linear_block(args, place, few ? nullptr : scratch->panel);
        }
    }
}

// Sums of a tile of int8 weights: kWholeSums is what fits the registers beside its operands.
constexpr int kInt8Rows = 4;
constexpr int kInt8Tokens = kWholeSums / kInt8Rows;

// raw[t][r] = the sum over k of w_r * x_t for R rows, K apart, and T tokens, plus kInt8Offset times that of x_t, modulo
// 2^32. A single row is added up in four parts, which hide the latency of a multiplication.
template <int R, int T>
__attribute__((noinline)) void dot_i8(const int8_t *w, int64_t K, const int8_t *x, int64_t stride, int64_t ahead,
                                      int32_t raw[T][kInt8Rows]) {
    constexpr int kParts = kInt8Rows / R;
    Sums sums[T][kInt8Rows];
    for (int t = 0; t < T; ++t) {
        for (int i = 0; i < kInt8Rows; ++i) sums[t][i] = zero_sums();
    }
    const auto step = [&](int part, const int8_t *rows, int64_t apart, int64_t p) {
        Bytes row[R];
        for (int r = 0; r < R; ++r) row[r] = load(rows + r * apart);
        for (int t = 0; t < T; ++t) {
            const Bytes code = load(x + t * stride + p);
            for (int r = 0; r < R; ++r) {
                Sums &sum = sums[t][r * kParts + part];
                sum = multiply_add_i8(sum, row[r], code);
            }
        }
    };
    int64_t p = 0;
    for (; p + kParts * kWidth <= K; p += kParts * kWidth) {
        for (int r = 0; r < R; ++r) {
            for (int64_t line = 0; line < kParts * kWidth; line += kLine) {
                __builtin_prefetch(w + r * K + p + line + ahead);
            }
        }
        for (int part = 0; part < kParts; ++part) step(part, w + p + part * kWidth, K, p + part * kWidth);
    }
    for (; p + kWidth <= K; p += kWidth) step(0, w + p, K, p);
    if (p < K) {
        alignas(64) int8_t tail[R][kWidth] = {};
        for (int r = 0; r < R; ++r) __builtin_memcpy(tail[r], w + r * K + p, static_cast<size_t>(K - p));
        step(0, tail[0], kWidth, p);
    }
    for (int t = 0; t < T; ++t) {
        int32_t parts[kInt8Rows];
        reduce(sums[t], parts);
        for (int r = 0; r < R; ++r) {
            uint32_t sum = 0;
            for (int part = 0; part < kParts; ++part) sum += static_cast<uint32_t>(parts[r * kParts + part]);
            raw[t][r] = static_cast<int32_t>(sum);
        }
    }
}

// y of R rows from n on and T tokens from m on.
template <typename Y, typename B, int R, int T>
inline void write_i8(const LinearArgs &args, int64_t n, int64_t m, const int32_t raw[T][kInt8Rows]) {
    const auto *bias = static_cast<const typename B::Storage *>(args.bias);
    for (int t = 0; t < T; ++t) {
        const uint32_t offset = static_cast<uint32_t>(args.x.sums[m + t]) * kInt8Offset;
        auto *y = static_cast<typename Y::Storage *>(args.y) + (m + t) * args.N + n;
        for (int r = 0; r < R; ++r) {
            const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(raw[t][r]) - offset);
            float value = static_cast<float>(sum) * (args.x.scale[m + t] * args.weight_scale[n + r]);
            if (bias) value = value + B::load(bias[n + r]);
            y[r] = Y::store(value);
        }
    }
}

void linear_i8(const LinearArgs &args, int64_t first, int64_t last) {
    const int64_t stride = padded(args.K);
    const auto *weight = reinterpret_cast<const int8_t *>(args.qweight);
    with_type(args.y_type, [&](auto y_tag) {
        with_type(args.bias_type, [&](auto bias_tag) {
            using Y = decltype(y_tag);
            using B = decltype(bias_tag);
            int64_t n = first;
            // One token reads the weights strictly in sequence; more of them share what was loaded of four rows.
            for (; args.M > 1 && n + kInt8Rows <= last; n += kInt8Rows) {
                by_tokens<kInt8Tokens>(args.M, [&](int64_t m, auto tokens) {
                    constexpr int T = decltype(tokens)::value;
                    int32_t raw[T][kInt8Rows];
                    dot_i8<kInt8Rows, T>(weight + n * args.K, args.K, args.x.codes + m * stride, stride,
                                         kInt8Rows * args.K, raw);
                    write_i8<Y, B, kInt8Rows, T>(args, n, m, raw);
                });
            }
            for (; n < last; ++n) {
                for (int64_t m = 0; m < args.M; ++m) {
                    int32_t raw[1][kInt8Rows];
                    dot_i8<1, 1>(weight + n * args.K, args.K, args.x.codes + m * stride, stride, kPrefetch, raw);
                    write_i8<Y, B, 1, 1>(args, n, m, raw);
                }
            }
        });
    });
}
