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
mypy
codespell
mkdocs build --strict --site-dir "$(mktemp -d)"
# two tests at a time: many wait for processes to start or for Slurm
exec python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder -m "$selection" "$@"
