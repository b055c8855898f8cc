"""CUDA graphs on a CPU: a graph is a list of operators, and a replay calls them again.

As on a GPU, a capture computes nothing and draws no random numbers, and a replay runs no Python.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2 import graphs


class Graph:
    """A CUDA graph: the operators called during its capture, and their results."""

    captured: "Graph | None" = None  # the graph being captured

    def __init__(self):
        self.calls, self.written = [], []

    def undo(self):
        """Restores the tensors that the capture wrote to: on a GPU a capture computes nothing."""
        for x, before in reversed(self.written):
            x.data.copy_(before)
        self.written.clear()

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Tape(TorchDispatchMode):
    """Adds every operator to the graph being captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        graph, kwargs = Graph.captured, kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensors = (x for x in tree_leaves(value) if isinstance(x, torch.Tensor))
                graph.written += [(x, x.clone()) for x in tensors]
        results = func(*args, **kwargs)
        graph.calls.append((func, args, kwargs, results))
        return results


@contextlib.contextmanager
def capture(graph, pool=None, stream=None):
    Graph.captured = graph
    random = torch.get_rng_state()
    try:
        with Tape():
            yield
    finally:
        Graph.captured = None
        graph.undo()
        torch.set_rng_state(random)


CUDA = {
    "CUDAGraph": Graph,
    "graph": capture,
    "graph_pool_handle": lambda: (0, 1),
    "is_current_stream_capturing": lambda: Graph.captured is not None,
    "set_stream": lambda stream: None,
}


class Counts:
    """Makes gpt2.graphs capture on this machine, with a GPU or without, and counts."""

    def __init__(self, monkeypatch):
        self.captures = self.replays = 0
        if not torch.cuda.is_available():
            monkeypatch.setattr(graphs, "supports", lambda device: True)
            for name, value in CUDA.items():
                monkeypatch.setattr(torch.cuda, name, value)
            for name in ("Stream", "current_stream"):
                monkeypatch.setattr(torch.cuda, name, lambda device=None: None)

        class Counted(graphs.Captured):
            def __init__(captured, *args):
                super().__init__(*args)
                self.captures += 1

            def __call__(captured, *inputs):
                self.replays += 1
                return super().__call__(*inputs)

        monkeypatch.setattr(graphs, "Captured", Counted)
