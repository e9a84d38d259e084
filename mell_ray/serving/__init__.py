"""The Ray layer: ingress, Router, fleet, GPU replicas and Migrator."""

from mell_ray.serving.app import build_openai_app

__all__ = ["build_openai_app"]
