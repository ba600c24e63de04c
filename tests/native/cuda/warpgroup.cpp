// wgmma of the emulator: what a warpgroup has issued, and the products, made at the wait.
#include <string.h>

#include <map>
#include <vector>

#include "emulator.h"
#include "fragments.h"

namespace emulator {
namespace {

constexpr int kRows = 64, kColumns = 64, kDepth = 32;
constexpr int kSums = 32, kWords = 4;
constexpr uint32_t kPattern = 0x5AA55AA5;

// One wgmma: pointers to the registers of each thread, and what those of A held when it was issued.
struct Issued {
    int32_t *d[kWarpgroup];
    const uint32_t *a[kWarpgroup];
    uint32_t held[kWarpgroup][kWords];
    bool onto, wraps;
    uint32_t start, stride;
    Site site;
};

// The sums of registers that a wgmma will write, while they hold the pattern.
struct Sums {
    int32_t value[kSums];
    int open;
};

struct Warpgroup {
    Issued next;
    uint64_t descriptors[kWarpgroup];
    bool fenced;
    std::vector<Issued> open;                 // not committed
    std::vector<std::vector<Issued>> groups;  // committed, oldest first
    std::map<const int32_t *, Sums> sums;
};

std::vector<Warpgroup> warpgroups;
int64_t issued_count = 0;

Warpgroup &own() { return warpgroups[static_cast<size_t>(current().thread / kWarpgroup)]; }

// Calls f(offset in shared memory, row of B, first k) for each 16 bytes of B.
template <typename F>
void for_each_chunk(const Issued &issued, F &&f) {
    for (uint32_t n = 0; n < kColumns; ++n) {
        for (uint32_t k = 0; k < kDepth; k += 16) f(swizzled_128(issued.start, issued.stride, n, k), n, k);
    }
}

void decode(uint64_t descriptor, Issued &issued) {
    const Site site = issued.site;
    if (descriptor >> 62 != 1) fault("%s:%d: only the 128-byte swizzle is modelled", site.file, site.line);
    issued.start = static_cast<uint32_t>(descriptor & 0x3FFF) * 16;
    issued.stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) * 16;
    if (descriptor >> 49 & 7 || issued.start >> 7 & 7) {
        fault("%s:%d: the tile of a descriptor must begin at a multiple of 1024", site.file, site.line);
    }
}

void write_pattern(Sums &sums, int32_t *d, bool onto) {
    if (sums.open++ == 0) {
        if (onto) memcpy(sums.value, d, sizeof sums.value);
        for (int i = 0; i < kSums; ++i) d[i] = static_cast<int32_t>(kPattern);
    }
}

void multiply(Warpgroup &group, const Issued &issued) {
    static int32_t a[kRows][kDepth], b[kColumns][kDepth];
    for_each_chunk(issued, [&](uint32_t offset, uint32_t n, uint32_t k) {
        const uint8_t *from = end_async_read(offset, 16);
        for (uint32_t j = 0; j < 16; ++j) b[n][k + j] = static_cast<int8_t>(from[j]);
    });
    for (int thread = 0; thread < kWarpgroup; ++thread) {
        if (memcmp(issued.a[thread], issued.held[thread], sizeof issued.held[thread]) != 0) {
            fault("%s:%d: registers of A changed before wgmma was waited for", issued.site.file, issued.site.line);
        }
        for (int i = 0; i < 4 * kWords; ++i) {
            const Place p = wgmma_a(thread, i);
            a[p.row][p.column] = issued.held[thread][i / 4] >> (8 * (i % 4)) & 255;
        }
    }
    for (int thread = 0; thread < kWarpgroup; ++thread) {
        Sums &sums = group.sums[issued.d[thread]];
        for (int i = 0; i < kSums; ++i) {
            const Place p = wgmma_d(thread, i);
            const int32_t *row = a[p.row], *token = b[p.column];
            int32_t product = 0;
            for (int k = 0; k < kDepth; ++k) product += row[k] * token[k];
            const int64_t sum = static_cast<int64_t>(issued.onto ? sums.value[i] : 0) + product;
            if (!issued.wraps && sum != static_cast<int32_t>(sum)) fault("an int32 sum of wgmma overflows");
            sums.value[i] = static_cast<int32_t>(sum);
            if (issued.d[thread][i] != static_cast<int32_t>(kPattern)) {
                fault("%s:%d: sums were written before wgmma was waited for", issued.site.file, issued.site.line);
            }
        }
        if (--sums.open == 0) memcpy(issued.d[thread], sums.value, sizeof sums.value);
    }
}

}  // namespace

void wgmma(int32_t *d, const uint32_t *a, uint64_t b, bool onto, bool wraps, Site site) {
    Warpgroup &group = own();
    const int thread = current().thread % kWarpgroup;
    group.next.d[thread] = d;
    group.next.a[thread] = a;
    memcpy(group.next.held[thread], a, sizeof group.next.held[thread]);
    group.descriptors[thread] = b;
    if (!meet_in_warpgroup(Op::kWgmma, site)) return;
    if (!group.fenced) fault("%s:%d: wgmma with no wgmma_fence since the last group", site.file, site.line);
    for (const uint64_t other : group.descriptors) {
        if (other != b) fault("%s:%d: threads of a warpgroup have different descriptors", site.file, site.line);
    }
    group.next.onto = onto;
    group.next.wraps = wraps;
    group.next.site = site;
    decode(b, group.next);
    for_each_chunk(group.next, [&](uint32_t offset, uint32_t, uint32_t) { begin_async_read(offset, 16, site); });
    for (int32_t *sums : group.next.d) write_pattern(group.sums[sums], sums, onto);
    group.open.push_back(group.next);
    ++issued_count;
}

void wgmma_fence(Site site) {
    if (meet_in_warpgroup(Op::kWgmmaFence, site)) own().fenced = true;
}

void wgmma_commit(Site site) {
    if (!meet_in_warpgroup(Op::kWgmmaCommit, site)) return;
    Warpgroup &group = own();
    group.groups.push_back(std::move(group.open));
    group.open.clear();
    group.fenced = false;
}

void wgmma_wait(int open, Site site) {
    if (!meet_in_warpgroup(Op::kWgmmaWait, site)) return;
    Warpgroup &group = own();
    while (static_cast<int>(group.groups.size()) > open) {
        for (const Issued &issued : group.groups.front()) multiply(group, issued);
        group.groups.erase(group.groups.begin());
    }
}

void wgmma_take(const int32_t *d, Site site) {
    const auto found = own().sums.find(d);
    if (found != own().sums.end() && found->second.open) {
        fault("%s:%d: sums are taken before wgmma was waited for", site.file, site.line);
    }
}

void reset_warpgroups(int threads) {
    warpgroups.clear();
    warpgroups.resize(static_cast<size_t>(threads / kWarpgroup));
}

bool has_open_wgmma() {
    for (const Warpgroup &group : warpgroups) {
        if (!group.open.empty() || !group.groups.empty()) return true;
    }
    return false;
}

int64_t count_wgmma() { return issued_count; }

}  // namespace emulator
