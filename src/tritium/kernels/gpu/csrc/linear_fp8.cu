// linear_fp8 for up to 16 rows of x: out[M, N] = x[M, K] w[N, K]^T times the scales of both, plus bias. Reads w at the
// memory's rate: a CTA has 16 outputs, its warps take turns at chunks of 64 of K, and their sums meet in shared memory
// in a fixed order. w is the left operand of the tensor cores, its bytes made f16 in registers; x the right one.
//
// Loads of w, of its scales and of the bias begin before the kernel in front has ended (they do not depend on it), x is read
// behind it: by all threads at once into shared memory where it fits, so that no warp waits for a piece at a time.
//
// Set before this text: IS_BF16 (of bias and out), TILES (of 8 rows of x: 1 or 2), WARPS, DEPTH (chunks a warp has in
// flight), HAS_BIAS, SHARED_BYTES (for x; 0: it stays where it is). At least as many threads as outputs of the CTA.

struct Chunk {
    uint4 low, high;  // rows g and g + 8 of w, d = 16 c ... 16 c + 15
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    linear_fp8(const u8* x, const float* x_scales, const u8* w, const float* w_scales, const u16* bias, u16* out,
               i64 stride_x, i64 stride_out, i64 rows_of_x, i64 k_of_x) {
    const int num_rows = (int)rows_of_x, num_k = (int)k_of_x;
    __shared__ float sums[WARPS][TILES][16][8];
#if SHARED_BYTES
    __shared__ uint4 shared_x[SHARED_BYTES / 16];
#endif
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
    const int n = threadIdx.x % 16, row_of_out = threadIdx.x / 16;  // the output that this thread writes in the end
    const bool has_out = row_of_out < TILES * 8 && row_of_out < num_rows;
    const float w_scale = has_out ? w_scales[n0 + n] : 0.0f;
    const float added = HAS_BIAS && has_out ? float_of(bias[n0 + n]) : 0.0f;
    wait_for_previous();
    const float x_scale = has_out ? x_scales[row_of_out] : 0.0f;
#if SHARED_BYTES
    for (int i = threadIdx.x; i < num_rows * (num_k / 16); i += WARPS * 32)
        shared_x[i] = *reinterpret_cast<const uint4*>(x + i / (num_k / 16) * stride_x + i % (num_k / 16) * 16);
    __syncthreads();
#endif

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
#if SHARED_BYTES
                    rows[t] = shared_x[((t * 8 + g) * num_k + k) / 16];
#else
                    rows[t] = *reinterpret_cast<const uint4*>(x + (t * 8 + g) * stride_x + k);
#endif
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
    if (has_out) {
        float total = 0.0f;
#pragma unroll
        for (int from_warp = 0; from_warp < WARPS; from_warp++)
            total += sums[from_warp][row_of_out / 8][n][row_of_out % 8];
        out[row_of_out * stride_out + n0 + n] = (u16)pair_of(total * x_scale * w_scale + added, 0.0f);
    }
}
