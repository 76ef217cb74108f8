"""
The paper's data, from what lies in data/ to what the configs name: archives unpacked, RLAIF-V converted, d2s mixed, counted.

    python -m tools.prepare                      everything that can be done with what is there; what is missing is listed
    python -m tools.prepare --only=mixture       one part: unpack | link | preferences | mixture | check

    unpack        the archives of config/archives.json, each into its folder. Files that are there already, in their size,
                  are not written again, so an interrupted run continues. Another file in such a place stays, and is named.
    link          folders that are the same pictures under another name
    preferences   RLAIF-V's parquet files (pip install pyarrow) -> data/pd/rlaif_v.json and its pictures
    mixture       data/d2s/mix_1400k.jsonl: 1,400,000 rows for stage d2s, from the files of the official guide
    check         rows of every file of config/datasets.json, images of every archive, against what their sources state

No list of the paper's 1.4M rows is published. Ours is stated here: all rows of InternVL's files, which hold every data set of
Table 10 but ScienceQA; of MobileVLM's file the ScienceQA rows; and to fill up, rows of MobileVLM's file drawn by a hash, but
none of the sources that Table 10 does not name.
"""
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path, PurePosixPath

import numpy as np

from benchmarks.common import need
from configurator import POSITIVE, UserError, check_uses, check_values, load_config, open_regular, reading, run, user_file
from engine.files import atomic, disk_errors, lock, make_folder, read_json, write_json
from engine.index import scan_rows
from tools.download import MIXTURE, count_rows, read_manifest

PARTS = ["unpack", "link", "preferences", "mixture", "check"]
DEFAULTS = dict(
    data="data",                # the folder that the configs call data
    only="",                    # one of PARTS; empty: all of them
    d2s_rows=1_400_000,         # rows of the mixture: the paper's number
)
ARCHIVES = Path(__file__).parents[1] / "config" / "archives.json"
WHOLE = ["sharegpt4v_instruct_gpt4-vision_cap100k.jsonl", "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.jsonl",
         "ai2d_train_12k.jsonl", "dvqa_train_200k.jsonl", "chartqa_train_18k.jsonl", "docvqa_train_10k.jsonl", "synthdog_en.jsonl",
         "geoqa+.jsonl"]
FILLER = "MobileVLM_V2_FT_Mix2M.json"
ALL_OF = ["scienceqa"]                               # of the filler: the first folder of the image's name, in small letters
NONE_OF = ["iconqa", "sbu", "sam", "web-celebrity", "web-landmark", "wikiart", "share_textvqa"]
NOT_WHOLE = "is not a whole archive of a known kind"


def main(argv: list[str]) -> None:
    config = load_config(DEFAULTS, argv)
    check_values(config, {"only": ["", *PARTS], "d2s_rows": POSITIVE})
    check_uses(config, DEFAULTS, [(["d2s_rows"], config.only in ("", "mixture", "check"), "the parts mixture and check")])
    data, manifest = Path(config.data), json.loads(ARCHIVES.read_text(encoding="utf-8"))
    writes = config.only != "check" and os.access(data, os.W_OK)
    with lock(data / "prepare.lock") if writes else nullcontext():   # one run at a time
        for part in PARTS if not config.only else [config.only]:
            print(f"-- {part}")
            if part == "unpack":
                unpack_all(data, manifest["archives"])
            elif part == "link":
                link_all(data, manifest["links"])
            elif part == "preferences":
                convert_preferences(data / "pd")
            elif part == "mixture":
                mix(data, config.d2s_rows)
            else:
                check(data, manifest["archives"], config.d2s_rows)


# -----------------------------------------------------------------------------
# Archives

def unpack_all(data: Path, archives: list[dict]) -> None:
    for entry in archives:
        paths = sorted(data.glob(entry["archive"]))
        if not paths:
            print(f"{data / entry['archive']}: absent; from {entry['from']}")
        for path in paths:
            unpack(path, data / entry["to"], entry["strip"])


