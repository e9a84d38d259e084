"""What a replica does by itself, so that nothing depends on any other process being alive.

It settles migrations whose driver died between freeze and commit, drops requests of ingresses that
are gone, and ends the process when no Router has asked for it for the length of its lease.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import ray
from ray.exceptions import ActorDiedError, RayError

from mell_ray.migration.types import MigrationOrder, Settlement

if TYPE_CHECKING:
    from mell_ray.serving.replica import GPUReplica

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
SETTLE_TIMEOUT_S = 5.0
# Running streams outlive the Router; a replica that still has some waits this many leases.
BUSY_LEASES = 20


class Housekeeping(threading.Thread):
    """The replica's own clock."""

    def __init__(
        self, replica: GPUReplica, namespace: str, lease_s: float, freeze_limit_s: float
    ) -> None:
        super().__init__(name="mell-housekeeping", daemon=True)
        self._replica = replica
        self._namespace = namespace
        self._lease_s = lease_s
        self._freeze_limit_s = freeze_limit_s
        self._renewed = time.monotonic()

    def renew_lease(self) -> None:
        self._renewed = time.monotonic()

    def run(self) -> None:
        while True:
            time.sleep(PERIOD_S)
            try:
                self._replica.expire()
                for order in self._replica.overdue(self._freeze_limit_s):
                    self._settle(order)
                self._check_lease()
            except RuntimeError as error:
                logger.warning("housekeeping stops: %s", error)
                return

    def _settle(self, order: MigrationOrder) -> None:
        settlement: Settlement
        try:
            target = ray.get_actor(order.dst, namespace=self._namespace)
            settlement = ray.get(
                target.mig_settle.remote(order.migration_id), timeout=SETTLE_TIMEOUT_S
            )
        except (ActorDiedError, ValueError):
            settlement = "aborted"  # dead, and a dead target cannot own anything
        except RayError as error:
            logger.warning("replica %s does not say: %r; asking again", order.dst, error)
            return
        self._replica.conclude(order, settlement)

    def _check_lease(self) -> None:
        silent = time.monotonic() - self._renewed
        if silent > self._lease_s and (
            not self._replica.busy() or silent > BUSY_LEASES * self._lease_s
        ):
            logger.warning("no Router for %.0f s: replica ends", silent)
            logging.shutdown()
            os._exit(0)
