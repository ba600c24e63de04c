// Exact integer sums of packed rows and codes. Included by each ISA file inside its anonymous namespace, after
//
//     kWidth, kRows              bytes in a vector; int32 lanes in one (kWidth / 4)
//     Bytes, Part, Sums          vectors of bytes; of what multiply_add() adds up; of int32
//     kSplitChunk, kPanelChunk   how often one Part may be added to, by the lanes of split(), by codes of 0 to 2
//     kLaneShift[4]              what the sums of each lane of split() are shifted right by
//     kWholeSums, kTokens        sums for which all four lanes are taken at once, else two; tokens dot() takes at once
//     kCodesFromL1               whether dot() takes codes faster than the L2 cache gives them
//     kPrefetchTwice             whether weights are asked for into the L2 cache; one token's then into L1 too
//     stream(to, line)           stores 64 bytes that are not read again soon; stream_end() after the last of them
//     kPanelVectors, kPanelTokens, kPanelFrom   shape of a tile; rows of codes from which unpacking pays
//     load, broadcast, split, zero_part, zero_sums, multiply_add, widen, reduce, load_sums, store_sums
//     in_order(vector)           keeps it in a register, and GCC from moving what comes before past what comes after:
//                                it would load all operands first and spill sums for them
//
// Two ways to the same sums. dot() reads one packed row as it lies in memory, for few tokens: the four lanes of a byte
// come apart by masks, and memory is read strictly in sequence. tile() reads a panel: a block of columns of 64 rows,
// unpacked once into the L1 cache with four columns of one row side by side, which all tokens then share.

typedef uint32_t U32x4 __attribute__((vector_size(16)));

// One step of 16 columns may be read past a row's end only if it is in the codes, never in the weights.
constexpr int64_t kPrefetch = 4096;
// With kPrefetchTwice: a core may have more lines on their way to its L2 cache than to L1.
constexpr int64_t kPrefetchL2 = 8192;
constexpr int64_t kPrefetchL1 = 2048;
constexpr int64_t kLine = 64;
// What one pass over the codes of few tokens may take of the L2 cache. Parts that fit the L1 cache break the sequence
// of the weights, which costs more than reading codes from L2, unless kCodesFromL1.
constexpr int64_t kCodesInL2 = 256 * 1024;
constexpr int64_t kCodesInL1 = 32 * 1024;

// Asks for the weights that T tokens will be multiplied with soon.
template <int T>
inline void ask_for_weights(const uint8_t *w, int64_t ahead) {
    if constexpr (T == 1 && kPrefetchTwice) {
        __builtin_prefetch(w + kPrefetchL2, 0, 2);
        __builtin_prefetch(w + kPrefetchL1);
    } else {
        __builtin_prefetch(w + ahead, 0, kPrefetchTwice ? 2 : 3);
    }
}

// One vector of a packed row: L lanes from `lane` on, times the codes of T tokens.
template <int L, int T>
inline void step(Bytes w, int lane, const int8_t *x, int64_t stride, Part part[T][L]) {
    Bytes lanes[L];
    split<L>(w, lane, lanes);
    for (int t = 0; t < T; ++t) {
        Bytes code = load(x + t * stride);
        in_order(code);
        for (int i = 0; i < L; ++i) part[t][i] = multiply_add(part[t][i], lanes[i], code);
    }
}

template <int L, int T>
inline void clear(Part part[T][L]) {
    for (int t = 0; t < T; ++t) {
        for (int i = 0; i < L; ++i) part[t][i] = zero_part();
    }
}

// Not inlined, as tile() is not: each is compiled with the registers of its own loop alone.
template <int L, int T>
__attribute__((noinline)) void dot_lanes(const uint8_t *w, int lane, const int8_t *x, int64_t stride, int64_t k,
                                         int64_t ahead, Sums sums[T][4]) {
    Part part[T][L];
    const auto add = [&] {
        for (int t = 0; t < T; ++t) {
            for (int i = 0; i < L; ++i) sums[t][lane + i] = widen(sums[t][lane + i], part[t][i]);
        }
    };
    const int64_t whole = k / kWidth * kWidth;
    for (int64_t p = 0; p < whole;) {
        const int64_t end = whole - p < kSplitChunk * kWidth ? whole : p + kSplitChunk * kWidth;
        clear<L, T>(part);
        for (; p + kLine <= end; p += kLine) {
            ask_for_weights<T>(w + p, ahead);
            for (int64_t u = 0; u < kLine; u += kWidth) step<L, T>(load(w + p + u), lane, x + p + u, stride, part);
        }
        for (; p < end; p += kWidth) step<L, T>(load(w + p), lane, x + p, stride, part);
        add();
    }
    if (whole < k) {
        alignas(64) uint8_t tail[kWidth] = {};
        __builtin_memcpy(tail, w + whole, static_cast<size_t>(k - whole));
        clear<L, T>(part);
        step<L, T>(load(tail), lane, x + whole, stride, part);
        add();
    }
}

