// Every access to memory, checked: bounds, alignment, bytes never written, copies not waited for, races.
#include <string.h>

#include <algorithm>

#include "machine.h"

namespace emulator {
namespace {

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
    auto &phases = own_block().phases;
    std::vector<uint32_t> &offsets = phases[key];
    offsets.push_back(offset);
    if (offsets.size() < 8) return;
    std::sort(offsets.begin(), offsets.end());
    offsets.erase(std::unique(offsets.begin(), offsets.end()), offsets.end());
    int uses[8] = {};
    for (const uint32_t o : offsets) ++uses[(o / 16) % 8];
    machine.shared_loads += 1;
    machine.conflicts += *std::max_element(uses, uses + 8) - 1;
    phases.erase(key);
}

void check_shared(uint32_t offset, uint32_t bytes, Site site) {
    if (offset + static_cast<uint64_t>(bytes) > machine.shared_bytes) {
        fault("%s:%d: shared memory has %u bytes, access at %u", site.file, site.line, machine.shared_bytes, offset);
    }
    if (offset % bytes)
        fault("%s:%d: shared access of %u bytes at %u is misaligned", site.file, site.line, bytes, offset);
}

void note_write(SharedByte &byte, const Block &block, bool in_flight) {
    byte.writer = static_cast<uint16_t>(machine.fiber);
    byte.write_epoch = block.epoch;
    byte.write_warp_epoch = own_warp().epoch;
    byte.round = 0;
    byte.written = true;
    byte.in_flight = in_flight;
    byte.fences = static_cast<uint32_t>(self().proxy_fences.size());
}

// Whether this thread's access to its block's memory is ordered after the last write there.
bool ordered_after_write(const SharedByte &byte) {
    const int other = byte.writer;
    if (byte.round) return self().rounds[byte.inbox] >= byte.round;
    if (other == machine.fiber) return true;
    if (byte.write_epoch != own_block().epoch) return true;
    return other / kLanes == machine.fiber / kLanes && byte.write_warp_epoch != own_warp().epoch;
}

// Whether this thread's write to its block's memory is ordered after the last reads there.
bool ordered_after_reads(const SharedByte &byte) {
    if (byte.reader == kNobody || byte.reader == machine.fiber || byte.read_epoch != own_block().epoch) return true;
    return byte.read_warp == machine.indices.thread / kLanes && byte.read_warp_epoch != own_warp().epoch;
}

void check_write(uint32_t offset, uint32_t bytes, Site site) {
    check_shared(offset, bytes, site);
    for (uint32_t i = offset; i < offset + bytes; ++i) {
        const SharedByte &byte = own_block().bytes[i];
        if (byte.in_flight) fault("%s:%d: shared byte %u is written while cp.async fills it", site.file, site.line, i);
        if (byte.async_readers) fault("%s:%d: shared byte %u is written while wgmma reads it", site.file, site.line, i);
        if (byte.written && !ordered_after_write(byte)) {
            fault("%s:%d: race: threads %d and %d write shared byte %u with no barrier between", site.file, site.line,
                  byte.writer, machine.fiber, i);
        }
        if (!ordered_after_reads(byte)) {
            fault("%s:%d: race: thread %d writes shared byte %u that others read, with no barrier between", site.file,
                  site.line, machine.fiber, i);
        }
    }
}

void finish(const Copy &copy) {
    Block &block = own_block();
    memset(&block.memory[copy.offset], 0, copy.bytes);
    memcpy(&block.memory[copy.offset], copy.pointer, static_cast<size_t>(copy.valid));
    for (uint32_t i = 0; i < copy.bytes; ++i) note_write(block.bytes[copy.offset + i], block, false);
}

// Ends the round of an inbox if all has come that was expected.
void end_round(int rank, Inbox &box, Site site) {
    if (!box.expects || box.bytes < box.expected) return;
    if (box.bytes > box.expected) fault("%s:%d: more bytes sent than were expected", site.file, site.line);
    box = {box.rounds + 1, 0, 0, false};
    for (int t = rank * machine.threads; t < (rank + 1) * machine.threads; ++t) {
        if (machine.fibers[t].state == State::kAtInbox) machine.fibers[t].state = State::kRunning;
    }
}

}  // namespace

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
    Block &block = own_block();
    const int warp = machine.indices.thread / kLanes;
    for (uint32_t i = offset; i < offset + bytes; ++i) {
        SharedByte &byte = block.bytes[i];
        if (byte.in_flight)
            fault("%s:%d: shared byte %u is read before its cp.async was waited for", site.file, site.line, i);
        if (!byte.written) fault("%s:%d: shared byte %u is read but was never written", site.file, site.line, i);
        if (!ordered_after_write(byte)) {
            fault("%s:%d: race: thread %d reads shared byte %u that thread %d wrote, with no barrier between",
                  site.file, site.line, machine.fiber, i, byte.writer);
        }
        if (byte.reader == kNobody || byte.read_epoch != block.epoch) {
            byte.reader = static_cast<uint16_t>(machine.fiber);
            byte.read_warp = static_cast<int16_t>(warp);
        } else if (byte.reader != machine.fiber) {
            byte.reader = kSeveral;
            if (byte.read_warp != warp) byte.read_warp = -1;
        }
        byte.read_epoch = block.epoch;
        byte.read_warp_epoch = own_warp().epoch;
        byte.read_arrivals = std::max(byte.read_arrivals, self().arrivals);
    }
    if (bytes == 16) count_conflicts(offset);
    return &block.memory[offset];
}

