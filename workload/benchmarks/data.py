"""Speed of tokenization, compared with the tokenizers library alone, and of the loader, on local text.

    python workload/benchmarks/data.py [--corpus PATH …] [--megabytes 20] [--rounds 3]

Ours is the whole last pass of `ictx data prepare`: reading, deduplication, encoding, counting, checksums, writing. The
library alone reads the same files and encodes them, in batches of 1,000 documents or all at once, without writing. Each
runs in a separate process, alternating; the best round of each counts. Exits with status 1 if ours is slower than 0.9 ×
the faster of the library's two.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ictx.data.config import DataConfig
from ictx.data.corpus import Corpus, Summary
from ictx.data.prepare import write_tokens
from ictx.data.shards import Shard, TokenArray
from ictx.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

LEAST = 0.9
CONFIG = DataConfig(vocab_size=8192, min_bytes=0)
BATCHES = {"library, 1,000 at once": 1000, "library, all at once": 1 << 30}
OURS = "ictx data prepare"


def library(files: list[Path], tokenizer: Tokenizer, batch: int) -> int:
    """Returns the number of tokens in the files."""
    tokens = 0
    for start in range(0, len(files), batch):
        texts = [file.read_bytes().decode() for file in files[start : start + batch]]
        tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts))
    return tokens


def ours(folder: Path, tokenizer: Tokenizer) -> int:
    """Returns the number of tokens in the files, without the ends of documents."""
    found = Summary(**json.loads((folder / "found.json").read_text()))
    with tempfile.TemporaryDirectory() as out:
        meta = write_tokens(Corpus([str(folder / "corpus")], CONFIG), found, tokenizer, Path(out), CONFIG)
    return int(meta["train_tokens"] + meta["validation_tokens"] - found.documents)


def measure(way: str, folder: Path) -> dict[str, float]:
    """Tokenises the files of `folder`/corpus once and returns seconds, tokens and this process's peak memory in MiB."""
    tokenizer = load_tokenizer(folder, CONFIG.vocab_size)
    tokenizer.encode_special_tokens = True
    start = time.monotonic()
    if way == OURS:
        tokens = ours(folder, tokenizer)
    else:
        tokens = library(sorted((folder / "corpus").iterdir()), tokenizer, BATCHES[way])
    seconds = time.monotonic() - start
    return {"seconds": seconds, "tokens": tokens, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measured_apart(way: str, folder: Path) -> dict[str, float]:
    """Returns the result of `measure` in a separate process."""
    command = [sys.executable, __file__, "--measure", way, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def collect(corpus: list[str], most: int, folder: Path) -> Summary:
    """Copies distinct documents of `most` bytes in total to files in `folder`/corpus, and trains the tokenizer."""
    (folder / "corpus").mkdir()
    size = 0
    for number, document in enumerate(Corpus(corpus, CONFIG).documents()):
        (folder / "corpus" / f"{number:06}.txt").write_bytes(document.text.encode())
        size += document.bytes
        if size >= most:
            break
    copied = Corpus([str(folder / "corpus")], CONFIG)
    found = copied.scan()
    (folder / "found.json").write_text(json.dumps(asdict(found)))
    save_tokenizer(train_tokenizer((document.text for document in copied.documents()), CONFIG.vocab_size), folder)
    return found


def tokenising(arguments: argparse.Namespace) -> float:
    """Prints the speed of each way; returns our speed relative to the library alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = collect(arguments.corpus, arguments.megabytes * 1_000_000, folder)
        print(f"{found.documents:,} documents, {found.bytes / 1e6:.1f} MB of text, {CONFIG.vocab_size:,} entries")
        rounds = [{way: measured_apart(way, folder) for way in (*BATCHES, OURS)} for _ in range(arguments.rounds)]
    best = {way: min((each[way] for each in rounds), key=lambda result: result["seconds"]) for way in rounds[0]}
    print(f"{'':24}{'MB/s':>8}{'tokens':>12}{'peak MiB':>10}")
    for way, result in best.items():
        rate = found.bytes / 1e6 / result["seconds"]
        print(f"{way:24}{rate:8.2f}{result['tokens']:12,.0f}{result['peak']:10,.0f}")
    return min(best[way]["seconds"] for way in BATCHES) / best[OURS]["seconds"]


def loading() -> None:
    """Prints the tokens per second of the loader, for short and long sequences."""
    # Imports torch, which must not count in the memory measured for tokenization.
    from ictx.data.loader import Batches

    random = np.random.default_rng(0)
    shards = []
    for _ in range(4):
        # Realistic lengths of documents: many short ones, few long ones.
        ends = np.cumsum(random.lognormal(6, 1.5, 8000).astype(np.int64) + 1)
        shards.append(Shard(random.integers(0, 65536, ends[-1], dtype=np.uint16), ends))
    data: Any = TokenArray(shards, {})
    print(f"loader: {len(data):,} tokens in {sum(len(shard.ends) for shard in shards):,} documents")
    for length, batch in ((4096, 16), (32768, 4), (1 << 20, 1)):
        loader, start = Batches(data, length, batch, 0, 1, 0), time.monotonic()
        loader.next()
        first = time.monotonic() - start
        start, steps = time.monotonic(), 0
        while time.monotonic() - start < 2:
            loader.next()
            steps += 1
        rate = steps * batch * length / (time.monotonic() - start)
        print(f"  {batch:2} × {length:9,}: {rate / 1e6:7.1f} million tokens/s, first batch {first * 1000:.0f} ms")


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [sysconfig.get_path("stdlib"), "/usr/share/doc"]
    parser.add_argument("--corpus", nargs="+", default=[path for path in default if Path(path).exists()])
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return 0
    relation = tokenising(arguments)
    print(f"{OURS} is {relation:.2f} × as fast as the library alone: at least {LEAST} is required")
    loading()
    return 0 if relation >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
