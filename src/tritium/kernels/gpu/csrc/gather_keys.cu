// The keys and values of chunked prompts out of the paged cache, as prefill.cu multiplies them: 16-bit numbers, one image
// of TILE keys after the other, so that a tile is one piece of memory which is copied into shared memory as it is.
//
// dense [prompt of the step][tile][kv head][keys, values][HEAD_SIZE / 64][TILE][64]: the eight 16-byte pieces of a key's 64
// numbers stand in the order piece ^ (key % 8), the tensor cores' 128-byte swizzle. Keys behind a prompt's are zeros.
// turns: prefill.cu's counter, which begins at 0.
//
// Set before this text: IS_BF16 (dense; else f16), KV_HEADS, HEAD_SIZE (a multiple of 64), PAGE, TILE, IS_FP8, IS_INT8 (the
// cache, laid out as decode_bytes.cu says; else it has dense's type).

#define THREADS 256
#define PIECES (HEAD_SIZE / 8)  // of a key: eight numbers, which a thread takes so that its neighbours write beside it
#define LOADS (TILE * PIECES / THREADS)

#if IS_FP8 || IS_INT8
typedef uint2 Piece;
#else
typedef uint4 Piece;
#endif

#if IS_INT8
// Four integers times their row's scale, in 16 bits each. A byte becomes the end of 2^23 + 128 + itself.
__device__ __forceinline__ uint2 wide(u32 four, float scale) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        x[i] = (__uint_as_float(__byte_perm(four ^ 0x80808080, 0x4b000000, 0x7440 + i)) - 8388736.0f) * scale;
    return make_uint2(pair_of(x[0], x[1]), pair_of(x[2], x[3]));
}
#elif IS_FP8
// Four e4m3 numbers in 16 bits each: exact.
__device__ __forceinline__ uint2 wide(u32 four) {
#if IS_BF16
    // Shifted into place they are 2^-120 of what they are. An SM converts 16 pairs a clock, and there are more of them than
    // bytes to load; only NaN has to be converted.
    if (((four & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 pair = half2_of_fp8((u16)(four >> 8 * i & 0xff));
            asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}" : "=f"(x[i]) : "r"(pair));
        }
        return make_uint2(pair_of(x[0], x[1]), pair_of(x[2], x[3]));
    }
    uint2 out;
    u32* pairs = &out.x;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 high = __byte_perm(four, 0, i ? 0x3424 : 0x1404);  // a byte, then eight zeros
        const u32 small = (high & 0x80008000u) | (high >> 4 & 0x07f007f0u);
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pairs[i]) : "r"(small), "r"(0x7b807b80u), "r"(0x80008000u));
    }
    return out;
#else
    return make_uint2(half2_low(four), half2_high(four));
#endif
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_keys(const u8* cache, uint4* dense, const int* table, const int* contexts, const int* counts,
                int* turns, i64 stride_block, i64 stride_table, i64 tiles_of_prompt) {
    let_next_start();
    wait_for_previous();
    if (blockIdx.x == 0 && threadIdx.x == 0) *turns = 0;
    const int tiles = (int)tiles_of_prompt, part = blockIdx.x % 2, h = blockIdx.x / 2 % KV_HEADS;
    const int tile = blockIdx.x / (2 * KV_HEADS) % tiles, s = counts[3] + blockIdx.x / (2 * KV_HEADS * tiles);
    if (s >= counts[0]) return;
    const int context = contexts[s], start = tile * TILE;
    if (start >= context) return;
    uint4* image = dense + (i64)blockIdx.x * (TILE * HEAD_SIZE / 8);
    Piece pieces[LOADS];
#if IS_INT8
    float scales[LOADS];
#endif
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int piece = threadIdx.x % PIECES, place = start + (i * THREADS + threadIdx.x) / PIECES;
        pieces[i] = Piece();
#if IS_INT8
        scales[i] = 0.0f;
#endif
        if (place < context) {
            const i64 page = table[s * stride_table + place / PAGE];
            const i64 row = ((i64)part * KV_HEADS + h) * PAGE + place % PAGE;
#if IS_INT8
            const u8* rows = cache + page * stride_block + (row - place % PAGE) * (HEAD_SIZE + 4);
            pieces[i] = reinterpret_cast<const Piece*>(rows)[place % PAGE * PIECES + piece];
            scales[i] = reinterpret_cast<const float*>(rows + PAGE * HEAD_SIZE)[place % PAGE];
#else
            pieces[i] = reinterpret_cast<const Piece*>(cache + page * stride_block)[row * PIECES + piece];
#endif
        }
    }
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int piece = threadIdx.x % PIECES, key = (i * THREADS + threadIdx.x) / PIECES;
        uint4* to = image + piece / 8 * (TILE * 8) + key * 8 + (piece % 8 ^ key % 8);
#if IS_INT8
        const uint2 a = wide(pieces[i].x, scales[i]), b = wide(pieces[i].y, scales[i]);
        *to = make_uint4(a.x, a.y, b.x, b.y);
#elif IS_FP8
        const uint2 a = wide(pieces[i].x), b = wide(pieces[i].y);
        *to = make_uint4(a.x, a.y, b.x, b.y);
#else
        *to = pieces[i];
#endif
    }
}
