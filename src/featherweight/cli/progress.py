"""What a job tells while it runs: bars in a terminal, lines elsewhere, with the time that is left as far as known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from featherweight.cli.show import printable
from featherweight.report import units

#: seconds between lines that say that it goes on
BEAT = 30.0
#: the stages that end a job
LAST = ("measure on the test split", "measure latencies")


@dataclass
class Clock:
    """How far a job is, and how long the rest may take, from what it told so far."""

    now: Callable[[], float] = time.monotonic
    stage: str = ""  #: what is at work
    done: int = 0  #: steps that are done
    total: int = 0  #: steps
    finished: int = 0  #: stages: measurings and steps
    inner: tuple[float, float] = (0.0, 0.0)  #: done and total of the stage at work; (0, 0) where it does not say
    facts: Mapping[str, float] = field(default_factory=dict)
    durations: dict[str, list[float]] = field(default_factory=dict)  #: "step" and "measure" -> seconds of each
    began: float = 0.0
    inner_began: tuple[float, float] = (0.0, 0.0)  #: when it was first told, and how much was done then

    def tell(self, what: str, done: float, total: float, figures: Mapping[str, float]) -> None:
        """Hears what a job told."""
        if what.startswith("measured "):
            self._finish()
        elif what.startswith(("step ", "measure ")):
            self._finish()
            self.stage, self.done, self.total, self.began = what, int(done), int(total), self.now()
            self.finished = 2 * self.done + (1 + LAST.index(what) if what in LAST else what.startswith("step "))
            self.inner, self.facts = (0.0, 0.0), {}
        else:
            if not self.inner[1]:
                self.inner_began = (self.now(), done)
            self.inner, self.facts = (done, total), figures

    def _finish(self) -> None:
        if self.stage:
            kind = "measure" if self.stage.startswith("measure ") else "step"
            self.durations.setdefault(kind, []).append(self.now() - self.began)
            self.finished += 1
        self.stage = ""

    @property
    def stages(self) -> int:
        """How many stages the whole has."""
        return 2 * self.total + 1 + len(LAST)

    @property
    def share(self) -> float:
        """The share of all stages that is done, 0..1."""
        within = min(self.inner[0] / self.inner[1], 1.0) if self.inner[1] else 0.0
        return min((self.finished + within) / self.stages, 1.0)

    def left(self) -> float | None:
        """Seconds that the stage at work still takes at the pace so far; None where it does not say how far it is."""
        began, first = self.inner_began
        done, total = self.inner
        if not total or done <= first:
            return None
        return (self.now() - began) / (done - first) * max(total - done, 0.0)

    def left_in_all(self) -> tuple[float, bool] | None:
        """Seconds that the job still takes, and whether that is all (False: at least so many)."""
        here = self.left()
        if here is None:
            return None
        whole, seconds = True, here
        at_step = self.stage.startswith("step ")
        for kind, rest in (("step", self.total - self.done - at_step), ("measure", self.total - self.done)):
            known = self.durations.get(kind, [])
            if rest > 0 and known:
                seconds += rest * sum(known) / len(known)
            whole = whole and (rest <= 0 or bool(known))
        return seconds, whole

    def line(self) -> str:
        """One line: what is at work, how far, for how long, and how long still."""
        parts = [self.stage or "…"]
        if "epoch" in self.facts:
            parts.append(f"epoch {int(self.facts['epoch'])}")
        if self.inner[1] > 1:
            parts.append(f"{self.inner[0]:.0f} of {self.inner[1]:.0f}")
        parts.append(f"{duration(self.now() - self.began)} so far")
        here, all_ = self.left(), self.left_in_all()
        if here is not None:
            parts.append(f"about {duration(here)} left in it")
        if all_ is not None:
            parts.append(f"{'about' if all_[1] else 'at least'} {duration(all_[0])} left in all")
        return ", ".join(parts)


class Listener:
    """Shows a job's progress: in a terminal a bar for the whole and one for the stage at work; elsewhere a line for
    each stage, and one every BEAT seconds. Every measurement is a line."""

    def __init__(self, console: Console, beat: float = BEAT, now: Callable[[], float] = time.monotonic) -> None:
        self.console, self.beat = console, beat
        self.clock = Clock(now)
        self.bars = Progress(TextColumn("{task.description}", markup=False), BarColumn(30),
                             TextColumn("{task.fields[facts]}", markup=False), TimeElapsedColumn(), console=console,
                             transient=True, disable=not console.is_terminal)
        self.tasks: dict[str, TaskID] = {}
        self.ended = threading.Event()
        self.beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Listener:
        self.bars.start()
        self.beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.ended.set()
        self.beating.join()
        self.bars.stop()

    def __call__(self, what: str, done: float, total: float, figures: Mapping[str, float]) -> None:
        self.clock.tell(what, done, total, figures)
        if what.startswith("measured "):
            self._say(f"{what.removeprefix('measured '):<20} {facts(figures)}")
        elif not self.console.is_terminal and what == self.clock.stage:
            self._say(f"{what} ({self.clock.finished + 1} of {self.clock.stages})")
        if self.console.is_terminal:
            self._draw(what, done, total, figures)

    def _say(self, line: str) -> None:
        self.bars.console.print(printable(line), highlight=False, soft_wrap=True, markup=False)

    def _beat(self) -> None:
        while not self.ended.wait(self.beat):
            if self.console.is_terminal:
                self._draw(self.clock.stage, *self.clock.inner, self.clock.facts)
            elif self.clock.stage:
                self._say(self.clock.line())

    def _draw(self, what: str, done: float, total: float, figures: Mapping[str, float]) -> None:
        if "" not in self.tasks:
            self.tasks[""] = self.bars.add_task("", total=1.0, facts="")
        self.bars.update(self.tasks[""], completed=self.clock.share, description=self.clock.stage or "…",
                         facts=self.clock.line().partition(", ")[2])
        if what == self.clock.stage or what.startswith("measured "):
            for name in [name for name in self.tasks if name]:
                self.bars.remove_task(self.tasks.pop(name))
            return
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(printable(what), total=total or None, facts="")
        self.bars.update(self.tasks[what], completed=done, total=total or None, facts=facts(figures))


def facts(figures: Mapping[str, float]) -> str:
    """Figures as people read them."""
    kinds = {"file_bytes": ("bytes", "file"), "latency_s": ("seconds", ""), "params": ("count", "params"),
             "macs": ("count", "MACs")}
    parts = []
    for name, value in figures.items():
        if name in kinds:
            kind, word = kinds[name]
            parts.append(f"{word} {units.amount(kind, value)}".strip())
        else:
            parts.append(f"{name} {value:.4g}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them: "8 s", "3 min", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
