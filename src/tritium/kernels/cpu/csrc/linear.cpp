// linear: x weight^T + bias over a packed weight (linear.h), perhaps with an activation applied to it or a residual added;
// of one input or of two side by side; and the packing.
#include "linear_amx.h"
#include "linear_blocks.h"
#include "linear_outputs.h"
#include "pack.h"

namespace {
using namespace tritium;

struct LinearArgs {
  const void *x, *weight, *bias;  // weight packed; bias null or [num_out], [2 num_out] when gated
  const void* more;      // the last num_more of a row's num_in inputs, [rows, num_more], dense; null: x has all
  const void* residual;  // [rows, num_out], dense, added to the rounded result; null: none
  void* out;                      // [rows, num_out], dense
  int64_t num_outer, num_inner, stride_outer, stride_inner;  // rows of x
  int64_t num_in, num_out, num_more;  // num_in - num_more is a multiple of kTileK in bf16
  int64_t kind;  // of the activation; -1: none
  int32_t is_gated;
  int32_t share_by;  // Sharing of linear_blocks.h
  int64_t block_rows;
};

struct LinearPackArgs {
  const void* weight;  // [num_out, num_in], rows `stride` apart
  void* out;
  int64_t num_in, num_out, stride;
  int32_t is_gated;  // num_out counts gates and what they gate
};

constexpr int64_t kRowsAhead = 32;

template <class T> class Linear {
 public:
  explicit Linear(const LinearArgs& args)
      : a(args), num_rows_(a.num_outer * a.num_inner), padded_(padded_k<T>(a.num_in)),
        num_panels_(panels_of(a.num_out, a.is_gated)) {}

  template <class Tiles> void run(const Tiles& tiles, Scratch& memory) const {
    const int64_t num_weights = padded_ * a.num_out, size = sizeof(T);
    const bool is_parallel = is_worth_threads(num_weights * size, num_weights * num_rows_);
    const Blocks<Tiles> blocks(tiles, a.weight, num_rows_, num_panels_, padded_, kPanel * size);
    blocks(is_parallel, Sharing{a.share_by, a.block_rows}, memory);
  }

  const T* row(int64_t m) const {
    return static_cast<const T*>(a.x) + m / a.num_inner * a.stride_outer + m % a.num_inner * a.stride_inner;
  }
  const T* more(int64_t m) const { return static_cast<const T*>(a.more) + m * a.num_more; }

  // Outputs of one panel from their sums [rows, kPanel].
  void finish(int64_t p, Run rows, const float* sums) const {
    const auto expect_ahead = [&](const T* out, int64_t width) { expect(out + kRowsAhead * a.num_out, width); };
    finish_panel<T>(a, p, rows.begin, rows.size(), sums, [](int64_t) { return 1.0f; }, expect_ahead,
                    static_cast<const T*>(a.residual));
  }

 protected:
  // Asks to own the lines of coming outputs: rows lie far apart, and 3 GB/s of such lines are written without that, 10 to 30
  // with it. fp32 with 768 inputs and 3,072 outputs gains 7 %; bf16 on AMX nothing.
  static void expect(const T* out, int64_t count) {
    if constexpr (sizeof(T) < sizeof(float)) return;
    for (int64_t i = 0; i < count; i += kLine / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(out + i, 1);
  }

  // How many of a row's inputs lie in x, and as how many they are packed.
  int64_t own() const { return a.num_in - a.num_more; }
  int64_t own_padded() const { return a.more == nullptr ? padded_ : own(); }

  const LinearArgs& a;
  const int64_t num_rows_, padded_, num_panels_;
};

// Vector units: groups of up to kMostRows rows, packed as [K, rows of the group].
template <class T> class VectorTiles : public Linear<T> {
  using A = Activation<T>;
  using Base = Linear<T>;
  using Base::a, Base::padded_;

 public:
  static constexpr int64_t kGroupRows = kMostRows, kStepK = kChain, kPieceK = 512;
  using Base::Base;

  static int64_t start(int64_t count, int64_t g) { return part_of({0, count}, g, parts_of(count, kGroupRows)).begin; }
  int64_t row_bytes() const { return padded_ / kPerUnit<T> * static_cast<int64_t>(sizeof(A)); }

  void pack(Run rows, char* to) const {
    const T* from[kMostRows];
    for (int64_t m = rows.begin; m < rows.end; ++m) from[m - rows.begin] = this->row(m);
    A* units = reinterpret_cast<A*>(to);
    pack_group(from, rows.size(), this->own(), this->own_padded(), units);
    if (a.more == nullptr) return;
    for (int64_t m = rows.begin; m < rows.end; ++m) from[m - rows.begin] = this->more(m);
    units += this->own() / kPerUnit<T> * rows.size();
    pack_group(from, rows.size(), a.num_more, padded_ - this->own(), units);
  }

  template <class Beside>
  void multiply(const Piece& piece, const char* x, int64_t count, float* sums, Ahead ahead, Beside beside) const {
    add_block(static_cast<int>(count), reinterpret_cast<const T*>(piece.weights),
              reinterpret_cast<const A*>(x) + piece.k.begin * count / kPerUnit<T>, piece.k.size(), piece.k.begin == 0,
              ahead, sums);
    beside(0, 1);
  }
};

#if defined(__AMX_BF16__)
// Tiles of 32 rows: [K / 32, 2, 16, 32], each [16, 32] a tile.
class AmxTiles : public Linear<bf16> {
 public:
  static constexpr int64_t kGroupRows = kGroup, kStepK = kTileK, kPieceK = 512;
  using Linear::Linear;
  AmxTiles(const AmxTiles&) = default;
  ~AmxTiles() { if (configured_ != 0) _tile_release(); }

  static int64_t start(int64_t count, int64_t g) { return std::min(g * kGroup, count); }
  int64_t row_bytes() const { return padded_ * static_cast<int64_t>(sizeof(bf16)); }

  void pack(Run rows, char* to) const {
    bf16* tiles = reinterpret_cast<bf16*>(to);
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      amx_pack(row(m), m - rows.begin, own(), own_padded(), tiles);
      if (a.more != nullptr) amx_pack(more(m), m - rows.begin, a.num_more, padded_ - own(), tiles + own() * kGroup);
    }
  }

  template <class Beside>
  void multiply(const Piece& piece, const char* x, int64_t count, float* sums, Ahead ahead, Beside beside) {
    if (configured_ != count) configure_tiles(configured_ = count);
    amx_group<true>(reinterpret_cast<const bf16*>(piece.weights), reinterpret_cast<const bf16*>(x) + piece.k.begin * kGroup,
                    piece.k.size(), count > kTileRows, piece.k.begin == 0, sums, ahead, beside);
  }

 private:
  int64_t configured_ = 0;  // rows of a group that the tiles are set up for
};
#endif

template <class T> void linear(const LinearArgs& a) {
  if (a.num_outer * a.num_inner == 0) return;  // threads would share no rows
  static thread_local Scratch memory;
#if defined(__AMX_BF16__)
  if constexpr (kIsBf16<T>)
    if (amx_is_granted()) {
      const AmxTiles tiles(a);
      return tiles.run(tiles, memory);
    }
#endif
  const VectorTiles<T> tiles(a);
  tiles.run(tiles, memory);
}

template <class T> void linear_pack(const LinearPackArgs& a) {
  const int64_t padded = padded_k<T>(a.num_in), num_panels = panels_in(a.num_out, a.is_gated);
  constexpr int64_t kRun = kIsBf16<T> ? 2 : 1;  // elements of K side by side
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < num_panels; ++p) {
    T* to = static_cast<T*>(a.out) + p * kPanel * padded;
    int64_t done = 0;
    if constexpr (sizeof(T) * kRun == sizeof(uint32_t)) {
      PanelRows rows;
      find_rows(a.weight, p, a.num_out, a.is_gated, a.stride * static_cast<int64_t>(sizeof(T)), rows);
      done = pack_units(rows, a.num_in / kRun, reinterpret_cast<uint32_t*>(to), [](u32xw x) { return x; }) * kRun;
    }
    for (int64_t k = done; k < padded; ++k)
      for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t n = row_in(p, i, a.num_out, a.is_gated);
        const bool is_inside = n >= 0 && k < a.num_in;
        to[k / kRun * kRun * kPanel + i * kRun + k % kRun] =
            is_inside ? static_cast<const T*>(a.weight)[n * a.stride + k] : T{};
      }
  }
}

}  // namespace

TRITIUM_EXPORT(linear, LinearArgs)
TRITIUM_EXPORT(linear_pack, LinearPackArgs)

// Elements a packed weight takes: what `linear_pack` writes.
TRITIUM_SYMBOL int64_t tritium_linear_packed_size(int64_t num_out, int64_t num_in, int32_t is_bf16, int32_t is_gated) {
  return panels_in(num_out, is_gated) * kPanel * (is_bf16 ? padded_k<bf16>(num_in) : num_in);
}
