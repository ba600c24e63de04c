#include "run.cuh"

namespace bitlab {
namespace {

template <typename Math, int kTiles>
const char *run(const Plan &plan, const MatmulParams &params, void *stream) {
    const char *error =
        plan.few ? run_few<Math, 2, false>(plan, params, stream) : run_many<Math, kTiles, false>(plan, params, stream);
    return run_split<Math>(plan, params, error, stream);
}

}  // namespace

const char *run_multiplied_float(const Plan &plan, const MatmulParams &params, int32_t x_type, void *stream) {
    return x_type == BK_CUDA_F32    ? run<TernaryF32<true>, 2>(plan, params, stream)
           : x_type == BK_CUDA_BF16 ? run<TernaryBf16<true>, 4>(plan, params, stream)
                                    : run<TernaryF16<true>, 4>(plan, params, stream);
}

}  // namespace bitlab
