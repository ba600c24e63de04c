// Kernels of one warpgroup with one fault each in their use of wgmma, which the emulator must report, and one wgmma.
#include "fragment_probe.cuh"

using namespace bitlab;

namespace {

struct WgmmaProbeParams {
    int32_t which;
    int32_t *memory;  // 128 words
};

constexpr uint32_t kTile = 8192;

void wgmma_fault_kernel(WgmmaProbeParams p) {
    begin();
    const uint32_t own = 64u * static_cast<uint32_t>(thread_x());
    int32_t sums[32] = {};
    if (p.which >= 15) sums[0] = 0x7FFFFFFF;
    uint32_t a[4] = {1, 1, 1, 1};
    for (uint32_t i = 0; i < 64; i += 16) {
        if (p.which != 8 || thread_x() != 4) store_shared(own + i, Bytes16{{1, 1, 1, 1}});
    }
    if (p.which == 1) {  // the barrier and the fence exchanged
        sync_block();
        fence_async_proxy();
    } else {
        if (p.which != 2) fence_async_proxy();
        if (p.which != 3) sync_block();
    }
    if (p.which != 4) wgmma_fence();
    uint32_t at = 32;
    if (p.which == 5) at += 128;
    if (p.which == 6 && thread_x() < 64) at += 32;
    if (p.which == 16) {
        wgmma_u8s8_wrapping(sums, a, token_descriptor(at), true);
    } else {
        wgmma_u8s8(sums, a, token_descriptor(at), true);
    }
    if (p.which != 7) wgmma_commit();
    if (p.which == 9) a[2] = 0;
    if (p.which == 10) sums[3] = 0;
    if (p.which == 11) store_shared(own, 0);
    if (p.which == 12) wgmma_take(sums);
    if (p.which == 13) {
        wgmma_wait<1>();
    } else {
        wgmma_wait<0>();
    }
    if (p.which == 14) store_shared(own, 0);
    wgmma_take(sums);
    store_global(p.memory + thread_x(), sums[0]);
}

const char *error_of(const char *error) { return error ? error : ""; }

}  // namespace

extern "C" {

__attribute__((visibility("default"))) const char *bk_emulator_wgmma_probe(int32_t which, int32_t *memory) {
    return error_of(
        launch(wgmma_fault_kernel, Grid{1, 1}, kWarpgroup, kTile, nullptr, WgmmaProbeParams{which, memory}));
}

__attribute__((visibility("default"))) const char *bk_emulator_one_wgmma(const uint32_t *a, const uint8_t *b,
                                                                         uint32_t *d) {
    return error_of(launch(wgmma_fragment_kernel<kWarpgroup>, Grid{1, 1}, kWarpgroup, kTile, nullptr,
                           WgmmaFragmentParams{a, b, d}));
}

}  // extern "C"
