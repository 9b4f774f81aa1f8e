"""The optimizer for PyTorch: ``backward`` sends gradients as it makes them, ``step`` waits for the servers' new parameters.

    optimizer = gradwire.torch.Optimizer(model.named_parameters(), lr=3e-4)
    for batch in batches(optimizer.worker.rank, optimizer.worker.workers):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    optimizer.finish()

Which optimizer it is, and its constants, the job says: ``gradwire run --optimizer adamw --set optimizer.weight_decay=0.1 ...``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor

from . import _gradwire
from .errors import ConfigError
from .worker import Tensor as Declared
from .worker import Worker

if TYPE_CHECKING:
    from ._cuda import Copies

__all__ = ["Optimizer"]

WIRE: Final = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FORMATS: Final = {dtype: name for name, dtype in WIRE.items()}


@dataclass(slots=True, eq=False)
class _Parameter:
    """A parameter that is trained, and where its gradient and its values lie in registered memory."""

    name: str
    tensor: torch.nn.Parameter
    index: int
    gradient: Tensor
    values: Tensor
    # What was pushed in this clock, and how often it had been written then.
    pushed: Tensor | None = None
    version: int = 0
    # Where autograd adds to the gradient; it lasts, with its hook, for as long as somebody holds it.
    node: torch.autograd.graph.Node | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether gradient and values are copied off and onto a GPU."""
        return self.tensor.device.type == "cuda"

    @property
    def gradient_is_view(self) -> bool:
        """Whether autograd's gradient can be the registered memory itself: of the same format, on the host."""
        return self.gradient.dtype == self.tensor.dtype and self.tensor.device.type == "cpu"

    @property
    def values_are_view(self) -> bool:
        """The same of the parameter's own values."""
        return self.values.dtype == self.tensor.dtype and self.tensor.device.type == "cpu"

    def checked(self) -> Tensor:
        """The gradient, if it is one that servers take."""
        gradient = self.tensor.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise ConfigError(f"the gradient of `{self.name}` is sparse, and servers take dense ones: use sparse=False")
        if gradient.requires_grad:
            raise ConfigError(
                f"backward(create_graph=True) left a gradient of `{self.name}` that is to be differentiated again: take inner "
                "gradients with torch.autograd.grad, and call backward() without a graph"
            )
        return gradient

    def stage(self) -> None:
        """Brings the gradient to registered memory, unless it is there already; not off a GPU."""
        gradient = self.checked()
        if gradient is self.gradient:
            return
        with torch.no_grad():
            self.gradient.copy_(gradient)
        if self.gradient_is_view:
            self.tensor.grad = self.gradient


