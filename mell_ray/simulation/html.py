"""A study as one HTML file: pictures inlined, nothing fetched, readable on light and dark."""

from __future__ import annotations

import base64

import jinja2
from markupsafe import Markup

from mell_ray.simulation import plots
from mell_ray.simulation.report import (
    COLUMNS,
    bound_cells,
    format_bytes,
    format_duration,
    format_hours,
    format_usd,
    has_column,
    headline,
    policy_cells,
)
from mell_ray.simulation.study import Study, best_run, billed_over_bound, figures

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ study.title }} · mell-ray plan</title>
<style>
:root { --bg: #ffffff; --card: #f6f7f9; --text: #1c2430; --faint: #667085; --line: #e1e5eb;
  --best: #e8f3fb; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --bg: #161b22; --card: #1d242d; --text: #e6edf3;
  --faint: #9aa4b2; --line: #2f3742; --best: #1c3247; --accent: #4aa8ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
.lead { font-size: 1.08rem; margin: 0 0 1.6rem; max-width: 75ch; }
.faint, figcaption, dt, th { color: var(--faint); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem 1rem; }
.card b { display: block; font-size: 1.45rem; line-height: 1.25; font-weight: 650; }
.card span { font-size: .87rem; color: var(--faint); }
figure { margin: 0 0 1.6rem; }
figure img { width: 100%; height: auto; display: block; border: 1px solid var(--line);
  border-radius: .6rem; }
figcaption { font-size: .88rem; margin-top: .45rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .42rem .5rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 550; }
th:first-child, td:first-child, .left td, .left th { text-align: left; }
.left td { white-space: normal; }
tr.best td { background: var(--best); font-weight: 650; }
tr.bound td { color: var(--faint); }
summary { color: var(--faint); font-size: .9rem; margin-top: .7rem; cursor: pointer; }
.notes li { margin: .25rem 0; max-width: 85ch; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .88rem;
  margin: .8rem 0 0; }
dd { margin: 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
</style>
</head>
<body>
<main>
<h1>{{ study.title }}</h1>
<p class="lead">{{ headline }}</p>
<div class="cards">
{% for value, label in cards %}<div class="card"><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor %}</div>
{% if study.notes %}<h2>Read this first</h2>
<ul class="notes">{% for note in study.notes %}<li>{{ note }}</li>
{% endfor %}</ul>{% endif %}
<h2>Policies</h2>
<div class="scroll"><table>
<thead><tr>{% for heading, meaning in columns %}<th title="{{ meaning }}">{{ heading }}</th>
{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr{% if row.best %} class="best"{% endif %}>
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}<tr class="bound">{% for cell in bound %}<td>{{ cell }}</td>{% endfor %}</tr>
</tbody></table></div>
<details><summary>What the columns mean</summary>
<dl>{% for heading, meaning in columns[1:] %}<dt>{{ heading }}</dt><dd>{{ meaning }}</dd>
{% endfor %}</dl></details>
<h2>GPUs over time</h2>
{{ picture(over_time, "GPUs over time, per policy, against the lower bound") }}
<figcaption>Above: GPUs open or starting. Below: the same less the lower bound, on a square-root
scale. The lower bound of an instant is the larger of total size over capacity, rounded up, and
the Martello-Toth L2 bound: no packing of the requests of that instant takes fewer.</figcaption>
</figure>
<h2>What migration buys</h2>
{{ picture(pareto, "GPU-hours billed against migrated bytes, a point per policy") }}
<figcaption>Lower left is better. Nothing on the dotted line is beaten in both
directions.</figcaption>
</figure>
<h2>What this rests on</h2>
<div class="scroll"><table class="left">
<thead><tr><th>figure</th><th>value</th><th>from</th></tr></thead>
<tbody>{% for item in study.assumptions %}
<tr><td>{{ item.name }}</td><td>{{ item.value }}</td><td>{{ item.source }}</td></tr>{% endfor %}
</tbody></table></div>
<h2>Trace</h2>
<div class="scroll"><table class="left">
<thead><tr><th></th><th>p50</th><th>p90</th><th>p99</th><th>max</th></tr></thead>
<tbody>{% for name, part in (("prompt tokens", study.trace.prompt),
  ("output tokens", study.trace.output)) %}
<tr><td>{{ name }}</td>{% for value in (part.p50, part.p90, part.p99, part.max) %}
<td>{{ "{:,}".format(value) }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
<p class="faint">{{ study.trace.name }}: {{ "{:,}".format(study.trace.requests) }} requests in
{{ duration }}, {{ "%.2f"|format(study.trace.requests_per_s) }} a second, busiest minute
{{ "%.2f"|format(study.trace.peak_requests_per_s) }} a second.</p>
{% if command %}<h2>Run it again</h2>
<pre>{{ command }}</pre>{% endif %}
</main>
</body>
</html>
"""

_PICTURE = """<figure><picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">
<img alt="{alt}" src="data:image/png;base64,{light}">
</picture>"""


def render_html(
    study: Study,
    *,
    over_time: tuple[bytes, bytes],
    pareto: tuple[bytes, bytes],
    command: str = "",
) -> str:
    """The report. Pictures are (light, dark) pairs of PNGs, as `draw` gives them."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    shown = [n for n, (head, _) in enumerate(COLUMNS) if has_column(study, head)]
    best = best_run(study)
    return environment.from_string(_TEMPLATE).render(
        study=study,
        headline=headline(study),
        cards=_cards(study),
        columns=[COLUMNS[n] for n in shown],
        rows=[
            {"cells": [policy_cells(study, run)[n] for n in shown], "best": run is best}
            for run in study.runs
        ],
        bound=[bound_cells(study)[n] for n in shown],
        picture=_picture,
        over_time=over_time,
        pareto=pareto,
        duration=format_duration(study.trace.duration_s),
        command=command,
    )


def draw(study: Study) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    """((over time, light), (.., dark)), ((Pareto, light), (.., dark)) as PNGs."""
    themes = (plots.LIGHT, plots.DARK)
    over_time = tuple(plots.gpus_over_time(study, theme) for theme in themes)
    pareto = tuple(plots.pareto(study, theme) for theme in themes)
    return (over_time[0], over_time[1]), (pareto[0], pareto[1])


def _picture(images: tuple[bytes, bytes], alt: str) -> Markup:
    light, dark = (base64.b64encode(image).decode() for image in images)
    return Markup(_PICTURE.format(light=light, dark=dark, alt=alt))


def _cards(study: Study) -> list[tuple[str, str]]:
    best = best_run(study)
    own = figures(study, best)
    cards = [(format_hours(own["billed_gpu_hours"]), f"GPU-hours billed with {best.label}")]
    if own["billed_usd"] is not None:
        each = format_usd(own["usd_per_million_tokens"])
        cards.append((format_usd(own["billed_usd"]), f"{each} a million tokens"))
    _, over = billed_over_bound(study, best)
    cards.append((f"{over:.3f} x", "the lower bound"))
    cards.append((f"{own['mean_gpus']:.1f} / {own['peak_gpus']}", "GPUs, mean / peak"))
    moved = own["migrated_bytes"]
    amount = f"{own['migrated_tokens']:,} tokens" if moved is None else format_bytes(moved)
    cards.append((amount, f"moved in {own['migrations']:,} migrations"))
    return cards
