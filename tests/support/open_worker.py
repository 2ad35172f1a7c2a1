"""Open checkpoints as a user of transformers does, by whichever version is imported:  python open_worker.py
JOBS.json OUT

A job is {"folder", "texts"} or {"folder", "ids"}. Results go to OUT.json, one for each job, and their logits
to OUT.npz; a job that fails has its traceback for a result. Imports nothing of this repository."""

import json
import sys
import traceback

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 5
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "bos_token_id", "eos_token_id", "pad_token_id")


def read_texts(folder: str, texts: list[str]) -> tuple[dict, dict]:
    """What the folder's tokenizer makes of `texts`, and its whole output for the first of them, as a model
    takes it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    inputs = dict(tokenizer(texts[0], return_tensors="pt"))
    facts = {
        "class": type(tokenizer).__name__,
        "outputs": sorted(inputs),
        "ids": ids,
        "plain_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "decoded": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "tokens": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token],
        "special": sorted(tokenizer.all_special_tokens),
        "longest": tokenizer.model_max_length,
    }
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": texts[0]}]
        facts["chat"] = tokenizer.apply_chat_template(chat, tokenize=False)
    return facts, inputs


def open_checkpoint(job: dict) -> tuple[dict, np.ndarray]:
    """Facts of one job, and the logits of its ids, or of its first text as the tokenizer gives it.  -> (B, T,
    V)"""
    facts = {}
    if "texts" in job:
        facts, inputs = read_texts(job["folder"], job["texts"])
    else:
        inputs = {"input_ids": torch.tensor(job["ids"])}
    options = {"attn_implementation": job["attention"]} if "attention" in job else {}
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32, **options).eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    if "texts" in job:
        written = model.generate(
            **inputs,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
        facts["generated"] = written[0].tolist()
        usual = transformers.GenerationConfig()
        stated = {key: getattr(model.generation_config, key) for key in SAMPLING}
        facts["generation"] = {key: value for key, value in stated.items() if value != getattr(usual, key)}
    facts["stored"] = str(AutoModelForCausalLM.from_pretrained(job["folder"], dtype="auto").dtype)
    return facts, logits.numpy()


def main(jobs: str, out: str) -> None:
    torch.set_num_threads(1)
    results, arrays = [], {}
    with open(jobs, encoding="utf-8") as file:
        listed = json.load(file)
    for number, job in enumerate(listed):
        try:
            facts, arrays[str(number)] = open_checkpoint(job)
        except Exception:  # whatever a library raises is the result
            facts = {"error": traceback.format_exc()}
        results.append({"version": transformers.__version__, **facts})
    np.savez(f"{out}.npz", **arrays)
    with open(f"{out}.json", "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
