// One warp, one mma: registers in, registers out. The same kernel for the emulator and for a GPU.
#ifndef BITLAB_TEST_FRAGMENT_PROBE_CUH
#define BITLAB_TEST_FRAGMENT_PROBE_CUH

#include "device.h"

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

}  // namespace bitlab

#endif