// acc[t][i * kBlock] += the sum over k of (code_i + 1) * x_t, for one packed row w and T tokens.
template <int T>
inline void dot(const uint8_t *w, const int8_t *x, int64_t stride, int64_t k, int64_t ahead, int32_t *acc) {
    Sums sums[T][4];
    for (int t = 0; t < T; ++t) {
        for (int i = 0; i < 4; ++i) sums[t][i] = zero_sums();
    }
    if constexpr (4 * T <= kWholeSums) {
        dot_lanes<4, T>(w, 0, x, stride, k, ahead, sums);
    } else {
        // Two lanes at a time leave registers for twice the tokens; the row is in the L1 cache the second time.
        dot_lanes<2, T>(w, 0, x, stride, k, ahead, sums);
        dot_lanes<2, T>(w, 2, x, stride, k, 0, sums);
    }
    for (int t = 0; t < T; ++t) {
        int32_t raw[4];
        reduce(sums[t], raw);
        for (int i = 0; i < 4; ++i) acc[t * kBlockOutputs + i * kBlock] += raw[i] >> kLaneShift[i];
    }
}

// Calls f with the constants kMost, ..., kMost, rest: how `count` tokens are shared out.
template <int kMost, typename F>
inline void rest_of(int64_t rest, int64_t m, F &&f) {
    if constexpr (kMost > 0) {
        if (rest == kMost) {
            f(m, Constant<kMost>{});
        } else {
            rest_of<kMost - 1>(rest, m, f);
        }
    }
}

template <int kMost, typename F>
inline void by_tokens(int64_t count, F &&f) {
    int64_t m = 0;
    for (; m + kMost <= count; m += kMost) f(m, Constant<kMost>{});
    rest_of<kMost - 1>(count - m, m, f);
}

// In how many parts of K the codes of some tokens are taken, so that each stays in a cache.
inline int64_t parts_in_cache(int64_t count, int64_t k) {
    const int64_t cache = kCodesFromL1 && count <= kTokens ? kCodesInL1 : kCodesInL2;
    return count > 1 ? (count * k + cache - 1) / cache : 1;
}

// acc[m][i][j] += the sums of packed rows w + j * K and codes of columns [0, k).
inline void add_rows(const uint8_t *w, int64_t K, int64_t rows, const int8_t *x, int64_t stride, int64_t count,
                     int64_t k, int32_t *acc) {
    const int64_t parts = parts_in_cache(count, k);
    const int64_t width = padded((k + parts - 1) / parts);
    for (int64_t first = 0; first < k; first += width) {
        const int64_t size = k - first < width ? k - first : width;
        const int64_t ahead = parts == 1 ? kPrefetch : K;
        for (int64_t j = 0; j < rows; ++j) {
            by_tokens<kTokens>(count, [&](int64_t m, auto tokens) {
                dot<decltype(tokens)::value>(w + j * K + first, x + m * stride + first, stride, size, ahead,
                                             acc + m * kBlockOutputs + j);
            });
        }
    }
}

constexpr int64_t kStep = kPanelVectors * kWidth;

// Lays the codes of kPanelTokens rows side by side, four columns of each: panels[rows / kPanelTokens][k / 4][row][4].
// A tile then reads its codes in sequence. Places of rows that are missing in the last panel are left as they are.
void interleave(const int8_t *codes, int64_t stride, int64_t rows, int8_t *panels) {
    for (int64_t m = 0; m < rows; ++m) {
        const int8_t *from = codes + m * stride;
        int8_t *to = panels + m / kPanelTokens * kPanelTokens * stride + m % kPanelTokens * 4;
        for (int64_t k = 0; k < stride; k += 4) __builtin_memcpy(to + k * kPanelTokens, from + k, 4);
    }
}

// `count` packed columns, up to 16, from p on of rows j to j + 3, zeros behind: quad[c / 4] has the bytes of four
// columns of each row. Rows that are missing are row j again.
inline void load_quads(const uint8_t *w, int64_t K, int64_t rows, int64_t j, int64_t p, int64_t count, U32x4 quad[4]) {
    U32x4 row[4];
    for (int64_t r = 0; r < 4; ++r) {
        const uint8_t *from = w + (j + r < rows ? j + r : j) * K + p;
        alignas(16) uint8_t bytes[16] = {};
        if (count == 16) {
            __builtin_memcpy(&row[r], from, 16);
        } else {
            __builtin_memcpy(bytes, from, static_cast<size_t>(count));
            __builtin_memcpy(&row[r], bytes, 16);
        }
    }
    const U32x4 low02 = __builtin_shufflevector(row[0], row[2], 0, 4, 1, 5);
    const U32x4 low13 = __builtin_shufflevector(row[1], row[3], 0, 4, 1, 5);
    const U32x4 high02 = __builtin_shufflevector(row[0], row[2], 2, 6, 3, 7);
    const U32x4 high13 = __builtin_shufflevector(row[1], row[3], 2, 6, 3, 7);
    quad[0] = __builtin_shufflevector(low02, low13, 0, 4, 1, 5);
    quad[1] = __builtin_shufflevector(low02, low13, 2, 6, 3, 7);
    quad[2] = __builtin_shufflevector(high02, high13, 0, 4, 1, 5);
    quad[3] = __builtin_shufflevector(high02, high13, 2, 6, 3, 7);
}

