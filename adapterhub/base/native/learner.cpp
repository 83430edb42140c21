// Training of adapters on a base of the Llama family: the forward of a piece and its backward, by a team of threads.
//
// A piece is the rows of many jobs' sequences, end to end. A stage of it (one layer's attention, say) is one call, so
// that whoever calls may serve a request in between. What the backward needs of the forward lies in memory that the
// caller gives. The residual stream and its gradient are fp32; what is multiplied is bf16, sums are fp32. Needs AVX-512 BF16; AMX multiplies
// faster.
//
// The base learns nothing: its weights are only multiplied with, packed again for each product. An adapter's rows add
// one short step to the products of the base (`Low`), and each job's gradients are added up in its own fp32 memory. A
// tile of 16 rows belongs to one job, so what is not finite in one job's rows stays there.

#include "adapted.h"
#include "rows.h"
#include "trained_attention.h"

#if defined(__x86_64__)

namespace {

// One member's way through a stage.
class Way : Linears {
 public:
  Way(Shared& shared, int rank)
      : Linears(shared, rank),
        q_width_(m_.heads * m_.head_dim),
        kv_width_(m_.kv_heads * m_.head_dim),
        qkv_width_(q_width_ + 2 * kv_width_) {}

  void go() {
    if (s_.learner.isa == kAmx) amx_begin();
    const int at = s_.task.at;
    switch (s_.task.stage) {
      case kBegin:
        each(p_.rows,
             [&](int t) { widen_row(p_.embedded + static_cast<size_t>(t) * m_.hidden, m_.hidden, residual(t)); });
        break;
      case kAttention:
        attention(m_.layers[at], kept(at));
        break;
      case kMlp:
        mlp(m_.layers[at], kept(at));
        break;
      case kLogits:
        logits(at);
        break;
      case kLosses:
        each(p_.num_learned, [&](int i) { loss(i); });
        break;
      case kBackLogits:
        back_logits(at);
        break;
      case kBackBegin:
        back_begin();
        break;
      case kBackMlp:
        back_mlp(m_.layers[at], kept(at));
        break;
      case kBackAttention:
        back_attention(m_.layers[at], kept(at), at > 0);
        break;
    }
    if (s_.learner.isa == kAmx) amx_end();
  }

 private:
  const Kept& kept(int layer) const { return mem_.kept[p_.kept_layers == 1 ? 0 : layer]; }
  float* residual(int t) const { return mem_.residual + static_cast<size_t>(t) * m_.hidden; }

  // -- forward

  auto add_to_residual() const {
    return [this](int t, int column, const float* y) { add(y, residual(t) + column); };
  }

  void attention(const Layer& layer, const Kept& k) {
    each(p_.rows, [&](int t) {
      k.scale[t] = norm_row(residual(t), layer.input_norm, m_.epsilon, m_.hidden, k.input + t * mem_.hidden,
                            k.normed + t * mem_.hidden);
    });
    project(qkv(layer, k), k, layer,
            [&](int t, int column, const float* y) { store(y, layer.qkv, column, k.qkv + t * mem_.qkv); });
    each(p_.rows, [&](int t) {
      turn(k.qkv + t * mem_.qkv, t, 1.0f);
      if (s_.sequence_of_row[t] < 0) std::memset(k.attended + t * mem_.q, 0, q_width_ * sizeof(bf16));
    });
    each(p_.num_sequences * m_.kv_heads, [&](int i) {
      const Sequence& s = p_.sequences[i / m_.kv_heads];
      const int head = i % m_.kv_heads;
      attend_whole(attended(layer, k, s, head), k.attended + s.start * mem_.q + first_column(head), mem_.q, scratch());
    });
    project(output(layer, k), k, layer, add_to_residual());
  }

  void mlp(const Layer& layer, const Kept& k) {
    each(p_.rows, [&](int t) {
      k.mlp_scale[t] = norm_row(residual(t), layer.mlp_norm, m_.epsilon, m_.hidden, k.middle + t * mem_.hidden,
                                k.mlp_normed + t * mem_.hidden);
    });
    project(gate_up(layer, k), k, layer,
            [&](int t, int column, const float* y) { store(y, layer.gate_up, column, k.gate_up + t * mem_.gate_up); });
    activate(k);
    project(down(layer), k, layer, add_to_residual());
  }

  void activate(const Kept& k) {
    each(p_.rows, [&](int t) {
      const bf16* gate = k.gate_up + t * mem_.gate_up;
      activate_row(gate, gate + m_.intermediate, m_.intermediate, mem_.activated + t * mem_.act);
    });
  }

  // One stage makes the logits of kVocabulary columns from `first` on.
  void logits(int first) {
    const int n = p_.num_learned, columns = std::min(kVocabulary, rounded(m_.head.rows - first, kDepth));
    if (first == 0)
      each(n, [&](int i) {
        const float* x = residual(p_.learned[i]);
        std::memcpy(mem_.final_residual + static_cast<size_t>(i) * m_.hidden, x, m_.hidden * sizeof(float));
        mem_.final_scale[i] =
            norm_row(x, m_.final_norm, m_.epsilon, m_.hidden, nullptr, mem_.final_normed + i * mem_.hidden);
      });
    bf16* to = mem_.logits_of(first / kVocabulary);
    pack_base(m_.head, first, columns);
    multiply(mem_.final_normed, mem_.hidden, m_.hidden, n, columns, {},
             [&](int i, int column, const float* y) { narrow32(y, to + i * mem_.logits + column); });
  }

