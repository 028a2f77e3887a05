# SPDX-License-Identifier: Apache-2.0
"""`params.yaml` as a file: read as DVC reads it, checked, and every mistake said by its key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from panda_ad.errors import UserError
from panda_ad.params import Params, shown

RENAMED = {"localize.neighbours": "localize.neighbors"}
"""Keys of earlier parameter files, with their present names."""


class _Reader(yaml.SafeLoader):
    """Reads YAML 1.2, as DVC does, and refuses a key that stands twice, of which PyYAML keeps the last in silence."""

    yaml_implicit_resolvers: ClassVar = {}  # type: ignore[misc]  # PyYAML's stubs take it for an instance's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return a mapping of keys that differ."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", ["<"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):  # the order counts: an integer is no float
    _Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Reader.add_constructor(
    "tag:yaml.org,2002:int", lambda _, node: int(node.value, 0 if node.value[:2] in ("0x", "0o") else 10)
)


def read_yaml(text: str) -> Any:
    """Return what a YAML file holds, as DVC reads it: `no` and `on` are text, `1e-5` is a number, `010` is ten.

    PyYAML's own reading is YAML 1.1, in which these are false, true, text and eight.
    """
    return yaml.load(text, _Reader)


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and check a parameter file.

    Raises
    ------
    UserError
        The file cannot be read, or a key is unknown, missing, of the wrong type or out of range (each named).
    """
    path = Path(path)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); run from the folder that holds params.yaml") from None
    except (
        Exception
    ) as e:  # PyYAML raises ten kinds beside its own: on dates that there are not, wrong tags, deep nesting, ...
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        raise UserError(f"{path}: not valid YAML: {reason}") from None
    return parse_params(raw, str(path))


def parse_params(raw: object, source: str = "params.yaml") -> Params:
    """Check a mapping as `load_params` does; `source` is named in errors."""
    if not isinstance(raw, dict):
        raise UserError(f"{source}: a mapping of keys to values is expected, found {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as e:
        problems = {_problem(err, raw): err["type"] for err in e.errors()}
        # 'one number or a list': for a number out of range, no line says that a list is expected as well
        others = {text.partition(":")[0] for text, kind in problems.items() if kind != "list_type"}
        lines = [text for text, kind in problems.items() if kind != "list_type" or text.partition(":")[0] not in others]
        raise UserError(" ".join(f"{source}: {'; '.join(sorted(lines))}".split())) from None


def _problem(error, raw: dict) -> str:
    """Return one validation error as 'key: what is wrong'.

    The branches of a union are left out: only pydantic tells them apart.
    """
    keys: list[str] = []
    value: object = raw
    for part in error["loc"]:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        elif error["type"] not in ("missing", "extra_forbidden"):
            break
        keys.append(str(part))
    key = ".".join(keys)
    if error["type"] == "extra_forbidden":
        return f"{key}: is called {RENAMED[key]} now" if key in RENAMED else f"{key}: unknown key"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "value_error":
        message += f", found {shown(value)}"
    if error["type"] == "string_type" and not isinstance(value, (list, dict)):
        message += "; YAML reads names such as 7, null and true as other things: put it in quotes"
    return (f"{key}: " if key else "") + message
