"""
Downloads weights and data from the Hugging Face Hub, or from any server with the same HTTP interface.

    python -m tools.download --model=Qwen/Qwen1.5-1.8B --to=weights/Qwen/Qwen1.5-1.8B
    python -m tools.download --dataset=liuhaotian/LLaVA-Instruct-150K --files=llava_v1_5_mix665k.json --to=data/teacher
    python -m tools.download --manifest=d2d      only list what that stage trains on, and what is unclear about it
    python -m tools.download --manifest=eval     only list the benchmarks' files, and where they are

Fifteen gigabytes rarely arrive in one go. A file grows as NAME.part and is renamed when its size and hash match the
repository's listing; after any interruption, a kill included, the same command continues. HF_ENDPOINT (or --endpoint)
names another server; HF_TOKEN is sent to that server only, not to the storage hosts that it redirects to.

The interface, as in huggingface_hub 2.4:
    GET /api/models/REPO/tree/REVISION?recursive=true   [{"type", "path", "size", "oid", "lfs": {"oid", "size"}}, ...],
                                                        1,000 a page; the Link header has the next page
    GET /REPO/resolve/REVISION/PATH                     the file; a large one redirects to a storage host
For data sets the addresses begin with /api/datasets/REPO and /datasets/REPO.
"""
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote, urljoin

import requests

from configurator import Stopped, UserError, check_uses, expected, load_config, run
from engine.files import disk_errors, readable
from engine.http import FAILURES, Login, proxies

DEFAULTS = dict(
    model="",                   # a model on the Hub, such as Qwen/Qwen1.5-1.8B
    dataset="",                 # or a data set
    files="",                   # names or patterns, with commas; empty: the files of a model that this code reads
    to="",                      # the folder to put them into
    revision="main",            # a branch, a tag or a commit
    endpoint="",                # another server; empty: HF_ENDPOINT, else https://huggingface.co
    manifest="",                # only list what a stage trains on (all: every stage), or the benchmarks' files (eval)
)
SETTINGS = ["config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json",
            "special_tokens_map.json"]                              # all that a model needs besides weights
SAFETENSORS = ["*.safetensors", "*.safetensors.index.json"]
PICKLES = ["pytorch_model*.bin", "pytorch_model*.bin.index.json"]   # CLIP-L/14-336 has no safetensors
PAUSES = [1, 2, 4, 8, 16]                                           # seconds after each failed attempt in a row
LONGEST_PAUSE = 600                                                 # of those that a server may ask for
LISTING = 1000                                                      # pages at most,
PAGE = 1 << 25                                                      # of so many bytes and
PAGE_TIME = 600                                                     # so many seconds
MIXTURE = "data/d2s/mix_1400k.jsonl"                               # made by tools/prepare.py of d2s's files
MANIFEST = Path(__file__).parents[1] / "config" / "datasets.json"


@dataclass
class File:
    name: str       # path in the repository
    size: int       # bytes
    lfs: bool       # large files are kept in LFS, under another kind of hash
    hash: str       # SHA-256 if lfs, else git's blob SHA-1


# -----------------------------------------------------------------------------
# The repository

