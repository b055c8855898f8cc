"""Text and tokens from a model.

decoding.py       continues a batch of prompts; sampling.py chooses each token
kv_cache.py       keys and values of past tokens
decode_layers.py  all blocks for one token in a single call, on a CPU
completion.py     text from prompts
quantize.py       int8 weights
"""
