"""Live progress of a study on the console."""

import time
from typing import Any

import rich.console

from experiments.study import report as study_report
from experiments.study.results import Results
from kvattn.config import VariantConfig


class Progress:
    """A spinner with what runs now on a terminal; elsewhere a line now and then. Finished phases always print."""

    def __init__(self):
        self.console = rich.console.Console(highlight=False)
        self.began = time.perf_counter()
        self.status = self.console.status("starting")
        self.status.start()

    def now(self, text: str, loud: bool = False) -> None:
        self.status.update(text)
        if loud and not self.console.is_terminal:
            self.say(text)

    def say(self, text: str) -> None:
        seconds = int(time.perf_counter() - self.began)
        self.console.print(f"[{seconds // 60:3d}:{seconds % 60:02d}] {text}", markup=False, soft_wrap=True)

    def done(self, phase: str, row: VariantConfig | None, record: dict[str, Any]) -> None:
        self.say(study_report.line(phase, row.name if row else "unconverted", record))

    def finish(self, table: Any, results: Results) -> None:
        self.status.stop()
        # The table needs some 140 columns; where there are fewer, whole lines that wrap beat cells cut short.
        rich.console.Console(width=max(self.console.width, 144)).print(table)
        seconds = sum(record.get("seconds", 0) for record in results.records)
        self.console.print(
            f"{seconds / 60:.1f} minutes in all; {results.workdir}/report.md, pareto.png, results.jsonl", soft_wrap=True
        )
