"""The C structures of `decoder.cpp` and `learner.cpp`, field by field, and what fills them from tensors."""

from __future__ import annotations

import ctypes

import torch

from adapterhub.base.quantize import Precision, QuantizedWeight

_FORMATS = {Precision.INT8: 1, Precision.INT4: 2}


class Matrix(ctypes.Structure):
    """A linear's weights [rows, cols]: bf16 as torch has them, or quantized."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("minima", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("cols", ctypes.c_int),
        ("format", ctypes.c_int),
    )

    @classmethod
    def of(cls, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None = None) -> Matrix:
        rows, cols = weight.shape
        made = cls(bias=None if bias is None else address(bias), rows=rows, cols=cols)
        if isinstance(weight, QuantizedWeight):
            made.data = address(weight.data)
            made.scales, made.minima = address(weight.scales), address(weight.minima)
            made.format = _FORMATS[weight.precision]
        else:
            made.data = address(weight)
        return made


class Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("input_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("window", ctypes.c_int),
        ("targets", ctypes.c_int * 7),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("num_layers", ctypes.c_int),
        ("hidden", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("head_dim", ctypes.c_int),
        ("intermediate", ctypes.c_int),
        ("rotary_dim", ctypes.c_int),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("final_norm", ctypes.c_void_p),
        ("head", Matrix),
    )


class Segment(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_int),
        ("end", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("offsets", ctypes.c_void_p),
    )


class Step(ctypes.Structure):
    """`Batch` in the C++ code."""

    _fields_ = (
        ("tokens", ctypes.c_int),
        ("embedded", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("contexts", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_at", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("segments", ctypes.POINTER(Segment)),
        ("num_segments", ctypes.c_int),
        ("rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int),
        ("logits", ctypes.c_void_p),
    )


class Trained(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_int),
        ("end", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("factors", ctypes.c_void_p),
        ("gradients", ctypes.c_void_p),
        ("a_at", ctypes.c_void_p),
        ("b_at", ctypes.c_void_p),
        ("a_gradient_at", ctypes.c_void_p),
        ("b_gradient_at", ctypes.c_void_p),
    )


class Sequence(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_int),
        ("length", ctypes.c_int),
    )


class Piece(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int),
        ("kept_layers", ctypes.c_int),
        ("embedded", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("sequences", ctypes.POINTER(Sequence)),
        ("num_sequences", ctypes.c_int),
        ("jobs", ctypes.POINTER(Trained)),
        ("num_jobs", ctypes.c_int),
        ("learned", ctypes.c_void_p),
        ("next", ctypes.c_void_p),
        ("num_learned", ctypes.c_int),
        ("logprobs", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
    )


def address(tensor: torch.Tensor) -> int:
    """Where a contiguous tensor's numbers begin; the caller keeps the tensor alive."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()
