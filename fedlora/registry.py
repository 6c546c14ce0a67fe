"""Names for interchangeable parts."""

import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from fedlora.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to a factory. An unknown name is answered with the nearest known one."""

    every: ClassVar[list["Registry[Any]"]] = []
    # by kind and prefix: from a name such as ``flwr.FedYogi`` to its factory, for names that nobody has to list
    families: ClassVar[dict[tuple[str, str], Callable[[str], Callable[..., Any]]]] = {}

    def __init__(self, kind: str):
        self.kind = kind
        self._factories: dict[str, Callable[..., T]] = {}
        self._origins: dict[str, str] = {}
        Registry.every.append(self)

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorator that adds a factory under ``name``. A class without a ``name`` of its own gets this one.

        Raises:
            ConfigError: if the name is taken.
        """
        if not isinstance(name, str):
            raise ConfigError(f'a {self.kind} is registered under a name: write .register("my_name") above the class')
        # the module that says so: the factory itself may come from elsewhere
        origin = str(sys._getframe(1).f_globals.get("__name__"))

        def add(factory: Callable[..., T]) -> Callable[..., T]:
            if name in self._factories:
                module = self._origins[name]
                where = getattr(sys.modules.get(module), "__file__", None) or module
                raise ConfigError(f"a {self.kind} named {name} already exists, in {where}; choose another name")
            if isinstance(factory, type) and "name" not in vars(factory):
                factory.name = name  # type: ignore[attr-defined]
            self._factories[name] = factory
            self._origins[name] = origin
            return factory

        return add

    def create(self, name: str, /, **options: object) -> T:
        """Return a new object.

        Raises:
            ConfigError: for an unknown name, or options the factory does not take.
        """
        if name not in self:
            known = ", ".join(sorted(self._factories))
            raise ConfigError(f"{self.kind}: {name} is not known{nearest(name, self._factories)} (known: {known})")
        what, factory = f"{self.kind}: {name}", self[name]
        try:
            made = factory(**options)
        except TypeError as error:
            _check_types(what, factory, options)
            if missing := sorted(getattr(factory, "__abstractmethods__", ())):
                raise ConfigError(f"{self.kind}: {name} lacks the method {', '.join(missing)}") from error
            raise ConfigError(f"{what} does not take these options: {error}") from error
        _check_types(what, factory, options)  # a factory's own words about them come first
        return made

    def origin(self, name: str) -> str:
        """The module that registered ``name``; of a family, what stands before the dot."""
        return self._origins.get(name, name.partition(".")[0])

    def of(self, module: str) -> list[str]:
        """Names that a module registered."""
        return sorted(name for name, origin in self._origins.items() if origin == module)

    def forget(self, module: str) -> None:
        """Take out what a module registered, so that another version of it can."""
        for name in self.of(module):
            del self._factories[name], self._origins[name]

    def __contains__(self, name: object) -> bool:
        return name in self._factories or self._family(name) is not None

    def __getitem__(self, name: str) -> Callable[..., T]:
        family = self._family(name)
        return family(name) if family and name not in self._factories else self._factories[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._factories))

    def _family(self, name: object) -> Callable[[str], Callable[..., T]] | None:
        kinds = ((prefix, of) for (kind, prefix), of in Registry.families.items() if kind == self.kind)
        return next((of for prefix, of in kinds if str(name).startswith(prefix)), None)


def _check_types(what: str, factory: Callable[..., object], options: Mapping[str, object]) -> None:
    """Raise ``ConfigError`` for an option that is plainly not what the factory says it takes."""
    try:
        parameters = inspect.signature(factory, eval_str=True).parameters
    except (NameError, SyntaxError, TypeError, ValueError):  # a plug-in may annotate as it likes, and checks for itself
        return
    for option, value in options.items():
        expected = _one_of(parameters[option].annotation, value) if option in parameters else None
        is_bool = isinstance(value, bool)
        if expected is bool and not is_bool:
            raise ConfigError(f"{what}.{option} must be true or false, not {value!r}")
        if expected is int and (is_bool or not isinstance(value, int)):
            raise ConfigError(f"{what}.{option} must be a whole number, not {value!r}")
        if expected is float and (is_bool or not isinstance(value, int | float) or not math.isfinite(value)):
            raise ConfigError(f"{what}.{option} must be a number, not {value!r}")


def _one_of(annotation: Any, value: object) -> Any:
    """The type that a value has to have where a factory says ``float | None``; None for a value of None."""
    if typing.get_origin(annotation) is not types.UnionType:
        return annotation
    kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
    return kinds[0] if len(kinds) == 1 and value is not None else None
