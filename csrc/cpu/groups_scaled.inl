// Groups whose weights are scaled before they are multiplied: bytes kScaledOffset + code m go straight into the sums of
// all groups, and kScaledOffset times the sum of the codes of x comes off once a token. For instruction sets that add
// products of bytes up in int32. Included after matmul.inl and
//
//     kScaledOffset, multiply_add_scaled(part, w, code)
//     table(from)         a vector of 16 bytes repeated
//     choose(table, by)   the bytes of a table that the low four bits of each byte name; the high ones are zero
//     low_half(w), high_half(w)   the low and the high four bits of each byte

constexpr bool kGroupSums = false;
// Of one packed row and group: 16 bytes a lane, found by the four bits of two lanes, the even one's in the low bits.
constexpr int64_t kTables = 64;

#ifndef BITLAB_OWN_TABLES
inline void make_tables(const uint8_t *const multipliers[4], int64_t count, uint8_t *tables) {
    typedef uint8_t Bytes16 __attribute__((vector_size(16)));
    constexpr uint8_t o = 0, x = 0xFF;
    // By the two bits of a code + 1: minus the multiplier, nothing, plus it.
    constexpr Bytes16 minus[2] = {{x, o, o, o, x, o, o, o, x, o, o, o, x, o, o, o},
                                  {x, x, x, x, o, o, o, o, o, o, o, o, o, o, o, o}};
    constexpr Bytes16 plus[2] = {{o, o, x, o, o, o, x, o, o, o, x, o, o, o, x, o},
                                 {o, o, o, o, o, o, o, o, x, x, x, x, o, o, o, o}};
    for (int64_t g = 0; g < count; ++g) {
        for (int i = 0; i < 4; ++i) {
            const Bytes16 m = Bytes16{} + multipliers[i][g];
            const Bytes16 bytes = static_cast<uint8_t>(kScaledOffset) + (m & plus[i % 2]) - (m & minus[i % 2]);
            __builtin_memcpy(tables + g * kTables + i * 16, &bytes, 16);
        }
    }
}
#endif

// The scaled bytes of L lanes from `lane` on, which is even.
template <int L>
inline void scale_split(Bytes w, int lane, const uint8_t *tables, Bytes lanes[L]) {
    for (int i = 0; i < L; i += 2) {
        const Bytes codes = lane + i == 0 ? low_half(w) : high_half(w);
        lanes[i] = choose(table(tables + (lane + i) * 16), codes);
        lanes[i + 1] = choose(table(tables + (lane + i + 1) * 16), codes);
    }
}

// sums[t][lane + i] += the sums of L lanes of a packed row and T tokens over k columns, whole groups of G.
template <int L, int T, int64_t G>
__attribute__((noinline)) void dot_groups_lanes(const uint8_t *w, int lane, const int8_t *x, int64_t stride, int64_t k,
                                                int64_t ahead, const uint8_t *tables, const int32_t *, int64_t,
                                                Sums sums[T][4]) {
    Part part[T][L];
    clear<L, T>(part);
    for (int64_t p = 0; p < k; tables += kTables) {
        for (const int64_t end = p + G; p < end; p += kWidth) {
            if (p % kLine == 0) ask_for_weights<T>(w + p, ahead);
            Bytes lanes[L];
            scale_split<L>(load(w + p), lane, tables, lanes);
            for (int t = 0; t < T; ++t) {
                Bytes code = load(x + t * stride + p);
                in_order(code);
                for (int i = 0; i < L; ++i) part[t][i] = multiply_add_scaled(part[t][i], lanes[i], code);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int i = 0; i < L; ++i) sums[t][lane + i] = widen(sums[t][lane + i], part[t][i]);
    }
}

// What of the multipliers add_group_panel() needs beside the panel: nothing.
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
                for (int e = 0; e < 8; ++e) factor[i][e] = multipliers[e / 2][i][group / G];
                // Bytes (code + 1) m, minus m: with 128 more in each, none carries into the next or borrows from it.
                added[i] = 0x8080 - factor[i] * 0x0101;
            }
            for (int64_t p = group; p < group + G; p += 16) {
                U32x4 quad[4];
                load_quads(args.qweight + row * args.K + first, args.K, rows, j, p, 16, quad);
                for (int i = 0; i < 4; ++i) {
                    const int64_t v = (i * kBlock + j) / kRows;
                    uint8_t *to = panel + (v / kPanelVectors * quads + p / 4) * kStep + v % kPanelVectors * kWidth +
                                  j % kRows * 4;
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
__attribute__((noinline)) void tile_groups(const uint8_t *panel, int64_t quads, const int8_t *x, const int32_t *,
                                           int64_t, const PanelMultipliers &, int64_t, int32_t *acc) {
    Part part[T][V];
    clear<V, T>(part);
    for (int64_t q = 0; q < quads; ++q) {
        Bytes w[V];
        for (int v = 0; v < V; ++v) w[v] = load(panel + q * kStep + v * kWidth);
        for (int t = 0; t < T; ++t) {
            const Bytes code = broadcast(x + q * 4 * kPanelTokens + 4 * t);
            for (int v = 0; v < V; ++v) {
                part[t][v] = multiply_add_scaled(part[t][v], w[v], code);
                in_order(part[t][v]);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < V; ++v) {
            int32_t *to = acc + t * kBlockOutputs + v * kRows;
            store_sums(to, widen(load_sums(to), part[t][v]));
        }
    }
}
