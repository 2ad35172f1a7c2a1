"""A job (experiment, run, seed, stage): where its first weights come from, whether its folder belongs to it,
and how it compares with its reference."""
