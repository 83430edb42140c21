// Attention of one whole sequence, without a cache, and its backward, for the query heads of one key head.
#pragma once

#include "attention.h"
#include "products.h"

#if defined(__x86_64__)

// Pointers to the first row of the sequence and the columns of these heads. Rows beyond the end are read, never used.
struct Attended {
  Isa isa;
  const bf16 *q, *k, *v;  // rows `stride` apart; a token's heads of the group side by side
  size_t stride;
  int length, group, dim, window;  // window: how far back a token looks, itself included; 0: to the beginning
  float scale;
  float* lse;  // [group] rows of `lse_pitch`: log of the sum of exponentials of each token
  size_t lse_pitch;
};

// out: a token's heads side by side, rows `out_stride` apart.
AMX inline void attend_whole(const Attended& a, bf16* out, size_t out_stride, std::vector<float>& scratch) {
  const int padded = rounded(a.length, kDepth);
  const size_t row_pitch = static_cast<size_t>(padded) + kTile, packed = static_cast<size_t>(padded) * a.dim / 2;
  const size_t needed = kTile * row_pitch + 2 * packed;
  if (scratch.size() < needed) scratch.resize(needed);
  float* scores = scratch.data();
  bf16* keys = reinterpret_cast<bf16*>(scores + kTile * row_pitch);
  bf16* values = keys + 2 * packed;
  for (int at = 0; at < padded; at += kTile)
    pack_rows(a.k + at * a.stride, a.stride, std::clamp(a.length - at, 0, kTile), a.dim, keys + at * a.dim);
  for (int d = 0; d < a.dim; d += 32)
    pack_columns(a.v + d, a.stride, a.length, padded, values + static_cast<size_t>(d) * padded,
                 values + static_cast<size_t>(d + kTile) * padded);
  alignas(64) float sums_out[32 * 32];
  Sums sums(a.isa);
  for (int g = 0; g < a.group; ++g)
    for (int t0 = 0; t0 < a.length; t0 += kTile) {
      const int tokens = std::min(kTile, a.length - t0);
      const int begin = a.window > 0 ? std::max(0, t0 - a.window + 1) / kDepth * kDepth : 0;
      const int end = rounded(t0 + tokens, kDepth), size = end - begin;
      const bf16* q = a.q + t0 * a.stride + g * a.dim;
      for (int at = begin; at < end; at += kDepth) {
        sums.clear();
        sums.add(q, nullptr, a.stride, keys + at * a.dim, keys + (at + kTile) * a.dim, a.dim);
        sums.store(scores + at - begin, row_pitch, false);
      }
      for (int r = 0; r < kTile; ++r) {
        float* row = scores + r * row_pitch;
        const int t = t0 + r, from = a.window > 0 ? std::max(0, t - a.window + 1) : 0;
        if (r < tokens) {
          a.lse[g * a.lse_pitch + t] = weights_of(row, from - begin, t + 1 - begin, size, a.scale);
        } else {
          std::memset(row, 0, size * sizeof(bf16));
        }
      }
      for (int d = 0; d < a.dim; d += 32) {
        const bf16* right = values + static_cast<size_t>(d) * padded + begin * kTile;
        sums.clear();
        sums.add(reinterpret_cast<bf16*>(scores), nullptr, 2 * row_pitch, right,
                 right + static_cast<size_t>(kTile) * padded, size);
        sums.store(sums_out, 32, false);
        for (int r = 0; r < tokens; ++r) {
          bf16* to = out + (t0 + r) * out_stride + g * a.dim + d;
          narrow16(_mm512_load_ps(sums_out + r * 32), to);
          narrow16(_mm512_load_ps(sums_out + r * 32 + kTile), to + kTile);
        }
      }
    }
}

// c [32, dim] += a [32, 32] b; a's rows lie side by side, b's panels are `panel` numbers apart.
AMX inline void accumulate(Sums& sums, float* c, const bf16* a, const bf16* b, size_t panel, int dim) {
  for (int d = 0; d < dim; d += 32, c += 32, b += 2 * panel) {
    sums.load(c, dim);
    sums.add(a, a + kTile * kDepth, kDepth, b, b + panel, kDepth);
    sums.store(c, dim, true);
  }
}

AVX512 inline void narrow_rows(const float* from, int rows, int dim, bf16* to, size_t stride) {
  for (int r = 0; r < rows; ++r)
    for (int d = 0; d < dim; d += kTile)
      narrow16(_mm512_loadu_ps(from + static_cast<size_t>(r) * dim + d), to + r * stride + d);
}

// What 32 keys from `key` have of the weights of 32 queries from `query`, and the gradient of their scores: [keys,
// queries] as `weights` and `slopes`, and [queries, keys] as `across`. `scores` and `gains` are [keys, queries].
AVX512 inline void slopes_of(const Attended& a, const float* lse, const float* means, int key, int query, float* scores,
                             const float* gains, bf16* weights, bf16* slopes, bf16* across) {
  const __m512 scale = _mm512_set1_ps(a.scale);
  for (int j = 0; j < kDepth; ++j)
    for (int half = 0; half < kDepth; half += kTile) {
      const int first = query + half, at = j * kDepth + half;
      // queries that look at this key: from the key's own position on, within the window, and before the end
      const int low = std::max(key + j - first, 0);
      int high = std::min(a.length - first, kTile);
      if (a.window > 0) high = std::min(high, key + j + a.window - first);
      const __mmask16 mask =
          key + j < a.length && low < high ? static_cast<__mmask16>(((1u << high) - 1) & ~((1u << low) - 1)) : 0;
      const __m512 s = _mm512_mul_ps(_mm512_load_ps(scores + at), scale);
      const __m512 p = _mm512_maskz_mov_ps(mask, fast_exp16(_mm512_sub_ps(s, _mm512_loadu_ps(lse + first))));
      const __m512 gain = _mm512_sub_ps(_mm512_load_ps(gains + at), _mm512_loadu_ps(means + first));
      const __m512 slope = _mm512_maskz_mul_ps(mask, _mm512_mul_ps(p, gain), scale);
      narrow16(p, weights + at);
      narrow16(slope, slopes + at);
      _mm512_store_ps(scores + at, slope);
    }
  for (int i = 0; i < kDepth; i += kTile)
    for (int j = 0; j < kDepth; j += kTile) {
      __m512i block[kTile];
      for (int r = 0; r < kTile; ++r) block[r] = _mm512_load_si512(scores + (j + r) * kDepth + i);
      transpose16(block);
      for (int r = 0; r < kTile; ++r) narrow16(_mm512_castsi512_ps(block[r]), across + (i + r) * kDepth + j);
    }
}

