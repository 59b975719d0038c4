// The loops around a linear's tiles, the same for vector units and AMX: which rows, outputs and pieces of K come next.
//
// A tile is a group of rows times a panel of outputs over a piece of K. The rows of a block are packed once; its
// activations, or the piece of K that is in turn, stay in the core's L2 while panels pass by, and every piece of a panel is
// used for all groups of the block while it is there. Where the whole of K does not fit, sums wait in memory, panel by
// panel. None of this changes a bit: a sum takes its pieces of K in order.
//
// Threads share the rows if there are enough: each then packs its own, into its own L2. Else they share the panels. A
// `Sharing` says otherwise: what is faster depends on the machine, so the tuner tries it.
//
// `Tiles` is what computes, one copy for each thread:
//   kGroupRows                         most rows of a group
//   kPieceK, kStepK                    of K in a piece, about; pieces begin at multiples of kStepK
//   start(count, g)                    the first row of group g of a block of `count` rows
//   row_bytes()                        a packed row; group g of a block lies start(count, g) of them after the first
//   pack(rows, to)                     the activations of one group
//   multiply(piece, x, count, sums, ahead)   sums [count, kPanel] of one group, continued, or begun where K begins
//   finish(panel, rows, sums)          the outputs
#pragma once
#include <omp.h>
#include <unistd.h>

#include "linear_outputs.h"

namespace tritium {

constexpr int64_t kFewestRows = 336;        // of a block at most, however long they are: a panel's piece then serves enough of them
constexpr int64_t kMostBlockRows = 1024;    // however short they are
constexpr int64_t kRowsPerThread = 64;      // from here on threads share the rows
constexpr int64_t kWaitingBytes = 8 << 20;  // of sums

// Half of a core's L2 is for activations, the rest for pieces of panels and sums.
inline int64_t activation_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE) > 0 ? sysconf(_SC_LEVEL2_CACHE_SIZE) : 1 << 20;
#else
  static const int64_t size = 1 << 20;
#endif
  return size / 2;
}

// by: 0 as the number of rows has it, 1 the rows, 2 the panels. block_rows: of a block at most; 0: by the size of L2.
struct Sharing { int32_t by; int64_t block_rows; };

struct Run {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
// Part i of n, which differ by one at most.
inline Run part_of(Run all, int64_t i, int64_t n) {
  return {all.begin + i * all.size() / n, all.begin + (i + 1) * all.size() / n};
}
inline int64_t parts_of(int64_t size, int64_t most) { return (size + most - 1) / most; }

// Calls f for pieces of about `most`, equal ones but for the last, and each but the last a multiple of `step` long.
template <class F> inline void for_pieces(Run all, int64_t most, int64_t step, F f) {
  const int64_t length = round_up(parts_of(all.size(), parts_of(all.size(), std::max(most, step))), step);
  for (int64_t begin = all.begin; begin < all.end; begin += length) f(Run{begin, std::min(begin + length, all.end)});
}

// A piece of a panel: K from `k.begin` on, at `weights`.
struct Piece { int64_t panel; Run k; const char* weights; };

template <class Tiles> class Blocks {
 public:
  // num_k: as the panels are padded. panel_bytes: of one element of K.
  Blocks(const Tiles& tiles, const void* weights, int64_t num_rows, int64_t num_panels, int64_t num_k, int64_t panel_bytes)
      : tiles_(tiles), weights_(static_cast<const char*>(weights)), num_rows_(num_rows), num_panels_(num_panels),
        num_k_(num_k), panel_bytes_(panel_bytes) {}

  // shared: memory of the calling thread.
  void operator()(bool is_parallel, Sharing sharing, Scratch& shared) const {
    const bool has_many = num_rows_ >= (is_parallel ? omp_get_max_threads() : 1) * kRowsPerThread;
    const bool by_rows = sharing.by == 1 || (sharing.by == 0 && has_many);
    char* together = by_rows ? nullptr : reserve_rows(num_rows_, shared);
#pragma omp parallel if (is_parallel)
    {
      static thread_local Scratch own, waiting;
      Tiles tiles = tiles_;
      const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
      if (by_rows) {
        const Run mine = part_of({0, num_rows_}, thread, num_threads);
        const int64_t fitting = std::clamp(activation_bytes() / tiles.row_bytes(), kFewestRows, kMostBlockRows);
        const int64_t most_rows = sharing.block_rows > 0 ? sharing.block_rows : fitting;
        const int64_t num_blocks = parts_of(mine.size(), most_rows);
        for (int64_t i = 0; i < num_blocks; ++i) {
          const Run rows = part_of(mine, i, num_blocks);
          char* packed = reserve_rows(rows.size(), own);
          for (int64_t g = 0; g < num_groups(rows); ++g) pack(tiles, rows, g, packed);
          multiply(tiles, rows, {0, num_panels_}, packed, waiting);
        }
      } else {
        const Run all{0, num_rows_};
#pragma omp for schedule(static)
        for (int64_t g = 0; g < num_groups(all); ++g) pack(tiles, all, g, together);
        const int64_t num_runs = runs_of(num_panels_, num_k_ * panel_bytes_);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < num_runs; ++i)
          multiply(tiles, all, part_of({0, num_panels_}, i, num_runs), together, waiting);
      }
    }
  }

