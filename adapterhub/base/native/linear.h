// y[t, n] = sum over k of x[t, k] * w[n, k]: activations in bf16, sums and results in fp32.
//
// The weights stay as torch has them, row by row, so that training and the torch path use the very same memory. With
// AMX, a tile of 16 weight rows by 32 columns is the left operand as it lies, and the few activations are rearranged.
// Quantized weights are multiplied in integers (integer.h) where the processor has instructions for it, and elsewhere
// expanded to bf16 a few rows at a time, into memory that stays in the core's cache.
#pragma once

#include <vector>

#include "simd.h"

enum Format { kBf16 = 0, kInt8 = 1, kInt4 = 2 };

constexpr int kGroup = 32;  // columns that share a scale and a minimum

// Quantized: w = scale * q + minimum, in groups of 32 columns; int4 packs columns 2i and 2i + 1 into byte i, the even
// one low. Int8 has q in [-128, 127], int4 in [0, 15].
struct Matrix {
  const void* data;        // [rows, cols]
  const bf16* bias;        // [rows], or null
  const bf16 *scales, *minima;  // [rows, cols / 32] where quantized
  int rows, cols;
  int format;
};

inline const bf16* plain_row(const Matrix& w, int row) {
  return static_cast<const bf16*>(w.data) + static_cast<size_t>(row) * w.cols;
}

EVERYWHERE inline void expand_int8(const Matrix& w, int first, int last, bf16* out) {
  for (int n = first; n < last; ++n)
    for (int g = 0; g < w.cols / kGroup; ++g, out += kGroup) {
      const size_t at = static_cast<size_t>(n) * (w.cols / kGroup) + g;
      const float scale = widen(w.scales[at]), minimum = widen(w.minima[at]);
      const int8_t* q = static_cast<const int8_t*>(w.data) + at * kGroup;
      for (int i = 0; i < kGroup; ++i) out[i] = narrow_finite(q[i] * scale + minimum);
    }
}

EVERYWHERE inline void expand_int4(const Matrix& w, int first, int last, bf16* out) {
  for (int n = first; n < last; ++n)
    for (int g = 0; g < w.cols / kGroup; ++g, out += kGroup) {
      const size_t at = static_cast<size_t>(n) * (w.cols / kGroup) + g;
      const float scale = widen(w.scales[at]), minimum = widen(w.minima[at]);
      const uint8_t* q = static_cast<const uint8_t*>(w.data) + at * (kGroup / 2);
      for (int i = 0; i < kGroup / 2; ++i) {
        out[2 * i] = narrow_finite((q[i] & 15) * scale + minimum);
        out[2 * i + 1] = narrow_finite((q[i] >> 4) * scale + minimum);
      }
    }
}

constexpr int kPanel = 64;  // weight rows in one piece of work

EVERYWHERE inline void linear_portable(const Matrix& w, const bf16* x, int tokens, float* y, int stride, int first,
                                       int last) {
  for (int t = 0; t < tokens; ++t) {
    const bf16* xt = x + static_cast<size_t>(t) * w.cols;
    for (int n = first; n < last; ++n) {
      const bf16* wn = plain_row(w, n);
      float sum = 0;
      for (int k = 0; k < w.cols; ++k) sum += widen(xt[k]) * widen(wn[k]);
      y[static_cast<size_t>(t) * stride + n - first] = sum;
    }
  }
}

