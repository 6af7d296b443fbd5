"""Draw a recorded year as a time line."""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tests.faults.record import Record, RunSeen

_VERDICTS = {
    "Promoted": "tab:green",
    "Awaiting approval": "tab:orange",
    "Champion kept": "tab:blue",
    "Skipped": "lightgrey",
    "Overtaken": "tab:purple",
}
_BAD = "tab:red"
_ARRIVALS = {"good": ("^", "tab:green"), "late": (">", "tab:olive"), "bad": ("v", "tab:red")}
_SEVERITIES = {
    "success": "tab:green",
    "info": "tab:blue",
    "warning": "tab:orange",
    "failure": "tab:red",
}
_FAULT_ROWS = ("run", "service", "server", "clock")


def draw(record: Record, path: Path) -> None:
    """Write the time line of a year as a PNG."""
    figure, (rows, steps) = plt.subplots(
        2, 1, figsize=(16, 8), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    names = ["messages", *(f"faults: {row}" for row in reversed(_FAULT_ROWS)), "verdict", "arrived"]
    rows.set_yticks(range(len(names)), names)
    rows.set_ylim(-0.6, len(names) - 0.4)
    _draw_arrivals(rows, record, names.index("arrived"))
    _draw_verdicts(rows, record, names.index("verdict"))
    for row in _FAULT_ROWS:
        _draw_faults(rows, record, row, names.index(f"faults: {row}"))
    _draw_messages(rows, record, names.index("messages"))
    rows.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    rows.set_title(
        f"{record.weeks} weeks of {record.interval:.0f} s, seed {record.seed}: "
        f"{len(record.arrivals)} batches, {len(record.faults)} faults, "
        f"{len(record.messages)} messages, {len(record.moves)} moves of the champion"
    )
    _draw_champions(steps, record)
    steps.set_xlim(-1, record.week(record.ended) + 0.5)
    steps.set_xlabel("week")
    for axes in (rows, steps):
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_arrivals(axes: Axes, record: Record, row: int) -> None:
    for kind, (marker, color) in _ARRIVALS.items():
        weeks = [
            record.week(arrival.when)
            for arrival in record.arrivals
            if ("bad" if arrival.content != "good" else "late" if arrival.late else "good") == kind
        ]
        axes.scatter(weeks, [row] * len(weeks), marker=marker, color=color, label=f"{kind} batch")


def _draw_verdicts(axes: Axes, record: Record, row: int) -> None:
    """Show each scheduled training as a bar from when it was due to its end."""
    labelled = set[str]()
    for run in record.runs:
        if run.flow != "train":
            continue
        name = run.last.name if run.last.name in _VERDICTS else "any other end"
        color = _VERDICTS.get(run.last.name, _BAD)
        begun, ended = record.week(run.due), record.week(run.last.when)
        axes.barh(
            row,
            max(ended - begun, 0.05),
            left=begun,
            height=0.5,
            color=color,
            alpha=0.8,
            label=None if name in labelled else name,
        )
        labelled.add(name)
        _draw_deaths(axes, record, run, row)


def _draw_deaths(axes: Axes, record: Record, run: RunSeen, row: int) -> None:
    deaths = [record.week(state.when) for state in run.states if state.type == "CRASHED"]
    axes.scatter(deaths, [row] * len(deaths), marker="|", color="black", s=80)


def _draw_faults(axes: Axes, record: Record, row: str, place: int) -> None:
    for fault in record.faults:
        if _fault_row(fault.name) == row:
            begun, ended = record.week(fault.when), record.week(fault.until)
            axes.plot([begun, ended], [place, place], color="tab:red", linewidth=3)
            axes.scatter([begun], [place], marker="x", color="tab:red", s=30)


def _fault_row(name: str) -> str:
    if " in " in name:
        return "run"
    if name.endswith("killed"):
        return "server"
    return "clock" if name.startswith("clock") else "service"


def _draw_messages(axes: Axes, record: Record, row: int) -> None:
    for severity, color in _SEVERITIES.items():
        weeks = [
            record.week(message.when)
            for message in record.messages
            if message.fields.get("type") == severity
        ]
        if weeks:
            axes.scatter(
                weeks, [row] * len(weeks), marker="o", color=color, s=25, label=f"told: {severity}"
            )


def _draw_champions(axes: Axes, record: Record) -> None:
    """Show the champion's version over time, and who moved it."""
    seen = [champion for champion in record.champions if champion.version]
    weeks = [record.week(champion.when) for champion in seen] + [record.week(record.ended)]
    versions = [int(champion.version or 0) for champion in seen]
    if versions:
        axes.step(
            weeks, [*versions, versions[-1]], where="post", color="tab:green", label="champion"
        )
    styles = {
        "promote": ("o", "tab:green"),
        "approve": ("*", "tab:orange"),
        "reject": ("X", "tab:red"),
        "roll back": ("s", "tab:purple"),
    }
    for action, (marker, color) in styles.items():
        moves = [move for move in record.moves if move.action == action]
        axes.scatter(
            [record.week(move.when) for move in moves],
            [int(move.version) for move in moves],
            marker=marker,
            color=color,
            label=action,
            zorder=3,
        )
    axes.set_ylabel("version")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
