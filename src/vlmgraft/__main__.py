"""The command line, as `vlmgraft` and as `python -m vlmgraft`; Ctrl-C exits with 130 during imports too."""

import os
import signal
from typing import Any, NoReturn


def main() -> None:
    """Run the command line; `vlmgraft.cli.interrupts` handles signals while a command runs."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupted)
    from vlmgraft.cli import main as run

    run()


def _interrupted(*_: Any) -> NoReturn:
    """Exit at once, without a traceback: no command is running."""
    os.write(2, b"\nvlmgraft: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