// Where a panel of `quads` times 4 columns has the four columns from k on of a row.
inline uint8_t *panel_place(uint8_t *panel, int64_t quads, int64_t row, int64_t k) {
    const int64_t v = row / kRows;
    return panel + (v / kPanelVectors * quads + k / 4) * kStep + v % kPanelVectors * kWidth + row % kRows * 4;
}

// Unpacks `rows` packed rows of k columns: for row i * kBlock + j, in vectors of kRows rows and kPanelVectors of those
// side by side, panel[vector / kPanelVectors][k / 4][vector % kPanelVectors][row][4], codes + 1.
// Rows that are missing are left as they are; columns are filled up with zeros to a multiple of 16.
inline void unpack_panel(const uint8_t *w, int64_t K, int64_t rows, int64_t k, int64_t quads, uint8_t *panel) {
    for (int64_t j = 0; j < rows; j += 4) {
        for (int64_t p = 0; p < k; p += 16) {
            U32x4 quad[4];
            load_quads(w, K, rows, j, p, k - p < 16 ? k - p : 16, quad);
            for (int i = 0; i < 4; ++i) {
                uint8_t *to = panel_place(panel, quads, i * kBlock + j, p);
                for (int q = 0; q < 4; ++q) {
                    const U32x4 codes = (quad[q] >> (2 * i)) & 0x03030303u;
                    __builtin_memcpy(to + q * kStep, &codes, 16);
                }
            }
        }
    }
}

// One quad of columns: V vectors of panel rows, of codes or of scaled weights, times the codes of T tokens.
template <int V, int T, bool kIsScaled>
inline void tile_step(const uint8_t *panel, const int8_t *x, Part part[T][V]) {
    Bytes w[V];
    for (int v = 0; v < V; ++v) w[v] = load(panel + v * kWidth);
    for (int t = 0; t < T; ++t) {
        const Bytes code = broadcast(x + 4 * t);
        for (int v = 0; v < V; ++v) {
            if constexpr (kIsScaled) {
                part[t][v] = multiply_add_scaled(part[t][v], w[v], code);
            } else {
                part[t][v] = multiply_add(part[t][v], w[v], code);
            }
            in_order(part[t][v]);
        }
    }
}

// acc[t][v * kRows ...] += the sums of V vectors of panel rows and T tokens over `quads` times 4 columns.
template <int V, int T, bool kIsScaled = false>
__attribute__((noinline)) void tile(const uint8_t *panel, int64_t quads, const int8_t *x, int32_t *acc) {
    for (int64_t q = 0; q < quads;) {
        const int64_t end = quads - q < kPanelChunk ? quads : q + kPanelChunk;
        Part part[T][V];
        clear<V, T>(part);
        for (; q < end; ++q) tile_step<V, T, kIsScaled>(panel + q * kStep, x + q * 4 * kPanelTokens, part);
        for (int t = 0; t < T; ++t) {
            for (int v = 0; v < V; ++v) {
                int32_t *to = acc + t * kBlockOutputs + v * kRows;
                store_sums(to, widen(load_sums(to), part[t][v]));
            }
        }
    }
}

// acc as in add_rows(); x are panels of codes, as interleave() lays them out, from the first column on.
inline void add_panels(const uint8_t *w, int64_t K, int64_t rows, const int8_t *x, int64_t stride, int64_t count,
                       int64_t k, uint8_t *panel, int32_t *acc) {
    for (int64_t first = 0; first < k; first += kPanelK) {
        const int64_t size = k - first < kPanelK ? k - first : kPanelK;
        const int64_t quads = (size + 15) / 16 * 4;
        unpack_panel(w + first, K, rows, size, quads, panel);
        for (int64_t v = 0; v < kBlockOutputs / kRows; v += kPanelVectors) {
            by_tokens<kPanelTokens>(count, [&](int64_t m, auto tokens) {
                tile<kPanelVectors, decltype(tokens)::value>(panel + v * quads * kWidth, quads,
                                                             x + m * stride + first * kPanelTokens,
                                                             acc + m * kBlockOutputs + v * kRows);
            });
        }
    }
}
