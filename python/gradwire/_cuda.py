"""Copies between GPUs and registered memory for :mod:`gradwire.torch`, so that nothing waits for a GPU before ``step``.

A gradient is copied on a stream of its own behind what wrote it, and leaves when the copy has arrived; parameters come back on the
program's stream, in front of the next forward.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["Copies"]

_PORTABLE = 1
"""``cudaHostRegisterPortable``: page-locked for every device of the process."""


class Copies:
    """Gradients on their way from GPUs to the memory that fabrics read, and the pushes that wait for them.

    Args:
        gradients: where each gradient lies in registered memory.
        parameters: the same of the values that come back.
    """

    def __init__(self, gradients: Iterable[Tensor], parameters: Iterable[Tensor]) -> None:
        views = [list(gradients), list(parameters)]
        ranges = [_pages(same) for same in views]
        cudart = torch.cuda.cudart()
        for start, length in ranges:
            torch.cuda.check_error(cudart.cudaHostRegister(start, length, _PORTABLE))
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # The memory stays mapped until then: the views go with this call's arguments.
        weakref.finalize(self, _unlock, [start for start, _ in ranges], self._streams, views)
        self._under_way: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()

    def take(self, target: Tensor, gradient: Tensor, push: Callable[[], None]) -> None:
        """Copies ``gradient`` to ``target`` when all that the present stream has been given is done; ``push`` is called once it is
        there, within a later call of this object."""
        stream = self._streams.get(gradient.device)
        if stream is None:
            stream = self._streams[gradient.device] = torch.cuda.Stream(gradient.device)
        stream.wait_stream(torch.cuda.current_stream(gradient.device))
        with torch.cuda.stream(stream), torch.no_grad():
            target.copy_(gradient, non_blocking=True)
        gradient.record_stream(stream)
        self._under_way.append((stream.record_event(), push))
        self.push_arrived()

    def push_arrived(self) -> None:
        """Pushes what has arrived, and waits for nothing."""
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()[1]()

    def push_all(self) -> None:
        """Pushes everything, each as soon as it has arrived."""
        while self._under_way:
            self._under_way[0][0].synchronize()
            self._under_way.popleft()[1]()


def _pages(views: list[Tensor]) -> tuple[int, int]:
    """First byte and length of the pages that hold all of the views, which lie in one flat buffer."""
    start = min(view.data_ptr() for view in views) // mmap.PAGESIZE * mmap.PAGESIZE
    end = max(view.data_ptr() + view.numel() * view.element_size() for view in views)
    return start, -(-(end - start) // mmap.PAGESIZE) * mmap.PAGESIZE


def _unlock(starts: list[int], devices: Iterable[torch.device], _views: list[list[Tensor]]) -> None:
    """When nobody has the optimizer any more: waits for what the devices still copy, both ways, and lets go of the memory."""
    for device in devices:
        torch.cuda.synchronize(device)
    cudart = torch.cuda.cudart()
    for start in starts:
        cudart.cudaHostUnregister(start)