class Optimizer(torch.optim.Optimizer):
    """A worker of a gradwire job in the form of a torch optimizer. Making one takes this process' place in the job.

    The servers hold the parameters in f32 and all optimizer state. Where the formats of a parameter and of the job agree and it
    lies on the host, ``p.data`` and ``p.grad`` are views into registered memory: gradients leave from there and parameters land
    there. Others are copied, once each way: bf16 parameters in a job of f32 at once; a GPU's gradients on a stream of their own while
    ``backward`` goes on, to page-locked memory, from where they leave by ``step`` at the latest.

    Each ``backward`` pushes gradients as they are complete, last layers first, so there is one ``backward`` a ``step``; others
    before it go into :meth:`no_sync`. Parameters of layers that ``backward`` has passed may change before ``step``.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, or groups as dictionaries with either under ``"params"``.
            Group 0 is the job's default group, group i the i-th of its ``optimizer.groups``. All workers give the same names (or
            the same order, without names) and shapes. Parameters that need no gradient are not trained.
        lr: the learning rate before the job's schedule; the job's own if it is None. ``param_groups[i]["lr"]`` may be changed
            between ``step`` and the next ``backward``, as torch's schedulers do; groups keep their proportion.
        initial: where the first values come from. ``"model"``: worker 0's model, as with DistributedDataParallel; the job needs
            ``--set init_from=FILE``, a path that servers can read too, and worker 0 writes it. ``"job"``: the servers' own, a file
            of the user's in ``init_from``. A job that is resumed has its checkpoint's values.
        timeout: seconds that ``step`` waits; the job's ``wait_ms`` if it is None.
        options: ``weight_decay``, ``betas``, ``eps``, ``momentum``, ``nesterov``: checked against the job's, never set.

    Raises:
        ConfigError: an option that is not the job's, a parameter that cannot be trained, no ``init_from``.
        gradwire.Error: as :func:`gradwire.join`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        *,
        initial: Literal["model", "job"] = "model",
        timeout: float | None = None,
        **options: Any,
    ) -> None:
        self._started = False
        groups = _named_groups(params)
        seat = _gradwire.Seat.take()
        self._job: dict[str, Any] = json.loads(seat.config)
        self._constants = _constants(self._job, len(groups))
        given = options if lr is None else options | {"lr": lr}
        for constants, group in zip(self._constants, groups):
            _check_options(self._job, constants, given | {key: group[key] for key in group if key != "params"})
        rates = [group.get("lr", lr) for group in groups]
        for constants, group, rate in zip(self._constants, groups, rates):
            group.update(constants, lr=constants["lr"] if rate is None else rate)
        super().__init__(groups, {"lr": self._constants[0]["lr"]})
        self._timeout = timeout
        self._sync = True
        self._begun = False
        self._waiting = False
        # A resumed job has the rates that it was started with.
        self._sent: float | None = self._constants[0]["lr"] if self._job["start_clock"] == 0 else None
        self._rate()
        trained = _trained(self.param_groups)
        if initial == "model":
            _write_initial(self._job, seat.rank, trained)
        elif initial != "job":
            raise ConfigError(f'initial is "{initial}"; it must be "model" or "job"')
        declared = tuple(Declared(name, tuple(tensor.shape), group=group) for name, tensor, group in trained)
        inner = seat.join([tensor.declaration() for tensor in declared])
        self.worker = Worker(seat, inner, declared)
        """The worker: its ``rank``, ``workers``, ``clock`` and ``config``."""
        self._inner = inner
        self._trained: dict[Tensor, _Parameter] = {}
        for index, (name, tensor, _) in enumerate(trained):
            gradient, values = (
                torch.frombuffer(buffer, dtype=WIRE[buffer.dtype]).view(tensor.shape)
                for buffer in (inner.gradient_buffer(index), inner.parameter_buffer(index))
            )
            parameter = _Parameter(name, tensor, index, gradient, values)
            self._trained[tensor] = parameter
            if parameter.values_are_view:
                tensor.data = values
            else:
                tensor.data.copy_(values)
            # Of the node and not the tensor, whose hooks run for torch.autograd.grad too, which adds to no gradient.
            parameter.node = torch.autograd.graph.get_gradient_edge(tensor).node
            parameter.node.register_prehook(self._before(parameter))
            tensor.register_post_accumulate_grad_hook(self._after(parameter))
        self._copies: Copies | None = None
        if any(parameter.on_gpu for parameter in self._trained.values()):
            from ._cuda import Copies

            parameters = self._trained.values()
            self._copies = Copies((p.gradient for p in parameters), (p.values for p in parameters))
        self._started = True

    def _before(self, parameter: _Parameter) -> Callable[[tuple[Tensor, ...]], None]:
        """Before autograd adds to the gradient: it must not be on its way already."""

        def refuse(_: tuple[Tensor, ...]) -> None:
            if parameter.pushed is not None:
                raise RuntimeError(
                    f"backward reached `{parameter.name}` a second time before step(): its gradient has left already. Put every "
                    "backward() but the last of a step into `with optimizer.no_sync():`"
                )

        return refuse

    def _after(self, parameter: _Parameter) -> Callable[[Tensor], None]:
        """After autograd has added to the gradient."""

        def push(_: Tensor) -> None:
            if self._sync:
                self._push(parameter)
            elif not parameter.on_gpu:
                parameter.stage()

        return push

    def _push(self, parameter: _Parameter) -> None:
        """Sends the gradient, or has it sent when it has come off its GPU."""
        self._begin_clock()
        push = partial(self._inner.push_in_place, parameter.index, True)
        if self._copies is not None and parameter.on_gpu:
            self._copies.take(parameter.gradient, parameter.checked(), push)
        else:
            parameter.stage()
            push()
        gradient = parameter.tensor.grad
        assert gradient is not None
        parameter.pushed, parameter.version = gradient, gradient._version

    def _begin_clock(self) -> None:
        """Sends the learning rate ahead of a clock's first push, if it has changed."""
        if self._begun:
            return
        rate = self._rate()
        if rate != self._sent:
            self._inner.set_learning_rate(rate)
            self._sent = rate
        self._begun = True

    def _rate(self) -> float:
        """The default group's rate, once all groups have been found to be what the job can do."""
        first, base = float(self.param_groups[0]["lr"]), self._constants[0]["lr"]
        for index, (constants, group) in enumerate(zip(self._constants, self.param_groups)):
            rate = float(group["lr"])
            # Schedulers multiply each group's rate for itself.
            if not math.isclose(rate * base, first * constants["lr"], rel_tol=1e-6, abs_tol=0.0):
                raise ConfigError(
                    f"group {index} has learning rate {rate} beside {first} of group 0, and the job started them as "
                    f"{constants['lr']} and {base}: only all rates together can be changed live, in proportion"
                )
            _check_options(self._job, constants, {key: group[key] for key in constants if key != "lr"})
        return first

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it ``backward`` adds to the gradients and pushes nothing: for all but the last of several backward passes
        before a ``step``. If all are within it, ``step`` pushes."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """End the clock: push the gradients that have not left yet, and wait until the servers' new parameters are in the model.

        A parameter without gradient (``p.grad is None``) is absent: it takes no step if no other tensor of its chunk has a
        gradient either, and counts as zeros otherwise.

        Args:
            closure: computes the loss and calls ``backward``; called once.

        Returns:
            What the closure gives.

        Raises:
            gradwire.DeadlineError: naming the server, the chunk and the clock. ``step`` may be called again, to wait on.
            RuntimeError: a gradient was changed or dropped after ``backward`` had sent it.
            ConfigError: the learning rate was changed after ``backward``, or to what the job cannot do.
        """
        loss = None
        if closure is not None and not self._waiting:
            with torch.enable_grad():
                loss = closure()
        if not self._waiting:
            self._push_rest()
            self._waiting = True
        self._inner.wait(self._timeout)
        self._waiting = self._begun = False
        for tensor, parameter in self._trained.items():
            parameter.pushed = None
            if parameter.values_are_view:
                # They were written behind autograd's back: a graph of the last forward may not be used any more.
                torch.autograd.graph.increment_version(tensor)
            else:
                # Off page-locked memory it is done in the stream's order: the servers write there again after the next gradients
                # have come off that stream.
                tensor.copy_(parameter.values, non_blocking=parameter.on_gpu)
        return loss

    def _push_rest(self) -> None:
        """Looks at every gradient, and pushes those that have not left."""
        if self._begun and self._rate() != self._sent:
            raise ConfigError(
                f"the learning rate was changed to {self._rate()} after backward(), and gradients have left with {self._sent}: "
                "change it before backward(), or after step() as torch's schedulers do"
            )
        for group in self.param_groups:
            for name, tensor in zip(group["param_names"], group["params"]):
                if tensor.grad is not None and tensor not in self._trained:
                    raise RuntimeError(f"`{name}` has a gradient but needed none when the optimizer was made: it is not trained")
        for parameter in self._trained.values():
            gradient = parameter.tensor.grad
            if parameter.pushed is None and gradient is not None:
                self._push(parameter)
            elif parameter.pushed is not None and (gradient is not parameter.pushed or gradient._version != parameter.version):
                raise RuntimeError(
                    f"the gradient of `{parameter.name}` was changed or dropped after backward() had sent it. Clip on the servers "
                    "(`gradwire run --clip-norm`), or compute within `with optimizer.no_sync():`, so that step() sends it"
                )
        self._begin_clock()
        if self._copies is not None:
            self._copies.push_all()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as torch's; not between ``backward`` and ``step``, when they have left.

        Raises:
            RuntimeError: a gradient has left in this clock.
        """
        sent = next((parameter.name for parameter in self._trained.values() if parameter.pushed is not None), None)
        if sent is not None:
            raise RuntimeError(f"zero_grad() between backward() and step(): the gradient of `{sent}` has left and cannot be taken back")
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are fixed when the optimizer is made: a job's tensors are declared once."""
        if self._started:
            raise ConfigError("a group cannot be added: a job's tensors are declared when its workers join")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take learning rates from what ``state_dict`` gave. Optimizer state is the servers': ``gradwire run --resume``.

        Raises:
            ConfigError: there is state of another optimizer in it.
        """
        if state_dict["state"]:
            raise ConfigError(
                f"the state of {len(state_dict['state'])} parameters cannot be loaded: it lives on the servers, whose checkpoints "
                "have it (`gradwire run --checkpoint-dir`, `--resume`)"
            )
        super().load_state_dict(state_dict)

    def finish(self) -> None:
        """This worker has done its part: leave the job in order. The model keeps its parameters."""
        self.worker.finish()

    def close(self) -> None:
        """Leave the job at once; it fails, unless the worker has finished already."""
        self.worker.close()

    def __enter__(self) -> Optimizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.__exit__(kind, error, trace)


def _named_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """The parameters as groups of (name, parameter), each parameter once."""
    if isinstance(params, Tensor):
        raise ConfigError("params is one tensor; give model.named_parameters(), or a list")
    params = list(params)
    if not params:
        raise ConfigError("there are no parameters to train")
    groups = [dict(group) for group in params] if isinstance(params[0], dict) else [{"params": params}]
    names: dict[str, Tensor] = {}
    for group in groups:
        listed = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        group["params"] = [item if isinstance(item, tuple) else (f"parameter.{len(names) + at}", item) for at, item in enumerate(listed)]
        for name, tensor in group["params"]:
            if not isinstance(tensor, Tensor) or not tensor.is_leaf:
                raise ConfigError(f"`{name}` is no parameter, but {type(tensor).__name__}")
            if name in names or any(tensor is other for other in names.values()):
                raise ConfigError(f"`{name}` is given twice; a tied weight is one parameter")
            names[name] = tensor
    return groups


def _constants(job: dict[str, Any], groups: int) -> list[dict[str, Any]]:
    """What the job's optimizer does to each group, in torch's words."""
    optimizer = job["optimizer"]
    more = optimizer.get("groups", [])
    if groups > 1 + len(more):
        raise ConfigError(
            f"there are {groups} parameter groups and the job has {1 + len(more)}, the default one included: add "
            '`--set \'optimizer.groups=[{name = "no_decay", weight_decay = 0.0}]\'` to `gradwire run`'
        )
    kind = optimizer["kind"]
    shared: dict[str, Any]
    if kind == "sgd":
        shared = {"momentum": optimizer["momentum"], "nesterov": optimizer["nesterov"]}
    elif kind == "adagrad":
        shared = {"eps": optimizer["epsilon"]}
    else:
        shared = {"betas": (optimizer["beta1"], optimizer["beta2"]), "eps": optimizer["epsilon"]}
    rates = {"lr": optimizer["learning_rate"], "weight_decay": optimizer["weight_decay"]}
    own = [{"lr": group.get("learning_rate"), "weight_decay": group.get("weight_decay")} for group in more[: groups - 1]]
    return [shared | rates | {key: value for key, value in group.items() if value is not None} for group in [{}, *own]]


def _check_options(job: dict[str, Any], constants: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuses an option that is not what the servers do."""
    kind = job["optimizer"]["kind"]
    for key, value in given.items():
        if key not in constants:
            raise ConfigError(f"`{key}` is no option of this job's optimizer, {kind}, which has {', '.join(constants)}")
        value = tuple(value) if isinstance(value, list) else value
        if key != "lr" and value != constants[key]:
            setting = {"betas": "beta1 and optimizer.beta2", "eps": "epsilon"}.get(key, key)
            raise ConfigError(
                f"`{key}` is {value} here and {constants[key]} on the servers, which step: start the job with "
                f"`--set optimizer.{setting}`, or of the group in optimizer.groups"
            )


