// The thin layer that every kernel is written over: one source for nvcc and for a plain C++ compiler.
//
// Kernels name no CUDA keyword, no builtin variable and no pointer into shared memory: they call the functions below.
// nvcc takes them from device_ptx.h (PTX); the tests take them from device_host.h, which runs a block's threads as
// fibers and checks every access. What the two must agree on is said here once:
//
// clang-format off
//   thread_x() block_x() block_y() grid_x()  indices and sizes; blocks and grids are counted by at most x and y
//   start_next(), wait_for_previous()        the stream's next kernel may start; all that earlier kernels wrote is there.
//                                            Before the wait a kernel may only prefetch; begin() is both, for kernels
//                                            that have nothing to do in between
//   prefetch(p)                              128 bytes of global memory to L2, a hint
//   load_global(p), store_global(p, value)   naturally aligned; load_weights(p) is 16 bytes read once
//   load_shared<T>(offset), store_shared(offset, v)
//                                            shared memory is a byte array, aligned to 1024 bytes, of at most
//                                            kSharedBytes, or kLargeSharedBytes where has_clusters()
//   copy_async_16(offset, p, valid)          16 bytes from global to shared; bytes past `valid` (0 or 16) are zero
//   copy_async_4(offset, p, valid)           the same of 4 bytes
//   commit_async(), wait_async<N>()          close a group; wait until at most N groups of this thread are open
//   sync_block(), sync_warp()                barriers that order memory
//   shuffle_xor(value, mask), shuffle(value, lane)
//                                            among all 32 lanes
//   mma_*                                    D += A B of one warp, in the PTX ISA's fragment layouts; integers wrap
//                                            around, which the emulator reports unless the name says *_wrapping
//   has_clusters(), BK_HAS_CLUSTERS          whether the current device has, and this compilation makes, what follows
//   cluster_rank()                           which of the blocks of its cluster this is; a cluster is kClusterBlocks
//                                            consecutive blocks in x, which run at the same time
//   cluster_arrive(), cluster_wait()         a barrier of the cluster's threads in two halves: what was read before the
//                                            arrivals may be overwritten by send() after the wait; it orders no writes
//   open_inbox(offset)                       by one thread before its first arrival: 8 bytes of shared memory that
//                                            count what is sent to this block, in rounds
//   expect(inbox, bytes)                     by one thread, once a round: the round ends when so many have come, a few
//                                            of them maybe before this call
//   wait_inbox(inbox, round)                 until that round has ended, the latest or the one before; what came in it
//                                            may be read
//   send(rank, offset, value, inbox)         to the shared memory of the cluster's block `rank`, whose inbox counts it;
//                                            after a first barrier has shown that it runs, and before it ends
//   has_wgmma(), BK_HAS_WGMMA                whether the current device has, and this compilation makes, what follows
//   wgmma_u8s8(d, a, b, onto), *_wrapping    D += A B of four warps, 64 x 64 x 32: A in registers, b the PTX ISA's
//                                            descriptor of B in shared memory (shared_address(offset)); it runs on
//                                            while the threads go on: neither A nor D may be touched
//   wgmma_fence()                            before a group of wgmma: registers written above are seen by it
//   wgmma_commit(), wgmma_wait<N>()          close a group; wait until at most N groups are open
//   wgmma_take(d)                            after the wait: D may be read
//   fence_async_proxy()                      what this thread wrote to shared memory is seen by wgmma after a barrier
//   opaque(value)                            the value, of which the compiler knows no more than that
//   dot4_us(a, b, c)                         c + the dot product of four unsigned and four signed bytes
//   fma_bf16x2, fma_f16x2                    packed a * b + c, rounded once
//   multiply, add, divide                    one float32 operation, rounded to nearest even, never contracted
// clang-format on
#ifndef BITLAB_CUDA_DEVICE_H
#define BITLAB_CUDA_DEVICE_H

#include <stddef.h>
#include <stdint.h>

namespace bitlab {

struct alignas(16) Bytes16 {
    uint32_t word[4];
};

struct alignas(8) Bytes8 {
    uint32_t word[2];
};

constexpr uint32_t kSharedBytes = 48 * 1024, kLargeSharedBytes = 227 * 1024;
constexpr int kWarp = 32;
constexpr int kClusterBlocks = 8;  // the most that every device with clusters has

struct Grid {
    int64_t x;
    int64_t y;
};

}  // namespace bitlab

#ifdef __CUDACC__
#include "device_ptx.h"
#else
#include "device_host.h"
#endif

namespace bitlab {

BK_DEVICE void begin() {
    start_next();
    wait_for_previous();
}

}  // namespace bitlab

#endif
