"""The two pictures of a study, as PNG: GPUs over time, GPU-hours against migrated bytes.

Drawn with matplotlib's object interface on the Agg canvas: no display, no global state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from mell_ray.simulation.study import HOUR_S, Run, Study, billed_over_bound, figures

DPI = 150
MAX_POINTS = 300  # per line; more are averaged, or the lines become a smear


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one background."""

    background: str
    text: str
    faint: str
    grid: str
    bound: str
    lines: tuple[str, ...]


# Okabe and Ito's colours, told apart by most colour-blind readers; lighter ones on dark.
LIGHT = Theme(
    background="#ffffff",
    text="#1c2430",
    faint="#667085",
    grid="#e6e9ee",
    bound="#c9ced8",
    lines=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195", "#444444"),
)
DARK = Theme(
    background="#161b22",
    text="#e6edf3",
    faint="#9aa4b2",
    grid="#2a313c",
    bound="#4b5563",
    lines=("#4aa8ff", "#ff8a3d", "#2ecc9b", "#f09ac8", "#e8c547", "#9ad8ff", "#c39bd3", "#bbbbbb"),
)


def gpus_over_time(study: Study, theme: Theme = LIGHT) -> bytes:
    """PNG: GPUs of each policy over time above the lower bound, and below it what they waste."""
    figure = Figure(figsize=(11, 6.4), dpi=DPI, facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    runs = [run for run in study.runs if not run.variant]
    scale, unit = _time_unit(max(run.result.timeline.t[-1] for run in runs))
    most, averaged = 1.0, False
    for index, run in enumerate(runs):
        times, gpus, bounds, per_point = _averaged(run, study.gpus_per_replica)
        averaged |= per_point > 1
        times = [t / scale for t in times]
        width = 2.2 if index == 0 else 1.3
        style = {"color": _color(run, study, theme), "linewidth": width, "zorder": 20 - index}
        if index == 0:
            label = "lower bound"
            upper.fill_between(times, bounds, color=theme.bound, alpha=0.55, lw=0, label=label)
        upper.plot(times, gpus, label=run.label, **style)
        excess = [used - bound for used, bound in zip(gpus, bounds, strict=True)]
        most = max(most, *excess)
        lower.plot(times, excess, **style)
    _dress(upper, theme)
    _dress(lower, theme)
    _root_scale(lower, most)
    upper.set_ylim(bottom=0)
    upper.margins(x=0)
    upper.set_ylabel("GPUs")
    lower.set_ylabel("above the bound\n(root scale)")
    lower.set_xlabel(f"time ({unit})" + (", averaged" if averaged else ""))
    _title(upper, theme, f"GPUs open or starting · {study.title}")
    handles, labels = upper.get_legend_handles_labels()
    columns = min(7, len(labels))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        labelcolor=theme.text,
        fontsize=10,
    )
    return _png(figure)


