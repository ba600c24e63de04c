// Scales of groups in two levels and packing, in one pass over the weight. Included by each ISA file inside its
// anonymous namespace, after pack.inl.

constexpr int64_t kMostGroups = BK_MAX_IN_FEATURES / kGroup;
// Groups that are added up side by side: the 16 lanes of one are added in order, and each addition waits for the last.
constexpr int64_t kSideGroups = 8;

// lanes[l] = the sum of the magnitudes of the weights l, l + 16, ... of a group of G.
template <int64_t G>
inline void add_lanes(const float *w, double lanes[16]) {
    // As many as the compiler unrolls, so that the sums stay in registers.
    constexpr int64_t kPart = 64;
    static_assert(G % kPart == 0, "whole parts");
    for (int l = 0; l < 16; ++l) lanes[l] = 0.0;
    for (int64_t first = 0; first < G; first += kPart) {
        double own[16];
        for (int l = 0; l < 16; ++l) own[l] = lanes[l];
        for (int64_t k = first; k < first + kPart; k += 16) {
            ask_ahead(w + k);
            for (int l = 0; l < 16; ++l) own[l] += static_cast<double>(__builtin_fabsf(w[k + l]));
        }
        for (int l = 0; l < 16; ++l) lanes[l] = own[l];
    }
}
// The same of bfloat16, times 2^-896: see add_bfloat16().
template <int64_t G>
inline void add_lanes(const uint16_t *w, double lanes[16]) {
    constexpr int kWide = kWidth < 32 ? 32 : kWidth;
    constexpr int kLanes = kWide / 8;
    typedef uint16_t Narrow __attribute__((vector_size(kWide / 4)));
    typedef uint64_t Wide __attribute__((vector_size(kWide)));
    typedef double Doubles __attribute__((vector_size(kWide)));
    Doubles sums[16 / kLanes] = {};
    for (int64_t k = 0; k < G; k += 16) {
        if (k % 32 == 0) ask_ahead(w + k);
        for (int i = 0; i < 16 / kLanes; ++i) {
            Narrow bits;
            __builtin_memcpy(&bits, w + k + kLanes * i, sizeof(bits));
            bits &= Bf16::kMagnitude;
            sums[i] += reinterpret_cast<Doubles>(__builtin_convertvector(bits, Wide) << 45);
        }
    }
    __builtin_memcpy(lanes, sums, sizeof(sums));
}

// sums[g] = the sum of the magnitudes of each of kSideGroups groups of G weights, in the order that bitkernels.h fixes.
template <int64_t G, typename T>
inline void sum_side_by_side(const T *w, double sums[kSideGroups]) {
    double lanes[kSideGroups][16];
    for (int64_t g = 0; g < kSideGroups; ++g) add_lanes<G>(w + g * G, lanes[g]);
    for (int64_t g = 0; g < kSideGroups; ++g) sums[g] = lanes[g][0];
    for (int l = 1; l < 16; ++l) {
        for (int64_t g = 0; g < kSideGroups; ++g) sums[g] += lanes[g][l];
    }
}

// scales[c] = the absmean scale of each group of a row.
template <typename T, int64_t G>
inline void group_scales(const typename T::Storage *w, int64_t columns, float *scales) {
    constexpr int32_t type = sizeof(*w) == 4 ? BK_F32 : T::kInfinity == Bf16::kInfinity ? BK_BF16 : BK_F16;
    double sums[kMostGroups];
    int64_t c = 0;
    for (; c + kSideGroups <= columns; c += kSideGroups) {
        const auto *side = w + c * G;
        if constexpr (type == BK_F32) {
            sum_side_by_side<G>(side, sums + c);
        } else if constexpr (type == BK_BF16 && kWidth >= 32) {
            sum_side_by_side<G>(side, sums + c);
            for (int64_t g = 0; g < kSideGroups; ++g) {
                double &sum = sums[c + g];
                sum *= 0x1p896;
                if (!(sum < 0x1p128)) sum = abs_sum(side, type, g * G, G);
            }
        } else {
            float widened[kSideGroups * G];
            for (int64_t k = 0; k < kSideGroups * G; k += 32) ask_ahead(side + k);
            for (int64_t k = 0; k < kSideGroups * G; ++k) widened[k] = T::load(side[k]);
            sum_side_by_side<G>(widened, sums + c);
        }
    }
    for (; c < columns; ++c) sums[c] = abs_sum(w, type, c * G, G);
    const uint32_t least = float_to_bits(1e-5f);
    for (c = 0; c < columns; ++c) {
        const uint32_t mean = float_to_bits(static_cast<float>(sums[c] / G));
        const uint32_t bits = mean < 0x7F800000 ? mean : 0x7FC00000;
        scales[c] = bits_to_float(bits < least ? least : bits);
    }
}

