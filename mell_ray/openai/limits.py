"""Bounds on what a request may ask for.

They keep one request from costing more than it is worth, and keep numbers that overflow a tensor
away from the engine. Where OpenAI documents a bound, ours is the same or wider.
"""

from __future__ import annotations

MAX_N = 64  # choices per prompt
MAX_CHOICES = 256  # choices of one request: prompts x n
MAX_MESSAGES = 4096
MAX_NAME_CHARS = 64  # of a message's author
MAX_SCHEMA_CHARS = 1 << 16  # of one JSON schema, and of all of a request's tools
MAX_TOOLS = 128
MAX_TOOL_CALLS = 8  # of one answer that must call tools
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256  # per stop string
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20  # alternatives per position
MAX_LOGIT_BIAS = 1024  # entries
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0  # frequency and presence, both signs
MAX_REPETITION_PENALTY = 10.0
MAX_BIAS = 100.0
MAX_INT32 = 2**31 - 1
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
