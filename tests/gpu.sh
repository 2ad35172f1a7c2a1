#!/usr/bin/env bash
# Tests and measures what only a GPU can show, on a machine with one or several. It takes about 25 minutes, in slices of less than
# 10 minutes. Finished slices are not run again.
#   bash tests/gpu.sh                     runs all slices that are not done, then writes the summary
#   bash tests/gpu.sh runs resume         runs these slices only
#   GPU_SH_ON_CPU=1 bash tests/gpu.sh     tries the script with a toy on two CPU ranks; its numbers are no results
#
# Slices:
#   facts          GPU and driver; prepares the data
#   runs           bf16 training at ZeRO 1 and 3
#   resume         a run stopped by a signal and resumed
#   resize         a run resumed at ZeRO 3 instead of 1, on one GPU
#   memory         measured peaks alongside those of `plan`
#   variants       the gain of each choice within a training step (benchmarks/step_variants.py)
#   bench_medium, bench_large, bench_xl24, bench_llama13
#                  a step alongside a plain compiled loop and HF Trainer (benchmarks/train_step.py)
# The summary for a report is $GPU_OUT/summary.md.
#   GPU_OUT=folder      folder of all files (default: gpu_results under $INHERITUNE_ROOT, or here); delete it to start over
#   GPUS=N GPU_TURNS=1  GPUs to use (default: all), turns of the benchmark
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=recipes/setup.sh
source recipes/setup.sh
python3 -c 'import torch, deepspeed, transformers, fire, xxhash' 2> /dev/null || setup_environment dev
python() { command python3 "$@"; }

on_cpu=${GPU_SH_ON_CPU:-0}
GPU_OUT=$(realpath -m "${GPU_OUT:-${INHERITUNE_ROOT:-$PWD}/gpu_results}")
export GPU_OUT INHERITUNE_ROOT="$GPU_OUT/root"
mkdir -p "$INHERITUNE_ROOT"
if [ "$on_cpu" = 1 ]; then
  export DS_ACCELERATOR=cpu
  GPUS=${GPUS:-2} precision=fp32 stop_at=6
  model='{size: gpt2_tiny, layers: 2, width: 64, heads: 4, positions: 64, vocab_size: 2048}'
  length=64 batch=1024 steps=100
else
  GPUS=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
  [ "$GPUS" -gt 0 ] || { echo "tests/gpu.sh: torch sees no GPU here (GPU_SH_ON_CPU=1 runs the script without one)" >&2; exit 2; }
  precision=bf16_autocast stop_at=20
  model='{size: gpt2_medium}'
  length=1024 batch=16384 steps=40 # 4 micro batches a step: at ZeRO 3 on one H100 each took 0.3 s
fi
export GPUS
bench=$GPU_OUT/bench.json

say() { printf '\n== %s (%s)\n' "$*" "$(date +%T)"; }
inheritune() { python -m inheritune "$@"; }

# The experiment: the text of the standard library, one run per thing to show.
experiment=$GPU_OUT/gpu.yaml
cat > "$experiment" <<YAML
paper: []
data: {name: stdlib, source: embedded, tokenizer: "bpe:2048", validation: {fraction: 0.05}, sequence_length: $length, sampling: random_windows}
model: $model
train:
  {steps: $steps, batch_tokens: $batch, lr: 3.0e-4, warmup_steps: 4, precision: $precision, eval_every: 1000, eval_windows: 32,
   final_windows: 64, log_every: 1, checkpoint_every: 1000}
runs:
  zero1: {init: random, train: {deepspeed: ds_configs/zero1.json}}
  zero3: {init: random, train: {deepspeed: ds_configs/zero3.json}}
  resumed: {init: random, train: {deepspeed: ds_configs/zero3.json}}
  resized: {init: random, train: {deepspeed: ds_configs/zero1.json}}
YAML
run_folder() { echo "$INHERITUNE_ROOT/runs/gpu/seed0/$1"; }

# Train RUN until step $stop_at, then send the signal that Slurm sends before a time limit.
stop_in_the_middle() {
  local metrics job steps=0
  metrics=$(run_folder "$1")/metrics.jsonl
  python3 -m inheritune train "$experiment" --run "$1" --procs "$GPUS" & # not the function above: its pid would be a shell's
  job=$!
  while kill -0 "$job" 2> /dev/null && [ "$steps" -lt "$stop_at" ]; do
    sleep 0.2
    [ ! -f "$metrics" ] || steps=$(grep -c '"loss"' "$metrics" || true)
  done
  kill -USR1 "$job" 2> /dev/null || true
  wait "$job"
  [ ! -e "$(run_folder "$1")/DONE" ] || { echo "run $1 finished before it could be stopped" >&2; return 1; }
}

slice_facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null || echo "no GPU: a trial on the CPU"
  inheritune prepare "$experiment"
}
slice_runs() {
  inheritune train "$experiment" --run zero1 --procs "$GPUS"
  inheritune train "$experiment" --run zero3 --procs "$GPUS"
}
slice_resume() {
  stop_in_the_middle resumed
  inheritune train "$experiment" --run resumed --procs "$GPUS"
}
slice_resize() {
  stop_in_the_middle resized
  inheritune train "$experiment" --run resized --procs 1 --ds ds_configs/zero3.json # another ZeRO stage, and one rank instead of several
}
slice_memory() {
  local run
  for run in zero1 zero3; do
    echo "planned and measured memory, $run on $GPUS rank(s):"
    inheritune plan "$experiment" --against "$(run_folder "$run")"
  done
}
slice_variants() { CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} python benchmarks/step_variants.py; }
bench_case() {
  if [ "$on_cpu" = 1 ]; then set -- small "toy, one rank"; else set -- gpu "$1"; fi
  BENCH_GPUS=$GPUS python benchmarks/train_step.py --size "$1" --case "$2" --turns "${GPU_TURNS:-1}" --out "$bench"
}
slice_bench_medium() { bench_case "GPT-2 Medium"; }
slice_bench_large() { bench_case "GPT-2 Large"; }
slice_bench_xl24() { bench_case "GPT-2 XL, 24 layers"; }
slice_bench_llama13() { bench_case "OpenLLaMA, 13 layers"; }

slices=("$@")
[ ${#slices[@]} -gt 0 ] || slices=(facts runs resume resize memory variants bench_medium bench_large bench_xl24 bench_llama13)
failed=()
for slice in "${slices[@]}"; do
  declare -F "slice_$slice" > /dev/null || { echo "tests/gpu.sh: no slice '$slice'" >&2; exit 2; }
  [ ! -e "$GPU_OUT/$slice.done" ] || continue
  say "$slice"
  started=$SECONDS
  set +e # a failed command ends the slice, not the script; bash ignores -e in the condition of an `if`
  (set -e; "slice_$slice") 2>&1 | tee "$GPU_OUT/$slice.log"
  code=${PIPESTATUS[0]}
  set -e
  if [ "$code" -eq 0 ]; then echo "$((SECONDS - started)) s" > "$GPU_OUT/$slice.done"; else failed+=("$slice"); fi
done
say "summary: $GPU_OUT/summary.md"
python tools/gpu_summary.py "$experiment" | tee "$GPU_OUT/summary.md"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]} (logs in $GPU_OUT; the same command runs them again)" >&2; exit 1; }
