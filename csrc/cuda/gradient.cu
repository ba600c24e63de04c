#include "gradient.cuh"

#include "common.h"

namespace bitlab {
namespace {

template <bool kIsBf16, int kPlanes, bool kMultiplied = false>
const char *run_gradient(const GradientParams &params, void *stream) {
    const int64_t tiles = ceil_div(params.K, kGradientColumns) * ceil_div(params.M, kGradientTokens);
    return launch(gradient_kernel<kIsBf16, kPlanes, kMultiplied>, Grid{tiles, 1}, kGradientThreads,
                  gradient_shared_bytes<kPlanes>(), stream, params);
}

}  // namespace
}  // namespace bitlab

using namespace bitlab;

extern "C" int32_t bk_cuda_input_gradient(const void *dy, int32_t dy_type, int64_t dy_stride, const uint8_t *qweight,
                                          const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
                                          const uint8_t *multiplier, void *dx, int32_t dx_type, int64_t M, int64_t N,
                                          int64_t K, void *stream) {
    const Shape shape = {"bk_cuda_input_gradient", M, N, K};
    BK_CUDA_TRY(check_shape(shape, scale_rows, scale_columns, 64));
    BK_CUDA_TRY(check_multiplier(shape, multiplier, scale_columns));
    if (M == 0) return BK_CUDA_OK;
    BK_CUDA_TRY(check_tensor(shape, "dy", dy, dy_type));
    BK_CUDA_TRY(check_tensor(shape, "dx", dx, dx_type));
    BK_CUDA_TRY(check_tensor(shape, "weight_scale", weight_scale, BK_CUDA_F32));
    GradientParams p = {};
    p.dy = dy;
    p.dy_stride = dy_stride;
    p.dy_type = dy_type;
    p.qweight = qweight;
    p.weight_words = aligned(qweight, K, 4);
    p.weight_scale = weight_scale;
    const bool per_tensor = scale_rows == 1 && scale_columns == 0;
    p.scale_rows = per_tensor ? 1 : 2;
    p.multiplier = multiplier;
    p.columns = static_cast<int32_t>(scale_columns ? scale_columns : 1);
    p.group = static_cast<int32_t>(K / p.columns);
    p.dx = dx;
    p.dx_type = dx_type;
    p.M = M;
    p.N = N;
    p.rows = ceil_div(N, 4);
    p.K = static_cast<int32_t>(K);
    if (multiplier) {
        return launched(shape, dy_type == BK_CUDA_BF16 ? run_gradient<true, 1, true>(p, stream)
                                                       : run_gradient<true, 3, true>(p, stream));
    }
    const char *error = dy_type == BK_CUDA_BF16                ? run_gradient<true, 1>(p, stream)
                        : dy_type == BK_CUDA_F16 && per_tensor ? run_gradient<false, 1>(p, stream)
                                                               : run_gradient<true, 3>(p, stream);
    return launched(shape, error);
}
