"""Peers: one that cannot be called is a reason in the table, never an error."""

import sys
from types import SimpleNamespace as Module

import attention
import pytest
import torch

GPU = torch.device("cuda")  # only as an argument: nothing runs on it
NAME = "flash-4-deterministic"


def able(q, k, v, causal=False, deterministic=False):
    return ("deterministic" if deterministic else "plain"), "lse"


def unable(q, k, v, causal=False):
    return "plain"


def found(monkeypatch, function, device=GPU) -> dict:
    """attention.py's FlashAttention peers if flash_attn.cute has this function."""
    module = Module() if function is None else Module(flash_attn_func=function)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    every = {peer.name: peer for peer in attention.peers(device)}
    return {name: every[name] for name in ("flash-4", NAME)}


def test_flash_4_is_called_both_ways(monkeypatch):
    both = found(monkeypatch, able)
    assert both["flash-4"].call(1, 2, 3) == "plain"
    assert both[NAME].call(1, 2, 3) == "deterministic"
    assert all(peer.why_not is None and peer.kind == "peer" for peer in both.values())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (unable, "its flash_attn_func does not take deterministic"),
        (dict.update, "its flash_attn_func does not take deterministic"),  # has no signature
        (None, "flash_attn.cute has no flash_attn_func"),
    ],
    ids=["without", "unknown", "missing"],
)
def test_without_a_deterministic_backward_there_is_a_reason(function, reason, monkeypatch):
    both = found(monkeypatch, function)
    assert both[NAME].call is None and both[NAME].why_not == reason
    assert (both["flash-4"].call is None) == (function is None)


def test_kernels_for_gpus_are_not_tried_on_a_cpu(monkeypatch):
    both = found(monkeypatch, able, torch.device("cpu"))
    assert {peer.why_not for peer in both.values()} == {"its kernels are for GPUs"}
