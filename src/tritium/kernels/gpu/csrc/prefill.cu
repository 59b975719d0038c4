// paged_attention for chunks of prompts on Hopper: a block of 128 new tokens of a prompt and query head at a time, its keys
// and values from gather_keys.cu's images, TILE keys at a time, from the last to the first.
//
// One thread copies tiles into a ring of STAGES in shared memory; two groups of four warps have 64 rows each: S = q K^T,
// softmax in base 2 (online, fp32), O += P V, with P from registers. The products of the next S and of this O run beside the
// softmax in between, also where the next tile is another block's. A CTA an SM takes the next block, a
// prompt's longest first, when it has copied the one before; it looks the prompt up among those of the step: prompt i's
// blocks begin at tokens before it / 128 + prompts before it, so that none shares a block.
//
// Set before this text: IS_BF16 (q, the images, out; else f16), HEAD_SIZE (128, 256), NUM_HEADS, GROUP, TILE (128 or 64),
// STAGES.

#define KV_HEADS (NUM_HEADS / GROUP)
#define ITEMS 4  // at least two, and those that a group of warps may be behind
#define BLOCKS (HEAD_SIZE / 64)        // of 64 columns
#define PIECES (HEAD_SIZE / 8)         // of 16 bytes a row
#define Q_BYTES (64 * HEAD_SIZE * 2)   // of one group of warps
#define TILE_BYTES (TILE * HEAD_SIZE * 2)
#define LOG2_E 1.4426950408889634f
#define ALL 0xffffffffu
#define MINUS_INFINITY __int_as_float(0xff800000)

struct Prompt {
    const int *starts, *contexts;
    int count, first;  // of the step's sequences; those of one token before them
    int blocks;        // at most
};

struct Work {
    int prompt, head, token, rows, position, tiles;  // position: of the first row; rows: that are there, at most 128
};

// What the step's item has to do: blocks of all heads, the last block first.
__device__ __forceinline__ Work work_of(const Prompt& p, int item) {
    const int index = p.blocks - 1 - item / NUM_HEADS;
    const int base = p.starts[p.first];
    int low = p.first, high = p.count;  // low's blocks begin at or before this one, high's after it
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if ((p.starts[middle] - base) / 128 + middle - p.first <= index) low = middle;
        else high = middle;
    }
    const int start = p.starts[low], num_rows = p.starts[low + 1] - start, context = p.contexts[low];
    const int row = (index - (start - base) / 128 - low + p.first) * 128;
    const int position = context - num_rows + row, end = min(position + 128, context);
    return {low - p.first, item % NUM_HEADS, start + row, min(num_rows - row, 128), position, (end + TILE - 1) / TILE};
}

// Starts copying 64 rows of q to where products read them; rows that are not there are zeros.
__device__ __forceinline__ void start_queries(const u16* q, i64 stride, int rows, u32 to, int t) {
#pragma unroll
    for (int i = 0; i < PIECES / 2; i++) {
        const int row = (i * 128 + t) / PIECES, piece = t % PIECES;
        const u32 at = to + piece / 8 * 8192 + row * 128 + (piece % 8 ^ row % 8) * 16;
        start_piece(at, q + (row < rows ? row : 0) * stride + piece * 8, row < rows);
    }
}

struct Rows {
    float m[2], norm[2];  // of this thread's rows, g and g + 8
};

