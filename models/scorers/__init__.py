"""Models that score media: each a folder of a checkpoint in, numbers out, frames [n, T, H, W, 3] uint8 between.

Safetensors only, classes of transformers only. What none of them fits is `call: 'module:function'`.
"""
