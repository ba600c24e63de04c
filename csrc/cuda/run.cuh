// The launches of one kind of arithmetic. Included by the files that compile its kernels.
#ifndef BITLAB_CUDA_RUN_CUH
#define BITLAB_CUDA_RUN_CUH

#include "few.cuh"
#include "many.cuh"
#include "matmul.h"

namespace bitlab {

template <typename Math, int kTiles, bool kGrouped>
const char *run_few(const Plan &plan, const MatmulParams &params, void *stream) {
    constexpr uint32_t kShared = few_shared_bytes<Math, kTiles>();
    if (kGrouped && plan.splits > 1) {
        return launch(few_kernel<Math, kTiles, kGrouped, kGrouped>, plan.grid, kFewThreads, kShared, stream, params);
    }
    return launch(few_kernel<Math, kTiles, kGrouped, false>, plan.grid, kFewThreads, kShared, stream, params);
}

template <typename Math, int kTiles, bool kGrouped>
const char *run_many(const Plan &plan, const MatmulParams &params, void *stream) {
    using Layout = ManyLayout<Math, kTiles>;
    return launch(many_kernel<Math, kTiles, kGrouped>, plan.grid, kManyThreads, Layout::kStages * Layout::kStageBytes,
                  stream, params);
}

// Adds the shares of K, if there are several.
template <typename Math>
const char *run_split(const Plan &plan, const MatmulParams &params, const char *error, void *stream) {
    if (error || plan.splits == 1) return error;
    const int64_t blocks = ceil_div(params.M * params.N, kSplitThreads);
    const Grid grid = {blocks < 65536 ? blocks : 65536, 1};
    if constexpr (!Math::kMultiplied) {
        if (plan.grouped) return launch(split_kernel<Math, true>, grid, kSplitThreads, 0, stream, params);
    }
    return launch(split_kernel<Math, false>, grid, kSplitThreads, 0, stream, params);
}

// Without a float32 scale for each group: one or two tiles of few tokens, two or eight of many.
template <typename Math>
const char *run_int8(const Plan &plan, const MatmulParams &params, void *stream) {
    if (plan.few) {
        return plan.tiles == 1 ? run_few<Math, 1, false>(plan, params, stream)
                               : run_few<Math, 2, false>(plan, params, stream);
    }
    return plan.tiles == 2 ? run_many<Math, 2, false>(plan, params, stream)
                           : run_many<Math, 8, false>(plan, params, stream);
}

// Float activations: sixteen tokens or fewer, or kTiles of many; groups take twice the registers and half the tokens.
template <typename Math, int kTiles>
const char *run_float(const Plan &plan, const MatmulParams &params, void *stream) {
    const char *error = plan.few ? (plan.grouped ? run_few<Math, 2, true>(plan, params, stream)
                                                 : run_few<Math, 2, false>(plan, params, stream))
                                 : (plan.grouped ? run_many<Math, 2, true>(plan, params, stream)
                                                 : run_many<Math, kTiles, false>(plan, params, stream));
    return run_split<Math>(plan, params, error, stream);
}

}  // namespace bitlab

#endif
