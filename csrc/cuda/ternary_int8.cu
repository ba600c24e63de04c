#include "run.cuh"

namespace bitlab {

const char *run_ternary_int8(const Plan &plan, const MatmulParams &params, void *stream) {
    using Math = TernaryInt8;
    const char *error;
    if (plan.wgmma) {
        error = run_wgmma(plan, params, stream);
    } else if (plan.few && plan.grouped) {
        error = plan.tiles == 1 ? run_few<Math, 1, true>(plan, params, stream)
                                : run_few<Math, 2, true>(plan, params, stream);
    } else if (plan.grouped) {
        error = run_many<Math, 2, true>(plan, params, stream);
    } else {
        error = run_int8<Math>(plan, params, stream);
    }
    return run_split<Math>(plan, params, error, stream);
}

}  // namespace bitlab
