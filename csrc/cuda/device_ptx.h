// The device layer in PTX; see device.h for what each function promises.
#ifndef BITLAB_CUDA_DEVICE_PTX_H
#define BITLAB_CUDA_DEVICE_PTX_H

#include <cuda_runtime.h>

#define BK_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define BK_DEVICE __device__ __forceinline__
#define BK_UNROLL _Pragma("unroll")
#define BK_UNROLL_BY_8 _Pragma("unroll 8")
#define BK_UNROLL_BY_16 _Pragma("unroll 16")
#define BK_NO_UNROLL _Pragma("unroll 1")

namespace bitlab {

extern __shared__ __align__(1024) unsigned char shared_memory[];

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

// Where shared memory at `offset` lies in the address space of its kind.
BK_DEVICE uint32_t shared_address(uint32_t offset) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + offset;
}

BK_DEVICE void copy_async_16(uint32_t offset, const void *p, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(offset)),
                 "l"(__cvta_generic_to_global(p)), "r"(valid)
                 : "memory");
}
BK_DEVICE void copy_async_4(uint32_t offset, const void *p, int valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(offset)),
                 "l"(__cvta_generic_to_global(p)), "r"(valid)
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
BK_DEVICE void mma_u8s8_wrapping(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_u8s8(d, a, b0, b1);
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

#if __CUDA_ARCH__ >= 900
#define BK_HAS_CLUSTERS 1
BK_DEVICE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Relaxed: a release would wait for all of this thread's memory, and only what is in registers already depends on it.
BK_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
BK_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

BK_DEVICE void open_inbox(uint32_t offset) {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1; fence.mbarrier_init.release.cluster;" ::"r"(shared_address(offset))
        : "memory");
}
BK_DEVICE void expect(uint32_t inbox, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(inbox)), "r"(bytes)
                 : "memory");
}
BK_DEVICE void wait_inbox(uint32_t inbox, int round) {
    uint32_t done;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
            "selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(shared_address(inbox)), "r"(round & 1)
            : "memory");
    } while (!done);
}

BK_DEVICE uint32_t remote_address(int rank, uint32_t offset) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(offset)), "r"(rank));
    return address;
}
BK_DEVICE void send(int rank, uint32_t offset, uint32_t value, uint32_t inbox) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote_address(rank, offset)),
        "r"(value), "r"(remote_address(rank, inbox))
        : "memory");
}
BK_DEVICE void send(int rank, uint32_t offset, const Bytes8 &v, uint32_t inbox) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                     remote_address(rank, offset)),
                 "r"(v.word[0]), "r"(v.word[1]), "r"(remote_address(rank, inbox))
                 : "memory");
}
BK_DEVICE void send(int rank, uint32_t offset, const Bytes16 &v, uint32_t inbox) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     remote_address(rank, offset)),
                 "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]), "r"(remote_address(rank, inbox))
                 : "memory");
}
#else
#define BK_HAS_CLUSTERS 0
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define BK_HAS_WGMMA 1
BK_DEVICE void wgmma_u8s8(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b, bool onto) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p; }"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]),
          "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]),
          "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]),
          "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int32_t>(onto)));
}
BK_DEVICE void wgmma_u8s8_wrapping(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b, bool onto) {
    wgmma_u8s8(d, a, b, onto);
}
BK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
BK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
BK_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from reading the sums before the wait that stands above.
BK_DEVICE void wgmma_take(int32_t (&d)[32]) {
    BK_UNROLL
    for (int i = 0; i < 32; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
BK_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
#define BK_HAS_WGMMA 0
#endif

BK_DEVICE uint32_t opaque(uint32_t value) {
    asm("" : "+r"(value));
    return value;
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

constexpr bool begins_with(const char *text, const char *word) {
    return !*word || (*text == *word && begins_with(text + 1, word + 1));
}
constexpr bool holds(const char *text, const char *word) {
    return begins_with(text, word) || (*text && holds(text + 1, word));
}

// Ten times the compute capability's first number plus the second, of the current device; CUDA is asked once a device.
inline int capability() {
    constexpr int kDevices = 64;
    static int16_t known[kDevices];  // 0: not asked yet
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (device < kDevices) {
        if (const int found = __atomic_load_n(known + device, __ATOMIC_RELAXED)) return found;
    }
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        return 0;
    }
    const int found = 10 * major + minor;
    if (device < kDevices) __atomic_store_n(known + device, static_cast<int16_t>(found), __ATOMIC_RELAXED);
    return found;
}

// Whether the library has machine code for sm_90a and the current device runs it.
inline bool has_wgmma() {
#ifdef BK_CUDA_ARCHITECTURES
    return holds(BK_CUDA_ARCHITECTURES, "sm_90a") && capability() == 90;
#else
    return false;
#endif
}

// Whether the current device has clusters and as much shared memory as Hopper, which 12.x has not, and what it runs was
// not compiled for one without.
inline bool has_clusters() {
#ifdef BK_CUDA_ARCHITECTURES
    const int major = capability() / 10;
    return (major == 9 || major == 10) && !holds(BK_CUDA_ARCHITECTURES, "compute_8");
#else
    return false;
#endif
}

// Starts a kernel on the current device, in clusters of so many blocks; returns null, or CUDA's text of what is wrong.
template <typename P>
const char *launch(void (*kernel)(P), Grid grid, int threads, uint32_t shared_bytes, void *stream, P params,
                   int cluster = 1) {
    if (grid.x > 0x7FFFFFFF || grid.y > 0xFFFF) return cudaGetErrorString(cudaErrorInvalidConfiguration);
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = capability() < 90 ? 0 : cluster == 1 ? 1 : 2;
    const auto *function = reinterpret_cast<const void *>(kernel);
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kSharedBytes) {
        error =
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    void *arguments[] = {&params};
    if (error == cudaSuccess) error = cudaLaunchKernelExC(&config, function, arguments);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // a launch that failed must not be reported again by the caller's own next check
    return cudaGetErrorString(error);
}

}  // namespace bitlab

#endif