class Repository:
    def __init__(self, name: str, endpoint: str, is_dataset: bool = False, revision: str = "main"):
        self.login, self.revision = Login("--endpoint", endpoint, "HF_TOKEN"), quote(revision, safe="")
        self.page = f"{self.login.address}/{'datasets/' if is_dataset else ''}{name}"
        self.api = f"{self.login.address}/api/{'datasets' if is_dataset else 'models'}/{name}"
        self.session = requests.Session()
        self.session.headers["Accept-Encoding"] = "identity"      # sizes and ranges count the file's own bytes
        self.session.auth = self.login

    def get(self, url: str, start: int = 0) -> requests.Response:
        """GET from byte `start`; lost connections, 429 and 5xx are tried again. Returns a 200, 206 or 416."""
        for pause in [*PAUSES, None]:
            try:
                response = self.session.get(url, headers={"Range": f"bytes={start}-"} if start else {}, stream=True,
                                            timeout=(10, 60))     # seconds to connect, and of silence
            except FAILURES as error:                             # its text may hold a signed address
                problem, wait = f"no answer ({type(error).__name__}); check the network, --endpoint{proxies()}", ""
                if isinstance(error, ValueError):                 # an address or a proxy that cannot work
                    break
            else:
                status, wait = response.status_code, response.headers.get("Retry-After", "")
                if status in (200, 206, 416):
                    return response
                response.close()
                problem = f"status {status}; {self.advice(status)}"
                if status != 429 and status < 500:
                    break
            if pause is not None:
                pause = max(pause, int(wait) if re.fullmatch("[0-9]{1,18}", wait) else 0)
                if pause > LONGEST_PAUSE:
                    raise UserError(f"{url}: {problem}, in {pause:,} s as the server asks")
                print(f"{url}: {problem}; trying again in {pause} s", flush=True)
                time.sleep(pause)
        raise UserError(f"{url}: {problem}")

    def advice(self, status: int) -> str:
        refused = f"check the name; if {self.page} is private or gated, accept its terms there and set HF_TOKEN"
        if self.login.key:
            refused = ("the server does not accept HF_TOKEN, which may be expired or revoked: renew it, or unset it "
                       "for a public repository")
        return {
            401: refused,
            403: f"HF_TOKEN may not read this; accept the terms on {self.page} with that account, or use another token",
            404: "check the name and --revision; for a data set write --dataset=NAME",
        }.get(status, "if that lasts, run the same command again later")

    def files(self) -> list[File]:
        """All pages of the listing, unless it repeats itself or does not end."""
        files, url, seen = {}, f"{self.api}/tree/{self.revision}?recursive=true", set()
        while url:
            seen.add(url)
            response = self.get(url)
            try:
                with response:
                    entries = [read_entry(entry) for entry in json.loads(read_page(response))]
                    files |= {file.name: file for file in entries if file is not None}
            except (*FAILURES, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{url}: no complete listing ({type(error).__name__}); check --endpoint, or run the "
                                "same command again") from None
            url = urljoin(url, response.links["next"]["url"]) if "next" in response.links else None
            if url in seen or len(seen) == LISTING:
                raise UserError(f"{url}: the listing does not end ({len(seen)} pages, {len(files):,} files); check "
                                "--endpoint")
        return list(files.values())


def read_page(response: requests.Response) -> bytes:
    content, deadline = b"", time.monotonic() + PAGE_TIME
    for chunk in response.iter_content(1 << 16):
        content += chunk
        if len(content) > PAGE or time.monotonic() > deadline:
            raise ValueError("too long")
    return content


def read_entry(entry: dict) -> File | None:
    """An entry of a listing; None for a folder."""
    if entry["type"] != "file":
        return None
    content = entry.get("lfs") or entry
    if type(content["size"]) is not int or content["size"] < 0 or not isinstance(content["oid"], str):
        raise TypeError("not a size and a hash")
    return File(entry["path"], content["size"], content is not entry, content["oid"])


def choose(files: list[File], patterns: list[str]) -> list[File]:
    """The files that match the patterns; without patterns, those of a model that this code reads."""
    def matching(patterns: list[str], files: list[File]) -> list[File]:
        return [file for file in files if any(fnmatch(file.name, pattern) for pattern in patterns)]

    for pattern in patterns:
        if not matching([pattern], files):
            names = ", ".join(file.name for file in files[:20])
            raise UserError(f"--files: nothing matches {pattern!r}; the first files there are {names}")
    if patterns:
        return matching(patterns, files)
    top = [file for file in files if "/" not in file.name]        # not onnx/, not original/
    weights = matching(SAFETENSORS, top) or matching(PICKLES, top)
    if not weights:
        raise UserError("found neither *.safetensors nor pytorch_model*.bin; name the files with --files")
    return matching(SETTINGS, top) + weights


def local_path(folder: Path, name: object) -> Path:
    """The place of a listed file, always below `folder`: a listing is not to be trusted."""
    parts = name.split("/") if isinstance(name, str) and name.isprintable() and "\\" not in name else [""]
    if any(part in ("", ".", "..") or re.match("[A-Za-z]:", part) for part in parts):
        raise UserError(f"the listing has a file {name!r}, not a plain path below --to; nothing was downloaded")
    path = folder.joinpath(*parts)
    for target in (path, part_of(path)):
        if not Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder)):
            raise UserError(f"{target}: a symbolic link leads out of {folder}; remove it (nothing was downloaded)")
        if os.path.lexists(target) and not target.is_file():
            raise UserError(f"{target}: is in the way, and no file; remove it (nothing was downloaded)")
    return path


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


# -----------------------------------------------------------------------------
# One file

