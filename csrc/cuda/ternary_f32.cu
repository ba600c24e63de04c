#include "run.cuh"

namespace bitlab {

const char *run_ternary_f32(const Plan &plan, const MatmulParams &params, void *stream) {
    return run_float<TernaryF32<false>, 2>(plan, params, stream);
}

}  // namespace bitlab
