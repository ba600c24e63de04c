// Groups whose sums are multiplied where they are widened: a group's products are added up in int16, and vpmaddwd takes
// them times the multiplier to int32. For instruction sets that add products of bytes up in int16. Included after
// matmul.inl and
//
//     kGroupWholeSums, kGroupTokens    as kWholeSums and kTokens, for which parts and sums are in registers at once
//     multiply(w, code)                the products that multiply_add() adds, in int16
//     all_of(multiplier)               int32 m | m << 16 repeated
//     widen_by(sums, part, by)         sums plus the products of pairs of int16, added up
//     broadcast_part(low)              the low half of a number in the first of each two places of int16
//     subtract(from, sums), shift_right<kBits>(sums)

constexpr bool kGroupSums = true;
constexpr uint32_t kScaledOffset = 0;

// m | m << 16.
inline uint32_t word_of(uint8_t multiplier) { return multiplier * 0x10001u; }

// What the groups of a packed row are multiplied with: word_of() of the four lanes, group by group; and lane by lane as
// int16, zeros behind.
struct RowTables {
    U8x16 at[kTableGroups];
    alignas(64) int16_t by_lane[4][kTableGroups];

    void set(const uint8_t *const multipliers[4], int64_t count) {
        for_groups(multipliers, count, [&](int64_t g, const U8x16 &four, uint8_t first) {
            constexpr uint8_t n = 0x80;
            constexpr U8x16 by = {0, n, 0, n, 1, n, 1, n, 2, n, 2, n, 3, n, 3, n};
            at[g] = permuted(four, by + first);
        });
        for (int i = 0; i < 4; ++i) {
            for (int64_t g = 0; g < count; ++g) by_lane[i][g] = multipliers[i][g];
            for (int64_t g = count; g % (kWidth / 2) != 0; ++g) by_lane[i][g] = 0;
        }
    }
};

// The sums of the codes of x, of each token and group, as int16, zeros behind: at most 128 times 128 in magnitude.
struct TokenSums {
    alignas(64) int16_t at[kMostDirect][kTableGroups];
    int64_t groups;

    void set(const int32_t *sums, int64_t stride, int64_t count, int64_t columns) {
        groups = columns;
        for (int64_t m = 0; m < count; ++m) {
            for (int64_t g = 0; g < columns; ++g) at[m][g] = static_cast<int16_t>(sums[m * stride + g]);
            for (int64_t g = columns; g % (kWidth / 2) != 0; ++g) at[m][g] = 0;
        }
    }
};

// The first products of a group and L lanes.
template <int L, int T>
inline void first_step(Bytes w, int lane, const int8_t *x, int64_t stride, Part part[T][L]) {
    Bytes lanes[L];
    split<L>(w, lane, lanes);
    for (int t = 0; t < T; ++t) {
        Bytes code = load(x + t * stride);
        in_order(code);
        for (int i = 0; i < L; ++i) part[t][i] = multiply(lanes[i], code);
    }
}

// sums[t][kLane + i] = the sums of L lanes of a packed row and T tokens over k columns, whole groups of G, of codes + 1
// and shifted as split() leaves them; finish_groups() makes them right. A place of the vector takes K / kRows columns:
// at most 127 * 2 * 4 * 128 K / 8, less than 2^31.
template <int L, int T, int kLane, int64_t G>
__attribute__((noinline)) void dot_groups_lanes(const uint8_t *w, const int8_t *x, int64_t stride, int64_t k,
                                                int64_t ahead, const U8x16 *tables, Sums sums[T][4]) {
    Sums own[T][L];
    for (int t = 0; t < T; ++t) {
        for (int i = 0; i < L; ++i) own[t][i] = zero_sums();
    }
    for (int64_t p = 0; p < k; ++tables) {
        ask_for_weights<T>(w + p, ahead);
        Part part[T][L];
        first_step<L, T>(load(w + p), kLane, x + p, stride, part);
        for (const int64_t end = p + G; (p += kWidth) < end;) {
            if (p % kLine == 0) ask_for_weights<T>(w + p, ahead);
            step<L, T>(load(w + p), kLane, x + p, stride, part);
        }
        for (int i = 0; i < L; ++i) {
            const Part multiplier = all_of(reinterpret_cast<const U32x4 &>(*tables)[kLane + i]);
            for (int t = 0; t < T; ++t) own[t][i] = widen_by(own[t][i], part[t][i], multiplier);
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int i = 0; i < L; ++i) sums[t][kLane + i] = own[t][i];
    }
}

// Of one token: undoes the shifts, and takes the sums of the codes of x times the multipliers off.
inline void finish_groups(Sums (&sums)[4], const RowTables &tables, const TokenSums &tokens, int64_t m) {
    static_assert(kLaneShift[0] == 0 && kLaneShift[1] == 2 && kLaneShift[2] == 0 && kLaneShift[3] == 2, "as split()");
    sums[1] = shift_right<2>(sums[1]);
    sums[3] = shift_right<2>(sums[3]);
    for (int i = 0; i < 4; ++i) {
        Sums offset = zero_sums();
        for (int64_t g = 0; g < tokens.groups; g += kWidth / 2) {
            offset = widen_by(offset, load(tables.by_lane[i] + g), load(tokens.at[m] + g));
        }
        sums[i] = subtract(sums[i], offset);
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
// columns. A group starts from minus the sum of its codes of x: at most 64 of these count in a place of int16 with a
// factor of -1 to 1, and 64 with -1, so that no sum leaves int16.
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
