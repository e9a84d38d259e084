"""Charts as inline SVG. Colours come from the page's CSS, so one picture serves light and dark."""

from __future__ import annotations

from collections.abc import Sequence

from mell_ray.replay.measure import running_over_time
from mell_ray.replay.types import Outcome

WIDTH, HEIGHT = 760, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 34
_TICKS = 4
_MAX_POINTS = 400

Point = tuple[float, float]


def distribution(values: Sequence[float]) -> list[Point]:
    """(value, share of values up to it), thinned to what a picture can show."""
    ordered = sorted(values)
    count = len(ordered)
    points = [(value, (rank + 1) / count) for rank, value in enumerate(ordered)]
    return [(0.0, 0.0), *thin(points)] if points else []


def thin(points: Sequence[Point]) -> list[Point]:
    """Evenly picked points, the last always among them."""
    step = max(1, -(-len(points) // _MAX_POINTS))
    return [*points[:-1:step], points[-1]] if points else []


def ttft_chart(outcomes: Sequence[Outcome]) -> str:
    values = [o.ttft_s * 1e3 for o in outcomes if o.failure is None and o.ttft_s is not None]
    return line_chart(distribution(values), "TTFT, ms", percent=True)


def tpot_chart(outcomes: Sequence[Outcome]) -> str:
    values = [o.tpot_s * 1e3 for o in outcomes if o.failure is None and o.tpot_s is not None]
    return line_chart(distribution(values), "TPOT, ms", percent=True)


def running_chart(outcomes: Sequence[Outcome]) -> str:
    steps: list[Point] = []
    for at, running in running_over_time(outcomes):
        if steps:
            steps.append((at, steps[-1][1]))
        steps.append((at, running))
    return line_chart(thin(steps), "seconds", percent=False)


def line_chart(points: Sequence[Point], label: str, *, percent: bool) -> str:
    """One line over a grid; empty where there is nothing to draw."""
    if not points:
        return ""
    right = max(x for x, _ in points) or 1.0
    top = 1.0 if percent else float(max(y for _, y in points) or 1.0)
    width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x / right * width, _TOP + (1 - y / top) * height

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    for tick in range(_TICKS + 1):
        share = tick / _TICKS
        x, y = place(right * share, top * share)
        value = f"{share:.0%}" if percent else f"{top * share:,.3g}"
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value}</text>'
            f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{_short(right * share)}'
            "</text>"
        )
    line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
    parts.append(
        f'<polyline points="{line}" class="line"/>'
        f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{label}</text></svg>'
    )
    return "".join(parts)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