// Scores to probabilities, in place; how much what was summed before shrinks. hidden: the first key that row g does not
// see, counted from the tile's first; row g + 8 sees 8 more.
__device__ __forceinline__ void softmax(float (&s)[TILE / 2], Rows& r, float (&shrink)[2], float scale, int hidden, int l) {
    if (hidden < TILE) {
#pragma unroll
        for (int i = 0; i < TILE / 2; i++) {
            const int key = i / 4 * 8 + 2 * l + i % 2;
            if (key >= hidden + i % 4 / 2 * 8) s[i] = MINUS_INFINITY;
        }
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
        float most = MINUS_INFINITY;
#pragma unroll
        for (int i = 0; i < TILE / 8; i++) most = fmaxf(most, fmaxf(s[4 * i + 2 * e], s[4 * i + 2 * e + 1]));
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
        const float m = fmaxf(r.m[e], most * scale);
        const float base = m == MINUS_INFINITY ? 0.0f : m;  // a row that has seen no key yet
        shrink[e] = exp2f(r.m[e] - base);
        r.m[e] = m;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < TILE / 8; i++)
#pragma unroll
            for (int b = 0; b < 2; b++) {
                float& x = s[4 * i + 2 * e + b];
                x = exp2f(x * scale - base);
                sum += x;
            }
        r.norm[e] = r.norm[e] * shrink[e] + sum;
    }
}

__device__ __forceinline__ void multiply_keys(float (&s)[TILE / 2], u32 q, u32 k) {
    begin_products();
#pragma unroll
    for (int i = 0; i < HEAD_SIZE / 16; i++)
        multiply(s, matrix_at(q + i / 4 * 8192 + i % 4 * 32, 16, 1024),
                 matrix_at(k + i / 4 * (TILE * 128) + i % 4 * 32, 16, 1024), i);
    commit_products();
}

__device__ __forceinline__ void multiply_values(float (&o)[HEAD_SIZE / 128][64], const u32 (&p)[TILE / 4], u32 v) {
    begin_products();
#pragma unroll
    for (int i = 0; i < TILE / 16; i++)
#pragma unroll
        for (int half = 0; half < HEAD_SIZE / 128; half++)
            multiply_add(o[half], p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3],
                         matrix_at(v + half * (TILE * 256) + i * 2048, TILE * 128, 1024));
    commit_products();
}

