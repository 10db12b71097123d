"""Lets torchvision's registry wheel be imported beside a CPU build of torch.

The wheel on the registry is linked against CUDA torch. Beside a CPU torch its extension cannot be loaded, and
`import torchvision` dies on `operator torchvision::nms does not exist`, because it describes that operator's
shapes on import without asking whether the extension is there; open_clip, timm and transformers die with it.
We only use torchvision's transforms, which need no operator of the extension: declaring the two schemas is
enough.

Call `prepare_torchvision()` before the first import of open_clip, timm or transformers in a process, or
`prepare_when_imported()`, which imports nothing itself. Where the extension loads (a CUDA build, or a
torchvision built for this torch) it declares nothing.
"""

from __future__ import annotations

import sys
import threading
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_lock = threading.Lock()
_library: Any = None  # the declarations live as long as this object


def prepare_torchvision() -> bool:
    """Make `import torchvision` work beside the torch that is installed.

    Returns:
        True if its operators are there, False if only their schemas could be declared, or torchvision is not
        installed. Calling a declared operator raises NotImplementedError: nothing is computed wrongly.
    """
    global _library
    with _lock:
        for finder in [finder for finder in sys.meta_path if isinstance(finder, _BeforeTorchvision)]:
            sys.meta_path.remove(
                finder
            )  # it would be asked for torchvision below, and call this function again
        spec = find_spec("torchvision")
        if spec is None or not spec.submodule_search_locations:
            return False
        if _library is not None:
            return False
        import torch

        if hasattr(torch.ops.torchvision, "nms"):  # loaded or declared before us
            return True
        extensions = sorted(Path(spec.submodule_search_locations[0]).glob("_C*.so"))
        try:
            for extension in extensions:
                torch.ops.load_library(extension)  # type: ignore[no-untyped-call]
            if extensions:
                return True
        except OSError:
            pass
        _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for schema in _SCHEMAS:
            _library.define(schema)
        return False


def prepare_when_imported() -> None:
    """Call `prepare_torchvision` at the moment when torchvision is first imported, by whomever."""
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


class _BeforeTorchvision(MetaPathFinder):
    """An import hook that is asked first and finds nothing."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torchvision":
            prepare_torchvision()
