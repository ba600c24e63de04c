// All experts of a layer, before their products: which rows of y are whose, and what x is quantized to.
//
// One block sorts the rows of y by expert and cuts them into tiles of a few or of many tokens, in lists that the
// matrix kernels read: their grids are as large as the lists may become, and no count is ever read by the host. Each
// warp counts a share of the rows, and the counts of all warps lie side by side in shared memory, so there are no
// atomics and the rows of an expert stay in order. Meanwhile other blocks make the codes of the tokens, write zeros
// where a row has no expert, and place the multipliers of the experts that have rows.
#ifndef BITLAB_CUDA_ROUTE_CUH
#define BITLAB_CUDA_ROUTE_CUH

#include "activations.cuh"
#include "experts.h"

namespace bitlab {

constexpr int kRouteWarps = kQuantizeThreads / kWarp;
// Shared memory before the counts: three sums of each warp.
constexpr uint32_t kRouteScratch = 3 * 4 * kRouteWarps;

// Tiles of tokens, in words: the expert, the first of its sorted rows, and how many it has from there on, which may be
// more than a tile's; those past the last have none.
struct TileList {
    Bytes16 *tiles;
    int32_t most;    // that there may be; 0: there is no such list
    int32_t tokens;  // of a tile
};

struct RouteParams {
    const int64_t *index;  // [rows]: the expert of each row of y; any number that is not one of an expert is none
    int32_t rows;
    int32_t experts;
    int32_t choices;  // rows of y that each token has
    int32_t sharing;  // rows of y with one row of codes: choices, or 1 where a token's codes depend on the expert
    int32_t *sorted;  // [rows]: rows of y in the order of the experts; those without one are left out
    int32_t *codes;   // [rows]: the row of codes of each of these
    TileList few, many;
    int32_t warps;  // that count
};

// How many warps' counts fit in shared memory.
inline int32_t route_warps(int64_t experts) {
    const int64_t most = static_cast<int64_t>(kSharedBytes - kRouteScratch) / (4 * experts);
    return static_cast<int32_t>(most < kRouteWarps ? most : kRouteWarps);
}

inline uint32_t route_shared_bytes(int64_t experts) {
    return kRouteScratch + 4u * static_cast<uint32_t>(experts * route_warps(experts));
}

// The expert of a row of y, or -1; past the last row -1.
BK_DEVICE int32_t expert_of(const RouteParams &p, int64_t row) {
    if (row >= p.rows) return -1;
    const int64_t expert = load_global(p.index + row);
    return expert >= 0 && expert < p.experts ? static_cast<int32_t>(expert) : -1;
}

// Where a warp's count of an expert lies, and later the place of its next row.
BK_DEVICE uint32_t count_at(const RouteParams &p, int warp, int32_t expert) {
    return kRouteScratch + 4u * static_cast<uint32_t>(warp * p.experts + expert);
}

// How many lanes have the same value: those before this one, and all.
struct Alike {
    int32_t before, all;
};

BK_DEVICE Alike lanes_alike(int32_t value) {
    const int lane = thread_x() % kWarp;
    Alike alike = {0, 0};
    BK_UNROLL
    for (int other = 0; other < kWarp; ++other) {
        const int32_t same = shuffle(value, other) == value ? 1 : 0;
        alike.all += same;
        if (other < lane) alike.before += same;
    }
    return alike;
}

// Counts this warp's share of the rows, from what stands in the counts on: visit(row, count before it).
template <typename Visit>
BK_DEVICE void count_rows(const RouteParams &p, const Visit &visit) {
    const int warp = thread_x() / kWarp, lane = thread_x() % kWarp;
    if (warp >= p.warps) return;
    const auto together = static_cast<uint32_t>(kWarp * p.warps);
    const int64_t share = (static_cast<uint32_t>(p.rows) + together - 1) / together * kWarp;
    for (int64_t first = share * warp; first < share * (warp + 1) && first < p.rows; first += kWarp) {
        const int32_t expert = expert_of(p, first + lane);
        const Alike alike = lanes_alike(expert);
        int32_t count = 0;
        if (expert >= 0) count = load_shared<int32_t>(count_at(p, warp, expert));
        sync_warp();
        if (expert >= 0 && alike.before == 0) store_shared(count_at(p, warp, expert), count + alike.all);
        sync_warp();
        if (expert >= 0) visit(first + lane, count + alike.before);
    }
}

// Adds to a thread's sums those of the threads before it, and `before`, which then grows by those of all.
BK_DEVICE void scan_block(int32_t (&sums)[3], int32_t (&before)[3]) {
    const int warp = thread_x() / kWarp, lane = thread_x() % kWarp;
    BK_UNROLL
    for (int i = 0; i < 3; ++i) {
        BK_UNROLL
        for (int step = 1; step < kWarp; step *= 2) {
            const int32_t other = shuffle(sums[i], lane - step);
            if (lane >= step) sums[i] += other;
        }
        if (lane == kWarp - 1) store_shared(4u * static_cast<uint32_t>(3 * warp + i), sums[i]);
    }
    sync_block();
    for (int w = 0; w < kRouteWarps; ++w) {
        BK_UNROLL
        for (int i = 0; i < 3; ++i) {
            if (w == warp) sums[i] += before[i];
            before[i] += load_shared<int32_t>(4u * static_cast<uint32_t>(3 * w + i));
        }
    }
    sync_block();
}

BK_DEVICE void store_tile(const TileList &list, int32_t at, int32_t expert, int32_t first, int32_t count) {
    store_global(list.tiles + at, Bytes16{{static_cast<uint32_t>(expert), static_cast<uint32_t>(first),
                                           static_cast<uint32_t>(count), 0}});
}

BK_DEVICE int32_t tiles_of(const TileList &list, int32_t count) { return (count + list.tokens - 1) / list.tokens; }

BK_DEVICE void sort_rows(const RouteParams &p) {
    for (int32_t i = thread_x(); i < p.warps * p.experts; i += kQuantizeThreads) {
        store_shared(kRouteScratch + 4u * static_cast<uint32_t>(i), int32_t{0});
    }
    sync_block();
    count_rows(p, [](int64_t, int32_t) {});
    sync_block();
    int32_t before[3] = {};  // rows, tiles of few tokens, tiles of many
    for (int32_t round = 0; round < p.experts; round += kQuantizeThreads) {
        const int32_t expert = round + thread_x();
        int32_t count = 0;
        for (int w = 0; expert < p.experts && w < p.warps; ++w) count += load_shared<int32_t>(count_at(p, w, expert));
        const bool many = p.many.most > 0 && count > kFewTokens;
        const TileList list = many ? p.many : p.few;
        const int32_t tiles = tiles_of(list, count);
        int32_t sums[3] = {count, many ? 0 : tiles, many ? tiles : 0};
        scan_block(sums, before);
        if (expert >= p.experts) continue;
        int32_t next = sums[0] - count, at = (many ? sums[2] : sums[1]) - tiles;
        for (int32_t done = 0; done < count; done += list.tokens, ++at) {
            store_tile(list, at, expert, next + done, count - done);
        }
        for (int w = 0; w < p.warps; ++w) {
            const int32_t own = load_shared<int32_t>(count_at(p, w, expert));
            store_shared(count_at(p, w, expert), next);
            next += own;
        }
    }
    for (int32_t at = before[1] + thread_x(); at < p.few.most; at += kQuantizeThreads) store_tile(p.few, at, 0, 0, 0);
    for (int32_t at = before[2] + thread_x(); at < p.many.most; at += kQuantizeThreads) store_tile(p.many, at, 0, 0, 0);
    sync_block();
    count_rows(p, [&](int64_t row, int32_t place) {
        store_global(p.sorted + place, static_cast<int32_t>(row));
        store_global(p.codes + place, static_cast<int32_t>(static_cast<uint32_t>(row) / p.sharing));
    });
}

struct ExpertsQuantizeParams {
    QuantizeParams quantize;  // tokens: rows of codes; place: of the first expert
    RouteParams route;
    int32_t place_blocks;  // of each expert
    void *y;
    int32_t y_type;
    int64_t N;
};

// Places multipliers of an expert, if it has rows.
BK_DEVICE void place_expert(const ExpertsQuantizeParams &p, int32_t expert, uint32_t block) {
    uint32_t found = 0;
    for (int64_t row = thread_x(); row < p.route.rows; row += kQuantizeThreads) {
        if (expert_of(p.route, row) == expert) found = 1;
    }
    if (block_max(found, 0, kQuantizeThreads) == 0) return;
    PlaceParams place = p.quantize.place;
    place.multiplier += expert * place.N * place.columns;
    place.words += expert * place.rows * place.columns;
    place_multipliers(place, block);
}

// Of the largest magnitude bits of the tokens of an expert, those that this thread brings.
BK_DEVICE uint32_t largest_of_expert(const ExpertsQuantizeParams &p, int32_t expert) {
    uint32_t most = 0;
    for (int64_t row = thread_x(); row < p.route.rows; row += kQuantizeThreads) {
        if (expert_of(p.route, row) != expert) continue;
        const uint32_t token = static_cast<uint32_t>(row) / static_cast<uint32_t>(p.route.choices);
        const uint32_t other = load_global(p.quantize.maxima + token);
        most = other > most ? other : most;
    }
    return most;
}

// Makes row `to` of the codes, if one of its rows of y has an expert; the others become zeros.
BK_DEVICE void quantize_for_experts(const ExpertsQuantizeParams &p, int64_t to) {
    const RouteParams &route = p.route;
    bool used = false;
    for (int64_t row = to * route.sharing; row < (to + 1) * route.sharing; ++row) {
        if (expert_of(route, row) >= 0) {
            used = true;
            continue;
        }
        for (int64_t n = thread_x(); n < p.N; n += kQuantizeThreads) store_float(p.y, p.y_type, row * p.N + n, 0.0f);
    }
    if (!used) return;
    const uint32_t token = static_cast<uint32_t>(to * route.sharing) / static_cast<uint32_t>(route.choices);
    quantize_token(p.quantize, token, to, [&p, to](uint32_t own) {
        return p.quantize.maxima ? largest_of_expert(p, expert_of(p.route, to)) : own;
    });
}

BK_KERNEL(kQuantizeThreads) experts_quantize_kernel(ExpertsQuantizeParams p) {
    begin();
    // The sorting first, as it takes longest.
    const int64_t to = block_x() - 1, placing = to - p.quantize.tokens;
    if (to < 0) {
        sort_rows(p.route);
    } else if (placing < 0) {
        quantize_for_experts(p, to);
    } else {
        const auto block = static_cast<uint32_t>(placing), each = static_cast<uint32_t>(p.place_blocks);
        place_expert(p, static_cast<int32_t>(block / each), block % each);
    }
}

}  // namespace bitlab

#endif
