from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mell_ray.errors import ConfigError
from mell_ray.simulation.trace import from_first, read_trace, write_trace
from mell_ray.simulation.types import TraceRow

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def read_text(tmp_path: Path, text: str, name: str = "t.csv") -> list[TraceRow]:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return read_trace(path)


def test_rows_are_sorted_by_arrival_and_keep_the_number_of_their_line(tmp_path: Path) -> None:
    rows = read_text(tmp_path, HEADER + "5,10,1\n1,20,2\n5,30,3\n1,40,4\n")
    assert [(row.request, row.arrival_s, row.prompt_tokens) for row in rows] == [
        (1, 1.0, 20),
        (3, 1.0, 40),
        (0, 5.0, 10),
        (2, 5.0, 30),
    ]


def test_columns_are_found_by_name_and_others_are_ignored(tmp_path: Path) -> None:
    text = "extra,output_tokens,prefix_hashes, session_id,arrival_s,prompt_tokens\n"
    (row,) = read_text(tmp_path, text + "x,7,1 2 3,alice,0.5,70\n")
    assert row == TraceRow(0, 0.5, 70, 7, "alice", ("1", "2", "3"))


def test_spreadsheet_habits_are_accepted(tmp_path: Path) -> None:
    text = "\ufeff" + HEADER.replace("\n", "\r\n") + " \r\n0,374.0,44.0\r\n\r\n"
    (row,) = read_text(tmp_path, text)
    assert (row.prompt_tokens, row.output_tokens) == (374, 44)


@pytest.mark.parametrize("name", ["t.csv.gz", "zipped_under_another_name.csv"])
def test_gzip(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress((HEADER + "0,1,1\n").encode()))
    assert len(read_trace(path)) == 1


