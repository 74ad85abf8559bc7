"""`adapter_model.safetensors`: low-rank matrices by module, read once their shapes have been found right."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsc_serve.files import CheckpointError
from dsc_serve.model.folder import stored_tensors
from dsc_serve.model.peft.config import AdapterConfig
from dsc_serve.model.source import STORED_DTYPES, Stored, check_finite

FILE = "adapter_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MOST = 2**16  # tensors
LARGEST_BANK = 2**26  # numbers of a vector bank
MOST_MIXED = 64  # of its vectors, in one sub-vector
PREFIX = "base_model.model."
LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A|B)\.weight")
VBLORA = re.compile(r"base_model\.model\.(?P<module>.+)\.vblora_logits_(?P<part>A|B)(?P<kept>_topk_(indices|weights))?")
BANK = "base_model.vblora_vector_bank"
FOREIGN = {
    r"lora_magnitude_vector": "DoRA is not served",
    r"lora_[AB]\.bias$": "biases of LoRA's matrices are not served",
    r"lora_embedding_[AB]": "embeddings are not adapted here",
    r"trainable_tokens": "rows of the embedding are not adapted here",
    r"lora_[AB]\.[^.]+\.weight$": "the adapter's name stands in it; save_pretrained of PEFT leaves it out",
    r"\.(weight|bias)$": "it is a whole tensor of the base (modules_to_save, or an embedding that was resized)",
}


@dataclass(frozen=True)
class Matrices:
    """A module's update: down [r, in] and up [out, r], float32 or bfloat16."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class StoredModule:
    """Of one module the tensors by part, with the names that errors call them by."""

    parts: dict[str, tuple[str, Stored]]


