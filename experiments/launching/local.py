"""Several processes of one experiment on this machine's CPU, joined by jax.distributed.

    code = run(command, processes=2, devices=4)

Each output line gets the number of its process in front. A signal to the launcher goes to all processes, which
save and stop; when one process fails the others are stopped, and its exit code is the result. A machine with
GPUs needs no launcher: one process drives all of them.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TextIO

from experiments.launching.command import Command, check_fits, environment
from kvattn.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(command: Command, *, processes: int, devices: int, grace: float = 5.0) -> int:
    """Runs `command` in `processes` processes of `devices` fake CPU devices each, until all have ended.

    Returns 0, or the exit code of the first process that failed (128 + n for one killed by signal n). The others
    then have `grace` seconds after SIGTERM before SIGKILL, since they may wait in a collective for the dead one
    and, without it, can save nothing. Raises UserError when the command does not fit.
    """
    for flag, value in (("processes", processes), ("devices", devices)):
        if value < 1:
            raise UserError(f"--{flag}={value}; it takes 1 or more.")
    where = f"--processes={processes} --devices={devices}"
    check_fits(command, where, devices=processes * devices, processes=processes, shared_disk=True)
    team: list[subprocess.Popen] = []
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        _signal_all(team, number)

    old = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        line, port = command.argv(sys.executable), _free_port()
        for index in range(processes):
            if not asked:
                team.append(_start(line, _variables(index, processes, devices, port)))
        readers = [
            _copy(stream, index, to)
            for index, process in enumerate(team)
            for stream, to in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        code = _watch(team, grace)
        for reader in readers:
            reader.join()
        return code if len(team) == processes else 128 + asked[0]
    finally:
        _signal_all(team, signal.SIGKILL)
        for number, handler in old.items():
            signal.signal(number, handler)


def _variables(index: int, processes: int, devices: int, port: int) -> dict[str, str]:
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    out = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
        "PYTHONUNBUFFERED": "1",
    }
    if processes > 1:
        out |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        }
    return out


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _start(line: list[str], variables: dict[str, str]) -> subprocess.Popen:
    """In a session of its own, so that the terminal's Ctrl-C reaches it once, through the launcher."""
    return subprocess.Popen(
        line,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _copy(stream: object, index: int, to: TextIO) -> threading.Thread:
    """A thread that copies a process's lines to `to`, each behind `[index] `, until the stream ends."""

    def work() -> None:
        with stream:
            for line in stream:
                text = line.decode(errors="replace").rstrip("\n")
                try:
                    to.write(f"[{index}] {text}\n")  # one write a line, so that lines of two processes do not mix
                    to.flush()
                except (BrokenPipeError, ValueError):
                    pass  # nobody reads any more; go on draining so that the process does not block

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _signal_all(team: list[subprocess.Popen], number: int) -> None:
    for process in team:
        if process.poll() is None:
            process.send_signal(number)


def _watch(team: list[subprocess.Popen], grace: float) -> int:
    """Waits for all; after the first failure stops the rest. Returns the first failure's code, or 0."""
    first, deadline = 0, None
    while None in [process.poll() for process in team]:  # a list, so that every process is asked
        failed = [(i, p.returncode) for i, p in enumerate(team) if p.returncode]
        if failed and deadline is None:
            index, code = failed[0]
            first, deadline = code, time.monotonic() + grace
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            print(f"process {index} {how}; stopping the others", file=sys.stderr, flush=True)
            _signal_all(team, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            _signal_all(team, signal.SIGKILL)
        time.sleep(0.05)
    first = first or next((p.returncode for p in team if p.returncode), 0)
    return 128 - first if first < 0 else first
