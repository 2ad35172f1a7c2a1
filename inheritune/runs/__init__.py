"""A job (experiment, run, seed, stage): where its first weights come from, whose files its folder holds, how
it compares with its reference."""