def _trained(groups: list[dict[str, Any]]) -> list[tuple[str, torch.nn.Parameter, int]]:
    """Name, parameter and group of everything that needs a gradient."""
    trained = []
    for index, group in enumerate(groups):
        for name, tensor in zip(group["param_names"], group["params"]):
            if not tensor.requires_grad:
                continue
            if tensor.dtype not in FORMATS or tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
                raise ConfigError(
                    f"`{name}` is {tensor.dtype}, {tensor.layout} on {tensor.device}; dense float32, bfloat16 and float16 "
                    "parameters on cpu or cuda can be trained"
                )
            trained.append((name, tensor, index))
    if not trained:
        raise ConfigError("no parameter needs a gradient: there is nothing to train")
    return trained


def _write_initial(job: dict[str, Any], rank: int, trained: list[tuple[str, torch.nn.Parameter, int]]) -> None:
    """Worker 0's values become everybody's: servers read the file once all workers have declared, which is after this."""
    if job["resume"] is not None:
        return
    path = job["init_from"]
    if path is None:
        raise ConfigError(
            "servers cannot take first values from a worker's memory yet: start the job with `--set init_from=FILE`, a path that "
            'servers can read too, and worker 0 writes its model there; or say initial="job"'
        )
    if rank != 0:
        return
    if _gradwire.initial_file_job(path) == "":
        raise ConfigError(
            f'{path} (init_from) was not written by this optimizer: say initial="job" to start from it, or name another file'
        )
    tensors = []
    for name, tensor, _ in trained:
        values = tensor.detach().cpu().contiguous()
        tensors.append((name, FORMATS[tensor.dtype], list(tensor.shape), values.view(-1).view(torch.uint8).numpy()))
    _gradwire.write_initial_file(path, f"{job['name']}-{job['instance']}", tensors)
