"""The command line, as `vlmgraft` and as `python -m vlmgraft`: ^C has its exit code from before the first import on."""

import os
import signal
from typing import Any, NoReturn


def main() -> None:
    """Run the command line; `vlmgraft.cli.interrupts` takes the signals over while a command runs."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupted)
    from vlmgraft.cli import main as run

    run()


def _interrupted(*_: Any) -> NoReturn:
    """Nothing has begun, or all is done: end without unwinding the imports, whose traceback says nothing."""
    os.write(2, b"\nvlmgraft: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
