// One warp, one mma, and one warpgroup, two wgmma: registers in, registers out. The same kernel for the emulator and
// for a GPU.
#ifndef BITLAB_TEST_FRAGMENT_PROBE_CUH
#define BITLAB_TEST_FRAGMENT_PROBE_CUH

#include "wgmma.cuh"

namespace bitlab {

struct FragmentParams {
    int32_t kind;       // 0: u8 x s8, 1: s8 x s8, 2: bfloat16, 3: float16
    const uint32_t *a;  // [32, 4]
    const uint32_t *b;  // [32, 2]
    uint32_t *d;        // [32, 4]; C is zero
};

template <int kThreads>
BK_KERNEL(kThreads)
fragment_kernel(FragmentParams p) {
    begin();
    const int lane = thread_x();
    uint32_t a[4];
    BK_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = load_global(p.a + 4 * lane + i);
    const uint32_t b0 = load_global(p.b + 2 * lane), b1 = load_global(p.b + 2 * lane + 1);
    int32_t sums[4] = {};
    float floats[4] = {};
    if (p.kind == 0) mma_u8s8(sums, a, b0, b1);
    if (p.kind == 1) mma_s8s8(sums, a, b0, b1);
    if (p.kind == 2) mma_bf16(floats, a, b0, b1);
    if (p.kind == 3) mma_f16(floats, a, b0, b1);
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
        store_global(p.d + 4 * lane + i, p.kind < 2 ? static_cast<uint32_t>(sums[i]) : float_bits(floats[i]));
    }
}

struct WgmmaFragmentParams {
    const uint32_t *a;  // [2, 128, 4]: A for columns 0 to 31 and 96 to 127 of B
    const uint8_t *b;   // [64, 128]: int8, 64 tokens
    uint32_t *d;        // [128, 32]
};

// The second is added to the first; the first must not read D, which holds no zeros.
template <int kThreads>
BK_KERNEL(kThreads)
wgmma_fragment_kernel(WgmmaFragmentParams p) {
#if BK_HAS_WGMMA
    begin();
    const int thread = thread_x();
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t token = static_cast<uint32_t>(thread / 8 + 16 * i), chunk = static_cast<uint32_t>(thread % 8);
        copy_async_16(token * 128 + token_chunk(token, chunk) * 16, p.b + token * 128 + chunk * 16, 16);
    }
    commit_async();
    wait_async<0>();
    fence_async_proxy();
    sync_block();
    uint32_t a[2][4];
    int32_t sums[32];
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
        a[0][i] = load_global(p.a + 4 * thread + i);
        a[1][i] = load_global(p.a + 4 * (kThreads + thread) + i);
    }
    BK_UNROLL
    for (int i = 0; i < 32; ++i) sums[i] = thread + i;
    wgmma_fence();
    wgmma_u8s8(sums, a[0], token_descriptor(0), false);
    wgmma_u8s8(sums, a[1], token_descriptor(96), true);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_take(sums);
    BK_UNROLL
    for (int i = 0; i < 32; ++i) store_global(p.d + 32 * thread + i, static_cast<uint32_t>(sums[i]));
#endif
}

}  // namespace bitlab

#endif
