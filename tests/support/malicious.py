# ruff: noqa: E501
"""Answers and programs that try to score without solving anything, to leave their sandbox, or to stop the scoring.

Programs are asked to print a secret that only the hidden test, a file of the host, a listener on the host and the
verifier's own memory and environment hold, so whatever escapes scores. All are bounded: at most 64 children, files of a
few MiB, connections to one listener on loopback.
"""

from __future__ import annotations

from typing import NamedTuple

SECRET = "sesame-4f1d9c"

# {file}: a file of the host with the secret; {port}: a listener that sends it; {socket}: one of the abstract namespace.
PROGRAMS = {
    # processes
    "fork": "import os, time\nfor _ in range(64): os.fork() or (time.sleep(5), os._exit(0))",
    "fork in children": "import os, time\nfor _ in range(6): os.fork()\ntime.sleep(5)",
    "fork, errors ignored": "import os, time\nfor _ in range(64):\n try: os.fork() or (time.sleep(9), os._exit(0))\n except OSError: pass\ntime.sleep(9)",
    "double fork and setsid": "import os, time\nif not os.fork():\n os.setsid()\n if not os.fork(): time.sleep(600)\n os._exit(0)",
    "a daemon that keeps stdout": "import os, time\nif not os.fork():\n os.setsid(); time.sleep(600); print('x')",
    "subprocesses": "import subprocess, sys\nfor _ in range(32): subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(9)'])",
    "multiprocessing": "import multiprocessing, time\n[multiprocessing.Process(target=time.sleep, args=(9,)).start() for _ in range(32)]",
    "threads": "import threading, time\nfor _ in range(64): threading.Thread(target=time.sleep, args=(9,)).start()",
    "a shell": "import os\nos.system('cat {file}')",
    "exec a shell": "import os\nos.execv('/bin/sh', ['sh', '-c', 'cat {file}'])",
    "posix_spawn": "import os\nos.posix_spawn('/bin/cat', ['cat', '{file}'], {})",
    "a stopped process": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "stop everything": "import os, signal\nos.kill(-1, signal.SIGSTOP)\nos.kill(os.getpid(), signal.SIGSTOP)",
    "kill everything": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kill the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kill the process group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "kill the first 2000": "import os, signal\nfor n in range(1, 2000):\n if n != os.getpid():\n  try: os.kill(n, signal.SIGKILL)\n  except OSError: pass",
    "no death signal": "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0)\nif not os.fork(): time.sleep(600)",
    "nice and realtime": "import os\nos.nice(-20); os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))\nwhile True: pass",
    "zombies": "import os, time\nfor _ in range(64): os.fork() or os._exit(0)\ntime.sleep(9)",
    # memory
    "bytearray": "bytearray(1 << 40)",
    "a list": "x = []\nwhile True: x.append(bytes(1 << 20))",
    "a string": "x = 'x'\nwhile True: x += x",
    "MemoryError ignored": "x = []\nwhile True:\n try: x.append(bytes(1 << 20))\n except MemoryError: pass",
    "mmap": "import mmap\nx = [mmap.mmap(-1, 64 << 20) for _ in range(64)]\nfor m in x: m.write(bytes(64 << 20))",
    "mmap, shared, in children": "import mmap, os\nfor _ in range(7):\n if not os.fork(): break\nx = [mmap.mmap(-1, 32 << 20) for _ in range(64)]",
    "memfd": "import os\nx = [os.memfd_create('x') for _ in range(60)]\nfor fd in x: os.write(fd, bytes(1 << 20))\nprint(len(x))",
    "memfd, grown": "import os\nos.ftruncate(os.memfd_create('x'), 1 << 40)",
    "SysV memory": "import ctypes\nc = ctypes.CDLL(None)\nfor _ in range(64): print(c.shmget(0, 16 << 20, 0o1600))",
    "message queues": "import ctypes\nc = ctypes.CDLL(None)\nfor _ in range(64): print(c.msgget(0, 0o1600))",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)",
    "a deep data structure": "x = []\nfor _ in range(10**6): x = [x]\nprint(x == [[]], repr(x))",
    "a large stack": "import threading, sys\nsys.setrecursionlimit(10**9); threading.stack_size(1 << 30)\nthreading.Thread(target=print).start()",
    "a large integer": "print(9 ** 9 ** 9 ** 9)",
    "a large shift": "print(1 << (1 << 60))",
    "a format of a width": "print('%999999999999d' % 1)",
    "a zip bomb": "import zlib\nx = zlib.compress(bytes(1 << 26), 9)\nwhile True: x = zlib.decompress(zlib.compress(bytes(1 << 28)))",
    "pickle of memory": "import pickle\npickle.loads(b'\\x8e\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x0f')",
    # time
    "a loop": "while True: pass",
    "a loop in C": "sum(iter(int, 1))",
    "a large power": "pow(7, 10 ** 9)",
    "a regular expression": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "sleep": "import time\ntime.sleep(10**6)",
    "sleep through signals": "import signal, time\nfor n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
    "CPU signal ignored": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "signals blocked": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
    "a loop at the end": "import atexit\nprint(1)\ndef f():\n while True: pass\natexit.register(f)",
    "a loop in a destructor": "class A:\n def __del__(self):\n  while True: pass\nA()",
    "a loop in a thread": "import threading\ndef f():\n while True: pass\nthreading.Thread(target=f).start()",
    "waiting for stdin": "import sys\nsys.stdin.read(); sys.stdin.read()\nimport select\nselect.select([], [], [])",
    "a limit raised": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (600, 600))\nwhile True: pass",
    "exceptions ignored": "while True:\n try:\n  while True: pass\n except BaseException: pass",
    # output and files
    "endless output": "while True: print('x' * 1000)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "errors of output ignored": "import os\nwhile True:\n try: os.write(1, bytes(1 << 16))\n except OSError: pass",
    "output with a hole": "import os\nos.ftruncate(1, 1 << 40)",
    "output far away": "import os\nos.lseek(1, 1 << 30, 0); os.write(1, b'x')",
    "no output": "",
    "binary output": "import os\nos.write(1, bytes(range(256)) * 1000)",
    "a large file": "open('/box/x', 'wb').write(bytes(1 << 28))",
    "many files": "for n in range(10**5): open(f'/box/{{n}}', 'w').write('x' * 4096)",
    "many empty files": "for n in range(10**6): open(f'/box/{{n}}', 'w').close()",
    "many folders": "import os\nfor n in range(10**5): os.mkdir('x'); os.chdir('x')",
    "a file in /dev": "open('/dev/shm/x', 'w').write('x')",
    "a file in /tmp": "open('/tmp/malicious', 'w').write('x')",
    "a file at the root": "open('/malicious', 'w').write('x')",
    "the program itself": "open('/program.py', 'w').write('print(1)')",
    "the interpreter": "import sys\nopen(sys.executable, 'ab').write(b'x')",
    "the standard library": "import os\nopen(os.__file__, 'a').write('\\n')",
    # the host's files
    "read the file": "print(open('{file}').read())",
    "a symbolic link out": "import os\nos.symlink('{file}', '/box/x')\nprint(open('/box/x').read())",
    "a link to the folder out": "import os\nos.symlink('/', '/box/x')\nprint(open('/box/x{file}').read())",
    "a hard link out": "import os\nos.link('{file}', '/box/x')\nprint(open('/box/x').read())",
    "a path up": "import os\nprint(open(os.getcwd() + '/..' * 20 + '{file}').read())",
    "stdout as a link": "import os\nos.symlink('{file}', '/box/out')\nos.dup2(os.open('/box/out', os.O_RDWR), 1)",
    "/proc of others": "import os\nfor p in os.listdir('/proc'): print(open(f'/proc/{{p}}/environ').read())",
    "/proc/1/root": "print(open('/proc/1/root{file}').read())",
    "/proc/self/fd": "import os\nfor n in os.listdir('/proc/self/fd'): print(open(f'/proc/self/fd/{{n}}').read())",
    "all descriptors": "import os\nfor n in range(3, 1024):\n try: print(os.pread(n, 10**6, 0))\n except OSError: pass",
    "the environment": "import os\nprint(os.environ.get('MALICIOUS_SECRET'))",
    "the environment of C": "import ctypes\nc = ctypes.CDLL(None); c.getenv.restype = ctypes.c_char_p\nprint(c.getenv(b'MALICIOUS_SECRET'))",
    "passwords": "print(open('/etc/shadow').read(), open('/etc/passwd').read())",
    "a walk": "import os\nfor folder, _, names in os.walk('/'):\n for name in names:\n  if 'secret' in name: print(open(os.path.join(folder, name)).read())",
    "the package": "import sys\nsys.path.append('.')\nimport dryvine.trainer.rl.verifiers.code",
    "a device": "import os\nos.mknod('/box/sda', 0o60666, os.makedev(254, 0))\nprint(open('/box/sda', 'rb').read(100))",
    "a raw disk": "print(open('/dev/vda', 'rb').read(100))",
    "kernel memory": "print(open('/dev/mem', 'rb').read(100))",
    "a file handle": "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nprint(c.syscall(304, -100, b'', 0), ctypes.get_errno())",
    # the network
    "connect": "import socket\nprint(socket.create_connection(('127.0.0.1', {port}), 2).recv(99).decode())",
    "connect by IPv6": "import socket\nprint(socket.create_connection(('::1', {port}), 2).recv(99).decode())",
    "connect to the any address": "import socket\nprint(socket.create_connection(('0.0.0.0', {port}), 2).recv(99).decode())",
    "an abstract socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0{socket}')\nprint(s.recv(99).decode())",
    "urllib": "import urllib.request\nprint(urllib.request.urlopen('http://127.0.0.1:{port}/', timeout=2).read().decode())",
    "a name": "import socket\nprint(socket.getaddrinfo('localhost.localdomain', {port}))",
    "raw packets": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
    "packets of a device": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "netlink": "import socket\ns = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint(s.getsockname(), socket.if_nameindex())",
    # privileges
    "become root": "import os\nos.setuid(0); print(open('{file}').read())",
    "become root, all three": "import os\nos.setresuid(0, 0, 0)\nprint(open('{file}').read())",
    "a user namespace": "import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))",
    "a mount namespace": "import ctypes\nc = ctypes.CDLL(None)\nprint(c.unshare(0x10020000), c.mount(b'proc', b'/box', b'proc', 0, None))",
    "a namespace by clone": "import ctypes\nprint(ctypes.CDLL(None).syscall(56, 0x10000011, 0, 0, 0, 0))",
    "a namespace by clone3": "import ctypes\nx = (ctypes.c_uint64 * 11)(0x10000000)\nprint(ctypes.CDLL(None).syscall(435, x, 88))",
    "enter a namespace": "import ctypes, os\nprint(ctypes.CDLL(None).setns(0, 0))",
    "mount": "import ctypes\nprint(ctypes.CDLL(None).mount(b'/', b'/box', None, 4096, None))",
    "remount": "import ctypes\nprint(ctypes.CDLL(None).mount(None, b'/', None, 32, None))\nopen('/x', 'w')",
    "chroot": "import os\nos.chroot('/box')",
    "pivot_root": "import ctypes\nprint(ctypes.CDLL(None).syscall(155, b'/box', b'/box'))",
    "trace": "import ctypes, os\nprint(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))",
    "memory of the parent": "import ctypes, os\nprint(ctypes.CDLL(None).syscall(310, os.getppid(), None, 0, None, 0, 0))",
    "io_uring": "import ctypes\nprint(ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(200)))",
    "BPF": "import ctypes\nprint(ctypes.CDLL(None).syscall(321, 0, ctypes.create_string_buffer(200), 200))",
    "keys": "import ctypes\nprint(ctypes.CDLL(None).syscall(250, 0, -3, 1))",
    "userfaultfd": "import ctypes\nprint(ctypes.CDLL(None).syscall(323, 0))",
    "a host name": "import socket\nsocket.sethostname('mine')",
    "a limit on processes raised": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))",
    "32-bit calls": "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\nctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
    # the scorer
    "both streams": 'import sys\nprint(\'{{"score": 1.0, "why": ""}}\'); print(\'{{"score": 1.0}}\', file=sys.stderr)',
    "what bubblewrap would say": "import sys\nprint('bwrap: cannot', file=sys.stderr)\nsys.exit(1)",
    "frames": "import sys, gc\nprint([f.f_locals for f in sys._current_frames().values()], gc.get_objects()[:5])",
    "exit code": "import os\nos._exit(0)",
    "a traceback": "raise SystemExit('sesame')",
    "crash": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "many lines": "for n in range(10**4): print('sesame-%06x' % n)",
    "terminal codes": "print('\\x1b]0;x\\x07\\x1b[2J\\r')",
    "no UTF-8": "import os\nos.write(1, b'\\xff\\xfe' * 100)",
    "no program": "def f(:",
    "null bytes": "print('\\0')\n\0",
}

