"""Structured logging of the serving processes: one JSON object a line, quiet by default.

Never the text of a request: ids, counts and names only.
"""

from __future__ import annotations

import json
import logging
import time


class JsonFormatter(logging.Formatter):
    """``{"t", "level", "logger", "message"}`` and, where there is one, ``"exception"``."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "t": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(level: str) -> None:
    """Give the loggers of our packages a handler of their own in this process."""
    for package in ("mell_ray", "mell_kernels"):
        root = logging.getLogger(package)
        if not root.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(JsonFormatter())
            root.addHandler(handler)
            root.propagate = False
        root.setLevel(level)
