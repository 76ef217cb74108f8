"""
Offline distillation: run the teacher once over all training rows, and train from its stored outputs.

A distillation step spends most of its time and memory on a model that is not trained. The teacher is frozen, and the
same rows come again in every epoch, in every stage that shares them, and in every experiment, so its outputs can be
kept:

    torchrun --nproc_per_node=16 train.py config/d2s.py --teacher_cache=out/2b/d2s_cache --teacher_top_k=64

The first such run fills the folder with the teacher's outputs, frees the teacher, and trains; later runs do not load
it. What is kept depends on what the loss needs:

    d2d, d2s   per response token the k largest of the teacher's log-probs, their ids, and the log of the remaining
               mass: 8 k + 4 bytes. `losses.merge_tail` makes them comparable with the student.
    pd         per pair two numbers, log p(chosen) and log p(rejected): 8 bytes, and exact.

The folder holds teacher_cache.json, which says which data and which teacher it was made with, and a safetensors file
per 1,024 rows. Only rows that the run will visit are filled, and a later run adds those that it visits besides. Each file
is written atomically, so after an interruption only what is missing is filled. Each has a checksum of its content, of its
place, and of teacher_cache.json; all are read through before a run uses them, half a minute for the 34 GB of 665,000 rows. The paper names the memory of two models as a limitation of the method; this
removes it.
"""
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configurator import UserError
from data import prefetch
from engine.files import atomic, claim, read_json, readable, release, write_json
from engine.index import RowData
from engine.log import some
from engine.resume import defer_worker_deaths

OWNER = "train.py --teacher_cache"
ROWS_PER_FILE = 1024
VERSION = 3              # of the folder's format
PATIENCE = 120           # seconds: a network disk may show a new file to other machines only after a minute


