#include "matmul.h"
#include "wgmma.cuh"

namespace bitlab {
namespace {

template <int kGroups, bool kMultiplied>
const char *run(const Plan &plan, const MatmulParams &params, void *stream) {
    using Layout = WgmmaLayout<kGroups, kMultiplied>;
    return launch(wgmma_kernel<kGroups, kMultiplied>, plan.grid, Layout::kThreads, Layout::kBytes, stream, params);
}

}  // namespace

const char *run_wgmma(const Plan &plan, const MatmulParams &params, void *stream) {
    if (plan.multiplied) {
        return plan.tiles == 2 ? run<2, true>(plan, params, stream) : run<1, true>(plan, params, stream);
    }
    return plan.tiles == 2 ? run<2, false>(plan, params, stream) : run<1, false>(plan, params, stream);
}

}  // namespace bitlab
