"""Mixtures of sources by weight, duplicates that are left out, and chats."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from test_prepare import contents, decode, experiment, some_texts, write_jsonl
from tiny_tokenizers import write_chat_tokenizer

from inheritune.data import preparation
from inheritune.data.batches import Tokens
from inheritune.data.prepare import prepare
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import Stopped, UserError
from inheritune.files.json_files import read_json
from inheritune.files.rundir import get_data_dir

TEXTS = some_texts(300)
FIRST_SHARD = {"validation": {"first_shard": True}, "shard_tokens": 2_000}


@pytest.fixture(autouse=True)
def _root(tmp_path, monkeypatch):
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)


def prepare_with_stops(chosen, monkeypatch, root, every: int) -> dict[str, str]:
    """The data folder's contents after a preparation that is stopped after `every` batches, again and
    again."""
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    written: list[object] = []
    write = preparation.Preparation._write_batch
    stops = 0
    with monkeypatch.context() as patched:
        patched.setattr(
            preparation.Preparation,
            "_write_batch",
            lambda self, *given: (written.append(self), write(self, *given))[1],
        )
        patched.setattr(
            preparation.signals, "get_stop_signal", lambda: "SIGTERM" if len(written) >= every else None
        )
        while True:
            written.clear()
            try:
                folder = prepare(chosen, 1)
            except Stopped:
                stops += 1
                continue
            assert stops > 1
            return contents(folder)


# --- mixtures -----------------------------------------------------------------------------------------------


def interleave(**weights: float) -> dict:
    """A mixture of web.jsonl and code.csv."""
    parts = {
        "web": {"source": "files", "files": ["web.jsonl"]},
        "code": {"source": "files", "files": ["code.csv"], "text_key": "body"},
    }
    mixed = {name: {**parts[name], "weight": weight} for name, weight in weights.items()}
    return {"source": "interleave", "interleave": mixed}


def test_a_mixture_follows_its_weights_and_resumes(tmp_path, monkeypatch):
    code = ["<code>" + text for text in TEXTS]
    write_jsonl(tmp_path / "web.jsonl", TEXTS)
    pa.csv.write_csv(pa.table({"body": code}), tmp_path / "code.csv")
    pq.write_table(pa.table({"text": code}), tmp_path / "code.parquet")  # whose raw texts are as long
    monkeypatch.setattr(preparation, "MIXED_BATCH_BYTES", 2000)
    mixed = experiment(**interleave(web=0.75, code=0.25), max_tokens=20_000, **FIRST_SHARD)
    folder = prepare(mixed, 1)
    tokenizer, manifest = (
        load_tokenizer(mixed.data, folder / "tokenizer"),
        read_json(folder / "manifest.json"),
    )
    ids = np.concatenate([Tokens(folder, "val").read(0, 2000), Tokens(folder, "train").read(0, 18_000)])
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)
    is_code = [tokenizer._backend.decode(part[:6].tolist()).startswith("<code>") for part in documents]
    share = sum(len(part) for part, code in zip(documents, is_code, strict=True) if code) / 20_000
    assert share == pytest.approx(0.25, abs=0.06)  # a batch holds about a twentieth
    assert [file["name"] for file in manifest["source_files"]] == [
        str(tmp_path / name) for name in ("code.csv", "web.jsonl")
    ]
    # the bytes are those of groups with weights
    groups = {"files": {"web": ["web.jsonl"], "code": ["code.parquet"]}, "weights": {"web": 3, "code": 1}}
    same = prepare(experiment(**groups, max_tokens=20_000, **FIRST_SHARD), 1)
    assert read_json(same / "manifest.json")["splits"] == manifest["splits"]
    assert prepare_with_stops(mixed, monkeypatch, tmp_path / "again", every=4) == contents(folder)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (interleave(web=0.5, code=0.4), "weights of 'interleave' add up to 0.9, not to 1"),
        (interleave(web=-0.5, code=1.5), "greater than 0"),
        (interleave(), "'interleave' .parts with weights. goes with source: interleave"),
        (interleave(web=1.0) | {"files": ["a"]}, "each part has its own 'files'"),
        ({"files": ["a"], "config": "x"}, "'config' is for source: hub without 'files'"),
        ({"source": "embedded", "split": "x"}, "'split' is for source: hub without 'files', or for a folder"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(data, said):
    with pytest.raises(ValidationError, match=said):
        experiment(**data)


def test_a_file_of_two_parts_or_a_part_without_documents_is_refused(tmp_path):
    write_jsonl(tmp_path / "web.jsonl", TEXTS)
    (tmp_path / "code.csv").write_text("body\n")
    with pytest.raises(UserError, match="'code' has a weight and no document"):
        prepare(experiment(**interleave(web=0.5, code=0.5)), 1)
    twice = interleave(web=0.5, code=0.5)
    twice["interleave"]["code"]["files"] = ["web.jsonl"]
    with pytest.raises(UserError, match="web.jsonl belongs to two parts; leave it in one"):
        prepare(experiment(**twice), 1)


def test_old_sections_keep_their_hash():
    """Data that was prepared before these keys existed is found again."""
    assert (
        not {"config", "split", "interleave", "deduplicate"}
        & experiment(files=["a"]).data.preparation().keys()
    )
    assert "deduplicate" in experiment(files=["a"], deduplicate=True).data.preparation()


# --- duplicates ---------------------------------------------------------------------------------------------


def test_repeated_texts_are_left_out_and_counted(tmp_path, monkeypatch):
    repeated = [*TEXTS[:100], *TEXTS[50:150], TEXTS[0] + " ", "", *TEXTS[:10]]
    different = list(dict.fromkeys(repeated))
    write_jsonl(tmp_path / "a.jsonl", repeated)
    write_jsonl(tmp_path / "b.jsonl", different)
    monkeypatch.setattr(preparation, "BATCH_BYTES", 3_000)
    (tmp_path / "hf").mkdir()
    write_chat_tokenizer(tmp_path / "hf")
    facts = {"tokenizer": "hf", **FIRST_SHARD}
    chosen = experiment(files=["a.jsonl"], deduplicate=True, **facts)
    folder = prepare(chosen, 2)
    manifest = read_json(folder / "manifest.json")
    assert manifest["duplicates"] == len(repeated) - len(different)
    expected = read_json(prepare(experiment(files=["b.jsonl"], **facts), 1) / "manifest.json")
    assert manifest["splits"] == expected["splits"] and "duplicates" not in expected
    assert not (folder / "seen.bin").exists()
    assert prepare_with_stops(chosen, monkeypatch, tmp_path / "again", every=3) == contents(folder)


def test_a_repeated_text_is_in_one_part_of_the_split_only(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:80] * 2)
    chosen = experiment(files=["a.jsonl"], deduplicate=True, validation={"fraction": 0.3})
    folder = prepare(chosen, 1)
    tokenizer = load_tokenizer(chosen.data, folder / "tokenizer")
    found = Counter(decode(folder, "train", tokenizer) + decode(folder, "val", tokenizer))
    assert found == Counter(set(TEXTS[:80]))


# --- chats --------------------------------------------------------------------------------------------------


def test_chats_become_the_ids_of_the_chat_template(tmp_path, gpt2_bpe):
    from transformers import AutoTokenizer

    (tmp_path / "hf").mkdir()
    write_chat_tokenizer(tmp_path / "hf")
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes: " + text[:20]}]
        for text in TEXTS[:40]
    ]
    spelled = [{"role": "user", "content": "<|end|>, as a text"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    empty = [{"role": "user", "content": None}]
    refused = [{"role": "user", "content": "Hello"}, 3]
    rows = [*chats, spelled, "no chat, <|end|>", refused, {"role": "user"}, parts, empty]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    pq.write_table(pa.table({"messages": chats}), tmp_path / "a.parquet")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    expected = [
        theirs(theirs.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids
        for chat in chats
    ]
    end = theirs.eos_token_id
    encoder = load_tokenizer(experiment(files=["-"], tokenizer="hf").data)
    plain = encoder.encode_batch(["no chat, <|end|>"])[0].tolist()
    for name, tail in (("a.jsonl", [*plain, end]), ("a.parquet", [])):
        chosen = experiment(
            files=[name],
            text_key="messages",
            tokenizer="hf",
            validation={"first_shard": True},
            shard_tokens=500,
        )
        folder = prepare(chosen, 1)
        tokens = [Tokens(folder, split) for split in ("val", "train")]
        ids = np.concatenate([part.read(0, part.n_tokens) for part in tokens])
        assert ids.tolist() == [*(id for row in expected for id in (*row, end)), *tail]
        bad = read_json(folder / "manifest.json")["bad_documents"]
        assert {defect: entry["count"] for defect, entry in bad.items()} == (
            {
                "chat that spells a special token": 1,
                "chat that the template refuses": 1,
                "chat whose content is a list, which the template prints as Python does": 1,
                "chat with a message that has no content": 1,
                "'messages' is not text": 1,
            }
            if tail
            else {}
        )
    for tokenizer in ("gpt2", "bpe:300"):
        chosen = experiment(files=["a.parquet"], text_key="messages", tokenizer=tokenizer)
        with pytest.raises(UserError, match=f"'messages' holds chats .*'{tokenizer}' has no chat template"):
            prepare(chosen, 1)
        assert not get_data_dir(chosen).exists()


def test_a_template_that_asks_for_the_date_gets_the_same_every_day(tmp_path):
    """As Llama 3.1's, whose text would else hold the day of `prepare`; it falls back to the same date."""
    (tmp_path / "hf").mkdir()
    write_chat_tokenizer(tmp_path / "hf")
    llama = (
        "{%- if strftime_now is defined %}{% set today = strftime_now('%d %b %Y %H:%M') %}"
        "{%- else %}{% set today = '26 Jul 2024' %}{% endif %}"
        "{{- today }}{% for m in messages %}{{ ', ' + m['content'] }}{% endfor %}"
    )
    (tmp_path / "hf" / "chat_template.jinja").write_text(llama)
    encoder = load_tokenizer(experiment(files=["-"], tokenizer="hf").data)
    text = encoder.chat_template.render([{"role": "user", "content": "Hello"}])
    assert text == "26 Jul 2024 00:00, Hello"


@pytest.mark.parametrize("normalized", [True, False])
def test_a_spelling_that_the_tokenizer_turns_into_a_special_token_is_found(tmp_path, normalized):
    """Full-width brackets become plain ones by NFKC, before tokens that are `normalized` are looked for."""
    (tmp_path / "hf").mkdir()
    write_chat_tokenizer(tmp_path / "hf")
    for name, changes in (
        ("tokenizer.json", {"normalizer": {"type": "NFKC"}}),
        ("tokenizer_config.json", {}),
    ):
        file = tmp_path / "hf" / name
        text = file.read_text().replace('"normalized": false', f'"normalized": {json.dumps(normalized)}')
        file.write_text(json.dumps(json.loads(text) | changes))
    encoder = load_tokenizer(experiment(files=["-"], tokenizer="hf").data)
    refused = 0
    for text in ("\uff1c|end|\uff1e, in full width", "<|end|>", "plain"):
        try:
            rendered = encoder.chat_template.render([{"role": "user", "content": text}])
        except ValueError:
            refused += 1
        else:
            assert encoder.encode_batch([rendered])[0].tolist().count(302) == 1
    assert refused == 1 + normalized
