// Sums over groups whose scales are in two levels: the sum over groups g of multiplier[n, g] times the sum over k in g
// of code[n, k] x[k], exact in int32; intermediate sums are taken modulo 2^32. Included by each ISA file inside its
// anonymous namespace, between matmul.inl and linear.inl. What is done to a group is in groups_scaled.inl, or with
// BITLAB_WIDENED_GROUPS in groups_widened.inl. An ISA file provides sixteen(from, count): bytes, zeros after the first
// `count`, which alone are read.

constexpr int64_t kGroup = 64;  // groups are one or two of these
// Columns of a packed row whose tables are made at once: they stay in the L1 cache beside the codes.
constexpr int64_t kTableColumns = 16384;
constexpr int64_t kTableGroups = kTableColumns / kGroup;
// Rows ahead whose multipliers are asked for: few bytes of each of four rows, which no prefetcher of a CPU follows.
constexpr int64_t kMultipliersAhead = 2;

// The multipliers of one packed row from a group on; of rows that are missing any will do.
inline void multiplier_rows(const LinearArgs &args, int64_t row, int64_t group, const uint8_t *multipliers[4]) {
    const int64_t R = (args.N + 3) / 4;
    for (int i = 0; i < 4; ++i) {
        const int64_t n = i * R + row < args.N ? i * R + row : row;
        multipliers[i] = args.multiplier + n * (args.K / args.group) + group;
    }
}

// fours[g / 4] = the bytes g of the four lanes, one group after the other.
inline void interleave_bytes(const U8x16 lane[4], U8x16 fours[4]) {
#define BITLAB_HALF(a, b, at)                                                                                      \
    __builtin_shufflevector(a, b, at, 16 + at, at + 1, 17 + at, at + 2, 18 + at, at + 3, 19 + at, at + 4, 20 + at, \
                            at + 5, 21 + at, at + 6, 22 + at, at + 7, 23 + at)
    typedef uint16_t U16x8 __attribute__((vector_size(16)));
    const auto low01 = reinterpret_cast<U16x8>(BITLAB_HALF(lane[0], lane[1], 0));
    const auto high01 = reinterpret_cast<U16x8>(BITLAB_HALF(lane[0], lane[1], 8));
    const auto low23 = reinterpret_cast<U16x8>(BITLAB_HALF(lane[2], lane[3], 0));
    const auto high23 = reinterpret_cast<U16x8>(BITLAB_HALF(lane[2], lane[3], 8));
#undef BITLAB_HALF
    fours[0] = reinterpret_cast<U8x16>(__builtin_shufflevector(low01, low23, 0, 8, 1, 9, 2, 10, 3, 11));
    fours[1] = reinterpret_cast<U8x16>(__builtin_shufflevector(low01, low23, 4, 12, 5, 13, 6, 14, 7, 15));
    fours[2] = reinterpret_cast<U8x16>(__builtin_shufflevector(high01, high23, 0, 8, 1, 9, 2, 10, 3, 11));
    fours[3] = reinterpret_cast<U8x16>(__builtin_shufflevector(high01, high23, 4, 12, 5, 13, 6, 14, 7, 15));
}

// Calls f(g, fours, at) for each group, up to a multiple of 16: the bytes of its four multipliers are the ones of
// `fours` from `at` on.
template <typename F>
inline void for_groups(const uint8_t *const multipliers[4], int64_t count, F &&f) {
    for (int64_t first = 0; first < count; first += 16) {
        const int64_t left = count - first;
        U8x16 lane[4], fours[4];
        for (int i = 0; i < 4; ++i) lane[i] = sixteen(multipliers[i] + first, left);
        interleave_bytes(lane, fours);
        for (int64_t four = 0; four < 4; ++four) {
            for (uint8_t at = 0; at < 16; at += 4) f(first + 4 * four + at / 4, fours[four], at);
        }
    }
}

