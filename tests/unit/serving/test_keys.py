"""API keys: where they come from, what opens what, and what is kept of them."""

from __future__ import annotations

import http.server
import logging
import os
import pickle
import threading
from pathlib import Path

import pytest

from mell_ray.config import AuthConfig, IngressConfig, KeySource, MellConfig
from mell_ray.errors import (
    AuthenticationError,
    ConfigError,
    RateLimitError,
    RequestTooLargeError,
)
from mell_ray.openai.errors import error_body, error_headers
from mell_ray.serving.checks import check_config
from mell_ray.serving.guard import Guard
from mell_ray.serving.keys import REFRESH_S, KeyRing

CLIENT, OTHER, OPERATOR = b"client-key", b"other-key", b"operator-key"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ring(source: KeySource, clock: Clock | None = None, **environment: str) -> KeyRing:
    return KeyRing(source, "mell.auth.clients", environment, clock or Clock())


def replace(path: Path, text: str) -> None:
    """A change that a file's time shows whatever the clock's resolution."""
    before = path.stat().st_mtime_ns
    path.write_text(text)
    os.utime(path, ns=(before + 1, before + 1))


def test_keys_from_a_file_a_directory_and_the_environment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("# of the team\n\n one \ntwo\n")
    secret = tmp_path / "secret"
    (secret / "..data").mkdir(parents=True)
    (secret / "a").write_text("three")
    (secret / "b").write_text("four\n")
    (secret / ".hidden").write_text("five")
    source = KeySource(files=[str(tmp_path / "file"), str(secret)], env=["KEYS"])
    keys = ring(source, KEYS="six,seven")
    for key in (b"one", b"two", b"three", b"four", b"six", b"seven"):
        assert keys.find(key)
    for key in (b"five", b"", b"# of the team", b"one ", b"six,seven", b"ONE"):
        assert keys.find(key) is None


