// The linear with quantized weights, in integers: the activations are rounded to int8 as well, in groups of the same 32
// columns, and within a group the products and their sums are exact.
//
//   y = sum over groups g of (scale_w scale_x)_g * (q_w . q_x)_g + minimum_g * (scale_x * sum of q_x)_g
//
// Group g belongs to the partial sum g mod 4, in the order of g, and the four are added in pairs. Both ways below make
// just these sums: one for few tokens, where the weights are read at the memory's speed, one with AMX for many. So what
// a token gets does not depend on how many others there are.
#pragma once

#include <vector>

#include "linear.h"

inline bool in_integers(Isa isa, const Matrix& w) { return isa >= kAvx512 && w.format != kBf16; }

constexpr int kLanes = 4;                    // partial sums, and groups in a chunk
constexpr int kChunk = kLanes * kGroup;      // columns
constexpr int kTileTokens = 16;
constexpr int kTilesFrom = 12;  // from so many tokens on, AMX, which takes as long as for sixteen, is faster

// One token's activations in one chunk. For int8 weights the columns are in order; for int4 the even ones come first,
// as the low and the high nibbles of 64 bytes of weights have them.
struct alignas(64) CodedChunk {
  int8_t q[kChunk];
  float scale[16], sum[16];  // of group i in lanes 4i .. 4i + 3; sum: scale * sum of q. Zeros where there is no group.
};

// A tile's operands in one group: weights of 16 rows, or activations of 16 tokens, four columns of each side by side.
// Int4 has the even columns of the group first.
struct alignas(64) WeightTile {
  uint8_t q[16][kGroup];
  float scale[16], minimum[16];
};

struct alignas(64) CodedTile {
  int32_t q[kGroup / 4][kTileTokens];
  float scale[kTileTokens], sum[kTileTokens];
};

inline int chunks_of(int cols) { return (cols + kChunk - 1) / kChunk; }

// The activations of a step's tokens as one linear reads them.
struct Coded {
  std::vector<CodedChunk> chunks;  // [tokens, chunks of the columns]
  std::vector<CodedTile> tiles;    // [blocks of 16 tokens, groups of the columns]

  void fit(Isa isa, size_t tokens, int cols) {
    const size_t blocks = (tokens + kTileTokens - 1) / kTileTokens;
    if (chunks.size() < tokens * chunks_of(cols)) chunks.resize(tokens * chunks_of(cols));
    if (isa == kAmx && tokens >= kTilesFrom && tiles.size() < blocks * (cols / kGroup))
      tiles.resize(blocks * (cols / kGroup));
  }
};

#if defined(__x86_64__)
AVX512 inline void code_token(const bf16* x, int cols, int format, CodedChunk* out) {
  const int groups = cols / kGroup;
  for (int g = 0; g < chunks_of(cols) * kLanes; ++g) {
    CodedChunk& chunk = out[g / kLanes];
    const int lane = g % kLanes;
    float scale = 0, sum = 0;
    if (g < groups) {
      const __m512i pairs = _mm512_loadu_si512(x + g * kGroup);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
      const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(even), _mm512_abs_ps(odd)));
      scale = largest / 127;
      const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
      const __m512i q_even = _mm512_cvtps_epi32(_mm512_mul_ps(even, inverse));
      const __m512i q_odd = _mm512_cvtps_epi32(_mm512_mul_ps(odd, inverse));
      sum = scale * _mm512_reduce_add_epi32(_mm512_add_epi32(q_even, q_odd));
      const __m128i low = _mm512_cvtepi32_epi8(q_even), high = _mm512_cvtepi32_epi8(q_odd);
      if (format == kInt4) {
        _mm_storeu_si128((__m128i*)(chunk.q + 16 * lane), low);
        _mm_storeu_si128((__m128i*)(chunk.q + kChunk / 2 + 16 * lane), high);
      } else {
        _mm_storeu_si128((__m128i*)(chunk.q + kGroup * lane), _mm_unpacklo_epi8(low, high));
        _mm_storeu_si128((__m128i*)(chunk.q + kGroup * lane + 16), _mm_unpackhi_epi8(low, high));
      }
    }
    _mm_store_ps(chunk.scale + 4 * lane, _mm_set1_ps(scale));
    _mm_store_ps(chunk.sum + 4 * lane, _mm_set1_ps(sum));
  }
}

