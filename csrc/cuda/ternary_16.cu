#include "run.cuh"

namespace bitlab {

const char *run_ternary_16(const Plan &plan, const MatmulParams &params, bool is_bf16, void *stream) {
    return is_bf16 ? run_float<TernaryBf16<false>, 4>(plan, params, stream)
                   : run_float<TernaryF16<false>, 4>(plan, params, stream);
}

}  // namespace bitlab
