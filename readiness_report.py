"""The last starts of a volume side by side: for a terminal, and as a picture.

Owns how records of readiness.py are shown. Reads nothing itself and imports matplotlib only for
the picture, which the worker's image does without.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from readiness import PHASES

Record = Mapping[str, Any]

BAR_CHARS = 48


def report(records: Sequence[Record]) -> str:
    """Return the starts as a table, a column each, and a bar picture of the last one."""
    if not records:
        return "no start has been recorded on this volume yet"
    return "\n\n".join((_table(records), _bars(records[-1])))


def spans(record: Record) -> dict[str, tuple[float, float]]:
    """Return each phase's begin and end in seconds; one of several models is taken together."""
    found: dict[str, tuple[float, float]] = {}
    for phase in record["phases"]:
        began, ended = phase["began_s"], phase["began_s"] + phase["took_s"]
        if phase["name"] in found:
            began = min(began, found[phase["name"]][0])
            ended = max(ended, found[phase["name"]][1])
        found[phase["name"]] = (began, ended)
    return {name: found[name] for name in PHASES if name in found}


def _table(records: Sequence[Record]) -> str:
    shown = [spans(record) for record in records]
    rows = [
        ["", *(str(record.get("worker", ""))[-14:] for record in records)],
        ["started", *(record["started_at"][5:16].replace("T", " ") for record in records)],
        ["model", *(str(record.get("model", ""))[-14:] for record in records)],
        ["from", *(str(record.get("source", "")) for record in records)],
    ]
    for name in PHASES:
        cells = [
            f"{phases[name][1] - phases[name][0]:.1f} s" if name in phases else "-"
            for phases in shown
        ]
        if set(cells) != {"-"}:
            rows.append([name, *cells])
    rates = [
        next((p["MB_per_s"] for p in record["phases"] if "MB_per_s" in p), None)
        for record in records
    ]
    if any(rates):
        rows.append(["download", *("-" if rate is None else f"{rate} MB/s" for rate in rates)])
    rows.append(["ready after", *(f"{record['ready_s']:.1f} s" for record in records)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    )


def _bars(record: Record) -> str:
    scale = BAR_CHARS / max(record["ready_s"], 0.001)
    width = max(map(len, PHASES))
    lines = [f"the last start, {record['ready_s']:.1f} s:"]
    for name, (began_s, ended_s) in spans(record).items():
        left = min(BAR_CHARS - 1, round(began_s * scale))
        length = min(BAR_CHARS - left, max(1, round((ended_s - began_s) * scale)))
        bar = (" " * left + "█" * length).ljust(BAR_CHARS)
        lines.append(f"{name.ljust(width)} │{bar}│ {ended_s - began_s:.1f} s")
    return "\n".join(lines)


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw the starts as bars over time; ImportError where there is no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(records), 1, sharex=True, squeeze=False, figsize=(9, 0.6 + 2.4 * len(records))
    )
    colours = {name: f"C{number}" for number, name in enumerate(PHASES)}
    for axis, record in zip(axes[:, 0], records, strict=True):
        phases = spans(record)
        for name, (began_s, ended_s) in phases.items():
            bar = axis.barh(name, max(ended_s - began_s, 0.01), left=began_s, color=colours[name])
            axis.bar_label(bar, labels=[f"{ended_s - began_s:.1f} s"], padding=2, fontsize=7)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(x=0.1)
        axis.set_title(
            f"{record.get('model', '')} from {record.get('source', '')}, "
            f"{record.get('worker', '')}: ready after {record['ready_s']:.1f} s",
            fontsize=8,
        )
    axes[-1, 0].set_xlabel("seconds since the process began")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)
    plt.close(figure)
