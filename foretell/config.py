"""Settings: dataclasses <-> YAML <-> flags. Unknown names are refused, and all problems come in one error.

A dataclass is the settings' only description: its fields are the flags (--snake_case or --kebab-case, --no-flag for
bools) and the YAML keys; metadata={"help": ...} is a flag's help, metadata={"positional": True} lets a bare word fill
the field; a method problems(self) -> list[str] says what is wrong with the values. Several dataclasses can share one
command line and one file, a subclass of transformers' TrainingArguments among them.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import inspect
import itertools
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")
BOOLS = {"true": True, "false": False}
LISTS = (list, tuple, Sequence)
SECRETS = {"hub_token", "push_to_hub_token", "api_key"}  # fields that must not land in a file
OURS = {"config": str | None, "print_config": bool}  # flags of every command


class ConfigError(ValueError):
    """Everything that is wrong with the settings, one line each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclasses.dataclass
class Entry:
    """A value that somebody gave to a field. text: by a flag, where numbers and lists are written as words."""

    label: str  # what an error calls it: --depth, or run.yaml: depth
    name: str
    value: Any
    text: bool = False


# What callers use


def parse_settings(
    classes: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    prog: str = "foretell",
    preset: Callable[[str], dict[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """One instance of each class: flags win over the file of --config, the file over a preset, that over defaults.

    --help and --print-config print and exit. preset turns the value of a field named preset into values of other
    fields.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print(help_text(classes, prog))
        raise SystemExit(0)
    problems: list[str] = []
    flags = _read_flags(classes, argv, problems)
    entries = []
    for path in [flag.value for flag in flags if flag.name == "config"]:
        entries += _read_file(path, problems)
    entries += [flag for flag in flags if flag.name not in OURS]
    chosen = [entry for entry in entries if entry.name == "preset" and entry.value not in (None, "null")]
    if preset is not None and chosen:
        try:
            values = preset(str(chosen[-1].value))
            entries = [
                Entry(f"preset {chosen[-1].value}: {name}", name, value) for name, value in values.items()
            ] + entries
        except ConfigError as error:
            problems += error.problems
    instances, values = _build(classes, entries, problems)
    if problems:
        raise ConfigError(problems)
    if any(flag.name == "print_config" for flag in flags):
        print(_dump(values), end="")
        raise SystemExit(0)
    return tuple(instances)


def parse(cls: type[T], argv: Sequence[str] | None = None, *, prog: str = "foretell") -> T:
    """parse_settings for one class."""
    return parse_settings([cls], argv, prog=prog)[0]


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """An instance from plain values, strictly."""
    problems: list[str] = []
    instances, _ = _build([cls], [Entry(str(name), str(name), value) for name, value in values.items()], problems)
    if problems:
        raise ConfigError(problems)
    return instances[0]


def to_dict(settings: Any) -> dict[str, Any]:
    """A dataclass as plain values, such as YAML and JSON can hold; from_dict reads them back."""
    names = [f.name for f in dataclasses.fields(settings) if f.init and f.name not in SECRETS]
    return {name: _plain(getattr(settings, name)) for name in names}


def to_yaml(*settings: Any) -> str:
    """One or several dataclasses as one YAML text; --config reads it back."""
    return _dump({name: value for one in settings for name, value in to_dict(one).items()})


def check(settings: Any) -> None:
    """For a __post_init__: raise all that the instance's problems() names."""
    if problems := settings.problems():
        raise ConfigError(problems)


def nearest(name: str, names: Collection[str]) -> str:
    """The valid name that is most like this one, as the end of an error; nothing where none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {close[0]}?" if close else ""


def help_text(classes: Sequence[type], prog: str) -> str:
    """Every flag with its type, help and default; what TrainingArguments brings along is only named."""
    lines = [f"usage: {prog} [--config FILE.yaml] [--print-config] [flags]", ""]
    lines += ["Flags win over the file, the file over defaults; null stands for no value.", ""]
    for cls in classes:
        own = {n for base in cls.__mro__ if not _foreign(base) for n in inspect.get_annotations(base)}
        lines.append((cls.__doc__ or cls.__name__).strip().splitlines()[0])
        for field, hint in _fields(cls):
            default = _default(field)
            ending = "required" if default is dataclasses.MISSING else f"default {_shown(default)}"
            text = f"--{_kebab(field.name)}  {field.metadata.get('help', '')} ({describe(hint)}; {ending})"
            if field.name in own:
                lines += textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent=" " * 6)
        if others := ", ".join(field.name for field, _ in _fields(cls) if field.name not in own):
            text = f"and all of transformers' TrainingArguments: {others}"
            lines += textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    """A default as a flag or YAML would write it."""
    words = {"None": "null", "True": "true", "False": "false"}
    return words.get(str(_plain(default)), str(_plain(default)))


# Values and types


def describe(hint: Any) -> str:
    """A type in the words of errors and help."""
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(describe(a) for a in sorted(args, key=lambda a: a is types.NoneType))
    if kind is Literal or (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        return "one of " + ", ".join(str(_plain(choice)) for choice in _choices(kind, args))
    if kind in LISTS:
        return f"a list (each {describe(args[0])})" if args else "a list"
    if dataclasses.is_dataclass(kind):
        return f"a mapping ({', '.join(field.name for field in dataclasses.fields(kind))})"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    words |= {types.NoneType: "null", Any: "anything", dict: "a mapping"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def coerce(value: Any, hint: Any, text: bool = False) -> Any:
    """The value as the type wants it, else a TypeError that says got and wanted. For text see Entry."""
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    got = repr(value) if text else f"{value!r} ({type(value).__name__})"
    wrong = TypeError(f"got {got}, wanted {describe(hint)}")
    if kind in (Union, types.UnionType):
        # every word is text and a list of one word as well: try those two last
        for option in sorted(args, key=lambda a: (a is str) + 2 * _takes(a, *LISTS)):
            try:
                return coerce(value, option, text)
            except TypeError:
                continue
        if text and value == "none" and types.NoneType in args:
            return None
        raise wrong
    if text and isinstance(value, str):
        value = _read_word(value, kind, args)
    if kind is Literal or (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        choices = _choices(kind, args)
        for choice in choices:
            if value is choice or (type(value) is type(_plain(choice)) and value == _plain(choice)):
                return choice
        raise TypeError(f"{wrong}{nearest(str(value), [str(_plain(choice)) for choice in choices])}")
    if kind in LISTS and isinstance(value, (list, tuple)):
        each = list(args) if kind is tuple and Ellipsis not in args else [args[0] if args else Any] * len(value)
        if len(each) != len(value):
            raise wrong
        made = [coerce(v, h, text) for v, h in zip(value, each, strict=True)]
        return tuple(made) if kind is tuple else made
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value)
    if isinstance(value, dict) and kind is dict and args:
        return {coerce(k, args[0]): coerce(v, args[1]) for k, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    # a bool is an int to Python, but nobody who writes `depth: true` means 1
    if kind is Any or (isinstance(kind, type) and isinstance(value, kind) and (kind, type(value)) != (int, bool)):
        return value
    raise wrong


def _read_word(word: str, kind: Any, args: tuple) -> Any:
    """The plain value that a flag's word stands for where this type is wanted; the word itself where it fits none."""
    if kind is bool:
        return BOOLS.get(word.lower(), word)
    if kind is types.NoneType:
        return None if word == "null" else word
    if kind is Literal:
        return next((choice for choice in args if str(choice) == word), word)
    try:
        if kind in (int, float):
            return kind(word)
        if kind in (dict, Any) or dataclasses.is_dataclass(kind) or (kind in LISTS and word.startswith("[")):
            return yaml.load(word, _Loader)
    except (ValueError, yaml.YAMLError):
        return word
    return [word] if kind in LISTS else word


def _choices(kind: Any, args: tuple) -> list[Any]:
    return list(args if kind is Literal else kind)


def _takes(hint: Any, *kinds: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return any((typing.get_origin(option) or option) in kinds for option in options)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _plain(value.to_dict()) if hasattr(value, "to_dict") else str(value)


# Dataclasses


def _foreign(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "transformers"


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _fields(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init]


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _build(classes: Sequence[type], entries: Sequence[Entry], problems: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """The instances that can be made, and every field's value; adds to problems. Later entries win."""
    fields = {field.name: (field, hint) for cls in classes for field, hint in _fields(cls)}
    given: dict[str, Any] = {}
    bad = set()
    for entry in entries:
        if entry.name not in fields:
            problems.append(f"{entry.label}: unknown name{nearest(entry.name, fields)}")
            continue
        try:
            given[entry.name] = coerce(entry.value, fields[entry.name][1], entry.text)
        except ConfigError as error:  # a dataclass inside this one
            problems += [f"{entry.label}.{line}" for line in error.problems]
            bad.add(entry.name)
        except TypeError as error:
            problems.append(f"{entry.label}: {error}")
            bad.add(entry.name)
    instances = {}
    # TrainingArguments start devices and logging when they are made, so they come last
    for cls in sorted(classes, key=lambda cls: any(map(_foreign, cls.__mro__))):
        own = [field for field, _ in _fields(cls)]
        missing = [f.name for f in own if _default(f) is dataclasses.MISSING and f.name not in given]
        problems += [f"{name}: got nothing, wanted {describe(fields[name][1])}" for name in missing if name not in bad]
        if missing:
            continue
        try:
            instances[cls] = cls(**{f.name: given[f.name] for f in own if f.name in given})
            said = instances[cls].problems() if hasattr(cls, "problems") else []
        except ConfigError as error:
            said = error.problems
        except (ValueError, TypeError) as error:
            said = [str(error)]
        # where a value was refused its default stands in, of which nobody wants to hear
        problems += [line for line in said if not any(re.search(rf"\b{name}\b", line) for name in bad)]
    values = {name: given.get(name, _default(field)) for name, (field, _) in fields.items() if name not in SECRETS}
    return [instances[cls] for cls in classes if cls in instances], values


# Flags


def _read_flags(classes: Sequence[type], argv: Sequence[str], problems: list[str]) -> list[Entry]:
    hints = {field.name: hint for cls in classes for field, hint in _fields(cls)} | OURS
    bare = [field.name for cls in classes for field, _ in _fields(cls) if field.metadata.get("positional")]
    entries, words = [], list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if bare:
                several = itertools.takewhile(lambda word: not word.startswith("--"), words)
                given = [word, *several] if _takes(hints[bare[0]], *LISTS) else [word]
                del words[: len(given) - 1]
                entries.append(Entry(bare[0], bare.pop(0), given if len(given) > 1 else word, True))
            else:
                problems.append(f"{word}: no flag stands before it, wanted --name {word}")
            continue
        flag, equals, inside = word.partition("=")
        name = flag[2:].replace("-", "_")
        if name not in hints and name.startswith("no_") and _takes(hints.get(name[3:]), bool) and not equals:
            entries.append(Entry(flag, name[3:], "false", True))
            continue
        hint = hints.get(name)
        values = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
        if _takes(hint, bool) and not _takes(hint, str):  # --flag alone is true: only a bool's word can belong to it
            values = [value for value in values[:1] if value.lower() in BOOLS]
        elif hint is not None and not _takes(hint, *LISTS):
            values = values[:1]
        if equals:
            values = [inside]
        else:
            del words[: len(values)]
        if hint is None:
            close = nearest(flag, [f"--{_kebab(known)}" for known in hints])
            problems.append(f"{flag}: unknown flag{close}")
        elif values:
            entries.append(Entry(flag, name, values[0] if len(values) == 1 else values, True))
        elif _takes(hint, bool):
            entries.append(Entry(flag, name, "true", True))
        else:
            problems.append(f"{flag}: got no value, wanted {describe(hint)} (one that begins with --: {flag}=...)")
    return entries


# YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, which people expect: `no` is text and 5e-5 a number. A repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value]
        for at, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:at]]:
                raise yaml.constructor.ConstructorError(None, None, f"repeated key {key.value}", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in ("bool", "float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def _read_file(path: str | Path, problems: list[str]) -> list[Entry]:
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
        return []
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problems.append(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}")
        return []
    if not isinstance(values or {}, dict):
        problems.append(f"{path}: got {type(values).__name__}, wanted a mapping: lines of `name: value`")
        return []
    return [Entry(f"{path}: {name}", str(name), value) for name, value in (values or {}).items()]


def _dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True, width=110)
