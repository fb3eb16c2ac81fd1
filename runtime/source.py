"""Where a workflow comes from, for the process that takes its runs up: ``module:NAME`` or ``/path/file.py:NAME``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ridethrough.runtime.errors import NotFound


def source_of(function: Callable[..., Any], name: str) -> str | None:
    """The source of something that was defined beside ``function`` in its module.

    A script that was run as ``__main__`` and a module outside any package are named by their file: they may not be on
    the path of the process that resumes.
    """
    module = sys.modules.get(function.__module__)
    file = getattr(module, "__file__", None)
    if file is not None and "." not in function.__module__:
        return f"{Path(file).resolve()}:{name}"
    return None if function.__module__ == "__main__" else f"{function.__module__}:{name}"


def load_module(name: str, cwd: str | None = None) -> ModuleType:
    """Import a dotted module or a file.

    Raises:
        NotFound: it does not exist or cannot be imported; the message has the reason and what to do.
    """
    base = Path(cwd) if cwd else Path.cwd()
    path = Path(name) if Path(name).is_absolute() else base / name
    try:
        if name.endswith(".py") or path.is_file():
            return _load_file(path.resolve())
        _prefer(base)
        return importlib.import_module(name)
    except NotFound:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise NotFound(
            f"Module {name} cannot be imported ({type(error).__name__}: {error}; looked from {base}). Mend it, or run "
            f"the command where it can be imported. Stored runs are not touched by this."
        ) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise NotFound(f"There is no file {path}. If it was moved, resume from a process that imports its new place.")
    for module in list(sys.modules.values()):
        if _same_file(module, path):
            return module
    _prefer(path.parent)
    known = sys.modules.get(path.stem)
    name = path.stem if known is None and path.stem.isidentifier() else f"ridethrough_loaded_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _same_file(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return bool(file) and Path(str(file)).resolve() == path


def _prefer(folder: Path) -> None:
    """Let modules beside the loaded one be imported, as they are when it is run as a script."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def load_target(target: str, cwd: str | None = None) -> Any:
    """The object that ``MODULE:NAME`` names.

    Raises:
        NotFound: the form is wrong, the module cannot be imported, or it has no such name.
    """
    module_name, colon, attribute = target.rpartition(":")
    if not colon or not module_name or not attribute:
        raise NotFound(
            f"{target!r} does not name a workflow. Write MODULE:NAME or FILE.py:NAME, for example app.py:report."
        )
    module = load_module(module_name, cwd)
    if not hasattr(module, attribute):
        names = [
            key for key, item in vars(module).items() if hasattr(item, "__workflow__") and not isinstance(item, type)
        ]
        known = ", ".join(names) or "none"
        raise NotFound(f"Module {module_name} has no {attribute!r}. Workflows and agents there: {known}.")
    return getattr(module, attribute)


def find_workflow(source: str, name: str, cwd: str | None = None) -> Any:
    """The definition that a run recorded: by its attribute, else whatever of that name the module defines.

    Raises:
        NotFound: the module cannot be imported, or does not define it any more.
    """
    module_name, _, attribute = source.rpartition(":")
    module = load_module(module_name, cwd)
    candidates = [getattr(module, attribute, None), *vars(module).values()]
    for item in candidates:
        definition = getattr(item, "__workflow__", None)
        if getattr(definition, "name", None) == name:
            return definition
    raise NotFound(
        f"{module_name} does not define the workflow {name!r} any more. Put it back under that name "
        f"(@workflow(name=...)) and resume."
    )
