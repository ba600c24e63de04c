// See emulator.h. Fibers switch by hand on x86-64 and through ucontext elsewhere.
#include "emulator.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "fragments.h"

namespace emulator {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 64 * 1024;
constexpr uint32_t kSharedLimit = 48 * 1024, kLargeSharedLimit = 227 * 1024;  // the second with wgmma

enum class State { kRunning, kAtWarp, kAtBlock, kDone };

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
};

struct Warp {
    int arrived;
    Exchange *exchange[kLanes];
    uint32_t epoch;
};

constexpr uint16_t kNobody = 0xFFFF, kSeveral = 0xFFFE;

// The last write and the last reads of one byte of shared memory.
struct SharedByte {
    uint32_t write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
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

struct Machine {
    std::map<const uint8_t *, Region> regions;  // by end
    Region *last = nullptr;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<int> at_warpgroup;
    std::vector<SharedByte> bytes = std::vector<SharedByte>(kLargeSharedLimit);
    alignas(1024) uint8_t shared[kLargeSharedLimit];
    uint32_t shared_bytes = 0;
    uint32_t epoch = 0, launches = 0;
    int at_block = 0;
    int threads = 0;
    Indices indices{};
    char *stacks = nullptr;
    const std::function<void()> *kernel = nullptr;
    std::string error;
    bool failed = false, wgmma = false;
    uint32_t seed = 0;
    ucontext_t main_context;
    void *main_pointer = nullptr;
    int64_t conflicts = 0, shared_loads = 0, mma_count = 0;
    std::map<std::pair<int, uint64_t>, std::vector<uint32_t>> phases;
};

Machine machine;

Fiber &self() { return machine.fibers[machine.indices.thread]; }

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

void to_scheduler() {
#if defined(__x86_64__)
    bk_emulator_switch(&self().stack_pointer, machine.main_pointer);
#else
    swapcontext(&self().context, &machine.main_context);
#endif
}

void body() {
    (*machine.kernel)();
    self().state = State::kDone;
    to_scheduler();
    __builtin_unreachable();
}

void prepare(int thread) {
    Fiber &fiber = machine.fibers[thread];
    fiber.state = State::kRunning;
    fiber.groups.assign(1, {});
    fiber.waited = false;
    fiber.proxy_fences.clear();
    fiber.loads = 0;
    char *top = machine.stacks + (thread + 1) * kStack;
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

void resume(int thread) {
    machine.indices.thread = thread;
#if defined(__x86_64__)
    bk_emulator_switch(&machine.main_pointer, machine.fibers[thread].stack_pointer);
#else
    swapcontext(&machine.main_context, &machine.fibers[thread].context);
#endif
}

const char *name_of(Op op) {
    static const char *const names[] = {"mma_u8s8", "mma_u8s8_wrapping", "mma_s8s8",     "mma_bf16",
                                        "mma_f16",  "shuffle_xor",       "shuffle",      "sync_warp",
                                        "wgmma",    "wgmma_fence",       "wgmma_commit", "wgmma_wait"};
    return names[static_cast<int>(op)];
}

Region *find(const uint8_t *p, uint32_t bytes) {
    const auto holds = [=](const Region &r) { return p >= r.begin && p + bytes <= r.begin + r.bytes; };
    if (machine.last && holds(*machine.last)) return machine.last;
    const auto found = machine.regions.upper_bound(p);
    if (found == machine.regions.end() || !holds(found->second)) return nullptr;
    return machine.last = &found->second;
}

// Counts the bank conflicts of 16-byte loads: eight lanes at a time read 128 bytes, each bank once if all is well.
void count_conflicts(uint32_t offset) {
    const int thread = machine.indices.thread;
    const std::pair<int, uint64_t> key{thread / 8, self().loads++};
    std::vector<uint32_t> &offsets = machine.phases[key];
    offsets.push_back(offset);
    if (offsets.size() < 8) return;
    std::sort(offsets.begin(), offsets.end());
    offsets.erase(std::unique(offsets.begin(), offsets.end()), offsets.end());
    int uses[8] = {};
    for (const uint32_t o : offsets) ++uses[(o / 16) % 8];
    machine.shared_loads += 1;
    machine.conflicts += *std::max_element(uses, uses + 8) - 1;
    machine.phases.erase(key);
}

void check_shared(uint32_t offset, uint32_t bytes, Site site) {
    if (offset + static_cast<uint64_t>(bytes) > machine.shared_bytes) {
        fault("%s:%d: shared memory has %u bytes, access at %u", site.file, site.line, machine.shared_bytes, offset);
    }
    if (offset % bytes)
        fault("%s:%d: shared access of %u bytes at %u is misaligned", site.file, site.line, bytes, offset);
}

void note_write(SharedByte &byte, int thread, bool in_flight) {
    byte.writer = static_cast<uint16_t>(thread);
    byte.write_epoch = machine.epoch;
    byte.write_warp_epoch = machine.warps[thread / kLanes].epoch;
    byte.written = true;
    byte.in_flight = in_flight;
    byte.fences = static_cast<uint32_t>(machine.fibers[thread].proxy_fences.size());
}

// Whether an access by `thread` of this epoch is ordered after one by `other`.
bool ordered(int thread, uint16_t other, uint32_t epoch, uint32_t warp_epoch) {
    if (other == thread || epoch != machine.epoch) return true;
    return other / kLanes == thread / kLanes && warp_epoch != machine.warps[thread / kLanes].epoch;
}

void check_write(uint32_t offset, uint32_t bytes, Site site) {
    check_shared(offset, bytes, site);
    const int thread = machine.indices.thread;
    for (uint32_t i = offset; i < offset + bytes; ++i) {
        const SharedByte &byte = machine.bytes[i];
        if (byte.in_flight) fault("%s:%d: shared byte %u is written while cp.async fills it", site.file, site.line, i);
        if (byte.async_readers) fault("%s:%d: shared byte %u is written while wgmma reads it", site.file, site.line, i);
        if (byte.written && !ordered(thread, byte.writer, byte.write_epoch, byte.write_warp_epoch)) {
            fault("%s:%d: race: threads %d and %d write shared byte %u with no barrier between", site.file, site.line,
                  byte.writer, thread, i);
        }
        if (byte.reader == kNobody || byte.read_epoch != machine.epoch || byte.reader == thread) continue;
        const bool warp_ordered =
            byte.read_warp == thread / kLanes && byte.read_warp_epoch != machine.warps[thread / kLanes].epoch;
        if (!warp_ordered) {
            fault("%s:%d: race: thread %d writes shared byte %u that others read, with no barrier between", site.file,
                  site.line, thread, i);
        }
    }
}

void finish(const Copy &copy) {
    memset(machine.shared + copy.offset, 0, copy.bytes);
    memcpy(machine.shared + copy.offset, copy.pointer, static_cast<size_t>(copy.valid));
    for (uint32_t i = 0; i < copy.bytes; ++i) note_write(machine.bytes[copy.offset + i], machine.indices.thread, false);
}

void run_block() {
    const int threads = machine.threads;
    memset(machine.shared, 0xA5, machine.shared_bytes);
    for (uint32_t i = 0; i < machine.shared_bytes; ++i) {
        machine.bytes[i] = SharedByte{};
        machine.bytes[i].reader = kNobody;
    }
    machine.phases.clear();
    machine.warps.assign(static_cast<size_t>((threads + kLanes - 1) / kLanes), Warp{});
    machine.at_warpgroup.assign(static_cast<size_t>((threads + kWarpgroup - 1) / kWarpgroup), 0);
    reset_warpgroups(threads);
    machine.at_block = 0;
    ++machine.epoch;
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
            resume(t);
            if (machine.failed) return;
            if (machine.fibers[t].state == State::kDone) ++done;
        }
        if (done == threads && has_open_wgmma()) {
            machine.failed = true;
            machine.error = "a kernel ends with wgmma that was not waited for";
        }
        if (progress || done == threads) continue;
        int counts[4] = {};
        for (int t = 0; t < threads; ++t) ++counts[static_cast<int>(machine.fibers[t].state)];
        const auto waiting = std::find_if(machine.fibers.begin(), machine.fibers.begin() + threads,
                                          [](const Fiber &f) { return f.state != State::kDone; });
        char text[256];
        snprintf(text, sizeof text,
                 "divergence: %d threads have returned, %d wait in a warp, %d at a block barrier (one at %s:%d)",
                 counts[3], counts[1], counts[2], waiting->site.file, waiting->site.line);
        machine.failed = true;
        machine.error = text;
        return;
    }
}

