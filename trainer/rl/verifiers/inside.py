"""The first program in a sandbox: puts limits on itself, says that it has begun, and becomes the untrusted program.

Runs as `python -I -S inside.py UID STARTED_FD LIMITS SCRIPT ...` and imports nothing of ours, which cannot be seen from
there. Limits are set here and not outside, since RLIMIT_NPROC counts all processes of a user in a namespace: outside
it would count the user's own. Root is not bound by it and so first becomes UID, which is nobody's; 0: is not root.
"""

import json
import os
import resource
import sys

uid, started, limits, *command = sys.argv[1:]
if int(uid):
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
for name, most in json.loads(limits).items():
    which = getattr(resource, name)
    hard = resource.getrlimit(which)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    # At the soft limit of CPU time a signal says why, one second later the process is killed.
    resource.setrlimit(which, (most, most + 1 if name == "RLIMIT_CPU" and most != hard else most))
os.write(int(started), b"1")
os.close(int(started))
os.execv(sys.executable, [sys.executable, "-I", "-S", *command])
