"""A worker of a job, for programs whose gradients and parameters are NumPy arrays."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import _gradwire
from .errors import ConfigError

NUMPY_DTYPES: Final[Mapping[str, Any]] = {"f32": np.float32, "f16": np.float16}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model. All workers give a tensor of one name the same shape, rule and group.

    Args:
        name: unique within the model.
        shape: elements along each dimension; ``()`` is a scalar.
        init: how the servers fill it before the first step: ``"zeros"``, ``"xavier_uniform"`` (uniform on
            ±sqrt(6 / (fan_in + fan_out))), ``"kaiming_normal"`` (standard deviation sqrt(2 / fan_in)), ``("normal", std)`` or
            ``("constant", value)``. The values depend on the job's seed, the name and the element alone.
        group: the parameter group: 0 is the default one, i the i-th of the job's ``optimizer.groups``.
    """

    name: str
    shape: tuple[int, ...]
    init: str | tuple[str, float] = "zeros"
    group: int = 0

    def declaration(self) -> tuple[str, list[int], str, float, int]:
        """What the extension module takes."""
        rule, number = (self.init, 0.0) if isinstance(self.init, str) else self.init
        if isinstance(self.init, str) and rule in ("normal", "constant"):
            raise ConfigError(f'tensor `{self.name}`: init "{rule}" needs a number: write ("{rule}", 0.02)')
        shape = [int(length) for length in self.shape]
        if any(length < 0 for length in shape):
            raise ConfigError(f"tensor `{self.name}`: its shape {self.shape} has a negative length")
        return (self.name, shape, rule, number, self.group)


def join(tensors: Iterable[Tensor], device: int | None = None) -> Worker:
    """Take this process' place in the job that its environment names, and wait for the first parameters.

    ``gradwire run`` sets that environment. The call waits until all workers have joined, or the job's own deadlines pass.

    Args:
        tensors: what this worker has of the model, last layers last; they are numbered from 0 in this order.
        device: a GPU, in whose memory gradients and parameters then lie (:meth:`Worker.gradient_buffer`), from where they leave
            and to where they come without passing through the host's: over RDMA alone.

    Raises:
        ConfigError: there is no such GPU, or a server is reached over a fabric that does not reach its memory; a tensor is wrong, another worker declares it differently, or the environment names no job.
        RefusedError: the launcher refused.
        JobFailed: another part of the job failed first.
    """
    tensors = tuple(tensors)
    declarations = [tensor.declaration() for tensor in tensors]
    seat = _gradwire.Seat.take()
    return Worker(seat, seat.join(declarations, device), tensors)


