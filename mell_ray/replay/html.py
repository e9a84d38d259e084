"""A replay as one HTML file: charts inlined, nothing fetched, readable on light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jinja2
from markupsafe import Markup

from mell_ray.replay import charts
from mell_ray.replay.report import SPREAD_COLUMNS, figures, latency_rows, notes
from mell_ray.replay.types import Outcome, Summary

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }} · mell-ray replay</title>
<style>
:root { --bg: #ffffff; --card: #f6f7f9; --text: #1c2430; --faint: #667085; --line: #e1e5eb;
  --accent: #0072b2; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --bg: #161b22; --card: #1d242d; --text: #e6edf3;
  --faint: #9aa4b2; --line: #2f3742; --accent: #4aa8ff; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
.faint, th, figcaption { color: var(--faint); }
.notes li { color: var(--bad); max-width: 85ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem 1rem; }
.card b { display: block; font-size: 1.45rem; line-height: 1.25; font-weight: 650; }
.card span { font-size: .87rem; color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .42rem .5rem; border-bottom: 1px solid var(--line); }
th { font-weight: 550; }
th:first-child, td:first-child, .left td, .left th { text-align: left; overflow-wrap: anywhere; }
figure { margin: 0 0 1.6rem; }
svg { width: 100%; height: auto; display: block; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
svg text { fill: var(--faint); font-size: 11px; }
svg .grid { stroke: var(--line); }
svg .line { fill: none; stroke: var(--accent); stroke-width: 2; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% if notes %}<ul class="notes">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% endif %}<div class="cards">
{% for value, label in figures %}<div class="card"><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor %}</div>
<h2>Latency, milliseconds</h2>
<div class="scroll"><table>
<thead><tr><th></th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for label, cells in rows %}
<tr><td>{{ label }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% if errors %}<h2>Errors</h2>
<div class="scroll"><table class="left">
<thead><tr><th>count</th><th>kind (# stands for a number)</th><th>first message</th></tr></thead>
<tbody>{% for error in errors %}
<tr><td>{{ "{:,}".format(error.count) }}</td><td>{{ error.kind }}</td><td>{{ error.example }}</td>
</tr>{% endfor %}
</tbody></table></div>{% endif %}
{% for heading, caption, chart in charts if chart %}<h2>{{ heading }}</h2>
<figure>{{ chart }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}<h2>How it was run</h2>
<div class="scroll"><table class="left"><tbody>{% for name, value in settings.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</tbody></table></div>
<p class="faint">Requests leave at the trace's times whatever the answers do. TTFT counts from when
a request was sent; what it was sent late is in the table. Latencies are those of whole answers.</p>
</main>
</body>
</html>
"""


def render_html(
    title: str, summary: Summary, outcomes: Sequence[Outcome], settings: Mapping[str, object]
) -> str:
    """The report; everything in it that comes from a trace or a server is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    pictures = (
        ("Time to first token", "Share of answers up to it.", charts.ttft_chart(outcomes)),
        ("Time per output token", "Share of answers up to it.", charts.tpot_chart(outcomes)),
        ("Requests running", "Sent and not yet ended.", charts.running_chart(outcomes)),
    )
    return environment.from_string(_TEMPLATE).render(
        title=title,
        notes=notes(summary),
        figures=figures(summary),
        columns=SPREAD_COLUMNS,
        rows=latency_rows(summary),
        errors=summary.errors,
        charts=[(head, text, Markup(svg)) for head, text, svg in pictures],  # made by us alone
        settings={name: value for name, value in settings.items() if value is not None},
    )
