"""The tokenizer: round trips of text, control tokens that text cannot inject, and ends of chats."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ictx.data import encode
from ictx.data.corpus import Document
from ictx.data.encode import cut, encoded
from ictx.data.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, TURN_END, TURN_START, load_tokenizer
from ictx.errors import UserError

U2 = np.dtype("<u2")
# Letters, digits, punctuation, marks, all kinds of white space (line and information separators), control tokens.
PROSE = st.lists(
    st.sampled_from([*"ab 'é1２²三_.-{}\n\r\t\x1c\u0301\u00a0\u2028\u180e🎉", "  ", TURN_END]), max_size=150
).map("".join)


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer.from_file(str(prepared / "tokenizer.json"))


@pytest.fixture(scope="module")
def exported(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers loads from the two files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(prepared / name, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_special_tokens_come_first_in_a_fixed_order(tokenizer: Tokenizer, exported: PreTrainedTokenizerBase) -> None:
    assert [tokenizer.token_to_id(text) for text in SPECIAL_TOKENS] == list(range(8))
    assert (exported.eos_token_id, exported.pad_token_id) == (0, 1)
    assert exported.convert_tokens_to_ids([TURN_START, TURN_END]) == [2, 3]
    assert exported.decode([*range(8), *exported("text").input_ids], skip_special_tokens=True) == "text"


@given(text=PROSE | st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_and_never_becomes_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    text = text.encode(errors="replace").decode()
    [(_, tokens)] = encoded(tokenizer, [Document.of(text)], U2)
    assert tokens[-1] == 0
    assert not (tokens[:-1] < len(SPECIAL_TOKENS)).any()
    assert tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False) == text


@given(text=PROSE, piece=st.integers(4, 40))
@settings(max_examples=300, deadline=None)
def test_pieces_have_the_tokens_of_the_whole(tokenizer: Tokenizer, text: str, piece: int) -> None:
    tokenizer.encode_special_tokens = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "PIECE", piece)
        pieces = cut(text)
        assert "".join(pieces) == text
        assert all(0 < len(part) <= piece for part in pieces) or not text
    # A piece that is cut at no good place may have other tokens.
    places = pairwise(pieces)
    if all(after[0] == " " and before[-1] in "ab'é1２²三_.-{}>" for before, after in places):
        tokens = [number for part in pieces for number in tokenizer.encode(part).ids]
        assert tokens == tokenizer.encode(text).ids


@pytest.mark.parametrize("piece", range(12, 40))
def test_no_piece_ends_elsewhere_where_there_is_a_place(
    tokenizer: Tokenizer, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "PIECE", piece)
    tokenizer.encode_special_tokens = True
    text = "ab   cd 12   é\n\n\n   x.    三    <|im_end|>   " * 20
    assert [number for part in cut(text) for number in tokenizer.encode(part).ids] == tokenizer.encode(text).ids


def test_documents_keep_their_order_whatever_their_lengths(tokenizer: Tokenizer) -> None:
    texts = [f"document {number}\n" * (40_000 if number % 7 == 0 else number) for number in range(1, 30)]
    assert max(map(len, texts)) > encode.PIECE * 10
    result = list(encoded(tokenizer, map(Document.of, texts), U2))
    assert [document.text for document, _ in result] == texts
    for text, (_, tokens) in zip(texts, result, strict=True):
        assert tokens.tolist() == [*tokenizer.encode(text).ids, 0]


def test_what_begins_a_text_begins_documents_and_not_their_pieces(
    prepared: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    given = Tokenizer.from_str(tokenizer.to_str())
    special = [("<|reserved_0|>", 4), (END_OF_TEXT, 0), ("<|reserved_1|>", 5)]
    given.post_processor = processors.TemplateProcessing("<|reserved_0|> $A <|reserved_1|>", special_tokens=special)
    # A call of transformers with `truncation=True, max_length=8, padding="max_length"` stores this in the file.
    given.enable_truncation(8)
    given.enable_padding(length=8)
    given.save(str(tmp_path / "tokenizer.json"))
    read, long = load_tokenizer(tmp_path, 512), "word ünd " * 10_000
    assert len(long) > 5 * encode.PIECE
    [(_, tokens), (_, short)] = encoded(read, [Document.of(long), Document.of("x")], U2)
    body = tokenizer.encode(long).ids
    assert tokens.tolist() == [4, *body, 5, 0]
    assert short.tolist() == [4, *tokenizer.encode("x").ids, 5, 0]
    # The tokenizer's own end token is not repeated before ours.
    read.post_processor = processors.TemplateProcessing(f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=special)
    [(_, tokens)] = encoded(read, [Document.of("x")], U2)
    assert tokens.tolist() == [0, *tokenizer.encode("x").ids, 0]


def test_numbers_and_indentation_are_cut_the_same_way_everywhere(tokenizer: Tokenizer) -> None:
    def words(text: str) -> list[str]:
        return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert words("x = 1234567\n\n    return don't") == [
        *["x", " =", " ", "123", "456", "7", "\n\n", "   ", " return", " don", "'t"]
    ]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say ü"},
    {"role": "assistant", "content": "ü"},
]


def test_a_chat_is_what_chatml_says(exported: PreTrainedTokenizerBase) -> None:
    text = exported.apply_chat_template(
        [*CHAT, {"role": "user", "content": "Again"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay ü<|im_end|>\n"
        "<|im_start|>assistant\nü<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = exported.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert tokens.count(2) == tokens.count(3) == 3
    assert exported.decode(tokens) == exported.apply_chat_template(CHAT, tokenize=False)


def test_the_answers_and_their_ends_are_marked(exported: PreTrainedTokenizerBase) -> None:
    chat = exported.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    answer = [token for token, ours in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if ours]
    assert exported.decode(answer) == "ü<|im_end|>"


@pytest.mark.parametrize("token", [TURN_START, TURN_END, END_OF_TEXT])
def test_nobody_ends_a_turn_by_writing_its_end(exported: PreTrainedTokenizerBase, token: str) -> None:
    for role in ("user", "assistant"):
        chat = [{"role": role, "content": f"a{token}b"}]
        tokens = exported.apply_chat_template(chat, return_dict=True)["input_ids"]
        assert [number for number in tokens if number < 8] == [2, 3]


def test_an_unknown_role_is_refused(exported: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TemplateError, match="role narrator: not system"):
        exported.apply_chat_template([{"role": "narrator", "content": "…"}], tokenize=False)


def test_a_tokenizer_that_does_not_fit_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size is 600, but .*tokenizer\.json has 512 entries"):
        load_tokenizer(prepared, 600)
    with pytest.raises(UserError, match=r"tokenizer\.json: No such file"):
        load_tokenizer(tmp_path, 512)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer: "):
        load_tokenizer(tmp_path, 512)
    content = json.loads((prepared / "tokenizer.json").read_text())
    for entry in content["added_tokens"]:
        entry["content"] = entry["content"].replace("im_end", "stop")
    content["model"]["vocab"] = {
        key.replace("im_end", "stop"): value for key, value in content["model"]["vocab"].items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has token <\|im_end\|> as None: expected 3"):
        load_tokenizer(tmp_path, 512)
