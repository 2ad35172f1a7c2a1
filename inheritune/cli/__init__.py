"""The command line: `inheritune VERB`, or `python -m inheritune VERB`.

`verbs` has the verbs, `arguments` checks what they are given, `help` describes them, `program` runs one.
What a verb does belongs to the other rooms. Each verb imports them when it runs, so that --help is instant.
"""

from inheritune.cli.program import leave, main, run_command

__all__ = ["leave", "main", "run_command"]
