"""The three formats that weights come in, each read into one form: a Hugging Face checkpoint.

=====================  ==================================================================================
a folder               ``config.json`` and ``model.safetensors``, or shards with an index
``.gguf``              dequantized by the ``gguf`` package; hyper-parameters and tokenizer from the metadata
``.onnx``              a torch export of a vision transformer in DINOv2 layout, mapped by node names
``owner/name``         a model of the Hugging Face hub, as a folder in its cache; ``owner/name@revision``
=====================  ==================================================================================

Reading is lazy: opening a checkpoint reads names and shapes, and a tensor is converted when it is asked for, so no second
copy of a model is ever held. What a library raises about a broken file is one line with the file's name.
"""

from __future__ import annotations

from pathlib import Path

from ntk_prefix.checks import expected
from ntk_prefix.models.formats.checkpoint import Checkpoint, StoredTensor
from ntk_prefix.models.formats.folder import read_folder
from ntk_prefix.models.formats.gguf import gguf_chat_template, gguf_tokenizer, read_gguf
from ntk_prefix.models.formats.hub import local_files, pinned
from ntk_prefix.models.formats.onnx import read_onnx

__all__ = [
    "Checkpoint",
    "StoredTensor",
    "gguf_chat_template",
    "gguf_tokenizer",
    "local_files",
    "pinned",
    "read_checkpoint",
]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file, an ONNX file, or a model of the hub by its name.

    Raises:
        FileNotFoundError: nothing there, or a folder that lacks a file.
        MissingPackageError: the package that reads the format is not installed.
        UsageError: not one of the three formats, a broken file, or an architecture that is not built here.
    """
    path = local_files(path)
    if not path.exists():
        raise FileNotFoundError(f"expected a Hugging Face folder, a .gguf or an .onnx file, found nothing at {path}")
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".gguf":
        return read_gguf(path)
    if path.suffix == ".onnx":
        return read_onnx(path)
    hint = "Give the folder that it is in" if path.suffix in (".safetensors", ".json") else ""
    raise expected("path", "a Hugging Face folder, a .gguf or an .onnx file", path, hint)