// Sixteen tokens' chunks, or as many as there are, as tiles; zeros for the others.
inline void code_tiles(const CodedChunk* chunks, int tokens, int cols, int format, CodedTile* out) {
  for (int g = 0; g < cols / kGroup; ++g) {
    CodedTile& tile = out[g];
    if (tokens < kTileTokens) std::memset(&tile, 0, sizeof tile);
    const int lane = g % kLanes;
    for (int t = 0; t < tokens; ++t) {
      const CodedChunk& chunk = chunks[static_cast<size_t>(t) * chunks_of(cols) + g / kLanes];
      int32_t q[kGroup / 4];
      if (format == kInt4) {
        std::memcpy(q, chunk.q + 16 * lane, 16);
        std::memcpy(q + 4, chunk.q + kChunk / 2 + 16 * lane, 16);
      } else {
        std::memcpy(q, chunk.q + kGroup * lane, kGroup);
      }
      for (int k = 0; k < kGroup / 4; ++k) tile.q[k][t] = q[k];
      tile.scale[t] = chunk.scale[4 * lane];
      tile.sum[t] = chunk.sum[4 * lane];
    }
  }
}

// Block `i` of 16 tokens of x [tokens, w.cols] into `coded`, which fits.
inline void code(Isa isa, const Matrix& w, const bf16* x, int tokens, int i, Coded& coded) {
  const int first = i * kTileTokens, last = tokens - first < kTileTokens ? tokens : first + kTileTokens;
  CodedChunk* chunks = coded.chunks.data() + static_cast<size_t>(first) * chunks_of(w.cols);
  for (int t = first; t < last; ++t)
    code_token(x + static_cast<size_t>(t) * w.cols, w.cols, w.format,
               chunks + static_cast<size_t>(t - first) * chunks_of(w.cols));
  if (isa == kAmx && fits_amx(w) && last - first >= kTilesFrom)
    code_tiles(chunks, last - first, w.cols, w.format, coded.tiles.data() + static_cast<size_t>(i) * (w.cols / kGroup));
}

