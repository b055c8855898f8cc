"""Kernels around GPT-2: gpt2.kernels, and `kernels` from the root of the repository.

    from gpt2 import kernels
    kernels.causal_attention_qkv(qkv, n_head)      # the fastest backend that supports the call
    with kernels.use("triton"): ...                # this backend, or an error with the reason
    print(kernels.report())

Importing the package touches no device, starts no compiler, and needs neither triton nor a GPU.
"""

import importlib

__version__ = "0.1.0"

if __name__ == "kernels":  # found on sys.path as ./kernels, from the root of the repository
    from ._alias import stand_aside

    stand_aside()
else:
    from .dispatch import BACKENDS, BackendUnavailable, report, use, why_not
    from .linear import linear, linear_int8, quantize_int8
    from .ops import (
        add_layer_norm,
        bias_gelu,
        causal_attention,
        causal_attention_qkv,
        cross_entropy,
        decode_attention,
        gelu,
        layer_norm,
        linear_cross_entropy,
    )

    __all__ = [
        "BACKENDS",
        "BackendUnavailable",
        "add_layer_norm",
        "bias_gelu",
        "causal_attention",
        "causal_attention_qkv",
        "cross_entropy",
        "decode_attention",
        "gelu",
        "layer_norm",
        "linear",
        "linear_cross_entropy",
        "linear_int8",
        "quantize_int8",
        "report",
        "use",
        "why_not",
    ]

    def __getattr__(name):
        """DecodeLayers, which is in gpt2.generate.decode_layers now."""
        if name == "DecodeLayers":
            return importlib.import_module("gpt2.generate.decode_layers").DecodeLayers
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
