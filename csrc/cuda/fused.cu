#include "fused.cuh"

namespace bitlab {

const char *run_fused(const FusedParams &params, int tiles, Grid grid, void *stream) {
    const bool multiplied = params.multiplier != nullptr;
    const auto shared = static_cast<uint32_t>(fused_shared_bytes(tiles, multiplied, params.matmul.K));
    const auto kernel =
        multiplied ? (tiles == 1 ? fused_kernel<TernaryInt8Multiplied, 1> : fused_kernel<TernaryInt8Multiplied, 2>)
                   : (tiles == 1 ? fused_kernel<TernaryInt8, 1> : fused_kernel<TernaryInt8, 2>);
    return launch(kernel, grid, kFusedThreads, shared, stream, params, kClusterBlocks);
}

}  // namespace bitlab
