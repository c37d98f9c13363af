"""Code of the user's own: a Python file, or a module that can be imported, by its name."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_module(name: str) -> ModuleType:
    """The module of a Python file (its path ends in .py), or of a dotted name, executed once.

    Raises ValueError, which names it, where there is none or it fails when it is executed.
    """
    is_file = name.endswith(".py")
    key = str(Path(name).resolve()) if is_file else name
    if key in sys.modules:
        return sys.modules[key]
    try:
        if not is_file:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(key, key)
        assert spec is not None and spec.loader is not None  # as its name ends in .py
        sys.modules[key] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # it is anybody's code
        sys.modules.pop(key, None)
        raise ValueError(
            f"{name} cannot be imported ({type(error).__name__}: {error}), needed is a Python file "
            "(its path ends in .py) or a module that can"
        ) from error
