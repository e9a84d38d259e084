"""The table of every setting, written from the settings themselves.

python -m mell_ray.settings_doc > deployments/SETTINGS.md
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_json

from mell_ray.config import MellConfig

_HEAD = """# Every setting

What stands under `args` of the application in a Serve config file, with vLLM's and Ray Serve LLM's
names where they have one. Written by `python -m mell_ray.settings_doc`; unknown keys are errors.

| setting | type | default | meaning |
|---|---|---|---|
"""


def settings_table() -> str:
    """The whole document, in Markdown."""
    return _HEAD + "".join(f"{row}\n" for row in _rows(MellConfig, ""))


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        nested, many = _nested(field.annotation)
        if nested is not None:
            yield from _rows(nested, f"{path}{'[]' if many else ''}.")
            continue
        meaning = (field.description or "").replace("|", "\\|")
        kind = _kind(field).replace("|", "\\|")
        yield f"| `{path}` | {kind} | {_default(field)} | {meaning} |"


def _nested(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    many = get_origin(annotation) is list
    inner = get_args(annotation)[0] if many else annotation
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        return inner, many
    return None, many


def _kind(field: FieldInfo) -> str:
    limits = [text for item in field.metadata if (text := _limit(item))]
    return ", ".join([_type(field.annotation), *limits])


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(arg) for arg in args)
    if origin is Literal:
        return " ".join(f"`{arg}`" for arg in args)
    if origin in (list, tuple):
        return f"list of {_type(args[0])}"
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "`true` `false`"}
    return "null" if annotation is type(None) else names.get(annotation, str(annotation))


def _limit(item: Any) -> str:
    for kind, sign, attribute in (
        (Ge, "≥", "ge"),
        (Gt, ">", "gt"),
        (Le, "≤", "le"),
        (Lt, "<", "lt"),
    ):
        if isinstance(item, kind):
            return f"{sign} {getattr(item, attribute)}"
    return "not empty" if isinstance(item, MinLen) else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{to_json(field.get_default(call_default_factory=True)).decode()}`"


if __name__ == "__main__":
    print(settings_table(), end="")
