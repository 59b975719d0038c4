// paged_attention for sequences of one new token over a cache of a byte a number: one warp per sequence, kv head and
// part of the context. Cache in e4m3 [block, 2, kv head, PAGE, HEAD_SIZE]; in int8 each [PAGE, HEAD_SIZE] is followed by
// its rows' scales, fp32 [PAGE].
//
// Everything stays in registers and nothing is exchanged between warps: 16-byte loads put K and V where the tensor cores
// want them, because a sum over d, or over keys, may be taken in any order.
//   S = q K^T    heads are rows (8 of 16 used), keys columns; a thread's 16 bytes of a key are 4 steps of 16 of d
//   O^T = V^T P  d are rows, heads columns; P is S as it lies; bytes of two keys are interleaved (prmt) into pairs
// q is divided by its largest element before it becomes f16, P is f16 in [0, 1]. Softmax in base 2, online, fp32.
//
// Of an int8 cache no number is converted by itself:
//   S   q in 15 bits, the high byte in rows 0-7 and the low byte in rows 8-15, times K as it is, summed exactly
//   P   times its value's scale, which is divided by the largest so far, so that it stays in [0, 1]
//   V   a number + 128 is 16 bits with zeros above, an f16 of 2^-24 times it; a product with -128 takes the rest away
//
// Set before this text: IS_INT8, IS_BF16, KV_HEADS, GROUP (<= 8), HEAD_SIZE (64, 128, 256), HEAD_BLOCK, PAGE (a multiple of 8),
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

#define SCALES_BYTES (IS_INT8 ? PAGE * 4 : 0)  // of keys, or values, of a page and kv head
#define SCALES (TILE > 32 ? TILE / 32 : 1)
#define TO_VALUES ((i64)KV_HEADS * (PAGE * HEAD_SIZE + SCALES_BYTES))

struct Tile {
    uint4 x[8];
#if IS_INT8
    float scales[SCALES];  // of key SCALES * lane and behind
#endif
};

// Where the blocks of the tile at `start` lie; keys behind `end` are not looked up.
__device__ __forceinline__ void look_up(const u8* (&place)[LOOKUPS], const u8* cache, const int* row, i64 stride_block,
                                        int h, int start, int end) {
#pragma unroll
    for (int i = 0; i < LOOKUPS; i++) {
        int key = start + i * PAGE;
        i64 page = key < end ? row[key / PAGE] : 0;
        place[i] = cache + page * stride_block + (i64)(h * PAGE + (LOOKUPS == 1 ? key % PAGE : 0)) * HEAD_SIZE + h * SCALES_BYTES;
    }
}
// The key `t` of the tile, d 0.
__device__ __forceinline__ const u8* key_at(const u8* const (&place)[LOOKUPS], int t) {
    return LOOKUPS == 1 ? place[0] + t * HEAD_SIZE : place[t / PAGE] + (t % PAGE) * HEAD_SIZE;
}

#if IS_INT8
#define MOST_Q 32512.0f  // what q's largest element becomes: 127 * 256
// Integers have no NaN to tell of one in q.
__device__ __forceinline__ float larger(float a, float b) { return larger_or_nan(a, b); }
// A pair of a word of q, the first one first.
__device__ __forceinline__ void set_pair(u32 (&word)[2], int which, float a, float b) {
    // 1.5 * 2^23 rounds, and leaves the integer in the low bytes: an SM converts 16 numbers a clock
    const u32 x = __float_as_uint(a + 12582912.0f), y = __float_as_uint(b + 12582912.0f);
    const u32 high = __byte_perm(x + 128, y + 128, 0x0051), low = __byte_perm(x, y, 0x0040);
    word[0] = which ? __byte_perm(word[0], high, 0x5410) : high;
    word[1] = which ? __byte_perm(word[1], low, 0x5410) : low;
}
// Bytes 0 and 1, or 2 and 3, plus 128 as f16 of 2^-24.
__device__ __forceinline__ u32 low_pair(u32 four) { return __byte_perm(four ^ 0x80808080, 0, 0x4140); }
__device__ __forceinline__ u32 high_pair(u32 four) { return __byte_perm(four ^ 0x80808080, 0, 0x4342); }
#else
#define MOST_Q 1.0f
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ void set_pair(u32 (&word)[2], int which, float a, float b) { word[which] = half2_of(a, b); }
__device__ __forceinline__ u32 low_pair(u32 four) { return half2_low(four); }
__device__ __forceinline__ u32 high_pair(u32 four) { return half2_high(four); }
#endif