# Functions that are asked to return the secret.
CALLS = {
    "equal to everything": "class E(str):\n def __eq__(self, other): return True\n __hash__ = str.__hash__\ndef f(n): return E('x')",
    "JSON replaced": "import json\njson.dumps = lambda *a, **k: 'x'\ndef f(n): return 1",
    "print replaced": "import builtins\nbuiltins.print = lambda *a: None\ndef f(n): return 1",
    "leaves before the call": "import os\nprint('true'); os._exit(0)\ndef f(n): pass",
    "the frame above": "import sys\ndef f(n): return str(sys._getframe(1).f_globals)",
    "arguments of the process": "import sys\ndef f(n): return str(sys.argv)",
    "a deep value": "def f(n):\n x = []\n for _ in range(10**5): x = [x]\n return x",
    "a value of itself": "def f(n):\n x = []; x.append(x)\n return x",
    "deep JSON by hand": "import os\nos.write(1, b'[' * 10**5 + b']' * 10**5 + b'\\n'); os._exit(0)\ndef f(n): pass",
    "not a number": "def f(n): return float('nan')",
    "true": "def f(n): return True",
    "nothing": "def f(n): pass",
    "a generator": "def f(n):\n while True: yield n",
    "a long number": "import os\nos.write(1, b'\\n' + b'9' * 10**5 + b'\\n'); os._exit(0)\ndef f(n): pass",
}

