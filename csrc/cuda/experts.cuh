// The products of all experts of a layer: few_tile, many_tile and wgmma_tile on tiles of one expert's tokens.
//
// A block takes a tile of tokens off its list (route.cuh) and some packed rows of that tile's expert. Blocks that run
// at the same time have the same rows of the tiles of an expert, so that its weights come from memory once for all of
// its tokens, and those of experts without tokens never. Where the list ends blocks leave at once. K is not split: an
// expert's matrices are small, and the tiles of the experts that a token visits fill the chip in its place.
#ifndef BITLAB_CUDA_EXPERTS_CUH
#define BITLAB_CUDA_EXPERTS_CUH

#include "experts.h"
#include "few.cuh"
#include "many.cuh"
#include "wgmma.cuh"

namespace bitlab {

// Weights, scales, multipliers and bias are those of the first expert; tokens lie and rows of y are wherever the
// sorting says.
struct ExpertsParams : MatmulParams {
    const Bytes16 *tiles;   // of tokens: the kernel's list
    const int32_t *sorted;  // rows of y
    const int32_t *codes;   // rows of x

    BK_DEVICE int64_t token(int64_t m) const { return load_global(codes + m); }
    BK_DEVICE int64_t row(int64_t m) const { return load_global(sorted + m); }
};

// The same for one tile of tokens.
BK_DEVICE ExpertsParams tile_params(ExpertsParams p, const Bytes16 &tile) {
    const int64_t expert = tile.word[0], first = tile.word[1];
    p.M = tile.word[2];
    p.splits = 1;
    p.weight += expert * p.weight_rows * p.K;
    p.weight_scale += expert * (p.scale_rows == 1 ? 1 : p.N) * p.columns;
    if (p.multipliers) p.multipliers += expert * p.multiplier_rows * (p.blocks >> p.group_shift);
    p.bias = p.bias ? static_cast<const uint8_t *>(p.bias) + expert * p.N * element_bytes(p.bias_type) : nullptr;
    p.sorted += first;
    p.codes += first;
    return p;
}

template <typename Math, int kTiles, bool kGrouped>
BK_KERNEL(kFewThreads, kFewBlocks<Math>)
experts_few_kernel(ExpertsParams p) {
    begin();
    const Bytes16 tile = load_global(p.tiles + block_x());
    if (tile.word[2] == 0) return;
    few_tile<Math, kTiles, kGrouped, false>(tile_params(p, tile), static_cast<int64_t>(block_y()) * kFewRows, 0);
}

template <typename Math, int kTiles, bool kGrouped>
BK_KERNEL(kManyThreads)
experts_many_kernel(ExpertsParams p) {
    begin();
    const Bytes16 tile = load_global(p.tiles + block_x());
    if (tile.word[2] == 0) return;
    many_tile<Math, kTiles, kGrouped>(tile_params(p, tile), static_cast<int64_t>(block_y()) * kManyRows, 0, 0);
}

// One warpgroup, so that a multiprocessor runs two blocks.
template <bool kMultiplied>
BK_KERNEL(WgmmaLayout<1, kMultiplied>::kThreads)
experts_wgmma_kernel(ExpertsParams p) {
#if BK_HAS_WGMMA
    begin();
    const Bytes16 tile = load_global(p.tiles + block_x());
    if (tile.word[2] == 0) return;
    const int64_t first_row = static_cast<int64_t>(block_y()) * WgmmaLayout<1, kMultiplied>::kRows;
    wgmma_tile<1, kMultiplied>(tile_params(p, tile), first_row, 0, 0);
#endif
}

template <typename Math, int kTiles, bool kGrouped>
const char *run_experts_few(const ExpertsPlan &plan, ExpertsParams params, const void *tiles, void *stream) {
    params.tiles = static_cast<const Bytes16 *>(tiles);
    const Grid grid = {plan.most_few, ceil_div(params.weight_rows, kFewRows)};
    return launch(experts_few_kernel<Math, kTiles, kGrouped>, grid, kFewThreads, few_shared_bytes<Math, kTiles>(),
                  stream, params);
}

template <typename Math, int kTiles, bool kGrouped>
const char *run_experts_many(const ExpertsPlan &plan, ExpertsParams params, const void *tiles, void *stream) {
    using Layout = ManyLayout<Math, kTiles>;
    params.tiles = static_cast<const Bytes16 *>(tiles);
    const Grid grid = {plan.most_many, ceil_div(params.weight_rows, kManyRows)};
    return launch(experts_many_kernel<Math, kTiles, kGrouped>, grid, kManyThreads,
                  Layout::kStages * Layout::kStageBytes, stream, params);
}

// Few tokens in one or two tiles of eight, many in two or four of sixteen, with groups of floats always two; but for
// what run_experts_wgmma does.
template <typename Math, bool kGrouped>
const char *run_experts(const ExpertsPlan &plan, const ExpertsParams &params, const ExpertsTiles &tiles, void *stream) {
    const char *error = plan.few == 1 ? run_experts_few<Math, 1, kGrouped>(plan, params, tiles.few, stream)
                                      : run_experts_few<Math, 2, kGrouped>(plan, params, tiles.few, stream);
    if (error || plan.many == 0 || plan.wgmma) return error;
    if constexpr (!kGrouped) {
        if (plan.many == 4) return run_experts_many<Math, 4, kGrouped>(plan, params, tiles.many, stream);
    }
    return run_experts_many<Math, 2, kGrouped>(plan, params, tiles.many, stream);
}

}  // namespace bitlab

#endif