def is_complete(path: Path, file: File) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size)
    with open(path, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == file.hash


def fetch(repository: Repository, file: File, path: Path) -> None:
    """Download one file to `path`, unless it is there.

    The .part is locked while it grows, so that a second process waits and then finds the finished file. An flock ends
    with its process: none is ever left over.
    """
    part, note = part_of(path), "already here, size and hash are right"
    with disk_errors(path, note="make room or check --to; the same command continues"):
        while not is_complete(path, file):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab", buffering=0) as out:
                try:
                    fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"{path}: waiting for another process that downloads it", flush=True)
                    fcntl.flock(out, fcntl.LOCK_EX)
                if not part.exists() or not os.path.samestat(os.fstat(out.fileno()), part.stat()):
                    continue                                      # renamed or deleted meanwhile: look again
                note = "replaced, its content was not the repository's" if path.exists() else "downloaded"
                receive(repository, file, out, path)
                if not is_complete(part, file):
                    part.unlink()
                    raise UserError(f"{path}: the content does not match the hash of the listing; deleted, download "
                                    "it again")
                os.replace(part, path)
    print(f"{path}: {note} ({file.size / 1e6:,.1f} MB)", flush=True)


def receive(repository: Repository, file: File, out, path: Path) -> None:
    """Append to the open .part until it has the file's size. Only attempts that bring nothing new count as failed."""
    url = f"{repository.page}/resolve/{repository.revision}/{quote(file.name)}"
    furthest, failed = -1, 0
    while True:
        have = os.fstat(out.fileno()).st_size
        if have > file.size:                                      # the beginning of another version
            out.truncate(have := 0)
        if have == file.size:
            return
        if have > furthest:
            furthest, failed = have, 0
        elif failed < len(PAUSES):
            time.sleep(PAUSES[failed])
            failed += 1
        else:
            raise UserError(f"{url}: breaks off again and again (at byte {furthest:,} of {file.size:,}); try later")
        missing, free = file.size - have, shutil.disk_usage(path.parent).free
        if free < missing:
            raise UserError(f"{path}: needs {readable(missing)}, free are {readable(free)}; make room or choose "
                            "another --to")

        with repository.get(url, start=have) as response:
            if response.status_code == 200:                       # the whole file, although we asked for the rest
                have = 0
            elif response.headers.get("Content-Range") != f"bytes {have}-{file.size - 1}/{file.size}":
                out.truncate(0)                                   # 416, or another piece: start over
                continue
            check_answer(url, response, file.size - have)         # before what we have is truncated
            out.truncate(have)
            try:
                copy(response, out, file, have)
            except FAILURES:
                pass                                              # go on from what has arrived


def check_answer(url: str, response: requests.Response, size: int) -> None:
    kind, length = response.headers.get("Content-Type", ""), response.headers.get("Content-Length", str(size))
    if "html" in kind:
        raise UserError(f"{url}: the answer is a web page ({kind}), not the file; check --endpoint, and whether the "
                        "network wants a login")
    if length != str(size):
        raise UserError(f"{url}: has {length} bytes where the listing promises {size}; has the repository changed? "
                        "Run the same command again")


def copy(response: requests.Response, out, file: File, have: int) -> None:
    """Write the answer to `out`, which holds `have` bytes, and show progress in a terminal."""
    began, start, shown = time.monotonic(), have, 0.0
    for chunk in response.iter_content(1 << 16):
        chunk = memoryview(chunk)[:file.size - have]              # never more than the file's size
        have += len(chunk)
        while chunk:
            chunk = chunk[out.write(chunk):]
        seconds = time.monotonic() - began
        if sys.stderr.isatty() and (seconds - shown > 0.5 or have == file.size):
            shown = seconds
            print(f"\r{progress(file, have, have - start, seconds)}\033[K", end="\n" if have == file.size else "",
                  file=sys.stderr, flush=True)
        if have == file.size:
            return


def progress(file: File, have: int, new: int, seconds: float) -> str:
    """File, MB, MB/s, time left; `new` bytes arrived in `seconds`, the others in an earlier run."""
    speed = max(new, 1) / max(seconds, 1e-3)
    left = int((file.size - have) / speed)
    return (f"{file.name}  {have / 1e6:,.1f} of {file.size / 1e6:,.1f} MB  {speed / 1e6:,.1f} MB/s  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")


# -----------------------------------------------------------------------------
# The manifest, config/datasets.json: the data sets of every stage

def read_manifest(stage: str) -> list[dict]:
    entries = json.loads(MANIFEST.read_text(encoding="utf-8"))["datasets"]
    stages = list(dict.fromkeys(entry["stage"] for entry in entries))
    if stage not in [*stages, "all"]:
        raise expected("--manifest", stage, f"all, eval or one of {', '.join(stages)}")
    return [entry for entry in entries if stage in (entry["stage"], "all")]


