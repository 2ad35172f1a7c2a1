"""Training: the loop over the steps of a run, its start, validation, distillation, and the record of the run
(metrics.jsonl, W&B, provenance.json). The engine and checkpoints are in engines/."""