// Lane 4g + i is the sum of the four lanes of group g in rows[i].
AVX512 inline __m512i totals(const __m512i* rows) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[0], rows[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(rows[2], rows[3]), _mm512_unpackhi_epi32(rows[2], rows[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// Lane 4g + i is number g of rows[i], for the first `groups` of them.
AVX512 inline __m512 widen_4x4(const bf16* const* rows, int at, int groups) {
  __m128i v[4];
  for (int i = 0; i < 4; ++i)
    v[i] = groups == kLanes ? _mm_loadl_epi64((const __m128i*)(rows[i] + at))
                            : _mm_maskz_loadu_epi16(static_cast<__mmask8>((1 << groups) - 1), rows[i] + at);
  const __m128i a = _mm_unpacklo_epi16(v[0], v[1]), b = _mm_unpacklo_epi16(v[2], v[3]);
  const __m256i all = _mm256_set_m128i(_mm_unpackhi_epi32(a, b), _mm_unpacklo_epi32(a, b));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(all), 16));
}

struct FourRows {
  const uint8_t* data[4];
  const bf16 *scales[4], *minima[4];
};

constexpr int kWeightsAhead = 6144;  // bytes

// Adds chunk c, which has so many groups, of four rows by kTokens tokens: lane 4p + i of sums[t] is the partial sum p
// of row i.
template <int kFormat, int kTokens>
AVX512 inline void add_chunk(const FourRows& rows, int c, int groups, const CodedChunk* const* x, __m512* sums) {
  constexpr int kBytes = kFormat == kInt4 ? kChunk / 2 : kChunk;
  const __m512i nibble = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128);
  const bool whole = groups == kLanes;
  __m512i low[4], high[4];
  for (int i = 0; i < 4; ++i) {
    const uint8_t* from = rows.data[i] + static_cast<size_t>(c) * kBytes;
    if (kFormat == kInt4) {
      const __m512i v = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << groups * 16) - 1, from);
      low[i] = _mm512_and_si512(v, nibble);
      high[i] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
    } else {
      const uint64_t first = groups >= 2 ? ~0ull : 0xffffffffull;
      const uint64_t second = groups > 3 ? ~0ull : groups == 3 ? 0xffffffffull : 0;
      low[i] = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(first, from);
      high[i] = whole ? _mm512_loadu_si512(from + 64) : _mm512_maskz_loadu_epi8(second, from + 64);
      low[i] = _mm512_xor_si512(low[i], sign);
      high[i] = _mm512_xor_si512(high[i], sign);
    }
  }
  const __m512 scale = widen_4x4(rows.scales, c * kLanes, groups);
  __m512 minimum = widen_4x4(rows.minima, c * kLanes, groups);
  if (kFormat == kInt8) minimum = _mm512_fnmadd_ps(scale, _mm512_set1_ps(128), minimum);
  for (int t = 0; t < kTokens; ++t) {
    const CodedChunk& chunk = x[t][c];
    const __m512i first = _mm512_load_si512(chunk.q), second = _mm512_load_si512(chunk.q + 64);
    __m512i dots[4];
    for (int i = 0; i < 4; ++i) {
      const __m512i a = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low[i], first);
      if (kFormat == kInt4) {
        dots[i] = _mm512_dpbusd_epi32(a, high[i], second);
      } else {  // eight lanes of each group become four
        const __m512i b = _mm512_dpbusd_epi32(_mm512_setzero_si512(), high[i], second);
        dots[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
      }
    }
    const __m512 product = _mm512_mul_ps(scale, _mm512_load_ps(chunk.scale));
    sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(totals(dots)), product, sums[t]);
    sums[t] = _mm512_fmadd_ps(minimum, _mm512_load_ps(chunk.sum), sums[t]);
  }
}

AVX512 inline void fetch_lines(const void* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) _mm_prefetch(static_cast<const char*>(from) + at, _MM_HINT_T1);
}

// Rows [first, last) by kTokens tokens: y is that of the first token. Those that come kWeightsAhead later are fetched,
// after the last of these from row `next` on.
template <int kFormat, int kTokens>
AVX512 inline void integer_rows(const Matrix& w, const CodedChunk* coded, float* y, int first, int last, int next) {
  const int chunks = chunks_of(w.cols), groups = w.cols / kGroup;
  const size_t row_bytes = kFormat == kInt4 ? w.cols / 2 : w.cols;
  const int rows_ahead = static_cast<int>(kWeightsAhead / (4 * row_bytes) + 1) * 4;
  const auto* data = static_cast<const uint8_t*>(w.data);
  const CodedChunk* x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = coded + static_cast<size_t>(t) * chunks;
  for (int n = first; n < last; n += 4) {
    const int ahead = n + rows_ahead < last ? n + rows_ahead : next + n + rows_ahead - last;
    fetch_lines(data + ahead * row_bytes, 4 * row_bytes);
    fetch_lines(w.scales + static_cast<size_t>(ahead) * groups, 8 * groups);
    fetch_lines(w.minima + static_cast<size_t>(ahead) * groups, 8 * groups);
    const int count = last - n < 4 ? last - n : 4;
    FourRows rows;
    for (int i = 0; i < 4; ++i) {
      const size_t row = n + (i < count ? i : 0);
      rows.data[i] = data + row * row_bytes;
      rows.scales[i] = w.scales + row * groups;
      rows.minima[i] = w.minima + row * groups;
    }
    __m512 sums[kTokens];
    for (int t = 0; t < kTokens; ++t) sums[t] = _mm512_setzero_ps();
    for (int c = 0; c < groups / kLanes; ++c) add_chunk<kFormat, kTokens>(rows, c, kLanes, x, sums);
    if (groups % kLanes) add_chunk<kFormat, kTokens>(rows, chunks - 1, groups % kLanes, x, sums);
    for (int t = 0; t < kTokens; ++t) {
      const __m512 pairs = _mm512_add_ps(sums[t], _mm512_shuffle_f32x4(sums[t], sums[t], 0xb1));
      const __m512 all = _mm512_add_ps(pairs, _mm512_shuffle_f32x4(pairs, pairs, 0x4e));
      _mm_mask_storeu_ps(y + static_cast<size_t>(t) * w.rows + n, static_cast<__mmask8>((1 << count) - 1),
                         _mm512_castps512_ps128(all));
    }
  }
}

