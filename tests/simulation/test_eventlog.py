from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mell_ray.errors import ConfigError
from mell_ray.simulation.eventlog import JsonlEventLog, event_log, read_events


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_events_are_read_back_and_the_bytes_are_always_the_same(tmp_path: Path, name: str) -> None:
    for folder in ("one", "two"):
        with event_log(tmp_path / folder / name) as log:
            log.emit(0.0, "gpu_open", gpu="gpu-0", capacity_tokens=100)
            log.emit(0.1 + 0.2, "place", request=0, gpu="gpu-0", tokens=7)
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert list(read_events(tmp_path / "one" / name)) == [
        (1, {"t": 0.0, "event": "gpu_open", "gpu": "gpu-0", "capacity_tokens": 100}),
        (2, {"t": 0.3, "event": "place", "request": 0, "gpu": "gpu-0", "tokens": 7}),
    ]


def test_time_does_not_go_back(tmp_path: Path) -> None:
    with event_log(tmp_path / "log.jsonl") as log:
        log.emit(2.0, "gpu_close", gpu="a")
        with pytest.raises(ValueError, match=r"at 1\.0 s after one at 2\.0 s"):
            log.emit(1.0, "gpu_close", gpu="a")
        assert log.lines == 1


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"dir\.jsonl"), event_log(tmp_path / "dir.jsonl"):
        pass


@pytest.mark.parametrize(("text", "why"), [("{}\nnope\n", "line 2: not JSON"), ("[1]\n", "object")])
def test_a_broken_log_is_named_with_its_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        list(read_events(path))


def test_a_log_that_is_no_text_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"{}\n" * 1000)
    for content in (b"\xff\xfe\x00", whole[:20] + b"\x00\x01" + whole[22:], whole[:-9]):
        path = tmp_path / ("log.jsonl" if content[:1] == b"\xff" else "log.jsonl.gz")
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=path.name):
            list(read_events(path))


@given(
    t=st.floats(0, 1e7, allow_nan=False),
    number=st.integers(-(10**18), 10**18),
    text=st.text(max_size=8),
    share=st.floats(allow_nan=False, allow_infinity=False),
)
def test_every_line_is_the_json_of_its_event(
    t: float, number: int, text: str, share: float
) -> None:
    stream = io.StringIO()
    JsonlEventLog(stream).emit(t, "place", request=number, gpu=text, share=share, known=True)
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert json.loads(line) == {
        "t": round(t, 6),
        "event": "place",
        "request": number,
        "gpu": text,
        "share": share,
        "known": True,
    }
