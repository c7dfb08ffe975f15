"""The adversary memory in a file of the host, mapped into memory, for sets that the device lacks
room for.

A step reads and writes one tensor on the device: the rows of its own batch. One thread reads the
rows of the next batch while a step runs, and writes the rows of the last one back.

A checkpoint must find the rows of its own step, even after a kill. So every row is copied to a
journal before it is overwritten. There is one journal for each checkpoint, with the rows that were
overwritten after it. To return to a checkpoint, its journal and all later ones are undone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..errors import EngineError
from ..threat import ThreatModel
from .memory import AdversaryMemory, fill

# The rows of a replaced memory go to the journal in parts of so many.
_CHUNK = 256


class HostMemory(AdversaryMemory):
    """Hold the last perturbation of every training sample in FOLDER/deltas.int8.

    `begin` or `restore` comes first. Then every step is: `fetch`, `recall`, `remember`, `store`.

    Args:
        samples, shape, threat, seed, device: as `AdversaryMemory` has them.
        batch: samples of a step, B.
        folder: a folder of this memory alone; None: a temporary one.
    Attributes:
        deltas: int8 [B, C, H, W] on the device, the rows of the step at hand.
    """

    def __init__(
        self,
        samples: int,
        shape: Sequence[int],
        threat: ThreatModel,
        *,
        batch: int,
        folder: Path | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.threat, self.seed = threat, seed
        self.deltas = torch.zeros((batch, *shape), dtype=torch.int8, device=device)
        self._slots = torch.arange(batch, device=device)
        self._shape = (samples, *shape)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory()
            folder = Path(self._temporary.name)
        self.folder = folder
        self._thread = ThreadPoolExecutor(1)
        self._file: Tensor | None = None
        self._journal: Path | None = None
        # The step's samples and their rows before it; those that are read ahead; writes under way.
        self._now: tuple[Tensor, Tensor] | None = None
        self._ahead: tuple[Tensor, Future[Tensor]] | None = None
        self._writes: list[Future[None]] = []
        if self._temporary is not None:
            self.begin()

    def begin(self) -> None:
        """Make the file anew, with the first perturbations.

        Raises:
            EngineError: where it cannot be written, or has no room.
        """
        files.make_folder(self.folder)
        for path in (*self._journals(), self._path):
            files.remove(path)
        self._open(create=True)
        fill(self._whole, self.threat.norm, self.seed)
        # Nobody returns to a step before the first checkpoint.
        self._journal = None

    def restore(self, step: int) -> None:
        """Return to the rows of the checkpoint of `step`.

        Raises:
            EngineError: where the file or the checkpoint's journal is missing or damaged.
        """
        if self._journal_of(step) not in self._journals():
            raise EngineError(
                f"{self.folder}: the adversary memory of the checkpoint of step {step} is missing: "
                "restore the folder, or begin another run"
            )
        self._open(create=False)
        later = [path for path in reversed(self._journals()) if path >= self._journal_of(step)]
        # The order is safe against another kill: what is undone twice is the same.
        for path in later:
            for samples, rows in reversed(list(self._records(path))):
                self._whole.index_copy_(0, samples, rows)
        for path in later:
            files.remove(path)
        self.mark(step)

    def mark(self, step: int) -> None:
        """Begin the journal of the checkpoint of `step`, after all writes."""
        self._finish_writes()
        self._sync()
        self._journal = self._journal_of(step)
        files.remove(self._journal)
        files.append(self._journal, b"")

    def drop_before(self, step: int) -> None:
        """Remove the journals of checkpoints before `step`: nobody returns to these."""
        for path in self._journals():
            if path < self._journal_of(step):
                files.remove(path)

    def prefetch(self, index: Tensor) -> None:
        """Begin to read the rows of samples `index` int64 [B], those of the next step."""
        samples = index.cpu()
        self._ahead = samples, self._thread.submit(self._read, samples)

    def fetch(self, index: Tensor) -> None:
        """Bring the rows of samples `index` int64 [B] to the device, for this step."""
        samples = index.cpu()
        if self._ahead is None or not torch.equal(self._ahead[0], samples):
            self.prefetch(samples)
        assert self._ahead is not None
        rows = self._result(self._ahead[1])
        self._now, self._ahead = (samples, rows), None
        self.deltas.copy_(rows, non_blocking=True)

    def store(self) -> None:
        """Begin to write the rows of this step back."""
        assert self._now is not None
        samples, before = self._now
        on_gpu = self.deltas.is_cuda
        rows = torch.empty(self.deltas.shape, dtype=torch.int8, pin_memory=on_gpu)
        rows.copy_(self.deltas, non_blocking=True)
        done = torch.cuda.Event() if on_gpu else None
        if done is not None:
            done.record()
        if self._ahead is not None and bool(torch.isin(self._ahead[0], samples).any()):
            # These were read before this write.
            self._ahead = None
        for write in [write for write in self._writes if write.done()]:
            self._result(write)
            self._writes.remove(write)
        self._writes.append(self._thread.submit(self._write, samples, before, rows, done))

    def recall(self, index: Tensor, x: Tensor, crops: Tensor | None = None) -> Tensor:
        return super().recall(self._slots, x, crops)

    def remember(
        self, index: Tensor, x: Tensor, adversary: Tensor, crops: Tensor | None = None
    ) -> None:
        super().remember(self._slots, x, adversary, crops)

    def forget(self, seed: int) -> None:
        """Replace all perturbations by uniform random ones; the journal keeps the old ones."""
        self._finish_writes()
        self._ahead = None
        if self._journal is not None:
            for samples in torch.arange(self._shape[0]).split(_CHUNK):
                self._note(samples, self._whole[samples])
        fill(self._whole, self.threat.norm, seed)

    def close(self) -> None:
        """Finish the writes and stop the thread."""
        self._finish_writes()
        self._thread.shutdown()
        self._file = None
        if self._temporary is not None:
            self._temporary.cleanup()

    def remove(self) -> None:
        """Close the memory and remove its files."""
        self.close()
        for path in (*self._journals(), self._path):
            files.remove(path)

    @property
    def whole(self) -> Tensor:
        """Return all perturbations, int8 [N, C, H, W], on the host, after all writes."""
        self._finish_writes()
        return self._whole

    @property
    def _whole(self) -> Tensor:
        assert self._file is not None, "begin or restore comes first"
        return self._file

    @property
    def _path(self) -> Path:
        return self.folder / "deltas.int8"

    def _journals(self) -> list[Path]:
        """Return the journals, that of the oldest checkpoint first."""
        return sorted(self.folder.glob("undo-*.journal"))

    def _journal_of(self, step: int) -> Path:
        return self.folder / f"undo-{step:010d}.journal"

    def _open(self, *, create: bool) -> None:
        count = 1
        for side in self._shape:
            count *= side
        try:
            if create:
                # A write into a hole of a full disk would end the process.
                with self._path.open("wb") as file:
                    file.truncate(count)
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, count)
            elif self._path.stat().st_size != count:
                raise EngineError(
                    f"{self._path} has {self._path.stat().st_size:,} bytes and not {count:,}: it "
                    "is of another run"
                )
        except OSError as error:
            raise EngineError(
                f"attack.memory = host: {self._path} of {count / 1e9:.1f} GB: {error.strerror}"
            ) from None
        mapped = torch.from_file(str(self._path), shared=True, size=count, dtype=torch.int8)
        self._file = mapped.view(self._shape)

    def _sync(self) -> None:
        """Bring the rows to the disk: after a power cut a journal alone must be enough."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def _read(self, samples: Tensor) -> Tensor:
        rows = self._whole.index_select(0, samples)
        return rows.pin_memory() if self.deltas.is_cuda else rows

    def _write(self, samples: Tensor, before: Tensor, rows: Tensor, done: Any) -> None:
        if done is not None:
            done.synchronize()
        if self._journal is not None:
            self._note(samples, before)
        last = _last(samples)
        self._whole.index_copy_(0, samples[last], rows[last])

    def _note(self, samples: Tensor, rows: Tensor) -> None:
        """Write samples and their rows to the journal."""
        assert self._journal is not None
        head = torch.cat([torch.tensor([len(samples)]), samples])
        data = head.numpy().tobytes() + rows.contiguous().numpy().tobytes()
        files.append(self._journal, data)

    def _records(self, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the records of a journal; a last one that a kill cut short is left out."""
        row = self._shape[1] * self._shape[2] * self._shape[3]
        with path.open("rb") as file:
            while len(head := file.read(8)) == 8:
                count = int.from_bytes(head, "little")
                data = file.read(count * (8 + row))
                if len(data) < count * (8 + row):
                    return
                samples = torch.frombuffer(bytearray(data[: 8 * count]), dtype=torch.int64)
                rows = torch.frombuffer(bytearray(data[8 * count :]), dtype=torch.int8)
                yield samples, rows.view(count, *self._shape[1:])

    def _finish_writes(self) -> None:
        writes, self._writes = self._writes, []
        for write in writes:
            self._result(write)

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except OSError as error:
            raise EngineError(f"attack.memory = host: {self.folder}: {error.strerror}") from None


def _last(samples: Tensor) -> Tensor:
    """Return int64 places: for each value of `samples` int64 [B], its last place.

    Extra images are drawn with replacement, so a batch may have one twice. PyTorch does not define
    which of two rows `index_copy_` keeps.
    """
    values, group = samples.unique(return_inverse=True)
    places = torch.arange(len(samples))
    return torch.zeros_like(values).scatter_reduce(0, group, places, "amax", include_self=False)


def ahead(batches: Any, prefetch: Callable[[Tensor], None]) -> Iterator[Any]:
    """Give batches; while one is used, the memory's rows of the next one are read."""
    waiting = None
    for batch in batches:
        if waiting is not None:
            prefetch(batch.samples)
            yield waiting
        waiting = batch
    if waiting is not None:
        yield waiting
