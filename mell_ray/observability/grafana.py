"""Grafana, behind one adapter: what ``mell-ray dashboards push`` needs of it and no more.

The ``grafana-api`` package speaks for us. Its quirks end here: it joins URL prefixes without a
slash, reports refused connections as bare ``requests`` errors, and trips over answers that are
empty or not JSON. Data sources are addressed by name and uid, for their numeric ids are going away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mell_ray.errors import ConfigError, MellError

T = TypeVar("T")

TIMEOUT_S = 10.0


class GrafanaError(MellError):
    """Grafana cannot be reached or refuses; ``status`` is its HTTP status, 0 if there was none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Grafana:
    """One Grafana server, as the owner of ``token`` sees it.

    All methods raise GrafanaError.
    """

    def __init__(self, url: str, token: str, timeout_s: float = TIMEOUT_S) -> None:
        """``url``: as in a browser, with a path if Grafana is served under one.

        Raises:
            ConfigError: ``url`` is none, or grafana-api is not installed.
        """
        try:
            from grafana_api.grafana_face import GrafanaFace
        except ImportError:
            raise ConfigError(
                "grafana-api is not installed: pip install 'mell-ray[grafana]'"
            ) from None
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port or an IPv6 address that is none
            is_address = False
        if not is_address or not parts.hostname:
            raise ConfigError(f"--url: {url!r} is not an http:// or https:// address")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        path = parts.path.strip("/")
        self.url = url.rstrip("/")
        self._face = GrafanaFace(
            auth=token,
            host=host,
            port=parts.port,
            url_path_prefix=f"{path}/" if path else "",
            protocol=parts.scheme,
            timeout=timeout_s,
        )

    def find_dashboard(self, uid: str) -> dict[str, Any] | None:
        """``{"dashboard": ..., "meta": ...}``, or None."""
        return self._find(lambda: self._face.dashboard.get_dashboard(uid))

    def save_dashboard(
        self, dashboard: dict[str, Any], folder_uid: str, *, overwrite: bool, message: str
    ) -> dict[str, Any]:
        """Create or update. ``dashboard["version"]`` must be the present one unless
        ``overwrite``; Grafana answers 412 otherwise."""
        body = {
            "dashboard": dashboard,
            "folderUid": folder_uid,
            "overwrite": overwrite,
            "message": message,
        }
        return self._ask(lambda: self._face.dashboard.update_dashboard(body))

    def find_folder(self, title: str) -> str | None:
        """The uid of a folder by its title."""
        for folder in self._ask(self._face.folder.get_all_folders):
            if folder["title"] == title:
                return folder["uid"]
        return None

    def create_folder(self, title: str) -> str:
        """A new folder; returns its uid."""
        return self._ask(lambda: self._face.folder.create_folder(title))["uid"]

    def datasources(self) -> list[dict[str, Any]]:
        """All data sources: ``name``, ``type``, ``uid`` and more."""
        return self._ask(self._face.datasource.list_datasources)

    def create_datasource(self, name: str, prometheus_url: str) -> dict[str, Any]:
        """A Prometheus data source that Grafana's server asks; returns it."""
        body = {"name": name, "type": "prometheus", "access": "proxy", "url": prometheus_url}
        return self._ask(lambda: self._face.datasource.create_datasource(body))["datasource"]

    def _find(self, call: Callable[[], T]) -> T | None:
        try:
            return self._ask(call)
        except GrafanaError as error:
            if error.status == 404:
                return None
            raise

    def _ask(self, call: Callable[[], T]) -> T:
        from grafana_api.grafana_api import GrafanaException
        from requests.exceptions import ConnectionError as Unreachable
        from requests.exceptions import RequestException, Timeout

        try:
            return call()
        except GrafanaException as error:
            raise GrafanaError(self._explain(error), error.status_code) from None
        except Timeout:
            raise GrafanaError(f"{self.url} does not answer in time") from None
        except Unreachable:
            raise GrafanaError(f"{self.url} cannot be reached") from None
        except RequestException as error:
            # Also an answer that should be JSON and is not: requests counts that as its own.
            raise GrafanaError(f"{self.url}: {_first_line(error)}") from None
        except (TypeError, ValueError) as error:
            raise GrafanaError(f"{self.url} gave no usable answer: {_first_line(error)}") from None

    def _explain(self, error: Any) -> str:
        status = error.status_code
        if status == 401:
            return f"{self.url} refuses the token; GRAFANA_TOKEN must hold a service account token"
        if status == 403:
            return (
                f"{self.url}: the token may not do this; its service account needs the role "
                "Editor, and Admin to create a data source"
            )
        return f"{self.url}: {_first_line(error)}"


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
