"""A schedule as a picture in text: bytes in memory over its steps, and below them what happens where."""

from __future__ import annotations

from solvers.check import replay
from solvers.problem import Problem
from solvers.schedule import Offload, Prefetch, Run, Schedule, Step, format_bytes

LETTERS = {"forward": "F", "backward": "B", "update": "U"}


def picture(problem: Problem, schedule: Schedule, width: int = 100, height: int = 12) -> str:
    """`height` lines of bars, each column the peak of some consecutive steps, up to the budget; then four lanes: the phase that first runs of
    the column's steps spend most time in, where something runs again, is written, is read. Raises ScheduleError for a broken schedule."""
    timeline = replay(problem, schedule, enforce_budget=False).timeline
    columns = [range(k * len(timeline) // width, (k + 1) * len(timeline) // width) for k in range(min(width, len(timeline)))]
    columns = [column for column in columns if column] or [range(len(timeline))]
    top = max([problem.budget_bytes, *timeline])
    peaks = [max((timeline[k] for k in column), default=0) for column in columns]
    lines = [_bar_line(peaks, top * level / height, top, height, level, problem) for level in range(height, 0, -1)]
    marks, weights = _marks(problem, schedule), [_time_us(problem, step) for step in schedule.steps]
    for name, position in (("runs", 0), ("again", 1), ("writes", 2), ("reads", 3)):
        lines.append(f"{name:>12} |" + "".join(_most([(marks[k][position], weights[k]) for k in column]) for column in columns))
    return "\n".join(line.rstrip() for line in lines)


def _bar_line(peaks: list[int], least: float, top: int, height: int, level: int, problem: Problem) -> str:
    """One line of bars; the line in which the budget lies carries its number and dashes."""
    step = top / height
    is_budget = least - step < problem.budget_bytes <= least
    label = format_bytes(problem.budget_bytes if is_budget else least) if is_budget or level % 3 == 0 else ""
    empty = "-" if is_budget else " "
    return f"{label:>12} |" + "".join("#" if peak > least - step / 2 else empty for peak in peaks)


def _marks(problem: Problem, schedule: Schedule) -> list[tuple[str, str, str, str]]:
    """For every step its letter in each of the four lanes, or nothing."""
    done: set[int] = set()
    result = []
    for step in schedule.steps:
        letter = LETTERS.get(problem.ops[step.op].phase, "?") if isinstance(step, Run) else ""
        again = isinstance(step, Run) and step.op in done
        if isinstance(step, Run):
            done.add(step.op)
        result.append((
            "" if again else letter,
            "r" if again else "",
            "w" if isinstance(step, Offload) else "",
            "l" if isinstance(step, Prefetch) else "",
        ))  # fmt: skip
    return result


def _time_us(problem: Problem, step: Step) -> int:
    """What a run takes; 1 for any other step."""
    return problem.ops[step.op].choices[step.choice].time_us if isinstance(step, Run) else 1


def _most(letters: list[tuple[str, int]]) -> str:
    """The letter of most microseconds; a space where there is none."""
    total: dict[str, int] = {}
    for letter, weight in letters:
        if letter:
            total[letter] = total.get(letter, 0) + weight
    return max(total, key=lambda letter: total[letter], default=" ")
