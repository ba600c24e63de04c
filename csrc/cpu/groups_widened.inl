// Groups whose sums are multiplied where they are widened: a group's products are added up in int16, from minus the sum
// of its codes of x on, and vpmaddwd takes them times the multiplier to int32. At most 64 codes of x count in a place of
// int16 with a factor of -1 to 1 and 64 with -1, so that no sum leaves int16. For instruction sets that add products of
// bytes up in int16. Included after matmul.inl and
//
//     split_plain<L, kLane>(w, lanes)  codes 0 to 2 of L lanes from kLane on
//     start_part(low)                  int16 sums: the low half of a number in the first place
//     broadcast_part(low)              the same in the first of each two places
//     all_of(multiplier)               int32 m | m << 16 repeated
//     widen_by(sums, part, multipliers)

constexpr bool kGroupSums = true;
// minus a sum of codes comes off with the group that it is of.
constexpr uint32_t kScaledOffset = 0;

// The table of a group: m | m << 16 of each lane.
inline uint32_t word_of(uint8_t multiplier) { return multiplier * 0x10001u; }

inline void make_tables(const uint8_t *const multipliers[4], int64_t count, U8x16 *tables) {
    for_groups(multipliers, count, [&](int64_t g, const U8x16 &four, uint8_t at) {
        // Two bytes of a multiplier of 16 bits, twice.
        constexpr uint8_t n = 0x80;
        constexpr U8x16 by = {0, n, 0, n, 1, n, 1, n, 2, n, 2, n, 3, n, 3, n};
        tables[g] = permuted(four, by + at);
    });
}

// As step(), for codes that are not shifted.
template <int L, int T, int kLane>
inline void plain_step(Bytes w, const int8_t *x, int64_t stride, Part part[T][L]) {
    Bytes lanes[L];
    split_plain<L, kLane>(w, lanes);
    for (int t = 0; t < T; ++t) {
        Bytes code = load(x + t * stride);
        in_order(code);
        for (int i = 0; i < L; ++i) part[t][i] = multiply_add(part[t][i], lanes[i], code);
    }
}

// sums[t][kLane + i] += the sums of L lanes of a packed row and T tokens over k columns, whole groups of G. `starts` are
// the sums of the codes of x, `starts_stride` apart from token to token.
template <int L, int T, int kLane, int64_t G>
__attribute__((noinline)) void dot_groups_lanes(const uint8_t *w, const int8_t *x, int64_t stride, int64_t k,
                                                int64_t ahead, const U8x16 *tables, const int32_t *starts,
                                                int64_t starts_stride, Sums sums[T][4]) {
    for (int64_t p = 0; p < k; ++tables, ++starts) {
        Part part[T][L];
        for (int t = 0; t < T; ++t) {
            const Part start = start_part(-starts[t * starts_stride]);
            for (int i = 0; i < L; ++i) part[t][i] = start;
        }
        for (const int64_t end = p + G; p < end; p += kWidth) {
            if (p % kLine == 0) ask_for_weights<T>(w + p, ahead);
            plain_step<L, T, kLane>(load(w + p), x + p, stride, part);
        }
        for (int i = 0; i < L; ++i) {
            const Part multiplier = all_of(reinterpret_cast<const U32x4 &>(*tables)[kLane + i]);
            for (int t = 0; t < T; ++t) sums[t][kLane + i] = widen_by(sums[t][kLane + i], part[t][i], multiplier);
        }
    }
}

// m | m << 16 of the rows of a panel, group by group.
struct PanelMultipliers {
    alignas(64) uint32_t at[kPanelK / kGroup][kBlockOutputs];
};

template <int64_t G>
inline void unpack_group_panel(const LinearArgs &args, int64_t row, int64_t rows, int64_t first, int64_t k,
                               uint8_t *panel, PanelMultipliers &out) {
    unpack_panel(args.qweight + row * args.K + first, args.K, rows, k, k / 4, panel);
    for (int64_t j = 0; j < rows; ++j) {
        const uint8_t *multipliers[4];
        multiplier_rows(args, row + j, first / G, multipliers);
        for (int64_t g = 0; g < k / G; ++g) {
            for (int i = 0; i < 4; ++i) out.at[g][i * kBlock + j] = word_of(multipliers[i][g]);
        }
    }
}

// acc[t][v * kRows ...] += the sums of V vectors of panel rows, from `vector` on, and T tokens over `quads` times 4
// columns.
template <int V, int T, int64_t G>
__attribute__((noinline)) void tile_groups(const uint8_t *panel, int64_t quads, const int8_t *x, const int32_t *starts,
                                           int64_t starts_stride, const PanelMultipliers &multipliers, int64_t vector,
                                           int32_t *acc) {
    int64_t q = 0;
    for (int64_t g = 0; q < quads; ++g) {
        Part part[T][V];
        for (int t = 0; t < T; ++t) {
            const Part start = broadcast_part(-starts[t * starts_stride + g]);
            for (int v = 0; v < V; ++v) part[t][v] = start;
        }
        for (const int64_t end = q + G / 4; q < end; ++q) {
            tile_step<V, T, false>(panel + q * kStep, x + q * 4 * kPanelTokens, part);
        }
        for (int v = 0; v < V; ++v) {
            const Part multiplier = load(multipliers.at[g] + (vector + v) * kRows);
            for (int t = 0; t < T; ++t) {
                int32_t *to = acc + t * kBlockOutputs + v * kRows;
                store_sums(to, widen_by(load_sums(to), part[t][v], multiplier));
            }
        }
    }
}
