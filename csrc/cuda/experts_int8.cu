#include "experts.cuh"

namespace bitlab {

const char *run_experts_int8(const ExpertsPlan &plan, const ExpertsParams &params, const ExpertsTiles &tiles,
                             void *stream) {
    return plan.grouped ? run_experts<TernaryInt8, true>(plan, params, tiles, stream)
                        : run_experts<TernaryInt8, false>(plan, params, tiles, stream);
}

}  // namespace bitlab