def unpack(path: Path, folder: Path, strip: int | str) -> None:
    """PATH.unpacked, written last, says that all of it is there."""
    done = Path(f"{path}.unpacked")
    if done.is_file():
        print(f"{path}: unpacked earlier")
        return
    files, new, ours, others, reported = 0, 0, set(), [], time.time()
    for name, size, read in members(path):
        parts = PurePosixPath(name).parts
        parts = parts[-1:] if strip == "all" else parts[strip:]
        if not parts or name.startswith("/") or ".." in parts:
            continue                                                 # a folder of the archive alone, or no place below ours
        target = folder.joinpath(*parts)
        files += 1
        with reading(path, NOT_WHOLE, "fetch it again"):
            found = put(target, size, read)
        new += found == "nothing"
        if found == "another file" and target not in ours:
            others.append(target)
        else:
            ours.add(target)                                         # an archive may hold a name twice: the first stays
        if time.time() - reported > 5:
            reported = time.time()
            print(f"{path}: {files:,} files", flush=True)
    if others:                                                       # they may be the user's own
        more = f" ({len(others) - 1:,} more like it)" if len(others) > 1 else ""
        raise UserError(f"{others[0]}: is another file than the one in {path}, and was left as it is{more}; move such files "
                        "away and repeat the same command")
    write_json(done, {"to": str(folder), "files": files})
    print(f"{path}: {files:,} files in {folder}, {new:,} of them new")


