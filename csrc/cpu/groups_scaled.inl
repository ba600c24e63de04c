// Groups whose weights are scaled before they are multiplied: bytes kScaledOffset + code m go straight into the sums of
// all groups, and kScaledOffset times the sum of the codes of x comes off once a token. For instruction sets that add
// products of bytes up in int32. Included after matmul.inl and
//
//     kScaledOffset, multiply_add_scaled(part, w, code)
//     permuted(bytes, by)    16 bytes: for each the one that the low four bits name, or 0 where the high bit is set
//     table(bytes)           16 bytes, repeated
//     look_up<kMask, kFlip>(table, w)    for each byte the one of the table at (w & kMask) ^ kFlip

constexpr bool kGroupSums = false;
constexpr int kGroupWholeSums = kWholeSums;
constexpr int kGroupTokens = kTokens;

// The table of a group holds the scaled bytes of its four lanes where the bits of a lane, as they stand in a half byte,
// find them after one more exclusive or. In a square of four by four places by their high and low two bits, codes + 1
// in the low bits name places of a row, those in the high bits of a column; there is no code + 1 of 3, so that rows 0
// and 3 and columns 3 and 0 have a place less in turn and share none.
constexpr uint8_t kTableMask[4] = {0x03, 0x0C, 0x03, 0x0C};
constexpr uint8_t kTableFlip[4] = {0x00, 0x03, 0x0F, 0x0C};

// What the groups of a packed row are multiplied with.
struct RowTables {
    U8x16 at[kTableGroups];

    void set(const uint8_t *const multipliers[4], int64_t count) {
        for_groups(multipliers, count, [&](int64_t g, const U8x16 &four, uint8_t first) {
            constexpr uint8_t n = 0x80;
            // Which lane's multiplier is added to 128 there, or taken off.
            constexpr U8x16 plus = {n, n, 0, n, 3, n, n, n, n, n, n, 1, n, 2, n, n};
            constexpr U8x16 minus = {0, n, n, 1, n, n, n, n, n, n, n, n, 3, n, n, 2};
            constexpr auto offset = static_cast<uint8_t>(kScaledOffset);
            at[g] = permuted(four, plus + first) - permuted(four, minus + first) + offset;
        });
    }
};

// What of the sums of codes is needed beside the offset: nothing.
struct TokenSums {
    void set(const int32_t *, int64_t, int64_t, int64_t) {}
};
inline void finish_groups(Sums (&)[4], const RowTables &, const TokenSums &, int64_t) {}

// The scaled bytes of L lanes from kLane on.
template <int L, int kLane>
inline void scale_split(Bytes w, Bytes table, Bytes lanes[L]) {
    lanes[0] = look_up<kTableMask[kLane], kTableFlip[kLane]>(table, kLane < 2 ? w : high_half(w));
    if constexpr (L > 1) scale_split<L - 1, kLane + 1>(w, table, lanes + 1);
}

// As step(), for scaled bytes.
template <int L, int T, int kLane>
inline void scaled_step(Bytes w, const U8x16 *tables, const int8_t *x, int64_t stride, Part part[T][L]) {
    Bytes lanes[L];
    in_order(w);
    scale_split<L, kLane>(w, table(tables), lanes);
    for (int t = 0; t < T; ++t) {
        Bytes code = load(x + t * stride);
        in_order(code);
        for (int i = 0; i < L; ++i) part[t][i] = multiply_add_scaled(part[t][i], lanes[i], code);
    }
}

// sums[t][kLane + i] = the sums of L lanes of a packed row and T tokens over k columns, whole groups of G.
template <int L, int T, int kLane, int64_t G>
__attribute__((noinline)) void dot_groups_lanes(const uint8_t *w, const int8_t *x, int64_t stride, int64_t k,
                                                int64_t ahead, const U8x16 *tables, Sums sums[T][4]) {
    Part part[T][L];
    clear<L, T>(part);
    for (int64_t p = 0; p < k; ++tables) {
        for (const int64_t end = p + G; p < end; p += kWidth) {
            if (p % kLine == 0) ask_for_weights<T>(w + p, ahead);
            scaled_step<L, T, kLane>(load(w + p), tables, x + p, stride, part);
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int i = 0; i < L; ++i) sums[t][kLane + i] = widen(zero_sums(), part[t][i]);
    }
}

// What of the multipliers tile_groups() needs beside the panel: nothing.
struct PanelMultipliers {};

// unpack_panel() for whole groups, with scaled bytes.
template <int64_t G>
inline void unpack_group_panel(const LinearArgs &args, int64_t row, int64_t rows, int64_t first, int64_t k,
                               uint8_t *panel, PanelMultipliers &) {
    typedef uint16_t U16x8 __attribute__((vector_size(16)));
    constexpr uint16_t kFlip = static_cast<uint16_t>((kScaledOffset * 0x0101) ^ 0x8080);
    const int64_t quads = k / 4;
    for (int64_t j = 0; j < rows; j += 4) {
        const uint8_t *multipliers[4][4];
        for (int64_t r = 0; r < 4; ++r) {
            multiplier_rows(args, row + (j + r < rows ? j + r : j), first / G, multipliers[r]);
        }
        for (int64_t group = 0; group < k; group += G) {
            U16x8 factor[4], added[4];
            for (int i = 0; i < 4; ++i) {
                const int64_t g = group / G;
                const uint16_t m[4] = {multipliers[0][i][g], multipliers[1][i][g], multipliers[2][i][g],
                                       multipliers[3][i][g]};
                factor[i] = U16x8{m[0], m[0], m[1], m[1], m[2], m[2], m[3], m[3]};
                // Bytes (code + 1) m, minus m: with 128 more in each, none carries into the next or borrows from it.
                added[i] = 0x8080 - factor[i] * 0x0101;
            }
            for (int64_t p = group; p < group + G; p += 16) {
                U32x4 quad[4];
                load_quads(args.qweight + row * args.K + first, args.K, rows, j, p, 16, quad);
                for (int i = 0; i < 4; ++i) {
                    uint8_t *to = panel_place(panel, quads, i * kBlock + j, p);
                    for (int q = 0; q < 4; ++q) {
                        const U32x4 codes = (quad[q] >> (2 * i)) & 0x03030303u;
                        const U16x8 scaled = (reinterpret_cast<U16x8>(codes) * factor[i] + added[i]) ^ kFlip;
                        __builtin_memcpy(to + q * kStep, &scaled, 16);
                    }
                }
            }
        }
    }
}

// acc[t][v * kRows ...] += the sums of V vectors of panel rows and T tokens over `quads` times 4 columns.
template <int V, int T, int64_t G>
inline void tile_groups(const uint8_t *panel, int64_t quads, const int8_t *x, const int32_t *, int64_t,
                        const PanelMultipliers &, int64_t, int32_t *acc) {
    tile<V, T, true>(panel, quads, x, acc);
}
