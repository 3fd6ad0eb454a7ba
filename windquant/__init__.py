"""WINDQuant: mixed-precision post-training quantization with one width per column chunk.

Importing this package registers the packed checkpoint format with transformers: at once if transformers' quantizers
are loaded already, else at the moment they are. Nothing heavy is imported before.
"""

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

__version__ = "0.1.0"

_AUTO = "transformers.quantizers.auto"  # holds the registry of formats


def _register() -> None:
    module = importlib.import_module("windquant.checkpoint.huggingface")
    if hasattr(module, "register"):  # else its import is under way, and registers at its end
        module.register()


class _RegisterOnImport:
    """Finder that finds nothing of its own: it adds the registration to the end of the import of `_AUTO`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _AUTO:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec


if _AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