// Waits until the `count` threads that come together are here; true in the last one, when the others may go on.
bool meet(Op op, Site site, int count, const char *name, int &arrived) {
    const int first = machine.indices.thread / count * count;
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

void check_global(const void *pointer, uint32_t bytes, bool write, Site site) {
    if (!self().waited) fault("%s:%d: global access before the wait for earlier kernels", site.file, site.line);
    const auto *p = static_cast<const uint8_t *>(pointer);
    if (reinterpret_cast<uintptr_t>(p) % bytes) {
        fault("%s:%d: global access of %u bytes is misaligned", site.file, site.line, bytes);
    }
    Region *region = find(p, bytes);
    if (!region) fault("%s:%d: global access of %u bytes is outside every buffer", site.file, site.line, bytes);
    if (write && !region->writable) fault("%s:%d: an input is written", site.file, site.line);
    if (!region->writable) return;
    const int64_t me = (machine.indices.block_x + machine.indices.block_y * machine.indices.grid_x) * kMaxThreads +
                       machine.indices.thread;
    const size_t first = static_cast<size_t>(p - region->begin);
    for (size_t i = first; i < first + bytes; ++i) {
        if (region->launch[i] == machine.launches && region->writer[i] != me) {
            fault("%s:%d: race: two threads of one launch meet at global byte %zu", site.file, site.line, i);
        }
        if (write) {
            region->defined[i] = true;
            region->launch[i] = machine.launches;
            region->writer[i] = me;
        } else if (!region->defined[i]) {
            fault("%s:%d: global byte %zu is read but was never written", site.file, site.line, i);
        }
    }
}

const void *read_shared(uint32_t offset, uint32_t bytes, Site site) {
    check_shared(offset, bytes, site);
    const int thread = machine.indices.thread;
    const int warp = thread / kLanes;
    for (uint32_t i = offset; i < offset + bytes; ++i) {
        SharedByte &byte = machine.bytes[i];
        if (byte.in_flight)
            fault("%s:%d: shared byte %u is read before its cp.async was waited for", site.file, site.line, i);
        if (!byte.written) fault("%s:%d: shared byte %u is read but was never written", site.file, site.line, i);
        if (!ordered(thread, byte.writer, byte.write_epoch, byte.write_warp_epoch)) {
            fault("%s:%d: race: thread %d reads shared byte %u that thread %d wrote, with no barrier between",
                  site.file, site.line, thread, i, byte.writer);
        }
        if (byte.reader == kNobody || byte.read_epoch != machine.epoch) {
            byte.reader = static_cast<uint16_t>(thread);
            byte.read_warp = static_cast<int16_t>(warp);
        } else if (byte.reader != thread) {
            byte.reader = kSeveral;
            if (byte.read_warp != warp) byte.read_warp = -1;
        }
        byte.read_epoch = machine.epoch;
        byte.read_warp_epoch = machine.warps[warp].epoch;
    }
    if (bytes == 16) count_conflicts(offset);
    return machine.shared + offset;
}

void *write_shared(uint32_t offset, uint32_t bytes, Site site) {
    check_write(offset, bytes, site);
    for (uint32_t i = offset; i < offset + bytes; ++i) note_write(machine.bytes[i], machine.indices.thread, false);
    return machine.shared + offset;
}

void copy_async(uint32_t offset, const void *pointer, uint32_t bytes, int valid, Site site) {
    if (valid != 0 && valid != static_cast<int>(bytes)) {
        fault("%s:%d: cp.async of %d bytes", site.file, site.line, valid);
    }
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
        fault("%s:%d: cp.async source is misaligned", site.file, site.line);
    }
    if (valid) check_global(pointer, bytes, false, site);
    check_write(offset, bytes, site);
    for (uint32_t i = offset; i < offset + bytes; ++i) note_write(machine.bytes[i], machine.indices.thread, true);
    self().groups.back().push_back({offset, pointer, bytes, valid, site});
}

