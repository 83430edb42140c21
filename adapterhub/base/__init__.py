"""The resident base and the engine that runs it: loading, injection, LoRA op, attention, KV cache, scheduler, engine.

Imports torch, transformers and `adapterhub.swap`; knows nothing of HTTP, jobs or owners' keys.
"""
