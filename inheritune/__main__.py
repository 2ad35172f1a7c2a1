"""The start of the program: `python -m inheritune`, and the command `inheritune`."""

import signal


def start() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        # before a verb has begun, Ctrl-C has nothing to save and needs no traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from inheritune.cli import run_command

    run_command()


if __name__ == "__main__":
    start()
