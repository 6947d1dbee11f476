"""`nano-moe VERB …`: find the verb's file, parse, run, and turn faults into one line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from nano_moe.errors import TRACEBACK, SaidElsewhere, UserError

VERBS = {
    "train": "train a recipe into a new run folder",
    "resume": "go on with a stopped run, exactly where it was, or train imported weights",
    "eval": "score a run on the whole validation split",
    "sample": "continue a prompt with a trained run",
    "compare": "runs side by side at equal tokens, FLOPs and seconds",
    "tensorboard": "runs, or those of a study, side by side in the browser",
    "break-even": "the share of dense runs' tokens and time that sparse runs need",
    "explore": "see runs at work: a page on this machine",
    "report-html": "the same page as one file that stands alone",
    "study": "published claims, tested by runs and read by rules fixed before them",
    "count": "parameters, FLOPs and bytes of a recipe or a published model",
    "show": "the resolved recipe, after base and overrides",
    "export": "a run as a Hugging Face folder or a GGUF file",
    "import": "a Hugging Face folder as a run, to score or to train on",
    "prepare": "read, split and tokenize a recipe's text",
    "bench": "time layers, steps, other libraries, the optimizer, the input or the explorer here",
}

OUT_OF_MEMORY = "out of memory; lower trainer.batch_size, model.context or the model's sizes"
WRITERS = ("train", "resume", "prepare")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose faults are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what is half written goes.

    In training it does more (`training/signals.py`).
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status: 0 done, 1 or 2 failed, 128 + n stopped by signal n."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character gets a "?"
    # A background writer's fault shows up again where the main thread writes.
    threading.excepthook = lambda _: None
    try:
        with terminable():
            return _dispatch(arguments)
    except SaidElsewhere:
        return 2
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if arguments[0] in WRITERS else 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}; check the path, its rights and the disk")
    except MemoryError:
        return _fail(OUT_OF_MEMORY)
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
    except Exception as error:
        if "allocate memory" in str(error) or "out of memory" in str(error):  # as torch says it
            return _fail(OUT_OF_MEMORY)
        if TRACEBACK in os.environ:
            raise
        what = f"{type(error).__name__}: {error}"
        return _fail(f"{what[:300]}; not foreseen, set {TRACEBACK}=1 to see where", status=1)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: nano-moe VERB …   (each verb has --help)\n")
        print("\n".join(f"  {verb:<13}{text}" for verb, text in VERBS.items()))
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"nano-moe {verb}: no such verb; there are {', '.join(VERBS)}")
    module = importlib.import_module(f"nano_moe.cli.{verb.replace('-', '_')}")
    parser = OneLineParser(prog=f"nano-moe {verb}", description=VERBS[verb])
    module.configure(parser)
    parsed = parser.parse_intermixed_args(rest)
    parsed.arguments = arguments  # what starts another process of the same training
    return module.run(parsed) or 0


def _fail(message: str, status: int = 2) -> int:
    sys.stderr.write("error: " + " ".join(message.splitlines()) + "\n")
    return status
