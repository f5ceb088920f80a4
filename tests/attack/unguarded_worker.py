"""The real worker without the guard that keeps content out of its log: a weakened copy."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import log_guard  # noqa: E402 - found by the line before

vars(log_guard)["ContentFilter"].filter = lambda *_: True
vars(log_guard)["guard_exceptions"] = lambda: None

if __name__ == "__main__":
    runpy.run_path(str(ROOT / "rp_handler.py"), run_name="__main__")
elif __name__ == "__mp_main__":
    log_guard.install_in_child()  # which guards nothing here, but has it die with its parent
