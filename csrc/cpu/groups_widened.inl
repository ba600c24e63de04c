// Groups whose sums are multiplied where they are widened: a group's products are added up in int16, from minus the sum
// of its codes of x on, and vpmaddwd takes them times the multiplier to int32. At most 64 codes of x count in a place of
// int16 with a factor of -1 to 1 and 64 with -1, so that no sum leaves int16. For instruction sets that add products of
// bytes up in int16. Included after matmul.inl and
//
//     split_plain<L>(w, lane, lanes)   codes 0 to 2 of L lanes from `lane` on
//     start_part(low)                  int16 sums: the low half of a number in the first place
//     broadcast_part(low)              the same in the first of each two places
//     all_of(multiplier)               int32 m | m << 16 repeated
//     widen_by(sums, part, multipliers)

constexpr bool kGroupSums = true;
// minus a sum of codes comes off with the group that it is of.
constexpr uint32_t kScaledOffset = 0;
// Of one packed row and group: m | m << 16 of each lane.
constexpr int64_t kTables = 16;

inline void make_tables(const uint8_t *const multipliers[4], int64_t count, uint8_t *tables) {
    for (int64_t g = 0; g < count; ++g) {
        uint32_t words[4];
        for (int i = 0; i < 4; ++i) words[i] = multipliers[i][g] * 0x10001u;
        __builtin_memcpy(tables + g * kTables, words, kTables);
    }
}

// sums[t][lane + i] += the sums of L lanes of a packed row and T tokens over k columns, whole groups of G. `starts` are
// the sums of the codes of x, `starts_stride` apart from token to token.
template <int L, int T, int64_t G>
__attribute__((noinline)) void dot_groups_lanes(const uint8_t *w, int lane, const int8_t *x, int64_t stride, int64_t k,
                                                int64_t ahead, const uint8_t *tables, const int32_t *starts,
                                                int64_t starts_stride, Sums sums[T][4]) {
    for (int64_t p = 0; p < k; tables += kTables, ++starts) {
        Part part[T][L];
        for (int t = 0; t < T; ++t) {
            const Part start = start_part(-starts[t * starts_stride]);
            for (int i = 0; i < L; ++i) part[t][i] = start;
        }
        for (const int64_t end = p + G; p < end; p += kWidth) {
            if (p % kLine == 0) ask_for_weights<T>(w + p, ahead);
            Bytes lanes[L];
            split_plain<L>(load(w + p), lane, lanes);
            for (int t = 0; t < T; ++t) {
                Bytes code = load(x + t * stride + p);
                in_order(code);
                for (int i = 0; i < L; ++i) part[t][i] = multiply_add(part[t][i], lanes[i], code);
            }
        }
        for (int i = 0; i < L; ++i) {
            uint32_t multiplier;
            __builtin_memcpy(&multiplier, tables + (lane + i) * 4, 4);
            for (int t = 0; t < T; ++t) {
                sums[t][lane + i] = widen_by(sums[t][lane + i], part[t][i], all_of(multiplier));
            }
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
            for (int i = 0; i < 4; ++i) out.at[g][i * kBlock + j] = multipliers[i][g] * 0x10001u;
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
            tile_step<V, T>(panel + q * kStep, x + q * 4 * kPanelTokens, part);
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
