"""The API for NumPy: whole jobs of several workers and servers, each with a program of its own."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire import _gradwire

SGD = ("--optimizer", "sgd", "--lr", "0.5")


def test_pushed_gradients_become_parameters(run: Any) -> None:
    """Two tensors over several chunks and both servers: parameters are what SGD on the mean makes of them, to the bit."""
    outcome = run(
        """
        tensors = [gradwire.Tensor("a", (3, 50), init=("constant", 2.0)), gradwire.Tensor("b", (70,))]
        with gradwire.join(tensors) as worker:
            a, b = np.full((3, 50), 2.0, np.float32), np.zeros(70, np.float32)
            out = np.empty((3, 50), np.float32)
            for clock in range(5):
                assert worker.clock == clock and worker.version == clock, (worker.clock, worker.version)
                assert (worker.parameters("a", out) == a).all() and worker.parameters(1).shape == (70,)
                assert (worker.parameters("b") == b).all(), clock
                own = [np.arange(150, dtype=np.float32).reshape(3, 50) * (rank + clock) for rank in range(worker.workers)]
                worker.push_pull("b", np.full(70, worker.rank, np.float32))
                worker.push_pull("a", own[worker.rank])
                worker.wait(timeout=60)
                a -= np.float32(0.5) * ((own[0] + own[1]) * np.float32(0.5))
                b -= np.float32(0.5) * np.float32(0.5)
        print(f"rank: {worker.rank} of {worker.workers}")
        """,
        *SGD,
        "--set",
        "chunk_bytes=256",
    )
    assert outcome.values("rank") == ["0 of 2", "1 of 2"]


def test_views_are_the_registered_memory(run: Any) -> None:
    """What is written to a gradient's view is what is pushed, and parameters land in a view that was taken before."""
    run(
        """
        tensors = [gradwire.Tensor("a", (3, 50), init=("constant", 2.0)), gradwire.Tensor("b", (70,))]
        with gradwire.join(tensors) as worker:
            views = [worker.gradient_view(index) for index in range(2)]
            landing = [worker.parameter_view(name) for name in "ab"]
            assert (landing[0] == 2).all() and landing[0].shape == (3, 50) and not landing[0].flags.writeable
            for view in views:
                view[:] = np.arange(view.size).reshape(view.shape)
            worker.push_pull("b")
            worker.push_pull("a")
            worker.wait(60)
            for start, view, parameters in zip((2, 0), views, landing):
                expected = start - np.float32(0.5) * np.arange(view.size, dtype=np.float32).reshape(view.shape)
                assert (parameters == expected).all()
                assert (worker.parameters("a") == landing[0]).all()
        assert landing[0][0, 1] == 1.5, "a view outlives its worker"
        """,
        *SGD,
        "--set",
        "chunk_bytes=256",
    )


def test_other_libraries_take_registered_memory_by_dlpack(run: Any) -> None:
    """Zero-copy both ways, in the form with a version and the one before; the memory outlives the worker for whoever took it."""
    outcome = run(
        """
        import ctypes, gc

        def refused(kind, call, *arguments, **keywords):
            try:
                call(*arguments, **keywords)
            except kind as error:
                return str(error)
            raise AssertionError(f"{call} went well")

        with gradwire.join([gradwire.Tensor("a", (2, 3), init=("constant", 1.0))]) as worker:
            buffer = worker.gradient_buffer("a")
            assert buffer.__dlpack_device__() == (1, 0) and buffer.device is None
            gradient, seen = np.from_dlpack(buffer), worker.gradient_view("a")
            assert gradient.shape == (6,) and gradient.dtype == np.float32 and gradient.ctypes.data == seen.ctypes.data
            gradient[:] = np.arange(6)
            assert (seen.ravel() == np.arange(6)).all()
            name = ctypes.pythonapi.PyCapsule_GetName
            name.argtypes, name.restype = [ctypes.py_object], ctypes.c_char_p
            assert name(buffer.__dlpack__()) == b"dltensor"
            assert name(buffer.__dlpack__(max_version=(1, 1))) == b"dltensor_versioned"
            assert "copy what you have taken" in refused(BufferError, buffer.__dlpack__, copy=True)
            assert "where it lies" in refused(BufferError, buffer.__dlpack__, dl_device=(2, 0))
            # Capsules that nobody takes give their memory back.
            for _ in range(1000):
                buffer.__dlpack__(max_version=(1, 0))
            worker.push_pull("a")
            worker.wait()
            landed = np.from_dlpack(worker.parameter_buffer("a"))
        del worker, buffer, seen
        gc.collect()
        print("landed:", (landed == 1 - 0.5 * np.arange(6)).all() and (gradient == np.arange(6)).all())
        """,
        *("--optimizer", "sgd", "--lr", "0.5"),
    )
    assert outcome.values("landed") == ["True", "True"]


