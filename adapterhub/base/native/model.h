// A base of the Llama family, as Python describes it.
#pragma once

#include "linear.h"

extern "C" {

struct Layer {
  Matrix qkv, output, gate_up, down;
  const bf16 *input_norm, *mlp_norm;
  const bf16 *q_norm, *k_norm;  // per head, or null
  bf16 *keys, *values;          // this layer of the KV cache
  int window;                   // how far back a token looks, itself included; 0 for all
  int targets[7];               // of q, k, v, output, gate, up, down among the linears that adapters know
};

struct Model {
  const Layer* layers;
  int num_layers, hidden, heads, kv_heads, head_dim, intermediate, rotary_dim;
  float epsilon, scale;
  const bf16* final_norm;
  Matrix head;
};
}
