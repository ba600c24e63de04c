// Checks fragments.h on a GPU: one warp's mma, and a warpgroup's wgmma where the GPU has it, against the products that
// the tables say. Needs a GPU to run.
//
//   nvcc -std=c++17 TARGET -Icsrc/include -Icsrc/cuda -Itests/native/cuda tests/native/cuda/fragments_gpu.cu &&
//   ./a.out
//
// TARGET is -arch=native, or on a Hopper -gencode=arch=compute_90a,code=sm_90a -DBK_CUDA_ARCHITECTURES='"sm_90a"'.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fragment_probe.cuh"
#include "fragments.h"

using emulator::Place;

namespace {

// Small integers, as bfloat16 and float16 too, so that every sum is exact.
int value_of(uint32_t bits, bool is_signed) { return is_signed ? static_cast<int8_t>(bits) : static_cast<int>(bits); }

uint32_t encode(int value, int kind) {
    if (kind < 2) return static_cast<uint32_t>(value) & 255;
    const float f = static_cast<float>(value);
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (kind == 2) return bits >> 16;
    if (value == 0) return 0;
    return (bits >> 16 & 0x8000) | (((bits >> 23 & 255) - 112) << 10) | (bits >> 13 & 1023);
}

int check(int kind) {
    const bool bytes = kind < 2;
    const int per = bytes ? 4 : 2, a_count = 4 * per, b_count = 2 * per, depth = bytes ? 32 : 16;
    int a[16][32], b[32][8];
    uint32_t a_bits[32][4] = {}, b_bits[32][2] = {}, d_bits[32][4];
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < a_count; ++i) {
            const Place p = bytes ? emulator::a_k32(lane, i) : emulator::a_k16(lane, i);
            const int value = bytes ? value_of(static_cast<uint32_t>(rand()) & 255, kind == 1) : rand() % 31 - 15;
            a[p.row][p.column] = value;
            a_bits[lane][i / per] |= encode(value, kind) << (32 / per * (i % per));
        }
        for (int i = 0; i < b_count; ++i) {
            const Place p = bytes ? emulator::b_k32(lane, i) : emulator::b_k16(lane, i);
            const int value = bytes ? value_of(static_cast<uint32_t>(rand()) & 255, true) : rand() % 31 - 15;
            b[p.row][p.column] = value;
            b_bits[lane][i / per] |= encode(value, kind) << (32 / per * (i % per));
        }
    }
    uint32_t *device[3];
    if (cudaMalloc(&device[0], sizeof a_bits) || cudaMalloc(&device[1], sizeof b_bits) ||
        cudaMalloc(&device[2], sizeof d_bits)) {
        printf("no device memory: %s\n", cudaGetErrorString(cudaGetLastError()));
        return 1;
    }
    cudaMemcpy(device[0], a_bits, sizeof a_bits, cudaMemcpyHostToDevice);
    cudaMemcpy(device[1], b_bits, sizeof b_bits, cudaMemcpyHostToDevice);
    const bitlab::FragmentParams params = {kind, device[0], device[1], device[2]};
    const char *error = bitlab::launch(bitlab::fragment_kernel<32>, bitlab::Grid{1, 1}, 32, 0, nullptr, params);
    if (!error && cudaMemcpy(d_bits, device[2], sizeof d_bits, cudaMemcpyDeviceToHost) != cudaSuccess) {
        error = cudaGetErrorString(cudaGetLastError());
    }
    for (uint32_t *p : device) cudaFree(p);
    if (error) {
        printf("kind %d: %s\n", kind, error);
        return 1;
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const Place p = emulator::c_place(lane, i);
            int expected = 0;
            for (int k = 0; k < depth; ++k) expected += a[p.row][k] * b[k][p.column];
            float f;
            memcpy(&f, &d_bits[lane][i], 4);
            const int found = bytes ? static_cast<int>(d_bits[lane][i]) : static_cast<int>(f);
            if (found != expected) {
                printf("kind %d, lane %d, element %d: %d, expected %d\n", kind, lane, i, found, expected);
                return 1;
            }
        }
    }
    return 0;
}

// Two wgmma: of columns 0 to 31 and 96 to 127 of a swizzled tile of 64 tokens.
int check_wgmma() {
    static int a[2][64][32];
    static int8_t b[64][128];
    static uint32_t a_bits[2][128][4], d_bits[128][32];
    for (auto &row : b) {
        for (int8_t &code : row) code = static_cast<int8_t>(rand());
    }
    for (int part = 0; part < 2; ++part) {
        for (int thread = 0; thread < 128; ++thread) {
            for (int i = 0; i < 16; ++i) {
                const Place p = emulator::wgmma_a(thread, i);
                a[part][p.row][p.column] = rand() & 255;
                a_bits[part][thread][i / 4] |= encode(a[part][p.row][p.column], 0) << (8 * (i % 4));
            }
        }
    }
    void *device[3];
    if (cudaMalloc(&device[0], sizeof a_bits) || cudaMalloc(&device[1], sizeof b) ||
        cudaMalloc(&device[2], sizeof d_bits)) {
        printf("no device memory: %s\n", cudaGetErrorString(cudaGetLastError()));
        return 1;
    }
    cudaMemcpy(device[0], a_bits, sizeof a_bits, cudaMemcpyHostToDevice);
    cudaMemcpy(device[1], b, sizeof b, cudaMemcpyHostToDevice);
    const bitlab::WgmmaFragmentParams params = {static_cast<uint32_t *>(device[0]), static_cast<uint8_t *>(device[1]),
                                                static_cast<uint32_t *>(device[2])};
    const char *error =
        bitlab::launch(bitlab::wgmma_fragment_kernel<128>, bitlab::Grid{1, 1}, 128, sizeof b, nullptr, params);
    if (!error && cudaMemcpy(d_bits, device[2], sizeof d_bits, cudaMemcpyDeviceToHost) != cudaSuccess) {
        error = cudaGetErrorString(cudaGetLastError());
    }
    for (void *p : device) cudaFree(p);
    if (error) {
        printf("wgmma: %s\n", error);
        return 1;
    }
    for (int thread = 0; thread < 128; ++thread) {
        for (int i = 0; i < 32; ++i) {
            const Place p = emulator::wgmma_d(thread, i);
            int expected = 0;
            for (int k = 0; k < 32; ++k) {
                expected += a[0][p.row][k] * b[p.column][k] + a[1][p.row][k] * b[p.column][96 + k];
            }
            if (static_cast<int>(d_bits[thread][i]) != expected) {
                printf("wgmma, thread %d, element %d: %d, expected %d\n", thread, i,
                       static_cast<int>(d_bits[thread][i]), expected);
                return 1;
            }
        }
    }
    printf("wgmma too\n");
    return 0;
}

}  // namespace

int main() {
    int failed = 0;
    for (int kind = 0; kind < 4; ++kind) failed += check(kind);
    if (bitlab::has_wgmma()) failed += check_wgmma();
    printf("%s\n", failed ? "FAILED" : "all fragments as documented");
    return failed != 0;
}
