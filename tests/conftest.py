"""What every test may rely on."""

from __future__ import annotations

import signal

# A shell that runs its commands in the background lets them ignore Ctrl-C, and so would every
# process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