#if defined(__x86_64__)
// Four weight rows by up to four tokens at a time; 16 sums in registers.
AVX512 inline void linear_avx512(const Matrix& w, const bf16* x, int tokens, float* y, int stride, int first,
                                 int last) {
  const int whole = w.cols & ~31, rest = w.cols & 31;
  alignas(64) float out[16];
  for (int n = first; n < last; n += 4) {
    const int rows = last - n < 4 ? last - n : 4;
    const bf16* wp[4];
    for (int i = 0; i < 4; ++i) wp[i] = plain_row(w, n + (i < rows ? i : 0));
    for (int t = 0; t < tokens; t += 4) {
      const int count = tokens - t < 4 ? tokens - t : 4;
      const bf16* xp[4];
      for (int j = 0; j < 4; ++j) xp[j] = x + static_cast<size_t>(t + (j < count ? j : 0)) * w.cols;
      __m512 acc[16];
      for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
      if (count == 1) {
        for (int k = 0; k < whole; k += 32) {
          const __m512bh v = load32(xp[0] + k);
          for (int i = 0; i < 4; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], load32(wp[i] + k), v);
        }
        if (rest)
          for (int i = 0; i < 4; ++i)
            acc[i] = _mm512_dpbf16_ps(acc[i], load32(wp[i] + whole, rest), load32(xp[0] + whole, rest));
      } else {
        for (int k = 0; k < whole; k += 32) {
          __m512bh wv[4];
          for (int i = 0; i < 4; ++i) wv[i] = load32(wp[i] + k);
          for (int j = 0; j < 4; ++j) {
            const __m512bh v = load32(xp[j] + k);
            for (int i = 0; i < 4; ++i) acc[4 * j + i] = _mm512_dpbf16_ps(acc[4 * j + i], wv[i], v);
          }
        }
        if (rest)
          for (int j = 0; j < 4; ++j)
            for (int i = 0; i < 4; ++i)
              acc[4 * j + i] =
                  _mm512_dpbf16_ps(acc[4 * j + i], load32(wp[i] + whole, rest), load32(xp[j] + whole, rest));
      }
      _mm512_store_ps(out, sums_of(acc));
      for (int j = 0; j < count; ++j)
        std::memcpy(y + static_cast<size_t>(t + j) * stride + n - first, out + 4 * j, sizeof(float) * rows);
    }
  }
}

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

AMX inline void amx_begin() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}

AMX inline void amx_end() { _tile_release(); }

// Activations for AMX, columns [first, last) of one group of 16 tokens: for each pair of columns the pairs of the 16
// tokens side by side, zeros for tokens that are not there. `packed` is [groups, cols / 2, 16] pairs.
AMX inline void pack_for_amx(const bf16* x, int tokens, int cols, int group, int first, int last, bf16* packed) {
  const int here = tokens - group * 16 < 16 ? tokens - group * 16 : 16;
  const __mmask16 mask = static_cast<__mmask16>((1u << here) - 1);
  const __m512i index = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                           _mm512_set1_epi32(cols / 2));
  const bf16* from = x + static_cast<size_t>(group) * 16 * cols;
  bf16* to = packed + static_cast<size_t>(group) * 16 * cols;
  for (int k = first; k < last; k += 2)
    _mm512_storeu_si512(to + k * 16, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, index, from + k, 4));
}

// y[t0 .. t0+15, n .. n+15] from a tile that has weight rows down and tokens across.
AMX inline void store_transposed(const float* tile, float* y, int stride, int count) {
  __m512i index = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                     _mm512_set1_epi32(16));
  for (int t = 0; t < count; ++t)
    _mm512_storeu_ps(y + static_cast<size_t>(t) * stride, _mm512_i32gather_ps(index, tile + t, 4));
}

