// Attention over the paged KV cache, for neighbouring tokens of one sequence and the query heads that share a key head.
//
// A cache layer is [slots, kv_heads, dim] in bf16; a sequence's table lists its blocks of `kBlock` slots. What a token
// gets does not depend on which others are done with it.
#pragma once

#include <algorithm>
#include <vector>

#include "linear.h"

constexpr int kBlock = 16;

struct Heads {
  int kv_heads, group, dim, value_dim;
  float scale;
};

inline const bf16* cache_row(const bf16* cache, const int32_t* table, int at, int kv_heads, int head, int dim) {
  const int64_t slot = static_cast<int64_t>(table[at / kBlock]) * kBlock + at % kBlock;
  return cache + (slot * kv_heads + head) * dim;
}

EVERYWHERE inline void softmax(float* scores, int count) {
  float top = scores[0];
  for (int i = 1; i < count; ++i) top = scores[i] > top ? scores[i] : top;
  float sum = 0;
  for (int i = 0; i < count; ++i) {
    scores[i] = fast_exp(scores[i] - top);
    sum += scores[i];
  }
  const float inverse = 1.0f / sum;
  for (int i = 0; i < count; ++i) scores[i] *= inverse;
}

EVERYWHERE inline void scores_portable(const Heads& h, const bf16* q, const bf16* cache, const int32_t* table, int head,
                                       int from, int to, float* scores, int stride) {
  for (int at = from; at < to; ++at) {
    const bf16* k = cache_row(cache, table, at, h.kv_heads, head, h.dim);
    for (int g = 0; g < h.group; ++g) {
      float sum = 0;
      for (int d = 0; d < h.dim; ++d) sum += widen(q[g * h.dim + d]) * widen(k[d]);
      scores[static_cast<size_t>(g) * stride + at - from] = sum * h.scale;
    }
  }
}

EVERYWHERE inline void weigh_portable(const Heads& h, const bf16* cache, const int32_t* table, int head, int from, int to,
                                      const float* weights, int stride, float* out) {
  for (int i = 0; i < h.group * h.value_dim; ++i) out[i] = 0;
  for (int at = from; at < to; ++at) {
    const bf16* v = cache_row(cache, table, at, h.kv_heads, head, h.value_dim);
    for (int g = 0; g < h.group; ++g) {
      const float weight = weights[static_cast<size_t>(g) * stride + at - from];
      for (int d = 0; d < h.value_dim; ++d) out[g * h.value_dim + d] += weight * widen(v[d]);
    }
  }
}

#if defined(__x86_64__)
// 16 keys at a time, so that their 16 sums are one vector. Needs dim % 32 == 0.
AVX512 inline void scores_avx512(const Heads& h, const bf16* q, const bf16* cache, const int32_t* table, int head,
                                 int from, int to, float* scores, int stride) {
  const __m512 scale = _mm512_set1_ps(h.scale);
  for (int at = from; at < to; at += 16) {
    const int count = to - at < 16 ? to - at : 16;
    const bf16* k[16];
    for (int i = 0; i < 16; ++i) k[i] = cache_row(cache, table, i < count ? at + i : at, h.kv_heads, head, h.dim);
    for (int g = 0; g < h.group; ++g) {
      __m512 acc[16];
      for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
      for (int d = 0; d < h.dim; d += 32) {
        const __m512bh v = load32(q + g * h.dim + d);
        for (int i = 0; i < 16; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], load32(k[i] + d), v);
      }
      _mm512_mask_storeu_ps(scores + static_cast<size_t>(g) * stride + at - from,
                            static_cast<__mmask16>((1u << count) - 1), _mm512_mul_ps(sums_of(acc), scale));
    }
  }
}

// Up to four heads by 64 dims at a time: 16 sums in registers, each value read once for the four. Needs value_dim % 16 == 0.
AVX512 inline void weigh_avx512(const Heads& h, const bf16* cache, const int32_t* table, int head, int from, int to,
                                const float* weights, int stride, float* out) {
  for (int first = 0; first < h.group; first += 4) {
    const int heads = h.group - first < 4 ? h.group - first : 4;
    for (int d = 0; d < h.value_dim; d += 64) {
      const int vectors = (h.value_dim - d < 64 ? h.value_dim - d : 64) / 16;
      __m512 acc[4][4];
      for (int g = 0; g < 4; ++g)
        for (int i = 0; i < 4; ++i) acc[g][i] = _mm512_setzero_ps();
      for (int at = from; at < to; ++at) {
        const bf16* v = cache_row(cache, table, at, h.kv_heads, head, h.value_dim) + d;
        for (int i = 0; i < vectors; ++i) {
          const __m512 value = widen16(v + 16 * i);
          for (int g = 0; g < heads; ++g) {
            const float weight = weights[static_cast<size_t>(first + g) * stride + at - from];
            acc[g][i] = _mm512_fmadd_ps(_mm512_set1_ps(weight), value, acc[g][i]);
          }
        }
      }
      for (int g = 0; g < heads; ++g)
        for (int i = 0; i < vectors; ++i)
          _mm512_storeu_ps(out + static_cast<size_t>(first + g) * h.value_dim + d + 16 * i, acc[g][i]);
    }
  }
}
#endif