def show_manifest(stage: str) -> None:
    if stage == "eval":
        for entry in json.loads(MANIFEST.with_name("eval.json").read_text(encoding="utf-8"))["files"]:
            there = "" if list(Path("data/eval").glob(entry["path"])) else "  (absent)"
            print(f"{entry['benchmark']}: data/eval/{entry['path']}{there}\n    from  {entry['from']}")
            if entry["note"]:
                print(f"    note  {entry['note']}")
        return
    for entry in read_manifest(stage):
        print(f"{entry['stage']}: {entry['name']}" + ("" if Path(entry["path"]).is_file() else "  (absent)"))
        for key in list(entry)[2:]:                               # after stage and name
            if entry[key] is not None and key != "rows_to":
                print(f"    {key:<12} {rows_of(entry) if key == 'rows' else entry[key]}")


def rows_of(entry: dict) -> str:
    if entry["rows"] is None:
        return "(rows unknown)"
    return f"{'about ' if entry['rows_to'] > 1 else ''}{entry['rows']:,}"


def check_manifest(stage: str, data: str, root: str | Path = ".") -> list[str]:
    """For a dry run: which files of `data` are on disk, what the manifest says of them, and what `data` leaves out."""
    lines, entries = [], read_manifest("all")
    paths = [re.sub(r"(\.jsonl?):[^:]*$", r"\1", item.strip()) for item in data.split(",")]   # a weight may follow
    for path in paths:
        found, here = Path(root, path), [entry for entry in entries if entry["path"] == path]
        here = [entry for entry in here if entry["stage"] == stage] or here    # sft trains on files of other stages
        size = f"{found.stat().st_size / 1e6:,.1f} MB, {count_rows(found):,} rows" if found.is_file() else "absent"
        parts = ", ".join(f"{entry['name']} {rows_of(entry)}" for entry in here)
        if len(here) > 1 and None not in [entry["rows"] for entry in here]:
            parts += f", together {sum(entry['rows'] for entry in here):,}"
        what = "the mixture of python -m tools.prepare, 1,400,000 rows" if path == MIXTURE else "not a file of the paper"
        lines.append(f"{path}: {size}; {'expected: ' + parts if here else what}")
        for unclear in dict.fromkeys(entry["unclear"] for entry in here if entry["unclear"]):
            names = ", ".join(entry["name"] for entry in here if entry["unclear"] == unclear)
            lines.append(f"    unclear of {names}: {unclear}")
    others = [entry["name"] for entry in entries if entry["stage"] == stage and entry["path"] not in paths and MIXTURE not in paths]
    if others:
        lines.append(f"in the paper's {stage} but not in data: {', '.join(others)}; see python -m tools.download "
                     f"--manifest={stage}")
    return lines


def count_rows(path: Path) -> int:
    """Rows of a .json or .jsonl file without parsing it.

    Every row has one key "conversations", or "chosen" if it is a pair. Text never looks like a key, since a quote
    inside JSON text is escaped.
    """
    if not path.stat().st_size:
        return 0                                                  # which mmap refuses
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return sum(1 for _ in re.finditer(rb'"(?:conversations|chosen)"\s*:', content))


# -----------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    config = load_config(DEFAULTS, argv)
    of_a_download = [key for key in DEFAULTS if key != "manifest"]
    check_uses(config, DEFAULTS, [(of_a_download, not config.manifest, "a download, without --manifest")])
    if config.manifest:
        return show_manifest(config.manifest)
    name, patterns = config.model or config.dataset, [item.strip() for item in config.files.split(",") if item.strip()]
    endpoint = config.endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if bool(config.model) == bool(config.dataset) or not config.to:
        raise UserError("give --model=NAME or --dataset=NAME, and --to=FOLDER; or --manifest=STAGE")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name:
        raise expected("--model" if config.model else "--dataset", name, "OWNER/NAME as on the Hub")
    if config.dataset and not patterns:
        raise UserError(f"--dataset={name}: name its files with --files; --manifest=all lists those that we use")

    repository = Repository(name, endpoint, bool(config.dataset), config.revision)
    try:
        listing = repository.files()
        paths = {file.name: local_path(Path(config.to), file.name) for file in listing}      # all, before any is fetched
        for file in choose(listing, patterns):
            fetch(repository, file, paths[file.name])
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; what has arrived is kept in {config.to}, the same command continues",
                      exit_code=130) from None


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
