#include "run.cuh"
#include "wgmma.cuh"

namespace bitlab {
namespace {

template <int kRowGroups, int kColumnGroups>
const char *run_wgmma(const Plan &plan, const MatmulParams &params, void *stream) {
    using Layout = WgmmaLayout<kRowGroups, kColumnGroups>;
    return launch(wgmma_kernel<kRowGroups, kColumnGroups>, plan.grid, Layout::kThreads, Layout::kBytes, stream, params);
}

}  // namespace

const char *run_ternary_wgmma(const Plan &plan, const MatmulParams &params, void *stream) {
    const char *error = plan.tiles == 2 ? run_wgmma<2, 1>(plan, params, stream) : run_wgmma<1, 2>(plan, params, stream);
    return run_split<TernaryInt8>(plan, params, error, stream);
}

}  // namespace bitlab
