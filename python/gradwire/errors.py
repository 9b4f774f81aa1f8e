"""What can go wrong, a class for each thing that a program may want to do about it.

Every text is gradwire's own: what happened, to whom, what to do.
"""

from typing import Final

EXIT_PREEMPTED: Final = 75
"""Exit with this code after :class:`Preempted`, so that the launcher takes it for what it is."""


class Error(Exception):
    """Everything that gradwire raises."""


class ConfigError(Error, ValueError):
    """An argument or a setting is wrong: a name, a length, a format, an environment that names no job."""


class DeadlineError(Error, TimeoutError):
    """A deadline passed; the text names the server, the chunk and the clock that were waited for. The call may be made again."""


class RefusedError(Error):
    """The launcher or a peer refused this process."""


class JobFailed(Error):
    """The job, or this worker's part in it, has failed; the worker can only be closed."""


class Preempted(Error):
    """The job was told to stop and has written its checkpoint: end with exit code :data:`EXIT_PREEMPTED`."""


class Left(Error):
    """This worker was told to leave and is of the job no more: call :meth:`~gradwire.Worker.finish` and end."""


class SystemFailure(Error, OSError):
    """The operating system or a device refused: memory, descriptors, files, the network."""


class ClosedError(Error):
    """The worker has ended: it has finished or was closed."""


class BusyError(Error):
    """Another thread is in a call with this worker; one at a time."""


class ForkedError(Error):
    """The worker was opened by another process: a forked child cannot use it. Nothing was done."""