void commit_async() { self().groups.emplace_back(); }

void wait_async(int open) {
    auto &groups = self().groups;  // the last is not closed yet and is not waited for
    while (static_cast<int>(groups.size()) - 1 > open) {
        for (const Copy &copy : groups.front()) finish(copy);
        groups.erase(groups.begin());
    }
}

void sync_block(Site site) {
    Fiber &fiber = self();
    fiber.site = site;
    fiber.state = State::kAtBlock;
    if (++machine.at_block == machine.threads) {
        for (int t = 0; t < machine.threads; ++t) {
            Fiber &other = machine.fibers[t];
            if (other.site.line != site.line || strcmp(other.site.file, site.file) != 0) {
                fault("divergence: block barriers at %s:%d and %s:%d meet", other.site.file, other.site.line, site.file,
                      site.line);
            }
            other.state = State::kRunning;
        }
        machine.at_block = 0;
        ++machine.epoch;
        return;
    }
    to_scheduler();
}

void collective(Op op, Exchange &own, Site site) {
    const int thread = machine.indices.thread;
    Warp &warp = machine.warps[thread / kLanes];
    warp.exchange[thread % kLanes] = &own;
    if (!meet(op, site, kLanes, "warp", warp.arrived)) return;
    if (op <= Op::kMmaF16) ++machine.mma_count;
    if (op == Op::kSyncWarp) ++warp.epoch;
    emulator::exchange(op, warp.exchange);
}

