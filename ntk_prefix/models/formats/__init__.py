"""The three formats that weights come in, each read into one form: a Hugging Face checkpoint.

=====================  ==================================================================================
a folder               ``config.json`` and ``model.safetensors``, or shards with an index
``.gguf``              dequantized by the ``gguf`` package; hyper-parameters and tokenizer from the metadata
``.onnx``              a torch export of a vision transformer in DINOv2 layout, mapped by node names
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
from ntk_prefix.models.formats.onnx import read_onnx

__all__ = ["Checkpoint", "StoredTensor", "gguf_chat_template", "gguf_tokenizer", "read_checkpoint"]

_HUB = (
    'If that is a model of the Hugging Face hub, `hf download {name} --local-dir DIR` (pip install "huggingface-hub") '
    "makes a folder of it."
)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file or an ONNX file.

    Raises:
        FileNotFoundError: nothing there, or a folder that lacks a file.
        MissingPackageError: the package that reads the format is not installed.
        UsageError: not one of the three formats, a broken file, or an architecture that is not built here.
    """
    path = Path(path).expanduser()
    if not path.exists():
        like_the_hub = not path.is_absolute() and len(path.parts) <= 2 and path.suffix not in (".gguf", ".onnx")
        hint = ". " + _HUB.format(name=path.as_posix()) if like_the_hub else ""
        raise FileNotFoundError(
            f"expected a Hugging Face folder, a .gguf or an .onnx file, found nothing at {path}{hint}"
        )
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".gguf":
        return read_gguf(path)
    if path.suffix == ".onnx":
        return read_onnx(path)
    hint = "Give the folder that it is in" if path.suffix in (".safetensors", ".json") else ""
    raise expected("path", "a Hugging Face folder, a .gguf or an .onnx file", path, hint)
