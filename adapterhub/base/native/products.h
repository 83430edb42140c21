// Products of bf16 matrices with AMX, as training needs them: c[m, n] = sum over k of a[m, k] b[k, n], sums in fp32.
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

// Sums of up to 32 rows by 32 columns, in tiles 0 to 3; where there are only 16 columns, tiles 1 and 3 mean nothing.
class Sums {
 public:
  AMX void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // Rows from a0 and from a1 (null: 16 rows in all), panels at b0 and b1.
  AMX void add(const bf16* a0, const bf16* a1, size_t stride, const bf16* b0, const bf16* b1, int depth) {
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
    for (int k = 0; k < depth; k += kDepth) {
      _tile_loadd(5, a + k, static_cast<int>(stride * sizeof(bf16)));
      _tile_loadd(6, b0 + k * kTile, 64);
      _tile_loadd(7, b1 + k * kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  // out [32, 32]; `both`: the second 16 rows too.
  AMX void store(float* out, bool both) {
    _tile_stored(0, out, 32 * sizeof(float));
    _tile_stored(1, out + kTile, 32 * sizeof(float));
    if (!both) return;
    _tile_stored(2, out + kTile * 32, 32 * sizeof(float));
    _tile_stored(3, out + kTile * 32 + kTile, 32 * sizeof(float));
  }
};

AVX512 inline void narrow16(__m512 x, bf16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

#endif