template <int kFormat>
AVX512 inline void integer_few(const Matrix& w, const CodedChunk* coded, int tokens, float* y, int first, int last,
                               int next) {
  const int chunks = chunks_of(w.cols);
  for (int t = 0; t < tokens;) {
    const CodedChunk* from = coded + static_cast<size_t>(t) * chunks;
    float* to = y + static_cast<size_t>(t) * w.rows;
    if (tokens - t >= 8) {
      integer_rows<kFormat, 8>(w, from, to, first, last, next);
      t += 8;
    } else if (tokens - t >= 4) {
      integer_rows<kFormat, 4>(w, from, to, first, last, next);
      t += 4;
    } else if (tokens - t >= 2) {
      integer_rows<kFormat, 2>(w, from, to, first, last, next);
      t += 2;
    } else {
      integer_rows<kFormat, 1>(w, from, to, first, last, next);
      t += 1;
    }
  }
}

// Rows [n, n + 16) as tiles.
AVX512 inline void weight_tiles(const Matrix& w, int n, WeightTile* out) {
  const int groups = w.cols / kGroup;
  const auto* data = static_cast<const uint8_t*>(w.data);
  for (int i = 0; i < 16; ++i)
    for (int g = 0; g < groups; ++g) {
      const size_t at = static_cast<size_t>(n + i) * groups + g;
      WeightTile& tile = out[g];
      const float scale = widen(w.scales[at]);
      tile.scale[i] = scale;
      if (w.format == kInt4) {
        const __m128i v = _mm_loadu_si128((const __m128i*)(data + at * (kGroup / 2))), nibble = _mm_set1_epi8(15);
        _mm_store_si128((__m128i*)tile.q[i], _mm_and_si128(v, nibble));
        _mm_store_si128((__m128i*)(tile.q[i] + 16), _mm_and_si128(_mm_srli_epi16(v, 4), nibble));
        tile.minimum[i] = widen(w.minima[at]);
      } else {
        const __m256i v = _mm256_loadu_si256((const __m256i*)(data + at * kGroup));
        _mm256_store_si256((__m256i*)tile.q[i], _mm256_xor_si256(v, _mm256_set1_epi8(-128)));
        tile.minimum[i] = std::fmaf(scale, -128, widen(w.minima[at]));
      }
    }
}

// Tiles 0 and 1 are sums of 16 rows by 16 tokens, 2 and 3 weights, 4 and 5 activations of one group.
struct IntegerTileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, kGroup, kGroup, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, kGroup / 4, kGroup / 4};
};

