// One step of a decoder of the Llama family, from embedded tokens to logits, by a team of threads.
//
// Per layer: norm, q k v with LoRA, rotary embedding, keys and values into the cache, attention, output projection with
// LoRA, norm, gated MLP with LoRA. The residual stream is fp32; what is multiplied is bf16. Prompts and single tokens are
// not told apart: every row of the step is one token with its own context. The C functions at the end are what Python
// calls; none of them keeps anything of its arguments.

#include <algorithm>

#include "attention.h"
#include "integer.h"
#include "lora.h"
#include "model.h"
#include "team.h"

extern "C" {

struct Batch {
  int tokens;
  const bf16* embedded;     // [tokens, hidden]
  const float *cos, *sin;   // [tokens, rotary_dim / 2]
  const int64_t* slots;     // [tokens] where each token's key and value go
  const int32_t* contexts;  // [tokens] position + 1
  const int32_t* tables;    // KV blocks of all sequences, one after the other
  const int32_t* table_at;  // [tokens] where in `tables` each token's sequence begins
  const bf16* pool;
  const Segment* segments;
  int num_segments;
  const int32_t* rows;  // [num_rows] whose logits are wanted
  int num_rows;
  float* logits;  // [num_rows, vocabulary]
};
}

namespace {

constexpr int kPackColumns = 192;

EVERYWHERE void rms_norm(const float* x, const bf16* weight, float epsilon, int size, bf16* out) {
  float sum = 0;
  for (int i = 0; i < size; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / size + epsilon);
  for (int i = 0; i < size; ++i) out[i] = narrow(x[i] * scale * widen(weight[i]));
}

EVERYWHERE void rms_norm_in_place(float* x, const bf16* weight, float epsilon, int size) {
  float sum = 0;
  for (int i = 0; i < size; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / size + epsilon);
  for (int i = 0; i < size; ++i) x[i] *= scale * widen(weight[i]);
}

EVERYWHERE void add(float* to, const float* from, int size) {
  for (int i = 0; i < size; ++i) to[i] += from[i];
}

EVERYWHERE void widen_all(const bf16* from, int size, float* to) {
  for (int i = 0; i < size; ++i) to[i] = widen(from[i]);
}

EVERYWHERE void narrow_all(const float* from, int size, bf16* to) {
  for (int i = 0; i < size; ++i) to[i] = narrow(from[i]);
}

EVERYWHERE void gated_silu(const float* gate, const float* up, int size, bf16* out) {
  for (int i = 0; i < size; ++i) out[i] = narrow(gate[i] / (1.0f + fast_exp(-gate[i])) * up[i]);
}

// Rotates the two halves of the first `2 * half` numbers against each other.
EVERYWHERE void rotate(float* x, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

struct Chunk {  // neighbouring rows of one segment
  Segment segment;
  int start, end;
};

struct Run {  // neighbouring tokens of one sequence
  int start, end;
};

constexpr int kRunRows = 128;  // query rows of a run and a key head: they share what is packed of keys and values

// What a step works in beside the model and the cache. Kept between steps, so that none of them allocates.
struct Buffers {
  std::vector<float> residual, wide, projected;
  std::vector<bf16> narrow, packed, query, attended;
  Coded coded;
  std::vector<std::vector<float>> scratch;  // one for each member of the team

  void fit(Isa isa, const Model& m, size_t tokens) {
    const size_t q = static_cast<size_t>(m.heads) * m.head_dim;
    const size_t qkv = q + 2 * static_cast<size_t>(m.kv_heads) * m.head_dim;
    const size_t widest = std::max<size_t>({static_cast<size_t>(m.hidden), static_cast<size_t>(m.intermediate), q});
    grow(residual, tokens * m.hidden);
    grow(projected, tokens * m.hidden);
    grow(wide, tokens * std::max<size_t>(qkv, 2 * static_cast<size_t>(m.intermediate)));
    grow(narrow, tokens * widest);
    grow(query, tokens * q);
    grow(attended, tokens * q);
    grow(packed, (tokens + 15) / 16 * 16 * widest);
    if (in_integers(isa, m.layers[0].qkv) || in_integers(isa, m.head))
      coded.fit(isa, tokens, static_cast<int>(widest));
  }

 private:
  template <class T>
  static void grow(std::vector<T>& v, size_t size) {
    if (v.size() < size) v.resize(size);
  }
};

}  // namespace

struct Decoder {
  Team team;
  int threads;
  Isa isa;
  Buffers buffers;
  Decoder(int threads, Isa isa) : team(threads), threads(threads), isa(isa) { buffers.scratch.resize(threads); }
};

namespace {

// One step, as its team shares it. What decides how many pieces a part has is copied: a member may still be on its way
// through when the caller has long gone on.
struct Step : Job {
  Decoder& decoder;
  const Model& model;
  const Batch batch;
  std::vector<Chunk> chunks;
  std::vector<Run> runs;
  float *const residual, *const wide, *const projected;
  bf16 *const narrow, *const packed, *const query, *const attended;

