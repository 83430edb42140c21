"""Adapters as blocks, and where they lie: layout, codec, block files, allocator, pool, tiers, registry.

Imports torch, safetensors and sqlite-utils; knows nothing of transformers, HTTP or jobs.
"""