class Worker:
    """A worker of a job, as :func:`join` gives it.

    A clock is one step: :meth:`push_pull` (or :meth:`push`) the gradient of each tensor, in any order, then :meth:`wait`. One
    thread at a time may call; waiting gives up the interpreter's lock, and Ctrl-C ends a wait. As a context manager it finishes
    at the end of the block, and closes if the block raises.

    A tensor is named by its name or its number.
    """

    def __init__(self, seat: _gradwire.Seat, worker: _gradwire.Worker, tensors: tuple[Tensor, ...]) -> None:
        self._worker = worker
        self._tensors = tensors
        self._index = {tensor.name: index for index, tensor in enumerate(tensors)}
        self._rank = seat.rank
        self._config: dict[str, Any] = json.loads(seat.config)

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return self._rank

    @property
    def workers(self) -> int:
        """How many workers the job has."""
        return int(self._config["workers"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The job's settings, by the keys that ``gradwire run --set`` takes, as nested tables."""
        return self._config

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors as they were declared."""
        return self._tensors

    @property
    def clock(self) -> int:
        """The clock (step) that the next push belongs to; not 0 at first in a job that was resumed."""
        return self._worker.clock

    def should_leave(self) -> bool:
        """Whether this worker was told to leave (``gradwire remove-worker``) and has no clock before it: it is to :meth:`finish`.
        To be asked between two clocks; never waits. What it has pushed in earlier clocks counts."""
        return self._worker.should_leave()

    @property
    def loss_scale(self) -> float:
        """What the loss of this clock is to be multiplied by: the servers divide gradients by it. 1 unless the job has `loss_scale`."""
        return self._worker.loss_scale

    @property
    def version(self) -> int:
        """The version of the parameters at hand: that of the oldest chunk. Under ``bsp`` it is the number of clocks applied."""
        return self._worker.version

    def push_pull(self, tensor: int | str, gradient: Any = None) -> None:
        """Start a tensor's step: its gradient of this clock goes out, and the new parameters are on their way until :meth:`wait`.

        Never waits for the network. Tensors may be given in any order, each once a clock.

        Args:
            tensor: name or number.
            gradient: as many elements as the tensor has, in host memory: a NumPy array or anything with the buffer protocol or
                DLPack. f32 in C order is copied once, into registered memory, and may be changed at once; anything else is
                converted first. Without it the push takes what was written to :meth:`gradient_view`, and nothing is copied.

        Raises:
            ConfigError: no such tensor, another number of elements, or a second gradient in one clock.
            JobFailed: the job has ended.
        """
        self._push(tensor, gradient, True)

    def push(self, tensor: int | str, gradient: Any = None) -> None:
        """As :meth:`push_pull` for a gradient that brings nothing back: :meth:`wait` waits only until it has left, and
        :meth:`pull` fetches parameters. All pushes of a clock are of one kind."""
        self._push(tensor, gradient, False)

    def _push(self, tensor: int | str, gradient: Any, reply: bool) -> None:
        index = self.index(tensor)
        if gradient is None:
            self._worker.push_in_place(index, reply)
        else:
            self._worker.push(index, _as_f32(gradient), reply)

    def wait(self, timeout: float | None = None) -> None:
        """End the clock and wait until the new parameters are here (after :meth:`push_pull`), or the gradients have left (after
        :meth:`push`). Tensors that were not pushed have no gradient in this clock.

        Args:
            timeout: seconds; the job's ``wait_ms`` if it is None.

        Raises:
            DeadlineError: naming the server, the chunk and the clock that were waited for. It may be called again.
            JobFailed: the job has failed.
            Preempted: the job was told to stop and has written its checkpoint.
            Left: this worker was told to leave, and is not of the job at this clock any more; it has only to :meth:`finish`.
            KeyboardInterrupt: by Ctrl-C. It may be called again.
        """
        self._worker.wait(timeout)

    def test(self) -> bool:
        """End the clock as :meth:`wait` does, but without waiting: whether everything is here. False: nothing may be pushed, and
        this or :meth:`wait` is to be called again. True: the next clock has begun."""
        return self._worker.test()

    def pull(self, min_version: int = 0, timeout: float | None = None) -> None:
        """Bring all parameters up to a version or later. Not between :meth:`push_pull` and the end of its clock.

        Args:
            min_version: under ``bsp`` the number of clocks applied.
            timeout: seconds to wait for it; the job's ``wait_ms`` if it is None.

        Raises:
            DeadlineError: the version was not reached; what there was has been brought all the same.
        """
        self._worker.pull(min_version, timeout)

    def parameters(self, tensor: int | str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Copy a tensor's parameters out, as f32 in the tensor's shape.

        Args:
            tensor: name or number.
            out: where to, f32 in C order with as many elements as the tensor; a new array if it is None.

        Raises:
            ConfigError: while they are on their way, between :meth:`push_pull` and the end of the clock.
        """
        index = self.index(tensor)
        if out is None:
            out = np.empty(self._tensors[index].shape, np.float32)
        self._worker.parameters(index, out)
        return out

    def gradient_view(self, tensor: int | str) -> NDArray[Any]:
        """Where a tensor's gradient lies: an array over the registered memory itself, in the tensor's shape and the job's
        ``gradient_dtype``. Write the gradient there and :meth:`push_pull` without one: nothing is copied.

        Not to be written from the push until the clock has ended: the network reads it. The array may outlive the worker.

        Raises:
            ConfigError: the job's gradients are bf16, which NumPy does not have.
        """
        index = self.index(tensor)
        return self._array(index, self._worker.gradient_buffer(index))

    def parameter_view(self, tensor: int | str) -> NDArray[Any]:
        """Where a tensor's parameters land: a read-only array over the registered memory itself, in the tensor's shape and the
        job's ``parameter_dtype``. Between :meth:`push_pull` and the end of the clock it changes while it is read."""
        index = self.index(tensor)
        view = self._array(index, self._worker.parameter_buffer(index))
        view.flags.writeable = False
        return view

    def gradient_buffer(self, tensor: int | str) -> _gradwire.Buffer:
        """The same memory as :meth:`gradient_view`, flat, for other libraries and on GPUs too: it speaks DLPack, and the buffer
        protocol where it is the host's. ``torch.from_dlpack(worker.gradient_buffer("w")).view(shape)`` copies nothing, and has
        bf16. On a GPU, push when what writes the gradient has ended: the worker knows no streams."""
        return self._worker.gradient_buffer(self.index(tensor))

    def parameter_buffer(self, tensor: int | str) -> _gradwire.Buffer:
        """The same of :meth:`parameter_view`; not to be written to."""
        return self._worker.parameter_buffer(self.index(tensor))

    def _array(self, index: int, buffer: _gradwire.Buffer) -> NDArray[Any]:
        tensor = self._tensors[index]
        if buffer.device is not None:
            raise ConfigError(f"`{tensor.name}` lies on GPU {buffer.device}, which NumPy does not reach: use gradient_buffer and "
                              "parameter_buffer, which speak DLPack")  # fmt: skip
        if buffer.dtype not in NUMPY_DTYPES:
            raise ConfigError(
                f"`{tensor.name}` lies in registered memory as {buffer.dtype}, which NumPy does not have: use push_pull(tensor, "
                "gradient) and parameters(tensor), which convert"
            )
        return np.frombuffer(buffer, NUMPY_DTYPES[buffer.dtype]).reshape(tensor.shape)

    def set_learning_rate(self, rate: float) -> None:
        """Change the default group's learning rate on every server, from this clock on; other groups keep their proportion to it.

        Under ``bsp`` it takes effect at exactly that clock everywhere, if it is called before this worker's first push of the
        clock.
        """
        self._worker.set_learning_rate(rate)

    def set(self, **settings: float) -> int:
        """Change settings on all servers at one clock, as ``gradwire set``: ``worker.set(lr=0.01, weight_decay=0.1, clip_norm=1)``.

        Returns:
            The clock from which on they hold.

        Raises:
            ConfigError: naming what cannot be changed.
            RefusedError: with the launcher's reason.
        """
        return self._worker.change_settings([f"{key.replace('_', '-')}={value}" for key, value in settings.items()])

    def request_checkpoint(self) -> None:
        """Ask for a checkpoint at the next clock that no server has passed, and go on at once: it is complete some steps of all
        workers later, which :meth:`checkpoint_written` tells. One at a time."""
        self._worker.request_checkpoint()

    def checkpoint_written(self) -> int | None:
        """The clock of the checkpoint that was asked for, once it is complete; None while it is not. Told once. Never waits.

        Raises:
            RefusedError: there is none to be had, as in a job without a checkpoint directory.
        """
        return self._worker.checkpoint_written()

    def job_status(self) -> dict[str, Any]:
        """How the job stands: what ``gradwire status --json`` prints."""
        status: dict[str, Any] = json.loads(self._worker.job_status())
        return status

    def finish(self) -> None:
        """This worker has done its part: end the clock if something has been pushed in it, wait (at most the job's ``wait_ms``)
        until every server knows, and leave the job in order."""
        self._worker.finish()

    def close(self) -> None:
        """Leave the job at once, wherever it stands. A worker that leaves without :meth:`finish` has failed, and so has the
        job. Nothing happens if the worker has ended already."""
        self._worker.close()

    def index(self, tensor: int | str) -> int:
        """The number of a tensor.

        Raises:
            ConfigError: this worker has none of this name or number.
        """
        if isinstance(tensor, str):
            if tensor not in self._index:
                raise ConfigError(f"this worker has no tensor `{tensor}`; it has {', '.join(self._index)}")
            return self._index[tensor]
        index = int(tensor)
        if not 0 <= index < len(self._tensors):
            raise ConfigError(f"there is no tensor {index}: this worker declared {len(self._tensors)}, numbered from 0")
        return index

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()


def _as_f32(values: Any) -> NDArray[np.float32]:
    """The values as f32 in C order: themselves if they are that already."""
    is_array = isinstance(values, np.ndarray) or hasattr(values, "__array_interface__") or hasattr(values, "__array__")
    if not is_array and hasattr(values, "__dlpack__"):
        values = np.from_dlpack(values)
    return np.ascontiguousarray(values, dtype=np.float32)
