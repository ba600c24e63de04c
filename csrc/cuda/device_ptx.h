// The device layer in PTX; see device.h for what each function promises.
#ifndef BITLAB_CUDA_DEVICE_PTX_H
#define BITLAB_CUDA_DEVICE_PTX_H

#include <cuda_runtime.h>

#define BK_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define BK_DEVICE __device__ __forceinline__
#define BK_UNROLL _Pragma("unroll")
#define BK_UNROLL_BY_8 _Pragma("unroll 8")
#define BK_NO_UNROLL _Pragma("unroll 1")

namespace bitlab {

extern __shared__ __align__(128) unsigned char shared_memory[];

BK_DEVICE int thread_x() { return static_cast<int>(threadIdx.x); }
BK_DEVICE int64_t block_x() { return blockIdx.x; }
BK_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
BK_DEVICE int64_t grid_x() { return gridDim.x; }

// Programmatic dependent launch, which Hopper has and newer ones: elsewhere kernels follow one another whole.
BK_DEVICE void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
BK_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
BK_DEVICE void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p))); }

template <typename T>
BK_DEVICE T load_global(const T *p) {
    return *p;
}
template <>
BK_DEVICE Bytes16 load_global<Bytes16>(const Bytes16 *p) {
    const uint4 v = *reinterpret_cast<const uint4 *>(p);
    return {{v.x, v.y, v.z, v.w}};
}
BK_DEVICE Bytes16 load_weights(const void *p) {
    Bytes16 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(__cvta_generic_to_global(p)));
    return v;
}
template <typename T>
BK_DEVICE void store_global(T *p, T value) {
    *p = value;
}
template <>
BK_DEVICE void store_global<Bytes16>(Bytes16 *p, Bytes16 v) {
    *reinterpret_cast<uint4 *>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

template <typename T>
BK_DEVICE T load_shared(uint32_t offset) {
    return *reinterpret_cast<const T *>(shared_memory + offset);
}
template <>
BK_DEVICE Bytes16 load_shared<Bytes16>(uint32_t offset) {
    const uint4 v = *reinterpret_cast<const uint4 *>(shared_memory + offset);
    return {{v.x, v.y, v.z, v.w}};
}
template <>
BK_DEVICE Bytes8 load_shared<Bytes8>(uint32_t offset) {
    const uint2 v = *reinterpret_cast<const uint2 *>(shared_memory + offset);
    return {{v.x, v.y}};
}
template <typename T>
BK_DEVICE void store_shared(uint32_t offset, T value) {
    *reinterpret_cast<T *>(shared_memory + offset) = value;
}
template <>
BK_DEVICE void store_shared<Bytes16>(uint32_t offset, Bytes16 v) {
    *reinterpret_cast<uint4 *>(shared_memory + offset) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

BK_DEVICE void copy_async_16(uint32_t offset, const void *p, int valid) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + offset;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(p)), "r"(valid)
                 : "memory");
}
BK_DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
BK_DEVICE void wait_async() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

BK_DEVICE void sync_block() { __syncthreads(); }
BK_DEVICE void sync_warp() { __syncwarp(); }
template <typename T>
BK_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
template <typename T>
BK_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xFFFFFFFFu, value, lane);
}

BK_DEVICE void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
BK_DEVICE void mma_s8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
BK_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
BK_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

BK_DEVICE int32_t dot4_us(uint32_t a, uint32_t b, int32_t c) {
    int32_t d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
BK_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
BK_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
BK_DEVICE uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

BK_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
BK_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
BK_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
BK_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
BK_DEVICE double divide(double a, double b) { return __ddiv_rn(a, b); }
BK_DEVICE int32_t round_even(float value) { return __float2int_rn(value); }
BK_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
BK_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
BK_DEVICE float decode_f16(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
BK_DEVICE uint16_t encode_f16(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
BK_DEVICE uint16_t encode_bf16(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Starts a kernel on the current device; returns null, or CUDA's text of what is wrong.
template <typename P>
const char *launch(void (*kernel)(P), Grid grid, int threads, uint32_t shared_bytes, void *stream, P params) {
    if (grid.x > 0x7FFFFFFF || grid.y > 0xFFFF) return cudaGetErrorString(cudaErrorInvalidConfiguration);
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &early;
    config.numAttrs = major >= 9 ? 1 : 0;
    void *arguments[] = {&params};
    const cudaError_t error = cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(kernel), arguments);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // a launch that failed must not be reported again by the caller's own next check
    return cudaGetErrorString(error);
}

}  // namespace bitlab

#endif
