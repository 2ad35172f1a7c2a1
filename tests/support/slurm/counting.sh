#!/usr/bin/env bash
# A job like those of slurm/, with counting.py for the training: bash counting.sh FOLDER STEPS; COUNTING_SLOTS=1 for an array.
# shellcheck disable=SC2034,SC2154  # array, slots and words are job.sh's
set -euo pipefail
here=$(dirname "$0")
# shellcheck source=slurm/job.sh
source "$here/../../../slurm/job.sh"
defaults train 4
if [ "${COUNTING_SLOTS:-0}" = 1 ]; then array=${ARRAY:-1-4%1} slots=1; fi
read_arguments 2 "FOLDER STEPS" "$@"
start "count ${words[0]} to ${words[1]}"
if [ "$slots" = 1 ]; then work python3 "$here/counting.py" "${words[@]}" --slot; fi
# shellcheck disable=SC2086 # a list of plain words
work $INHERITUNE_LAUNCH python3 "$here/counting.py" "${words[@]}"