AMX inline void add_group(const int32_t* dots, const WeightTile& w, const CodedTile& x, __m512* sums) {
  const __m512 scale = _mm512_load_ps(x.scale), sum = _mm512_load_ps(x.sum);
  for (int i = 0; i < 16; ++i) {
    const __m512 product = _mm512_mul_ps(_mm512_set1_ps(w.scale[i]), scale);
    sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(dots + 16 * i)), product, sums[i]);
    sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(w.minimum[i]), sum, sums[i]);
  }
}

// y[t, 0 .. 16) of up to 16 tokens, with tiles of 16 rows.
AMX inline void integer_tile(const WeightTile* w, const CodedTile* x, int groups, int tokens, float* y, int stride) {
  alignas(64) int32_t dots[2][256];
  alignas(64) float partial[kLanes][256];
  for (int lane = 0; lane < kLanes; ++lane) {
    __m512 sums[16];
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
    for (int g = lane; g < groups; g += 2 * kLanes) {
      const bool two = g + kLanes < groups;
      _tile_zero(0);
      _tile_loadd(2, w[g].q, kGroup);
      _tile_loadd(4, x[g].q, 64);
      _tile_dpbusd(0, 2, 4);
      if (two) {
        _tile_zero(1);
        _tile_loadd(3, w[g + kLanes].q, kGroup);
        _tile_loadd(5, x[g + kLanes].q, 64);
        _tile_dpbusd(1, 3, 5);
        _tile_stored(1, dots[1], 64);
      }
      _tile_stored(0, dots[0], 64);
      add_group(dots[0], w[g], x[g], sums);
      if (two) add_group(dots[1], w[g + kLanes], x[g + kLanes], sums);
    }
    for (int i = 0; i < 16; ++i) _mm512_store_ps(partial[lane] + 16 * i, sums[i]);
  }
  for (int i = 0; i < 256; i += 16) {  // with a rounding mode: the compiler may not put these in another order
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512 low = _mm512_add_round_ps(_mm512_load_ps(partial[0] + i), _mm512_load_ps(partial[1] + i), kNearest);
    const __m512 high = _mm512_add_round_ps(_mm512_load_ps(partial[2] + i), _mm512_load_ps(partial[3] + i), kNearest);
    _mm512_store_ps(partial[0] + i, _mm512_add_round_ps(low, high, kNearest));
  }
  store_transposed(partial[0], y, stride, tokens);
}

AMX inline void integer_many(const Matrix& w, const CodedTile* coded, int blocks, int tokens, float* y, int first,
                             int last) {
  static const IntegerTileConfig config;
  static thread_local std::vector<WeightTile> tiles;
  const int groups = w.cols / kGroup;
  tiles.resize(groups);
  _tile_loadconfig(&config);
  for (int n = first; n < last; n += 16) {
    weight_tiles(w, n, tiles.data());
    for (int i = 0; i < blocks; ++i) {
      const int t = i * kTileTokens, here = tokens - t < kTileTokens ? tokens - t : kTileTokens;
      integer_tile(tiles.data(), coded + static_cast<size_t>(i) * groups, groups, here,
                   y + static_cast<size_t>(t) * w.rows + n, w.rows);
    }
  }
  amx_begin();
}

// y[:, first .. last) with rows [first, last) of quantized weights; `coded` is `code` of x.
inline void linear_integers(Isa isa, const Matrix& w, const Coded& coded, int tokens, float* y, int first, int last,
                            int next) {
  int done = 0;
  if (isa == kAmx && fits_amx(w)) {
    const int blocks = (tokens + kTileTokens - kTilesFrom) / kTileTokens;
    if (blocks > 0) integer_many(w, coded.tiles.data(), blocks, tokens, y, first, last);
    done = blocks * kTileTokens;
  }
  if (done < tokens)
    (w.format == kInt4 ? integer_few<kInt4> : integer_few<kInt8>)(
        w, coded.chunks.data() + static_cast<size_t>(done) * chunks_of(w.cols), tokens - done,
        y + static_cast<size_t>(done) * w.rows, first, last, next);
  add_bias(w, tokens, y, first, last);
}
#endif
