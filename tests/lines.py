"""How much there is to read, module by module: `python -m tests.lines`.

Tokens rather than lines, because lines can be packed. Comments, docstrings and layout (newlines, indents) do not count;
an f-string counts as one token in every version of Python.
"""

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

MODULES = ("ddpm.py", "unet.py", "data.py", "sample.py", "train.py", "server.py", "monitor.py")
IGNORED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FSTRING_START, FSTRING_END = (getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END"))


@dataclass(frozen=True)
class Size:
    """What one module, or several together, ask of a reader."""

    lines: int  # that hold code
    tokens: int
    conditionals: int  # expressions `a if b else c`
    longest: int  # lines of code of the longest function, without functions inside it counted apart
    longest_name: str
    unformatted: int  # `# fmt: skip` outside tables: on anything but an assignment at the top level

    def __add__(self, other: "Size") -> "Size":
        longest = max(self, other, key=lambda size: size.longest)
        return Size(
            self.lines + other.lines,
            self.tokens + other.tokens,
            self.conditionals + other.conditionals,
            longest.longest,
            longest.longest_name,
            self.unformatted + other.unformatted,
        )

    def row(self, name: str) -> str:
        density, conditionals = self.tokens / self.lines, 100 * self.conditionals / self.lines
        longest = f"{self.longest:>6} {self.longest_name}"
        return (
            f"{name:12}{self.lines:>7,}{self.tokens:>8,}{density:>13.1f}{conditionals:>12.1f}"
            f"{self.unformatted:>10}{longest}"
        )


HEADER = f"{'':12}{'lines':>7}{'tokens':>8}{'tokens/line':>13}{'if-else/100':>12}{'fmt: skip':>10}  longest function"


def measure(source: str) -> Size:
    tree = ast.parse(source)
    lines, tokens = _code(source, _docstrings(tree))
    conditionals = sum(isinstance(node, ast.IfExp) for node in ast.walk(tree))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {node.name: len(lines & set(range(node.lineno, node.end_lineno + 1))) for node in functions}
    longest = max(sizes, key=sizes.get, default="-")
    tables = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    marks = [i for i, line in enumerate(source.splitlines(), 1) if re.search(r"# fmt: skip\s*$", line)]
    outside = [i for i in marks if not any(table.lineno <= i <= table.end_lineno for table in tables)]
    return Size(len(lines), tokens, conditionals, sizes.get(longest, 0), longest, len(outside))


def _docstrings(tree: ast.AST) -> set[int]:
    """The lines of all strings that stand as statements."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def _code(source: str, docstrings: set[int]) -> tuple[set[int], int]:
    """The lines that hold code, and the number of tokens on them."""
    lines, count, depth = set(), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in IGNORED or token.start[0] in docstrings:
            continue
        lines |= set(range(token.start[0], token.end[0] + 1))
        depth -= token.type == FSTRING_END
        count += depth == 0 and token.type != FSTRING_START
        depth += token.type == FSTRING_START
    return lines, count


def report(root: Path) -> str:
    sizes = {name: measure((root / name).read_text(encoding="utf-8")) for name in MODULES}
    builtin = [measure(path.read_text(encoding="utf-8")) for path in sorted((root / "builtin").glob("*.py"))]
    rows = [HEADER, *(size.row(name) for name, size in sizes.items())]
    rows.append(sum(list(sizes.values())[1:], sizes[MODULES[0]]).row("all"))
    if builtin:
        rows.append(sum(builtin[1:], builtin[0]).row("builtin/"))
    return "\n".join(rows)


if __name__ == "__main__":
    print(report(Path(__file__).parent.parent))
