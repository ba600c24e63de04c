// See emulator.h. Fibers switch by hand on x86-64 and through ucontext elsewhere.
#include "emulator.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>

#include "fragments.h"
#include "machine.h"

namespace emulator {

Machine machine;

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kMaxCluster = 8;

#if defined(__x86_64__)
extern "C" void bk_emulator_switch(void **from, void *to);
asm(R"(
.text
.globl bk_emulator_switch
.hidden bk_emulator_switch
.type bk_emulator_switch, @function
bk_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#endif

void body() {
    (*machine.kernel)();
    self().state = State::kDone;
    to_scheduler();
    __builtin_unreachable();
}

void prepare(int index) {
    Fiber &fiber = machine.fibers[index];
    fiber.state = State::kRunning;
    fiber.groups.assign(1, {});
    fiber.waited = false;
    fiber.proxy_fences.clear();
    fiber.loads = 0;
    fiber.arrivals = fiber.waits = 0;
    fiber.rounds.clear();
    char *top = machine.stacks + (index + 1) * kStack;
#if defined(__x86_64__)
    // Six registers to pop and the address to return to; at entry the stack is 8 past a multiple of 16.
    void **frame = reinterpret_cast<void **>(top) - 8;
    for (int i = 0; i < 6; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void *>(&body);
    fiber.stack_pointer = frame;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = top - kStack;
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, body, 0);
#endif
}

void resume(int index, int64_t first_block) {
    machine.fiber = index;
    machine.indices.thread = index % machine.threads;
    machine.indices.block_x = first_block + index / machine.threads;
#if defined(__x86_64__)
    bk_emulator_switch(&machine.main_pointer, machine.fibers[index].stack_pointer);
#else
    swapcontext(&machine.main_context, &machine.fibers[index].context);
#endif
}

const char *name_of(Op op) {
    static const char *const names[] = {"mma_u8s8", "mma_u8s8_wrapping", "mma_s8s8",     "mma_bf16",
                                        "mma_f16",  "shuffle_xor",       "shuffle",      "sync_warp",
                                        "wgmma",    "wgmma_fence",       "wgmma_commit", "wgmma_wait"};
    return names[static_cast<int>(op)];
}

void reset(Block &block) {
    memset(block.memory.data(), 0xA5, machine.shared_bytes);
    SharedByte fresh = {};
    fresh.reader = kNobody;
    std::fill_n(block.bytes.begin(), machine.shared_bytes, fresh);
    block.phases.clear();
    block.warps.assign(static_cast<size_t>((machine.threads + kLanes - 1) / kLanes), Warp{});
    block.inboxes.clear();
    block.at_barrier = block.done = 0;
    ++block.epoch;
}

// Runs the blocks of a cluster, from `first_block` on, together: an ordinary block is a cluster of one.
void run_cluster(int64_t first_block) {
    const int threads = machine.threads * machine.cluster;
    for (int rank = 0; rank < machine.cluster; ++rank) reset(machine.blocks[static_cast<size_t>(rank)]);
    machine.at_warpgroup.assign(static_cast<size_t>((machine.threads + kWarpgroup - 1) / kWarpgroup), 0);
    reset_warpgroups(machine.threads);
    machine.at_cluster = 0;
    machine.cluster_barriers = 0;
    for (int t = 0; t < threads; ++t) prepare(t);
    std::vector<int> order(static_cast<size_t>(threads));
    for (int t = 0; t < threads; ++t) order[static_cast<size_t>(t)] = t;
    if (machine.seed) {
        std::mt19937 random(machine.seed);
        std::shuffle(order.begin(), order.end(), random);
    }
    for (int done = 0; done < threads;) {
        bool progress = false;
        for (const int t : order) {
            if (machine.fibers[t].state != State::kRunning) continue;
            progress = true;
            resume(t, first_block);
            if (machine.failed) return;
            if (machine.fibers[t].state == State::kDone) {
                ++done;
                ++own_block().done;
            }
        }
        if (done == threads && has_open_wgmma()) {
            machine.failed = true;
            machine.error = "a kernel ends with wgmma that was not waited for";
        }
        if (progress || done == threads) continue;
        int counts[6] = {};
        for (int t = 0; t < threads; ++t) ++counts[static_cast<int>(machine.fibers[t].state)];
        const auto waiting = std::find_if(machine.fibers.begin(), machine.fibers.begin() + threads,
                                          [](const Fiber &f) { return f.state != State::kDone; });
        char text[256];
        snprintf(text, sizeof text,
                 "divergence: %d threads have returned, %d wait in a warp, %d at a block barrier, %d at a cluster's, "
                 "%d for an inbox (one at %s:%d)",
                 counts[5], counts[1], counts[2], counts[3], counts[4], waiting->site.file, waiting->site.line);
        machine.failed = true;
        machine.error = text;
        return;
    }
}

// Waits until the `count` threads that come together are here; true in the last one, when the others may go on.
bool meet(Op op, Site site, int count, const char *name, int &arrived) {
    const int first = machine.fiber / count * count;
    Fiber &fiber = self();
    fiber.site = site;
    fiber.op = op;
    fiber.state = State::kAtWarp;
    if (++arrived < count) {
        to_scheduler();
        return false;
    }
    for (int t = first; t < first + count; ++t) {
        Fiber &other = machine.fibers[t];
        if (other.op != op || other.site.line != site.line || strcmp(other.site.file, site.file) != 0) {
            fault("divergence: lanes of a %s meet in %s (%s:%d) and %s (%s:%d)", name, name_of(other.op),
                  other.site.file, other.site.line, name_of(op), site.file, site.line);
        }
        other.state = State::kRunning;
    }
    arrived = 0;
    return true;
}

}  // namespace

void to_scheduler() {
#if defined(__x86_64__)
    bk_emulator_switch(&self().stack_pointer, machine.main_pointer);
#else
    swapcontext(&self().context, &machine.main_context);
#endif
}

const Indices &current() { return machine.indices; }

void fault(const char *format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (!machine.failed) machine.error = text;
    machine.failed = true;
    for (;;) to_scheduler();
}

void wait_for_previous() { self().waited = true; }

void sync_block(Site site) {
    Fiber &fiber = self();
    Block &block = own_block();
    fiber.site = site;
    fiber.state = State::kAtBlock;
    if (++block.at_barrier == machine.threads) {
        const int first = machine.fiber / machine.threads * machine.threads;
        for (int t = first; t < first + machine.threads; ++t) {
            Fiber &other = machine.fibers[t];
            if (other.site.line != site.line || strcmp(other.site.file, site.file) != 0) {
                fault("divergence: block barriers at %s:%d and %s:%d meet", other.site.file, other.site.line, site.file,
                      site.line);
            }
            other.state = State::kRunning;
        }
        block.at_barrier = 0;
        ++block.epoch;
        return;
    }
    to_scheduler();
}

int cluster_rank() { return machine.fiber / machine.threads; }

void cluster_arrive(Site site) {
    Fiber &fiber = self();
    if (fiber.arrivals != fiber.waits) {
        fault("%s:%d: a thread arrives twice at the cluster's barrier without a wait", site.file, site.line);
    }
    ++fiber.arrivals;
    if (++machine.at_cluster < machine.threads * machine.cluster) return;
    machine.at_cluster = 0;
    ++machine.cluster_barriers;
    for (int t = 0; t < machine.threads * machine.cluster; ++t) {
        if (machine.fibers[t].state == State::kAtCluster) machine.fibers[t].state = State::kRunning;
    }
}

void cluster_wait(Site site) {
    Fiber &fiber = self();
    if (fiber.arrivals == fiber.waits) {
        fault("%s:%d: a wait at the cluster's barrier without an arrival", site.file, site.line);
    }
    if (machine.cluster_barriers < fiber.arrivals) {
        fiber.site = site;
        fiber.state = State::kAtCluster;
        to_scheduler();
    }
    ++fiber.waits;
}

void collective(Op op, Exchange &own, Site site) {
    Warp &warp = own_warp();
    warp.exchange[machine.indices.thread % kLanes] = &own;
    if (!meet(op, site, kLanes, "warp", warp.arrived)) return;
    if (op <= Op::kMmaF16) ++machine.mma_count;
    if (op == Op::kSyncWarp) ++warp.epoch;
    emulator::exchange(op, warp.exchange);
}

bool meet_in_warpgroup(Op op, Site site) {
    if (!machine.hopper) fault("%s:%d: the device has no wgmma", site.file, site.line);
    return meet(op, site, kWarpgroup, "warpgroup", machine.at_warpgroup[machine.indices.thread / kWarpgroup]);
}

bool is_hopper() { return machine.hopper; }

const char *run(int64_t grid_x, int64_t grid_y, int threads, uint32_t shared_bytes, int cluster,
                const std::function<void()> &kernel) {
    if (grid_x < 1 || grid_x > 0x7FFFFFFF || grid_y < 1 || grid_y > 65535 || threads < 1 || threads > kMaxThreads ||
        threads % kLanes || shared_bytes > (machine.hopper ? kLargeSharedLimit : kSharedLimit) || cluster < 1 ||
        cluster > (machine.hopper ? kMaxCluster : 1) || grid_x % cluster) {
        return "emulator: invalid configuration argument";
    }
    if (!machine.stacks) {
        constexpr int kFibers = kMaxThreads * kMaxCluster;
        void *stacks =
            mmap(nullptr, kFibers * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) return "emulator: no memory for stacks";
        machine.stacks = static_cast<char *>(stacks);
        machine.fibers.resize(kFibers);
    }
    while (machine.blocks.size() < static_cast<size_t>(cluster)) machine.blocks.emplace_back();
    machine.failed = false;
    machine.threads = threads;
    machine.cluster = cluster;
    machine.shared_bytes = shared_bytes;
    machine.kernel = &kernel;
    machine.indices.grid_x = grid_x;
    ++machine.launches;
    for (int64_t y = 0; y < grid_y; ++y) {
        for (int64_t x = 0; x < grid_x; x += cluster) {
            machine.indices.block_y = static_cast<int>(y);
            run_cluster(x);
            if (machine.failed) return machine.error.c_str();
        }
    }
    return nullptr;
}

}  // namespace emulator