// From the gradient of `out`, as `attend_whole` made it, to those of q, k and v, which lie as q, k and v do.
AMX inline void attend_backward(const Attended& a, const bf16* out, const bf16* gradient, size_t out_stride, bf16* gq,
                                bf16* gk, bf16* gv, std::vector<float>& scratch) {
  const int padded = rounded(a.length, kDepth), dim = a.dim;
  const size_t size = static_cast<size_t>(padded) * dim;
  const size_t needed = a.group * (size + padded + 2 * size) + 2 * kDepth * dim + size / 2 + 64;
  if (scratch.size() < needed) scratch.resize(needed);
  float* dq = scratch.data();          // [group, padded, dim]
  float* means = dq + a.group * size;  // [group, padded] of the gradient, weighted as the values were
  float *dk = means + a.group * padded, *dv = dk + kDepth * dim;  // [32, dim]
  bf16* packed = reinterpret_cast<bf16*>(dv + kDepth * dim);      // [group] of the four that follow
  bf16* keys = packed + a.group * 4 * size;                       // to be summed over keys
  std::fill(dq, dq + a.group * size, 0.0f);
  for (int d = 0; d < dim; d += 32)
    pack_columns(a.k + d, a.stride, a.length, padded, keys + static_cast<size_t>(d) * padded,
                 keys + static_cast<size_t>(d + kTile) * padded);
  for (int g = 0; g < a.group; ++g) {
    bf16 *queries = packed + g * 4 * size, *gradients = queries + size;            // to be summed over dims
    bf16 *over_queries = gradients + size, *over_gradients = over_queries + size;  // over queries
    for (int at = 0; at < padded; at += kTile) {
      const int rows = std::clamp(a.length - at, 0, kTile);
      pack_rows(a.q + at * a.stride + g * dim, a.stride, rows, dim, queries + at * dim);
      pack_rows(gradient + at * out_stride + g * dim, out_stride, rows, dim, gradients + at * dim);
    }
    for (int d = 0; d < dim; d += 32) {
      const size_t left = static_cast<size_t>(d) * padded, right = left + static_cast<size_t>(kTile) * padded;
      pack_columns(a.q + g * dim + d, a.stride, a.length, padded, over_queries + left, over_queries + right);
      pack_columns(gradient + g * dim + d, out_stride, a.length, padded, over_gradients + left, over_gradients + right);
    }
    for (int t = 0; t < padded; ++t) {
      __m512 sum = _mm512_setzero_ps();
      if (t < a.length)
        for (int d = 0; d < dim; d += kTile) {
          const size_t at = t * out_stride + g * dim + d;
          sum = _mm512_fmadd_ps(widen16(out + at), widen16(gradient + at), sum);
        }
      means[g * padded + t] = _mm512_reduce_add_ps(sum);
    }
  }
  alignas(64) float scores[32 * 32], gains[32 * 32];
  alignas(64) bf16 weights[32 * 32], slopes[32 * 32], across[32 * 32];
  const size_t panel = static_cast<size_t>(kTile) * padded;
  Sums sums(a.isa);
  for (int key = 0; key < a.length; key += kDepth) {
    std::fill(dk, dk + 2 * kDepth * dim, 0.0f);
    const int last = a.window > 0 ? std::min(a.length, key + kDepth - 1 + a.window) : a.length;
    for (int g = 0; g < a.group; ++g) {
      const bf16 *queries = packed + g * 4 * size, *gradients = queries + size;
      for (int query = key; query < last; query += kDepth) {
        sums.clear();
        sums.add(a.k + key * a.stride, a.k + (key + kTile) * a.stride, a.stride, queries + query * dim,
                 queries + (query + kTile) * dim, dim);
        sums.store(scores, 32, true);
        sums.clear();
        sums.add(a.v + key * a.stride, a.v + (key + kTile) * a.stride, a.stride, gradients + query * dim,
                 gradients + (query + kTile) * dim, dim);
        sums.store(gains, 32, true);
        slopes_of(a, a.lse + g * a.lse_pitch, means + g * padded, key, query, scores, gains, weights, slopes, across);
        accumulate(sums, dv, weights, gradients + 2 * size + query * kTile, panel, dim);
        accumulate(sums, dk, slopes, gradients + size + query * kTile, panel, dim);
        accumulate(sums, dq + g * size + static_cast<size_t>(query) * dim, across, keys + key * kTile, panel, dim);
      }
    }
    const int rows = std::min(kDepth, a.length - key);
    narrow_rows(dk, rows, dim, gk + key * a.stride, a.stride);
    narrow_rows(dv, rows, dim, gv + key * a.stride, a.stride);
  }
  for (int g = 0; g < a.group; ++g) narrow_rows(dq + g * size, a.length, dim, gq + g * dim, a.stride);
}

#endif
