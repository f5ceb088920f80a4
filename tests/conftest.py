"""What holds for every test."""

import signal

# Many tests interrupt what they start. Where interrupts are ignored, as a shell has it in the
# background, everything that is started would ignore them too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
