#include "run.cuh"

namespace bitlab {

const char *run_multiplied_int8(const Plan &plan, const MatmulParams &params, void *stream) {
    using Math = TernaryInt8Multiplied;
    const char *error = plan.wgmma ? run_wgmma(plan, params, stream) : run_int8<Math>(plan, params, stream);
    return run_split<Math>(plan, params, error, stream);
}

}  // namespace bitlab