// Brings the scales of a row's groups to two levels: returns the row's, and makes steps of scales.
inline float two_levels(float *scales, int64_t columns, uint8_t *multipliers) {
    // Positive floats are in the order of their bits, NaN above them.
    uint32_t most = 0;
    for (int64_t c = 0; c < columns; ++c) most = float_to_bits(scales[c]) > most ? float_to_bits(scales[c]) : most;
    const float row = bits_to_float(most) / 127.0f;
    for (int64_t c = 0; c < columns; ++c) {
        const float ratio = scales[c] / row;
        // At most 127 (1 + 2^-23), where kRound rounds half to even; NaN gives 1.
        const float rounded = ratio > 1.0f ? ratio + kRound - kRound : 1.0f;
        multipliers[c] = static_cast<uint8_t>(static_cast<int32_t>(rounded));
        scales[c] = rounded * row;
    }
    return row;
}

// threshold() of float32 for many steps at once: near the quotient, or all of them by searching.
inline void search_thresholds(const float *steps, int64_t count, uint32_t *thresholds) {
    int32_t all_near = 1;
    for (int64_t c = 0; c < count; ++c) {
        const float inverse = 1.0f / steps[c];
        const int32_t guess = static_cast<int32_t>(float_to_bits(0.5f / inverse));
        // In integers: of conditions GCC makes branches.
        const auto exceeds = [=](int32_t off) {
            return bits_to_float(static_cast<uint32_t>(guess + off)) * inverse > 0.5f ? 1 : 0;
        };
        const int32_t inside = (guess > 3) & (guess < static_cast<int32_t>(F32::kInfinity) - 2);
        all_near &= inside & (1 - exceeds(-3)) & exceeds(2);
        const int32_t first = guess + 2 - exceeds(1) - exceeds(0) - exceeds(-1) - exceeds(-2);
        thresholds[c] = static_cast<uint32_t>(first);
    }
    if (all_near) return;
    for (int64_t c = 0; c < count; ++c) thresholds[c] = threshold<F32>(1.0f / steps[c]);
}

// The least weight of a type that is no less than a float32, by their bits.
template <typename T>
inline typename T::Bits not_less(uint32_t bits) {
    if constexpr (sizeof(typename T::Bits) == 4) {
        return bits;
    } else if constexpr (T::kInfinity == Bf16::kInfinity) {
        return static_cast<typename T::Bits>((bits + 0xFFFF) >> 16);
    } else {
        if (bits > F32::kInfinity) return T::kInfinity + 1;
        const auto nearest = T::to_bits(bits_to_float(bits));
        return static_cast<typename T::Bits>(nearest + (T::from_bits(nearest) < bits_to_float(bits)));
    }
}

template <typename T, int64_t G>
inline void pack_groups_of(const PackArgs &args, const GroupScales &scales, int64_t first, int64_t last) {
    const int64_t R = (args.N + 3) / 4;
    const auto *weight = static_cast<const typename T::Storage *>(args.weight);
    float steps[kMostGroups];
    uint32_t found[kMostGroups];
    typename T::Bits thresholds[4][kMostGroups];
    for (int64_t r = first; r < last; ++r) {
        const typename T::Storage *rows[4];
        for (int i = 0; i < 4; ++i) {
            const int64_t n = r + i * R;
            rows[i] = weight + (n < args.N ? n : r) * args.K;
            if (n < args.N) {
                group_scales<T, G>(rows[i], args.columns, steps);
                scales.row[n] = two_levels(steps, args.columns, scales.multiplier + n * args.columns);
                search_thresholds(steps, args.columns, found);
                for (int64_t c = 0; c < args.columns; ++c) thresholds[i][c] = not_less<T>(found[c]);
            } else {
                for (int64_t c = 0; c < args.columns; ++c) thresholds[i][c] = T::kInfinity + 1;
            }
        }
        // The four rows are in a cache by now.
        for (int64_t c = 0; c < args.columns; ++c) {
            const typename T::Storage *const group[4] = {rows[0] + c * G, rows[1] + c * G, rows[2] + c * G,
                                                         rows[3] + c * G};
            const typename T::Bits own[4] = {thresholds[0][c], thresholds[1][c], thresholds[2][c], thresholds[3][c]};
            pack_columns<T, false>(group, own, G, args.qweight + r * args.K + c * G);
        }
    }
    stream_end();
}

void pack_groups(const PackArgs &args, const GroupScales &scales, int64_t first, int64_t last) {
    with_type(args.type, [&](auto tag) {
        using T = decltype(tag);
        if (args.K == args.columns * kGroup) {
            pack_groups_of<T, kGroup>(args, scales, first, last);
        } else {
            pack_groups_of<T, 2 * kGroup>(args, scales, first, last);
        }
    });
}