  AVX512 void loss(int i) {
    __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    over_logits(i, [&](__m512 x, __mmask16 there, bf16*, int) AVX512 { top = _mm512_mask_max_ps(top, there, top, x); });
    const float most = _mm512_reduce_max_ps(top);
    const __m512 highest = _mm512_set1_ps(most);
    over_logits(i, [&](__m512 x, __mmask16 there, bf16*, int)
                       AVX512 { sum = _mm512_mask_add_ps(sum, there, sum, fast_exp16(_mm512_sub_ps(x, highest))); });
    const float lse = most + std::log(_mm512_reduce_add_ps(sum));
    const int next = p_.next[i];
    const float said = widen(mem_.logits_of(next / kVocabulary)[i * mem_.logits + next % kVocabulary]);
    mem_.logit_lse[i] = lse;
    p_.logprobs[i] = said - lse;
    p_.right[i] = said >= most;
  }

  // Calls f with the logits of row i, sixteen at a time, and which of them are there.
  template <class F>
  AVX512 void over_logits(int i, const F& f) {
    for (int chunk = 0; chunk < mem_.logits_chunks; ++chunk) {
      bf16* row = mem_.logits_of(chunk) + i * mem_.logits;
      const int count = std::min(kVocabulary, m_.head.rows - chunk * kVocabulary);
      for (int v = 0; v < count; v += 16)
        f(widen16(row + v), static_cast<__mmask16>(count - v >= 16 ? 0xffff : (1u << (count - v)) - 1), row + v,
          chunk * kVocabulary + v);
    }
  }

  // -- backward

  // Adds to the gradient of the final norm what comes through the logits from `first` on.
  void back_logits(int first) {
    const int n = p_.num_learned, chunk = first / kVocabulary;
    const int there = std::min(kVocabulary, m_.head.rows - first), columns = rounded(there, kDepth);
    if (first == 0)
      each(n, [&](int i) {
        std::memset(mem_.final_gradient + static_cast<size_t>(i) * m_.hidden, 0, m_.hidden * sizeof(float));
      });
    each(n, [&](int i) { logit_slopes(i, mem_.logits_of(chunk) + i * mem_.logits, first, there); });
    pack_base_across(m_.head, first, columns);
    multiply(mem_.logits_of(chunk), mem_.logits, columns, n, m_.hidden, {}, [&](int i, int column, const float* y) {
      add(y, mem_.final_gradient + static_cast<size_t>(i) * m_.hidden + column);
    });
  }

  // Logits become the loss's gradient by them.
  AVX512 void logit_slopes(int i, bf16* row, int first, int count) {
    const __m512 lse = _mm512_set1_ps(mem_.logit_lse[i]), slope = _mm512_set1_ps(-p_.slopes[i]);
    for (int v = 0; v < rounded(count, kDepth); v += 16) {
      const int left = count - v;
      const __mmask16 there = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
      const __m512 p = fast_exp16(_mm512_sub_ps(widen16(row + v), lse));
      narrow16(_mm512_maskz_mul_ps(there, p, slope), row + v);
    }
    const int next = p_.next[i] - first;
    if (next >= 0 && next < count) row[next] = narrow(widen(row[next]) + p_.slopes[i]);
  }

  void back_begin() {
    each(p_.rows, [&](int t) { std::memset(residual(t), 0, m_.hidden * sizeof(float)); });
    each(p_.num_learned, [&](int i) { back_final(i); });
  }

  AVX512 void back_final(int i) {
    const float *x = mem_.final_residual + static_cast<size_t>(i) * m_.hidden,
                *g = mem_.final_gradient + static_cast<size_t>(i) * m_.hidden;
    norm_row_backward([&](int at) AVX512 { return _mm512_loadu_ps(x + at); },
                      [&](int at) AVX512 { return _mm512_loadu_ps(g + at); }, m_.final_norm, mem_.final_scale[i],
                      m_.hidden, residual(p_.learned[i]));
  }

  void back_mlp(const Layer& layer, const Kept& k) {
    narrow_residual();
    activate(k);
    back_project(down(layer), k, layer, mem_.slope, mem_.hidden,
                 [&](int t, int column, const float* y) { narrow32(y, mem_.narrow + t * mem_.act + column); });
    each(p_.rows, [&](int t) {
      const bf16* gate = k.gate_up + t * mem_.gate_up;
      bf16* to = mem_.wide + t * mem_.gate_up;
      activate_row_backward(gate, gate + m_.intermediate, mem_.narrow + t * mem_.act, m_.intermediate, to,
                            to + m_.intermediate);
    });
    back_project(gate_up(layer, k), k, layer, mem_.wide, mem_.gate_up,
                 [&](int t, int column, const float* y) { narrow32(y, mem_.narrow + t * mem_.hidden + column); });
    back_norm(k.middle, layer.mlp_norm, k.mlp_scale);
  }