  Step(Decoder& d, const Model& m, const Batch& b)
      : Job(32 + 20 * m.num_layers),
        decoder(d),
        model(m),
        batch(b),
        residual(d.buffers.residual.data()),
        wide(d.buffers.wide.data()),
        projected(d.buffers.projected.data()),
        narrow(d.buffers.narrow.data()),
        packed(d.buffers.packed.data()),
        query(d.buffers.query.data()),
        attended(d.buffers.attended.data()) {
    for (int i = 0; i < b.num_segments; ++i)
      for (int t = b.segments[i].start; t < b.segments[i].end; t += kLoraRows)
        chunks.push_back({b.segments[i], t, std::min(t + kLoraRows, b.segments[i].end)});
    const int longest = std::max(1, kRunRows / (m.heads / m.kv_heads));
    for (int t = 0; t < b.tokens; ++t) {
      const bool goes_on = t > 0 && b.table_at[t] == b.table_at[t - 1] && b.contexts[t] == b.contexts[t - 1] + 1;
      if (goes_on && t - runs.back().start < longest) {
        runs.back().end = t + 1;
      } else {
        runs.push_back({t, t + 1});
      }
    }
  }

  void work(int rank) override;
};

// One member's way through a step. All members go through the same parts in the same order.
class Walk {
 public:
  Walk(Step& step, int rank) : s_(step), m_(step.model), b_(step.batch), isa_(step.decoder.isa), rank_(rank) {}

  void go() {
#if defined(__x86_64__)
    if (isa_ == kAmx) amx_begin();
#endif
    each(b_.tokens, [&](int t) { widen_all(b_.embedded + at(t, m_.hidden), m_.hidden, residual(t)); });
    for (int i = 0; i < m_.num_layers; ++i) {
      attention(m_.layers[i], i > 0);
      mlp(m_.layers[i]);
    }
    logits();
#if defined(__x86_64__)
    if (isa_ == kAmx) amx_end();
#endif
  }

 private:
  static size_t at(int row, int width) { return static_cast<size_t>(row) * width; }
  float* residual(int t) { return s_.residual + at(t, m_.hidden); }

  template <class Piece>
  void each(int count, const Piece& piece) {
    s_.each(part_++, count, piece);
  }

  // The residual stream, with what the last projection made added to it, normed into `narrow`.
  void norm(const bf16* weight, bool pending) {
    each(b_.tokens, [&](int t) {
      if (pending) add(residual(t), s_.projected + at(t, m_.hidden), m_.hidden);
      rms_norm(residual(t), weight, m_.epsilon, m_.hidden, s_.narrow + at(t, m_.hidden));
    });
  }

  void linear(const Matrix& w, const bf16* x, int tokens, float* y) {
    const int panels = (w.rows + kPanel - 1) / kPanel;
#if defined(__x86_64__)
    if (in_integers(isa_, w)) {
      Coded& coded = s_.decoder.buffers.coded;
      each((tokens + kTileTokens - 1) / kTileTokens, [&](int i) { code(isa_, w, x, tokens, i, coded); });
      each(panels, [&](int i) {
        linear_integers(isa_, w, coded, tokens, y, i * kPanel, std::min((i + 1) * kPanel, w.rows), next_panel(w, i));
      });
      return;
    }
    if (isa_ == kAmx && fits_amx(w)) {
      const int pieces = (w.cols + kPackColumns - 1) / kPackColumns;
      each((tokens + 15) / 16 * pieces, [&](int i) {
        const int first = i % pieces * kPackColumns;
        pack_for_amx(x, tokens, w.cols, i / pieces, first, std::min(first + kPackColumns, w.cols), s_.packed);
      });
    }
#endif
    each(panels, [&](int i) {
      linear_rows(isa_, w, x, s_.packed, tokens, y, i * kPanel, std::min((i + 1) * kPanel, w.rows), next_panel(w, i));
    });
  }

  // The row with which the member that does panel i is likely to go on.
  int next_panel(const Matrix& w, int i) const { return std::min((i + s_.decoder.threads) * kPanel, w.rows - 1); }

