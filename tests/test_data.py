"""Data in a token file: the same blocks and batches as in memory, by bytes or by a tokenizer file, written by a child process."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mebp_compile.data import ByteTokens, FileTokens, TokenFile, batches, blocks, read_examples, tokenise
from mebp_compile.errors import OptionError
from mebp_compile.lean_process import Run, blocks_of


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40)), min_size=1, max_size=8), st.integers(2, 9))
def test_a_token_file_has_the_blocks_of_memory(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], sequence: int) -> None:
    """Ids and labels, ignored ones too, and the batches drawn from them, are those of the lists."""
    folder = tmp_path_factory.mktemp("data")
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows))
    request = {"data": str(data), "out": str(folder / "tokens"), "sequence": sequence, "tokenizer": None}
    try:
        expected = blocks(read_examples(data), ByteTokens(), sequence)
    except OptionError:
        with pytest.raises(OptionError):
            tokenise(request)
        return
    assert tokenise(request) == {"blocks": len(expected)}
    with TokenFile(folder / "tokens", sequence) as found:
        assert list(found) == expected
        drawn = [[part.tolist() for part in batch] for batch in islice(batches(found, 2, 7), 5)]
        assert drawn == [[part.tolist() for part in batch] for batch in islice(batches(expected, 2, 7), 5)]


def test_a_child_tokenises(tmp_path: Path) -> None:
    """The blocks that a lean run reads are those of the data; too little data is the child's OptionError."""
    data = tmp_path / "data.txt"
    data.write_text("some words, and then some more of them")
    with blocks_of(Run(tmp_path, data, 1), 8) as found:
        assert list(found) == blocks(read_examples(data), ByteTokens(), 8)
    with pytest.raises(OptionError, match="not one block"), blocks_of(Run(tmp_path, data, 1), 800):
        pass


def test_a_tokenizer_file(tmp_path: Path) -> None:
    """Ids are the tokenizers library's; the end token is the one that tokenizer_config.json names; another file is an OptionError."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "<end>": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    words.save(str(path))
    assert FileTokens(path).encode("one two three") == [1, 2, 0]
    assert FileTokens(path).eos_token_id is None
    for name in ("<end>", {"content": "<end>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        assert FileTokens(path).eos_token_id == 3
    path.write_text("{}")
    with pytest.raises(OptionError, match="no tokenizer"):
        FileTokens(path)


@pytest.mark.parametrize(("steps", "name"), [(0, "data.txt"), (-1, "data.txt"), (1, "nowhere.txt")])
def test_a_run_of_nothing_is_refused(steps: int, name: str, tmp_path: Path) -> None:
    """No steps, or no data file, is an OptionError."""
    (tmp_path / "data.txt").write_text("x")
    with pytest.raises(OptionError):
        Run(tmp_path, tmp_path / name, steps)
