"""A process that answers: one JSON line in, one JSON line out.

    child = Child("experiments.bench.peers.kvattn_worker")
    child.ask("load", checkpoint="smollm2")          # {"seconds": ...}; the process starts here

    if __name__ == "__main__":                       # in that module
        serve({"load": load})

A child that died or was too slow is an error of the request that met it; the next request starts a new one. Answers
carry a mark, so whatever a library prints beside them does no harm. Only the standard library is imported: a child may
be another interpreter, with torch and without jax.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from experiments.common.paths import ROOT

MARK = "@answer "


class ChildError(RuntimeError):
    """A child could not start, ended, or did not answer in time; one sentence."""


class Child:
    """`python -m MODULE` as a process that starts at the first `ask`.

    `env`: its whole environment, None = this one's. `timeout`: most seconds for an answer, None = any. `quiet`: what it
    writes to stderr is dropped. As a context manager, `kill` comes at the end.
    """

    def __init__(
        self,
        module: str,
        python: str = sys.executable,
        *,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        quiet: bool = False,
    ):
        self.name = module.rpartition(".")[2]
        self._line, self._env, self._timeout, self._quiet = [python, "-m", module], env, timeout, quiet
        self._process: subprocess.Popen | None = None

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The child's answer to `op`. Raises ChildError: it does not start, ended, or was silent for too long."""
        process = self._running()
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._timeout, stop) if self._timeout is not None else None
        if timer:
            timer.start()
        try:
            answer = self._exchange(process, {"op": op, **request})
        finally:
            if timer:
                timer.cancel()
        if answer is not None:
            return answer
        code = process.wait()
        self._let_go()
        if late.is_set():
            raise ChildError(f"{self.name} did not answer within {self._timeout:g} s during {op}")
        raise ChildError(f"{self.name} ended with code {code} during {op}")

    def close(self) -> None:
        """Waits until the child, which sees the end of its input, has ended."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._let_go()

    def kill(self) -> None:
        """Ends the child at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._let_go()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()

    def _running(self) -> subprocess.Popen:
        if self._process is not None and self._process.poll() is not None:
            self._let_go()
        if self._process is None:
            stderr = subprocess.DEVNULL if self._quiet else None
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
            try:
                self._process = subprocess.Popen(self._line, cwd=ROOT, env=self._env, **pipes)
            except OSError as error:
                raise ChildError(f"{self.name} did not start: {error}") from error
        return self._process

    def _exchange(self, process: subprocess.Popen, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, or None where the process ended before it."""
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except OSError:  # its end of the pipe is closed
            return None
        for line in process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        return None

    def _let_go(self) -> None:
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except OSError:  # a request that nobody read is still in the buffer
                pass


def serve(ops: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """A child's loop: answers requests from stdin by the function of their name, until stdin closes."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = ops[request.pop("op")](**request)
        print(MARK + json.dumps(answer), flush=True)


def import_paths() -> str:
    """PYTHONPATH with which a child imports what this process imports."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)
