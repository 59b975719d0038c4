// A warp on a CPU: what csrc/fragments.cuh and CUDA give to a kernel of one warp, in plain C++. 32 fibers run one after the
// other from exchange to exchange, which all of them reach in the same order.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using std::min;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
struct Index { int x; };
static Index threadIdx, blockIdx;

// Fibers.
static ucontext_t fibers[32], caller;
static char stacks[32][1 << 18];
static int phases[32];
static u32 slots[2][32][6];  // what lanes show each other, in turns, so that the last one can still read the first's
static void (*body)();
static int lane() { return threadIdx.x % 32; }
static void enter() {
    body();
    const int next = lane() + 1;
    threadIdx.x++;
    setcontext(next < 32 ? &fibers[next] : &caller);
}
static void run_warp(int block, int first_thread, void (*what)()) {
    body = what;
    for (int i = 0; i < 32; i++) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks[i];
        fibers[i].uc_stack.ss_size = sizeof(stacks[i]);
        makecontext(&fibers[i], enter, 0);
        phases[i] = 0;
    }
    blockIdx.x = block, threadIdx.x = first_thread;
    swapcontext(&caller, &fibers[0]);
}
// Every lane's words, once all have shown theirs; until the exchange after the next.
using Shown = const u32 (&)[32][6];
static Shown exchange(std::initializer_list<u32> words) {
    const int me = lane(), next = (me + 1) % 32, phase = phases[me]++ % 2, first = threadIdx.x - me;
    std::copy(words.begin(), words.end(), slots[phase][me]);
    threadIdx.x = first + next;
    swapcontext(&fibers[me], &fibers[next]);
    return slots[phase];
}

// Numbers.
template <class To, class From> To bits(From x) {
    To y;
    static_assert(sizeof(x) == sizeof(y), "");
    std::memcpy(&y, &x, sizeof(y));
    return y;
}
inline float __uint_as_float(u32 x) { return bits<float>(x); }
inline float __int_as_float(u32 x) { return bits<float>(x); }
inline u32 __float_as_uint(float x) { return bits<u32>(x); }
inline u32 __byte_perm(u32 a, u32 b, u32 order) {
    const uint64_t both = a | static_cast<uint64_t>(b) << 32;
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= static_cast<u32>(both >> 8 * (order >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
}
inline float of_half(u16 h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(1.0f * mantissa, -24);
    return h >> 15 ? -size : size;
}
inline u16 half_of(float x) {  // to even
    const u16 sign = std::signbit(x) << 15;
    const float size = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    const int exponent = size < 6.103515625e-05f ? -14 : std::ilogb(size);
    const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 2048: the next exponent's
    return sign | static_cast<u16>(((exponent + 14) << 10) + units);
}
inline u16 half_of_fp8(u8 x) {
    const int exponent = x >> 3 & 15, mantissa = x & 7;
    const float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
    return half_of((x & 127) == 127 ? NAN : x >> 7 ? -size : size);
}
inline u32 half2_of(float low, float high) { return half_of(low) | static_cast<u32>(half_of(high)) << 16; }
inline u32 half2_low(u32 four) { return half_of_fp8(four & 255) | static_cast<u32>(half_of_fp8(four >> 8 & 255)) << 16; }
inline u32 half2_high(u32 four) { return half2_low(four >> 16); }
inline u16 bf16_of(float x) {
    const u32 u = bits<u32>(x);
    return std::isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline float float_of(u16 x) { return IS_BF16 ? bits<float>(static_cast<u32>(x) << 16) : of_half(x); }
inline u32 pair_of(float low, float high) {
    return IS_BF16 ? bf16_of(low) | static_cast<u32>(bf16_of(high)) << 16 : half2_of(low, high);
}
inline float larger_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }

// What lanes do together.
inline float __shfl_sync(u32, float x, int from) { return bits<float>(exchange({bits<u32>(x)})[from][0]); }
inline float __shfl_xor_sync(u32, float x, int mask) { return __shfl_sync(0, x, lane() ^ mask); }
inline u32 __reduce_max_sync(u32, u32 x) {
    Shown shown = exchange({x});
    u32 most = 0;
    for (const auto& words : shown) most = std::max(most, words[0]);
    return most;
}
inline bool __any_sync(u32, bool x) { return __reduce_max_sync(0, x) != 0; }
// c += a b, as PTX lays them out: `count` numbers a register, `of` takes one out of it.
template <class C, class F> void multiply(C (&c)[4], std::initializer_list<u32> words, int count, F of) {
    Shown shown = exchange(words);
    for (int e = 0; e < 4; e++) {
        const int row = lane() / 4 + e / 2 * 8, column = lane() % 4 * 2 + e % 2, half = 4 * count;
        for (int k = 0; k < 2 * half; k++) {
            const int thread = k % half / count, place = k % count;
            c[e] += of(shown[row % 8 * 4 + thread][row / 8 + k / half * 2], place) *
                    of(shown[column * 4 + thread][4 + k / half], place);
        }
    }
}
inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply(c, {a0, a1, a2, a3, b0, b1}, 2, [](u32 word, int i) { return of_half(word >> 16 * i & 0xffff); });
}
inline void mma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply(c, {a0, a1, a2, a3, b0, b1}, 4, [](u32 word, int i) { return static_cast<int>(static_cast<int8_t>(word >> 8 * i & 255)); });
}

// Memory.
template <class T> T load(const void* p, bool is_there) {
    T x = {};
    if (is_there) std::memcpy(&x, p, sizeof(x));
    return x;
}
inline uint4 load_once(const void* p, bool is_there) { return load<uint4>(p, is_there); }
inline void load_once(u32& x, u32& y, const void* p, bool is_there) {
    const uint2 both = load<uint2>(p, is_there);
    x = both.x, y = both.y;
}
inline float load_once(const float* p, bool is_there) { return load<float>(p, is_there); }
inline void let_next_start() {}
inline void wait_for_previous() {}
