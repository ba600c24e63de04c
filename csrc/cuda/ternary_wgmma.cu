#include "matmul.h"
#include "wgmma.cuh"

namespace bitlab {
namespace {

template <int kGroups>
const char *run(const Plan &plan, const MatmulParams &params, void *stream) {
    using Layout = WgmmaLayout<kGroups>;
    return launch(wgmma_kernel<kGroups>, plan.grid, Layout::kThreads, Layout::kBytes, stream, params);
}

}  // namespace

const char *run_wgmma(const Plan &plan, const MatmulParams &params, void *stream) {
    return plan.tiles == 2 ? run<2>(plan, params, stream) : run<1>(plan, params, stream);
}

}  // namespace bitlab