#if IS_INT8
// Scales of keys, or values, which lie behind their numbers; 0 of those that are not seen, whose bytes may be anything.
// A lane loads its own, so that they are one access and one register a tile.
__device__ __forceinline__ void load_scales(Tile& x, const u8* const (&place)[LOOKUPS], i64 to_part, int start, int lane,
                                            int hidden, int left) {
    const int t = lane * SCALES;
    const u8* part = LOOKUPS == 1 ? place[0] - start % PAGE * HEAD_SIZE : place[0];
#pragma unroll
    for (int i = 1; i < LOOKUPS; i++) part = t >= i * PAGE ? place[i] : part;
    const int row = (LOOKUPS == 1 ? start : 0) % PAGE + t % PAGE;
    const float* from = reinterpret_cast<const float*>(part + PAGE * HEAD_SIZE + to_part) + row;
#pragma unroll
    for (int e = 0; e < SCALES; e++)
        x.scales[e] = load_once(from + e, t + e < min(left, TILE) && (WINDOW == 0 || t + e >= hidden));
}
// That of key 2c + e of column tile j.
__device__ __forceinline__ float scale_of(const Tile& x, int j, int c, int e) {
    return SCALES == 1 ? __shfl_sync(ALL, x.scales[0], j * 8 + 2 * c + e) : __shfl_sync(ALL, x.scales[e % SCALES], j * 4 + c);
}
#endif

__device__ __forceinline__ void load_keys(Tile& k, const u8* const (&place)[LOOKUPS], int start, int g, int c, int left) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j++)
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            k.x[j * CHUNKS + i] = load_once(key_at(place, j * 8) + g * HEAD_SIZE + i * 64 + c * 16, j * 8 + g < left);
#if IS_INT8
    load_scales(k, place, 0, start, g * 4 + c, 0, left);
#endif
}

// A thread's words of V: [pair of column tiles][4 keys][WORDS], keys 2c, 2c + 1 of each column tile. Keys before
// `hidden`, which a window leaves out, are zeros: what they hold must not meet a probability of 0.
__device__ __forceinline__ void load_values(Tile& v, const u8* const (&place)[LOOKUPS], int start, int g, int c,
                                            int hidden, int left) {
#if HEAD_SIZE == 64
    u32* words = reinterpret_cast<u32*>(v.x);
#pragma unroll
    for (int i = 0; i < COLUMNS * 2; i++) {
        const int t = i / 2 * 8 + i % 2 + 2 * c;
        const u8* from = key_at(place, i / 2 * 8) + (i % 2 + 2 * c) * HEAD_SIZE + TO_VALUES + g * 8;
        load_once(words[i * 2], words[i * 2 + 1], from, t < left && (WINDOW == 0 || t >= hidden));
    }
#else
#pragma unroll
    for (int i = 0; i < COLUMNS * 2; i++)
#pragma unroll
        for (int e = 0; e < HEAD_SIZE / 128; e++) {
            const int t = i / 2 * 8 + i % 2 + 2 * c;
            const u8* from = key_at(place, i / 2 * 8) + (i % 2 + 2 * c) * HEAD_SIZE + TO_VALUES + e * 128 + g * 16;
            v.x[i * (HEAD_SIZE / 128) + e] = load_once(from, t < left && (WINDOW == 0 || t >= hidden));
        }
#endif
#if IS_INT8
    load_scales(v, place, TO_VALUES, start, g * 4 + c, hidden, left);
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_CTAS)
    decode_bytes(const u16* q, const u8* cache, u16* out, float* partial, const float* slopes, const int* table,
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
        load_keys(k, place, begin, g, c, end - begin);
        load_values(v, place, begin, g, c, first - begin, end - begin);
    }
    wait_for_previous();
    if (!is_there) return;
    if (has_keys && !is_old) {
        load_keys(k, place, begin, g, c, end - begin);
        load_values(v, place, begin, g, c, first - begin, end - begin);
    }

    // q: rows of heads; a thread's columns of step i of chunk n are d = 64 n + 16 c + 4 i + {0, 1} and {2, 3}, in f16; or
    // {0, 1, 2, 3}, the high bytes of integers and then the low ones.
    u32 qa[CHUNKS * 4][2];
    float largest = 1e-30f;
    {
        const uint4* from =
            reinterpret_cast<const uint4*>(q + token * stride_q_token + (i64)(h * GROUP + g) * stride_q_head) + c * 2;
#pragma unroll
        for (int pass = 0; pass < 2; pass++) {  // the largest first, then the numbers: few registers
            const float shrink = MOST_Q / largest;
#pragma unroll
            for (int n = 0; n < CHUNKS; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint4 eight = g < GROUP ? from[n * 8 + half] : make_uint4(0, 0, 0, 0);
                    const u16* x = reinterpret_cast<const u16*>(&eight);
#pragma unroll
                    for (int i = 0; i < 8; i += 2) {
                        const float a = float_of(x[i]), b = float_of(x[i + 1]);
                        if (pass == 0) largest = larger(largest, larger(fabsf(a), fabsf(b)));
                        else set_pair(qa[n * 4 + half * 2 + i / 4], i / 2 % 2, a * shrink, b * shrink);
                    }
                }
            if (pass == 0) {
                largest = larger(largest, __shfl_xor_sync(ALL, largest, 1));
                largest = larger(largest, __shfl_xor_sync(ALL, largest, 2));
            }
        }
    }
    scale *= largest / MOST_Q;  // of this thread's head, g
    const float slope = HAS_SLOPES && g < GROUP ? slopes[h * GROUP + g] * LOG2_E : 0.0f;

    float m = MINUS_INFINITY, norm = 0.0f;  // of head g; norm: of this thread's keys
    float o[WORDS * 2][4];