 private:
  static int64_t num_groups(Run rows) { return parts_of(rows.size(), Tiles::kGroupRows); }
  static Run group(Run rows, int64_t g) { return {Tiles::start(rows.size(), g), Tiles::start(rows.size(), g + 1)}; }

  char* reserve_rows(int64_t count, Scratch& memory) const {
    return memory.reserve(static_cast<size_t>(round_up(count, Tiles::kGroupRows) * tiles_.row_bytes()));
  }

  void pack(const Tiles& tiles, Run rows, int64_t g, char* packed) const {
    const Run part = group(rows, g);
    tiles.pack({rows.begin + part.begin, rows.begin + part.end}, packed + part.begin * tiles.row_bytes());
  }

  void multiply(Tiles& tiles, Run rows, Run panels, const char* packed, Scratch& waiting) const {
    const int64_t row_bytes = tiles.row_bytes(), panel_sums = rows.size() * kPanel;
    const auto reserve = [&](int64_t count) {
      return reinterpret_cast<float*>(waiting.reserve(static_cast<size_t>(count * panel_sums) * sizeof(float)));
    };
    const bool fits = rows.size() * row_bytes <= activation_bytes();
    const int64_t most_k = fits ? num_k_ : activation_bytes() / rows.size() * num_k_ / row_bytes;
    const int64_t waiting_panels = kWaitingBytes / (panel_sums * static_cast<int64_t>(sizeof(float)));
    const int64_t most_panels = fits ? panels.size() : std::max<int64_t>(1, waiting_panels);
    float* sums = reserve(fits ? 1 : std::min(most_panels, panels.size()));
    for (int64_t first = panels.begin, end; first < panels.end; first = end) {
      end = std::min(first + most_panels, panels.end);
      for_pieces({0, num_k_}, most_k, Tiles::kStepK, [&](Run k) {
        for (int64_t p = first; p < end; ++p) multiply(tiles, rows, p, k, packed, sums + (fits ? 0 : p - first) * panel_sums);
      });
    }
  }

  // What `k` holds of a panel, piece by piece, for all groups of the block.
  void multiply(Tiles& tiles, Run rows, int64_t p, Run k, const char* packed, float* sums) const {
    const int64_t num_groups = this->num_groups(rows);
    for_pieces(k, num_groups == 1 ? k.size() : Tiles::kPieceK, Tiles::kStepK, [&](Run piece) {
      const char* weights = weights_ + (p * num_k_ + piece.begin) * panel_bytes_;
      // Each group asks for its share of the next piece, of this panel or the next one; one group alone for its own weights.
      const int64_t next = piece.end < k.end ? piece.size() : num_k_ - piece.begin + k.begin;
      const int64_t per_k = parts_of(panel_bytes_, num_groups);
      const char* ahead = weights + (num_groups == 1 ? kAhead : next * panel_bytes_);
      Run done{};
      for (int64_t g = 0; g < num_groups; ++g, ahead += piece.size() * per_k) {
        const Run part = group(rows, g);
        tiles.multiply(Piece{p, piece, weights}, packed + part.begin * tiles.row_bytes(), part.size(),
                       sums + part.begin * kPanel, Ahead{ahead, per_k});
        // One group late: it then runs beside the next one's products, and does not wait for its own.
        if (piece.end == num_k_ && g > 0) finish(tiles, rows, p, done, sums);
        done = part;
      }
      if (piece.end == num_k_) finish(tiles, rows, p, done, sums);
    });
  }
  void finish(const Tiles& tiles, Run rows, int64_t p, Run part, const float* sums) const {
    tiles.finish(p, {rows.begin + part.begin, rows.begin + part.end}, sums + part.begin * kPanel);
  }

  const Tiles& tiles_;
  const char* weights_;
  const int64_t num_rows_, num_panels_, num_k_, panel_bytes_;
};

}  // namespace tritium
