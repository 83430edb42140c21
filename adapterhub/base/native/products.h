// Products of bf16 matrices, as training needs them: c[m, n] = sum over k of a[m, k] b[k, n], sums in fp32.
//
// The left operand lies row by row as it is. The right one is packed into panels of 16 columns, in each of which the
// pairs (b[k, n], b[k + 1, n]) of the columns lie side by side: a tile of 32 k by 16 columns is one piece of memory.
// Rows of c depend on their own row of a alone. All depths are multiples of 32, all columns of 16.
#pragma once

#include "linear.h"

#if defined(__x86_64__)

constexpr int kTile = 16, kDepth = 32;

inline int rounded(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Numbers from one row to the next. Never a power of two: rows that are one apart would share a few lines of the cache.
inline size_t pitch(int width) { return static_cast<size_t>(width) + 32; }

// One panel, whose columns are 16 rows of w [16, depth], of which `rows` are there.
AVX512 inline void pack_rows(const bf16* w, size_t stride, int rows, int depth, bf16* panel) {
  for (int k = 0; k < depth; k += kDepth) {
    __m512i v[kTile];
    for (int i = 0; i < kTile; ++i) v[i] = i < rows ? _mm512_loadu_si512(w + i * stride + k) : _mm512_setzero_si512();
    transpose16(v);
    for (int i = 0; i < kTile; ++i) _mm512_storeu_si512(panel + k * kTile + i * 32, v[i]);
  }
}

// Two panels, whose columns are 32 columns of w [depth, 32], of which `rows` rows are there.
AVX512 inline void pack_columns(const bf16* w, size_t stride, int rows, int depth, bf16* left, bf16* right) {
  for (int k = 0; k < depth; k += 2) {
    const __m512i a = k < rows ? _mm512_loadu_si512(w + k * stride) : _mm512_setzero_si512();
    const __m512i b = k + 1 < rows ? _mm512_loadu_si512(w + (k + 1) * stride) : _mm512_setzero_si512();
    interleave(a, b, left + k * kTile, right + k * kTile);
  }
}

// Sums of up to 32 rows by 32 columns: with AMX in tiles 0 to 3, of which 1 and 3 mean nothing where there are only 16
// columns; else in memory, eight rows at a time in registers.
class Sums {
 public:
  explicit Sums(Isa isa) : tiles_(isa == kAmx) {}

  AMX void clear() {
    if (!tiles_) {
      std::memset(sums_, 0, sizeof(sums_));
      return;
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // All 32 rows, which lie `pitch` apart.
  AMX void load(const float* from, size_t pitch) {
    if (!tiles_) {
      for (int i = 0; i < 32; ++i) std::memcpy(sums_[i], from + i * pitch, sizeof(sums_[i]));
      return;
    }
    const int bytes = static_cast<int>(pitch * sizeof(float));
    _tile_loadd(0, from, bytes);
    _tile_loadd(1, from + kTile, bytes);
    _tile_loadd(2, from + kTile * pitch, bytes);
    _tile_loadd(3, from + kTile * pitch + kTile, bytes);
  }

  // Rows from a0 and from a1 (null: 16 rows in all), panels at b0 and b1.
  AMX void add(const bf16* a0, const bf16* a1, size_t stride, const bf16* b0, const bf16* b1, int depth) {
    if (!tiles_) {
      add_rows(0, a0, stride, b0, b1, depth);
      if (a1) add_rows(kTile, a1, stride, b0, b1, depth);
      return;
    }
    const int bytes = static_cast<int>(stride * sizeof(bf16));
    if (!a1) {
      for (int k = 0; k < depth; k += kDepth) {
        _tile_loadd(4, a0 + k, bytes);
        _tile_loadd(6, b0 + k * kTile, 64);
        _tile_loadd(7, b1 + k * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      return;
    }
    for (int k = 0; k < depth; k += kDepth) {
      _tile_loadd(4, a0 + k, bytes);
      _tile_loadd(6, b0 + k * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b1 + k * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a1 + k, bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  // Adds to the second 16 rows alone.
  AMX void add_below(const bf16* a, size_t stride, const bf16* b0, const bf16* b1, int depth) {
    if (!tiles_) return add_rows(kTile, a, stride, b0, b1, depth);
    for (int k = 0; k < depth; k += kDepth) {
      _tile_loadd(5, a + k, static_cast<int>(stride * sizeof(bf16)));
      _tile_loadd(6, b0 + k * kTile, 64);
      _tile_loadd(7, b1 + k * kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  // To rows that lie `pitch` apart; `both`: the second 16 rows too.
  AMX void store(float* to, size_t pitch, bool both) const {
    if (!tiles_) {
      for (int i = 0; i < (both ? 32 : kTile); ++i) std::memcpy(to + i * pitch, sums_[i], sizeof(sums_[i]));
      return;
    }
    const int bytes = static_cast<int>(pitch * sizeof(float));
    _tile_stored(0, to, bytes);
    _tile_stored(1, to + kTile, bytes);
    if (!both) return;
    _tile_stored(2, to + kTile * pitch, bytes);
    _tile_stored(3, to + kTile * pitch + kTile, bytes);
  }

 private:
  // Adds to the 16 rows from `first` on.
  AVX512 void add_rows(int first, const bf16* a, size_t stride, const bf16* b0, const bf16* b1, int depth) {
    constexpr int kRows = 8;  // whose sums, in two vectors each, take half of the registers
    for (int at = 0; at < kTile; at += kRows, a += kRows * stride) {
      float(*sums)[32] = sums_ + first + at;
      __m512 left[kRows], right[kRows];
      for (int i = 0; i < kRows; ++i) {
        left[i] = _mm512_load_ps(sums[i]);
        right[i] = _mm512_load_ps(sums[i] + kTile);
      }
      for (int k = 0; k < depth; k += 2) {
        const __m512bh l = load32(b0 + k * kTile), r = load32(b1 + k * kTile);
        for (int i = 0; i < kRows; ++i) {
          int32_t pair;
          std::memcpy(&pair, a + i * stride + k, sizeof(pair));
          const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
          left[i] = _mm512_dpbf16_ps(left[i], x, l);
          right[i] = _mm512_dpbf16_ps(right[i], x, r);
        }
      }
      for (int i = 0; i < kRows; ++i) {
        _mm512_store_ps(sums[i], left[i]);
        _mm512_store_ps(sums[i] + kTile, right[i]);
      }
    }
  }

  const bool tiles_;
  alignas(64) float sums_[32][32];  // where there are no tiles
};

AVX512 inline void narrow16(__m512 x, bf16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

#endif
