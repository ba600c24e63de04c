// Kernels of two blocks in a cluster with one fault each, which the emulator must report.
#include "device.h"

using namespace bitlab;

namespace {

struct ProbeParams {
    int32_t which;
    int32_t *memory;  // 64 words
};

constexpr int kThreads = 32, kBlocks = 2;
constexpr uint32_t kInbox = 128, kOther = 136, kRound = 4 * kThreads;

void open_inboxes(int which) {
    if (thread_x() > 0) return;
    open_inbox(kInbox);
    if (which == 13) expect(kInbox, kRound);
    expect(kInbox, which == 6 ? kRound + 4 : which == 5 ? kRound - 2 : kRound);
}

// Each thread of a block sends a word to the other block's thread, twice.
void probe_kernel(ProbeParams p) {
    begin();
    const int thread = thread_x(), rank = cluster_rank(), other = 1 - rank;
    const uint32_t own = 4u * static_cast<uint32_t>(thread);
    const auto value = static_cast<uint32_t>(100 * rank + thread);
    open_inboxes(p.which);
    sync_block();
    if (p.which == 8) cluster_wait();
    if (p.which == 1) send(other, own, value, kInbox);
    cluster_arrive();
    if (p.which == 7) cluster_arrive();
    cluster_wait();
    if (p.which == 4 && rank == 1) return;
    if (p.which == 4) {
        // What waits for a block that has ended waits for ever: some other work until then.
        for (int i = 0; i < 100; ++i) sync_warp();
    }
    if (p.which == 12 && thread == 0) open_inbox(kOther);
    send(p.which == 10 ? 2 : other, p.which == 9 ? own / 8 * 4 : own, value, p.which == 11 ? kOther : kInbox);
    if (p.which != 2) wait_inbox(kInbox, 0);
    uint32_t found = load_shared<uint32_t>(own);
    if (thread == 0) expect(kInbox, kRound);
    if (p.which != 3) cluster_arrive();
    if (p.which != 3) cluster_wait();
    send(other, own, value + 1000, kInbox);
    wait_inbox(kInbox, p.which == 14 ? 0 : 1);
    found += load_shared<uint32_t>(own);
    store_global(p.memory + rank * kThreads + thread, static_cast<int32_t>(found));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char *bk_emulator_cluster_probe(int32_t which,
                                                                                        int32_t *memory) {
    const char *error =
        launch(probe_kernel, Grid{kBlocks, 1}, kThreads, 1024, nullptr, ProbeParams{which, memory}, kBlocks);
    return error ? error : "";
}
