"""What this machine can do: `python -m launcher.doctor`, as it is also called from a clone.

python -m tools.doctor               # --json: for programs
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("launcher.doctor", run_name="__main__", alter_sys=True)