  // Adds the adapters' deltas of `count` linears that read the same x and write side by side into y [tokens, width].
  // Where there are adapters enough for everybody, one member does all of an adapter's linears: they lie side by side.
  void lora(const int* targets, const int* widths, int count, const bf16* x, int n_in, float* y, int width) {
    const int chunks = static_cast<int>(s_.chunks.size());
    if (chunks == 0) return;
    const int at_once = chunks >= 2 * s_.decoder.threads ? count : 1;
    each(chunks * count / at_once, [&](int i) {
      const Chunk& chunk = s_.chunks[i * at_once / count];
      const int first = i * at_once % count;
      int column = 0;
      for (int j = 0; j < first + at_once; column += widths[j++]) {
        const int64_t offset = chunk.segment.offsets[targets[j]];
        if (j >= first && offset >= 0)
          lora_rows(isa_, b_.pool, offset, chunk.segment.rank, x + at(chunk.start, n_in), n_in,
                    chunk.end - chunk.start, y + at(chunk.start, width) + column, width, widths[j]);
      }
    });
  }

  void attention(const Layer& layer, bool pending) {
    const int q_width = m_.heads * m_.head_dim, kv_width = m_.kv_heads * m_.head_dim, width = q_width + 2 * kv_width;
    norm(layer.input_norm, pending);
    linear(layer.qkv, s_.narrow, b_.tokens, s_.wide);
    const int widths[] = {q_width, kv_width, kv_width};
    lora(layer.targets, widths, 3, s_.narrow, m_.hidden, s_.wide, width);
    each(b_.tokens, [&](int t) { rotate_and_store(layer, t, s_.wide + at(t, width)); });
    const Heads heads{m_.kv_heads, m_.heads / m_.kv_heads, m_.head_dim, m_.head_dim, m_.scale};
    const int group_width = heads.group * m_.head_dim;
    each(static_cast<int>(s_.runs.size()) * m_.kv_heads, [&](int i) {
      const Run& run = s_.runs[i / m_.kv_heads];
      const int head = i % m_.kv_heads, tokens = run.end - run.start;
      const size_t place = at(run.start, q_width) + at(head, group_width);
      float* out = s_.wide + place;  // q, k and v of every token have been taken out of it by now
      const Queries queries{s_.query + place,
                            out,
                            tokens,
                            b_.contexts[run.start],
                            layer.window,
                            static_cast<size_t>(q_width),
                            static_cast<size_t>(q_width),
                            b_.tables + b_.table_at[run.start]};
      attend(isa_, heads, queries, layer.keys, layer.values, head, s_.decoder.buffers.scratch[rank_]);
      for (int t = 0; t < tokens; ++t) narrow_all(out + at(t, q_width), group_width, s_.attended + place + at(t, q_width));
    });
    linear(layer.output, s_.attended, b_.tokens, s_.projected);
    lora(layer.targets + 3, &m_.hidden, 1, s_.attended, q_width, s_.projected, m_.hidden);
  }

  void rotate_and_store(const Layer& layer, int t, float* qkv) {
    const int dim = m_.head_dim, half = m_.rotary_dim / 2;
    for (int h = 0; h < m_.heads + m_.kv_heads; ++h) {
      float* head = qkv + h * dim;
      const bf16* weight = h < m_.heads ? layer.q_norm : layer.k_norm;
      if (weight) rms_norm_in_place(head, weight, m_.epsilon, dim);
      rotate(head, b_.cos + at(t, half), b_.sin + at(t, half), half);
    }
    const int q_width = m_.heads * dim, kv_width = m_.kv_heads * dim;
    const size_t slot = static_cast<size_t>(b_.slots[t]) * kv_width;
    narrow_all(qkv, q_width, s_.query + at(t, q_width));
    narrow_all(qkv + q_width, kv_width, layer.keys + slot);
    narrow_all(qkv + q_width + kv_width, kv_width, layer.values + slot);
  }

  void mlp(const Layer& layer) {
    const int size = m_.intermediate;
    norm(layer.mlp_norm, true);
    linear(layer.gate_up, s_.narrow, b_.tokens, s_.wide);
    const int widths[] = {size, size};
    lora(layer.targets + 4, widths, 2, s_.narrow, m_.hidden, s_.wide, 2 * size);
    each(b_.tokens, [&](int t) {
      const float* gate = s_.wide + at(t, 2 * size);
      gated_silu(gate, gate + size, size, s_.narrow + at(t, size));
    });
    linear(layer.down, s_.narrow, b_.tokens, s_.projected);
    lora(layer.targets + 6, &m_.hidden, 1, s_.narrow, size, s_.projected, m_.hidden);
  }

