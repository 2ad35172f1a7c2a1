"""The program's start: `python -m inheritune`, and the command `inheritune`."""

import signal


def start() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # Ctrl-C before a verb has begun: nothing to save, and no traceback
    from inheritune.cli import run_command

    run_command()


if __name__ == "__main__":
    start()