def pareto(study: Study, theme: Theme = LIGHT) -> bytes:
    """PNG: GPU-hours billed against what was migrated, a point per run, and the frontier.

    The height is the excess over the lower bound on a square-root scale: a load balancer at
    +60 % and two packers at +1 and +2 % are all to be seen.
    """
    figure = Figure(figsize=(11, 5.6), dpi=DPI, facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    known = [figures(study, run) for run in study.runs]
    in_bytes = study.kv_bytes_per_token is not None
    moved = [float(own["migrated_bytes" if in_bytes else "migrated_tokens"]) for own in known]
    scale, unit = _amount_unit(max(moved), in_bytes)
    xs = [amount / scale for amount in moved]
    ys = [100 * (billed_over_bound(study, run)[1] - 1) for run in study.runs]
    widest = max(*xs, 1e-9)
    _dress(axes, theme)
    axes.grid(True, axis="x", color=theme.grid, linewidth=0.8)
    _root_scale(axes, max(*ys, 1.0), percent=True)
    axes.set_xlim(-0.03 * widest, 1.14 * widest)
    frontier = _frontier(xs, ys)
    if len(frontier) > 1:
        steps = list(zip(*frontier, strict=True))
        axes.step(*steps, where="post", color=theme.faint, lw=1.0, ls=(0, (1, 2)), zorder=1)
    axes.axhline(0, color=theme.text, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
    for run, x, y in zip(study.runs, xs, ys, strict=True):
        color, size = _color(run, study, theme), 45 if run.variant else 110
        axes.scatter([x], [y], s=size, color=color, edgecolor=theme.background, zorder=3)
    _label_points(axes, theme, study, xs, ys)
    _hours_axis(axes, theme, billed_over_bound(study, study.runs[0])[0])
    axes.set_xlabel(f"migrated ({unit})")
    axes.set_ylabel("above the lower bound (root scale)")
    _title(axes, theme, f"GPU-hours billed against migration, lower left is better · {study.title}")
    return _png(figure)


def _hours_axis(axes: Axes, theme: Theme, bound: float) -> None:
    """On the right, the GPU-hours of each tick on the left."""
    ticks = [tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    hours = axes.twinx()
    hours.set_yscale("function", functions=(_root, _square))
    hours.set_ylim(axes.get_ylim())
    hours.set_yticks(ticks, [f"{bound * (1 + tick / 100):,.4g}" for tick in ticks])
    hours.set_ylabel("GPU-hours billed (dashed: the lower bound)", color=theme.faint, fontsize=11)
    hours.tick_params(colors=theme.faint, labelsize=10, length=0)
    for spine in hours.spines.values():
        spine.set_visible(False)


def _color(run: Run, study: Study, theme: Theme) -> str:
    """A policy keeps its colour through all pictures; variants have their policy's."""
    policies = list(dict.fromkeys(other.result.options.policy for other in study.runs))
    return theme.lines[policies.index(run.result.options.policy) % len(theme.lines)]


def _root(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sign(values) * np.square(values)


def _root_scale(axes: Axes, most: float, *, percent: bool = False) -> None:
    """Square-root y axis from just below 0 to ``most``, with ticks that do not crowd."""
    axes.set_yscale("function", functions=(_root, _square))
    axes.set_ylim(-0.006 * most, 1.15 * most)
    steps = [0.0] + [base * 10.0**power for power in range(-2, 5) for base in (1, 2, 5)]
    ticks = [0.0]
    for step in steps:
        if step <= 1.1 * most and math.sqrt(step) - math.sqrt(ticks[-1]) > 0.1 * math.sqrt(most):
            ticks.append(step)
    suffix = " %" if percent else ""
    axes.set_yticks(ticks, [f"+{tick:g}{suffix}" if tick else f"0{suffix}" for tick in ticks])


def _title(axes: Axes, theme: Theme, text: str) -> None:
    axes.set_title(text, color=theme.text, fontsize=13, loc="left", pad=12)


def _averaged(run: Run, gpus_per_replica: int) -> tuple[list[float], list[float], list[float], int]:
    """(times, GPUs, lower bound, samples per point): means over runs of equal length."""
    line = run.result.timeline
    size = max(1, math.ceil(len(line.t) / MAX_POINTS))

    def means(values: Sequence[float], factor: float) -> list[float]:
        return [
            factor * sum(part) / len(part)
            for part in (values[start : start + size] for start in range(0, len(values), size))
        ]

    return (
        means(line.t, 1.0),
        means(line.gpus, gpus_per_replica),
        means(line.lower_bound, gpus_per_replica),
        size,
    )


def _frontier(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """The points that no other point beats in both, by rising x."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(zip(xs, ys, strict=True)):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def _label_points(
    axes: Axes, theme: Theme, study: Study, xs: Sequence[float], ys: Sequence[float]
) -> None:
    """Name every point to its right; a name that would cover another or a point goes higher."""
    pixels = [axes.transData.transform((x, y)) * 72 / DPI for x, y in zip(xs, ys, strict=True)]
    boxes = [(px - 5, px + 5, py) for px, py in pixels]  # left, right, middle, in points
    order = sorted(range(len(xs)), key=lambda index: (ys[index], xs[index]))
    for index in order:
        run, (px, middle) = study.runs[index], pixels[index]
        size = 9.0 if run.variant else 10.5
        left = px + 9
        right, top = left + 0.62 * size * len(run.label), middle
        while any(left < b and a < right and abs(top - m) < 12 for a, b, m in boxes):
            top += 1
        boxes.append((left, right, top))
        axes.annotate(
            run.label,
            (xs[index], ys[index]),
            xytext=(9, top - middle),
            textcoords="offset points",
            va="center",
            color=_color(run, study, theme),
            fontsize=size,
            fontweight="normal" if run.variant else "bold",
            path_effects=[withStroke(linewidth=3, foreground=theme.background)],
            zorder=4,
        )


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(colors=theme.faint, labelsize=10, length=0)
    axes.xaxis.label.set_color(theme.faint)
    axes.yaxis.label.set_color(theme.faint)
    axes.xaxis.label.set_fontsize(11)
    axes.yaxis.label.set_fontsize(11)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds > 3 * HOUR_S:
        return HOUR_S, "hours"
    return (60.0, "minutes") if seconds > 300 else (1.0, "seconds")


def _amount_unit(amount: float, in_bytes: bool) -> tuple[float, str]:
    if in_bytes:
        for size, unit in ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB")):
            if amount >= size:
                return size, unit
        return 1024.0, "KiB"
    return (1e6, "million tokens") if amount >= 1e6 else (1e3, "thousand tokens")


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    # Without the version that matplotlib writes by itself: same study, same bytes.
    figure.savefig(
        stream, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None}
    )
    return stream.getvalue()
