"""
Programs as users start them, but forked from the tests' own process, which has torch and the programs loaded already:
a new Python takes longer to import torch than the tiny runs take to train.
"""
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")


def start(world_size: int | None, work: Callable[[int], None]) -> list[multiprocessing.Process]:
    """`world_size` processes in one process group, each running work(rank), with the environment that torchrun gives;
    None: one process without it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    leader, ranks = FORK.Value("i", 0), []
    for rank in range(world_size or 1):
        output, errors = tempfile.NamedTemporaryFile("w+"), tempfile.NamedTemporaryFile("w+")
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world_size else {}

        def body(rank=rank, output=output, errors=errors, environment=environment) -> None:
            os.setpgid(0, leader.value)                              # 0 for the first: a group of its own
            os.environ.update({key: str(value) for key, value in environment.items()})
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            work(rank)

        process = FORK.Process(target=body)
        process.start()
        process.output, process.errors, process.group = output, errors, leader.value or process.pid
        if not leader.value:
            while os.getpgid(process.pid) != process.pid:            # the others join this group
                time.sleep(0.001)
            leader.value = process.pid
        ranks.append(process)
    return ranks


def ended(ranks: list[multiprocessing.Process], seconds: float = 120) -> tuple[list[int], list[str]]:
    """The exit codes of ranks that end by themselves, and what they printed to stderr."""
    for rank in ranks:
        rank.join(seconds)
        assert rank.exitcode is not None, "a rank hangs"
    return [rank.exitcode for rank in ranks], [Path(rank.errors.name).read_text() for rank in ranks]


def script(program: str, *commands: list[str]) -> Callable[[int], None]:
    """What ranks do that run a program as a script: one command line per rank, or one for all."""
    def work(rank: int) -> None:
        sys.argv = [program, *commands[min(rank, len(commands) - 1)]]
        runpy.run_path(str(ROOT / program), run_name="__main__")
    return work


def train_py(*commands: list[str]) -> Callable[[int], None]:
    return script("train.py", *commands)


class Done(NamedTuple):
    returncode: int            # the first of the ranks' that is not 0
    stdout: str
    stderr: str


def run(arguments: list[str], nproc: int | None = None, program: str = "train.py") -> Done:
    """A program to its end, on `nproc` ranks, or alone."""
    ranks = start(nproc, script(program, arguments))
    codes, errors = ended(ranks, 300)
    output = "".join(Path(rank.output.name).read_text() for rank in ranks)
    return Done(next((code for code in codes if code), 0), output, "".join(errors))
