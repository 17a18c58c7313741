"""The command line of `instructsam.py`: sub-commands, and the published ways of writing flags."""

import dataclasses
import importlib
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.config import parse_config

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True)
class Command:
    """A sub-command: what it does, its dataclass and its function as `module:name`.

    The function takes the configuration and returns (text to print, exit code).
    """

    help: str
    config: str
    run: str


COMMANDS = {
    "count": Command(
        "count objects with a language model (server or local Qwen2.5-VL)",
        "utils.instructsam_config:CountConfig",
        "utils.instructsam_stages:count",
    ),
    "propose": Command(
        "propose masks with SAM 2",
        "utils.instructsam_config:ProposeConfig",
        "utils.instructsam_stages:propose_all",
    ),
    "match": Command(
        "give labels to proposals so that the counts hold",
        "utils.instructsam_config:MatchConfig",
        "utils.instructsam_stages:match_all",
    ),
    "run": Command(
        "all three on a folder of pictures: overlays, COCO JSON, GeoJSON",
        "utils.instructsam_config:RunConfig",
        "utils.instructsam_run:run",
    ),
    "evaluate": Command(
        "score counts, proposals or predictions against a COCO file",
        "utils.instructsam_eval_config:EvaluateConfig",
        "utils.instructsam_eval:evaluate",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command and print its result; returns the exit code. Faults of the user raise ValueError."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return 0
    if args[0] not in COMMANDS:
        raise ValueError(f"there is no command {args[0]!r}; choose one of {', '.join(COMMANDS)}")
    command = COMMANDS[args[0]]
    cls = _find(command.config)
    config = parse_config(cls, usual_flags(cls, args[1:]), prog=f"instructsam.py {args[0]}")
    text, code = _find(command.run)(config)
    print(text)
    return code


def overview() -> str:
    """Help text of the whole program."""
    lines = ["usage: instructsam.py COMMAND [flags]; instructsam.py COMMAND --help lists the flags", ""]
    return "\n".join(lines + [f"  {name:9} {command.help}" for name, command in COMMANDS.items()])


def usual_flags(cls: type, args: Sequence[str]) -> list[str]:
    """`args` with the published habits written out: flags cut short (`--mask_proposal`) become the one
    flag they begin, and `--flag True`, `--flag=false` become `--flag`, `--no-flag`."""
    names = {field.name for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    result: list[str] = []
    position = 0
    while position < len(args):
        arg = args[position]
        position += 1
        if not arg.startswith("--"):
            result.append(arg)
            continue
        given, equals, value = arg[2:].partition("=")
        name = _full_name(given.replace("-", "_"), names)
        if hints.get(name) is bool:
            if not equals and position < len(args) and args[position].lower() in _TRUE + _FALSE:
                value = args[position]
                position += 1
            if value.lower() in _TRUE + _FALSE:
                result.append(f"--{name}" if value.lower() in _TRUE else f"--no-{name}")
                continue
        result.append(f"--{name}{equals}{value}" if name in names else arg)
    return result


def _full_name(given: str, names: set[str]) -> str:
    longer = [name for name in names if name.startswith(given)]
    return longer[0] if given not in names and len(longer) == 1 and len(given) > 3 else given


def _find(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
