"""Solutions that mean harm. Each returns "harm" if it could do what its name says; `target` is what it is aimed at."""

from __future__ import annotations

# Past EvalPlus's guard, which only hides names of the modules os, shutil, subprocess, sys and builtins.
START = """
import ctypes, fcntl, gc, importlib, io, os, pathlib, posix, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)

def must(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result

def f(target):
"""

READ = {
    "io_open": "    return io.open(target['secret']).read() and 'harm'",
    "pathlib": "    return pathlib.Path(target['secret']).read_text() and 'harm'",
    "posix_open": "    return posix.read(posix.open(target['secret'], 0), 9) and 'harm'",
    "reloaded_os": "    importlib.reload(os)\n    return os.read(os.open(target['secret'], os.O_RDONLY), 9) and 'harm'",
    "libc_open": "    return must(libc.open(target['secret'].encode(), 0)) and 'harm'",
    "passwd": "    return io.open('/etc/shadow').read() and 'harm'",
    "symlink": "    posix.symlink(target['secret'], 'link')\n    return io.open('link').read() and 'harm'",
    "hard_link": "    posix.link(target['secret'], 'link')\n    return io.open('link').read() and 'harm'",
    "parents_environment": "    return io.open(f'/proc/{posix.getppid()}/environ', 'rb').read() and 'harm'",
    "own_memory": "    return io.open('/proc/self/mem', 'rb') and 'harm'",
    "parents_memory": "    return io.open(f'/proc/{posix.getppid()}/mem', 'rb') and 'harm'",
    "listing": "    return posix.listdir(target['directory']) and 'harm'",
}

WRITE = {
    "new_file": "    io.open(target['new'], 'w').write('x')\n    return 'harm'",
    "overwritten": "    pathlib.Path(target['secret']).write_text('x')\n    return 'harm'",
    "cut": "    posix.truncate(target['secret'], 0)\n    return 'harm'",
    "cut_while_opened": "    posix.open(target['secret'], os.O_RDONLY | os.O_TRUNC)\n    return 'harm'",
    "removed": "    posix.unlink(target['secret'])\n    return 'harm'",
    "moved": "    posix.rename(target['secret'], 'mine')\n    return 'harm'",
    "directory": "    posix.mkdir(target['new'])\n    return 'harm'",
    "mode": "    posix.chmod(target['secret'], 0o777)\n    return 'harm'",
    "library": "    io.open(os.__file__, 'a')\n    return 'harm'",
    "through_a_link": "    posix.symlink(target['directory'], 'd')\n    io.open('d/new', 'w')\n    return 'harm'",
}

NET = {
    "tcp": "    socket.create_connection(('127.0.0.1', target['tcp']), 1)\n    return 'harm'",
    "udp": "    socket.socket(2, 2).sendto(b'x', ('127.0.0.1', target['udp']))\n    return 'harm'",
    "unix": "    socket.socket(1, 1).connect(target['unix'])\n    return 'harm'",
    # A pair needs no permission; the second address of a datagram socket would.
    "unix_datagram": "    socket.socketpair(1, 2)[0].sendto(b'x', target['datagram'])\n    return 'harm'",
    "raw_system_call": "    return must(libc.syscall(41, 2, 1, 0)) and 'harm'",
    "io_uring": "    return must(libc.syscall(425, 8, ctypes.create_string_buffer(120))) and 'harm'",
    "listen": "    socket.create_server(('127.0.0.1', 0))\n    return 'harm'",
}

