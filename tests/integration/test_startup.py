"""What the verbs import: libraries that take seconds to load come only where they are used."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from tiny_models import config_of, random_model

HEAVY = ["torch", "transformers", "deepspeed", "datasets", "tokenizers", "matplotlib", "pandas", "numpy"]

PROGRAM = """
import json, os, sys
heavy, verbs = json.loads(sys.argv[1])
for name, arguments in verbs.items():
    reading, writing = os.pipe()
    if not os.fork():
        os.dup2(2, 1)
        from inheritune.cli.program import main
        try:
            main(arguments)
        except SystemExit:
            pass
        os.write(writing, json.dumps([name for name in heavy if name in sys.modules]).encode())
        os._exit(0)
    os.close(writing)
    os.wait()
    print(json.dumps([name, json.loads(os.read(reading, 10000))]), flush=True)
"""
"""One fresh interpreter, which forks a child for each verb."""

VERBS = {
    "--help": (["--help"], []),
    "status": (["status", "quickstart"], []),
    "table --missing": (["table", "table5", "--missing"], ["numpy"]),
    "plan": (["plan", "gpt2_xl_owt"], ["numpy"]),
    "check": (
        ["check", "gpt2_xl_owt"],
        ["torch", "deepspeed", "numpy"],
    ),  # the keys of the installed DeepSpeed
    "prepare, refused": (["prepare", "nosuch"], ["numpy"]),
    "queue": (["queue"], []),
    "submit, refused": (["submit", "nosuch"], []),
    "inherit": (["inherit", "--source", "{source}", "--layers", "0:2", "--out", "{out}"], ["numpy"]),
}
"""{verb: (its arguments, the heavy modules that it uses)}"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("startup")
    random_model(config_of("llama", 3)).save_pretrained(folder / "source")
    places = {"source": folder / "source", "out": folder / "out"}
    verbs = {name: [word.format(**places) for word in words] for name, (words, _) in VERBS.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([HEAVY, verbs])],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
    )
    assert (folder / "out" / "inherited.json").is_file(), done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_imports_only_the_libraries_that_it_uses(imported, verb):
    assert imported[verb] == [name for name in HEAVY if name in VERBS[verb][1]]
