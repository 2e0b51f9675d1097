"""Writes the code of the model into a checkpoint folder, for `trust_remote_code=True`.

A process without this package opens such a folder by the Auto classes of transformers. The code is
written when a model or processor is saved: the modules that its classes need are copied to
`custom_code/`, side by side, with relative imports in place of absolute ones, as transformers
requires. All entries of `auto_map` name one module, `custom_code/entry.py`, because transformers
runs a module that it looks up by name a second time.

A model or processor that was opened by such code writes the code again when it is saved. Our own
classes open such a folder like any other, and do not use the code in it. In one process, the code
that was opened first serves all further folders of its kind, whatever code they hold: the Auto
classes prefer classes that are registered.
"""

import ast
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_MAPPING,
    PROCESSOR_MAPPING,
    FeatureExtractionMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from ltu.files import read_json_object, replace_file
from ltu.models.version_check import REQUIREMENTS, tested_ranges

CODE_FOLDER = "custom_code"
ENTRY = "entry"
# The files that get an `auto_map`.
CONFIG_FILES = ("config.json", "processor_config.json")
# The packages whose modules are copied.
OWN_PACKAGES = ("ltu", "ltu_as")
# The classes that a folder needs; all other code is copied only if these import it.
KINDS = (PreTrainedConfig, PreTrainedModel, FeatureExtractionMixin, ProcessorMixin)
# Names for pip, where they differ from the names of imports.
PIP_NAMES = {"whisper": "openai-whisper"}
# Whether this module is itself such a copy.
IS_COPY = __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


class CustomCodeMixin:
    """Adds the argument `custom_code` to `save_pretrained` and `push_to_hub`.

    If it is True, the code of the classes is written too. It is True by default for classes that
    were opened by such code.
    """

    writes_custom_code = IS_COPY

    @contextmanager
    def _choose_custom_code(self, custom_code: bool | None) -> Iterator[None]:
        before = self.writes_custom_code
        if custom_code is not None:
            self.writes_custom_code = custom_code
        try:
            yield
        finally:
            self.writes_custom_code = before

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, custom_code: bool | None = None, **kwargs: Any
    ) -> Any:
        """Run the stock method, and write the code.

        Raises:
            ValueError: the class is not one of this package.
        """
        with self._choose_custom_code(custom_code):
            saved = super().save_pretrained(save_directory, *args, **kwargs)
            if self.writes_custom_code:
                add_custom_code(Path(save_directory), type(self))
            return saved

    def push_to_hub(self, *args: Any, custom_code: bool | None = None, **kwargs: Any) -> Any:
        """Run the stock method, and upload the code."""
        with self._choose_custom_code(custom_code):
            return super().push_to_hub(*args, **kwargs)

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        if self.writes_custom_code:  # `save_pretrained(push_to_hub=True)` uploads before it ends.
            add_custom_code(Path(working_dir), type(self))
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def add_custom_code(folder: Path, cls: type) -> None:
    """Write the code of a class, and of all that belongs to it, into a checkpoint folder.

    Args:
        folder: of the checkpoint; its `config.json` and `processor_config.json` name the code.
        cls: the class of a model or processor.

    Raises:
        ValueError: the class is not one of this package.
    """
    if IS_COPY:
        here = Path(__file__).parent
        files = {file.name: file.read_text("utf-8") for file in here.glob("*.py")}
        files.pop("__init__.py", None)  # transformers may have put one there.
        auto_map = import_module(f"{__package__}.{ENTRY}").AUTO_MAP
    else:
        classes = find_classes(cls)
        auto_map = make_auto_map(classes)
        modules = find_modules({cls.__module__ for cls in classes})
        files = {f"{flat_name(name)}.py": copy_module(name) for name in modules}
        files[f"{ENTRY}.py"] = write_entry(classes, modules, auto_map)
    for name, text in files.items():
        replace_file(folder / CODE_FOLDER / name, text.encode())
    for name in CONFIG_FILES:
        path = folder / name
        if path.is_file():
            content = read_json_object(path) | {"auto_map": auto_map}
            replace_file(path, f"{json.dumps(content, indent=2, sort_keys=True)}\n".encode())


def find_classes(cls: type) -> list[type]:
    """Return the configs, models, feature extractors and processors of the package of a class.

    Raises:
        ValueError: the package is not one of ours.
    """
    package = cls.__module__.partition(".")[0]
    if package not in OWN_PACKAGES:
        raise ValueError(
            f"custom_code=True copies the code of {' and '.join(OWN_PACKAGES)}, but "
            f"{cls.__qualname__} is in {cls.__module__}. Save without it, and upload your code."
        )
    exported = [getattr(import_module(package), name) for name in import_module(package).__all__]
    classes = [value for value in exported if isinstance(value, type)]
    return [exported_class for exported_class in classes if issubclass(exported_class, KINDS)]


