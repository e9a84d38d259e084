"""Provisional: replaced by the scheduler branch's file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TraceRow:
    request: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    session_id: str = ""
    prefix_hashes: tuple[str, ...] = ()
