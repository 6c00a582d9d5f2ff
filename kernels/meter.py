"""Counts every memory access of the kernels that Triton's interpreter runs.

    with measure() as launches:
        kernels.aggregate_attention(attn, backend="triton")
    launches[0].tensors["attn"].issued  # bytes that the kernel's loads asked for
    launches[0].tensors["attn"].unique  # bytes touched at all: at least these come from memory

Counts are exact and the same on every run, so tests can check them. They say nothing about caches
or coalescing.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from . import interpreter


class Access(NamedTuple):
    """What one launch did to one of its tensors, in elements: how often each was loaded and stored.
    """

    tensor: torch.Tensor
    loads: torch.Tensor
    stores: torch.Tensor

    @property
    def issued(self) -> int:
        """Bytes of all loads and stores, repeats included."""
        return int((self.loads + self.stores).sum()) * self.tensor.itemsize

    @property
    def unique(self) -> int:
        """Bytes touched at least once."""
        return int(((self.loads + self.stores) > 0).sum()) * self.tensor.itemsize

    @property
    def races(self) -> int:
        """Elements stored more than once, or both loaded and stored: the order may decide them."""
        return int(((self.stores > 1) | ((self.loads > 0) & (self.stores > 0))).sum())


class Launch:
    """One kernel's launch: name, Access per tensor argument, programs, operations in tl.dot,
    atomics.

    Operations include padding. An address in no tensor argument's storage raises IndexError at
    once. `stray` counts accesses that lie in a storage but in none of the views that were passed.
    """

    def __init__(self, kernel: str, arguments: dict):
        self.kernel = kernel
        self.arguments = {
            name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)
        }
        self.programs = self.operations = self.atomics = 0
        self.counts = {}  # address of a storage: (bytes per element, loads, stores)
        for tensor in self.arguments.values():
            elements = tensor.untyped_storage().nbytes() // tensor.itemsize
            counts = np.zeros(elements, np.int64), np.zeros(elements, np.int64)
            self.counts.setdefault(tensor.untyped_storage().data_ptr(), (tensor.itemsize, counts))

    def count(self, pointers: np.ndarray, mask: np.ndarray, store: bool) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        if not addresses.size:
            return
        for start, (itemsize, counts) in self.counts.items():
            elements = (addresses - start) // itemsize
            if 0 <= elements.min() and elements.max() < counts[0].size:
                np.add.at(counts[int(store)], elements, 1)
                return
        kind = "store" if store else "load"
        raise IndexError(f"{self.kernel}: {kind} out of bounds of every argument")

    @property
    def tensors(self) -> dict[str, Access]:
        return {name: Access(t, *self._view(t)) for name, t in self.arguments.items()}

    def _view(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loads and stores of each of the tensor's elements."""
        _, counts = self.counts[tensor.untyped_storage().data_ptr()]
        layout = tensor.shape, tensor.stride(), tensor.storage_offset()
        loads, stores = (torch.from_numpy(count).as_strided(*layout) for count in counts)
        return loads, stores

    @property
    def stray(self) -> int:
        total = sum(int(loads.sum() + stores.sum()) for _, (loads, stores) in self.counts.values())
        for start, (_, counts) in self.counts.items():
            inside = torch.zeros(counts[0].size, dtype=torch.bool)
            for tensor in self.arguments.values():
                if tensor.untyped_storage().data_ptr() == start:
                    layout = tensor.shape, tensor.stride(), tensor.storage_offset()
                    inside.as_strided(*layout).fill_(True)
            total -= sum(int(c[inside.numpy()].sum()) for c in counts)
        return total


_launches: list[Launch] | None = None  # of the measure() that is running


@contextlib.contextmanager
def measure() -> Iterator[list[Launch]]:
    """Within it, every kernel that the interpreter runs is counted, and added to the list."""
    global _launches
    _launches = []
    try:
        yield _launches
    finally:
        _launches = None


def _counted_dot(self, a, b, *options):
    if _launches:
        _launches[-1].operations += 2 * a.data.size * b.data.shape[-1]
    return _dot(self, a, b, *options)


def _counted_launch(self, *args, **kwargs):
    if _launches is not None:
        _launches.append(Launch(self.fn.__name__, dict(zip(self.arg_names, args)) | kwargs))
    return _run(self, *args, **kwargs)


def _counted_program(self, x, y, z):
    if _launches:
        _launches[-1].programs += 1
    return _start_program(self, x, y, z)


def _counted_load(self, pointers, mask, *options):
    if _launches:
        _launches[-1].count(pointers.data, mask.data, store=False)
    return _load(self, pointers, mask, *options)


def _counted_store(self, pointers, value, mask, *options):
    if _launches:
        _launches[-1].count(pointers.data, mask.data, store=True)
    return _store(self, pointers, value, mask, *options)


def _counted_atomic(self, *args):
    if _launches:
        _launches[-1].atomics += 1
    return _atomic(self, *args)


interpreter.enable()  # before its dot is wrapped
_dot, InterpreterBuilder.create_dot = InterpreterBuilder.create_dot, _counted_dot
_run, GridExecutor.__call__ = GridExecutor.__call__, _counted_launch
_start_program = InterpreterBuilder.set_grid_idx
InterpreterBuilder.set_grid_idx = _counted_program
_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
InterpreterBuilder.create_masked_load = _counted_load
InterpreterBuilder.create_masked_store = _counted_store
_atomic = InterpreterBuilder.create_atomic_rmw
InterpreterBuilder.create_atomic_rmw = _counted_atomic
