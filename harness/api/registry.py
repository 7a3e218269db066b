"""Options and registries: plain YAML values to checked frozen dataclasses, names to classes, and errors that name the remedy.

Part of the contract; import these names from `harness.api`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """Something the user wrote cannot be run. The message names the place, the value and the remedy."""


class NotHere(ConfigError):
    """What was asked for is not on this machine; a worker on another may have it."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """' Did you mean X?' when something close to `word` is known, and the list of what is known."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known: {', '.join(sorted(known)) or 'none'}."


# ---------------------------------------------------------------------------------------------- options -> Config


AXIS_HINT = "; a trial for each of them is written {grid_search: [...]}"


def build_config(cls: type[T], options: Mapping[str, Any], where: str, axis: bool = True) -> T:
    """An instance of the frozen dataclass `cls` from plain YAML values; types are checked exactly.

    Python hides traps (True is an int, 3.0 equals 3), so nothing is converted except int to float and list to tuple. Raises
    ConfigError naming `where` and the key. axis: a list in place of a value may have been meant as one.
    """
    require(isinstance(options, Mapping), f"{where}: expected a mapping of options, got {show(options)}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in options:
        if key not in known:  # no require here: its message would be made, at some cost, for every option that is right
            raise ConfigError(f"{where}: unknown option '{key}'.{did_you_mean(key, known)}")
    missing = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in options
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    require(not missing, f"{where}: option '{missing[0] if missing else ''}' is missing and has no default")
    values = {}
    for key, value in options.items():
        try:
            values[key] = _checked(value, hints[key], f"{where}.{key}")
        except ConfigError as error:
            hint = AXIS_HINT if axis and _meant_as_axis(value, hints[key]) else ""
            raise ConfigError(f"{error}{hint}") from None
    try:
        return cls(**values)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from None


def _meant_as_axis(value: Any, hint: Any) -> bool:
    """Whether a list stands where one of its values would be right."""
    if not isinstance(value, list) or not value:
        return False
    try:
        for item in value:
            _checked(item, hint, "")
    except ConfigError:
        return False
    return True


def show(value: Any) -> str:
    """'<type> <value>' for a message, cut where it gets long."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 160 else text[:150] + ' ...'}"


def brief(value: Any, digits: int = 6) -> str:
    """`value` in a label or a table: a number in that many digits, text as it is, the rest as in JSON."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _checked_union(value, args, where)
    if origin is Literal:
        require(any(value == a and type(value) is type(a) for a in args),
                f"{where}: {show(value)} is not a choice.{did_you_mean(value, [str(a) for a in args])}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where}: expected a list, got {show(value)}")
        return tuple(_checked(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict or hint is dict:
        require(isinstance(value, dict), f"{where}: expected a mapping, got {show(value)}")
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build_config(hint, value, where)
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, f"{where}: expected {hint.__name__}, got {show(value)}")
    if hint is float:
        require(value == value and abs(value) != float("inf"), f"{where}: expected a finite number, got {value}")
    return value


def _checked_union(value: Any, args: tuple, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    failures = []
    for arg in (a for a in args if a is not type(None)):
        try:
            return _checked(value, arg, where)
        except ConfigError as error:
            failures.append(str(error))
    raise ConfigError(failures[0])


# ---------------------------------------------------------------------------------------------- registries


NOT_OPTIONS = ("name", "as", "fingerprint")
"""Keys of an entry of a trial that are the harness's and no options of the class: see `named`."""


def named(entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a plug-in and its options, of an entry of a resolved trial.

    fingerprint: of what the options name outside of this package. as: what to call a metric's numbers.
    """
    return entry["name"], {key: value for key, value in entry.items() if key not in NOT_OPTIONS}


def sources_of(config: Any) -> tuple[Any, ...]:
    """What options name outside of a package, as far as that can be told: the option `weights`, and paths that exist."""
    written = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} if config is not None else {}
    return tuple(value for name, value in written.items() if isinstance(value, str) and value
                 and (name == "weights" or ("/" in value and os.path.exists(os.path.expanduser(value)))))


class Registry(Generic[T]):
    """Names to classes; third-party packages add theirs through the entry-point group `dit_harness.<kind>s`."""

    def __init__(self, kind: str, check: Callable[[type], None] | None = None) -> None:
        """check: what a class must fulfil to be registered; it raises ConfigError."""
        self.kind, self._check = kind, check
        self._classes: dict[str, type[T]] = {}
        self._plugins_loaded = False
        self._broken: dict[str, str] = {}
        """Entry points that could not be loaded: name -> what to say of it."""

    def register(self, name: str):
        """Class decorator: make the class known as `name`. A name that is taken is an error."""

        def decorate(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise ConfigError(f"{self.kind} '{name}' is registered twice: {self._classes[name]} and {cls}")
            cls.name = name  # type: ignore[attr-defined]
            if self._check is not None:
                self._check(cls)
            self._classes[name] = cls
            return cls

        return decorate

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load_plugins()
        return sorted(self._classes)

    def get(self, name: str, where: str = "") -> type[T]:
        """The class registered as `name`; ConfigError with a suggestion when there is none."""
        self._load_plugins()
        prefix = f"{where}: " if where else ""
        if name not in self._classes:
            if name in self._broken:
                raise ConfigError(f"{prefix}{self.kind} '{name}' cannot be used: {self._broken[name]}")
            lost = "".join(f" Not among them: {text}." for text in self._broken.values())
            raise ConfigError(f"{prefix}unknown {self.kind} '{name[:80]}'.{did_you_mean(name[:80], self.names())}{lost}")
        return self._classes[name]

    def has_plugins(self) -> bool:
        """Whether another package brings some of the names."""
        return bool(entry_points(group=f"dit_harness.{self.kind}s"))

    def config(self, name: str, options: Mapping[str, Any], where: str = "") -> Any:
        """The checked `Config` of the class registered as `name`."""
        cls = self.get(name, where)
        return build_config(cls.Config, options, where or f"{self.kind} '{name}'")  # type: ignore[attr-defined]

    def build(self, name: str, options: Mapping[str, Any], where: str = "") -> T:
        """An instance: `cls(Config(**options))`."""
        return self.get(name, where)(self.config(name, options, where))  # type: ignore[call-arg]

    def _load_plugins(self) -> None:
        if not self._plugins_loaded:
            self._plugins_loaded = True
            for entry in entry_points(group=f"dit_harness.{self.kind}s"):
                try:
                    entry.load()
                except (Exception, SystemExit) as error:  # it must not stop sweeps that do not use it
                    owner = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
                    self._broken[entry.name] = (f"plug-in '{entry.name}' ({entry.value}){owner} cannot be loaded "
                                                f"({type(error).__name__}: {error}); mend, update or uninstall it")