@pytest.mark.parametrize(
    ("line", "column", "why"),
    [
        ("abc,1,1", "arrival_s", "not a number"),
        ("-1,1,1", "arrival_s", "negative"),
        ("nan,1,1", "arrival_s", "not a finite number"),
        ("inf,1,1", "arrival_s", "not a finite number"),
        (",1,1", "arrival_s", "not a number"),
        ("0,0,1", "prompt_tokens", "at least 1"),
        ("0,1.5,1", "prompt_tokens", "whole number"),
        ("0,nan,1", "prompt_tokens", "not a finite number"),
        ("0,many,1", "prompt_tokens", "not a number"),
        ("0,1,-3", "output_tokens", "at least 1"),
        ("0,1,0", "output_tokens", "at least 1"),
        ("0,1", "output_tokens", "missing"),
    ],
)
def test_a_wrong_cell_is_named_by_file_line_and_column(
    tmp_path: Path, line: str, column: str, why: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text(tmp_path, HEADER + "0,5,5\n" + line + "\n9,5,5\n")
    message = str(caught.value)
    assert f"{tmp_path / 't.csv'}, line 3, column {column}:" in message
    assert why in message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        (HEADER, "no requests"),
        ("arrival_s,prompt_tokens\n0,1\n", "line 1: no column 'output_tokens'"),
        ("0,1,1\n", "line 1: no column 'arrival_s'"),
        ("arrival_s,arrival_s,prompt_tokens,output_tokens\n", "twice"),
        (HEADER + '0,1,"1\n0,1,1\n', "column output_tokens"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        read_text(tmp_path, text)
    assert "t.csv" in str(caught.value)


def test_broken_gzip_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress((HEADER + "0,1,1\n" * 1000).encode())
    damaged = whole[:30] + bytes(byte ^ 0xFF for byte in whole[30:40]) + whole[40:]
    for name, content in [
        ("plain.csv.gz", HEADER.encode()),
        ("cut.csv.gz", whole[:-10]),
        ("damaged.csv.gz", damaged),
        ("binary.csv", b"\x80\x81\x82\xff" * 20),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            read_trace(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.csv: cannot read it: No such file"):
        read_trace(tmp_path / "nowhere.csv")


words = st.text(st.characters(whitelist_categories=["Lu", "Ll", "Nd"]), min_size=1, max_size=8)
row_values = st.tuples(
    st.floats(0, 1e9, allow_nan=False),
    st.integers(1, 10**7),
    st.integers(1, 10**7),
    words | st.just(""),
    st.lists(words, max_size=4).map(tuple),
)


@given(values=st.lists(row_values, min_size=1, max_size=30), zipped=st.booleans())
def test_what_is_written_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple], zipped: bool
) -> None:
    rows = [TraceRow(number, *value) for number, value in enumerate(values)]
    path = tmp_path_factory.mktemp("t") / ("t.csv.gz" if zipped else "t.csv")
    write_trace(path, rows)
    assert read_trace(path) == sorted(rows, key=lambda row: row.arrival_s)


def test_recorded_traces_are_read_whole(recorded_traces: Path) -> None:
    expected = {
        "azure-conv-2023": 19_366,
        "mooncake-conversation": 12_031,
        "lmsys-arena-vtc": 1_500,
        "sharegpt-lengths": 30_731,
    }
    for name, count in expected.items():
        rows = read_trace(recorded_traces / f"{name}.csv.gz")
        assert len(rows) == count
        assert {row.request for row in rows} == set(range(count))


PUBLISHED = {
    "azure-2023.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
    "azure-2024.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,374,44\n2024-05-10 00:00:04.324509+00:00,396,109\n",
    "burstgpt.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,374,44,418,Conversation log\n9.314579,GPT-4,396,109,505,API log\n",
    "mooncake.jsonl": '{"timestamp": 0, "input_length": 374, "output_length": 44, '
    '"hash_ids": [7]}\n'
    '{"timestamp": 4314.579, "input_length": 396, "output_length": 109, "hash_ids": []}\n',
    "ours-dated.csv": HEADER
    + "2024-05-10T02:00:00+02:00,374,44\n2024-05-10T00:00:04.314579Z,396,109",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_traces_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    rows = from_first(read_text(tmp_path, PUBLISHED[name], name))
    assert [(row.prompt_tokens, row.output_tokens) for row in rows] == [(374, 44), (396, 109)]
    assert rows[1].arrival_s - rows[0].arrival_s == pytest.approx(4.314579)


def test_hashes_of_json_lines_are_prefix_hashes(tmp_path: Path) -> None:
    rows = read_text(tmp_path, PUBLISHED["mooncake.jsonl"], "m.jsonl")
    assert [row.prefix_hashes for row in rows] == [("7",), ()]


def test_failed_requests_of_burstgpt_are_left_out_and_said_so(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(PUBLISHED["burstgpt.csv"].replace("374,44", "374,0"))
    notes: list[str] = []
    (row,) = read_trace(path, notes.append)
    assert row.request == 1  # the number of its line, as ever
    assert len(notes) == 1
    assert "1 requests without an output had failed" in notes[0]


@pytest.mark.parametrize("unit", [1, 1e3, 1e6, 1e9])
def test_unix_times_of_any_unit_are_counted_from_the_first(tmp_path: Path, unit: float) -> None:
    lines = [f"{round((1_715_299_200 + t) * unit)},10,5" for t in (0, 3, 60)]
    rows = from_first(read_text(tmp_path, HEADER + "\n".join(lines)))
    assert [row.arrival_s for row in rows] == [0, 3, 60]


def test_seconds_of_a_trace_stay_as_they_are() -> None:
    rows = [TraceRow(0, 3600.0, 10, 5)]
    assert from_first(rows) == rows


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            '{"timestamp": 0, "input_length": 5, "output_length": 5}\n{"timestamp": 1',
            "line 2: not JSON",
        ),
        (
            '{"timestamp": 0, "input_length": 5, "output_length": 5}\n7\n',
            "line 2: not a JSON object",
        ),
        (
            '{"timestamp": 0, "input_length": 5, "output_length": 5}\n{"timestamp": 1}\n',
            "line 2, column input_length: '' is not a number",
        ),
        ('{"time": 0}\n', "no column 'arrival_s'"),
        (HEADER + "yesterday,5,5\n", "line 2, column arrival_s: 'yesterday' is not a number, nor"),
    ],
)
def test_wrong_json_lines_and_dates_are_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        read_text(tmp_path, text)