class TeacherCache:
    """The folder. cache[row] -> the teacher's outputs for that row of the dataset: {name: (length, ...)}.

    cache_key: everything the outputs depend on; UserError if the folder was made with another one. A value of None is
    not compared: a complete cache can be used without the teacher's checkpoint. needed: the rows that the run visits, in
    ascending order (None: all).
    """

    def __init__(self, folder: str | Path, n_rows: int, cache_key: dict[str, object], needed: np.ndarray | None = None):
        self.folder, self.n_rows, self.files = Path(folder), n_rows, {}
        self.needed = np.arange(n_rows) if needed is None else needed
        self.cache_key = {"version": VERSION} | cache_key
        record = self.folder / "teacher_cache.json"
        can_fill, hint = None not in cache_key.values(), "the teacher that could fill it is not here"
        if can_fill and not os.path.isfile(record):
            claim(self.folder, OWNER, wait=True)
            if not os.path.isfile(record):                           # another run may have written it meanwhile
                write_json(record, self.cache_key)
        before = read_json(record, hint=hint)
        if before.get("version") != VERSION:
            raise UserError(f"{record}: has format version {before.get('version', 1)!r}, this program reads version "
                            f"{VERSION}; choose another teacher_cache folder, or delete this one to fill it again")
        for key, value in cache_key.items():
            if value is not None and before.get(key) != value:
                raise UserError(f"{record}: was made with {key}={before.get(key)!r}, this run has {key}={value!r}; "
                                "choose another teacher_cache folder, or delete this one to fill it again")
        self.cache_key = before
        if not can_fill and (missing := self.missing()):
            path, rows = missing[0]
            raise UserError(f"{path}: has no row {rows[0]}, which this run visits; {hint}")

    def file_from(self, start: int) -> tuple[Path, range]:
        """The file whose first row is `start`, and the rows in it."""
        return self.folder / f"rows-{start:09d}.safetensors", range(start, min(start + ROWS_PER_FILE, self.n_rows))

    def needed_files(self) -> list[tuple[Path, list[int]]]:
        """Each file that the run reads, and which of its rows."""
        starts = np.unique(self.needed // ROWS_PER_FILE) * ROWS_PER_FILE
        bounds = np.searchsorted(self.needed, [*starts, self.n_rows])
        return [(self.file_from(int(start))[0], self.needed[first:last].tolist())
                for start, first, last in zip(starts, bounds, bounds[1:])]

    def missing(self) -> list[tuple[Path, list[int]]]:
        """The files that lack some of the needed rows, and which they lack."""
        missing = []
        for path, rows in self.needed_files():
            lengths = self.row_lengths(path) if path.is_file() else {}
            if lacking := [row for row in rows if not lengths.get(row)]:
                missing.append((path, lacking))
        return missing

    def row_lengths(self, path: Path) -> dict[int, int]:
        """How many entries a file has of each of its rows; 0: no run has visited it yet."""
        try:
            with safe_open(path, framework="pt") as file:
                offsets = file.get_tensor("row_offsets")
        except (OSError, SafetensorError) as error:
            raise self.unreadable(path, error) from None
        return dict(enumerate(offsets.diff().tolist(), start=self.first_row(path)))

    def first_row(self, path: Path) -> int:
        return int(path.stem.removeprefix("rows-"))

    def claim_missing(self) -> list[tuple[Path, list[int]]]:
        """What is missing. If anything is, other runs wait until this one has filled it and calls `release`."""
        if self.missing():
            claim(self.folder, OWNER, wait=True)
        return self.missing()

    def release(self) -> None:
        release(self.folder)

    def check(self, rank: int, world_size: int) -> None:
        """UserError unless all needed rows are there, and this rank's share of the files has the right checksum."""
        deadline = time.monotonic() + PATIENCE
        while missing := self.missing():                             # filled by another machine a moment ago?
            if time.monotonic() > deadline:
                raise UserError(f"{missing[0][0]}: cannot be seen from this machine, {PATIENCE} seconds after it was written; "
                                "the folder must be one that all machines share")
            os.listdir(self.folder)                                  # makes NFS ask its server again
            time.sleep(1)
        for path, _ in self.needed_files()[rank::world_size]:
            self.read(path)

    def read(self, path: Path) -> dict[str, torch.Tensor]:
        """All of a file, its checksum compared."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                if (file.metadata() or {}).get("checksum") != self.checksum(self.first_row(path), tensors):
                    raise OSError("its checksum is wrong")
        except Exception as error:                                   # damaged bytes can fail in any way
            raise self.unreadable(path, error) from None
        return tensors

    def rows_in(self, path: Path) -> dict[int, dict[str, torch.Tensor]]:
        """{row: its outputs} of the rows that a file holds already."""
        if not path.is_file():
            return {}
        tensors = self.read(path)
        lengths = tensors.pop("row_offsets").diff().tolist()
        parts = {name: tensor.split(lengths) for name, tensor in tensors.items()}
        return {row: {name: parts[name][i] for name in parts}
                for i, row in enumerate(range(self.first_row(path), self.first_row(path) + len(lengths))) if lengths[i]}

    def checksum(self, start: int, tensors: dict[str, torch.Tensor]) -> str:
        """A digest of a file's content, its place, and what the folder was made from."""
        digest = hashlib.sha256(json.dumps([self.cache_key, start], sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def unreadable(self, path: Path, error: Exception) -> UserError:
        return UserError(f"{path}: cannot be read ({error}); delete it, and the next run fills it again")

    @property
    def vocab_size(self) -> int:
        """Tokens that the cached distributions are over: the rows that both vocabularies share."""
        return self.cache_key["vocabulary"]

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        path, rows = self.file_from(row // ROWS_PER_FILE * ROWS_PER_FILE)
        try:
            if path not in self.files:
                file = safe_open(path, framework="pt")
                self.files[path] = (file, file.get_tensor("row_offsets").tolist())
            file, offsets = self.files[path]
            i = row - rows.start
            span = slice(offsets[i], offsets[i + 1])
            return {name: file.get_slice(name)[span] for name in file.keys() if name != "row_offsets"}
        except (OSError, SafetensorError, IndexError) as error:
            raise self.unreadable(path, error) from None


class RowsWithTeacher:
    """A dataset whose samples also hold the teacher's outputs, which `collate_with_teacher` concatenates."""

    def __init__(self, dataset: RowData, cache: TeacherCache):
        self.dataset, self.cache = dataset, cache

    def __getitem__(self, row: int) -> dict:
        return self.dataset[row] | {"teacher": self.cache[row]}


def collate_with_teacher(samples: list[dict], collate: Callable) -> dict:
    outputs = [sample["teacher"] for sample in samples]
    return collate(samples) | {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n, V) -> ids (n, k), their log-probs (n, k), and the log of the remaining mass (n,), -inf if k = V."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    top, ids = logprobs.topk(k, dim=-1)
    return ids, top, logprobs.scatter(1, ids, -torch.inf).logsumexp(-1)


def fill(cache: TeacherCache, missing: list[tuple[Path, list[int]]], dataset: RowData,
         teacher_targets: Callable[[dict], tuple[dict[str, torch.Tensor], list[int]]], collate: Callable,
         micro_batch_size: int, num_workers: int, rank: int, world_size: int) -> None:
    """Run the teacher over the missing rows, whose files are divided among the ranks.

    teacher_targets(batch) -> the tensors to keep, all rows concatenated, and each row's length in them. After the first
    batch, of rows of middle length, rank 0 says what the rest will take; UserError if the disk has no room for it.
    """
    files = missing[rank::world_size]                                # of this rank
    total = sum(len(rows) for _, rows in files)
    batches = []                                                     # rows of similar length, to save padding
    for _, rows in files:
        by_length = sorted(rows, key=lambda row: dataset.lengths[row])
        groups = [by_length[i:i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
        batches += [groups.pop(len(groups) // 2), *groups]
    started, done = time.time(), 0
    loader = zip(batches, prefetch(dataset, batches, collate, num_workers))
    for path, rows in files:
        outputs = cache.rows_in(path)                                # by row
        n_before = len(outputs)
        while len(outputs) < n_before + len(rows):
            batch_rows, batch = next(loader)
            defer_worker_deaths()
            began = time.time()
            tensors, batch_lengths = teacher_targets(batch)
            if any(tensor.isnan().any() for tensor in tensors.values()):
                names = [dataset.describe(row) for row in batch_rows]
                raise UserError(f"the teacher's outputs are NaN for {some(names)}; check its weights")
            split = {name: tensor.cpu().split(batch_lengths) for name, tensor in tensors.items()}
            for i, row in enumerate(batch_rows):
                outputs[row] = {name: parts[i] for name, parts in split.items()}
            if rank == 0 and done == 0 and batch_rows == batches[0]:
                every = sum(len(rows) for _, rows in missing)
                size = sum(tensor.nbytes for tensor in tensors.values()) / len(batch_rows) * every
                free, hours = shutil.disk_usage(cache.folder).free, (time.time() - began) / len(batch_rows) * total / 3600
                print(f"teacher cache: {every:,} rows to fill, about {readable(size)} of the {readable(free)} that are free in "
                      f"{cache.folder}, and {hours:,.1f} hours on {world_size} ranks", flush=True)
                if size > free:
                    raise UserError(f"{cache.folder}: the teacher's outputs take about {readable(size)}, and {readable(free)} are free "
                                    "there; make room, choose another teacher_cache, a smaller teacher_top_k or fewer steps")
        tensors = {name: torch.cat([outputs[row][name] for row in sorted(outputs)]) for name in tensors}
        _, span = cache.file_from(cache.first_row(path))
        lengths = [len(next(iter(outputs[row].values()))) if row in outputs else 0 for row in span]
        tensors["row_offsets"] = torch.tensor([0, *lengths]).cumsum(0)
        size = sum(tensor.nbytes for tensor in tensors.values())
        with atomic(path, size, "what was filled before is intact: make room and repeat the same command") as tmp:
            save_file(tensors, tmp, metadata={"checksum": cache.checksum(cache.first_row(path), tensors)})
        done += len(rows)
        if rank == 0:
            minutes = (time.time() - started) / done * (total - done) / 60
            print(f"teacher cache: {done:,} rows of this rank kept, {minutes:.1f} min left", flush=True)
