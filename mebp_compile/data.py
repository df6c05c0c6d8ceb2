"""Text to batches: examples, tokens, blocks of a fixed length, batches in a seeded order. Torch is imported where tensors are made, nothing larger.

`tokenise` runs in a child process, whose tokenizer and lists go with it; what stays is a file of token ids from which `TokenFile` reads a block.
"""

from __future__ import annotations

import json
import os
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mebp_compile.errors import DiskError, OptionError

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of tokens that give no loss
BYTE_END = 256  # the token after each example where bytes are tokens
TOKEN_TYPE = "i"  # of `array`: 32 bits
TOKEN_BYTES = 4
Block = tuple[list[int], list[int]]


class ByteTokens:
    """Bytes as tokens, for models without a tokenizer: 0-255, and 256 after each example."""

    eos_token_id = BYTE_END

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))


def read_examples(path: Path) -> list[list[tuple[str, bool]]]:
    """Examples as (text, gives loss) parts. A text file is one; each line of a .jsonl has "text", "prompt" and "completion", or "messages"."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"can't read the data {path}: {error}", "give a UTF-8 .txt or .jsonl file") from error
    if path.suffix != ".jsonl":
        return [[(content, True)]]
    return [_parts(path, number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]


def _parts(path: Path, number: int, line: str) -> list[tuple[str, bool]]:
    try:
        row = json.loads(line)
        if "messages" in row:
            return [(f"{item['role']}: {item['content']}\n", item["role"] == "assistant") for item in row["messages"]]
        if "prompt" in row:
            return [(row["prompt"], False), (row["completion"], True)]
        return [(str(row["text"]), True)]
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{path}, line {number}: not an example ({type(error).__name__}: {error})",
            'write {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}]}',
        ) from error


def blocks(examples: Sequence[Sequence[tuple[str, bool]]], tokens: Any, sequence: int) -> list[Block]:
    """Examples end to end, cut into blocks of `sequence` tokens: (input ids, labels). Blocks in which nothing gives loss are left out."""
    ids: list[int] = []
    labels: list[int] = []
    for example in examples:
        for text, counts in example:
            new = list(tokens.encode(text))
            ids += new
            labels += new if counts else [IGNORED] * len(new)
        end = tokens.eos_token_id
        if end is not None:
            ids.append(end)
            labels.append(end if example and example[-1][1] else IGNORED)
    cuts = [(ids[at : at + sequence], labels[at : at + sequence]) for at in range(0, len(ids) - sequence + 1, sequence)]
    useful = [block for block in cuts if any(label != IGNORED for label in block[1][1:])]
    if not useful:
        raise OptionError(
            f"the data has {len(ids)} tokens: not one block of {sequence} that gives loss", "give more data, or a shorter --sequence"
        )
    return useful


def batches(data: Sequence[Block], batch: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches: the blocks in a new random order each time round."""
    import torch

    order: list[int] = []
    chance = random.Random(seed)
    while True:
        while len(order) < batch:
            order += chance.sample(range(len(data)), len(data))
        chosen, order = order[:batch], order[batch:]
        yield torch.tensor([data[index][0] for index in chosen]), torch.tensor([data[index][1] for index in chosen])


# --- tokens in a file ---


def tokenise(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the blocks of a data file as 32-bit ids, for each block its ids and then its labels; {"blocks": how many}.

    request: data, out (paths), sequence, tokenizer (path of a tokenizers file, or None for bytes).
    """
    tokens = ByteTokens() if request["tokenizer"] is None else FileTokens(Path(request["tokenizer"]))
    found = blocks(read_examples(Path(request["data"])), tokens, request["sequence"])
    try:
        with open(request["out"], "wb") as file:
            for ids, labels in found:
                file.write(array(TOKEN_TYPE, ids).tobytes() + array(TOKEN_TYPE, labels).tobytes())
    except OSError as error:
        raise DiskError(f"can't write the tokens to {request['out']}: {error.strerror}", "free space in the folder that TMPDIR names") from error
    return {"blocks": len(found)}


class FileTokens:
    """The tokenizer of a `tokenizer.json`, by the tokenizers library alone; its end token is the one that tokenizer_config.json beside it names."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise OptionError("a tokenizer file needs the tokenizers library", "install it, or leave the tokenizer out: bytes are tokens") from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            self.eos_token_id = self._end(path.with_name("tokenizer_config.json"))
        except Exception as error:  # the library raises plain Exceptions
            raise OptionError(f"{path} is no tokenizer: {error}", "give a tokenizer.json") from error

    def _end(self, config: Path) -> int | None:
        if not config.is_file():
            return None
        name = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        number: int | None = self._tokenizer.token_to_id(name) if name else None
        return number

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids


class TokenFile(Sequence[Block]):
    """The blocks of a file that `tokenise` wrote, read when they are asked for."""

    def __init__(self, path: Path, sequence: int) -> None:
        self._file = open(path, "rb", buffering=0)
        self._sequence = sequence
        self._count = os.fstat(self._file.fileno()).st_size // (2 * sequence * TOKEN_BYTES)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        size_bytes = 2 * self._sequence * TOKEN_BYTES
        tokens = array(TOKEN_TYPE, os.pread(self._file.fileno(), size_bytes, index * size_bytes)).tolist()
        return tokens[: self._sequence], tokens[self._sequence :]

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


# --- the log ---


class open_log:
    """A context that gives a function writing one JSON line; without a path it writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        try:
            self.file = self.path.open("w", encoding="utf-8") if self.path is not None else None
        except OSError as error:
            raise DiskError(f"can't write the log {self.path}: {error.strerror}", "give a file in a folder that exists") from error
        return self._write

    def _write(self, row: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
