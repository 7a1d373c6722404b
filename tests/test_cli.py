"""The dispatcher: names, help, exit codes, and a reader that leaves early."""

import subprocess
import sys

from fewstep.runtime.cli import main


def test_help_lists_commands(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "distill" in shown and "bench latency" in shown


def test_unknown_command_says_so(capsys):
    assert main(["bench", "speed"]) == 2
    assert "bench speed" in capsys.readouterr().err


def test_a_users_error_is_one_line_and_exit_code_2(capsys):
    assert main(["verify", "no-such-bundle"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert "no-such-bundle is not a folder" in told[0]


def test_a_reader_that_leaves_early_is_no_traceback():
    call = [sys.executable, "-P", "-m", "fewstep.runtime.cli", "recipes", "--json"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        told = process.stderr.read().decode()
    assert "Traceback" not in told
