// The linears of a layer, each with the low-rank changes of the jobs whose rows are in a piece: forward and backward.
#pragma once

#include <memory>

#include "piece.h"
#include "team.h"

#if defined(__x86_64__)

struct Site {  // linears that read the same x, and write side by side
  const Matrix& w;
  int first, count;  // among the layer's linears
  int widths[3];
  const bf16* x;  // rows `x_pitch` apart
  size_t x_pitch;

  int begin(int j) const { return j == 0 ? 0 : widths[0] + (j == 2 ? widths[1] : 0); }
};

struct Low {       // a short step of a product: some rows of low rank, and the jobs' factors they are multiplied with
  int begin, end;  // columns of the result that it adds to
  const bf16* rows;
  int linear;
  const bf16* factors;  // packed, of the first job
};

struct Lows {  // of one product; not a vector, as memory is taken in pieces only
  Low low[3];
  int count = 0;

  void add(const Low& l) { low[count++] = l; }
  const Low* begin() const { return low; }
  const Low* end() const { return low + count; }
};

struct Task {
  Stage stage;
  int at;  // which layer, or first column of the logits
};

struct Learner {
  Team team;
  int threads;
  Isa isa;  // AVX512 or better
  std::vector<std::vector<float>> scratch;
  Learner(int threads, Isa isa) : team(threads), threads(threads), isa(isa), scratch(threads) {}
};

// What the members share. What decides how many pieces a part has is copied: see `Job`.
struct Shared : Job {
  Learner& learner;
  const Model& model;
  const Piece piece;
  const Task task;
  Memory memory;
  std::vector<int> job_of_tile, sequence_of_row, low_column;
  std::vector<Trained> jobs;

  Shared(Learner& l, const Model& m, const Piece& p, Task t)
      : Job(32), learner(l), model(m), piece(p), task(t), memory(m, p), jobs(p.jobs, p.jobs + p.num_jobs) {
    job_of_tile.assign(p.rows / kTile, -1);
    int column = 0;
    for (int j = 0; j < p.num_jobs; ++j) {
      std::fill(&job_of_tile[jobs[j].start / kTile], &job_of_tile[0] + jobs[j].end / kTile, j);
      low_column.push_back(column);
      column += rounded(jobs[j].end - jobs[j].start, kDepth);
    }
    sequence_of_row.assign(p.rows, -1);
    for (int i = 0; i < p.num_sequences; ++i) {
      const Sequence& s = p.sequences[i];
      std::fill(&sequence_of_row[s.start], &sequence_of_row[0] + s.start + s.length, i);
    }
  }

  void work(int rank) override;
};

// One member's part in the products of a stage. All members go through the same parts in the same order.
class Linears {
 protected:
  Linears(Shared& shared, int rank)
      : s_(shared), m_(shared.model), p_(shared.piece), mem_(shared.memory), rank_(rank) {}

  template <class F>
  void each(int count, const F& piece) {
    s_.each(part_++, count, piece);
  }

  std::vector<float>& scratch() { return s_.learner.scratch[rank_]; }

  // `to(row, column, y)` has the 32 numbers y of the result from that column on.
  template <class To>
  void project(const Site& site, const Kept& k, const Layer& layer, const To& to) {
    pack_base(site.w, 0, site.w.rows);
    pack_factors(site, layer, true);
    lower(site, layer, site.x, site.x_pitch, true, &k);
    Lows lows;
    for (int j = 0; j < site.count; ++j)
      lows.add({site.begin(j), site.begin(j) + site.widths[j], mem_.low + j * mem_.rank,
                layer.targets[site.first + j], mem_.raising + j * mem_.pack_stride});
    multiply(site.x, site.x_pitch, site.w.cols, p_.rows, site.w.rows, lows, to);
  }

  // From the gradient of a site's result to that of the jobs' factors, and of x unless `further` is false.
  template <class To>
  void back_project(const Site& site, const Kept& k, const Layer& layer, const bf16* slope, size_t slope_pitch,
                    const To& to, bool further = true) {
    pack_factors(site, layer, false);
    lower(site, layer, slope, slope_pitch, false, nullptr);
    learn(site, k, layer, slope, slope_pitch);
    if (!further) return;
    pack_base_across(site.w, 0, site.w.rows);
    Lows lows;
    for (int j = 0; j < site.count; ++j)
      lows.add({0, site.w.cols, mem_.low + j * mem_.rank, layer.targets[site.first + j],
                mem_.raising + j * mem_.pack_stride});
    multiply(slope, slope_pitch, site.w.rows, p_.rows, site.w.cols, lows, to);
  }

