"""How property tests run: the same examples each time, however slow the machine.

``pytest --hypothesis-profile=explore`` looks for new ones.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("steady", PATIENT, derandomize=True)
settings.register_profile("explore", PATIENT)
settings.load_profile("steady")
