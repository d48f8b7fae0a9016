"""ONNX: torch's export of a vision transformer in DINOv2 layout, whose nodes are named by module."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ntk_prefix.checks import expected, extra
from ntk_prefix.models.formats.checkpoint import Checkpoint, StoredTensor

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

logger = logging.getLogger(__name__)

__all__ = ["read_onnx"]

PATCHES = "embeddings/patch_embeddings/projection/Conv"


def read_onnx(path: Path) -> Checkpoint:
    """Open an export, whose nodes are named by module: ``/backbone/encoder/layer.0/norm1/Add``.

    Raises:
        UsageError: a broken file, weights that are kept in another file, or another model.
    """
    graph = _graph(path)
    held = {tensor.name: tensor for tensor in graph.initializer}
    weights = {tensor.name: _stored(path, tensor) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    patches = next((name for name in nodes if name.endswith(f"/{PATCHES}")), "")
    first = patches.removesuffix(PATCHES)
    if not first or f"{first}encoder/layer.0/norm1/Add" not in nodes:
        raise expected(
            path,
            f"torch's export of a vision transformer in DINOv2 layout, with nodes named .../{PATCHES} "
            "and .../encoder/layer.0/norm1/Add",
            f"{graph.name!r} with {len(nodes)} nodes",
        )
    prefix = first.strip("/").replace("/", ".") + "." if first.strip("/") else ""

    def named(tensor: str) -> bool:
        return tensor.startswith(prefix) and "::" not in tensor

    if dropped := sorted(name for name in weights if not named(name) and "::" not in name):
        logger.info("%s: not used, outside of %s: %s", path, prefix, ", ".join(dropped))
    tensors = {name.removeprefix(prefix): weight for name, weight in weights.items() if named(name)}
    for name, node in nodes.items():
        # the exporter transposes the weights of linear maps and calls them onnx::MatMul_<n>
        if node.op_type == "MatMul" and name.startswith(first):
            module = name.removeprefix(first).removesuffix("/MatMul").replace("/", ".")
            for weight in (weights[i] for i in node.input[1:2] if i in weights):
                whole = functools.partial(_transposed, path, held[weight.name])
                tensors[f"{module}.weight"] = weight._replace(
                    shape=weight.shape[::-1], load=functools.partial(_rows, whole)
                )
    # and cuts the position embeddings into those of the class token and those of the grid
    here = [
        node
        for name, node in nodes.items()
        if re.fullmatch(rf"{re.escape(first)}embeddings/(Reshape|Concat)(_\d+)?", name)
    ]
    parts = [
        weights[name]
        for op in ("Concat", "Reshape")
        for node in here
        if node.op_type == op
        for name in node.input
        if name in weights and not named(name) and len(weights[name].shape) == 3
    ]
    widths = {(part.shape[0], part.shape[2]) for part in parts}
    if len(widths) != 1:
        raise expected(f"{path}: {first}embeddings", "position embeddings of one width", sorted(widths))
    (batch, features), tokens = widths.pop(), sum(part.shape[1] for part in parts)
    whole = functools.partial(_joined, path, [held[part.name] for part in parts])
    tensors["embeddings.position_embeddings"] = parts[0]._replace(
        shape=(batch, tokens, features), load=functools.partial(_rows, whole)
    )

    def number(node: str, kind: type) -> Any:
        """Return the first constant that goes into a node."""
        return _number(path, graph, nodes.get(f"{first}{node}"), kind)

    kernel = tensors.get(_input(path, nodes[patches], 1).removeprefix(prefix))
    up = tensors.get("encoder.layer.0.mlp.fc1.bias")
    if kernel is None or len(kernel.shape) != 4 or up is None or len(up.shape) != 1:
        raise expected(str(path), "weights of its patches, [D, channels, size, size], and of its MLP", "none")
    features, channels, size, _ = kernel.shape
    layers = rf"{re.escape(first)}encoder/layer\.\d+/norm1/Add"
    config = {
        "model_type": "dinov2",
        "hidden_size": features,
        "num_channels": channels,
        "patch_size": size,
        "image_size": round(max(tokens - 1, 0) ** 0.5) * size,
        "num_hidden_layers": sum(re.fullmatch(layers, name) is not None for name in nodes),
        "num_attention_heads": number("encoder/layer.0/attention/attention/Concat", int),
        "intermediate_size": up.shape[0],
        "layer_norm_eps": number("encoder/layer.0/norm1/Add", float),
    }
    return Checkpoint(path, path, config, tensors)


def _graph(path: Path) -> GraphProto:
    with extra("models"):
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph: GraphProto = onnx.load(path, load_external_data=False).graph
    except (DecodeError, ValueError, TypeError, RecursionError) as error:
        raise expected(path, "an ONNX file", f"one that is broken: {error}") from None
    names = [name for node in graph.node for name in (node.name, node.op_type, *node.input, *node.output)]
    if not all(isinstance(name, str) for name in (*names, *(tensor.name for tensor in graph.initializer))):
        raise expected(str(path), "names in UTF-8", "a file that is broken")  # protobuf gives bytes in their place
    outside = [tensor.name for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise expected(
            f"{path}: {outside[0]}",
            "weights within the file",
            "one that is kept in another",
            "onnx.save_model(onnx.load(path), new_path) writes them into one file",
        )
    return graph


def _stored(path: Path, tensor: TensorProto) -> StoredTensor:
    from onnx import TensorProto

    kinds = TensorProto.DataType
    known = tensor.data_type in kinds.values()
    floating: dict[int, Any] = {
        kinds.FLOAT: np.float32,
        kinds.FLOAT16: np.float16,
        kinds.BFLOAT16: ml_dtypes.bfloat16,
        kinds.DOUBLE: np.float64,
    }
    numbers = np.dtype(floating[tensor.data_type]) if tensor.data_type in floating else None
    kind = kinds.Name(tensor.data_type) if known else f"type {tensor.data_type}"
    load = functools.partial(_rows, functools.partial(_array, path, tensor))
    return StoredTensor(path, tensor.name, tuple(tensor.dims), kind, numbers, load)


def _rows(whole: Callable[[], np.ndarray], bounds: Iterable[slice]) -> Iterator[np.ndarray]:
    """Yield rows of a tensor, which is in memory: protobuf reads a file whole."""
    values = whole()
    for rows in bounds:
        yield values[rows]


def _array(path: Path, tensor: TensorProto) -> np.ndarray:
    """Return a tensor's numbers."""
    from onnx.numpy_helper import to_array

    try:
        return to_array(tensor)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise expected(f"{path}: {tensor.name}", "a whole tensor", f"one that is broken: {error}") from None


def _input(path: Path, node: NodeProto | None, index: int) -> str:
    """Return the name of what goes into a node."""
    if node is None or len(node.input) <= index:
        raise expected(str(path), f"a node with {index + 1} inputs", "none" if node is None else node.name)
    return node.input[index]


def _number(path: Path, graph: GraphProto, node: NodeProto | None, kind: type) -> Any:
    """Return the one number of the first constant that goes into a node."""
    made_by = {name: made for made in graph.node if made.op_type == "Constant" for name in made.output}
    for name in () if node is None else node.input:
        for attribute in made_by[name].attribute if name in made_by else ():
            if attribute.name == "value" and attribute.HasField("t"):
                values = _array(path, attribute.t)
                if values.size == 1 and np.issubdtype(values.dtype, np.number) and np.isfinite(values).all():
                    return kind(values.item())
    raise expected(str(path), "a node with a constant", "none" if node is None else node.name)


def _joined(path: Path, parts: list[TensorProto]) -> np.ndarray:
    return np.concatenate([_array(path, part) for part in parts], axis=1)


def _transposed(path: Path, tensor: TensorProto) -> np.ndarray:
    return _array(path, tensor).T
