#!/usr/bin/env bash
# Downloads GPT-2's byte-level BPE from PyPI: `bash tests/fetch_gpt2_bpe.sh FOLDER` writes FOLDER/gpt2.tiktoken, for
# INHERITUNE_GPT2_BPE. The source package of openai-whisper has the ranks. It is unpacked, but neither built nor installed.
set -euo pipefail

FOLDER=${1:?usage: fetch_gpt2_bpe.sh FOLDER}
PACKAGE=openai-whisper==20250625
SHA256=306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930

is_whole() { [ -f "$1" ] && echo "$SHA256  $1" | sha256sum --check --status; }

if is_whole "$FOLDER/gpt2.tiktoken"; then
  echo "$FOLDER/gpt2.tiktoken already exists"
  exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# pip builds the package's metadata, for which it downloads setuptools (build isolation)
python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest "$work" "$PACKAGE" >&2
tar -xzf "$work"/*.tar.gz -C "$work" --wildcards --strip-components=3 '*/whisper/assets/gpt2.tiktoken'
if ! is_whole "$work/gpt2.tiktoken"; then
  echo "fetch_gpt2_bpe.sh: $PACKAGE lacks the expected gpt2.tiktoken (sha256 $SHA256)" >&2
  exit 1
fi
mkdir -p "$FOLDER"
mv "$work/gpt2.tiktoken" "$FOLDER/.gpt2.tiktoken.$$"
mv "$FOLDER/.gpt2.tiktoken.$$" "$FOLDER/gpt2.tiktoken"
echo "$FOLDER/gpt2.tiktoken"
