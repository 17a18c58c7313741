"""Typed configuration: a dataclass is the command line, a YAML preset its defaults, flags override both.

`parse_config(MyConfig)` reads `--config preset.yaml --lr 1e-4 --no-eval`. Every flag may be written with
`-` or `_`; every boolean has a `--no-` form. Faults of the preset, of the flags and of
`MyConfig.validate()` (a method that returns a list of sentences) are collected and raised once, before
anything is loaded. Nothing here imports torch, so `--help` answers at once.
"""

import contextlib
import dataclasses
import io
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
REPO = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """All faults of a configuration: one sentence each in `faults`; `config` holds what could be read."""

    def __init__(self, faults: Sequence[str], config: Any = None) -> None:
        self.faults, self.config = list(faults), config
        lines = "\n".join(f"  {number}. {fault}" for number, fault in enumerate(self.faults, start=1))
        super().__init__(f"{len(self.faults)} fault(s) in the configuration:\n{lines}")


def parse_config(cls: type[T], argv: Sequence[str] | None = None, prog: str | None = None) -> T:
    """Build a `cls` from its defaults, `--config FILE` (repeatable, later ones win) and flags, in that order.

    Args:
        cls: a dataclass; field docstrings become the help texts. It may have `validate() -> list[str]`.
        argv: the arguments; `sys.argv[1:]` if None.
        prog: program name in the help text.

    Raises:
        ConfigError: every fault found, together.
        SystemExit: code 0 after `--help`.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    presets, args = _split_presets(args)
    values, faults = _read_presets(cls, presets)
    default = _with_defaults(cls, values)
    config, flag_faults = _parse_flags(cls, args, default, prog)
    faults += flag_faults
    if config is None:
        raise ConfigError(faults)
    return checked(config, faults)


def checked(config: T, faults: Sequence[str] = ()) -> T:
    """`config` itself if `faults` and `config.validate()` are empty, else ConfigError with all of them."""
    validate = getattr(config, "validate", None)
    found = [*faults, *(validate() if validate is not None else [])]
    if found:
        raise ConfigError(found, config)
    return config


def config_from_file(cls: type[T], path: str | Path, **overrides: Any) -> T:
    """Build a `cls` from a preset file and keyword overrides; ConfigError lists every fault."""
    values, faults = _read_presets(cls, [str(path)])
    checked_values, override_faults = _typed(cls, overrides, "the overrides")
    faults += override_faults
    missing = _required(cls) - values.keys() - checked_values.keys()
    faults += [f"{path}: field {name} is required and missing" for name in sorted(missing)]
    if missing:
        raise ConfigError(faults)
    return checked(cls(**{**values, **checked_values}), faults)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config dataclass (tuples become lists), ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def config_to_yaml(config: Any) -> str:
    """YAML text of a config dataclass; `parse_config(cls, ["--config", file])` reads it back."""
    import yaml

    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def find_preset(name: str) -> Path:
    """The file of a preset: an existing path, or `configs/<name>[.yaml]` of the project.

    Raises:
        ValueError: there is no such file; the message lists the presets there are.
    """
    candidates = [Path(name), REPO / "configs" / name, REPO / "configs" / f"{name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.stem for path in (REPO / "configs").glob("*.yaml"))) or "none"
    raise ValueError(f"--config {name}: no such file, and no preset of that name (presets: {known})")


def _split_presets(args: list[str]) -> tuple[list[str], list[str]]:
    presets, rest = [], []
    position = 0
    while position < len(args):
        arg = args[position]
        if arg == "--config" and position + 1 < len(args):
            presets.append(args[position + 1])
            position += 1
        elif arg.startswith("--config="):
            presets.append(arg.partition("=")[2])
        else:
            rest.append(arg)
        position += 1
    return presets, rest


def _read_presets(cls: type, names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    import yaml

    values: dict[str, Any] = {}
    faults: list[str] = []
    for name in names:
        try:
            path = find_preset(name)
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except ValueError as error:
            faults.append(str(error))
            continue
        except yaml.YAMLError as error:
            faults.append(f"{name}: not valid YAML: {' '.join(str(error).split())}")
            continue
        if not isinstance(content, dict):
            faults.append(f"{path}: expected `field: value` lines, found a {type(content).__name__}")
            continue
        good, found = _typed(cls, content, str(path))
        values.update(good)
        faults += found
    return values, faults


def _typed(cls: type, content: dict[Any, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Values of `content` as the fields' types, and one fault per field that is unknown or wrong."""
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    good: dict[str, Any] = {}
    faults = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            faults.append(f"{where}: unknown field {key}{_did_you_mean(name, fields)}")
            continue
        try:
            good[name] = _convert(value, hints[name])
        except ValueError as error:
            faults.append(f"{where}: field {name}: {error}")
    return good, faults


