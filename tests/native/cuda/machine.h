// What the emulator's sources share: its state, and that of the blocks that run together.
#ifndef BITLAB_TEST_MACHINE_H
#define BITLAB_TEST_MACHINE_H

#include <ucontext.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr uint32_t kSharedLimit = 48 * 1024, kLargeSharedLimit = 227 * 1024;  // the second on Hopper

enum class State { kRunning, kAtWarp, kAtBlock, kAtCluster, kAtInbox, kDone };

struct Copy {
    uint32_t offset;
    const void *pointer;
    uint32_t bytes;
    int valid;
    Site site;
};

struct Fiber {
    void *stack_pointer;
    ucontext_t context;
    State state;
    Site site;
    Op op;
    std::vector<std::vector<Copy>> groups;  // closed by commit, oldest first; the last one is open
    bool waited;                            // for the kernels before
    std::vector<uint32_t> proxy_fences;     // the epoch of each
    uint64_t loads;                         // 16-byte shared loads so far, to put lanes of one instruction together
    uint32_t arrivals, waits;               // at the cluster's barrier
    std::map<uint32_t, uint32_t> rounds;    // of its block's inboxes that it has waited for
};

struct Warp {
    int arrived;
    Exchange *exchange[kLanes];
    uint32_t epoch;
};

constexpr uint16_t kNobody = 0xFFFF, kSeveral = 0xFFFE;

// The last write and the last reads of one byte of shared memory, whose writer and reader are fibers.
struct SharedByte {
    uint32_t write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
    uint32_t read_arrivals;  // at the cluster's barrier, of the latest reader
    uint32_t inbox, round;   // that count a sent byte; round 0: it was not sent
    uint16_t writer, reader;
    int16_t read_warp;  // the warp of all readers, or -1
    uint16_t async_readers;
    uint32_t fences;  // the writer's proxy fences before its write
    bool written, in_flight;
};

struct Region {
    const uint8_t *begin;
    int64_t bytes;
    bool writable;
    std::vector<bool> defined;
    std::vector<uint32_t> launch;
    std::vector<int64_t> writer;
};

// What counts the bytes that are sent to a block, in rounds.
struct Inbox {
    uint32_t rounds;  // that have ended
    uint32_t bytes, expected;
    bool expects;
};

// One of the blocks that run together: those of a cluster.
struct Block {
    std::vector<SharedByte> bytes = std::vector<SharedByte>(kLargeSharedLimit);
    std::vector<uint8_t> memory = std::vector<uint8_t>(kLargeSharedLimit);
    std::vector<Warp> warps;
    uint32_t epoch = 0;
    int at_barrier = 0, done = 0;
    std::map<uint32_t, Inbox> inboxes;  // by offset
    std::map<std::pair<int, uint64_t>, std::vector<uint32_t>> phases;
};

struct Machine {
    std::map<const uint8_t *, Region> regions;  // by end
    Region *last = nullptr;
    std::vector<Fiber> fibers;  // of all blocks of a cluster
    std::vector<Block> blocks;
    std::vector<int> at_warpgroup;
    uint32_t shared_bytes = 0;
    uint32_t launches = 0;
    int threads = 0, cluster = 1;  // threads of a block, blocks of a cluster
    int fiber = 0;                 // the one that runs
    int at_cluster = 0;
    uint32_t cluster_barriers = 0;  // that all threads of the cluster have come to
    Indices indices{};
    char *stacks = nullptr;
    const std::function<void()> *kernel = nullptr;
    std::string error;
    bool failed = false, hopper = false;
    uint32_t seed = 0;
    ucontext_t main_context;
    void *main_pointer = nullptr;
    int64_t conflicts = 0, shared_loads = 0, mma_count = 0;
};

extern Machine machine;

// Leaves the fiber that runs until another one sets its state to running.
void to_scheduler();

inline Fiber &self() { return machine.fibers[static_cast<size_t>(machine.fiber)]; }
inline Block &own_block() { return machine.blocks[static_cast<size_t>(machine.fiber / machine.threads)]; }
inline Warp &own_warp() { return own_block().warps[static_cast<size_t>(machine.indices.thread / kLanes)]; }

}  // namespace emulator

#endif
