#!/usr/bin/env bash
# Sets up the environment and runs the tests:
#   bash tests/run.sh [pytest arguments]          all tests but those marked slow
#   bash tests/run.sh --all [pytest arguments]    the slow ones too, as CI does
#   bash tests/run.sh -m drill                    the drills; -m real: the tests on a pretrained model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=recipes/setup.sh
source recipes/setup.sh
setup_environment dev
selection="not slow and not drill and not real"
if [ "${1:-}" = --all ]; then
  shift
  selection="not drill and not real"
fi
bpe=${INHERITUNE_ROOT:-$PWD}/data/gpt2-bpe
export INHERITUNE_GPT2_BPE="${INHERITUNE_GPT2_BPE:-$bpe}"
bash tests/fetch_gpt2_bpe.sh "$INHERITUNE_GPT2_BPE" || echo "the tests of the gpt2 tokenizer are skipped: its ranks could not be downloaded"
ruff check .
ruff format --check .
codespell
# These take a minute of one core, which the tests leave idle while they wait for processes or for Slurm. What they find
# is printed at the end.
found=$(mktemp -d)
mypy > "$found/mypy" 2>&1 &
types=$!
mkdocs build --strict --site-dir "$found/site" > "$found/mkdocs" 2>&1 &
documents=$!
trap 'kill $types $documents 2> /dev/null || true; rm -rf "$found"' EXIT
code=0
# three at a time, on two cores too: many wait for processes to start or for Slurm
python -m pytest -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder -m "$selection" "$@" || code=$?
report() { cat "$found/$1" && code=1; }
wait $types || report mypy
wait $documents || report mkdocs
exit $code