def _convert(value: Any, hint: Any) -> Any:
    """`value` (from YAML) as type `hint`; ValueError says what was expected and found."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            with contextlib.suppress(ValueError):
                return _convert(value, option)
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise ValueError(f"expected one of {', '.join(map(str, arguments))}; found {value!r}")
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_convert(item, arguments[0]) for item in value)
    elif origin is dict and isinstance(value, dict):
        return {str(key): _convert(item, arguments[1]) for key, item in value.items()}
    elif hint is types.NoneType and value is None:
        return None
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"expected {_type_name(hint)}, found {value!r}")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _did_you_mean(name: str, known: Sequence[str] | set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _required(cls: type) -> set[str]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return {field.name for field in fields if field.default is missing and field.default_factory is missing}


def _with_defaults(cls: type[T], values: dict[str, Any]) -> T:
    import tyro

    return cls(**{**{name: tyro.MISSING for name in _required(cls)}, **values})


def _parse_flags(cls: type[T], args: list[str], default: T, prog: str | None) -> tuple[T | None, list[str]]:
    """The config and every fault of the flags; with faults it holds the flags without any, or is None."""
    if "-h" in args or "--help" in args:
        _tyro(cls, ["--help"], default, prog)
    with contextlib.suppress(_FlagFault):
        return _captured(cls, args, default, prog), []
    faults, good = [], []
    optional = _placeholders(cls, default)
    for chunk in _chunks(args):
        try:
            _captured(cls, chunk, optional, prog)
            good += chunk
        except _FlagFault as fault:
            faults.append(str(fault))
    missing = [name for name in sorted(_required(cls)) if not _is_set(default, name, args)]
    faults += [f"--{name} is required" for name in missing]
    rest = None
    with contextlib.suppress(_FlagFault):
        rest = None if missing else _captured(cls, good, optional, prog)
    return rest, faults or ["the flags cannot be read; see --help"]


class _FlagFault(Exception):
    """One fault of the command line, as one line of text."""


def _tyro(cls: type[T], args: list[str], default: T, prog: str | None) -> T:
    import tyro

    description = (
        cls.__doc__ or ""
    ).strip() + "\n\n--config FILE reads a YAML preset first; flags override it."
    return tyro.cli(cls, args=args, default=default, prog=prog, description=description)


def _captured(cls: type[T], args: list[str], default: T, prog: str | None) -> T:
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return _tyro(cls, args, default, prog)
    except SystemExit:
        raise _FlagFault(_message(output.getvalue()) + _suggestion(cls, args)) from None


def _message(printed: str) -> str:
    """The sentence between the first two rules of what the parser printed."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│ ") for line in printed.splitlines()]
    rules = [number for number, line in enumerate(lines) if line and not line.strip("-─")]
    body = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    return " ".join(filter(None, body)) or "the flags cannot be read; see --help"


def _suggestion(cls: type, args: list[str]) -> str:
    name = args[0].lstrip("-").partition("=")[0].replace("-", "_") if args else ""
    fields = {field.name for field in dataclasses.fields(cls)}
    known = name in fields or name.removeprefix("no_") in fields
    return "" if known or not args[0].startswith("--") else _did_you_mean(name, fields)


def _chunks(args: list[str]) -> list[list[str]]:
    """Arguments cut before every `--flag`, so that each flag can be tried by itself."""
    chunks: list[list[str]] = []
    for arg in args:
        if arg.startswith("--") or not chunks:
            chunks.append([])
        chunks[-1].append(arg)
    return chunks


def _placeholders(cls: type[T], default: T) -> T:
    """`default` with required fields filled by an empty value of their type, to try flags one by one."""
    hints = typing.get_type_hints(cls)
    empty = {name: hints[name]() for name in _required(cls) if hints[name] in (str, int, float, bool, Path)}
    return dataclasses.replace(default, **empty)  # type: ignore[type-var]


def _is_set(default: Any, name: str, args: list[str]) -> bool:
    import tyro

    given = {arg.lstrip("-").partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}
    return name in given or getattr(default, name) is not tyro.MISSING
