// What kernels for compute capability 9.0 use: barriers in shared memory, bulk copies, and products of 64 rows by a
// group of four warps (wgmma). Addresses of shared memory are 32-bit numbers.

typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits until the barrier's phase of this parity is over.
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
// Starts a copy of global memory (16-byte pieces), whose bytes the barrier's phase waits for, besides one arrival.
__device__ __forceinline__ void start_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// Copies of single pieces of 16 bytes; zeros where there is nothing.
__device__ __forceinline__ void start_piece(u32 to, const void* from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void wait_for_pieces() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// What this thread wrote into shared memory may be read by the tensor cores, once a barrier is behind it.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void barrier_of(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A matrix in shared memory by blocks of rows of 128 bytes whose 16-byte pieces are swizzled. leading, stride: bytes
// between blocks of 64 columns (only of a matrix that is multiplied along its rows) and between groups of 8 rows.
__device__ __forceinline__ u64 matrix_at(u32 address, u32 leading, u32 stride) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | (u64)1 << 62;
}
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Numbers that products wrote are read behind this only.
template <int N>
__device__ __forceinline__ void are_there(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

#if IS_BF16
#define MMA_TYPE "bf16.bf16"
#else
#define MMA_TYPE "f16.f16"
#endif
#define TIED8(x, i)                                                                                          \
    "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), \
        "+f"(x[i + 7])
#define TIED32(x, i) TIED8(x, i), TIED8(x, i + 8), TIED8(x, i + 16), TIED8(x, i + 24)
#define NAMES32                                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES64                                                                                                \
    NAMES32                                                                                                    \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c[64 x 128] or c[64 x 64] = a[64 x 16] b[. x 16]^T, added to c where is_added is not 0; both along rows of 16-bit numbers
// in shared memory. Thread (w = thread / 32 % 4, g, l as in fragments.cuh) holds rows 16 w + g (c0, c1 of every four)
// and 8 further (c2, c3), columns 8 i + 2 l and the next of four i.
__device__ __forceinline__ void multiply(float (&c)[64], u64 a, u64 b, int is_added) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." MMA_TYPE
                 " {" NAMES64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
                 : TIED32(c, 0), TIED32(c, 32)
                 : "l"(a), "l"(b), "r"(is_added));
}
__device__ __forceinline__ void multiply(float (&c)[32], u64 a, u64 b, int is_added) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." MMA_TYPE
                 " {" NAMES32 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                 : TIED32(c, 0)
                 : "l"(a), "l"(b), "r"(is_added));
}
// c[64 x 128] += a[64 x 16] b[16 x 128]: a in registers, as `mma` has it; b by rows of columns in shared memory.
__device__ __forceinline__ void multiply_add(float (&c)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." MMA_TYPE " {" NAMES64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : TIED32(c, 0), TIED32(c, 32)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
