"""Files that are written together, where there is no room for them or no permission; and how a command says so."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest

from dylo_moe.atomic import make_directory, write_together
from dylo_moe.command_line import Parser, run_command
from dylo_moe.errors import OutputError


def test_files_that_belong_together_stay_the_old_ones_until_there_is_room_for_all(tmp_path, file_size_limit):
    small, large = tmp_path / "small", tmp_path / "large"
    write_together({small: b"old", large: b"old"})
    with file_size_limit(10), pytest.raises(OutputError) as caught:
        write_together({small: b"new", large: b"new" * 10})
    assert str(caught.value) == f"{large}: File too large; make room, then run the same command again"
    assert small.read_bytes() == large.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["large", "small"]
    write_together({small: b"new", large: b"new" * 10})
    assert small.read_bytes() + large.read_bytes() == b"new" * 11


@pytest.mark.parametrize("write", [lambda path: write_together({path / "a": b""}), make_directory], ids=["files", "directory"])
def test_place_that_is_no_directory_is_named_with_what_to_do(write, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(OutputError, match="file/new: Not a directory; see that you can write there, or name another"):
        write(tmp_path / "file" / "new")
    assert isinstance(caught := pickle.loads(pickle.dumps(OutputError("a", OSError(28, "full")))), OSError)
    assert str(caught) == "a: full; make room, then run the same command again"


def test_name_that_the_disk_does_not_take_is_that_of_the_file_and_not_of_the_one_beside_it(tmp_path):
    path = tmp_path / ("x" * 250)
    with pytest.raises(OutputError, match=f"^{path}: File name too long; see that you can write there"):
        write_together({path: b""})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file", "a\nb"), "prog: a b: No such file\n"),
        (OSError(5, "no name"), "prog: [Errno 5] no name\n"),
        (MemoryError(), "prog: not enough memory: there is none left; free some, then run the same command again\n"),
        (
            RuntimeError("DefaultCPUAllocator:\nwants 9 bytes"),
            "prog: not enough memory: DefaultCPUAllocator: wants 9 bytes; free",
        ),
    ],
)
def test_what_the_machine_lacks_is_one_line_and_exit_code_2(error, said, capsys):
    def action(_):
        raise error

    assert run_command(Parser(prog="prog"), [], action) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(said) and printed.err.count("\n") == 1


def test_reader_who_leaves_is_no_error():
    code = (
        "import sys\nfrom dylo_moe.command_line import Parser, run_command\n"
        "sys.exit(run_command(Parser(prog='prog'), [], lambda options: print('x' * 10**int(sys.argv[1])) or 0))"
    )
    for size in ("1", "6"):  # what fits the buffer is written at the end only
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, "-c", code, size], stdout=writer, stderr=subprocess.PIPE, timeout=60)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")


def test_name_that_the_terminal_cannot_show_is_shown_escaped():
    code = (
        "import sys\nfrom dylo_moe.command_line import Parser, run_command\n"
        "sys.exit(run_command(Parser(prog='prog'), [], lambda options: print('\\u6f22 \\udcff') or 0))"
    )
    for encoding, shown in (("ascii", b"\\u6f22 \\udcff\n"), ("utf-8", "漢 \\udcff\n".encode())):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, shown), done.stderr


def test_any_other_runtime_error_is_no_mistake_of_the_user():
    def action(_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run_command(Parser(prog="prog"), [], action)
