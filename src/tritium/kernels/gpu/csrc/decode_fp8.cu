// paged_attention for sequences of one new token over a cache in e4m3: one warp per sequence, kv head and part of the
// context. Cache [block, 2, kv head, PAGE, HEAD_SIZE].
//
// Everything stays in registers and nothing is exchanged between warps: 16-byte loads put K and V where the tensor cores
// want them, because a sum over d, or over keys, may be taken in any order.
//   S = q K^T    heads are rows (8 of 16 used), keys columns; a thread's 16 bytes of a key are 4 steps of 16 of d
//   O^T = V^T P  d are rows, heads columns; P is S as it lies; bytes of two keys are interleaved (prmt) into pairs
// q is divided by its largest element before it becomes f16, P is f16 in [0, 1]. Softmax in base 2, online, fp32.
//
// Set before this text: IS_BF16, KV_HEADS, GROUP (<= 8), HEAD_SIZE (64, 128, 256), HEAD_BLOCK, PAGE (a multiple of 8),
// WINDOW, SOFTCAP (0: none), HAS_SLOPES, WARPS, MIN_CTAS. With more than one split, a warp leaves sums, largest exponent and
// norm of its part in `partial` [s, head, split, HEAD_BLOCK + 2], for join_splits_kernel.

#define TILE (4096 / HEAD_SIZE)  // keys a step
#define COLUMNS (TILE / 8)       // tiles of 8 keys
#define CHUNKS (HEAD_SIZE / 64)  // of 64 bytes a key
#define WORDS (HEAD_SIZE / 32)   // of 4 bytes of V a thread and key
#define LOOKUPS (PAGE >= TILE ? 1 : TILE / PAGE)
#define LOG2_E 1.4426950408889634f
#define ALL 0xffffffffu
#define MINUS_INFINITY __int_as_float(0xff800000)

struct Tile {
    uint4 x[8];
};

// Where the blocks of the tile at `start` lie; keys behind `end` are not looked up.
__device__ __forceinline__ void look_up(const u8* (&place)[LOOKUPS], const u8* cache, const int* row, i64 stride_block,
                                        int h, int start, int end) {
#pragma unroll
    for (int i = 0; i < LOOKUPS; i++) {
        int key = start + i * PAGE;
        i64 page = key < end ? row[key / PAGE] : 0;
        place[i] = cache + page * stride_block + (i64)(h * PAGE + (LOOKUPS == 1 ? key % PAGE : 0)) * HEAD_SIZE;
    }
}
// The key `t` of the tile, d 0.
__device__ __forceinline__ const u8* key_at(const u8* const (&place)[LOOKUPS], int t) {
    return LOOKUPS == 1 ? place[0] + t * HEAD_SIZE : place[t / PAGE] + (t % PAGE) * HEAD_SIZE;
}

__device__ __forceinline__ void load_keys(Tile& k, const u8* const (&place)[LOOKUPS], int g, int c, int left) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j++)
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            k.x[j * CHUNKS + i] = load_once(key_at(place, j * 8) + g * HEAD_SIZE + i * 64 + c * 16, j * 8 + g < left);
}

// A thread's words of V: [pair of column tiles][4 keys][WORDS], keys 2c, 2c + 1 of each column tile. Keys before
// `hidden`, which a window leaves out, are zeros: what they hold must not meet a probability of 0.
__device__ __forceinline__ void load_values(Tile& v, const u8* const (&place)[LOOKUPS], int g, int c, int hidden,
                                            int left) {
    const i64 to_v = (i64)KV_HEADS * PAGE * HEAD_SIZE;
#if HEAD_SIZE == 64
    u32* words = reinterpret_cast<u32*>(v.x);
#pragma unroll
    for (int i = 0; i < COLUMNS * 2; i++) {
        const int t = i / 2 * 8 + i % 2 + 2 * c;
        const u8* from = key_at(place, i / 2 * 8) + (i % 2 + 2 * c) * HEAD_SIZE + to_v + g * 8;
        u32 a = 0, b = 0;
        if (t < left && (WINDOW == 0 || t >= hidden))
            asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(from));
        words[i * 2] = a;
        words[i * 2 + 1] = b;
    }
#else
#pragma unroll
    for (int i = 0; i < COLUMNS * 2; i++)