#pragma unroll
    for (int i = 0; i < WORDS * 2; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
#if IS_INT8
    float rest[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // to be added to every row of o
    float most = 1e-30f, inverse_most = 1e30f;  // the largest scale of a value so far
#endif

    for (int start = begin; start < end; start += TILE) {
        const int next = start + TILE;
        const u8* next_place[LOOKUPS];
        look_up(next_place, cache, row, stride_block, h, next, end);
        float p[COLUMNS][2], tile_m = MINUS_INFINITY;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
#if IS_INT8
            int parts[4] = {0, 0, 0, 0};
#else
            float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#endif
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const u32* words = reinterpret_cast<const u32*>(&k.x[j * CHUNKS + i]);
#if IS_INT8
#pragma unroll
                for (int w = 0; w < 4; w += 2) {
                    const u32(&q0)[2] = qa[i * 4 + w], (&q1)[2] = qa[i * 4 + w + 1];
                    mma(parts, q0[0], q0[1], q1[0], q1[1], words[w], words[w + 1]);
                }
#else
#pragma unroll
                for (int w = 0; w < 4; w++)
                    mma(sums, qa[i * 4 + w][0], 0, qa[i * 4 + w][1], 0, half2_low(words[w]), half2_high(words[w]));
#endif
            }
#if IS_INT8
            const float sums[2] = {(float)(parts[0] * 256 + parts[2]) * scale_of(k, j, c, 0),
                                   (float)(parts[1] * 256 + parts[3]) * scale_of(k, j, c, 1)};
#endif
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
        load_keys(k, next_place, next, g, c, end - next);
        tile_m = fmaxf(tile_m, __shfl_xor_sync(ALL, tile_m, 1));
        tile_m = fmaxf(tile_m, __shfl_xor_sync(ALL, tile_m, 2));
        const float new_m = fmaxf(m, tile_m), alpha = exp2f(m - new_m);
        bool is_rescaled = __any_sync(ALL, new_m > m);
        m = new_m;
        norm *= alpha;
#if IS_INT8
        float tile_most = most;
#pragma unroll
        for (int e = 0; e < SCALES; e++) tile_most = fmaxf(tile_most, v.scales[e]);
        tile_most = __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(tile_most)));  // as integers, for none is negative
        const float shrink = most / tile_most;
        if (tile_most > most) {
            is_rescaled = true;
            most = tile_most;
            inverse_most = 1.0f / most;
        }
#endif
        u32 pb[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const float a = exp2f(p[j][0] - m), b = exp2f(p[j][1] - m);
            norm += a + b;
#if IS_INT8
            pb[j] = half2_of(a * (scale_of(v, j, c, 0) * inverse_most), b * (scale_of(v, j, c, 1) * inverse_most));
#else
            pb[j] = half2_of(a, b);
#endif
        }
        if (is_rescaled) {
            float alpha0 = __shfl_sync(ALL, alpha, 8 * c), alpha1 = __shfl_sync(ALL, alpha, 8 * c + 4);
#if IS_INT8
            alpha0 *= shrink;
            alpha1 *= shrink;
            rest[0] *= alpha0;
            rest[1] *= alpha1;
#endif
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
        for (int u = 0; u < COLUMNS / 2; u++) {
#if IS_INT8
            mma(rest, 0x80808080, 0x80808080, 0x80808080, 0x80808080, pb[u * 2], pb[u * 2 + 1]);
#endif
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                const u32 t0 = words[(u * 4 + 0) * WORDS + w], t1 = words[(u * 4 + 1) * WORDS + w];
                const u32 t2 = words[(u * 4 + 2) * WORDS + w], t3 = words[(u * 4 + 3) * WORDS + w];
                const u32 x = __byte_perm(t0, t1, 0x5140), y = __byte_perm(t2, t3, 0x5140);
                mma(o[w * 2], low_pair(x), high_pair(x), low_pair(y), high_pair(y), pb[u * 2], pb[u * 2 + 1]);
                const u32 z = __byte_perm(t0, t1, 0x7362), r = __byte_perm(t2, t3, 0x7362);
                mma(o[w * 2 + 1], low_pair(z), high_pair(z), low_pair(r), high_pair(r), pb[u * 2], pb[u * 2 + 1]);
            }
        }
        load_values(v, next_place, next, g, c, first - next, end - next);
#pragma unroll
        for (int i = 0; i < LOOKUPS; i++) place[i] = next_place[i];
    }

#if IS_INT8
#pragma unroll
    for (int i = 0; i < WORDS * 2; i++)
#pragma unroll
        for (int b = 0; b < 4; b++) o[i][b] = (o[i][b] + rest[b % 2]) * (most * 16777216.0f);
#endif
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
