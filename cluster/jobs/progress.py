"""Progress display of a job: a live panel on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import msgspec
from msgspec.structs import asdict

from shoal.runtime.engine.stats import EngineStats

from .config import LogFormat

if TYPE_CHECKING:
    from rich.live import Live
    from rich.panel import Panel

PLAIN_INTERVAL_S = 10.0
LIVE_INTERVAL_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class JobProgress:
    """Snapshot of a job's progress. Rows and tokens are counted from the job's start, over all runs."""

    phase: str
    num_rows: int | None
    """None while the rows are still being counted."""
    completed: int = 0
    failed: int = 0
    in_flight: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def finished(self) -> int:
        return self.completed + self.failed


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates since this process began the phase, and the estimated time left."""

    prompt_tokens_per_s: float
    output_tokens_per_s: float
    eta_s: float | None


def rates(start: JobProgress, now: JobProgress, elapsed_s: float) -> Rates:
    """Rates between two snapshots of one phase."""
    elapsed_s = max(elapsed_s, 1e-9)
    rows = now.finished - start.finished
    remaining = None if now.num_rows is None else now.num_rows - now.finished
    return Rates(
        prompt_tokens_per_s=(now.num_prompt_tokens - start.num_prompt_tokens) / elapsed_s,
        output_tokens_per_s=(now.num_output_tokens - start.num_output_tokens) / elapsed_s,
        eta_s=None if remaining is None or rows == 0 else remaining * elapsed_s / rows,
    )


def engine_line(stats: EngineStats) -> str:
    """What the engines of one role hold and have done, in one line."""
    line = f"{stats.num_running_seqs} running, {stats.num_waiting_seqs} waiting, KV cache {stats.kv_cache_usage:.0%}"
    if stats.prefix_cache_hits:
        line += f", prefix cache hits {stats.prefix_cache_hit_rate:.0%}"
    if stats.num_preemptions:
        line += f", {stats.num_preemptions} preempted"
    if stats.num_failed_transfers:
        line += f", {stats.num_failed_transfers} transfers failed"
    return line


def plain_line(now: JobProgress, speed: Rates, engines: Mapping[str, EngineStats]) -> str:
    """One line for a log."""
    total = "?" if now.num_rows is None else now.num_rows
    line = f"{now.phase}: {now.finished}/{total} rows, {now.failed} failed"
    if now.num_output_tokens or now.in_flight:
        line += f", {now.in_flight} in flight, {speed.prompt_tokens_per_s:.1f} tok/s in"
        line += f", {speed.output_tokens_per_s:.1f} tok/s out"
    line += "" if speed.eta_s is None else f", {duration(speed.eta_s)} left"
    return line + "".join(f"; {role}: {engine_line(stats)}" for role, stats in engines.items())


def progress_facts(now: JobProgress, speed: Rates, engines: Mapping[str, EngineStats]) -> dict[str, Any]:
    """The same as `plain_line` for programs: counts, rates per second, and the engines' counters by role."""
    facts = {name: value for name, value in dataclasses.asdict(now).items() if name != "phase"}
    return {
        "phase": now.phase,
        **facts,
        **dataclasses.asdict(speed),
        "engines": {role: asdict(stats) for role, stats in engines.items()},
    }


def duration(seconds: float) -> str:
    """Seconds as text: 1:02:05 for 3725."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class ProgressReporter:
    """Shows a job's progress on `stream`; `update` limits the rate of display."""

    def __init__(
        self,
        stream: TextIO,
        *,
        log_format: LogFormat = "text",
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: seconds of any beginning; `wall_clock`: seconds since 1970, for log lines in JSON."""
        self._stream = stream
        self._clock = clock
        self._wall_clock = wall_clock
        self._live: Live | None = None
        self._is_json = log_format == "json"
        self._is_terminal = stream.isatty() and not self._is_json
        self._start: JobProgress | None = None
        self._start_time = 0.0
        self._last_shown = clock()

    def update(
        self,
        now: JobProgress,
        *,
        engines: Callable[[], Mapping[str, EngineStats]] = dict,
        force: bool = False,
    ) -> None:
        """Show `now` if the display interval has passed; `force` shows it in any case.

        `engines` returns the engines' counters by role; it is called only if they are shown.
        """
        time_now = self._clock()
        if self._start is None or self._start.phase != now.phase:
            self._start = now
            self._start_time = time_now
        interval = LIVE_INTERVAL_S if self._is_terminal else PLAIN_INTERVAL_S
        if not force and time_now - self._last_shown < interval:
            return
        self._last_shown = time_now
        speed = rates(self._start, now, time_now - self._start_time)
        if self._is_terminal:
            self._show_panel(_panel(now, speed, engines()))
        elif self._is_json:
            self._log(progress_facts(now, speed, engines()))
        else:
            self.message(plain_line(now, speed, engines()))

    def message(self, text: str) -> None:
        """Print a line, above the panel if there is one."""
        if self._is_json:
            self._log({"message": text})
        elif self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Stop updating; the last panel stays on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _log(self, facts: Mapping[str, Any]) -> None:
        line = msgspec.json.encode({"time": round(self._wall_clock(), 3), **facts}).decode()
        print(line, file=self._stream, flush=True)

    def _show_panel(self, panel: Panel) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(panel, console=Console(file=self._stream), auto_refresh=False)
            self._live.start()
        self._live.update(panel, refresh=True)


def _panel(now: JobProgress, speed: Rates, engines: Mapping[str, EngineStats]) -> Panel:
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_row("rows", f"{now.finished} / {'?' if now.num_rows is None else now.num_rows}")
    table.add_row("failed", str(now.failed))
    table.add_row("in flight", str(now.in_flight))
    table.add_row("tokens/s in", f"{speed.prompt_tokens_per_s:.1f}")
    table.add_row("tokens/s out", f"{speed.output_tokens_per_s:.1f}")
    table.add_row("time left", "-" if speed.eta_s is None else duration(speed.eta_s))
    for role, stats in engines.items():
        table.add_row(f"{role} engines", engine_line(stats))
    table.add_row("", ProgressBar(total=now.num_rows, completed=now.finished))
    return Panel(table, title=f"shoal: {now.phase}", title_align="left")