class AdapterTensors:
    """The tensors of one folder, by module. Raises CheckpointError for any that belongs to no low-rank update."""

    def __init__(self, folder: Path, config: AdapterConfig) -> None:
        self._path, self._config = folder / FILE, config
        if not self._path.is_file():
            pickles = sorted(own.name for kind in PICKLES for own in folder.glob(kind))
            what = f"; {pickles[0]} is a pickle, which is never read: save it as safetensors" if pickles else ""
            raise CheckpointError(f"{FILE}: no such file{what}")
        stored = stored_tensors([self._path])
        if len(stored) > MOST:
            raise CheckpointError(f"{FILE}: holds {len(stored)} tensors; at most {MOST} are read")
        self._bank = self._read_bank(stored) if config.form == "VBLORA" else None
        form = LORA if config.form == "LORA" else VBLORA
        self.modules: dict[str, StoredModule] = {}
        for name, own in stored.items():
            match = form.fullmatch(name)
            if match is None:
                raise foreign(name, config.form)
            part = match["part"] + (match.groupdict().get("kept") or "")
            self.modules.setdefault(match["module"], StoredModule({})).parts[part] = (name, own)
        if not self.modules:
            raise CheckpointError(f"{FILE}: holds no tensors")

    def read(self, module: str, out: int, into: int) -> Matrices:
        """The matrices of a module [out, into], of the rank that the configuration claims. Raises CheckpointError."""
        rank = self._config.rank_of(module)
        found = self._low_rank(module, out, into, rank) if self._bank is None else self._mixed(module, out, into, rank)
        dtypes = {found.down.dtype, found.up.dtype}
        narrow = dtypes == {torch.bfloat16}
        kind = torch.bfloat16 if narrow else torch.float32
        return Matrices(found.down.to(kind).contiguous(), found.up.to(kind).contiguous())

    def sizes(self, module: str) -> tuple[int, int]:
        """[out, into] of a module as its tensors have it. Raises CheckpointError where they have another form."""
        wide = 1 if self._bank is None else self._bank.shape[1]
        sizes = []
        for part, axis in (("B", 0), ("A", 1)):
            kept = f"{part}_topk_indices"
            name, own = self._stored(module, kept if kept in self.modules[module].parts else part)
            if len(own.shape) != (2 if self._bank is None else 3):
                raise CheckpointError(
                    f"{FILE}: tensor {name} has shape {list(own.shape)}; it has too few or too many axes"
                )
            if not own.shape[axis]:
                raise CheckpointError(f"{FILE}: tensor {name} has shape {list(own.shape)}; it holds no numbers")
            sizes.append(own.shape[axis] * wide)
        return sizes[0], sizes[1]

    def _low_rank(self, module: str, out: int, into: int, rank: int) -> Matrices:
        down, up = self._stored(module, "A"), self._stored(module, "B")
        for (name, own), shape in ((down, (rank, into)), (up, (out, rank))):
            self._check(name, own, shape)
        return Matrices(*(self._finite(name, own) for name, own in (down, up)))

    def _mixed(self, module: str, out: int, into: int, rank: int) -> Matrices:
        """A and B of sub-vectors of the bank, each a mixture of the few of the largest logits."""
        assert self._bank is not None
        length = self._bank.shape[1]
        for size, what in ((into, "inputs"), (out, "outputs")):
            if size % length:
                raise CheckpointError(f"vector_length is {length}, which does not divide {module}'s {size} {what}")
        down = self._mixture(module, "A", (rank, into // length)).reshape(rank, into)
        up = self._mixture(module, "B", (out // length, rank)).transpose(1, 2).reshape(out, rank)
        return Matrices(down, up)

    def _mixture(self, module: str, part: str, tiles: tuple[int, int]) -> Tensor:
        """[*tiles, vector length], float32."""
        assert self._bank is not None
        vectors = self._bank.shape[0]
        picked = self._config.size("topk", min(vectors, MOST_MIXED))
        if f"{part}_topk_indices" in self.modules[module].parts:
            name, stored = self._stored(module, f"{part}_topk_indices")
            self._check(name, stored, (*tiles, picked), (torch.uint8, torch.int16, torch.int32, torch.int64))
            indices = stored.read().long()
            if not bool(((indices >= 0) & (indices < vectors)).all()):
                raise CheckpointError(f"{FILE}: tensor {name} names vectors beyond the bank's {vectors}")
            name, stored = self._stored(module, f"{part}_topk_weights")
            self._check(name, stored, (*tiles, picked - 1))
            weights = self._finite(name, stored).float()
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        else:
            name, stored = self._stored(module, part)
            self._check(name, stored, (*tiles, vectors))
            logits, indices = self._finite(name, stored).float().topk(picked, dim=-1)
            weights = torch.softmax(logits, -1)
        mixed = torch.zeros(*tiles, self._bank.shape[1])
        for pick in range(picked):  # one by one: all together would be so many times the matrix
            mixed.addcmul_(weights[..., pick, None], self._bank[indices[..., pick]])
        return mixed

    def _read_bank(self, stored: dict[str, Stored]) -> Tensor:
        vectors, length = self._config.size("num_vectors"), self._config.size("vector_length")
        own = stored.pop(BANK, None)
        if own is None:
            raise CheckpointError(f"{FILE}: tensor {BANK} is missing")
        if vectors * length > LARGEST_BANK:
            raise CheckpointError(f"num_vectors · vector_length is {vectors * length}; at most {LARGEST_BANK} are read")
        self._check(BANK, own, (vectors, length))
        return self._finite(BANK, own).float()

    def _stored(self, module: str, part: str) -> tuple[str, Stored]:
        found = self.modules[module].parts.get(part)
        if found is None:
            there = next(name for name, _ in self.modules[module].parts.values())
            raise CheckpointError(f"{FILE}: tensor {there} is there, but not its counterpart of part {part}")
        return found

    def _check(
        self, name: str, own: Stored, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = STORED_DTYPES
    ) -> None:
        if own.shape != shape:
            expected = f"{list(shape)} is expected by the base and {self._claim}"
            raise CheckpointError(f"{FILE}: tensor {name} has shape {list(own.shape)}; {expected}")
        if own.dtype not in dtypes:
            expected = ", ".join(str(kind).removeprefix("torch.") for kind in dtypes)
            stored = str(own.dtype).removeprefix("torch.")
            raise CheckpointError(f"{FILE}: tensor {name} is stored as {stored}; expected {expected}")

    @property
    def _claim(self) -> str:
        return f"adapter_config.json's r, {self._config.rank}" + (" and rank_pattern" if self._config.ranks else "")

    def _finite(self, name: str, own: Stored) -> Tensor:
        tensor = own.read()
        check_finite(name, tensor, self._path)
        return tensor


def foreign(name: str, form: str) -> CheckpointError:
    """Why a tensor of this name is none of an adapter's."""
    why = next((why for end, why in FOREIGN.items() if re.search(end, name)), f"it is no part of a {form} adapter")
    return CheckpointError(f"{FILE}: tensor {name}: {why}")


def bounded(matrices: Mapping[str, Matrices], scales: Mapping[str, float]) -> None:
    """Raises CheckpointError where an update could overflow float32, though each number is finite."""
    for name, own in matrices.items():
        largest = float(own.down.abs().max()) * float(own.up.abs().max()) * own.down.shape[0] * abs(scales[name])
        if not largest < 1e30:
            raise CheckpointError(f"{FILE}: the update of {name} may reach {largest:.3g}, which float32 cannot hold")