// Needs cols % 32 == 0, and last - first a multiple of 16; two weight tiles by two token tiles. A tile reads 16 rows at a
// time, a pattern that the processor does not foresee, so the rows that come next, which lie in one piece, are fetched
// ahead: after the last of these, those from row `next`.
AMX inline void linear_amx(const Matrix& w, const bf16* packed, int tokens, float* y, int stride, int first, int last,
                           int next) {
  const int row_bytes = w.cols * 2, groups = (tokens + 15) / 16;
  alignas(64) float tile[4][256];
  for (int n = first; n < last; n += 32) {
    const bf16* w0 = plain_row(w, n);
    const bool two = n + 16 < last;
    const char* ahead = reinterpret_cast<const char*>(plain_row(w, n + 32 < last ? n + 32 : next));
    const bf16* w1 = two ? w0 + static_cast<size_t>(16) * w.cols : w0;
    for (int g = 0; g < groups; g += 2) {
      const bool pair = g + 1 < groups;
      const bf16* x0 = packed + static_cast<size_t>(g) * w.cols * 16;
      const bf16* x1 = pair ? x0 + static_cast<size_t>(w.cols) * 16 : x0;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      if (pair) {
        for (int k = 0; k < w.cols; k += 32) {
          _tile_loadd(4, w0 + k, row_bytes);
          _tile_loadd(5, w1 + k, row_bytes);
          _tile_loadd(6, x0 + k * 16, 64);
          _tile_loadd(7, x1 + k * 16, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 5, 6);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      } else {
        for (int k = 0; k < w.cols; k += 32) {
          for (int line = 0; line < 32; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
          _tile_loadd(4, w0 + k, row_bytes);
          _tile_loadd(5, w1 + k, row_bytes);
          _tile_loadd(6, x0 + k * 16, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 5, 6);
        }
      }
      _tile_stored(0, tile[0], 64);
      _tile_stored(1, tile[1], 64);
      if (pair) {
        _tile_stored(2, tile[2], 64);
        _tile_stored(3, tile[3], 64);
      }
      for (int half = 0; half < (pair ? 2 : 1); ++half) {
        const int t = (g + half) * 16, count = tokens - t < 16 ? tokens - t : 16;
        float* to = y + static_cast<size_t>(t) * stride + n - first;
        store_transposed(tile[2 * half], to, stride, count);
        if (two) store_transposed(tile[2 * half + 1], to + 16, stride, count);
      }
    }
  }
}
#endif

inline bool fits_amx(const Matrix& w) { return w.cols % 32 == 0 && w.rows % 16 == 0; }

inline void expand(const Matrix& w, int first, int last, bf16* out) {
  (w.format == kInt8 ? expand_int8 : expand_int4)(w, first, last, out);
}

inline void add_bias(const Matrix& w, int tokens, float* y, int first, int last) {
  if (w.bias)
    for (int t = 0; t < tokens; ++t)
      for (int n = first; n < last; ++n) y[static_cast<size_t>(t) * w.rows + n] += widen(w.bias[n]);
}

// y[:, 0 .. last - first) with rows [first, last) of plain weights; y has a row of `stride` numbers for each token.
inline void linear_plain(Isa isa, const Matrix& w, const bf16* x, const bf16* packed, int tokens, float* y, int stride,
                         int first, int last, int next) {
#if defined(__x86_64__)
  if (isa == kAmx && w.cols % 32 == 0 && (last - first) % 16 == 0)
    return linear_amx(w, packed, tokens, y, stride, first, last, next);
  if (isa >= kAvx512) return linear_avx512(w, x, tokens, y, stride, first, last);
#endif
  linear_portable(w, x, tokens, y, stride, first, last);
}

// y[:, first .. last) with rows [first, last) of the weights, for all tokens. `packed` is `pack_for_amx` of x where that
// is used; `next` is the row that the same thread is likely to begin with after these.
inline void linear_rows(Isa isa, const Matrix& w, const bf16* x, const bf16* packed, int tokens, float* y, int first,
                        int last, int next) {
  if (w.format == kBf16) {
    linear_plain(isa, w, x, packed, tokens, y + first, w.rows, first, last, next);
  } else {
    constexpr int kRows = 32;
    static thread_local std::vector<bf16> expanded;
    expanded.resize(static_cast<size_t>(kRows) * w.cols);
    for (int n = first; n < last; n += kRows) {
      const int rows = last - n < kRows ? last - n : kRows;
      expand(w, n, n + rows, expanded.data());
      const Matrix part{expanded.data(), nullptr, nullptr, nullptr, rows, w.cols, kBf16};
      linear_plain(isa, part, x, packed, tokens, y + n, w.rows, 0, rows, 0);
    }
  }
  add_bias(w, tokens, y, first, last);
}