using namespace emulator;

extern "C" {

#define BK_EMULATOR_API __attribute__((visibility("default")))

// mode 0: an input; 1: memory to be written, undefined so far; 2: written before and writable.
BK_EMULATOR_API void bk_emulator_register(const void *pointer, int64_t bytes, int32_t mode) {
    if (bytes == 0) return;
    Region region;
    region.begin = static_cast<const uint8_t *>(pointer);
    region.bytes = bytes;
    region.writable = mode != 0;
    if (mode) {
        region.defined.assign(static_cast<size_t>(bytes), mode == 2);
        region.launch.assign(static_cast<size_t>(bytes), 0);
        region.writer.assign(static_cast<size_t>(bytes), 0);
    }
    machine.regions[region.begin + bytes] = std::move(region);
    machine.last = nullptr;
}

BK_EMULATOR_API void bk_emulator_clear(void) {
    machine.regions.clear();
    machine.last = nullptr;
    machine.conflicts = machine.shared_loads = machine.mma_count = 0;
}

// 0: threads run in ascending order; else the seed of another order.
BK_EMULATOR_API void bk_emulator_order(uint32_t seed) { machine.seed = seed; }

// Whether the device that is played is a Hopper: it has wgmma, clusters and more shared memory.
BK_EMULATOR_API void bk_emulator_hopper(int32_t is) { machine.hopper = is != 0; }

// Since the last clear. what 0: bank conflicts; 1: 16-byte shared loads (of 8 lanes); 2: mma. Ever: 3: launches;
// 4: wgmma.
BK_EMULATOR_API int64_t bk_emulator_count(int32_t what) {
    const int64_t counts[] = {machine.conflicts, machine.shared_loads, machine.mma_count, machine.launches,
                              count_wgmma()};
    return counts[what];
}

// operand 0: A, 1: B, 2: C and D of mma, 3: A, 4: D of wgmma with k 32; returns row * 100 + column of element i of a
// lane, or of one of the 128 threads of wgmma.
BK_EMULATOR_API int32_t bk_emulator_place(int32_t k, int32_t operand, int32_t lane, int32_t i) {
    const Place p = operand == 3   ? wgmma_a(lane, i)
                    : operand == 4 ? wgmma_d(lane, i)
                    : operand == 2 ? c_place(lane, i)
                    : operand == 0 ? (k == 32 ? a_k32(lane, i) : a_k16(lane, i))
                                   : (k == 32 ? b_k32(lane, i) : b_k16(lane, i));
    return p.row * 100 + p.column;
}

}  // extern "C"
