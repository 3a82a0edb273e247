"""Run-time checks of jaxtyping annotations: an import hook that wraps a package's annotated functions.

Call `install("jaxft")` before the package is imported. jaxtyping.install_import_hook wraps every function
(local ones at each call) and checks every annotation. This hook wraps only functions with annotated arrays,
and checks only the arrays, so that a test may pass a stand-in for anything else.
"""

import importlib.machinery
import inspect
import sys
import types
import typing

import jax
import jaxtyping
import numpy as np
from beartype import beartype


def has_array(annotation):
    """Whether an annotation names the shape of an array, at any depth."""
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(has_array, typing.get_args(annotation)))


def or_numpy(annotation):
    """The annotation of an array with NumPy's allowed too, as jax.numpy does; of anything else, Any."""
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        kind = annotation.array_type
        return annotation.dtype[kind | np.ndarray, annotation.dim_str] if kind is jax.Array else annotation
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(type(None) if part is type(None) else or_numpy(part) for part in parts)]  # noqa: UP007
    if origin in (tuple, list, dict) and has_array(annotation):
        return origin[tuple(part if part is ... else or_numpy(part) for part in parts)]
    return typing.Any


def arrays_only(fn):
    """beartype for the arrays among a function's parameters and results."""
    fn.__annotations__ = {name: or_numpy(kind) for name, kind in fn.__annotations__.items()}
    return beartype(fn)


def checked(fn):
    """The function with its arrays checked at each call, or as it is if it takes and returns none."""
    try:
        hints = typing.get_type_hints(fn, include_extras=True)
    except Exception:  # an annotation that only a type checker resolves
        return fn
    if not any(map(has_array, hints.values())) or inspect.isgeneratorfunction(fn):
        return fn
    return jaxtyping.jaxtyped(fn, typechecker=arrays_only)


def check_members(owner, module):
    """Wrap the functions that a module or a class of it defines."""
    for name, member in list(vars(owner).items()):
        if inspect.isfunction(member) and member.__module__ == module and name != "__init__":
            setattr(owner, name, checked(member))
        elif inspect.isclass(member) and member.__module__ == module and owner is not member:
            check_members(member, module)


class CheckingLoader(importlib.machinery.SourceFileLoader):
    """Runs a module, then wraps its functions, before another module can import them."""

    def exec_module(self, module):
        super().exec_module(module)
        check_members(module, module.__name__)


class CheckingFinder:
    """Finds the modules of one package."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name != self.package and not name.startswith(f"{self.package}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = CheckingLoader(spec.loader.name, spec.loader.path)
        return spec


def install(package):
    """Check the arrays of a package that isn't imported yet."""
    assert package not in sys.modules, f"{package} is imported already"
    sys.meta_path.insert(0, CheckingFinder(package))
