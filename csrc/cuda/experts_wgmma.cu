#include "experts.cuh"

namespace bitlab {
namespace {

template <bool kMultiplied>
const char *run(const ExpertsPlan &plan, ExpertsParams params, const void *tiles, void *stream) {
    using Layout = WgmmaLayout<1, kMultiplied>;
    params.tiles = static_cast<const Bytes16 *>(tiles);
    const Grid grid = {plan.most_many, ceil_div(params.weight_rows, Layout::kRows)};
    return launch(experts_wgmma_kernel<kMultiplied>, grid, Layout::kThreads, Layout::kBytes, stream, params);
}

}  // namespace

const char *run_experts_wgmma(const ExpertsPlan &plan, const ExpertsParams &params, const ExpertsTiles &tiles,
                              void *stream) {
    return plan.multiplied ? run<true>(plan, params, tiles.many, stream) : run<false>(plan, params, tiles.many, stream);
}

}  // namespace bitlab
