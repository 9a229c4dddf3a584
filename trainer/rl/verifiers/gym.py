"""Answers to questions of reasoning-gym (`pip install dryvine[rl]`), scored by the package, inside a sandbox.

Record: `dataset`, `options`, `seed`, `size` and `index`, from which the question is made again: what belongs to it need
not be plain values. The package must not run anywhere else: ten of its datasets evaluate the answer, `eval` or sympy's
parser, which is eval too. In those an answer that is anything but numbers, names, lists, operators and calls of
elementary functions is wrong and not evaluated. That, the sandbox, and a process for each answer are three fences.

Right is a score of 1: many datasets give 0.01 or 0.05 to any text, which would be rewards for nothing. `partial` in the
record keeps the score as it is.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from dryvine.comm.extras import install
from dryvine.trainer.rl.verifiers import sandbox
from dryvine.trainer.rl.verifiers.sandbox import Allowed, SandboxError, Server
from dryvine.trainer.rl.verifiers.tags import final
from dryvine.trainer.rl.verifiers.verdict import Verdict, number

SECONDS = 60.0  # of the pool's clock: the package takes seconds to load after a kill
_ANSWER_SECONDS, _LOAD_SECONDS = 5.0, 40.0
_LONGEST = 10_000  # characters of an answer
_SCRIPT = Path(__file__).with_name("gym_inside.py")
# In reasoning-gym 0.1.25: those whose score_answer calls eval, exec or sympy.parse_expr.
EVALUATED = frozenset((
    "binary_matrix", "codeio", "countdown", "intermediate_integration", "n_queens", "number_sorting",
    "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
))  # fmt: skip
FUNCTIONS = frozenset((
    "Abs", "acos", "asin", "atan", "cos", "cosh", "exp", "ln", "log", "sin", "sinh", "sqrt", "tan", "tanh",
))  # fmt: skip
_PARTS = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Name, ast.Load, ast.List, ast.Tuple,
)  # fmt: skip


class _Scorer:
    """A sandbox that has loaded the package; another after one was lost."""

    def __init__(self) -> None:
        self._server: Server | None = None

    def ask(self, asked: Mapping[str, object]) -> Verdict:
        """The score of one answer. Raises SandboxError."""
        if self._server is None:
            self._server = self.start()
        try:
            said = json.loads(self._server.ask(json.dumps(asked), 2 * _ANSWER_SECONDS))
            return Verdict(said["score"], str(said["why"]))
        except (SandboxError, ValueError, KeyError, TypeError):
            self._server.close()
            self._server = None
            raise

    def start(self) -> Server:
        folder = _folder()
        allowed = Allowed(seconds=3600.0, memory_mb=3072, shared=(folder,))
        server = Server([_SCRIPT, str(folder)], allowed)
        server.ask("", _LOAD_SECONDS)
        return server


def check() -> None:
    """Raise RuntimeError, with the fix, if the package is missing or programs cannot be contained."""
    _folder()
    sandbox.check()


def verify(answer: str, problem: Mapping[str, object]) -> Verdict:
    """1 or 0; with `partial`, from 0 to 1. Raises SandboxError, ValueError."""
    dataset, inner = str(problem.get("dataset")), final(answer)
    source = {key: problem.get(key) for key in ("dataset", "options", "seed", "size")}
    if inner is None or len(inner) > _LONGEST:
        return Verdict(0.0, "not exactly one <answer>...</answer>, or too long")
    if dataset in EVALUATED and not harmless(inner):
        return Verdict(0.0, f"{dataset} would evaluate it")
    asked = {"source": json.dumps(source, sort_keys=True), "index": number(problem, "index"), "answer": inner}
    verdict = _scorer().ask(asked | {"seconds": _ANSWER_SECONDS})
    if verdict.score is None or problem.get("partial") is True:
        return verdict
    return Verdict(float(verdict.score >= 1.0), verdict.why or f"{verdict.score:g} by {dataset}")


def harmless(text: str) -> bool:
    """Whether Python's or sympy's evaluation of a text can run nothing. What is no expression is not evaluated, but
    sympy also reads `5!`, and `lambda` in a way of its own."""
    try:
        tree = ast.parse(text.replace("!", " ").strip(), mode="eval")
    except SyntaxError:
        return "!" not in text and "lambda" not in text
    except (ValueError, RecursionError, MemoryError):
        return False
    return all(_allowed(node) for node in ast.walk(tree))


def _allowed(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            return name in FUNCTIONS
        case ast.Name(id=name):
            return not name.startswith("_")
        case ast.Constant(value=str(text)):
            return "(" not in text  # sympy's functions evaluate strings
        case ast.Constant(value=value):
            return isinstance(value, int | float)
    return isinstance(node, _PARTS)


@cache
def _scorer() -> _Scorer:
    return _Scorer()


def _folder() -> Path:
    """The folder that holds the package. Raises RuntimeError."""
    found = importlib.util.find_spec("reasoning_gym")
    if found is None or found.origin is None:
        raise RuntimeError(f"there is no reasoning_gym: {install('reasoning_gym')}")
    return Path(found.origin).resolve().parent.parent
