"""Training: the loop, validation, distillation, and the record of a run (metrics.jsonl, W&B,
provenance.json)."""