THOUGHT = "<think>t</think>"


class Answer(NamedTuple):
    """An answer that must not score, for a verifier and a problem."""

    verifier: str
    text: str
    problem: dict[str, object]


PUZZLE: dict[str, object] = {"numbers": [3, 5, 7], "target": 26, "left_to_right": True}
FIVE: dict[str, object] = {"answer": 5}
MATH: dict[str, object] = {"answer": "5"}

EXPRESSIONS = (
    "9**9**9**9", "9^9^9^9", "26", "3*7+5-0", "3*7+5#", "3*7+5;26", "(3*7+5", "3*7+5)", "3*7+5=26", "26=3*7+5", "3*7+05*1",
    "__import__('os').system('touch {file}.x')", "exec('x')", "[].__class__", "3*7+5 if 1 else 0", "3*7+5\n26", "３*７+５",
    "٣*٧+٥", "3·7+5", "3×7+5", "3*7+5.0", "3.0*7+5", "0x3*7+5", "3*7+5e0", "3_0*7", "-(-3)*7+5+3-3", "(" * 2000 + "26",
    "-" * 5000 + "26", "1" * 10000, "26 " * 300, "3*7+5 or 1", "3*7+5,", "3 * 7 + 5 3", "3/0+7*5", "7/3*5+26", "",
)  # fmt: skip