void *write_shared(uint32_t offset, uint32_t bytes, Site site) {
    check_write(offset, bytes, site);
    Block &block = own_block();
    for (uint32_t i = offset; i < offset + bytes; ++i) note_write(block.bytes[i], block, false);
    return &block.memory[offset];
}

void open_inbox(uint32_t offset, Site site) {
    if (!machine.hopper) fault("%s:%d: the device has no inboxes", site.file, site.line);
    const uint64_t zero = 0;
    memcpy(write_shared(offset, sizeof zero, site), &zero, sizeof zero);
    if (self().arrivals) fault("%s:%d: an inbox is opened after the cluster's first barrier", site.file, site.line);
    own_block().inboxes[offset] = Inbox{};
}

void expect(uint32_t inbox, uint32_t bytes, Site site) {
    const auto found = own_block().inboxes.find(inbox);
    if (found == own_block().inboxes.end()) fault("%s:%d: no inbox at %u", site.file, site.line, inbox);
    if (found->second.expects) fault("%s:%d: a round of an inbox is expected twice", site.file, site.line);
    found->second.expects = true;
    found->second.expected = bytes;
    end_round(machine.fiber / machine.threads, found->second, site);
}

void wait_inbox(uint32_t inbox, int round, Site site) {
    const auto found = own_block().inboxes.find(inbox);
    if (found == own_block().inboxes.end()) fault("%s:%d: no inbox at %u", site.file, site.line, inbox);
    Inbox &box = found->second;
    // As on a GPU, which knows no more of the round than whether it is odd.
    while (box.rounds % 2 == static_cast<uint32_t>(round) % 2) {
        self().site = site;
        self().state = State::kAtInbox;
        to_scheduler();
    }
    self().rounds[inbox] = box.rounds;
}

void send(int rank, uint32_t offset, const void *value, uint32_t bytes, uint32_t inbox, Site site) {
    if (rank < 0 || rank >= machine.cluster) {
        fault("%s:%d: a cluster of %d blocks has no block %d", site.file, site.line, machine.cluster, rank);
    }
    Block &block = machine.blocks[static_cast<size_t>(rank)];
    if (!self().waits) fault("%s:%d: sent to a block that may not have begun", site.file, site.line);
    if (block.done == machine.threads) fault("%s:%d: sent to a block that has ended", site.file, site.line);
    const auto found = block.inboxes.find(inbox);
    if (found == block.inboxes.end()) fault("%s:%d: block %d has no inbox at %u", site.file, site.line, rank, inbox);
    check_shared(offset, bytes, site);
    for (uint32_t i = offset; i < offset + bytes; ++i) {
        SharedByte &byte = block.bytes[i];
        if (byte.in_flight || byte.async_readers || (byte.written && byte.writer != machine.fiber)) {
            fault("%s:%d: race: thread %d sends to shared byte %u of block %d, which thread %d has written", site.file,
                  site.line, machine.fiber, i, rank, byte.writer);
        }
        if (byte.reader != kNobody && byte.read_arrivals >= self().waits) {
            fault(
                "%s:%d: race: thread %d sends to shared byte %u of block %d, with no barrier of the cluster after it "
                "was read",
                site.file, site.line, machine.fiber, i, rank);
        }
        note_write(byte, block, false);
        byte.inbox = inbox;
        byte.round = found->second.rounds + 1;
    }
    memcpy(&block.memory[offset], value, bytes);
    found->second.bytes += bytes;
    end_round(rank, found->second, site);
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
    Block &block = own_block();
    for (uint32_t i = offset; i < offset + bytes; ++i) note_write(block.bytes[i], block, true);
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

void begin_async_read(uint32_t offset, uint32_t bytes, Site site) {
    check_shared(offset, bytes, site);
    const uint32_t epoch = own_block().epoch;
    for (uint32_t i = offset; i < offset + bytes; ++i) {
        SharedByte &byte = own_block().bytes[i];
        if (byte.in_flight || !byte.written || byte.write_epoch == epoch) {
            fault("%s:%d: wgmma reads shared byte %u %s", site.file, site.line, i,
                  byte.in_flight  ? "before its cp.async was waited for"
                  : !byte.written ? "that was never written"
                                  : "with no barrier after its write: race");
        }
        const std::vector<uint32_t> &fences = machine.fibers[byte.writer].proxy_fences;
        if (byte.fences >= fences.size() || fences[byte.fences] == epoch) {
            fault("%s:%d: wgmma reads shared byte %u with no proxy fence between its write and the barrier", site.file,
                  site.line, i);
        }
        ++byte.async_readers;
    }
}

const uint8_t *end_async_read(uint32_t offset, uint32_t bytes) {
    Block &block = own_block();
    for (uint32_t i = offset; i < offset + bytes; ++i) {
        SharedByte &byte = block.bytes[i];
        --byte.async_readers;
        byte.reader = kSeveral;
        byte.read_warp = -1;
        byte.read_epoch = block.epoch;
    }
    return &block.memory[offset];
}

void fence_async_proxy() { self().proxy_fences.push_back(own_block().epoch); }

}  // namespace emulator
