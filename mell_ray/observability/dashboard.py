"""The Grafana dashboard: ``python -m mell_ray.observability.dashboard`` writes the chart's copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mell_ray.observability.panels import SCHEMA_VERSION, Panel, Query, Row, render_rows

UID = "mell-ray"
TITLE = "mell-ray"
PATH = Path(__file__).parents[2] / "helm" / "mell-ray" / "files" / "dashboard.json"

# KubeRay's monitors set ray_io_cluster; without them the variable is ".*", which also matches
# series that lack the label.
_CLUSTER = 'ray_io_cluster=~"$cluster"'
_MODEL = f'{_CLUSTER}, model=~"$model"'


def _rate(name: str, by: str, where: str = _MODEL) -> str:
    return f"sum by ({by}) (rate(ray_{name}{{{where}}}[$__rate_interval]))"


def _total(name: str, where: str = _MODEL) -> str:
    return f"sum(ray_{name}{{{where}}})"


def _increase(name: str, where: str = _MODEL) -> str:
    return f"sum(increase(ray_{name}{{{where}}}[$__range]))"


def _quantiles(name: str, where: str = _MODEL) -> tuple[Query, ...]:
    return tuple(
        Query(f"histogram_quantile({q}, {_rate(f'{name}_bucket', 'le', where)})", legend)
        for q, legend in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
    )


_USED = _total("mell_gpus", f'{_MODEL}, state=~"active|draining"')
_HELD = _total("mell_gpus", f'{_MODEL}, state!~"starting|asleep|lent"')
_BOUND = _total("mell_gpus_lower_bound", _CLUSTER)
_VIOLATIONS = _total("mell_exactly_once_violations_total")

ROWS = (
    Row(
        "Fleet",
        (
            Panel(
                "GPUs used and needed",
                "GPUs with requests, GPUs held, and how many the present requests need at least "
                "(of all models), whatever the scheduler.",
                "short",
                (
                    Query(_USED, "used"),
                    Query(_BOUND, "lower bound"),
                    Query(_HELD, "held"),
                ),
                width=12,
            ),
            Panel(
                "GPUs by state",
                "Idle GPUs above the minimum are released after mell.fleet.idle_grace_s.",
                "short",
                (Query(f"sum by (state) (ray_mell_gpus{{{_MODEL}}})", "{{state}}"),),
                width=12,
                stacked=True,
            ),
            Panel(
                "GPU seconds per 1000 output tokens",
                "What the bill is made of, over the time range shown.",
                "s",
                (
                    Query(
                        f"1000 * {_increase('mell_gpu_seconds_total')} / "
                        f"({_increase('mell_generation_tokens_total')} > 0)",
                        "GPU seconds",
                    ),
                ),
                kind="stat",
                height=4,
                width=6,
            ),
            Panel(
                "GPU hours",
                "GPU time held over the time range shown.",
                "h",
                (Query(f"{_increase('mell_gpu_seconds_total')} / 3600", "GPU hours"),),
                kind="stat",
                height=4,
                width=6,
            ),
            Panel(
                "Migrations",
                "Committed over the time range shown.",
                "short",
                (
                    Query(
                        _increase("mell_migrations_total", f'{_CLUSTER}, outcome="committed"'),
                        "committed",
                    ),
                ),
                kind="stat",
                height=4,
                width=6,
            ),
            Panel(
                "Exactly-once violations",
                "Must stay 0: a token delta came from a replica that did not own its request.",
                "short",
                (Query(_VIOLATIONS, "violations"),),
                kind="stat",
                height=4,
                width=6,
                alarm=1,
            ),
            Panel(
                "KV blocks",
                "Used by requests, free with a prefix still known, free.",
                "short",
                (Query(f"sum by (state) (ray_mell_kv_blocks{{{_MODEL}}})", "{{state}}"),),
                width=12,
                stacked=True,
            ),
            Panel(
                "KV use per GPU",
                "Share of a GPU's KV blocks that requests hold.",
                "percentunit",
                (
                    Query(
                        f'sum by (replica) (ray_mell_kv_blocks{{{_MODEL}, state="used"}}) / '
                        f"sum by (replica) (ray_mell_kv_blocks{{{_MODEL}}})",
                        "{{replica}}",
                    ),
                ),
                width=12,
            ),
        ),
    ),
    Row(
        "Requests",
        (
            Panel(
                "Requests by state",
                "Queued at the Router, waiting on a replica, running, migrating.",
                "short",
                (Query(f"sum by (state) (ray_mell_requests{{{_MODEL}}})", "{{state}}"),),
                stacked=True,
            ),
            Panel(
                "Requests ended",
                "By outcome; refused ones never ran, cancelled ones lost their client.",
                "reqps",
                (Query(_rate("mell_requests_finished_total", "outcome"), "{{outcome}}"),),
                stacked=True,
            ),
            Panel(
                "Tokens per second",
                "Prompt tokens of requests that began, and output tokens delivered.",
                "short",
                (
                    Query(_rate("mell_generation_tokens_total", "model"), "output {{model}}"),
                    Query(_rate("mell_prompt_tokens_total", "model"), "prompt {{model}}"),
                ),
            ),
            Panel(
                "Time to first token",
                "From acceptance at the ingress.",
                "s",
                _quantiles("mell_time_to_first_token_seconds"),
            ),
            Panel(
                "Queue time",
                "From acceptance at the ingress to a place on a GPU.",
                "s",
                _quantiles("mell_queue_time_seconds"),
            ),
            Panel(
                "Time per output token",
                "Mean of each request after its first token.",
                "s",
                _quantiles("mell_time_per_output_token_seconds"),
            ),
            Panel(
                "Inter-token latency",
                "Gaps between deliveries of one request, sampled.",
                "s",
                _quantiles("mell_inter_token_latency_seconds"),
            ),
            Panel(
                "Prefix cache hits",
                "Share of looked-up tokens that need not be computed.",
                "percentunit",
                (
                    Query(
                        f"{_rate('mell_prefix_cache_hit_tokens_total', 'model')} / "
                        f"({_rate('mell_prefix_cache_query_tokens_total', 'model')} > 0)",
                        "{{model}}",
                    ),
                ),
            ),
            Panel(
                "Prefix cache evictions",
                "Cached blocks per second that made room for others.",
                "short",
                (Query(_rate("mell_prefix_cache_evicted_blocks_total", "model"), "{{model}}"),),
            ),
            Panel(
                "Preemptions and recoveries",
                "Preempted requests are computed again; recovered ones lost their replica.",
                "reqps",
                (
                    Query(_rate("mell_preemptions_total", "model"), "preempted {{model}}"),
                    Query(_rate("mell_recoveries_total", "cause"), "recovered: {{cause}}"),
                ),
            ),
        ),
    ),
    Row(
        "Migrations and scheduler",
        (
            Panel(
                "Migrations by reason",
                "Why requests moved.",
                "reqps",
                (Query(_rate("mell_migrations_total", "reason", _CLUSTER), "{{reason}}"),),
                stacked=True,
            ),
            Panel(
                "Migrations by outcome",
                "An aborted migration leaves its request where it was.",
                "reqps",
                (
                    Query(
                        _rate("mell_migrations_total", "mode, outcome", _CLUSTER),
                        "{{mode}} {{outcome}}",
                    ),
                ),
                stacked=True,
            ),
            Panel(
                "Stall",
                "Freeze to commit, when nobody decodes the request.",
                "s",
                _quantiles("mell_migration_stall_seconds", _CLUSTER),
            ),
            Panel(
                "Duration",
                "Reservation to commit; the source decodes on meanwhile.",
                "s",
                _quantiles("mell_migration_seconds", _CLUSTER),
            ),
            Panel(
                "Phases",
                "Where a migration's time goes, 90th percentile of each part.",
                "s",
                (
                    Query(
                        "histogram_quantile(0.9, "
                        f"{_rate('mell_migration_phase_seconds_bucket', 'le, phase', _CLUSTER)})",
                        "{{phase}}",
                    ),
                ),
            ),
            Panel(
                "KV moved",
                "Bytes per second, and the median size of one migration.",
                "bytes",
                (
                    Query(_rate("mell_migration_bytes_total", "mode", _CLUSTER), "{{mode}} per s"),
                    Query(
                        "histogram_quantile(0.5, "
                        f"{_rate('mell_migration_size_bytes_bucket', 'le', _CLUSTER)})",
                        "one migration, p50",
                    ),
                ),
            ),
            Panel(
                "Copy rounds",
                "Live stages before the freeze.",
                "short",
                _quantiles("mell_migration_stages", _CLUSTER),
            ),
            Panel(
                "Scheduler epoch",
                "Time of one planning epoch; it has to stay well under mell.epoch_s.",
                "s",
                _quantiles("mell_scheduler_epoch_seconds", _CLUSTER),
            ),
        ),
    ),
)


def render() -> dict[str, Any]:
    """The dashboard's JSON model, without an id, so that Grafana takes it in as new or as an
    update of the one with this uid."""
    return {
        "id": None,
        "uid": UID,
        "title": TITLE,
        "description": "GPUs, requests and live migrations of mell-ray.",
        "tags": ["mell-ray", "ray", "llm"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource(), _variable("cluster"), _variable("model")]},
        "annotations": {"list": []},
        "links": [],
        "panels": render_rows(ROWS),
    }


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "hide": 0,
        "current": {},
    }


def _variable(name: str) -> dict[str, Any]:
    label = {"cluster": "ray_io_cluster", "model": "model"}[name]
    query = f"label_values(ray_mell_gpus, {label})"
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": "variable"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def text() -> str:
    """The file."""
    return json.dumps(render(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(text())
