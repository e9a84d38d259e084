"""Metrics, the status page, dashboards and traces. Knows nothing of the parts that it observes."""
