// linear_fp8 for up to 16 rows of x: out[M, N] = x[M, K] w[N, K]^T times the scales of both, plus bias. Reads w at the
// memory's rate: a CTA has 16 outputs, its warps take turns at chunks of 64 of K, and their sums meet in shared memory
// in a fixed order. w is the left operand of the tensor cores, its bytes made f16 in registers; x the right one.
//
// Loads of w begin before the kernel in front has ended (weights do not depend on it), x is read behind it.
//
// Set before this text: IS_BF16 (of bias and out), TILES (of 8 rows of x: 1 or 2), WARPS, DEPTH (chunks a warp has in
// flight), HAS_BIAS.

struct Chunk {
    uint4 low, high;  // rows g and g + 8 of w, d = 16 c ... 16 c + 15
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    linear_fp8(const u8* x, const float* x_scales, const u8* w, const float* w_scales, const u16* bias, u16* out,
               i64 stride_x, i64 stride_out, i64 rows_of_x, i64 k_of_x) {
    const int num_rows = (int)rows_of_x, num_k = (int)k_of_x;
    __shared__ float sums[WARPS][TILES][16][8];
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, warp = threadIdx.x / 32;
    const i64 n0 = (i64)blockIdx.x * 16;
    const u8* from = w + (n0 + g) * num_k + warp * 64 + c * 16;
    const i64 to_high = (i64)8 * num_k;
    const int step = WARPS * 64;
    let_next_start();

    Chunk chunks[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        const int k = i * step + warp * 64 + c * 16;
        chunks[i].low = load_once(from + i * step, k < num_k);
        chunks[i].high = load_once(from + i * step + to_high, k < num_k);
    }
    wait_for_previous();

    float acc[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; t++) acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = 0.0f;
    for (int base = 0; base < num_k; base += DEPTH * step) {
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            const int k = base + i * step + warp * 64 + c * 16;
            uint4 rows[TILES];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                rows[t] = make_uint4(0, 0, 0, 0);
                if (t * 8 + g < num_rows && k < num_k)
                    rows[t] = *reinterpret_cast<const uint4*>(x + (t * 8 + g) * stride_x + k);
            }
            const u32* low = reinterpret_cast<const u32*>(&chunks[i].low);
            const u32* high = reinterpret_cast<const u32*>(&chunks[i].high);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const u32 a0 = half2_low(low[e]), a1 = half2_low(high[e]);
                const u32 a2 = half2_high(low[e]), a3 = half2_high(high[e]);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const u32 row = reinterpret_cast<const u32*>(&rows[t])[e];
                    mma(acc[t], a0, a1, a2, a3, half2_low(row), half2_high(row));
                }
            }
            const int next = (base / step + DEPTH + i) * step;
            chunks[i].low = load_once(from + next, next + warp * 64 + c * 16 < num_k);
            chunks[i].high = load_once(from + next + to_high, next + warp * 64 + c * 16 < num_k);
        }
    }

#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[warp][t][g + e / 2 * 8][2 * c + e % 2] = acc[t][e];
    __syncthreads();
    for (int i = threadIdx.x; i < TILES * 128; i += WARPS * 32) {
        const int n = i % 16, row = i / 16;
        if (row >= num_rows) continue;
        float total = 0.0f;
#pragma unroll
        for (int from_warp = 0; from_warp < WARPS; from_warp++) total += sums[from_warp][row / 8][n][row % 8];
        total *= x_scales[row] * w_scales[n0 + n];
        if (HAS_BIAS) total += float_of(bias[n0 + n]);
        out[row * stride_out + n0 + n] = (u16)pair_of(total, 0.0f);
    }
}