// Neighbouring tokens of one sequence; the first is at position `context - 1`, and each looks `window` positions back,
// itself included (0: to the beginning). q and out have a token's heads of all groups: rows of `stride` numbers.
struct Queries {
  const bf16* q;
  float* out;
  int tokens, context, window;
  size_t q_stride, out_stride;
  const int32_t* table;

  int from(int t) const { return window > 0 && context + t > window ? context + t - window : 0; }
};

// A NaN score would be lost in the exponential; it is in the token's residual as well, where it shows.
inline void attend_token(Isa isa, const Heads& h, const Queries& o, int t, const bf16* keys, const bf16* values, int head,
                         std::vector<float>& scratch) {
  const bf16* q = o.q + t * o.q_stride;
  float* out = o.out + t * o.out_stride;
  const int from = o.from(t), context = o.context + t, count = context - from;
  if (scratch.size() < static_cast<size_t>(h.group) * count) scratch.resize(static_cast<size_t>(h.group) * count);
#if defined(__x86_64__)
  const bool wide = isa >= kAvx512 && h.dim % 32 == 0 && h.value_dim % 16 == 0;
  if (wide) {
    scores_avx512(h, q, keys, o.table, head, from, context, scratch.data(), count);
  } else {
    scores_portable(h, q, keys, o.table, head, from, context, scratch.data(), count);
  }
#else
  scores_portable(h, q, keys, o.table, head, from, context, scratch.data(), count);
#endif
  for (int g = 0; g < h.group; ++g) softmax(scratch.data() + static_cast<size_t>(g) * count, count);
#if defined(__x86_64__)
  if (wide) return weigh_avx512(h, values, o.table, head, from, context, scratch.data(), count, out);
#endif
  weigh_portable(h, values, o.table, head, from, context, scratch.data(), count, out);
}

#if defined(__x86_64__)
constexpr int kKeys = 32;  // that one AMX product sums over

// Where the key or value of the `at`-th position lies; past the last block that of the last one, whose weight is 0.
inline const bf16* padded_row(const Heads& h, const bf16* cache, const int32_t* table, int at, int end, int head,
                              int dim) {
  const int last = (end + kBlock - 1) / kBlock * kBlock - 1;
  return cache_row(cache, table, at < last ? at : last, h.kv_heads, head, dim);
}

// Sixteen keys from `at` as the right operand of a product with queries: [dim / 32][16 pairs of dims][16 keys].
AVX512 inline void pack_keys(const Heads& h, const bf16* keys, const int32_t* table, int at, int end, int head,
                             bf16* out) {
  for (int d = 0; d < h.dim; d += 32) {
    __m512i v[16];
    for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(padded_row(h, keys, table, at + i, end, head, h.dim) + d);
    transpose16(v);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + d * 16 + i * 32, v[i]);
  }
}

// Thirty-two values from `at` as the right operand of a product with weights: [dim / 16][16 pairs of keys][16 dims].
AVX512 inline void pack_values(const Heads& h, const bf16* values, const int32_t* table, int at, int end, int head,
                               bf16* out) {
  for (int i = 0; i < kKeys; i += 2) {
    const bf16* even = padded_row(h, values, table, at + i, end, head, h.value_dim);
    const bf16* odd = padded_row(h, values, table, at + i + 1, end, head, h.value_dim);
    for (int d = 0; d < h.value_dim; d += 32)
      interleave(_mm512_loadu_si512(even + d), _mm512_loadu_si512(odd + d), out + d * kKeys + i * 16,
                 out + (d + 16) * kKeys + i * 16);
  }
}

// Scores [from, to) of a row of `size` become weights, the softmax of `scale` times them, as bf16 in the same memory; 0
// elsewhere. from < 32, and what a row has of weights does not depend on its size. Returns the logarithm of the sum of the
// exponentials.
AVX512 inline float weights_of(float* row, int from, int to, int size, float scale) {
  const auto inside = [&](int at) {
    const uint32_t below = to - at >= 16 ? 0xffff : (1u << (to - at)) - 1;
    return static_cast<__mmask16>(from <= at ? below : from - at >= 16 ? 0 : below & (0xffffu << (from - at)));
  };
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int at = 0; at < to; at += 16) top = _mm512_mask_max_ps(top, inside(at), top, _mm512_loadu_ps(row + at));
  const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top)), factor = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (int at = 0; at < to; at += 16) {
    const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + at), most), factor);
    const __m512 e = _mm512_maskz_mov_ps(inside(at), fast_exp16(x));
    sum = _mm512_add_ps(sum, e);
    _mm512_storeu_ps(row + at, e);
  }
  const float total = _mm512_reduce_add_ps(sum);
  const __m512 inverse = _mm512_set1_ps(1.0f / total);
  bf16* out = reinterpret_cast<bf16*>(row);  // each number is read before its place is written
  int at = 0;
  for (; at < to; at += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at),
                        (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(row + at), inverse)));
  for (; at < size; at += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), _mm256_setzero_si256());
  return _mm512_cvtss_f32(most) * scale + std::log(total);
}

