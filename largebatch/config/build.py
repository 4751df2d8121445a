"""Build frozen dataclasses from plain values: refuse unknown and missing keys and values of another type.

Two libraries that do this too were tried on these types and not taken. OmegaConf's structured configurations (2.3)
make lists of tuples, take "8" for a whole number and 1 for true, and refuse 8.0. pydantic's dataclasses (2.14) take "8"
and 1 likewise unless they are strict, and then refuse mappings and lists. The errors of both name neither what is
allowed nor the nearest key, so that each kind would be reworded here: as much code as the conversion below.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from largebatch.base.errors import UserError, nearest, one_of
from largebatch.base.files import UserPath, at_home
from largebatch.config.launchers import LAUNCHERS, LauncherConfig

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Make the dataclass ``cls`` from ``values``.

    Raises:
        UserError: an unknown key (the nearest known one is named), a missing one, or a value of another type.
    """
    fields = typing.get_type_hints(cls, include_extras=True)
    for key in values:
        if key not in fields:
            raise UserError(f"'{prefix}{key}' is not a key of this configuration.{nearest(str(key), fields)}")
    missing = [key for key in fields if key not in values]
    if missing:
        names = ", ".join(f"'{prefix}{key}'" for key in missing)
        raise UserError(f"{names} {'are' if len(missing) > 1 else 'is'} missing from the configuration.")
    return cls(**{key: _convert(kind, values[key], prefix + key) for key, kind in fields.items()})


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            keys = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(kind))
            raise UserError(f"{key}={_shown(value)} is not known: '{key}' is a group of keys: {keys}.")
        if kind is LauncherConfig:  # its name says which
            one_of(key, str(value.get("name")), tuple(LAUNCHERS))
            kind = LAUNCHERS[str(value["name"])]
        return build(typing.cast(type[Any], kind), value, f"{key}.")
    options = options_of(kind)
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            element = typing.get_args(option)[0]
            return tuple(_convert(element, item, key) for item in value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"{key}={value} is not a finite number.")
            return float(value)
        if option is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if typing.get_origin(option) is Mapping and isinstance(value, Mapping):
            return _plain_mapping(value, key)
        if option == UserPath and isinstance(value, str):
            return at_home(value)
        if option in (str, UserPath) and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)  # a name such as run_dir=2024 is read as a number by the override grammar
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    raise UserError(f"{key}={_shown(value)} is of the wrong kind: it takes {_kind_name(options)}.")


def options_of(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def is_list(kind: Any) -> bool:
    """Whether a key of this type takes a list."""
    return any(typing.get_origin(option) is tuple for option in options_of(kind))


def is_path(kind: Any) -> bool:
    """Whether a key of this type takes a path, or a list of paths."""
    return any(UserPath in (option, *typing.get_args(option)) for option in options_of(kind))


def _plain_mapping(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the keyword arguments of a callable: names, and what JSON can hold."""
    for name in value:
        if not str(name).isidentifier():
            raise UserError(f"{key}: '{name}' is not the name of an argument, such as {{width: 2}}.")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{key} takes numbers, words, true, false, null, lists and mappings of these: {error}."
        ) from None
    return plain


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _kind_name(options: tuple[Any, ...]) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a word",
        UserPath: "a path",
        bool: "true or false",
        type(None): "null",
        Mapping[str, Any]: "a mapping such as {width: 2}",
    }
    lists: dict[Any, str] = {str: "a list of words", UserPath: "a list of paths"}
    return " or ".join(
        names.get(option) or lists.get(next(iter(typing.get_args(option)), None), "a list of numbers")
        for option in options
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def digest(values: Mapping[str, Any]) -> str:
    """Return the hash of plain values: of what JSON keeps of them."""
    text = json.dumps(_plain(dict(values)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