// Rows of O times what their norms ask for, by way of 2 KB of shared memory a warp, 64 columns at a time.
__device__ __forceinline__ void write_rows(const float (&o)[HEAD_SIZE / 128][64], const Rows& r, u16* out, i64 stride,
                                           int rows, u32 place, int lane) {
    const int g = lane / 4, l = lane % 4;
    float inverse[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        float norm = r.norm[e] + __shfl_xor_sync(ALL, r.norm[e], 1);
        inverse[e] = 1.0f / (norm + __shfl_xor_sync(ALL, norm, 2));
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float* x = &o[block / 2][block % 2 * 32 + i * 4 + 2 * e];
                const u32 at = place + (g + 8 * e) * 128 + (i ^ g) * 16 + l * 4;
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(pair_of(x[0] * inverse[e], x[1] * inverse[e]))
                             : "memory");
            }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = i * 4 + lane / 8, piece = lane % 8;
            uint4 eight;
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(eight.x), "=r"(eight.y), "=r"(eight.z), "=r"(eight.w)
                         : "r"(place + row * 128 + (piece ^ row % 8) * 16)
                         : "memory");
            if (row < rows) *reinterpret_cast<uint4*>(out + row * stride + block * 64 + piece * 8) = eight;
        }
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    prefill(const u16* q, const uint4* dense, u16* out, const int* cu_seqlens, const int* contexts, const int* counts,
            int* turns, i64 stride_q_token, i64 stride_q_head, i64 stride_out_token, i64 stride_out_head, float scale,
            i64 tiles_of_prompt, i64 num_blocks) {
    extern __shared__ uint4 memory[];
    __shared__ u64 barriers[4 * STAGES + 2 * ITEMS];
    __shared__ Work items[ITEMS];  // that the copying thread has taken; without rows: there is nothing left
    const u32 queries = (shared_address(memory) + 1023) / 1024 * 1024, ring = queries + 2 * Q_BYTES;
    const u32 full_k = shared_address(barriers), full_v = full_k + 8 * STAGES;
    const u32 empty_k = full_v + 8 * STAGES, empty_v = empty_k + 8 * STAGES;
    const u32 full_item = empty_v + 8 * STAGES, empty_item = full_item + 8 * ITEMS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < ITEMS; i++) {
            init_barrier(full_item + 8 * i, 1);
            init_barrier(empty_item + 8 * i, 8);  // warps
        }
        for (int i = 0; i < STAGES; i++) {
            init_barrier(full_k + 8 * i, 1);
            init_barrier(full_v + 8 * i, 1);
            init_barrier(empty_k + 8 * i, 8);
            init_barrier(empty_v + 8 * i, 8);
        }
    }
    fence_shared();
    __syncthreads();
    let_next_start();
    wait_for_previous();
    const Prompt prompts = {cu_seqlens, contexts, counts[0], counts[3], (int)num_blocks};
    const int group = threadIdx.x / 128;
    Work next;
    const auto tile_at = [&](int step) { return ring + step % STAGES * 2 * TILE_BYTES; };
    const auto wait_for = [](u32 ring_barriers, int step) {
        wait(ring_barriers + 8 * (step % STAGES), step / STAGES % 2);
    };
    int step = 0, num_items = 0;  // so far: tiles, blocks

    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(HEAD_SIZE == 128 ? 40 : 24));
        if (threadIdx.x != 256) return;
        const auto take = [&] {  // tells the others, too, before the tiles of the block in hand: they may ask before these
            do {
                const int item = atomicAdd(turns, 1);
                next.rows = 0;
                if (item >= prompts.blocks * NUM_HEADS) break;
                next = work_of(prompts, item);
            } while (next.rows <= 0);
            const int at = num_items % ITEMS;
            wait(empty_item + 8 * at, num_items++ / ITEMS % 2 ^ 1);
            items[at] = next;
            arrive(full_item + 8 * at);
            return next.rows > 0;
        };
        for (bool is_more = take(); is_more;) {
            const Work work = next;
            is_more = take();
            for (int tile = work.tiles - 1; tile >= 0; tile--, step++) {
                const i64 image = ((i64)work.prompt * tiles_of_prompt + tile) * KV_HEADS + work.head / GROUP;
                const uint4* from = dense + image * (2 * TILE_BYTES / 16);
                const u32 at = 8 * (step % STAGES);
                wait_for(empty_k, step + STAGES);
                start_copy(tile_at(step), from, TILE_BYTES, full_k + at);
                wait_for(empty_v, step + STAGES);
                start_copy(tile_at(step) + TILE_BYTES, from + TILE_BYTES / 16, TILE_BYTES, full_v + at);
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(HEAD_SIZE == 128 ? 232 : 240));
    const int t = threadIdx.x % 128, lane = t % 32, l = lane % 4, warp_row = t / 32 * 16, own_row = warp_row + lane / 4;
    const u32 own_q = queries + group * Q_BYTES, own_place = ring + 2 * STAGES * TILE_BYTES + threadIdx.x / 32 * 2048;
    scale *= LOG2_E;
    float o[HEAD_SIZE / 128][64], s[TILE / 2], shrink[2];
    u32 p[TILE / 4];
    Rows r;
    Work work;
    int tile, first_row;  // first_row: the position of this group's first row less that of the tile's first key
    const auto give_back = [&](u32 ring_barriers, int step) {
        if (lane == 0) arrive(ring_barriers + 8 * (step % STAGES));
    };
    const auto find_next = [&] {
        const int at = num_items % ITEMS;
        wait(full_item + 8 * at, num_items++ / ITEMS % 2);
        next = items[at];
        __syncwarp();
        if (lane == 0) arrive(empty_item + 8 * at);
        return next.rows > 0;
    };
    const auto start_next = [&] {
        const i64 token = next.token + 64 * group;
        start_queries(q + token * stride_q_token + next.head * stride_q_head, stride_q_token, next.rows - 64 * group,
                      own_q, t);
    };
    const auto take_next = [&](int& step) {  // its first tile is at `step`: those of the other group's rows alone go back
        work = next;
        tile = work.tiles - 1;
        first_row = work.position + 64 * group - tile * TILE;
        for (; first_row + 63 < 0; tile--, first_row += TILE, step++) {
            wait_for(full_k, step);
            give_back(empty_k, step);
            wait_for(full_v, step);
            give_back(empty_v, step);
        }
        wait_for_pieces();
        fence_shared();
        barrier_of(1 + group, 128);
        wait_for(full_k, step);
    };
    const auto look_ahead = [&] {  // q's place is free
        const bool is_there = find_next();
        if (is_there) {
            barrier_of(1 + group, 128);
            start_next();
        }
        return is_there;
    };
    const auto write = [&](const Work& done, const Rows& sums) {
        const i64 token = done.token + 64 * group + warp_row;
        write_rows(o, sums, out + token * stride_out_token + done.head * stride_out_head, stride_out_token,
                   done.rows - 64 * group - warp_row, own_place, lane);
    };
    const auto clear = [&] {
#pragma unroll
        for (int half = 0; half < HEAD_SIZE / 128; half++)
#pragma unroll
            for (int i = 0; i < 64; i++) o[half][i] = 0.0f;
    };

    bool is_more = find_next();
    if (!is_more) return;
    start_next();
    take_next(step);
    multiply_keys(s, own_q, tile_at(step));
    wait_for_products<0>();
    are_there(s);
    give_back(empty_k, step);
    if (tile == 0) is_more = look_ahead();
    r = {{MINUS_INFINITY, MINUS_INFINITY}, {0.0f, 0.0f}};
    softmax(s, r, shrink, scale, first_row + own_row + 1, l);
    clear();
#pragma unroll
    for (int i = 0; i < TILE / 4; i++) p[i] = pair_of(s[2 * i], s[2 * i + 1]);
    while (tile > 0 || is_more) {
        const bool is_end = tile == 0;
        const Work done = work;
        const Rows sums = r;
        int ahead = step + 1;
        if (is_end) {
            take_next(ahead);
            r = {{MINUS_INFINITY, MINUS_INFINITY}, {0.0f, 0.0f}};
        } else {
            tile--;
            first_row += TILE;
            wait_for(full_k, ahead);
        }
        multiply_keys(s, own_q, tile_at(ahead));
        wait_for(full_v, step);
        multiply_values(o, p, tile_at(step) + TILE_BYTES);
        wait_for_products<1>();
        are_there(s);
        give_back(empty_k, ahead);
        if (tile == 0) is_more = look_ahead();
        softmax(s, r, shrink, scale, first_row + own_row + 1, l);
        // A branch that asks for the sums: without one the compiler moves the softmax behind the wait. Not two tiles on: V of
        // this step has to go back first.
        if (tile > 0 && ahead == step + 1 && __any_sync(ALL, r.norm[0] + r.norm[1] >= 0.0f)) wait_for(full_k, ahead + 1);
        wait_for_products<0>();
#pragma unroll
        for (int half = 0; half < HEAD_SIZE / 128; half++) are_there(o[half]);
        give_back(empty_v, step);
        if (is_end) {
            write(done, sums);
            clear();
        } else {
#pragma unroll
            for (int half = 0; half < HEAD_SIZE / 128; half++)
#pragma unroll
                for (int i = 0; i < 64; i++) o[half][i] *= shrink[i % 4 / 2];
        }
#pragma unroll
        for (int i = 0; i < TILE / 4; i++) p[i] = pair_of(s[2 * i], s[2 * i + 1]);
        step = ahead;
    }
    wait_for(full_v, step);
    multiply_values(o, p, tile_at(step) + TILE_BYTES);
    wait_for_products<0>();
#pragma unroll
    for (int half = 0; half < HEAD_SIZE / 128; half++) are_there(o[half]);
    write(work, r);
}