inline bool fits_amx(const Heads& h) { return h.dim % 32 == 0 && h.value_dim % 32 == 0; }

// All tokens at once: a token's heads are rows of products with 16 keys, then with 32 values. Sums go from the first
// position on in steps that do not depend on the tokens. Needs `fits_amx`.
AMX inline void attend_amx(const Heads& h, const Queries& o, const bf16* keys, const bf16* values, int head,
                           std::vector<float>& scratch) {
  const int rows = o.tokens * h.group, tiles = (rows + 15) / 16, end = o.context + o.tokens - 1;
  const int begin = o.from(0) / kKeys * kKeys, stride = (end - begin + kKeys - 1) / kKeys * kKeys;
  const int pitch = stride + 16;  // rows that are a power of two apart would share a few lines of the cache
  const size_t scores_size = static_cast<size_t>(tiles) * 16 * pitch, query_size = static_cast<size_t>(tiles) * 8 * h.dim;
  const size_t values_size = static_cast<size_t>(stride) * h.value_dim / 2, keys_size = static_cast<size_t>(8) * h.dim;
  const size_t needed = scores_size + query_size + values_size + keys_size;
  if (scratch.size() < needed) scratch.resize(needed);
  float* scores = scratch.data();
  bf16* query = reinterpret_cast<bf16*>(scores + scores_size);
  bf16* packed = query + 2 * query_size;
  bf16* packed_keys = packed + 2 * values_size;
  for (int r = 0; r < tiles * 16; ++r) {
    const bf16* from = o.q + (r / h.group) * o.q_stride + static_cast<size_t>(r % h.group) * h.dim;
    if (r < rows) {
      std::memcpy(query + static_cast<size_t>(r) * h.dim, from, h.dim * sizeof(bf16));
    } else {
      std::memset(query + static_cast<size_t>(r) * h.dim, 0, h.dim * sizeof(bf16));
    }
  }
  for (int at = begin; at < end; at += 16) {
    pack_keys(h, keys, o.table, at, end, head, packed_keys);
    for (int i = 0; i < tiles; ++i) {
      const int last = (std::min(rows, i * 16 + 16) - 1) / h.group;
      if (at >= o.context + last) continue;  // all of it lies ahead of these tokens
      _tile_zero(0);
      for (int d = 0; d < h.dim; d += 32) {
        _tile_loadd(4, query + static_cast<size_t>(i) * 16 * h.dim + d, h.dim * 2);
        _tile_loadd(6, packed_keys + d * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, scores + static_cast<size_t>(i) * 16 * pitch + at - begin, pitch * 4);
    }
  }
  for (int r = 0; r < tiles * 16; ++r) {
    float* row = scores + static_cast<size_t>(r) * pitch;
    const int t = r / h.group;
    if (r < rows) {
      weights_of(row, o.from(t) - begin, o.context + t - begin, stride, h.scale);
    } else {
      std::memset(row, 0, stride * sizeof(bf16));
    }
  }
  for (int at = 0; at < stride; at += kKeys)
    pack_values(h, values, o.table, begin + at, end, head, packed + static_cast<size_t>(at) * h.value_dim);
  alignas(64) float tile[256];
  for (int i = 0; i < tiles; ++i) {
    const int last = (std::min(rows, i * 16 + 16) - 1) / h.group, keys_here = o.context + last - begin;
    for (int d = 0; d < h.value_dim; d += 32) {
      _tile_zero(0);
      _tile_zero(1);
      for (int at = 0; at < keys_here; at += kKeys) {
        const bf16* right = packed + static_cast<size_t>(at) * h.value_dim + d * kKeys;
        _tile_loadd(4, reinterpret_cast<bf16*>(scores + static_cast<size_t>(i) * 16 * pitch) + at, pitch * 4);
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + 16 * kKeys, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      for (int half = 0; half < 2; ++half) {
        if (half) {
          _tile_stored(1, tile, 64);
        } else {
          _tile_stored(0, tile, 64);
        }
        for (int r = 0; r < 16 && i * 16 + r < rows; ++r) {
          const int row = i * 16 + r;
          float* to = o.out + (row / h.group) * o.out_stride + static_cast<size_t>(row % h.group) * h.value_dim;
          _mm512_storeu_ps(to + d + half * 16, _mm512_load_ps(tile + r * 16));
        }
      }
    }
  }
}
#endif

// With AMX, between `amx_begin` and `amx_end`.
inline void attend(Isa isa, const Heads& h, const Queries& o, const bf16* keys, const bf16* values, int head,
                   std::vector<float>& scratch) {
#if defined(__x86_64__)
  if (isa == kAmx && fits_amx(h)) return attend_amx(h, o, keys, values, head, scratch);
#endif
  for (int t = 0; t < o.tokens; ++t) attend_token(isa, h, o, t, keys, values, head, scratch);
}
