// Attention of one token's query heads over the paged KV cache. The heads that share a key head are done together.
//
// A cache layer is [slots, kv_heads, dim] in bf16; a sequence's table lists its blocks of `kBlock` slots.
#pragma once

#include <vector>

#include "simd.h"

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

// The token at position `context - 1` looks at positions [from, context). q [group, dim]; out [group, value_dim].
// A NaN score would be lost in the exponential; it is in the token's residual as well, where it shows.
inline void attend_token(Isa isa, const Heads& h, const bf16* q, const bf16* keys, const bf16* values,
                         const int32_t* table, int head, int from, int context, std::vector<float>& scratch, float* out) {
  const int count = context - from;
  scratch.resize(static_cast<size_t>(h.group) * count);
#if defined(__x86_64__)
  const bool wide = isa >= kAvx512 && h.dim % 32 == 0 && h.value_dim % 16 == 0;
  if (wide) {
    scores_avx512(h, q, keys, table, head, from, context, scratch.data(), count);
  } else {
    scores_portable(h, q, keys, table, head, from, context, scratch.data(), count);
  }
#else
  scores_portable(h, q, keys, table, head, from, context, scratch.data(), count);
#endif
  for (int g = 0; g < h.group; ++g) softmax(scratch.data() + static_cast<size_t>(g) * count, count);
#if defined(__x86_64__)
  if (wide) return weigh_avx512(h, values, table, head, from, context, scratch.data(), count, out);
#endif
  weigh_portable(h, values, table, head, from, context, scratch.data(), count, out);
}
