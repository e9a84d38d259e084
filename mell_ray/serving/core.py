"""What the parts of the Router share: scheduler, books, fleet, background tasks.

Events go in through ``handle``; the decisions that come out are carried out at once by whoever the
Router has registered.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine
from typing import Any

from mell_ray.config import MellConfig
from mell_ray.migration.types import MigrationResult
from mell_ray.scheduler import Scheduler
from mell_ray.scheduler.events import Decision, Event, Finish
from mell_ray.serving.books import Entry, RequestBook
from mell_ray.serving.fleet import Fleet, replica_namespace
from mell_ray.serving.scheduling import scheduler_config


class Core:
    """State of one Router, fenced by ``incarnation``: replicas obey the highest they have seen."""

    def __init__(self, config: MellConfig, app_name: str) -> None:
        self.settings = config.mell
        self.llms = {llm.model_id: llm for llm in config.llm_configs}
        self.incarnation = time.time_ns()
        namespace = replica_namespace(self.settings, app_name)
        self.fleet = Fleet(self.llms, self.settings, namespace)
        self.books = {
            name: RequestBook(llm.engine_kwargs.block_size) for name, llm in self.llms.items()
        }
        planned = scheduler_config(config)
        self.limits = dict(planned.models)
        self.scheduler = Scheduler(planned, seed=self.settings.seed)
        self.carry_out: Callable[[Decision], None] = lambda _: None
        self.on_migrated: Callable[[MigrationResult], None] = lambda _: None
        self._tasks: set[asyncio.Task[Any]] = set()

    def handle(self, event: Event) -> None:
        """Tell the scheduler and do what it decides."""
        for decision in self.scheduler.handle(event, time.monotonic()):
            self.carry_out(decision)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run in the background; the task is kept until it ends."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def entry(self, request_id: str) -> Entry | None:
        for book in self.books.values():
            found = book.get(request_id)
            if found is not None:
                return found
        return None

    def withdraw(self, request_id: str) -> None:
        """Take a request out of all books."""
        for book in self.books.values():
            book.drop(request_id)
        self.handle(Finish(request_id))

    def set_minimum(self, model_id: str, minimum: int) -> None:
        """Keep that many replicas, but never fewer than configured."""
        configured = self.llms[model_id].deployment_config.autoscaling_config.min_replicas
        limits = dataclasses.replace(self.limits[model_id], min_gpus=max(configured, minimum))
        self.limits[model_id] = limits
        self.scheduler.set_limits(model_id, limits)