FORMATS = (
    "<think>a<think>b</think></think><answer>c</answer>",
    "<think>a</think><answer><answer>c</answer></answer>",
    "<think>a</think><answer>b</answer><answer>c</answer>",
    "<think><answer>a</answer></think>",
    "<answer>a</answer><think>b</think>",
    "<think>a</answer><answer>b</think>",
    "<think>a</think><answer>b</answer>" * 1000,
    "<think>" * 20000 + "</think><answer>a</answer>",
    "<think>a</think><answer></answer>",
    "<think> </think><answer>a</answer>",
    "< think>a</think><answer>b</answer>",
    "<Think>a</Think><Answer>b</Answer>",
    "<think>a</think>\0<answer>b</answer>",
    "<think>a</think><answer>b</answer>.",
    "\u200b<think>a</think><answer>b</answer>",
    "&lt;think&gt;a&lt;/think&gt;<answer>b</answer>",
    " " * 150_000,
    "a" * 300_000,
)

MATHS = (
    r"\boxed{9^{9^{9^{9}}}}", r"\boxed{9^9^9^9^9}", r"\boxed{10^{10^{10}}!}", r"\boxed{\sum_{k:1}^{10^{99}} k}",
    r"\boxed{4}\boxed{5}", r"\boxed{5}\boxed{5}", r"\boxed{5,6}", r"\boxed{5;6}", r"\boxed{5 or 6}", r"\boxed{5\text{ or }6}",
    "1, 2, 3, 4, 5", "$1=2=3=4=5$", r"\boxed{1=2=3=4=5}", r"\boxed{x=5}", r"\boxed{5\%}", r"\boxed{\{4,5\}}", r"\boxed{[4,5]}",
    r"\boxed{" * 500 + "5" + "}" * 500, r"\boxed{" + "(" * 900 + "5" + ")" * 900 + "}", r"\boxed{\frac{5}{0}}", r"\boxed{}",
    r"\boxed{\pm 5}", r"\boxed{4<5}", r"\boxed{x \in \mathbb{R}}", "<answer>__import__('os').system('touch {file}.x')</answer>",
    "<answer>exec('x')</answer>", "<answer>4</answer><answer>5</answer>", r"<answer>\boxed{4}\boxed{5}</answer>",
    "<answer>five</answer>", r"\boxed{\int_0^{\infty} x^x dx}", r"\boxed{\prod_{k:1}^{10^{9}} k}", r"\boxed{\binom{10^{9}}{10^{8}}}",
    r"\boxed{\sqrt{\sqrt{\sqrt{9^{9^{9}}}}}}", r"\boxed{5\input{/etc/passwd}}", "5", "",
)  # fmt: skip

