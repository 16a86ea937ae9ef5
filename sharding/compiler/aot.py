"""The TPU compiler's own answer, without a TPU: compile a program for a named slice in a child process, report it.

    >>> with Compiler() as compiler:
    ...     report = compiler.compile("kvattn.decode.partitioned:decode", {"batch": 64}, "v4:4x4x4", (4, 4, 4))
    >>> report.seconds, report.memory.total, [(c.op, c.axes, c.bytes) for c in report.collectives]

A target is "module:function"; the child imports it and calls it with (mesh, **kwargs). It returns an object with
`fn`, `args` (trees of jax.ShapeDtypeStruct with shardings) and `donate_argnums`, or with `lower(free_layouts)` (as
kvattn.decode.partitioned.Program). A child is needed because libtpu
reads its environment once, and aborts the whole process on failed internal checks: that, running out of HBM and
running out of time become a `CompileFailure` with one sentence, and the next program gets a fresh child.

Time. The compiler puts `estimated_cycles` on what the cores execute; collectives and asynchronous copies have none,
so that `seconds` is compute and HBM time without interconnect (`cost` models that), and `prefetched_bytes` says what
runs beside it. `calibration` states how cycles become seconds; it is done once per chip and `Compiler`.
"""

import importlib
import importlib.util
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from sharding.compiler import doctor, topology
from sharding.compiler.calibration import Calibration, calibrate
from sharding.compiler.compiled_report import CompiledReport, CompileFailure, report
from sharding.compiler.hlo_costs import analyse
from sharding.layout.rules import ShardingError

TIMEOUT = 600.0


# --- the child --------------------------------------------------------------------------------------------


def main() -> None:
    """Serves jobs: one JSON object a line on stdin, one a line on the file descriptor argv[1]."""
    with os.fdopen(int(sys.argv[1]), "w") as replies:
        for line in sys.stdin:
            replies.write(json.dumps(_serve(json.loads(line))) + "\n")
            replies.flush()


def _serve(job: dict) -> dict:
    try:
        return {"report": _compile(job).to_json()}
    except MemoryError:
        raise
    except Exception as error:  # a row that does not compile is an answer; the study goes on
        text = str(error).strip() or type(error).__name__
        full = "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text
        return {"failure": "memory" if full else "error", "type": type(error).__name__, "text": text[:20000]}


def _compile(job: dict) -> CompiledReport:
    import jax

    slice_ = topology.tpu_slice(job["slice"])
    sizes = tuple(job["mesh"])
    mesh = topology.mesh_of(slice_, sizes)
    calibration = Calibration(**job["calibration"]) if job["calibration"] else calibrate(slice_)
    module, _, function = job["target"].partition(":")
    program = getattr(importlib.import_module(module), function)(mesh, **job["kwargs"])
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it which TPU it lowers for
        if hasattr(program, "lower"):
            lowered = program.lower(free_layouts=True)
        else:
            lowered = jax.jit(program.fn, donate_argnums=program.donate_argnums).lower(*program.args)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    if job["hlo_path"]:
        with open(job["hlo_path"], "w") as file:
            file.write(compiled.as_text())
    return report(
        compiled,
        slice_,
        sizes,
        calibration,
        compile_seconds=seconds,
        expectations=doctor.Expectations.from_json(job["expectations"]),
    )


def environment() -> dict[str, str]:
    """The child's: this process's without flags for JAX, XLA or libtpu, and with what libtpu needs off a TPU."""
    flags = ("XLA_", "JAX_", "TPU_", "LIBTPU_", "PJRT_", "TF_CPP_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(flags)}
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
    }


# --- the parent -------------------------------------------------------------------------------------------


