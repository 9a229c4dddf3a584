"""Calls a function of an untrusted program with arguments from stdin and prints what it returns as the last line, both
as JSON: `python -I -S call.py PROGRAM FUNCTION`. Runs inside a sandbox and is trusted no more than the program."""

import importlib.util
import json
import sys

path, function = sys.argv[1:]
spec = importlib.util.spec_from_file_location("solution", path)
assert spec
assert spec.loader
solution = importlib.util.module_from_spec(spec)
sys.modules["solution"] = solution
spec.loader.exec_module(solution)
result = getattr(solution, function)(*json.load(sys.stdin))
print("\n" + json.dumps(result))
