// Runs a kernel's blocks on the CPU, one cluster after another, and checks what no GPU would tell.
//
// A block's threads are fibers. A warp collective (mma, shuffle, sync_warp) waits until all 32 lanes have come to the
// same line; a block barrier until all threads have. If no fiber can go on, or threads meet at different lines, or one
// has returned, the launch fails with a text that names them. Every access to global memory must come after the wait
// for the kernels before, lie in a registered region, be aligned, read bytes that were written, and not meet another
// thread's write in the same launch. Every access to shared memory is checked for bounds, alignment, bytes never
// written, cp.async data not yet waited for, and for races: two threads at one byte, one of them writing, with no
// barrier between them.
//
// wgmma and its fence, commit and wait are collectives of 128 threads (on a GPU each warp may go on alone, which would
// show nothing more: what is ordered is told by barriers, not by who came first). From issue to wait D holds a pattern
// that is no result, A must not change, and the bytes of B must not be written; the product is made at the wait.
//
// The blocks of a cluster run together. What is sent to another block's memory must come after the cluster's first
// barrier and before that block ends; it may be read by threads that have waited for the inbox that counts it, in that
// round, and overwritten by what is sent after a barrier of the cluster to which its readers came after reading.
#ifndef BITLAB_TEST_EMULATOR_H
#define BITLAB_TEST_EMULATOR_H

#include <stdint.h>

#include <functional>

namespace emulator {

constexpr int kLanes = 32;

constexpr int kWarpgroup = 128;

enum class Op {
    kMmaU8S8,
    kMmaU8S8Wrapping,
    kMmaS8S8,
    kMmaBf16,
    kMmaF16,
    kShuffleXor,
    kShuffle,
    kSyncWarp,
    kWgmma,
    kWgmmaFence,
    kWgmmaCommit,
    kWgmmaWait
};

// What a lane brings to a collective and takes from it.
struct Exchange {
    uint64_t in[12];
    uint64_t out[4];
};

struct Site {
    const char *file;
    int line;
};

struct Indices {
    int thread;
    int64_t block_x;
    int block_y;
    int64_t grid_x;
};

const Indices &current();

// Stops the launch; the first text is kept.
[[noreturn]] void fault(const char *format, ...) __attribute__((format(printf, 1, 2)));

void wait_for_previous();
void check_global(const void *pointer, uint32_t bytes, bool write, Site site);
const void *read_shared(uint32_t offset, uint32_t bytes, Site site);
void *write_shared(uint32_t offset, uint32_t bytes, Site site);
void copy_async(uint32_t offset, const void *pointer, uint32_t bytes, int valid, Site site);
void commit_async();
void wait_async(int open);
void sync_block(Site site);
int cluster_rank();
void cluster_arrive(Site site);
void cluster_wait(Site site);
void open_inbox(uint32_t offset, Site site);
void expect(uint32_t inbox, uint32_t bytes, Site site);
void wait_inbox(uint32_t inbox, int round, Site site);
void send(int rank, uint32_t offset, const void *value, uint32_t bytes, uint32_t inbox, Site site);
void collective(Op op, Exchange &own, Site site);

// Whether the device that is played has wgmma and clusters.
bool is_hopper();

// What the device layer asks for wgmma; see warpgroup.cpp.
void wgmma(int32_t *d, const uint32_t *a, uint64_t b, bool onto, bool wraps, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int open, Site site);
void wgmma_take(const int32_t *d, Site site);
void fence_async_proxy();

// What warpgroup.cpp needs of the others. meet() waits until all threads of the warpgroup are at the same line and is
// true in the last one, before the others go on. Asynchronous reads are checked, and guarded from writes until they
// end.
bool meet_in_warpgroup(Op op, Site site);
void begin_async_read(uint32_t offset, uint32_t bytes, Site site);
const uint8_t *end_async_read(uint32_t offset, uint32_t bytes);

// Forgets all wgmma before a block runs; tells after it whether one was not waited for.
void reset_warpgroups(int threads);
bool has_open_wgmma();
int64_t count_wgmma();

// Fills what each lane takes from a collective.
void exchange(Op op, Exchange *const (&lanes)[kLanes]);

// Returns null, or why the launch failed. cluster: blocks of a cluster, consecutive ones in x.
const char *run(int64_t grid_x, int64_t grid_y, int threads, uint32_t shared_bytes, int cluster,
                const std::function<void()> &kernel);

}  // namespace emulator

#endif