#ifdef BITLAB_WIDENED_GROUPS
#include "groups_widened.inl"
#else
#include "groups_scaled.inl"
#endif

// acc[t][i * kBlock] += the sums of a packed row and T tokens, from the m-th on, over k columns, whole groups of G.
template <int T, int64_t G>
inline void dot_groups(const uint8_t *w, const int8_t *x, int64_t stride, int64_t k, int64_t ahead,
                       const RowTables &tables, const TokenSums &tokens, int64_t m, int32_t *acc) {
    Sums sums[T][4];
    if constexpr (4 * T <= kGroupWholeSums) {
        dot_groups_lanes<4, T, 0, G>(w, x, stride, k, ahead, tables.at, sums);
    } else {
        dot_groups_lanes<2, T, 0, G>(w, x, stride, k, ahead, tables.at, sums);
        dot_groups_lanes<2, T, 2, G>(w, x, stride, k, 0, tables.at, sums);
    }
    for (int t = 0; t < T; ++t) {
        finish_groups(sums[t], tables, tokens, m + t);
        int32_t raw[4];
        reduce(sums[t], raw);
        for (int i = 0; i < 4; ++i) add_wrapping(acc[t * kBlockOutputs + i * kBlock], raw[i]);
    }
}

// acc[m][i][j] += the sums of packed rows and `count` rows of codes x.
template <int64_t G>
inline void add_group_rows(const LinearArgs &args, int64_t row, int64_t rows, const int8_t *x, const int32_t *starts,
                           int64_t count, int32_t *acc) {
    const int64_t K = args.K, stride = padded(K);
    const int64_t parts = parts_in_cache(count, K);
    const int64_t part = ((K + parts - 1) / parts + G - 1) / G * G;
    const int64_t width = part < kTableColumns ? part : kTableColumns;
    RowTables tables;
    TokenSums sums;
    for (int64_t first = 0; first < K; first += width) {
        const int64_t size = K - first < width ? K - first : width;
        const int64_t ahead = size == K ? kPrefetch : K;
        sums.set(starts + first / G, args.x.columns, count, size / G);
        for (int64_t j = 0; j < rows; ++j) {
            const uint8_t *multipliers[4];
            multiplier_rows(args, row + j, first / G, multipliers);
            for (const uint8_t *own : multipliers) {
                for (int64_t b = 0; b < size / G; b += kLine) __builtin_prefetch(own + kMultipliersAhead * (K / G) + b);
            }
            tables.set(multipliers, size / G);
            by_tokens<kGroupTokens>(count, [&](int64_t m, auto tokens) {
                dot_groups<decltype(tokens)::value, G>(args.qweight + (row + j) * K + first, x + m * stride + first,
                                                       stride, size, ahead, tables, sums, m,
                                                       acc + m * kBlockOutputs + j);
            });
        }
    }
}

// The same; x are panels of codes.
template <int64_t G>
inline void add_group_panels(const LinearArgs &args, int64_t row, int64_t rows, const int8_t *x, const int32_t *starts,
                             int64_t count, uint8_t *panel, int32_t *acc) {
    PanelMultipliers multipliers = {};
    for (int64_t first = 0; first < args.K; first += kPanelK) {
        const int64_t size = args.K - first < kPanelK ? args.K - first : kPanelK;
        const int64_t quads = size / 4;
        unpack_group_panel<G>(args, row, rows, first, size, panel, multipliers);
        for (int64_t v = 0; v < kBlockOutputs / kRows; v += kPanelVectors) {
            by_tokens<kPanelTokens>(count, [&](int64_t m, auto tokens) {
                tile_groups<kPanelVectors, decltype(tokens)::value, G>(
                    panel + v * quads * kWidth, quads, x + m * padded(args.K) + first * kPanelTokens,
                    starts + m * args.x.columns + first / G, args.x.columns, multipliers, v,
                    acc + m * kBlockOutputs + v * kRows);
            });
        }
    }
}