  // Rows [first, first + columns) of a base's weights become the columns of a right operand; zeros past the last.
  void pack_base(const Matrix& w, int first, int columns) {
    each(columns / kTile, [&](int panel) {
      const int row = first + panel * kTile;
      pack_rows(plain_row(w, row), w.cols, std::clamp(w.rows - row, 0, kTile), w.cols,
                mem_.packed + static_cast<size_t>(panel) * kTile * w.cols);
    });
  }

  // Rows [first, first + rows) of a base's weights become the rows of a right operand; zeros past the last.
  void pack_base_across(const Matrix& w, int first, int rows) {
    each(w.cols / 32, [&](int panel) {
      bf16* to = mem_.packed + static_cast<size_t>(panel) * 32 * rows;
      pack_columns(plain_row(w, first) + panel * 32, w.cols, std::min(rows, w.rows - first), rows, to,
                   to + static_cast<size_t>(kTile) * rows);
    });
  }

  bool targets(const Trained& job, int linear) const { return job.a_at[linear] >= 0; }

  // The jobs' factors: one that makes rows of low rank of a site's input, and one that makes of these its result.
  void pack_factors(const Site& site, const Layer& layer, bool forward) {
    const int rank = mem_.rank;
    each(static_cast<int>(s_.jobs.size()) * site.count, [&](int i) {
      const int j = i % site.count, linear = layer.targets[site.first + j];
      const Trained& job = s_.jobs[i / site.count];
      if (!targets(job, linear)) return;
      const bf16 *a = job.factors + job.a_at[linear], *b = job.factors + job.b_at[linear];
      const int n_in = site.w.cols, n_out = site.widths[j], from = forward ? n_in : n_out, to = forward ? n_out : n_in;
      const size_t place = (static_cast<size_t>(i / site.count) * 3 + j) * mem_.pack_stride;
      const bf16 *first = forward ? a : b, *second = forward ? b : a;
      for (int r = 0; r < rounded(job.rank, kTile); r += kTile)
        pack_rows(first + static_cast<size_t>(r) * from, from, std::min(kTile, job.rank - r), from,
                  mem_.lowering + place + static_cast<size_t>(r) * from);
      for (int c = 0; c < to; c += 32)
        pack_columns(second + c, to, job.rank, rank, mem_.raising + place + static_cast<size_t>(c) * rank,
                     mem_.raising + place + static_cast<size_t>(c + kTile) * rank);
    });
  }

  // Rows of low rank, in `low`: of x in the forward, which are also kept transposed with the layer; of the result's
  // gradient in the backward.
  void lower(const Site& site, const Layer& layer, const bf16* x, size_t x_pitch, bool forward, const Kept* k) {
    each(p_.rows / kTile, [&](int tile) {
      const int j = s_.job_of_tile[tile];
      if (j < 0) return;
      const Trained& job = s_.jobs[j];
      for (int i = 0; i < site.count; ++i) {
        const int linear = layer.targets[site.first + i];
        if (!targets(job, linear)) continue;
        const int depth = forward ? site.w.cols : site.widths[i];
        const bf16* rows = x + static_cast<size_t>(tile) * kTile * x_pitch + (forward ? 0 : site.begin(i));
        const bf16* factor = mem_.lowering + (static_cast<size_t>(j) * 3 + i) * mem_.pack_stride;
        lower_tile(tile, j, i, rows, x_pitch, factor, depth,
                   forward ? k->low + (site.first + i) * mem_.rank * mem_.low_rows : nullptr);
      }
    });
  }