def test_a_gpu_that_is_not_there_is_refused_by_name(run: Any) -> None:
    outcome = run('gradwire.join([gradwire.Tensor("a", (2,))], device=4000000)', workers=1, code=1)
    assert "GPU" in outcome.output and "ConfigError" in outcome.output, outcome.output


def test_what_a_gradient_may_be(run: Any) -> None:
    """Arrays of other formats and strides are converted; DLPack and the buffer protocol are taken; wrong ones are refused by name."""
    run(
        """
        import array

        class Capsule:
            def __init__(self, values):
                self.values = values
            def __dlpack__(self, **options):
                return self.values.__dlpack__(**options)
            def __dlpack_device__(self):
                return self.values.__dlpack_device__()

        half = np.arange(6, dtype=np.float16).reshape(2, 3)
        given = [half, half.astype(np.float64), half.astype(np.float32).T.copy().T, Capsule(half.astype(np.float32)),
                 memoryview(array.array("f", range(6))), half.astype(np.float32).repeat(2, axis=1)[:, ::2], range(6)]
        with gradwire.join([gradwire.Tensor("w", (2, 3))]) as worker:
            for gradient in given:
                before = worker.parameters("w")
                worker.push_pull("w", gradient)
                worker.wait(60)
                assert (worker.parameters("w") == before - np.float32(0.5) * half).all(), gradient

            def refused(text, call, *arguments):
                try:
                    call(*arguments)
                except gradwire.ConfigError as error:
                    assert text in str(error), error
                    return
                raise AssertionError(f"{call} went well")

            refused("has 6 elements, and 5 were given", worker.push_pull, "w", np.zeros(5))
            refused("no tensor `v`; it has w", worker.push_pull, "v", half)
            refused("no tensor 1", worker.parameters, 1)
            refused("no tensor -1", worker.parameters, -1)
            refused("has 6 elements, and 3 were given", worker.parameters, "w", np.empty(3, np.float32))
            worker.push_pull("w", half)
            refused("the gradient of `w` was pushed twice in clock 7", worker.push_pull, "w", half)
            refused("cannot be mixed", worker.push, "w", half)
            refused("are on their way", worker.parameters, "w")
            refused("timeout is -1", worker.wait, -1.0)
            worker.wait(60)
        """,
        *SGD,
    )


def test_half_precision_on_the_wire(run: Any) -> None:
    """Gradients and parameters in bf16 are converted by push_pull and parameters; a view of them is refused by name."""
    run(
        """
        with gradwire.join([gradwire.Tensor("w", (100,), init=("constant", 1.0))]) as worker:
            try:
                worker.gradient_view("w")
            except gradwire.ConfigError as error:
                assert "`w` lies in registered memory as bf16" in str(error), error
            else:
                raise AssertionError
            worker.push_pull("w", np.full(100, 1.0009765625, np.float32))
            worker.wait(60)
            assert (worker.parameters("w") == 0.5).all(), worker.parameters("w")
        """,
        *SGD,
        *("--gradient-dtype", "bf16", "--parameter-dtype", "bf16"),
    )


def test_push_and_pull_apart(run: Any) -> None:
    """push brings nothing back; pull brings a version, and says so if it is not reached in time."""
    run(
        """
        with gradwire.join([gradwire.Tensor("w", (8,))]) as worker:
            worker.push("w", np.ones(8))
            worker.wait(60)
            assert (worker.parameters("w") == 0).all()
            worker.pull(1, 60)
            assert worker.version == 1 and (worker.parameters("w") == -0.5).all()
            try:
                worker.pull(2, 0.2)
            except gradwire.DeadlineError as error:
                assert "a version that was not reached" in str(error) and "waited 0.2 s" in str(error), error
            else:
                raise AssertionError
        """,
        *SGD,
        workers=1,
    )


def test_the_learning_rate_changes_live(run: Any) -> None:
    """A new rate holds from the clock on whose push it precedes."""
    run(
        """
        with gradwire.join([gradwire.Tensor("w", (8,))]) as worker:
            for rate, expected in [(None, -0.5), (0.25, -0.75), (None, -1.0)]:
                if rate is not None:
                    worker.set_learning_rate(rate)
                worker.push_pull("w", np.ones(8))
                worker.wait(60)
                assert (worker.parameters("w") == expected).all(), worker.parameters("w")
            try:
                worker.set_learning_rate(-1)
            except ValueError as error:
                assert "learning_rate" in str(error)
            else:
                raise AssertionError
        """,
        *SGD,
    )


