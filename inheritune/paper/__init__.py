"""The paper's tables and figures: its numbers as data, this repository's results and verdicts.

`items` says what each table and figure shows, `published` has the paper's numbers, `measured` finds this
repository's. `tables` and `figures` are the verbs, and `prerequisites` lists what has to be run before them.
Nothing here trains or evaluates a model but the authors' toy (`toy`).
"""
