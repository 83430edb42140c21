// A piece of training, as Python describes it, and where what its stages work on lies.
#pragma once

#include <algorithm>
#include <vector>

#include "model.h"
#include "products.h"

#if defined(__x86_64__)

extern "C" {

struct Trained {   // one job's rows
  int start, end;  // multiples of 16
  int rank;
  const bf16* factors;         // A of every linear, [rank, in], and B, [rank, out] with the scale folded in
  float* gradients;            // of the same shapes, to be added to
  const int64_t *a_at, *b_at;  // for each of the base's linears where its A and B lie in the factors, or -1
  const int64_t *a_gradient_at, *b_gradient_at;  // and where their gradients do
};

struct Sequence {
  int start, length;  // rows
};

struct Piece {
  int rows;                // a multiple of 16
  int kept_layers;         // all of them, or 1 where no backward follows
  const bf16* embedded;    // [rows, hidden], zeros in rows of no sequence
  const float *cos, *sin;  // [rows, rotary_dim / 2]
  const Sequence* sequences;
  int num_sequences;
  const Trained* jobs;
  int num_jobs;
  const int32_t* learned;  // [num_learned] rows, and the tokens that should follow them
  const int32_t* next;
  int num_learned;
  float* logprobs;      // [num_learned] of those tokens
  uint8_t* right;       // [num_learned] whether they are the likeliest
  const float* slopes;  // [num_learned] of the loss, by the log probabilities
  char* memory;         // of `adapterhub_learner_memory` bytes; what it holds is kept from stage to stage
};

enum Stage { kBegin, kAttention, kMlp, kLogits, kLosses, kBackLogits, kBackBegin, kBackMlp, kBackAttention };
}

constexpr int kSlack = 32;         // rows past the end that tiles may read
constexpr int kVocabulary = 4096;  // columns of the logits in one stage
constexpr int kRowBlock = 128;     // rows that go over a panel together
constexpr int kSites = 7;          // linears of a layer: q, k, v, output, gate, up, down

struct Kept {  // of one layer
  bf16 *input, *normed, *qkv, *attended, *middle, *mlp_normed, *gate_up;
  float *scale, *mlp_scale, *lse;
  bf16* low;  // [kSites * rank, columns]: what x @ A.T gave, transposed
};

// Where everything lies, from `memory` on. Pitches are in numbers.
struct Memory {
  std::vector<Kept> kept;
  int rank, logits_chunks;
  size_t hidden, q, qkv, gate_up, act, lows, low_rows, logits, lse_pitch, packed_size, pack_stride;
  float *residual, *logit_lse, *final_residual, *final_scale, *final_gradient;
  bf16 *activated, *wide, *slope, *narrow, *low, *packed, *lowering, *raising, *final_normed, *logit;
  size_t bytes = 0;

  Memory(const Model& m, const Piece& p) {
    int most = 1, columns = 0;
    for (int j = 0; j < p.num_jobs; ++j) {
      most = std::max(most, p.jobs[j].rank);
      columns += rounded(p.jobs[j].end - p.jobs[j].start, kDepth);
    }
    rank = rounded(most, kDepth);
    const int q_width = m.heads * m.head_dim, qkv_width = q_width + 2 * m.kv_heads * m.head_dim;
    const int widest = std::max({m.hidden, m.intermediate, q_width});
    hidden = pitch(m.hidden), q = pitch(q_width), qkv = pitch(qkv_width), gate_up = pitch(2 * m.intermediate);
    act = pitch(m.intermediate), lows = pitch(3 * rank), low_rows = pitch(columns);
    logits = pitch(kVocabulary), lse_pitch = p.rows + kSlack;
    logits_chunks = (m.head.rows + kVocabulary - 1) / kVocabulary;
    base_ = p.memory;
    const size_t rows = p.rows + kSlack, learned = rounded(p.num_learned, kTile) + kSlack;
    for (int i = 0; i < p.kept_layers; ++i) {
      Kept k;
      take(k.input, rows * hidden), take(k.normed, rows * hidden), take(k.qkv, rows * qkv);
      take(k.attended, rows * q), take(k.middle, rows * hidden), take(k.mlp_normed, rows * hidden);
      take(k.gate_up, rows * gate_up), take(k.scale, rows), take(k.mlp_scale, rows), take(k.lse, lse_pitch * m.heads);
      take(k.low, kSites * rank * low_rows);
      kept.push_back(k);
    }
    take(residual, rows * m.hidden), take(activated, rows * act), take(wide, rows * std::max(qkv, gate_up));
    take(slope, rows * hidden), take(narrow, rows * pitch(widest)), take(low, rows * lows);
    packed_size =
        std::max({static_cast<size_t>(m.hidden) * qkv_width, static_cast<size_t>(m.hidden) * q_width,
                  static_cast<size_t>(m.hidden) * 2 * m.intermediate, static_cast<size_t>(m.hidden) * kVocabulary});
    pack_stride = static_cast<size_t>(rank) * std::max({m.hidden, 2 * m.intermediate, qkv_width});
    take(packed, packed_size), take(lowering, 3 * pack_stride * p.num_jobs),
        take(raising, 3 * pack_stride * p.num_jobs);
    take(final_residual, learned * m.hidden), take(final_scale, learned), take(final_gradient, learned * m.hidden);
    take(final_normed, learned * hidden), take(logit_lse, learned), take(logit, logits_chunks * learned * logits);
    logit_stride = learned * logits;
  }

  bf16* logits_of(int chunk) const { return logit + chunk * logit_stride; }

 private:
  template <class T>
  void take(T*& part, size_t count) {
    part = reinterpret_cast<T*>(base_ + bytes);
    bytes += (count * sizeof(T) + 63) / 64 * 64;
  }

  char* base_;
  size_t logit_stride = 0;
};

#endif
