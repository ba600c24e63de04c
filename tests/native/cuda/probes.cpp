// Kernels with one fault each, which the emulator must report, and the mma probe.
#include "fragment_probe.cuh"

using namespace bitlab;

namespace {

struct ProbeParams {
    int32_t which;
    int32_t *memory;       // 64 words
    const int32_t *input;  // 64 words
};

constexpr int kThreads = 64;

void probe_kernel(ProbeParams p) {
    if (p.which != 21) begin();
    const int thread = thread_x();
    const uint32_t own = 4u * static_cast<uint32_t>(thread),
                   other = 4u * static_cast<uint32_t>((thread + 32) % kThreads);
    const uint32_t near = 4u * static_cast<uint32_t>(thread ^ 1), wide = 16u * static_cast<uint32_t>(thread);
    switch (p.which) {
        case 0:  // right: a barrier between write and read, and before the next write
            store_shared(own, thread);
            sync_block();
            store_global(p.memory + thread, load_shared<int32_t>(other));
            sync_block();
            store_shared(own, thread);
            break;
        case 1:  // right: within a warp its own barrier is enough
            store_shared(own, thread);
            sync_warp();
            store_global(p.memory + thread, load_shared<int32_t>(near));
            break;
        case 2:  // right: cp.async, waited for by its thread and then a barrier
            copy_async_16(wide, p.input + 4 * (thread % 16), 16);
            commit_async();
            wait_async<0>();
            sync_block();
            store_global(p.memory + thread,
                         load_shared<int32_t>(16u * static_cast<uint32_t>((thread + 32) % kThreads)));
            break;
        case 3:  // no barrier between write and read of another warp
            store_shared(own, 0);
            sync_block();
            store_shared(own, thread);
            store_global(p.memory + thread, load_shared<int32_t>(other));
            break;
        case 4:  // no barrier between write and read within a warp
            store_shared(own, 0);
            sync_block();
            store_shared(own, thread);
            store_global(p.memory + thread, load_shared<int32_t>(near));
            break;
        case 5:  // a write after another's read
            store_shared(own, thread);
            sync_block();
            store_global(p.memory + thread, load_shared<int32_t>(other));
            store_shared(own, thread);
            break;
        case 6:  // never written
            store_global(p.memory + thread, load_shared<int32_t>(own));
            break;
        case 7:  // cp.async not waited for
            copy_async_16(wide, p.input + 4 * (thread % 16), 16);
            commit_async();
            sync_block();
            store_global(p.memory + thread, load_shared<int32_t>(wide));
            break;
        case 8:  // cp.async waited for, but no barrier
            store_shared(wide, Bytes16{});
            sync_block();
            copy_async_16(wide, p.input + 4 * (thread % 16), 16);
            commit_async();
            wait_async<0>();
            store_global(p.memory + thread,
                         load_shared<int32_t>(16u * static_cast<uint32_t>((thread + 32) % kThreads)));
            break;
        case 9:  // one group too many left open
            copy_async_16(wide, p.input + 4 * (thread % 16), 16);
            commit_async();
            wait_async<1>();
            sync_block();
            store_global(p.memory + thread, load_shared<int32_t>(wide));
            break;
        case 10:  // a barrier that some threads miss
            if (thread < 32) sync_block();
            break;
        case 11:  // lanes in different collectives
            if (thread % 2) {
                sync_warp();
            } else {
                shuffle_xor(thread, 1);
            }
            break;
        case 12:  // a lane missing from a collective
            if (thread % 32) shuffle_xor(thread, 1);
            break;
        case 13:  // past the end of shared memory
            store_shared(own + 4096, thread);
            break;
        case 14:  // past the end of a buffer
            store_global(p.memory + thread + 1, thread);
            break;
        case 15:  // misaligned
            load_global(reinterpret_cast<const Bytes16 *>(p.input + 1));
            break;
        case 16:  // an input written
            store_global(const_cast<int32_t *>(p.input) + thread, thread);
            break;
        case 17:  // two threads, one word
            store_global(p.memory + thread / 2, thread);
            break;
        case 18:  // an output read before anyone wrote it
            load_global(static_cast<const int32_t *>(p.memory) + thread);
            break;
        case 19:  // block barriers of two lines meet
            if (thread < 32) {
                sync_block();
            } else {
                sync_block();
            }
            break;
        case 20:  // written while cp.async fills it
            copy_async_16(wide, p.input + 4 * (thread % 16), 16);
            store_shared(wide, thread);
            break;
        case 21:  // earlier kernels not waited for
            load_global(p.input + thread);
            break;
        case 22:    // a sum that overflows
        case 23: {  // right: one that may
            int32_t sums[4] = {0x7FFFFFFF, 0, 0, 0};
            const uint32_t ones[4] = {1, 1, 1, 1};
            if (p.which == 22) {
                mma_u8s8(sums, ones, 1, 1);
            } else {
                mma_u8s8_wrapping(sums, ones, 1, 1);
            }
            store_global(p.memory + thread, sums[0]);
            break;
        }
        case 24:  // right: four bytes by cp.async, or zeros
            copy_async_4(own, p.input + thread, thread % 2 ? 4 : 0);
            commit_async();
            wait_async<0>();
            store_global(p.memory + thread, load_shared<int32_t>(own));
            break;
        case 25:  // not waited for
            copy_async_4(own, p.input + thread, 4);
            commit_async();
            load_shared<int32_t>(own);
            break;
        default:
            break;
    }
}

const char *error_of(const char *error) { return error ? error : ""; }

}  // namespace

extern "C" {

__attribute__((visibility("default"))) const char *bk_emulator_probe(int32_t which, int32_t *memory,
                                                                     const int32_t *input) {
    return error_of(launch(probe_kernel, Grid{1, 1}, kThreads, 1024, nullptr, ProbeParams{which, memory, input}));
}

__attribute__((visibility("default"))) const char *bk_emulator_mma(int32_t kind, const uint32_t *a, const uint32_t *b,
                                                                   uint32_t *d) {
    return error_of(launch(fragment_kernel<32>, Grid{1, 1}, 32, 0, nullptr, FragmentParams{kind, a, b, d}));
}

}  // extern "C"
