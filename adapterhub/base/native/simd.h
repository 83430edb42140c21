// Numbers: bfloat16, a vectorizable exponential, sums over vectors; and which instructions this processor has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
// compiled for several instruction sets, the best chosen when the library is loaded
#define EVERYWHERE __attribute__((target_clones("avx512f", "avx2", "default")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")))
#define AMX \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8")))
#else
#define EVERYWHERE
#endif

using bf16 = uint16_t;

enum Isa { kPortable = 0, kAvx512 = 1, kAmx = 2 };

inline float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest even; NaN stays NaN.
inline bf16 narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline bf16 narrow_finite(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x to about 2e-7, without a call, so that loops over it become vector code.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float e = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return e * scale;
}

#if defined(__x86_64__)
// What this processor can do. AMX also has to be asked of the system.
inline Isa best_isa() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vnni"))
    return kPortable;
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool amx = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return amx && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? kAmx : kAvx512;
}

// Lane i of the result is the sum over the lanes of v[i].
AVX512 inline __m512 sums_of(const __m512* v) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  // each 128-bit lane of a[i]: (even, odd, even, odd) partial sums
  for (int i = 0; i < 4; ++i) {
    const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]));
    const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]));
    b[i] = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  }
  // each 128-bit lane of b[i]: partial sums of v[4i .. 4i+3]; what is left is to add the four lanes
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

AVX512 inline __m512 widen16(const bf16* x) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16));
}

AVX512 inline __m512bh load32(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }

AVX512 inline __m512bh load32(const bf16* x, int count) {  // the first `count`, then zeros
  return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), x);
}

// Rows and columns of 16 by 16 numbers of 32 bits change places.
AVX512 inline void transpose16(__m512i* v) {
  __m512i a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  // v[4 i + c]: in its 128-bit lane l, what rows 4 i .. 4 i + 3 have in column 4 l + c
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), high = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
    a[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
    a[8 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    a[4 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
    a[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = a[i];
}

// The pairs (a[i], b[i]) of two rows of 32 numbers: the first 16 pairs to `low`, the others to `high`.
AVX512 inline void interleave(__m512i a, __m512i b, bf16* low, bf16* high) {
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i index = _mm512_load_si512(kLow);
  _mm512_storeu_si512(low, _mm512_permutex2var_epi16(a, index, b));
  _mm512_storeu_si512(high, _mm512_permutex2var_epi16(a, _mm512_add_epi16(index, _mm512_set1_epi16(16)), b));
}

// `fast_exp` of sixteen numbers that are not above 0.
AVX512 inline __m512 fast_exp16(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}
#else
inline Isa best_isa() { return kPortable; }
#endif
