"""Rows of the kernel benchmark on disk: the journal NAME.jsonl, a line a row, and NAME.json, the record made of it."""

import hashlib
import pathlib
import sys
from typing import Any

import pallas_kernels
from experiments.bench import kernel_report as report
from experiments.common import machine
from experiments.common.journal import Journal, write_whole
from kvattn.errors import UserError

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "nvidia-cudnn-cu13", "tokamax")
L2_BYTES = {"NVIDIA H200": 60 << 20, "NVIDIA H100 80GB HBM3": 50 << 20}  # as the driver gives it


class Rows:
    """`record` of this run, with the rows of the journal that the same device and versions made and that did not fail.

    `output`: the JSON, None = nothing is written; `about`: what torch's worker says of itself. Raises UserError: a file
    of that name is something else, or of another version.
    """

    def __init__(self, output: pathlib.Path | None, about: dict[str, Any]):
        self.output, self.record = output, new_record(about)
        self._made_with = {key: self.record[key] for key in ("device_kind", "versions")}
        path = output and output.with_suffix(".jsonl")
        if output and output.exists():
            report.read(output)
            if not path.exists():
                raise UserError(
                    f"{output} was written by another version of kvattn (there is no {path.name} beside it); use "
                    "another --output, or go on with the version that wrote it."
                )
        self._journal = Journal(path, "rows of bench_kernels", "--output")
        self._journal.begin({"kind": "setup", "benchmark": self.record["benchmark"]})
        rows = {r["name"]: r for r in self._journal.records if r.get("kind") == "row"}  # the last of each name
        same = {name: r["row"] for name, r in rows.items() if r["made_with"] == self._made_with}
        self.record["rows"] = {name: row for name, row in same.items() if not report.failed(row)}
        again = len(rows) - len(self.record["rows"])
        if again:
            print(
                f"{output}: {again} of {len(rows)} rows are of another device, of other versions or failed; they are "
                "measured again",
                flush=True,
            )

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Appends a measured row and writes the record anew."""
        self._journal.add({"kind": "row", "name": name, "made_with": self._made_with, "row": row})
        self.record["rows"][name] = row
        if self.output:
            self.record["bars"] = report.bars(self.record)
            write_whole(self.output, self.record)


def new_record(about: dict[str, Any]) -> dict[str, Any]:
    """A record without rows: what is measured, when, on what, with what."""
    device = machine.accelerator()
    return {
        "benchmark": "bench_kernels",
        "date": machine.now(),
        "command": " ".join(["python", "-m", "experiments.bench_kernels", *sys.argv[1:]]),
        **device,
        "versions": versions() | about["versions"],
        "missing": about["missing"],
        "l2_bytes": about.get("l2_bytes") or L2_BYTES.get(device["device_kind"], 0),
        "errors": {},
        "rows": {},
    }


def versions() -> dict[str, str]:
    """Versions that a figure depends on: packages, and the kernels' own source."""
    folder = pathlib.Path(pallas_kernels.__file__).parent
    source = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    return machine.versions(*PACKAGES) | {"pallas_kernels": hashlib.sha256(source).hexdigest()[:12]}
