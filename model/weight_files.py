"""Weight files on disk: reading `.bin`/`.pt`/`.pth` and safetensors, single or sharded, and writing shards.

Reading goes tensor by tensor, so that a model never needs more memory than itself plus one tensor (plus one
shard where a pickle has the old format that cannot be mapped). Pickles are opened with `weights_only=True`.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.key_maps import Shape
from utils.io import StrPath, atomic_write_json, read_json, share_file

SAFETENSORS_NAMES = ("model.safetensors.index.json", "model.safetensors")
PICKLE_NAMES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class WeightFiles:
    """The tensors of one weight file, or of a folder with one file or an index and its shards.

    Args:
        path: a `.safetensors`, `.bin`, `.pt` or `.pth` file, or a folder holding
            `model.safetensors[.index.json]` or `pytorch_model.bin[.index.json]` (safetensors first).
        unwrap: names of top-level entries that hold the tensors (`sam`, `state_dict`, `module`), if present.

    Raises:
        ValueError: nothing readable is there, or a shard named by the index is absent.
    """

    def __init__(self, path: StrPath, unwrap: tuple[str, ...] = ()) -> None:
        self.path = Path(path)
        self.unwrap = unwrap
        self.files = _find_files(self.path)
        self._shapes: dict[str, Shape] = {}

    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of every tensor, in file order; a name in two shards is a ValueError."""
        shapes = self._shapes
        if shapes:
            return shapes
        for file in self.files:
            for name, shape in self._file_shapes(file).items():
                if name in shapes:
                    raise ValueError(
                        f"{file}: tensor {name} is in another shard too; download the folder again"
                    )
                shapes[name] = shape
        return shapes

    def tensors(self, names: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor (CPU, stored dtype) of each of `names` (None: of all), one at a time."""
        for file in self.files:
            if file.suffix == ".safetensors":
                with _open_safetensors(file) as opened:
                    for name in opened.keys():
                        if names is None or name in names:
                            yield name, opened.get_tensor(name)
            else:
                state = read_pickle(file, self.unwrap)
                for name in [n for n in state if names is None or n in names]:
                    yield name, state.pop(name)

    def metadata(self) -> dict[str, str]:
        """Free-text metadata of the first safetensors file; empty for pickles."""
        if self.files[0].suffix != ".safetensors":
            return {}
        with _open_safetensors(self.files[0]) as opened:
            return dict(opened.metadata() or {})

    def _file_shapes(self, file: Path) -> dict[str, Shape]:
        if file.suffix == ".safetensors":
            with _open_safetensors(file) as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        return {name: tuple(tensor.shape) for name, tensor in read_pickle(file, self.unwrap).items()}


def has_weights(path: StrPath) -> bool:
    """True for a file, or a folder that holds a weight file or an index."""
    path = Path(path)
    return path.is_file() or any((path / name).is_file() for name in (*SAFETENSORS_NAMES, *PICKLE_NAMES))


def read_pickle(file: StrPath, unwrap: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Tensors of a `torch.save` file: no code is run, zip files are mapped instead of read.

    Raises:
        ValueError: no such file, not a `torch.save` file, or it holds other things than tensors.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file}: no such weight file")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file}: not a weight file with tensors only ({first}); is it complete?") from error
    for key in unwrap:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"{file}: expected a dictionary of tensors, found {type(state).__name__}")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{file}: these entries are not tensors: {', '.join(others)}; save the state dict alone"
        )
    return {str(name): value.detach() for name, value in state.items()}


def parse_size(size: int | str) -> int:
    """Bytes of `5GB`, `200MB`, `20KB` or a plain number (decimal units); ValueError otherwise."""
    text = str(size).strip().upper()
    unit = _UNITS.get(text[-2:], 1)
    number = text[:-2] if unit > 1 else text
    try:
        value = int(float(number) * unit)
    except ValueError:
        value = 0
    if value <= 0:
        raise ValueError(f"size {size!r}: write a positive number of bytes, or for example 5GB, 200MB, 20KB")
    return value


def write_shards(
    folder: StrPath,
    state: Mapping[str, Tensor],
    max_shard_size: int | str = "5GB",
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> list[str]:
    """Write `model.safetensors`, or `model-0000i-of-0000n.safetensors` and the index, into `folder`.

    Args:
        folder: an existing folder.
        state: name -> tensor. Each is written contiguous; tensors that share memory are written in full.
        max_shard_size: upper limit of a shard; a single larger tensor gets its own.
        dtypes: name -> dtype to store; names that are not in it keep the tensor's.

    Returns:
        The names of the files written.
    """
    folder, limit, dtypes = Path(folder), parse_size(max_shard_size), dtypes or {}
    sizes = {name: t.numel() * dtypes.get(name, t.dtype).itemsize for name, t in state.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > limit:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        _save(folder / "model.safetensors", state, dtypes)
        return ["model.safetensors"]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(folder / file, {name: state[name] for name in names}, dtypes)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    atomic_write_json(folder / SAFETENSORS_NAMES[0], index)
    return [*dict.fromkeys(weight_map.values()), SAFETENSORS_NAMES[0]]


def _save(file: Path, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    unshared: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to(device="cpu", dtype=dtypes.get(name, tensor.dtype))
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        unshared[name] = (
            tensor if whole and storage.data_ptr() not in storages else tensor.clone().contiguous()
        )
        storages.add(storage.data_ptr())
    save_file(unshared, file, metadata={"format": "pt"})
    share_file(file)


def _open_safetensors(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error})") from error


def _find_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            raise ValueError(f"{path}: expected a .safetensors, .bin, .pt or .pth file")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    for name in (*SAFETENSORS_NAMES, *PICKLE_NAMES):
        file = path / name
        if file.is_file():
            return _shards(file) if name.endswith(".index.json") else [file]
    wanted = ", ".join((*SAFETENSORS_NAMES, *PICKLE_NAMES))
    raise ValueError(f"{path}: no weights here; expected one of {wanted}")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index, dict).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: field weight_map (tensor name -> file) is absent or empty")
    files = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{index}: these shards are not in the folder: {', '.join(absent)}; download them")
    return files
