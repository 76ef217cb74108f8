"""
The teacher out of the loop: what it says about every training row, written down once.

A distillation step spends most of its time and memory on a model that does not learn. The teacher is frozen and the rows
come again every epoch, every stage that shares them, and every experiment, so its answers can be kept:

    torchrun --nproc_per_node=16 train.py config/d2s.py --teacher_cache=out/2b/d2s_cache --teacher_top_k=64

The first such run lets the teacher fill the folder, lets it go, and trains; a later one does not load it at all. What is
kept depends on what the loss needs:

    d2d, d2s   per response token the k largest of the teacher's log-probs, their ids, and the log of the mass of all
               others: 8 k + 4 bytes. `losses.forward_kl_top_k` says what the student learns from that.
    pd         per pair two numbers, log p(chosen) and log p(rejected): 8 bytes, and nothing is lost.

The folder holds teacher_cache.json, which says what data and which teacher it was made with, and a safetensors file per
1,024 rows. A file that is there is complete, so an interrupted filling goes on where it stopped. The paper names the memory
of two models at once as a limitation of the method; this is the way around it.
"""
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configurator import UserError
from data import prefetch
from engine.files import read_json, write_text as write_file
from engine.index import RowData

ROWS_PER_PIECE = 1024


def digest_of_folder(folder: str | Path) -> str:
    """Tells two checkpoints apart: their config.json, and of each weight file its size and both ends (a MiB each)."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            size, end = path.stat().st_size, 2**20
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(end))
                file.seek(max(0, size - end))
                digest.update(file.read(end))
    return digest.hexdigest()


class TeacherCache:
    """The folder. cache[row] -> the teacher's tensors for that row of the dataset; a row owns some lines of each.

    made_with: what the numbers depend on; it must be the same whenever the folder is opened (UserError if not). A value
    that is None now is not compared: a complete cache can be used where the teacher is not at hand.
    """

    def __init__(self, folder: str | Path, n_rows: int, made_with: dict[str, object]):
        self.folder, self.n_rows, self.made_with, self.files = Path(folder), n_rows, made_with, {}
        record = self.folder / "teacher_cache.json"
        if record.is_file():
            self.made_with = before = read_json(record)
            for key, now in made_with.items():
                if now is not None and before.get(key) != now:
                    raise UserError(f"{record}: was made with {key}={before.get(key)!r}, this run has {key}={now!r}; "
                                    "choose another teacher_cache folder, or delete this one to fill it again")
        elif None in made_with.values():
            raise UserError(f"{self.folder}: holds no teacher_cache.json, and the teacher that could fill it is not here")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(record, json.dumps(made_with, indent=2))

    def piece(self, start: int) -> tuple[Path, range]:
        """The file that begins with row `start`, and all its rows."""
        return self.folder / f"rows-{start:09d}.safetensors", range(start, min(start + ROWS_PER_PIECE, self.n_rows))

    def missing(self) -> list[tuple[Path, range]]:
        pieces = [self.piece(start) for start in range(0, self.n_rows, ROWS_PER_PIECE)]
        return [(path, rows) for path, rows in pieces if not path.is_file()]

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        path, rows = self.piece(row // ROWS_PER_PIECE * ROWS_PER_PIECE)
        try:
            if path not in self.files:
                file = safe_open(path, framework="pt")
                self.files[path] = (file, file.get_tensor("first_line").tolist())
            file, first_line = self.files[path]
            here = slice(first_line[row - rows.start], first_line[row - rows.start + 1])
            return {name: file.get_slice(name)[here] for name in file.keys() if name != "first_line"}
        except (OSError, SafetensorError, IndexError) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete it, and the teacher writes it again") from None


class RowsWithTeacher:
    """A dataset whose samples carry what the teacher said of them. `collate_with_teacher` joins it, row after row."""

    def __init__(self, dataset: RowData, cache: TeacherCache):
        self.dataset, self.cache = dataset, cache

    def __getitem__(self, row: int) -> dict:
        return self.dataset[row] | {"teacher": self.cache[row]}


def collate_with_teacher(samples: list[dict], collate: Callable) -> dict:
    kept = [sample["teacher"] for sample in samples]
    return collate(samples) | {name: torch.cat([each[name] for each in kept]) for name in kept[0]}


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n, V) -> ids (n, k), their log-probs (n, k), and the log of the mass of all others (n,), -inf if there are none."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    top, ids = logprobs.topk(k, dim=-1)
    return ids, top, logprobs.scatter(1, ids, -torch.inf).logsumexp(-1)


def fill(missing: list[tuple[Path, range]], dataset: RowData, ask: Callable[[dict], tuple[dict[str, torch.Tensor], list[int]]],
         collate: Callable, micro_batch_size: int, num_workers: int, rank: int, world_size: int) -> None:
    """One pass of the teacher over the rows of the missing files, which the ranks share out among them.

    ask(batch) -> the tensors to keep, their lines row after row, and how many lines each row of the batch has.
    """
    mine = missing[rank::world_size]
    batches = []                                                     # of neighbours in length, which saves padding
    for _, rows in mine:
        ordered = sorted(rows, key=lambda row: dataset.lengths[row])
        batches += [ordered[i:i + micro_batch_size] for i in range(0, len(ordered), micro_batch_size)]
    loader = iter(prefetch(dataset, batches, collate, num_workers))
    began, done, batches = time.time(), 0, iter(batches)
    for path, rows in mine:
        answers, lines_of = {}, {}                                   # row -> its part of each tensor, and how long
        while len(answers) < len(rows):
            tensors, lines = ask(next(loader))
            parts = {name: tensor.cpu().split(lines) for name, tensor in tensors.items()}
            for i, row in enumerate(next(batches)):
                answers[row], lines_of[row] = {name: parts[name][i] for name in parts}, lines[i]
        piece = {name: torch.cat([answers[row][name] for row in rows]) for name in parts}
        piece["first_line"] = torch.tensor([0] + [lines_of[row] for row in rows]).cumsum(0)
        beside = path.with_suffix(".tmp")
        save_file(piece, beside)
        os.replace(beside, path)
        done += len(rows)
        if rank == 0:
            left = (time.time() - began) / done * (sum(len(rows) for _, rows in mine) - done)
            print(f"teacher cache: {done:,} rows of this rank kept, {left / 60:.1f} min left", flush=True)