#pragma unroll
        for (int e = 0; e < HEAD_SIZE / 128; e++) {
            const int t = i / 2 * 8 + i % 2 + 2 * c;
            const u8* from = key_at(place, i / 2 * 8) + (i % 2 + 2 * c) * HEAD_SIZE + to_v + e * 128 + g * 16;
            v.x[i * (HEAD_SIZE / 128) + e] = load_once(from, t < left && (WINDOW == 0 || t >= hidden));
        }
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_CTAS)
    decode_fp8(const u16* q, const u8* cache, u16* out, float* partial, const float* slopes, const int* table,
               const int* cu_seqlens, const int* contexts, const int* counts, i64 stride_q_token, i64 stride_q_head,
               i64 stride_out_token, i64 stride_out_head, i64 stride_block, i64 stride_table,
               i64 num_splits, float scale) {
    let_next_start();
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const int splits = (int)num_splits, item = blockIdx.x * WARPS + threadIdx.x / 32;
    const int h = item % KV_HEADS, split = item / KV_HEADS % splits, s = item / (KV_HEADS * splits);
    // What the host wrote and keys of earlier steps do not depend on the kernel in front; this step's key, the last, does.
    const bool is_there = s < counts[3];
    const i64 token = is_there ? cu_seqlens[s] : 0;
    const int context = is_there ? contexts[s] : 0, *row = table + (is_there ? s : 0) * stride_table;
    const int first = WINDOW > 0 && context > WINDOW ? context - WINDOW : 0;
    int begin = first / TILE * TILE, end = context;
    if (splits > 1) {
        const int part = ((end - begin + TILE - 1) / TILE + splits - 1) / splits * TILE;
        begin += split * part;
        end = min(begin + part, context);
    }

    const u8* place[LOOKUPS];
    Tile k, v;
    const bool has_keys = begin < end, is_old = begin + TILE < context;
    if (has_keys) look_up(place, cache, row, stride_block, h, begin, end);
    if (has_keys && is_old) {
        load_keys(k, place, g, c, end - begin);
        load_values(v, place, g, c, first - begin, end - begin);
    }
    wait_for_previous();
    if (!is_there) return;
    if (has_keys && !is_old) {
        load_keys(k, place, g, c, end - begin);
        load_values(v, place, g, c, first - begin, end - begin);
    }

    // q: rows of heads; a thread's columns of step i of chunk n are d = 64 n + 16 c + 4 i + {0, 1} and {2, 3}
    u32 qa[CHUNKS * 4][2];
    float largest = 1e-30f;
    {
        const uint4* from =
            reinterpret_cast<const uint4*>(q + token * stride_q_token + (i64)(h * GROUP + g) * stride_q_head) + c * 2;
#pragma unroll
        for (int pass = 0; pass < 2; pass++) {  // the largest first, then the numbers: few registers
            const float shrink = 1.0f / largest;
#pragma unroll
            for (int n = 0; n < CHUNKS; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint4 eight = g < GROUP ? from[n * 8 + half] : make_uint4(0, 0, 0, 0);
                    const u16* x = reinterpret_cast<const u16*>(&eight);
#pragma unroll
                    for (int i = 0; i < 8; i += 2) {
                        const float a = float_of(x[i]), b = float_of(x[i + 1]);
                        if (pass == 0) largest = fmaxf(largest, fmaxf(fabsf(a), fabsf(b)));
                        else qa[n * 4 + half * 2 + i / 4][i / 2 % 2] = half2_of(a * shrink, b * shrink);
                    }
                }
            if (pass == 0) {
                largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 2));
            }
        }
    }
    scale *= largest;  // of this thread's head, g
    const float slope = HAS_SLOPES && g < GROUP ? slopes[h * GROUP + g] * LOG2_E : 0.0f;

    float m = MINUS_INFINITY, norm = 0.0f;  // of head g; norm: of this thread's keys
    float o[WORDS * 2][4];
