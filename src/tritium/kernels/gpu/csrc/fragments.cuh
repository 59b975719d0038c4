// What the kernels of this folder share: conversions and tensor-core products by PTX, so that no header is needed.
// Compiled at run time for the GPU that is there. E4M3 numbers are exact in f16, so products of converted numbers with
// fp32 sums are those of the e4m3 numbers.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

// Two e4m3 numbers as two f16 numbers, in the same order.
__device__ __forceinline__ u32 half2_of_fp8(u16 pair) {
    u32 out;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(pair));
    return out;
}
__device__ __forceinline__ u32 half2_low(u32 four) { return half2_of_fp8((u16)(four & 0xffffu)); }
__device__ __forceinline__ u32 half2_high(u32 four) { return half2_of_fp8((u16)(four >> 16)); }

__device__ __forceinline__ u32 half2_of(float low, float high) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

#if IS_BF16
__device__ __forceinline__ float float_of(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ u32 pair_of(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
#else
__device__ __forceinline__ float float_of(u16 x) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x));
    return out;
}
__device__ __forceinline__ u32 pair_of(float low, float high) { return half2_of(low, high); }
#endif

// c[16 x 8] += a[16 x 16] b[16 x 8], f16 with fp32 sums. A thread (g = lane / 4, c = lane % 4) holds of a: rows g (a0,
// a2) and g + 8 (a1, a3) in columns 2c, 2c + 1 (a0, a1) and 8 further (a2, a3); of b: column g in rows 2c, 2c + 1 (b0)
// and 8 further (b1); of c: row g (c0, c1) and g + 8 (c2, c3) in columns 2c, 2c + 1.
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same of s8 in 32 columns of a, exactly: a thread's bytes are columns 4c, ... 4c + 3 (a0, a1; b0) and 16 further.
__device__ __forceinline__ void mma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 bytes that are read once: past L1, in program order.
__device__ __forceinline__ uint4 load_once(const void* p, bool is_there) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (is_there)
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(p));
    return v;
}

__device__ __forceinline__ void load_once(u32& x, u32& y, const void* p, bool is_there) {
    u32 a = 0, b = 0;
    if (is_there) asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(p));
    x = a;
    y = b;
}
__device__ __forceinline__ float load_once(const float* p, bool is_there) {
    float x = 0.0f;
    if (is_there) asm volatile("ld.global.nc.L1::no_allocate.f32 %0, [%1];" : "=f"(x) : "l"(p));
    return x;
}

__device__ __forceinline__ float larger_or_nan(float a, float b) {
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}

// Programmatic dependent launch: the next kernel may start; what this one reads of the one before is complete. Both do
// nothing where the launch did not ask for it.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