def test_a_deadline_names_what_was_awaited_and_may_be_tried_again(run: Any) -> None:
    """Worker 1 holds its gradient back until worker 0's wait has failed once."""
    outcome = run(
        """
        import pathlib, time
        tried = pathlib.Path("tried")
        with gradwire.join([gradwire.Tensor("w", (8,))]) as worker:
            if worker.rank == 1:
                while not tried.exists():
                    time.sleep(0.01)
            worker.push_pull("w", np.ones(8))
            if worker.rank == 0:
                assert not worker.test()
                try:
                    worker.wait(timeout=0.3)
                except TimeoutError as error:
                    assert isinstance(error, gradwire.DeadlineError)
                    print(f"text: {error}")
                else:
                    raise AssertionError
                tried.touch()
            worker.wait(60)
            assert (worker.parameters("w") == -0.5).all()
        """,
        *SGD,
    )
    assert outcome.values("text") == ["waited 0.3 s for parameters from server 0, chunk 0, clock 0"]


def test_ctrl_c_ends_a_wait(run: Any) -> None:
    """A signal comes while worker 0 waits for a long time; KeyboardInterrupt, and the wait may go on after it."""
    outcome = run(
        """
        import pathlib, signal, threading, time
        tried = pathlib.Path("tried")
        with gradwire.join([gradwire.Tensor("w", (8,))]) as worker:
            if worker.rank == 1:
                while not tried.exists():
                    time.sleep(0.01)
            worker.push_pull("w", np.ones(8))
            if worker.rank == 0:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
                try:
                    worker.wait(timeout=100)
                except KeyboardInterrupt:
                    print("caught: yes")
                tried.touch()
            worker.wait(60)
        """,
        *SGD,
    )
    assert outcome.values("caught") == ["yes"]


def test_ctrl_c_ends_a_join() -> None:
    """The launcher is a socket that never answers."""
    program = """if True:
        import os, signal, socket, threading
        import gradwire
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        os.environ |= {"GRADWIRE_RENDEZVOUS": f"127.0.0.1:{port}", "GRADWIRE_TOKEN": "0" * 64}
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            gradwire.join([gradwire.Tensor("w", (8,))])
        except KeyboardInterrupt:
            print("caught")
    """
    done = subprocess.run([sys.executable, "-c", program], timeout=60, text=True, capture_output=True)
    assert done.stdout == "caught\n", done


def test_other_threads_run_while_one_waits(run: Any) -> None:
    """While worker 0 waits, its other thread alone can let worker 1 go on: with the interpreter's lock held it could not. A
    second call meanwhile is refused."""
    run(
        """
        import pathlib, threading, time
        go = pathlib.Path("go")
        with gradwire.join([gradwire.Tensor("w", (8,))]) as worker:
            if worker.rank == 1:
                while not go.exists():
                    time.sleep(0.01)
            worker.push_pull("w", np.ones(8))
            if worker.rank == 0:
                busy = []
                def other():
                    while not busy:
                        try:
                            worker.clock
                        except gradwire.BusyError as error:
                            busy.append(str(error))
                    sum(range(100000))
                    go.touch()
                thread = threading.Thread(target=other)
                thread.start()
                worker.wait(60)
                thread.join()
                assert "another thread is in a call with this worker" in busy[0], busy
            else:
                worker.wait(60)
        """,
        *SGD,
    )


def test_a_worker_that_has_ended_or_was_forked(run: Any) -> None:
    """Calls on it are refused, and a child that drops what it has inherited does no harm to its parent."""
    run(
        """
        worker = gradwire.join([gradwire.Tensor("w", (8,))])
        child = os.fork()
        if child == 0:
            try:
                worker.push_pull("w", np.ones(8))
            except gradwire.ForkedError as error:
                assert "a forked child cannot use it" in str(error)
                del worker
                os._exit(7)
            os._exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        worker.push_pull("w", np.ones(8))
        worker.wait(60)
        worker.finish()
        worker.close()
        for call in (worker.finish, worker.wait, lambda: worker.parameters("w")):
            try:
                call()
            except gradwire.ClosedError:
                continue
            raise AssertionError
        """,
        *SGD,
    )


