// activation_fp8, gated_activation_fp8 and activation_pair_fp8 for wide rows: a CTA a row, eight numbers a load, all of a thread's loads under
// way at once, few enough registers that several rows share an SM: while one is summed up, others load.
//
// Set before this text: IS_BF16 (x; else f16), KIND (silu 0, gelu 1, gelu_tanh 2, relu 3, quick_gelu 4), IS_GATED (other:
// what it is multiplied by, a matrix; else a bias), HAS_OTHER, WIDTH (of out, a multiple of 8), FIRST (how much of it, a multiple
// of 8, comes from `first` as it is; the activation is behind it), THREADS.

#define PIECES (WIDTH / 8)
#define FIRST_PIECES (FIRST / 8)
#define LOADS ((PIECES + THREADS - 1) / THREADS)
#define ALL 0xffffffffu

__device__ __forceinline__ float act(float x) {
    if (KIND == 0) return x / (1.0f + __expf(-x));
    if (KIND == 1) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    if (KIND == 2) return x / (1.0f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
    if (KIND == 3) return x < 0.0f ? 0.0f : x;  // keeps NaN
    return x / (1.0f + __expf(-1.702f * x));
}

__device__ __forceinline__ float rounded(float x) { return float_of((u16)pair_of(x, 0.0f)); }

// Two numbers in e4m3, saturated; the first in the low byte.
__device__ __forceinline__ u32 fp8_of(float low, float high) {
    u16 out;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
    return out;
}

extern "C" __global__ void __launch_bounds__(THREADS, THREADS <= 768 ? 2 : 1)
    activation_fp8(const u16* first, const u16* x, const u16* other, u8* out, float* scales, i64 stride_first, i64 stride_x,
                   i64 stride_other) {
    __shared__ float most[THREADS / 32];
    let_next_start();
    wait_for_previous();
    const i64 row = blockIdx.x;
    const uint4* before = reinterpret_cast<const uint4*>(first + row * stride_first);
    const uint4* from = reinterpret_cast<const uint4*>(x + row * stride_x) - FIRST_PIECES;
    const uint4* by = reinterpret_cast<const uint4*>(other + (IS_GATED ? row * stride_other : 0)) - FIRST_PIECES;
    uint4 a[LOADS], b[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int piece = i * THREADS + threadIdx.x;
        a[i] = b[i] = make_uint4(0, 0, 0, 0);
        if (piece < PIECES) {
            const bool is_first = FIRST && piece < FIRST_PIECES;
            a[i] = is_first ? before[piece] : from[piece];
            if (HAS_OTHER && !is_first) b[i] = by[piece];
        }
    }
    float y[LOADS][8], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const u16* left = reinterpret_cast<const u16*>(&a[i]);
        const u16* right = reinterpret_cast<const u16*>(&b[i]);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const float value = float_of(left[e]);
            if (IS_GATED) y[i][e] = rounded(act(value)) * float_of(right[e]);
            else y[i][e] = act(HAS_OTHER ? value + float_of(right[e]) : value);
            if (FIRST && i * THREADS + threadIdx.x < FIRST_PIECES) y[i][e] = value;
            if (i * THREADS + threadIdx.x < PIECES) largest = fmaxf(largest, fabsf(y[i][e]));
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, step));
    if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) largest = fmaxf(largest, most[i]);
    largest = fmaxf(largest, 1e-12f);
    if (threadIdx.x == 0) scales[row] = largest / 448.0f;
    const float by_scale = 448.0f / largest;
    uint2* to = reinterpret_cast<uint2*>(out + row * WIDTH);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int piece = i * THREADS + threadIdx.x;
        u32 two[4];
#pragma unroll
        for (int e = 0; e < 4; e++) two[e] = fp8_of(y[i][2 * e] * by_scale, y[i][2 * e + 1] * by_scale);
        if (piece < PIECES) to[piece] = make_uint2(two[0] | two[1] << 16, two[2] | two[3] << 16);
    }
}
