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
AVX512 inline void lora_avx512(const bf16* a, const bf16* b, int rank, const bf16* x, int n_in, float* y, int n_out) {
  alignas(64) float s[kMaxRank];
  const int whole = n_in & ~31, rest = n_in & 31;
  // a block is one piece of memory, read once, by rows that are too short for the processor to see where it goes on
  fetch_ahead(a, static_cast<size_t>(rank) * n_in * sizeof(bf16));
  const char* ahead = reinterpret_cast<const char*>(b);
  const char* const end = reinterpret_cast<const char*>(b + static_cast<size_t>(rank) * n_out);
  for (int r = 0; r < rank; r += 16) {
    __m512 acc[16];
    const int rows = rank - r < 16 ? rank - r : 16;
    for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
    for (int i = 0; i < rows; i += 4) {  // four rows at a time, as many streams as the prefetcher follows
      const bf16* row[4];
      for (int j = 0; j < 4; ++j) row[j] = a + static_cast<size_t>(r + (i + j < rows ? i + j : i)) * n_in;
      for (int k = 0; k < whole; k += 32) {
        const __m512bh v = load32(x + k);
        for (int j = 0; j < 4; ++j, ahead += ahead < end ? 64 : 0) {
          _mm_prefetch(ahead, _MM_HINT_T0);
          acc[i + j] = _mm512_dpbf16_ps(acc[i + j], load32(row[j] + k), v);
        }
      }
      if (rest)
        for (int j = 0; j < 4; ++j)
          acc[i + j] = _mm512_dpbf16_ps(acc[i + j], load32(row[j] + whole, rest), load32(x + whole, rest));
    }
    _mm512_store_ps(s + r, sums_of(acc));
  }
  int n = 0;
  for (; n + 32 <= n_out; n += 32) {
    __m512 lo = _mm512_loadu_ps(y + n), hi = _mm512_loadu_ps(y + n + 16);
    for (int r = 0; r < rank; ++r) {
      const __m512 f = _mm512_set1_ps(s[r]);
      const bf16* br = b + static_cast<size_t>(r) * n_out + n;
      lo = _mm512_fmadd_ps(f, widen16(br), lo);
      hi = _mm512_fmadd_ps(f, widen16(br + 16), hi);
    }
    _mm512_storeu_ps(y + n, lo);
    _mm512_storeu_ps(y + n + 16, hi);
  }
  for (; n < n_out; ++n)
    for (int r = 0; r < rank; ++r) y[n] += s[r] * widen(b[static_cast<size_t>(r) * n_out + n]);
}
#endif

// One token's delta of one linear. x [n_in], y [n_out].
inline void lora_row(Isa isa, const bf16* pool, int64_t offset, int rank, const bf16* x, int n_in, float* y, int n_out) {
  const bf16* a = pool + offset;
  const bf16* b = a + static_cast<size_t>(rank) * n_in;
#if defined(__x86_64__)
  if (isa >= kAvx512) return lora_avx512(a, b, rank, x, n_in, y, n_out);
#endif
  lora_portable(a, b, rank, x, n_in, y, n_out);
}