  void back_attention(const Layer& layer, const Kept& k, bool further) {
    narrow_residual();
    back_project(output(layer, k), k, layer, mem_.slope, mem_.hidden,
                 [&](int t, int column, const float* y) { narrow32(y, mem_.narrow + t * mem_.q + column); });
    each(p_.num_sequences * m_.kv_heads, [&](int i) {
      const Sequence& s = p_.sequences[i / m_.kv_heads];
      const int head = i % m_.kv_heads;
      const size_t at = s.start * mem_.q + first_column(head);
      bf16* to = mem_.wide + s.start * mem_.qkv;
      attend_backward(attended(layer, k, s, head), k.attended + at, mem_.narrow + at, mem_.q, to + first_column(head),
                      to + q_width_ + head * m_.head_dim, to + q_width_ + kv_width_ + head * m_.head_dim, scratch());
    });
    each(p_.rows, [&](int t) {
      bf16* row = mem_.wide + t * mem_.qkv;
      if (s_.sequence_of_row[t] < 0) {
        std::memset(row, 0, qkv_width_ * sizeof(bf16));
      } else {
        turn(row, t, -1.0f);
      }
    });
    back_project(
        qkv(layer, k), k, layer, mem_.wide, mem_.qkv,
        [&](int t, int column, const float* y) { narrow32(y, mem_.narrow + t * mem_.hidden + column); }, further);
    if (further) back_norm(k.input, layer.input_norm, k.scale);
  }

  void narrow_residual() {
    each(p_.rows, [&](int t) { narrow_row(residual(t), m_.hidden, mem_.slope + t * mem_.hidden); });
  }

  // Adds to the residual's gradient what comes through a norm, whose own is in `narrow`.
  void back_norm(const bf16* x, const bf16* weight, const float* scale) {
    each(p_.rows, [&](int t) { back_norm_row(x + t * mem_.hidden, weight, scale[t], t); });
  }

  AVX512 void back_norm_row(const bf16* x, const bf16* weight, float scale, int t) {
    const bf16* g = mem_.narrow + t * mem_.hidden;
    norm_row_backward([&](int at) AVX512 { return widen16(x + at); }, [&](int at) AVX512 { return widen16(g + at); },
                      weight, scale, m_.hidden, residual(t));
  }

  // -- the linears of a layer

  Site qkv(const Layer& layer, const Kept& k) const {
    return {layer.qkv, 0, 3, {q_width_, kv_width_, kv_width_}, k.normed, mem_.hidden};
  }
  Site output(const Layer& layer, const Kept& k) const { return {layer.output, 3, 1, {m_.hidden}, k.attended, mem_.q}; }
  Site gate_up(const Layer& layer, const Kept& k) const {
    return {layer.gate_up, 4, 2, {m_.intermediate, m_.intermediate}, k.mlp_normed, mem_.hidden};
  }
  Site down(const Layer& layer) const { return {layer.down, 6, 1, {m_.hidden}, mem_.activated, mem_.act}; }

  // -- attention

  void turn(bf16* row, int t, float way) {
    const int half = m_.rotary_dim / 2;
    const size_t at = static_cast<size_t>(t) * half;
    for (int h = 0; h < m_.heads + m_.kv_heads; ++h)
      rotate_row(row + h * m_.head_dim, p_.cos + at, p_.sin + at, half, way);
  }

  int first_column(int kv_head) const { return kv_head * (m_.heads / m_.kv_heads) * m_.head_dim; }

  Attended attended(const Layer& layer, const Kept& k, const Sequence& s, int head) const {
    const bf16* row = k.qkv + s.start * mem_.qkv;
    const int group = m_.heads / m_.kv_heads;
    return {s_.learner.isa,
            row + first_column(head),
            row + q_width_ + head * m_.head_dim,
            row + q_width_ + kv_width_ + head * m_.head_dim,
            mem_.qkv,
            s.length,
            group,
            m_.head_dim,
            layer.window,
            m_.scale,
            k.lse + head * group * mem_.lse_pitch + s.start,
            mem_.lse_pitch};
  }

  const int q_width_, kv_width_, qkv_width_;
};

}  // namespace

void Shared::work(int rank) { Way(*this, rank).go(); }

extern "C" {

Learner* adapterhub_learner(int threads, int isa) { return new Learner(threads, static_cast<Isa>(isa)); }

void adapterhub_learner_free(Learner* learner) { delete learner; }

// Bytes that `piece` needs in `memory`.
int64_t adapterhub_learner_memory(const Model* model, const Piece* piece) {
  return static_cast<int64_t>(Memory(*model, *piece).bytes);
}

int adapterhub_learn(Learner* learner, const Model* model, const Piece* piece, int stage, int at) {
  return status_of([&] {
    return learner->team.run(std::make_shared<Shared>(*learner, *model, *piece, Task{static_cast<Stage>(stage), at}));
  });
}
}

#endif