bool meet_in_warpgroup(Op op, Site site) {
    if (!machine.wgmma) fault("%s:%d: the device has no wgmma", site.file, site.line);
    return meet(op, site, kWarpgroup, "warpgroup", machine.at_warpgroup[machine.indices.thread / kWarpgroup]);
}

void begin_async_read(uint32_t offset, uint32_t bytes, Site site) {
    check_shared(offset, bytes, site);
    for (uint32_t i = offset; i < offset + bytes; ++i) {
        SharedByte &byte = machine.bytes[i];
        if (byte.in_flight || !byte.written || byte.write_epoch == machine.epoch) {
            fault("%s:%d: wgmma reads shared byte %u %s", site.file, site.line, i,
                  byte.in_flight  ? "before its cp.async was waited for"
                  : !byte.written ? "that was never written"
                                  : "with no barrier after its write: race");
        }
        const std::vector<uint32_t> &fences = machine.fibers[byte.writer].proxy_fences;
        if (byte.fences >= fences.size() || fences[byte.fences] == machine.epoch) {
            fault("%s:%d: wgmma reads shared byte %u with no proxy fence between its write and the barrier", site.file,
                  site.line, i);
        }
        ++byte.async_readers;
    }
}

const uint8_t *end_async_read(uint32_t offset, uint32_t bytes) {
    for (uint32_t i = offset; i < offset + bytes; ++i) {
        SharedByte &byte = machine.bytes[i];
        --byte.async_readers;
        byte.reader = kSeveral;
        byte.read_warp = -1;
        byte.read_epoch = machine.epoch;
    }
    return machine.shared + offset;
}

bool has_wgmma() { return machine.wgmma; }

void fence_async_proxy() { self().proxy_fences.push_back(machine.epoch); }

const char *run(int64_t grid_x, int64_t grid_y, int threads, uint32_t shared_bytes,
                const std::function<void()> &kernel) {
    if (grid_x < 1 || grid_x > 0x7FFFFFFF || grid_y < 1 || grid_y > 65535 || threads < 1 || threads > kMaxThreads ||
        threads % kLanes || shared_bytes > (machine.wgmma ? kLargeSharedLimit : kSharedLimit)) {
        return "emulator: invalid configuration argument";
    }
    if (!machine.stacks) {
        void *stacks = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) return "emulator: no memory for stacks";
        machine.stacks = static_cast<char *>(stacks);
        machine.fibers.resize(kMaxThreads);
    }
    machine.failed = false;
    machine.threads = threads;
    machine.shared_bytes = shared_bytes;
    machine.kernel = &kernel;
    machine.indices.grid_x = grid_x;
    ++machine.launches;
    for (int64_t y = 0; y < grid_y; ++y) {
        for (int64_t x = 0; x < grid_x; ++x) {
            machine.indices.block_x = x;
            machine.indices.block_y = static_cast<int>(y);
            run_block();
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

// Whether the device that is played has wgmma.
BK_EMULATOR_API void bk_emulator_wgmma(int32_t has) { machine.wgmma = has != 0; }

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
