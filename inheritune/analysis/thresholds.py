"""The numbers that define the measures: shares tau and eta, the text, and what counts as lazy. No imports, so
that figures can be drawn without torch."""

TAUS = (0.80, 0.85, 0.90, 0.95)
"""Shares of the squared singular values; the paper uses 0.90 and ablates the others (its Figure 10)."""
ETAS = (0.90,)
"""Share of the squared Frobenius norm for the column mass."""
MAIN_THRESHOLD = "0.9"
"""Key of the tau that decides whether a layer is lazy, and of the eta that is shown beside it."""
NEAR_ONE = 1.5
"""A mean rank below this is 'near 1': what looks like 1 in the paper's plots. Such heads and layers are only
counted; nothing depends on them."""
SEQUENCES, LENGTH = 100, 100
"""The paper measures on 100 sequences of 100 tokens. Ranks of shorter ones are lower: they do not compare."""
UNIFORM_WITHIN = 0.2
"""A head attends uniformly if its rank and its mass are this close (relative) to those of causal uniform
attention: 5 and 30 of 100 tokens. Uniform attention is not collapsed: rank 1 is one dominant column."""
LITTLE_USE = 0.01
"""A block is of little use if the loss without it is higher by less than this share of the loss."""


def has_papers_length(rows: list[dict]) -> bool:
    """Return whether the rows of an attention.jsonl were measured on as many sequences and tokens as the
    paper's numbers. A rehearsal's, which is no result, may be measured on less."""
    if not rows:
        return False
    header = rows[0]
    measured = (header.get("sequences", SEQUENCES), header.get("length", LENGTH))
    return measured == (SEQUENCES, LENGTH) or header.get("rehearsal", False)
