// y[t] += (x[t] A^T) B for the tokens of each segment, over blocks in the pool: A [rank, n_in], B [rank, n_out].
#pragma once

#include "simd.h"

struct Segment {
  int start, end;          // rows of this forward
  int rank;
  const int64_t* offsets;  // for each of the base's linears, where A lies in the pool, or -1; B follows A
};

constexpr int kMaxRank = 256;
constexpr int kLoraRows = 32;  // tokens in one piece of work

EVERYWHERE inline void lora_portable(const bf16* a, const bf16* b, int rank, const bf16* x, int n_in, float* y, int n_out) {
  float s[kMaxRank];
  for (int r = 0; r < rank; ++r) {
    float sum = 0;
    for (int k = 0; k < n_in; ++k) sum += widen(x[k]) * widen(a[static_cast<size_t>(r) * n_in + k]);
    s[r] = sum;
  }
  for (int r = 0; r < rank; ++r) {
    const bf16* br = b + static_cast<size_t>(r) * n_out;
    for (int n = 0; n < n_out; ++n) y[n] += s[r] * widen(br[n]);
  }
}

#if defined(__x86_64__)
// The factors are read in the order in which they lie, two rows at a time, and fetched this far ahead: the rows are too
// short for the processor to see by itself where reading goes on. Behind a linear's factors lie the next one's.
constexpr int kAhead = 8192;  // bytes

AVX512 inline void fetch_ahead(const bf16* at) { _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead, _MM_HINT_T1); }

// s[t, r] = sum over k of x[t, k] a[r, k]. The order in which a token's sums are made does not depend on kTokens.
template <int kTokens>
AVX512 inline void lora_down(const bf16* a, int rank, const bf16* x, int n_in, float (*s)[kMaxRank]) {
  const int whole = n_in & ~63, rest = n_in - whole;
  for (int r = 0; r < rank; r += 16) {
    __m512 sums[kTokens][16];
    for (int t = 0; t < kTokens; ++t)
      for (int i = 0; i < 16; ++i) sums[t][i] = _mm512_setzero_ps();
    for (int i = 0; i < 16 && r + i < rank; i += 2) {
      const bf16* row[2];
      row[0] = a + static_cast<size_t>(r + i) * n_in;
      row[1] = r + i + 1 < rank ? row[0] + n_in : row[0];
      __m512 acc[2][kTokens][2];
      for (int j = 0; j < 2; ++j)
        for (int t = 0; t < kTokens; ++t) acc[j][t][0] = acc[j][t][1] = _mm512_setzero_ps();
      for (int k = 0; k < whole; k += 64)
        for (int half = 0; half < 2; ++half) {
          __m512bh v[2];
          for (int j = 0; j < 2; ++j) {
            fetch_ahead(row[j] + k + 32 * half);
            v[j] = load32(row[j] + k + 32 * half);
          }
          for (int t = 0; t < kTokens; ++t) {
            const __m512bh xv = load32(x + static_cast<size_t>(t) * n_in + k + 32 * half);
            for (int j = 0; j < 2; ++j) acc[j][t][half] = _mm512_dpbf16_ps(acc[j][t][half], v[j], xv);
          }
        }
      for (int half = 0; half < 2 && 32 * half < rest; ++half) {
        const int at = whole + 32 * half, count = rest - 32 * half < 32 ? rest - 32 * half : 32;
        for (int t = 0; t < kTokens; ++t) {
          const __m512bh xv = load32(x + static_cast<size_t>(t) * n_in + at, count);
          for (int j = 0; j < 2; ++j)
            acc[j][t][half] = _mm512_dpbf16_ps(acc[j][t][half], load32(row[j] + at, count), xv);
        }
      }
      for (int j = 0; j < 2; ++j)
        for (int t = 0; t < kTokens; ++t) sums[t][i + j] = _mm512_add_ps(acc[j][t][0], acc[j][t][1]);
    }
    for (int t = 0; t < kTokens; ++t) _mm512_storeu_ps(s[t] + r, sums_of(sums[t]));
  }
}