def test_no_source_no_keys() -> None:
    keys = ring(KeySource())
    assert not keys
    assert keys.find(b"") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("", "holds no key"),
        ("# only a comment\n", "holds no key"),
        ("two words", "without blanks"),
        ("schlüssel", "ASCII"),
        ("words weight=0", "weight=NUMBER"),
        ("words weight=-1", "weight=NUMBER"),
        ("words weight=nan", "weight=NUMBER"),
        ("words weight=1 weight=2", "weight=NUMBER"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        ring(KeySource(files=[str(path)]))
    assert str(path) in str(error.value)
    assert "mell.auth.clients" in str(error.value)
    for word in ("words", "schlüssel"):
        assert word not in str(error.value)


def test_an_empty_directory_or_variable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file in"):
        ring(KeySource(files=[str(tmp_path)]))
    with pytest.raises(ConfigError, match="environment variable KEYS holds no key"):
        ring(KeySource(env=["KEYS"]))


def test_missing_keys_are_told_before_anything_starts(tmp_path: Path) -> None:
    llm = {"model_loading_config": {"model_id": "m", "model_source": "builtin"}}
    auth = {"operators": {"files": [str(tmp_path / "none")]}}
    config = MellConfig.parse({"llm_configs": [llm], "mell": {"auth": auth}})
    with pytest.raises(ConfigError, match=r"mell\.auth\.operators"):
        check_config(config)


def test_weights_stand_behind_their_keys_and_change_with_the_file(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text("one weight=2.5\ntwo\n")
    keys = ring(KeySource(files=[str(path)]), clock)
    one, two = keys.find(b"one"), keys.find(b"two")
    assert one is not None
    assert two is not None
    assert (keys.weight(one), keys.weight(two)) == (2.5, 1.0)
    replace(path, "one weight=7\n")
    clock.now = REFRESH_S
    assert keys.find(b"one") == one
    assert keys.weight(one) == 7.0


def test_callers_have_shares_where_these_are_on(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("client-key weight=4\nother-key\n")
    headers = {b"authorization": b"Bearer " + CLIENT}
    for fair, weight in ((False, None), (True, 4.0)):
        auth = AuthConfig(clients=KeySource(files=[str(path)]), fair_share=fair)
        with Guard(auth, IngressConfig()).admit("POST", "/v1/completions", headers) as share:
            assert (share and share.weight) == weight


@pytest.mark.parametrize(
    "mell", [{"ingress": {"max_concurrent_per_key": 2}}, {"auth": {"fair_share": True}}]
)
def test_what_is_done_per_key_needs_keys(mell: dict) -> None:
    llm = {"model_loading_config": {"model_id": "m", "model_source": "builtin"}}
    with pytest.raises(ConfigError, match=r"needs keys in auth\.clients"):
        MellConfig.parse({"llm_configs": [llm], "mell": mell})


def test_changed_keys_hold_without_a_restart(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text("old")
    keys = ring(KeySource(files=[str(path)]), clock)
    replace(path, "new")
    assert keys.find(b"old")
    clock.now = REFRESH_S
    assert keys.find(b"new")
    assert keys.find(b"old") is None


@pytest.mark.parametrize("gone", [True, False])
def test_keys_stay_while_their_file_is_unreadable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, gone: bool
) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text("old")
    keys = ring(KeySource(files=[str(path)]), clock)
    if gone:
        path.unlink()
    else:
        replace(path, "")
    clock.now = REFRESH_S
    with caplog.at_level(logging.ERROR):
        assert keys.find(b"old")
    assert "left as they are" in caplog.text
    path.write_text("new")
    clock.now = 2 * REFRESH_S
    assert keys.find(b"new")


def test_no_clear_text_is_kept() -> None:
    keys = ring(KeySource(env=["KEYS"]), KEYS="very-secret")
    state = {k: v for k, v in vars(keys).items() if k not in ("_environment", "_clock")}
    assert b"very-secret" not in pickle.dumps(state)
    assert "secret" not in (keys.find(b"very-secret") or "")


# --- what opens what -----------------------------------------------------------------------


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> dict[str, KeySource]:
    monkeypatch.setenv("CLIENTS", f"{CLIENT.decode()},{OTHER.decode()}")
    monkeypatch.setenv("OPERATORS", OPERATOR.decode())
    return {"clients": KeySource(env=["CLIENTS"]), "operators": KeySource(env=["OPERATORS"])}


def opens(guard: Guard, path: str, key: bytes | None) -> bool:
    headers = {} if key is None else {b"authorization": b"Bearer " + key}
    try:
        with guard.admit("GET", path, headers):
            return True
    except AuthenticationError:
        return False


API, STATE = "/v1/models", "/mell/v1/state"


@pytest.mark.parametrize(
    ("lists", "opened"),
    [
        ((), {API: {None, CLIENT, OPERATOR}, STATE: {None, CLIENT, OPERATOR}}),
        (("clients",), {API: {CLIENT}, STATE: {CLIENT}}),
        (("clients", "operators"), {API: {CLIENT, OPERATOR}, STATE: {OPERATOR}}),
        (("operators",), {API: {None, CLIENT, OPERATOR}, STATE: {OPERATOR}}),
    ],
)
def test_which_key_opens_what(
    sources: dict[str, KeySource], lists: tuple[str, ...], opened: dict[str, set[bytes | None]]
) -> None:
    guard = Guard(AuthConfig(**{name: sources[name] for name in lists}), IngressConfig())
    for path, keys in opened.items():
        for key in (None, CLIENT, OPERATOR):
            assert opens(guard, path, key) is (key in keys), (path, key)
        if None not in keys:
            assert not opens(guard, path, b"guess")
    assert opens(guard, "/health", None)
    assert opens(guard, "/mell", None)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/v1/", "/mell/v1/live", "/health/x"])
def test_every_other_path_needs_a_key(sources: dict[str, KeySource], path: str) -> None:
    assert not opens(Guard(AuthConfig(**sources), IngressConfig()), path, None)


@pytest.mark.parametrize(
    "header", [b"", b"Bearer", b"Bearer ", CLIENT, b"Basic " + CLIENT, b"Bearer x" + CLIENT]
)
def test_refusals_name_the_header_and_not_the_key(
    sources: dict[str, KeySource], header: bytes
) -> None:
    guard = Guard(AuthConfig(**sources), IngressConfig())
    with (
        pytest.raises(AuthenticationError) as info,
        guard.admit("GET", API, {b"authorization": header}),
    ):
        pass
    body = error_body(info.value)["error"]
    assert body["code"] == "invalid_api_key"
    assert body["type"] == "invalid_request_error"
    assert "Authorization" in body["message"]
    assert CLIENT.decode() not in body["message"]
    assert info.value.status_code == 401
    assert error_headers(info.value) == {"WWW-Authenticate": "Bearer"}


def test_the_scheme_is_read_in_any_case(sources: dict[str, KeySource]) -> None:
    guard = Guard(AuthConfig(**sources), IngressConfig())
    with guard.admit("GET", API, {b"authorization": b"bEARER  " + CLIENT}):
        pass


# --- limits --------------------------------------------------------------------------------


def post(guard: Guard, key: bytes):
    return guard.admit("POST", "/v1/completions", {b"authorization": b"Bearer " + key})


def test_requests_per_key_are_counted_until_they_end(sources: dict[str, KeySource]) -> None:
    guard = Guard(AuthConfig(**sources), IngressConfig(max_concurrent_per_key=2))
    with post(guard, CLIENT), post(guard, OTHER), post(guard, OTHER):
        with post(guard, CLIENT):
            with pytest.raises(RateLimitError) as info, post(guard, CLIENT):
                pass
            assert opens(guard, API, CLIENT)  # asking for the models is no load
        with post(guard, CLIENT):
            pass
    assert info.value.status_code == 429
    assert int(error_headers(info.value)["Retry-After"]) >= 1


def test_a_failed_request_gives_its_slot_back(sources: dict[str, KeySource]) -> None:
    guard = Guard(AuthConfig(**sources), IngressConfig(max_concurrent_per_key=1))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), post(guard, CLIENT):
            raise ZeroDivisionError


def test_a_long_body_is_refused_by_its_length() -> None:
    guard = Guard(AuthConfig(), IngressConfig(max_body_bytes=10))
    with guard.admit("POST", "/v1/completions", {b"content-length": b"10"}):
        pass
    with (
        pytest.raises(RequestTooLargeError, match="10 bytes") as info,
        guard.admit("POST", "/v1/completions", {b"content-length": b"11"}),
    ):
        pass
    assert info.value.status_code == 413


@pytest.mark.parametrize("key", [None, "client-key"])
def test_the_command_line_sends_the_key_of_its_environment(
    monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    from mell_ray.errors import MellError
    from mell_ray.serving import cli

    seen: list[str | None] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(200 if key else 401)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.delenv(cli.KEY_VARIABLE, raising=False)
    if key:
        monkeypatch.setenv(cli.KEY_VARIABLE, key)
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        if key:
            assert cli._call(url, "/mell/v1/state") == {}
        else:
            with pytest.raises(MellError) as info:
                cli._call(url, "/mell/v1/state")
            assert info.value.code == "401"
        thread.join()
    assert seen == [f"Bearer {key}" if key else None]
