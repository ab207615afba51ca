"""A teacher's outputs kept on disk: by the content of each sample, in a folder named after the teacher's own content.

``FOLDER/MARK/RANK-NUMBER.safetensors`` holds "codes" [k, 16] (uint8, a digest of each sample's inputs) and "outputs"
[k, ...] (float16, or float32 where that would overflow). A changed teacher has another mark, a changed sample another
digest: nothing stale is ever given. Outputs are rounded whether they come from a file or not, so a run is the same with
a cache that is warm.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from featherweight.distill.teachers import Teacher
from featherweight.errors import FileError, RecipeError
from featherweight.files import written_whole
from featherweight.network.trees import flatten
from featherweight.processes import Processes
from featherweight.task import Inputs, batch_size

FORMAT = "featherweight outputs 1"
#: samples in one file
FILE = 4096


class OutputCache:
    """Outputs of one teacher by sample. Raises RecipeError for a file that is torn, or of another teacher, FileError
    for a folder that cannot be written to."""

    def __init__(self, folder: str | Path, teacher: Teacher) -> None:
        self.mark = teacher.mark()
        check_folder(folder)
        self.folder = Path(folder) / self.mark[:16]
        self.hits = self.asked = 0
        self._known: dict[bytes, Tensor] = {}
        self._new: dict[bytes, Tensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._read(file)

    @property
    def hit_rate(self) -> float:
        """Share of the samples asked for that were there, 0..1."""
        return self.hits / max(1, self.asked)

    @property
    def file_bytes(self) -> int:
        """Length of all files of this teacher."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    def outputs(self, inputs: Inputs, compute: Tensor | None = None) -> Tensor | None:
        """The outputs [n, ...] of a batch; None where one is not there. ``compute``: what the teacher gave, to keep."""
        with torch.autocast("cpu", enabled=False):
            return self._outputs(_codes(inputs), compute)

    def _outputs(self, codes: list[bytes], compute: Tensor | None) -> Tensor | None:
        if compute is not None:
            if len(compute) != len(codes):
                raise RecipeError(f"cache=... keeps one output a sample, and the teacher gave {len(compute)} for "
                                  f"{len(codes)} samples; leave cache out")
            for code, row in zip(codes, compute.cpu(), strict=True):
                if code not in self._known:
                    self._known[code] = self._new[code] = _rounded(row)
            if len(self._new) >= FILE:
                self.flush()
        else:
            self.asked += len(codes)
        rows = [self._known.get(code) for code in codes]
        there = [row for row in rows if row is not None]
        if compute is None:
            self.hits += len(there)
        return torch.stack([row.float() for row in there]) if len(there) == len(rows) else None

    def flush(self) -> None:
        """Writes what is new into a file of its own, whole or not at all."""
        if not self._new:
            return
        processes = Processes()
        rank = processes.rank if processes.several else 0
        codes = torch.frombuffer(bytearray(b"".join(self._new)), dtype=torch.uint8).view(-1, 16)
        name = hashlib.sha256(b"".join(self._new)).hexdigest()[:12]  # another process never takes this name
        rows = list(self._new.values())
        kind = max((row.dtype for row in rows), key=lambda dtype: dtype.itemsize)
        with _told(self.folder.parent):
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(self.folder / f"{rank}-{name}.safetensors") as part:
                save_file({"codes": codes, "outputs": torch.stack([row.to(kind) for row in rows])}, part,
                          {"format": FORMAT, "teacher": self.mark})
        self._new = {}

    def _read(self, file: Path) -> None:
        try:
            with safetensors.safe_open(file, "pt") as found:
                meta = found.metadata() or {}
                codes, outputs = found.get_tensor("codes"), found.get_tensor("outputs")
            if len(codes) != len(outputs) or codes.shape[1:] != (16,):
                raise ValueError(f"{len(codes)} codes for {len(outputs)} outputs")
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            raise RecipeError(f"the cached outputs {file} cannot be read ({error}); delete this file, and its samples "
                              "are computed again") from error
        if meta.get("teacher") != self.mark or meta.get("format") != FORMAT:
            raise RecipeError(f"the cached outputs {file} are of another teacher or format ({meta.get('format')!r}); "
                              "delete this file, or write Logits(cache=another_folder)")
        raw = codes.numpy().tobytes()
        self._known |= {raw[16 * i:16 * i + 16]: row for i, row in enumerate(outputs)}


def check_folder(folder: str | Path) -> None:
    """Raises FileError where outputs cannot be kept in ``folder``, which is made if it is not there."""
    with _told(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"a teacher's outputs cannot be kept in {folder}: {error}; make room there, or write "
                        "Logits(cache=another folder)") from error


def _rounded(row: Tensor) -> Tensor:
    """A sample's outputs as float16, or as float32 where some are beyond what that holds."""
    half = row.half()
    return half.clone() if bool((half.isinf() == row.isinf()).all()) else row.float().clone()


def _codes(inputs: Inputs) -> list[bytes]:
    """A digest of each sample's inputs."""
    count = batch_size(inputs)
    found = [hashlib.blake2b(digest_size=16) for _ in range(count)]
    for leaf in flatten(inputs)[0]:
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count:
            flat = leaf.detach().cpu().contiguous().reshape(count, -1)
            about = f"{flat.dtype} {tuple(leaf.shape[1:])}".encode()
            for total, row in zip(found, flat, strict=True):
                total.update(about)
                total.update(row.view(torch.uint8).numpy().data)
        else:
            about = repr(leaf.tolist() if isinstance(leaf, Tensor) else leaf).encode()
            for total in found:
                total.update(about)
    return [total.digest() for total in found]
