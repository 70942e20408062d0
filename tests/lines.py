"""Lines of code of each module, without comments, docstrings and blank lines: `python -m tests.lines`."""

import ast
import io
import tokenize
from pathlib import Path

MODULES = ("ddpm.py", "unet.py", "data.py", "train.py", "sample.py", "server.py", "monitor.py")
IGNORED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def count(source: str) -> int:
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in IGNORED:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    counts = {name: count((root / name).read_text(encoding="utf-8")) for name in MODULES if (root / name).exists()}
    for name, lines in counts.items():
        print(f"{name:12}{lines:6}")
    print(f"{'all':12}{sum(counts.values()):6}")