def put(target: Path, size: int, read: Callable) -> str:
    """Copy what `read` opens to `target`, if nothing is there or only its beginning -> what was there.

    "another file" stays as it is.
    """
    with disk_errors(target, note="what is unpacked already is kept: make room and repeat the same command"):
        if target.is_file() and target.stat().st_size == size:
            return "the file"
        if os.path.lexists(target) and not is_cut_off(target, size, read):
            return "another file"
        with atomic(target, unique=True, flush=False) as tmp, read() as source, open(tmp, "xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    return "nothing"


def is_cut_off(path: Path, size: int, read: Callable) -> bool:
    """Whether a file holds the beginning of what `read` opens, as an interrupted copy does."""
    if not path.is_file() or path.stat().st_size > size:
        return False
    content = path.read_bytes()
    with read() as source:
        return source.read(len(content)) == content


def members(path: Path) -> Iterator[tuple]:
    """(name, size, a function that opens it) of each file of a .zip, .tar or .tar.gz."""
    with user_file(path, NOT_WHOLE, "fetch it again") as file:
        if path.suffix == ".zip":                                    # has a checksum for each of its files
            archive = zipfile.ZipFile(file)
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, lambda info=info: archive.open(info)
            return
        if path.suffix == ".gz":                                     # has one at its end: compared before unpacking
            file = gzip.open(file)
            while file.read(1 << 20):
                pass
            file.seek(0)
        archive = tarfile.open(fileobj=file, mode="r:")
        for info in archive:
            if info.isfile():
                yield info.name, info.size, lambda info=info: archive.extractfile(info)


def link_all(data: Path, links: dict[str, str]) -> None:
    for link, target in links.items():
        link, target = data / link, data / target
        if os.path.lexists(link):
            print(f"{link}: is there")
        elif not target.is_dir():
            print(f"{link}: not yet, {target} is absent")
        else:
            with disk_errors(link):
                make_folder(link.parent)
                link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
            print(f"{link}: a link to {target}")


# -----------------------------------------------------------------------------
# RLAIF-V

def convert_preferences(folder: Path) -> None:
    """question, chosen and rejected as they are, the picture's bytes to images/IMAGE_PATH."""
    target, paths = folder / "rlaif_v.json", sorted(folder.glob("RLAIF-V-Dataset_*.parquet"))
    if target.is_file():
        print(f"{target}: is there, {count_rows(target):,} pairs")
        return
    if not paths:
        print(f"{folder / 'RLAIF-V-Dataset_*.parquet'}: absent; from dataset openbmb/RLAIF-V-Dataset")
        return
    pairs, written = 0, set()
    with atomic(target) as tmp, open(tmp, "w", encoding="utf-8") as file:
        for path in paths:
            for row in parquet_rows(path):
                picture = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
                name = PurePosixPath(row["image_path"] or f"{row['ds_name']}_{row['idx']}.jpg")
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{path}: image_path {row['image_path']!r} leads out of the folder; fetch the file again")
                image = folder / "images" / name
                found = put(image, len(picture), lambda: io.BytesIO(picture))
                if found == "another file" and name not in written:
                    raise UserError(f"{image}: is another picture than the one in {path}; move it away and repeat the same "
                                    "command")
                written.add(name)                                    # rows may have the same one, stored in another way
                pair = {"id": f"{row['ds_name']} {row['idx']}", "image": str(name),
                        **{key: row[key] for key in ("question", "chosen", "rejected", "origin_dataset")}}
                file.write(("[\n" if pairs == 0 else ",\n") + json.dumps(pair, ensure_ascii=False))
                pairs += 1
            print(f"{path}: {pairs:,} pairs so far", flush=True)
        file.write("\n]\n")
    print(f"{target}: {pairs:,} pairs")


def parquet_rows(path: Path) -> Iterator[dict]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    columns = ["ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "idx", "image_path"]
    try:
        file = parquet.ParquetFile(open_regular(path))
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{path}: has no column {missing[0]}, found {', '.join(file.schema_arrow.names)}; is it RLAIF-V's file?")
        for batch in file.iter_batches(batch_size=64, columns=columns):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); fetch it again") from None


# -----------------------------------------------------------------------------
# The mixture of d2s

def mix(data: Path, d2s_rows: int) -> None:
    target = data / Path(MIXTURE).relative_to("data")
    if target.is_file():
        rows = count_rows(target)
        if d2s_rows not in (rows, DEFAULTS["d2s_rows"]):
            raise UserError(f"{target}: is there with {rows:,} rows, this run has d2s_rows={d2s_rows:,}; leave that out, or "
                            "remove the file")
        print(f"{target}: is there, {rows:,} rows")
        return
    paths = [data / "d2s" / name for name in [*WHOLE, FILLER]]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        print(f"{target}: not yet, absent: {', '.join(absent)}")
        return
    with atomic(target) as tmp, open(tmp, "w", encoding="utf-8") as file:
        total = 0
        for path in paths[:-1]:
            count = 0
            for _, _, row in scan_rows(str(path)):
                write_row(file, row)
                count += 1
            total += count
            print(f"{path.name}: all {count:,} rows", flush=True)
        rows = [row for _, _, row in scan_rows(str(paths[-1]))]
        always, chosen = choose([first_folder(row) for row in rows], d2s_rows - total)
        for number in np.sort(np.concatenate([always, chosen])):
            write_row(file, rows[number])
        print(f"{FILLER}: {len(always):,} rows of ScienceQA and {len(chosen):,} of the others, of {len(rows):,}")
    print(f"{target}: {total + len(always) + len(chosen):,} rows")


def write_row(file, row: object) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def first_folder(row: object) -> str:
    image = row.get("image") if isinstance(row, dict) else None
    return image.split("/")[0].lower() if isinstance(image, str) else ""


def choose(folders: list[str], wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the filler that are all taken, and of the others those whose number has the smallest hash."""
    folders = np.array(folders)
    always = np.flatnonzero(np.isin(folders, ALL_OF))
    possible = np.flatnonzero(~np.isin(folders, [*ALL_OF, *NONE_OF]))
    missing = wanted - len(always)
    if not 0 <= missing <= len(possible):
        raise UserError(f"{FILLER}: {wanted:,} rows are wanted of it, and it has {len(always):,} of ScienceQA and {len(possible):,} others "
                        "to choose from; another --d2s_rows?")
    order = np.array([int.from_bytes(hashlib.sha256(b"%d" % number).digest()[:8], "big") for number in possible], np.uint64).argsort()
    return always, possible[order[:missing]]


# -----------------------------------------------------------------------------
# Counting

def check(data: Path, archives: list[dict], d2s_rows: int) -> None:
    """What is there, next to what its source says. Rows and their images, one by one: python -m tools.check."""
    stated = {}
    for entry in read_manifest("all"):
        known, rows, to = stated.get(entry["path"], (True, 0, 1))
        same = entry["stage"] in ("teacher_align",)                  # the same file once more
        stated[entry["path"]] = (known and entry["rows"] is not None, rows + (entry["rows"] or 0) * (not same), max(to, entry["rows_to"] or 1))
    stated[MIXTURE] = (True, d2s_rows, 1)
    for path, (is_known, rows, to) in stated.items():
        found = data / Path(path).relative_to("data")
        expected = f"{'about ' * (to > 1)}{rows:,} expected" if is_known else "its source does not state how many there should be"
        print(f"{found}: " + (f"{count_rows(found):,} rows, {expected}" if found.is_file() else f"absent, {expected}"))
    for entry in archives:
        records = [(path, read_json(path)) for path in sorted(data.glob(entry["archive"] + ".unpacked"))]
        files = sum(need(record, "files", int, str(path)) for path, record in records)
        print(f"{data / entry['archive']}: {files:,} files in {data / entry['to']}" + (f", {entry['images']:,} expected" if entry["images"] else ""))


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