class Compiler:
    """A child process that compiles one program after another (start-up, about 3 s, is paid once), replaced when it
    dies. A context manager; not for several threads."""

    def __init__(self, timeout: float = TIMEOUT):
        """`timeout` seconds per program, start-up included. Raises ShardingError where libtpu is missing."""
        if importlib.util.find_spec("libtpu") is None:
            raise ShardingError("libtpu is not installed; pip install 'kvattn[tpu]' (it needs no TPU).")
        self.timeout = timeout
        self._calibrations: dict[str, dict] = {}
        self._child = None

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def compile(
        self,
        target: str,
        kwargs: dict[str, Any],
        slice_name: str,
        mesh: tuple[int, int, int],
        *,
        expectations: doctor.Expectations = doctor.NOTHING,
        hlo_path: str = "",
    ) -> CompiledReport | CompileFailure:
        """Compiles target(mesh, **kwargs) for the slice; `hlo_path` keeps the program's text there.

        Raises ShardingError for an unknown slice or a mesh that does not match it; every other failure is returned.
        """
        slice_ = topology.tpu_slice(slice_name)
        topology.check_mesh(slice_, tuple(mesh))
        job = {
            "target": target,
            "kwargs": kwargs,
            "slice": slice_.name,
            "mesh": list(mesh),
            "calibration": self._calibrations.get(slice_.chip),
            "expectations": expectations.to_json(),
            "hlo_path": hlo_path,
        }
        answer = self._ask(json.dumps(job))
        if "report" in answer:
            self._calibrations[slice_.chip] = answer["report"]["calibration"]
            return CompiledReport.from_json(answer["report"])
        sizes = _bytes_named(answer["text"]) if answer["failure"] == "memory" else (0, 0)
        return CompileFailure(slice_.name, tuple(mesh), answer["failure"], _sentence(answer, *sizes), *sizes)

    def close(self) -> None:
        """Ends the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child.stdin.close()
            self._replies.close()
            self._log.close()
            self._child = None

    def _start(self) -> None:
        reading, writing = os.pipe()
        self._replies, self._log = os.fdopen(reading, "rb", buffering=0), tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "sharding.compiler.aot", str(writing)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(writing,),
            env=environment(),
        )
        os.close(writing)

    def _ask(self, job: str) -> dict:
        if self._child is None:
            self._start()
        deadline = time.monotonic() + self.timeout
        try:
            self._child.stdin.write(job.encode() + b"\n")
            self._child.stdin.flush()
            line = self._line(deadline)
        except BrokenPipeError:
            line = b""
        except BaseException:
            self.close()
            raise
        if line is None:
            self.close()
            return {"failure": "timeout", "text": f"the compiler did not finish within {self.timeout:g} s"}
        if not line.endswith(b"\n"):
            text = self._epitaph()
            self.close()
            return {"failure": "crash", "text": text}
        return json.loads(line)

    def _line(self, deadline: float) -> bytes | None:
        """The child's next line; short of its end where the child died, None where the time is up."""
        line = b""
        with selectors.DefaultSelector() as ready:
            ready.register(self._replies, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not ready.select(left):
                    return None
                part = self._replies.read(1 << 16)
                if not part:
                    break
                line += part
        return line

    def _epitaph(self) -> str:
        """Why the child died: libtpu's fatal line, else Python's last, else how it ended."""
        code = self._child.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        fatal = [re.sub(r"^F\d{4} \S+\s+\d+ ", "", line) for line in lines if re.match(r"F\d{4} ", line)]
        if fatal:
            return f"the compiler aborted: {fatal[0].strip()}"
        if code < 0:
            return f"the compiler process died of {signal.Signals(-code).name}"
        return f"the compiler process ended with code {code}: {lines[-1].strip() if lines else 'no message'}"


def compile_job(
    target: str,
    kwargs: dict[str, Any],
    slice_name: str,
    mesh: tuple[int, int, int],
    *,
    timeout: float = TIMEOUT,
    expectations: doctor.Expectations = doctor.NOTHING,
    hlo_path: str = "",
) -> CompiledReport | CompileFailure:
    """One program in a child of its own; see `Compiler.compile`."""
    with Compiler(timeout) as compiler:
        return compiler.compile(target, kwargs, slice_name, mesh, expectations=expectations, hlo_path=hlo_path)


def _bytes_named(text: str) -> tuple[int, int]:
    """(needed, available) bytes of an out-of-memory message; 0 where it names none."""
    forms = (
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    )
    for form in forms:
        found = re.search(form, text)
        if found:
            scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            return round(float(found[1]) * scale[found[2]]), round(float(found[3]) * scale[found[4]])
    return 0, 0


def _sentence(answer: dict, needed: int, available: int) -> str:
    first = answer["text"].split("\n")[0]
    if answer["failure"] != "memory":
        return first
    if not needed:
        return f"out of HBM: {first}"
    return (
        f"out of HBM: {needed / 2**30:.2f} GiB needed, {available / 2**30:.2f} GiB available per device; "
        "take more chips, a smaller batch or context, or fewer bits."
    )


__all__ = ["CompileFailure", "CompiledReport", "Compiler", "analyse", "compile_job", "environment", "report"]

if __name__ == "__main__":
    main()
