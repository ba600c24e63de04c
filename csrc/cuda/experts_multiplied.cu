#include "experts.cuh"

namespace bitlab {

const char *run_experts_multiplied(const ExpertsPlan &plan, const ExpertsParams &params, const ExpertsTiles &tiles,
                                   void *stream) {
    return run_experts<TernaryInt8Multiplied, false>(plan, params, tiles, stream);
}

}  // namespace bitlab