PROCESS = {
    "fork": "    if posix.fork() == 0:\n        posix._exit(0)\n    return 'harm'",
    "vfork_by_libc": "    pid = must(libc.fork())\n    if pid == 0:\n        posix._exit(0)\n    return 'harm'",
    "daemon": "    if not posix.fork():\n        posix.setsid()\n        posix._exit(time.sleep(9))\n    return 'harm'",
    "new_session": "    posix.setsid()\n    return 'harm'",
    "shell": "    posix.execv('/bin/sh', ['sh', '-c', 'true'])",
    "spawn": "    posix.posix_spawn('/bin/true', ['true'], {})\n    return 'harm'",
    "system": "    return 'harm' if posix.system('true') == 0 else 1 / 0",
    "kill_parent": "    posix.kill(posix.getppid(), 0)\n    return 'harm'",
    "kill_everybody": "    posix.kill(-1, 0)\n    return 'harm'",
    "kill_group": "    posix.kill(0, 0)\n    return 'harm'",
    "thread_of_parent": "    return must(libc.syscall(234, posix.getppid(), posix.getppid(), 0)) or 'harm'",
    "trace_parent": "    return must(libc.ptrace(16, posix.getppid(), 0, 0)) or 'harm'",
    "pidfd": "    return must(libc.syscall(434, posix.getppid(), 0)) and 'harm'",
    # The kernel sends the signal of a descriptor that becomes readable to its owner.
    "signal_by_descriptor": "    read, write = posix.pipe()\n    fcntl.fcntl(read, 8, posix.getppid())\n    return 'harm'",
    "limits_of_parent": "    return must(libc.prlimit(posix.getppid(), 0, struct.pack('QQ', 1, 1), None)) or 'harm'",
    "new_namespace": "    return must(libc.unshare(0x10000000)) or 'harm'",
    "memory_file": "    return must(libc.memfd_create(b'x', 0)) and 'harm'",
    "shared_memory": "    return must(libc.shmget(7, 4096, 0o1600)) and 'harm'",
}

# What a solution can do only to itself: it fails, and nobody else notices.
SELF_HARM = {
    "fill_memory": "    kept = []\n    while True:\n        kept.append(bytearray(2 ** 24))",
    "fill_memory_at_once": "    return [0] * 10 ** 12",
    "many_threads": "    while True:\n        threading.Thread(target=time.sleep, args=(30,)).start()",
    "sleep_for_ever": "    time.sleep(10 ** 6)",
    "loop_for_ever": "    while True:\n        pass",
    "loop_past_the_alarm": "    while 1:\n        try:\n            time.sleep(1)\n        except Exception:\n            pass",
    "block_the_alarm": "    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n    time.sleep(30)",
    "compute_in_c": "    return 7 ** (10 ** 9)",
    "print_for_ever": "    while True:\n        print('x' * 10 ** 6)",
    "gigabyte_to_every_descriptor": (
        "    for number in range(64):\n        for _ in range(1000):\n"
        "            try:\n                posix.write(number, bytes(10 ** 6))\n"
        "            except OSError:\n                break\n"
        "    return target"
    ),
    "fill_disk": "    for i in range(10 ** 6):\n        io.open(str(i), 'wb').write(bytes(2 ** 23))",
    "one_large_file": "    with io.open('x', 'wb') as file:\n        while True:\n            file.write(bytes(2 ** 23))",
    "many_files": "    for i in range(10 ** 7):\n        io.open(str(i), 'w').close()",
    "deep_directories": "    for _ in range(10 ** 6):\n        posix.mkdir('d', 0o700)\n        posix.chdir('d')",
    "hidden_files": (
        "    posix.mkdir('d', 0o300)\n    posix.chdir('d')\n"
        "    for i in range(10 ** 6):\n        io.open(str(i), 'wb').write(bytes(2 ** 20))"
    ),
    "files_far_down": (
        "    for _ in range(50):\n        posix.mkdir('d' * 200)\n        posix.chdir('d' * 200)\n"
        "    for i in range(10 ** 6):\n        io.open(str(i), 'wb').write(bytes(2 ** 20))"
    ),
    "exit": "    raise SystemExit",
    "exit_at_once": "    posix._exit(0)",
    "abort": "    posix.abort()",
    "close_everything": "    posix.closerange(0, 100)\n    return target",
    "deep_recursion": "    sys.setrecursionlimit(10 ** 9)\n    return f(target)",
    "deep_value": "    x = []\n    for _ in range(10 ** 5):\n        x = [x]\n    return x",
    "value_in_itself": "    x = []\n    x.append(x)\n    return x",
    "huge_value_of_small_parts": "    return [[0] * 10 ** 5] * 10 ** 5",
    "signal_itself": "    posix.kill(posix.getpid(), 9)",
    "null_pointer": "    return ctypes.string_at(0)",
}

# A hundred megabytes, no more, so that the test fails where nobody looks, and not the disk.
FILL_WHILE_TALKING = """
    def fill():
        for i in range(10):
            with io.open(str(i), "wb") as file:
                file.write(bytes(10 * 2 ** 20))
    threading.Thread(target=fill).start()
    while True:
        for number in range(3, 64):
            try:
                posix.write(number, b"x")
            except OSError:
                pass
        time.sleep(0.01)
"""
