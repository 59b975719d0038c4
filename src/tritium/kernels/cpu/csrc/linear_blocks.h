// The loops around a linear's tiles, the same for vector units and AMX: which rows, outputs and pieces of K come next.
//
// A tile is a group of rows times a panel of outputs over a piece of K. Rows go in blocks and are packed once; a block's
// activations, or the part of K that is in turn, stay in a core's L2 while panels pass by, and every piece of a panel is
// used for all groups of the block while it is there. Where the whole of K does not fit, sums wait in memory, panel by
// panel. None of this changes a bit: a sum takes its pieces of K in order.
//
// Threads take runs of panels. If there are enough rows, each has a block of its own, whose runs it takes first, and then
// what others have left of theirs; else all take runs of one block. A `Sharing` says otherwise: what is faster depends on
// the machine, so the tuner tries it.
//
// `Tiles` is what computes, one copy for each thread:
//   kGroupRows                         most rows of a group
//   kPieceK, kStepK                    of K in a piece, about; pieces begin at multiples of kStepK
//   start(count, g)                    the first row of group g of a block of `count` rows
//   row_bytes()                        a packed row; group g of a block lies start(count, g) of them after the first
//   pack(rows, to)                     the activations of one group
//   multiply(piece, x, count, sums, ahead, beside)   sums [count, kPanel] of one group, continued, or begun where K begins;
//                                      calls beside(i, n) for each i < n, some n, meanwhile
//   finish(panel, rows, sums)          the outputs
#pragma once
#include <omp.h>
#include <unistd.h>

#include "linear_outputs.h"

namespace tritium {

constexpr int64_t kFewestRows = 336;        // of a block at most, however long they are: a panel's piece then serves enough of them
constexpr int64_t kMostBlockRows = 1024;    // however short they are
constexpr int64_t kRowsPerThread = 64;      // from here on threads have blocks of their own
constexpr int64_t kWaitingBytes = 8 << 20;  // of sums, for each thread

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

  // memory: of the calling thread.
  void operator()(bool is_parallel, Sharing sharing, Scratch& memory) const {
    const int64_t num_threads = is_parallel ? omp_get_max_threads() : 1;
    const bool has_many = num_rows_ >= num_threads * kRowsPerThread;
    if (sharing.by == 2 || (sharing.by == 0 && !has_many)) return share({0, num_rows_}, 1, num_threads, memory);
    const int64_t fitting = std::clamp(activation_bytes() / tiles_.row_bytes(), kFewestRows, kMostBlockRows);
    const int64_t most_rows = num_threads * (sharing.block_rows > 0 ? sharing.block_rows : fitting);
    for_pieces({0, num_rows_}, most_rows, 1, [&](Run rows) { share(rows, num_threads, num_threads, memory); });
  }

 private:
  static constexpr int64_t kGroupRows = Tiles::kGroupRows;
  static int64_t num_groups(Run rows) { return parts_of(rows.size(), kGroupRows); }
  static Run group(Run rows, int64_t g) { return {Tiles::start(rows.size(), g), Tiles::start(rows.size(), g + 1)}; }

