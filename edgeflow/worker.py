"""A process of its own for what needs gigabytes: the system has every byte back when it ends.

The parent names a function as ``module:function``; the child calls it and answers. A held object (a loaded
runtime, say) takes further calls until the block ends. Messages are pickles on two pipes between these two
processes; nothing else reads or writes them. What the child prints is read only where it dies.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from edgeflow import errors
from edgeflow.errors import EdgeflowError, RuntimeFailure


class Worker:
    """A child process. Its calls raise the child's EdgeflowError as one with the same words and exit code.

    ``what`` begins the sentence that says how it died; it may be set anew for each call.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes], what: str):
        self._process, self._log, self.what = process, log, what

    def call(self, target: str, *args: Any, hold: bool = False, **kwargs: Any) -> Any:
        """``target`` is ``module:function``, or ``.method`` of what an earlier call was told to ``hold``.

        Raises the child's EdgeflowError, RuntimeFailure where the child was killed or crashed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump((target, args, kwargs, hold), self._process.stdin, protocol=5)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise RuntimeFailure(f"{self.what}: {self._end()}") from None
        if answer[0] == "error":
            raise _rebuilt(*answer[1:])
        return answer[1]

    def _end(self) -> str:
        """How a child that does not answer ended."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "its process was killed, as the system does when memory runs out; edgeflow doctor shows it"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with {code}: {lines[-1] if lines else 'it said nothing'}"


class Held:
    """An object in a worker: attributes are methods that run there."""

    def __init__(self, worker: Worker):
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self._worker.call(f".{name}", *args, **kwargs)


@contextmanager
def worker(what: str) -> Iterator[Worker]:
    """A child process while the block runs; ``what`` begins the sentence that says how it died."""
    command = [sys.executable, "-P", "-m", "edgeflow.worker"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        try:
            yield Worker(process, log, what)
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)
            if sys.exc_info()[0] is not None:
                process.kill()
            process.wait()


def call(what: str, target: str, *args: Any, **kwargs: Any) -> Any:
    """One call in a process that ends with it."""
    with worker(what) as child:
        return child.call(target, *args, **kwargs)


def _close(pipe: IO[bytes]) -> None:
    with suppress(BrokenPipeError):
        pipe.close()


def _rebuilt(name: str, message: str, exit_code: int) -> EdgeflowError:
    """The child's error, of its own class where that is made from a sentence alone."""
    cls = getattr(errors, name, EdgeflowError)
    simple = cls.__init__ in (EdgeflowError.__init__, Exception.__init__)
    error = cls(message) if simple else EdgeflowError(message)
    error.exit_code = exit_code
    return error


def _resolve(target: str, held: Any) -> Any:
    if target.startswith("."):
        return getattr(held, target[1:])
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def main() -> int:
    """Answer calls until stdin ends. An error that is not the user's ends the process with its traceback."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a backend prints is not part of the protocol
    held: Any = None
    while True:
        try:
            target, args, kwargs, hold = pickle.load(sys.stdin.buffer)
        except EOFError:
            return 0
        try:
            result = _resolve(target, held)(*args, **kwargs)
            if hold:
                held, result = result, None
            answer: tuple[Any, ...] = ("result", result)
        except EdgeflowError as error:
            answer = ("error", type(error).__name__, str(error), error.exit_code)
        del args, kwargs
        pickle.dump(answer, channel, protocol=5)
        channel.flush()


if __name__ == "__main__":
    raise SystemExit(main())