WORDS: dict[str, object] = {"checks": [{"kind": "words", "least": 1, "most": 3}, {"kind": "keyword", "word": "yes"}]}

GYM: dict[str, object] = {"options": {}, "seed": 1, "size": 5, "index": 0}
GYMS = {
    "countdown": ("__import__('os').system('touch {file}.x')", "9**9**9**9", "int(309)", "exit(0)!", "309 if 1 else 0"),
    "puzzle24": ("(lambda: 24)()", "24", "sqrt(\"__import__('os').system('touch {file}.x')\")", "[24][0]"),
    "n_queens": ("[__import__('os').system('touch {file}.x')]", "[[]]*9**9", "[['_' for _ in 'x']]"),
    "polynomial_multiplication": ("eval('1')", "x.__class__", "f'{x}'", "x**9**9**9"),
    "binary_matrix": ("[(y := 5)]", "[" * 5000 + "]" * 5000, "().__class__.__bases__[0].__subclasses__()"),
    "chain_sum": ("", "1 2 3", "-4 or 5", "−4", "9" * 9000),
}

ANSWERS = [
    *(Answer("countdown", f"{THOUGHT}<answer>{text}</answer>", PUZZLE) for text in EXPRESSIONS),
    Answer("countdown", f"{THOUGHT}<answer>1</answer><answer>3*7+5</answer>", PUZZLE),
    Answer("countdown", "3*7+5", PUZZLE),
    *(Answer("integer", f"{THOUGHT}<answer>{text}</answer>", FIVE) for text in ("5.0", "5!", "V", "９", "4 or 5", "2**3-3", "5\0")),
    *(Answer("format", text, {}) for text in FORMATS),
    *(Answer("math", text, MATH) for text in MATHS),
    *(Answer("reasoning_gym", f"<answer>{text}</answer>", GYM | {"dataset": name}) for name, texts in GYMS.items() for text in texts),
    Answer("instructions", "<answer>yes</answer><answer>yes</answer>", WORDS),
    Answer("instructions", "yes " * 1000, WORDS),
    Answer("instructions", "", WORDS),
    Answer("instructions", "<answer>yes", WORDS),
    Answer("language", "12 $yes$ ```yes```", {"language": "en"}),
    Answer("language", "", {"language": "en"}),
]  # fmt: skip