  // `all` rows in so many blocks, of whole groups but for the last one's end.
  void share(Run all, int64_t most_blocks, int64_t num_threads, Scratch& memory) const {
    const int64_t num_groups = this->num_groups(all), num_blocks = std::min(most_blocks, num_groups);
    const auto block = [=](int64_t b) {
      const Run groups = part_of({0, num_groups}, b, num_blocks);
      return Run{all.begin + groups.begin * kGroupRows, std::min(all.begin + groups.end * kGroupRows, all.end)};
    };
    const int64_t row_bytes = tiles_.row_bytes(), block_bytes = parts_of(num_groups, num_blocks) * kGroupRows * row_bytes;
    const int64_t panel_sums = all.size() * kPanel, sum_bytes = static_cast<int64_t>(sizeof(float));
    const bool fits = std::min(block_bytes, all.size() * row_bytes) <= activation_bytes();
    const int64_t most_k = fits ? num_k_ : activation_bytes() * num_k_ / block_bytes;
    const int64_t waiting_panels = std::max<int64_t>(1, num_threads * kWaitingBytes / (panel_sums * sum_bytes));
    const int64_t most_panels = fits ? num_panels_ : std::min(waiting_panels, num_panels_);

    // Runs taken of each block while the same panels and K are in turn; packed rows; sums.
    const int64_t num_turns = parts_of(num_panels_, most_panels) * parts_of(num_k_, std::max(most_k, Tiles::kStepK));
    const int64_t taken_bytes = round_up(num_turns * num_blocks * static_cast<int64_t>(sizeof(int64_t)), kLine);
    const int64_t packed_bytes = num_groups * kGroupRows * row_bytes;
    const int64_t waiting_bytes = fits ? 0 : most_panels * panel_sums * sum_bytes;
    char* const taken = memory.reserve(static_cast<size_t>(taken_bytes + packed_bytes + waiting_bytes));
    char* const packed = taken + taken_bytes;
    float* const waiting = reinterpret_cast<float*>(packed + packed_bytes);
    std::memset(taken, 0, static_cast<size_t>(taken_bytes));
    const auto packed_rows = [=](Run rows) { return packed + (rows.begin - all.begin) * row_bytes; };
#pragma omp parallel if (num_threads > 1)
    {
      static thread_local Scratch own;
      float* const sums = reinterpret_cast<float*>(own.reserve(static_cast<size_t>(block_bytes / row_bytes * kPanel * sum_bytes)));
      Tiles tiles = tiles_;
#pragma omp for schedule(static)
      for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t b = ((g + 1) * num_blocks - 1) / num_groups;
        pack(tiles, block(b), g - b * num_groups / num_blocks, packed_rows(block(b)));
      }
      const int64_t first = omp_get_thread_num() * num_blocks / omp_get_num_threads();
      int64_t* next = reinterpret_cast<int64_t*>(taken);
      for_pieces({0, num_panels_}, most_panels, 1, [&](Run panels) {
        for_pieces({0, num_k_}, most_k, Tiles::kStepK, [&](Run k) {
          const int64_t num_runs = runs_of(panels.size(), k.size() * panel_bytes_);
          for (int64_t i = 0; i < num_blocks; ++i) {
            const int64_t b = (first + i) % num_blocks;
            const Run rows = block(b);
            for (int64_t r; (r = __atomic_fetch_add(next + b, 1, __ATOMIC_RELAXED)) < num_runs;) {
              const Run run = part_of(panels, r, num_runs);
              for (int64_t p = run.begin; p < run.end; ++p) {
                float* const wait = waiting + (p - panels.begin) * panel_sums + (rows.begin - all.begin) * kPanel;
                multiply(tiles, rows, p, k, packed_rows(rows), fits ? sums : wait);
              }
            }
          }
          next += num_blocks;
          if (!fits) {
#pragma omp barrier
          }
        });
      });
    }
  }

  void pack(const Tiles& tiles, Run rows, int64_t g, char* packed) const {
    const Run part = group(rows, g);
    tiles.pack({rows.begin + part.begin, rows.begin + part.end}, packed + part.begin * tiles.row_bytes());
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
        // One group late, beside the next one's products: that takes 0.91 of the time of a gated linear of 512 rows.
        const auto finish_some = [&](int64_t i, int64_t n) {
          const Run some = part_of(done, i, n);
          if (piece.end == num_k_ && some.size() > 0) finish(tiles, rows, p, some, sums);
        };
        tiles.multiply(Piece{p, piece, weights}, packed + part.begin * tiles.row_bytes(), part.size(),
                       sums + part.begin * kPanel, Ahead{ahead, per_k}, finish_some);
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
