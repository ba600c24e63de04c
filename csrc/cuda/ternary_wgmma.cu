#include "run.cuh"
#include "wgmma.cuh"

namespace bitlab {

const char *run_ternary_wgmma(const Plan &plan, const MatmulParams &params, void *stream) {
    using Layout = WgmmaLayout<1>;
    const char *error = launch(wgmma_kernel<1>, plan.grid, Layout::kThreads, Layout::kBytes, stream, params);
    return run_split<TernaryInt8>(plan, params, error, stream);
}

}  // namespace bitlab