def make_auto_map(classes: list[type]) -> dict[str, str]:
    """Return the class in the entry module for each Auto class."""
    config = next(cls for cls in classes if cls in PROCESSOR_MAPPING)
    found = {
        "AutoConfig": config,
        "AutoModel": MODEL_MAPPING[config],
        "AutoModelForCausalLM": MODEL_MAPPING[config],
        "AutoModelForMultimodalLM": MODEL_MAPPING[config],
        "AutoProcessor": PROCESSOR_MAPPING[config],
    }
    return {name: f"{CODE_FOLDER}/{ENTRY}.{cls.__name__}" for name, cls in found.items()}


def flat_name(module: str) -> str:
    """`ltu.models.modeling_ltu` -> `ltu_models_modeling_ltu`."""
    return module.replace(".", "_")


def is_own(module: str) -> bool:
    return module.partition(".")[0] in OWN_PACKAGES


def find_imports(tree: ast.Module) -> list[tuple[ast.Import | ast.ImportFrom, str]]:
    """Return the import statements of a module, each with the module that it imports."""
    imports = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imports.append((node, node.module))
        elif isinstance(node, ast.Import):
            imports += [(node, alias.name) for alias in node.names]
    return imports


def read_module(module: str) -> str:
    return Path(import_module(module).__file__).read_text(encoding="utf-8")


def find_modules(modules: set[str]) -> list[str]:
    """Return the names of our modules that modules import, directly or not, and of these."""
    found: set[str] = set()
    new = set(modules)
    while new:
        found |= new
        imported = set()
        for module in new:
            names = {name for _, name in find_imports(ast.parse(read_module(module)))}
            imported |= {name for name in names if is_own(name)}
        new = imported - found
    return sorted(found)


def copy_module(module: str) -> str:
    """Return the text of one of our modules, as it is written into a checkpoint folder.

    Imports of our modules become relative. The text is changed line by line, so its comments stay.
    """
    text = read_module(module)
    tree = ast.parse(text)
    lines = text.splitlines()
    for node, name in find_imports(tree):
        line = lines[node.lineno - 1]
        if is_own(name) and isinstance(node, ast.ImportFrom):
            lines[node.lineno - 1] = line.replace(f"from {name} ", f"from .{flat_name(name)} ", 1)
        elif is_own(name):
            # transformers does not find the file of `from . import NAME`.
            relative = f"from .{flat_name(name)} import __doc__ as _"
            lines[node.lineno - 1] = line.replace(f"import {name}", relative, 1)
        elif name.partition(".")[0] in PIP_NAMES:
            lines[node.lineno - 1] = import_or_explain(line, name.partition(".")[0])
    return f"{write_header(module)}{chr(10).join(lines)}\n"


def import_or_explain(statement: str, package: str) -> str:
    """Return an import with the right name for pip, which transformers would guess wrong."""
    hint = f"No module named '{package}'. Install it with: pip install {PIP_NAMES[package]}"
    return (
        f"try:\n    {statement}\nexcept ModuleNotFoundError as error:\n"
        f"    raise ImportError({hint!r}) from error"
    )


def write_header(module: str) -> str:
    try:
        release = version("ltu")
    except PackageNotFoundError:  # Run from its source tree.
        release = "(not installed)"
    return (
        f"# Copied from the module {module} of ltu {release}.\n"
        "# Licensed under the Apache License, Version 2.0: "
        "https://www.apache.org/licenses/LICENSE-2.0\n"
    )


def write_entry(classes: list[type], modules: list[str], auto_map: dict[str, str]) -> str:
    """Return the text of the module that `auto_map` names.

    It imports all packages that the other modules need, because transformers checks the imports of
    this module alone, and names those that are missing in one error.
    """
    packages = set()
    for module in modules:
        names = {name.partition(".")[0] for _, name in find_imports(ast.parse(read_module(module)))}
        packages |= names - sys.stdlib_module_names - set(OWN_PACKAGES)
    requirements = [f"{name}{versions}" for name, versions in tested_ranges().items()]
    lines = [
        f'"""Imports the classes of {CODE_FOLDER} for the Auto classes of transformers."""',
        "",
    ]
    lines += [f"import {name}" for name in sorted(packages - PIP_NAMES.keys())]
    lines += [
        import_or_explain(f"import {name}", name) for name in sorted(packages & PIP_NAMES.keys())
    ]
    lines.append("")
    lines += [f"from .{flat_name(cls.__module__)} import {cls.__name__}" for cls in classes]
    lines.append(f"from .{flat_name(finish_entry.__module__)} import finish_entry")
    lines.append("")
    lines.append(f"AUTO_MAP = {json.dumps(auto_map, indent=4)}")
    names = ", ".join(cls.__name__ for cls in classes)
    lines.append(f"finish_entry([{names}], {json.dumps(requirements)})")
    return f"{write_header(__name__)}{chr(10).join(lines)}\n"


def finish_entry(classes: list[type], requirements: list[str]) -> None:
    """Tell copied code the tested versions, and keep transformers from copying it to the root.

    Args:
        classes: those of the entry module.
        requirements: of the package, such as "torch>=2.11,<2.15".
    """
    REQUIREMENTS[:] = requirements
    for cls in classes:
        # The Auto classes mark a class that they opened from a folder, and its stock
        # `save_pretrained` copies one module of it then.
        cls.register_for_auto_class = classmethod(lambda cls, auto_class=None: None)