def test_workers_that_disagree(run: Any) -> None:
    """Another shape of one tensor ends the job with a text that names both."""
    outcome = run(
        """
        try:
            gradwire.join([gradwire.Tensor("w", (8 + int(os.environ["GRADWIRE_RANK"]),))])
        except gradwire.Error as error:
            print(f"kind: {type(error).__name__}")
            raise
        """,
        code=1,
    )
    assert 'tensor `w` is declared as "[8] ' in outcome.output and "by worker 1" in outcome.output
    assert outcome.values("kind")


def test_a_worker_that_fails_ends_the_others_by_name(run: Any) -> None:
    """Worker 1 is gone at once; worker 0's wait ends with JobFailed, and the launcher names who failed first."""
    outcome = run(
        """
        with gradwire.join([gradwire.Tensor("w", (8,))]) as worker:
            if worker.rank == 1:
                os._exit(3)
            worker.push_pull("w", np.ones(8))
            try:
                worker.wait(60)
            except gradwire.JobFailed as error:
                print(f"text: {error}")
                raise
        """,
        code=3,
    )
    assert len(outcome.values("text")) == 1 and "worker 1 ended with exit code 3" in outcome.output


def test_without_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text says how to start one; wrong tensors are refused before."""
    monkeypatch.delenv("GRADWIRE_RENDEZVOUS", raising=False)
    with pytest.raises(gradwire.ConfigError, match="start this program with `gradwire run"):
        gradwire.join([gradwire.Tensor("w", (8,))])
    with pytest.raises(ValueError, match='init "normal" needs a number'):
        gradwire.join([gradwire.Tensor("w", (8,), init="normal")])
    with pytest.raises(ValueError, match="negative length"):
        gradwire.join([gradwire.Tensor("w", (-8,))])


def test_the_stubs_say_what_the_extension_has() -> None:
    """Every class, function and method of the extension stands in its stub, with its parameters, and nothing else does."""
    stub = ast.parse(Path(gradwire.__file__).with_name("_gradwire.pyi").read_text())
    special = {"__buffer__", "__dlpack__", "__dlpack_device__"}

    def described(node: ast.ClassDef) -> set[str]:
        functions = (item for item in node.body if isinstance(item, ast.FunctionDef))
        return {item.name for item in functions} - special

    def own(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("__")}

    classes = {node.name: described(node) for node in stub.body if isinstance(node, ast.ClassDef)}
    found = {name: own(kind) for name, kind in vars(_gradwire).items() if isinstance(kind, type)}
    assert classes == found
    functions = {node.name: [argument.arg for argument in node.args.args] for node in stub.body if isinstance(node, ast.FunctionDef)}
    callables = {name: list(inspect.signature(value).parameters) for name, value in vars(_gradwire).items() if inspect.isbuiltin(value)}
    assert functions == callables


def test_what_everybody_may_use_is_documented() -> None:
    """Every public class and method has a docstring."""
    things: list[Any] = [getattr(gradwire, name) for name in gradwire.__all__]
    things = [thing for thing in things if isinstance(thing, type) or inspect.isfunction(thing)]
    things += [value for name, value in vars(gradwire.Worker).items() if not name.startswith("_")]
    assert len(things) > 25
    assert [thing for thing in things if not inspect.getdoc(thing)] == []


def test_torch_is_not_imported() -> None:
    """Nor is any other module that a machine may lack."""
    program = "import sys, gradwire; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=True).stdout == "False\n"
    assert np.float32 is not None


def test_a_worker_asks_its_job(run: Any) -> None:
    """Another rate from one clock on, a checkpoint that is complete some steps later, and how the job stands."""
    outcome = run(
        """
        with gradwire.join([gradwire.Tensor("w", (4,))]) as worker:
            first = worker.set(lr=0.25)
            assert first >= 0, first
            try:
                worker.set(speed=1)
            except gradwire.ConfigError as error:
                assert "speed" in str(error), error
            else:
                raise AssertionError("`speed` was changed")
            worker.request_checkpoint()
            written = None
            while written is None:
                worker.push_pull("w", np.ones(4, np.float32))
                worker.wait(timeout=60)
                written = worker.checkpoint_written()
            moved = -(first + 0.25 * (worker.clock - first))
            assert np.allclose(worker.parameters("w"), moved), (worker.parameters("w"), moved, first)
            status = worker.job_status()
            assert status["checkpoint"] == written and len(status["ranks"]) == 2, status
            print(f"asked: {written > 0}")
        """,
        *("--optimizer", "sgd", "--lr", "1", "--checkpoint-dir", "checkpoints"),
        workers=1,
        servers=1,
    )
    assert outcome.values("asked") == ["True"]
