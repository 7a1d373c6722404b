"""The public face of the runtime: every name is real, and importing the room stays light."""

import subprocess
import sys

import fewstep.runtime


def test_every_public_name_is_real():
    assert 10 <= len(fewstep.runtime.__all__) <= 15
    for name in fewstep.runtime.__all__:
        assert getattr(fewstep.runtime, name).__name__ == name


def test_importing_the_room_loads_no_torch():
    code = "import sys, fewstep.runtime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
