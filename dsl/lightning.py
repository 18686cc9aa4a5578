"""Read a Lightning checkpoint's tensors without running anything that its pickle asks for."""

import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dsl.errors import WeightsError

ADVICE = (
    "Nothing of it was run. If you trust its author, export the EMA weights to a folder of "
    "model.safetensors and config.json, and load that."
)


def read_ema(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a public MDLM training run, named as its ``state_dict``.

    ``ema.shadow_params`` is a list in parameter order, which is state order without the rotary
    buffer. The raw weights are no substitute: published numbers are the average's, so a file
    without an average is refused and not silently read as another model.

    Raises:
        WeightsError: unreadable, unsafe, without EMA, or its EMA does not match its parameters.
    """
    checkpoint = read_checkpoint(path)
    try:
        state = checkpoint["state_dict"]
        names = [
            name for name in state if name.startswith("backbone.") and not name.endswith("inv_freq")
        ]
        averages = list(checkpoint["ema"]["shadow_params"])
        misplaced = [n for n, a in zip(names, averages, strict=True) if a.shape != state[n].shape]
        buffers = {name: state[name] for name in state if name.endswith("inv_freq")}
        found = dict(zip(names, averages, strict=True)) | buffers
        # A stored tensor may repeat one number and so claim any size.
        if sum(tensor.numel() for tensor in found.values()) > path.stat().st_size:
            raise ValueError("tensors are larger than the file")
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"{path}: no `ema.shadow_params` with one entry per `backbone.` parameter ({error}). "
            "It must be a checkpoint of an MDLM training run with EMA; to use raw weights, export "
            "them to a folder of model.safetensors and config.json."
        ) from error
    if misplaced:
        raise WeightsError(
            f"{path}: the EMA is not in the order of the parameters, first at {misplaced[0]}. "
            "Export the EMA weights by name to a folder of model.safetensors and config.json."
        )
    return found


def read_checkpoint(path: Path) -> Any:
    """What ``torch.save`` wrote, with inert stand-ins for every object that is not plain data.

    Lightning stores configuration and tokenizer objects beside the weights. Torch's restricted
    unpickler reads the file. For a class that it does not allow it gets a stand-in, of which
    instances can be made and filled but which cannot be called. No module that the file names is
    imported. A pickle that needs a call is refused.

    Raises:
        WeightsError: the file is missing, damaged, or needs a call.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file. Give a Lightning .ckpt, or a folder.")
    names: list[str] = []
    try:
        require_unpacked(path)
        names = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([(stand_in(name), name) for name in names]):
            # Mapped, not read: the optimizer's state is twice the weights and is not wanted.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damage and malice surface as nearly every type of exception
        reason = f"it names {', '.join(names)}" if names else str(error).partition("\n")[0]
        raise WeightsError(f"{path}: refused as unsafe or damaged: {reason}. {ADVICE}") from error


def require_unpacked(path: Path) -> None:
    """ValueError for an archive that is larger than its file: ``torch.save`` packs nothing."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("it would unpack to more than its size")


class Inert(type):
    """The metaclass of stand-ins. The pickle opcode ``NEWOBJ`` may make an instance; ``REDUCE``,
    which calls the class, raises WeightsError."""

    def __call__(cls, *args: object) -> NoReturn:
        raise WeightsError(f"the pickle calls {cls.__name__}")


def stand_in(name: str) -> Any:
    """The stand-in for a class that a pickle names; it drops its arguments and its state."""
    if name == "collections.defaultdict":  # a dictionary, whatever its missing entries would be
        return lambda *factory: {}

    def make(cls: type, *args: object) -> object:
        return object.__new__(cls)

    def fill(self: object, state: object) -> None: ...

    return Inert(name, (), {"__new__": make, "__setstate__": fill})