  AMX void lower_tile(int tile, int j, int i, const bf16* rows, size_t row_pitch, const bf16* factor, int depth,
                      bf16* kept) {
    const Trained& job = s_.jobs[j];
    alignas(64) float out[32 * 32];
    Sums sums(s_.learner.isa);
    bf16* to = mem_.low + static_cast<size_t>(tile) * kTile * mem_.lows + i * mem_.rank;
    const int rank = rounded(job.rank, kTile);
    for (int r = 0; r < mem_.rank; r += 32) {
      const bool first = r < rank, second = r + kTile < rank;
      if (first) {
        const bf16* panel = factor + static_cast<size_t>(r) * depth;
        sums.clear();
        sums.add(rows, nullptr, row_pitch, panel, second ? panel + static_cast<size_t>(kTile) * depth : panel, depth);
        sums.store(out, 32, false);
      }
      for (int half = 0; half < 2; ++half) {
        const bool there = half ? second : first;
        __m512i block[kTile];
        for (int t = 0; t < kTile; ++t) {
          const __m512 v = there ? _mm512_load_ps(out + t * 32 + half * kTile) : _mm512_setzero_ps();
          narrow16(v, to + t * mem_.lows + r + half * kTile);
          block[t] = _mm512_castps_si512(v);
        }
        if (kept && there) {
          transpose16(block);
          for (int q = 0; q < kTile; ++q) {
            bf16* across = kept + (r + half * kTile + q) * mem_.low_rows + s_.low_column[j] + tile * kTile - job.start;
            narrow16(_mm512_castsi512_ps(block[q]), across);
            if ((tile + 1) * kTile == job.end && (job.end - job.start) % kDepth != 0)
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(across + kTile), _mm256_setzero_si256());
          }
        }
      }
    }
  }

  // Adds to the gradients of the jobs' factors: of B, low.T @ slope; of A, low.T @ x with the low rows of the slope.
  void learn(const Site& site, const Kept& k, const Layer& layer, const bf16* slope, size_t slope_pitch) {
    constexpr int kColumns = 96;
    const int b_pieces = (site.w.rows + kColumns - 1) / kColumns, a_pieces = (site.w.cols + kColumns - 1) / kColumns;
    each(static_cast<int>(s_.jobs.size()) * (a_pieces + b_pieces), [&](int i) {
      const int j = i / (a_pieces + b_pieces), at = i % (a_pieces + b_pieces);
      const Trained& job = s_.jobs[j];
      const int depth = rounded(job.end - job.start, kDepth);
      std::vector<float>& room = scratch();
      const size_t needed = static_cast<size_t>(depth) * (32 + 3 * mem_.rank) / 2 + 64;
      if (room.size() < needed) room.resize(needed);
      bf16* panels = reinterpret_cast<bf16*>(room.data());
      if (at < b_pieces) {
        for (int c = at * kColumns; c < std::min((at + 1) * kColumns, site.w.rows); c += 32) {
          int l = site.count - 1;
          while (site.begin(l) > c) --l;
          const int linear = layer.targets[site.first + l];
          if (!targets(job, linear)) continue;
          pack_columns(slope + job.start * slope_pitch + c, slope_pitch, job.end - job.start, depth, panels,
                       panels + kTile * depth);
          const bf16* low = k.low + (site.first + l) * mem_.rank * mem_.low_rows + s_.low_column[j];
          add_gradient(job, low, mem_.low_rows, panels, depth,
                       job.gradients + job.b_gradient_at[linear] + c - site.begin(l), site.widths[l]);
        }
        return;
      }
      bf16* across = panels + 32 * depth;  // [count * rank, depth]: the slope's low rows, transposed
      for (int l = 0; l < site.count; ++l)
        if (targets(job, layer.targets[site.first + l]))
          transpose_low(job, l, depth, across + static_cast<size_t>(l) * mem_.rank * depth);
      for (int c = (at - b_pieces) * kColumns; c < std::min((at - b_pieces + 1) * kColumns, site.w.cols); c += 32) {
        pack_columns(site.x + job.start * site.x_pitch + c, site.x_pitch, job.end - job.start, depth, panels,
                     panels + kTile * depth);
        for (int l = 0; l < site.count; ++l) {
          const int linear = layer.targets[site.first + l];
          if (targets(job, linear))
            add_gradient(job, across + static_cast<size_t>(l) * mem_.rank * depth, depth, panels, depth,
                         job.gradients + job.a_gradient_at[linear] + c, site.w.cols);
        }
      }
    });
  }

  AVX512 void transpose_low(const Trained& job, int l, int depth, bf16* to) {
    for (int t = 0; t < depth; t += kTile)
      for (int r = 0; r < rounded(job.rank, kTile); r += kTile) {
        __m512i block[kTile];
        for (int i = 0; i < kTile; ++i) {
          const int row = job.start + t + i;
          block[i] = row < job.end ? _mm512_castps_si512(widen16(mem_.low + row * mem_.lows + l * mem_.rank + r))
                                   : _mm512_setzero_si512();
        }
        transpose16(block);
        for (int i = 0; i < kTile; ++i)
          narrow16(_mm512_castsi512_ps(block[i]), to + static_cast<size_t>(r + i) * depth + t);
      }
  }

  // gradient [rank, 32], rows `width` apart, += low @ panels.
  AMX void add_gradient(const Trained& job, const bf16* low, size_t low_pitch, const bf16* panels, int depth,
                        float* gradient, int width) {
    alignas(64) float out[32 * 32];
    Sums sums(s_.learner.isa);
    for (int r = 0; r < job.rank; r += 32) {
      const bool both = job.rank > r + kTile;
      sums.clear();
      sums.add(low + r * low_pitch, both ? low + (r + kTile) * low_pitch : nullptr, low_pitch, panels,
               panels + kTile * depth, depth);
      sums.store(out, 32, both);
      for (int i = 0; i < std::min(32, job.rank - r); ++i)
        add(out + i * 32, gradient + static_cast<size_t>(r + i) * width);
    }
  }

  // `to(row, column, y)` for all of a [rows, depth] @ packed [depth, columns], with the short steps of `lows`.
  template <class To>
  void multiply(const bf16* a, size_t a_pitch, int depth, int rows, int columns, const Lows& lows, const To& to) {
    const int blocks = (rows + kRowBlock - 1) / kRowBlock, panels = columns / 32;
    const int splits = std::clamp((4 * s_.learner.threads + blocks - 1) / std::max(1, blocks), 1, panels);
    each(blocks * splits, [&](int i) {
      const int first = i / splits * kRowBlock, last = std::min(rows, first + kRowBlock);
      for (int panel = i % splits * panels / splits; panel < (i % splits + 1) * panels / splits; ++panel)
        for (int t = first; t < last; t += 32) multiply_tiles(a, a_pitch, depth, t, last, panel * 32, lows, to);
    });
  }

  template <class To>
  AMX void multiply_tiles(const bf16* a, size_t a_pitch, int depth, int t, int last, int column,
                          const Lows& lows, const To& to) {
    alignas(64) float out[32 * 32];
    const bool both = t + kTile < last;
    const bf16* b = mem_.packed + static_cast<size_t>(column) * depth;
    Sums sums(s_.learner.isa);
    sums.clear();
    sums.add(a + t * a_pitch, both ? a + (t + kTile) * a_pitch : nullptr, a_pitch, b,
             b + static_cast<size_t>(kTile) * depth, depth);
    for (const Low& low : lows) {
      if (column < low.begin || column >= low.end) continue;
      for (int half = 0; half < (both ? 2 : 1); ++half) {
        const int row = t + half * kTile, j = s_.job_of_tile[row / kTile];
        if (j < 0 || !targets(s_.jobs[j], low.linear)) continue;
        const bf16* factor = low.factors + static_cast<size_t>(j) * 3 * mem_.pack_stride +
                             static_cast<size_t>(column - low.begin) * mem_.rank;
        const bf16* rows = low.rows + row * mem_.lows;
        if (half) {
          sums.add_below(rows, mem_.lows, factor, factor + kTile * mem_.rank, mem_.rank);
        } else {
          sums.add(rows, nullptr, mem_.lows, factor, factor + kTile * mem_.rank, mem_.rank);
        }
      }
    }
    sums.store(out, 32, both);
    for (int r = 0; r < std::min(last - t, 32); ++r) to(t + r, column, out + r * 32);
  }

  AVX512 static void add(const float* y, float* to) {
    for (int i = 0; i < 32; i += 16)
      _mm512_storeu_ps(to + i, _mm512_add_ps(_mm512_loadu_ps(to + i), _mm512_load_ps(y + i)));
  }

  AVX512 static void narrow32(const float* y, bf16* to) {
    narrow16(_mm512_load_ps(y), to);
    narrow16(_mm512_load_ps(y + 16), to + 16);
  }

  AVX512 static void store(const float* y, const Matrix& w, int column, bf16* row) {
    if (!w.bias) return narrow32(y, row + column);
    for (int i = 0; i < 32; i += 16)
      narrow16(_mm512_add_ps(_mm512_load_ps(y + i), widen16(w.bias + column + i)), row + column + i);
  }

  Shared& s_;
  const Model& m_;
  const Piece& p_;
  const Memory& mem_;

 private:
  const int rank_;
  int part_ = 0;
};

#endif
