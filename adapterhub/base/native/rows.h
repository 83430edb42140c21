// What training does to single rows: norms, rotary embedding and the gated activation, each with its backward. All
// widths are multiples of 32.
#pragma once

#include "products.h"

#if defined(__x86_64__)

AVX512 inline float norm_row(const float* x, const bf16* weight, float epsilon, int size, bf16* plain, bf16* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < size; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float scale = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / size + epsilon);
  for (int i = 0; i < size; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    if (plain) narrow16(v, plain + i);
    narrow16(_mm512_mul_ps(_mm512_mul_ps(v, _mm512_set1_ps(scale)), widen16(weight + i)), out + i);
  }
  return scale;
}

// Adds to `to` the gradient of x, whose norm had the gradient g.
template <class X, class G>
AVX512 inline void norm_row_backward(const X& x, const G& g, const bf16* weight, float scale, int size, float* to) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < size; i += 16) sum = _mm512_fmadd_ps(_mm512_mul_ps(g(i), widen16(weight + i)), x(i), sum);
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) * scale * scale / size), factor = _mm512_set1_ps(scale);
  for (int i = 0; i < size; i += 16) {
    const __m512 slope = _mm512_fnmadd_ps(x(i), mean, _mm512_mul_ps(g(i), widen16(weight + i)));
    _mm512_storeu_ps(to + i, _mm512_fmadd_ps(slope, factor, _mm512_loadu_ps(to + i)));
  }
}

AVX512 inline void narrow_row(const float* from, int size, bf16* to) {
  for (int i = 0; i < size; i += 16) narrow16(_mm512_loadu_ps(from + i), to + i);
}

AVX512 inline void widen_row(const bf16* from, int size, float* to) {
  for (int i = 0; i < size; i += 16) _mm512_storeu_ps(to + i, widen16(from + i));
}

// Turns the two halves of the first `2 * half` numbers of a head against each other; `way` is 1, or -1 to turn back.
EVERYWHERE inline void rotate_row(bf16* x, const float* cos, const float* sin, int half, float way) {
  for (int i = 0; i < half; ++i) {
    const float a = widen(x[i]), b = widen(x[i + half]), s = way * sin[i];
    x[i] = narrow(a * cos[i] - b * s);
    x[i + half] = narrow(b * cos[i] + a * s);
  }
}

AVX512 inline __m512 sigmoid16(__m512 x) {
  const __m512 e = fast_exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));  // e^-|x|
  const __m512 one = _mm512_set1_ps(1.0f), low = _mm512_div_ps(e, _mm512_add_ps(one, e));
  return _mm512_mask_sub_ps(low, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), one, low);
}

AVX512 inline void activate_row(const bf16* gate, const bf16* up, int size, bf16* out) {
  for (int i = 0; i < size; i += 16) {
    const __m512 g = widen16(gate + i);
    narrow16(_mm512_mul_ps(_mm512_mul_ps(g, sigmoid16(g)), widen16(up + i)), out + i);
  }
}

AVX512 inline void activate_row_backward(const bf16* gate, const bf16* up, const bf16* slope, int size, bf16* to_gate,
                                         bf16* to_up) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int i = 0; i < size; i += 16) {
    const __m512 g = widen16(gate + i), s = sigmoid16(g), d = widen16(slope + i);
    // of g sigmoid(g): s + g s (1 - s)
    const __m512 steep = _mm512_fmadd_ps(_mm512_mul_ps(g, s), _mm512_sub_ps(one, s), s);
    narrow16(_mm512_mul_ps(_mm512_mul_ps(d, widen16(up + i)), steep), to_gate + i);
    narrow16(_mm512_mul_ps(d, _mm512_mul_ps(g, s)), to_up + i);
  }
}

#endif
