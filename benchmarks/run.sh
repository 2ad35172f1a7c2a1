#!/usr/bin/env bash
# Runs every benchmark, this repository and its alternative in turns, and writes the tables of benchmarks/README.md.
#   bash benchmarks/run.sh [--size small] [--turns N]      hours on two cores; --size small: minutes, its results are not kept
#   PARTS="batches prepare" bash benchmarks/run.sh          these parts only
#   BENCH_FOLDER=/fast/disk bash benchmarks/run.sh          folder of inputs and outputs (20 GB; default: a temporary folder)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=recipes/setup.sh
source recipes/setup.sh
setup_environment dev
export INHERITUNE_GPT2_BPE="${INHERITUNE_GPT2_BPE:-${INHERITUNE_ROOT:-$PWD}/data/gpt2-bpe}"
bash tests/fetch_gpt2_bpe.sh "$INHERITUNE_GPT2_BPE"
parts=${PARTS:-batches startup downstream checkpoint analyze inherit prepare readers train_step pieces growth}
work=$(mktemp -d "${BENCH_FOLDER:-${TMPDIR:-/tmp}}/inheritune_bench.XXXXXX")
trap 'rm -rf "$work"' EXIT

# mergekit stays out of the environment: only these two packages are missing in requirements.txt
export BENCH_MERGEKIT=${BENCH_MERGEKIT:-$work/mergekit}
case " $parts " in
  *" inherit "*)
    [ -d "$BENCH_MERGEKIT" ] ||
      python -m pip install --quiet --no-deps --target "$BENCH_MERGEKIT" mergekit==0.1.5 immutables==0.21 ||
      echo "mergekit could not be installed: its row is left out"
    ;;
esac

failed=''
for part in $parts; do
  python "benchmarks/$part.py" --folder "$work/$part" "$@" || failed+=" $part"
  rm -rf "${work:?}/$part"
done
python benchmarks/report.py
[ -z "$failed" ] || { echo "these parts failed:$failed" >&2 && exit 1; }