// y[n] += sum over r of s[r] b[r, n], for one token: b is read once, in its own order, and y stays in the core's cache.
AVX512 inline void lora_up(const bf16* b, int rank, const float* s, float* y, int whole, int n_out) {
  for (int r = 0; r < rank; r += 2) {
    const bf16* row[2];
    row[0] = b + static_cast<size_t>(r) * n_out;
    row[1] = row[0] + n_out;
    const int rows = r + 1 < rank ? 2 : 1;
    for (int n = 0; n < whole; n += 32) {
      __m512 low = _mm512_loadu_ps(y + n), high = _mm512_loadu_ps(y + n + 16);
      for (int j = 0; j < rows; ++j) {
        fetch_ahead(row[j] + n);
        const __m512 f = _mm512_set1_ps(s[r + j]);
        low = _mm512_fmadd_ps(f, widen16(row[j] + n), low);
        high = _mm512_fmadd_ps(f, widen16(row[j] + n + 16), high);
      }
      _mm512_storeu_ps(y + n, low);
      _mm512_storeu_ps(y + n + 16, high);
    }
  }
}

// The same for several tokens, with the same sums in the same order: b is in the cache, and y in registers.
template <int kTokens>
AVX512 inline void lora_up(const bf16* b, int rank, const float (*s)[kMaxRank], float* y, int stride, int whole,
                           int n_out) {
  for (int n = 0; n < whole; n += 32) {
    __m512 low[kTokens], high[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      low[t] = _mm512_loadu_ps(y + static_cast<size_t>(t) * stride + n);
      high[t] = _mm512_loadu_ps(y + static_cast<size_t>(t) * stride + n + 16);
    }
    for (int r = 0; r < rank; ++r) {
      const bf16* row = b + static_cast<size_t>(r) * n_out + n;
      const __m512 first = widen16(row), second = widen16(row + 16);
      for (int t = 0; t < kTokens; ++t) {
        const __m512 f = _mm512_set1_ps(s[t][r]);
        low[t] = _mm512_fmadd_ps(f, first, low[t]);
        high[t] = _mm512_fmadd_ps(f, second, high[t]);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      _mm512_storeu_ps(y + static_cast<size_t>(t) * stride + n, low[t]);
      _mm512_storeu_ps(y + static_cast<size_t>(t) * stride + n + 16, high[t]);
    }
  }
}

template <int kTokens>
AVX512 inline void lora_avx512(const bf16* a, const bf16* b, int rank, const bf16* x, int n_in, float* y, int stride,
                               int n_out) {
  alignas(64) float s[kTokens][kMaxRank];
  lora_down<kTokens>(a, rank, x, n_in, s);
  const int whole = n_out & ~31;
  if constexpr (kTokens == 1) {
    lora_up(b, rank, s[0], y, whole, n_out);
  } else {
    lora_up<kTokens>(b, rank, s, y, stride, whole, n_out);
  }
  for (int t = 0; t < kTokens; ++t)
    for (int n = whole; n < n_out; ++n)
      for (int r = 0; r < rank; ++r)
        y[static_cast<size_t>(t) * stride + n] += s[t][r] * widen(b[static_cast<size_t>(r) * n_out + n]);
}
#endif

// The delta of one linear for `tokens` tokens of one adapter. x [tokens, n_in]; y [tokens, n_out], its rows `stride` apart.
inline void lora_rows(Isa isa, const bf16* pool, int64_t offset, int rank, const bf16* x, int n_in, int tokens, float* y,
                      int stride, int n_out) {
  const bf16* a = pool + offset;
  const bf16* b = a + static_cast<size_t>(rank) * n_in;
  for (int t = 0; t < tokens;) {
    const bf16* xt = x + static_cast<size_t>(t) * n_in;
    float* yt = y + static_cast<size_t>(t) * stride;
#if defined(__x86_64__)
    if (isa >= kAvx512 && tokens - t >= 4) {
      lora_avx512<4>(a, b, rank, xt, n_in, yt, stride, n_out);
      t += 4;
      continue;
    }
    if (isa >= kAvx512) {
      lora_avx512<1>(a, b, rank, xt, n_in, yt, stride, n_out);
      ++t;
      continue;
    }
#endif
    lora_portable(a, b, rank, xt, n_in, yt, n_out);
    ++t;
  }
}