#pragma unroll
    for (int i = 0; i < WORDS * 2; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;

    for (int start = begin; start < end; start += TILE) {
        const int next = start + TILE;
        const u8* next_place[LOOKUPS];
        look_up(next_place, cache, row, stride_block, h, next, end);
        float p[COLUMNS][2], tile_m = MINUS_INFINITY;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const u32* words = reinterpret_cast<const u32*>(&k.x[j * CHUNKS + i]);
#pragma unroll
                for (int w = 0; w < 4; w++)
                    mma(sums, qa[i * 4 + w][0], 0, qa[i * 4 + w][1], 0, half2_low(words[w]), half2_high(words[w]));
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int key = start + j * 8 + 2 * c + e;
                float x = sums[e];
                if (SOFTCAP > 0.0f) {
                    x = x * scale * (2.0f * LOG2_E / SOFTCAP);  // tanh(z) = 1 - 2 / (1 + e^2z)
                    x = (1.0f - 2.0f / (1.0f + exp2f(x))) * (SOFTCAP * LOG2_E);
                } else {
                    x *= scale * LOG2_E;
                }
                if (HAS_SLOPES) x += slope * (float)(key - context + 1);
                p[j][e] = key < end && key >= first ? x : MINUS_INFINITY;
                tile_m = fmaxf(tile_m, p[j][e]);
            }
        }
        load_keys(k, next_place, g, c, end - next);
        tile_m = fmaxf(tile_m, __shfl_xor_sync(ALL, tile_m, 1));
        tile_m = fmaxf(tile_m, __shfl_xor_sync(ALL, tile_m, 2));
        const float new_m = fmaxf(m, tile_m), alpha = exp2f(m - new_m);
        const bool is_rescaled = __any_sync(ALL, new_m > m);
        m = new_m;
        norm *= alpha;
        u32 pb[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const float a = exp2f(p[j][0] - m), b = exp2f(p[j][1] - m);
            norm += a + b;
            pb[j] = half2_of(a, b);
        }
        if (is_rescaled) {
            const float alpha0 = __shfl_sync(ALL, alpha, 8 * c), alpha1 = __shfl_sync(ALL, alpha, 8 * c + 4);
#pragma unroll
            for (int i = 0; i < WORDS * 2; i++) {
                o[i][0] *= alpha0;
                o[i][1] *= alpha1;
                o[i][2] *= alpha0;
                o[i][3] *= alpha1;
            }
        }
        const u32* words = reinterpret_cast<const u32*>(v.x);
#pragma unroll
        for (int u = 0; u < COLUMNS / 2; u++)
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                const u32 t0 = words[(u * 4 + 0) * WORDS + w], t1 = words[(u * 4 + 1) * WORDS + w];
                const u32 t2 = words[(u * 4 + 2) * WORDS + w], t3 = words[(u * 4 + 3) * WORDS + w];
                const u32 x = __byte_perm(t0, t1, 0x5140), y = __byte_perm(t2, t3, 0x5140);
                mma(o[w * 2], half2_low(x), half2_high(x), half2_low(y), half2_high(y), pb[u * 2], pb[u * 2 + 1]);
                const u32 z = __byte_perm(t0, t1, 0x7362), r = __byte_perm(t2, t3, 0x7362);
                mma(o[w * 2 + 1], half2_low(z), half2_high(z), half2_low(r), half2_high(r), pb[u * 2], pb[u * 2 + 1]);
            }
        load_values(v, next_place, g, c, first - next, end - next);
#pragma unroll
        for (int i = 0; i < LOOKUPS; i++) place[i] = next_place[i];
    }

    norm += __shfl_xor_sync(ALL, norm, 1);
    norm += __shfl_xor_sync(ALL, norm, 2);
    const int d0 = HEAD_SIZE == 64 ? g * 8 : g * 16;  // word w begins at d0 + w / 4 * 128 + w % 4 * 4
    if (splits > 1) {
        const i64 stride = HEAD_BLOCK + 2, first_head = (i64)s * KV_HEADS * GROUP + h * GROUP;
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (2 * c + e < GROUP) {
                float* to = partial + ((first_head + 2 * c + e) * splits + split) * stride + d0;
#pragma unroll
                for (int w = 0; w < WORDS; w++)
#pragma unroll
                    for (int b = 0; b < 4; b++) to[w / 4 * 128 + w % 4 * 4 + b] = o[w * 2 + b / 2][b % 2 * 2 + e];
            }
        if (c == 0 && g < GROUP) {
            float* to = partial + ((first_head + g) * splits + split) * stride + HEAD_BLOCK;
            to[0] = m;
            to[1] = norm;
        }
        return;
    }
    const float inverse = 1.0f / norm;
    const float inverse0 = __shfl_sync(ALL, inverse, 8 * c), inverse1 = __shfl_sync(ALL, inverse, 8 * c + 4);
#pragma unroll
    for (int e = 0; e < 2; e++)
        if (2 * c + e < GROUP) {
            const float by = e ? inverse1 : inverse0;
            u16* to = out + token * stride_out_token + (i64)(h * GROUP + 2 * c + e) * stride_out_head + d0;
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                u32* pair = reinterpret_cast<u32*>(to + w / 4 * 128 + w % 4 * 4);
                pair[0] = pair_of(o[w * 2][e] * by, o[w * 2][2 + e] * by);
                pair[1] = pair_of(o[w * 2 + 1][e] * by, o[w * 2 + 1][2 + e] * by);
            }
        }
}