  void logits() {
    each(b_.num_rows, [&](int i) {
      const int t = b_.rows[i];
      add(residual(t), s_.projected + at(t, m_.hidden), m_.hidden);
      rms_norm(residual(t), m_.final_norm, m_.epsilon, m_.hidden, s_.narrow + at(i, m_.hidden));
    });
    if (b_.num_rows > 0) linear(m_.head, s_.narrow, b_.num_rows, b_.logits);
  }

  Step& s_;
  const Model& m_;
  const Batch& b_;
  const Isa isa_;
  const int rank_;
  int part_ = 0;
};

void Step::work(int rank) { Walk(*this, rank).go(); }

}  // namespace

extern "C" {

int adapterhub_best_isa() { return best_isa(); }

Decoder* adapterhub_decoder(int threads, int isa) { return new Decoder(threads, static_cast<Isa>(isa)); }

void adapterhub_decoder_free(Decoder* decoder) { delete decoder; }

int adapterhub_step(Decoder* decoder, const Model* model, const Batch* batch) {
  return status_of([&] {
    decoder->buffers.fit(decoder->isa, *model, batch->tokens);
    return decoder->team.run(std::make_shared<Step>(*decoder, *model, *batch));
  });
}

// The single operations, on the caller's thread, as tests and models of other families use them.

int adapterhub_linear(int isa, const Matrix* w, const bf16* x, int tokens, float* y) {
  return status_of([&] {
    std::vector<bf16> packed(static_cast<size_t>(tokens + 15) / 16 * 16 * w->cols);
#if defined(__x86_64__)
    if (in_integers(static_cast<Isa>(isa), *w)) {
      Coded coded;
      coded.fit(static_cast<Isa>(isa), tokens, w->cols);
      for (int i = 0; i < (tokens + kTileTokens - 1) / kTileTokens; ++i)
        code(static_cast<Isa>(isa), *w, x, tokens, i, coded);
      linear_integers(static_cast<Isa>(isa), *w, coded, tokens, y, 0, w->rows, 0);
      if (isa == kAmx) amx_end();
      return true;
    }
    if (isa == kAmx && fits_amx(*w)) {
      amx_begin();
      for (int g = 0; g < (tokens + 15) / 16; ++g) pack_for_amx(x, tokens, w->cols, g, 0, w->cols, packed.data());
    }
#endif
    linear_rows(static_cast<Isa>(isa), *w, x, packed.data(), tokens, y, 0, w->rows, 0);
#if defined(__x86_64__)
    if (isa == kAmx && fits_amx(*w)) amx_end();
#endif
    return true;
  });
}

void adapterhub_lora(int isa, const bf16* pool, const Segment* segments, int num_segments, int target, const bf16* x,
                     int n_in, float* y, int n_out) {
  for (int i = 0; i < num_segments; ++i) {
    const Segment& s = segments[i];
    const int64_t offset = s.offsets[target];
    if (offset >= 0)
      lora_rows(static_cast<Isa>(isa), pool, offset, s.rank, x + static_cast<size_t>(s.start) * n_in, n_in,
                s.end - s.start, y + static_cast<size_t>(s.start) * n_out, n_out, n_out);
  }
}

// Rows of a quantized matrix as bf16: out [last - first, cols].
void adapterhub_expand(const Matrix* w, int first, int last, bf16* out) { expand(*w, first, last, out); }

// q [tokens, kv_heads * group, dim]; out [tokens, kv_heads * group, value_dim].
int adapterhub_attention(int isa, int kv_heads, int group, int dim, int value_dim, float scale, const bf16* q,
                         const bf16* keys, const bf16* values, const int32_t* tables, const int32_t* table_at,
                         const int32_t* contexts, int tokens, int window, float* out) {
  return status_of([&] {
    const Heads heads{kv_heads, group, dim, value_dim, scale};
    std::vector<float> scratch;
#if defined(__x86_64__)
    if (isa == kAmx) amx_begin();
#endif
    for (int t = 0; t < tokens; ++t)
      for (int h = 0; h < kv_heads; ++h) {
        const size_t row = static_cast<size_t>(t) * kv_heads + h;
        const Queries one{q + row * group * dim, out + row * group * value_dim, 1, contexts[t], window, 0, 0,
                          tables + table_at[t]};
        attend(static_cast<Isa>(isa), heads, one, keys, values, h, scratch);
      }
#if defined(__x86_64__)
    if (isa == kAmx) amx_end();
#endif
    return true;
  });
}
}
