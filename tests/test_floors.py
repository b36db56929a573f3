"""The house rules, enforced: imports and includes point down, the core neither prints nor exits, a name is spelled once.

Every rule is a function from source text to a list of complaints.  It is run over the whole tree, over snippets that it must catch, and
over some that it must not: a rule that catches nothing is no rule.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest

from aprender import _core

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "aprender"

#: Height of each folder of csrc/.  Two folders at one height do not know each other.
C_FLOORS = {"base": 0, "quant": 1, "measure": 1, "file": 2, "plan": 3, "cpu": 4, "cuda": 4, "run": 5, "py": 6}

#: Height of each part of the package; `sides` and `judge` are siblings; whatever is not named is a command, above everything.
PYTHON_FLOORS = {
    "errors": 0, "_core": 0, "atomic": 0, "stages": 1, "captures": 1, "manifest": 1, "text": 1, "arithmetic": 1, "aprt": 1, "writers": 1,
    "mixes": 1, "pieces": 1, "conversion": 2, "sides": 2, "judge": 2,
    "asking": 3, "probes": 3, "references": 3, "declared": 3, "repair": 3, "judgement": 3, "parity": 3, "bisection": 3, "report": 4,
}  # fmt: skip
COMMANDS = 5


def c_files(*suffixes: str) -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in (suffixes or (".c", ".h", ".cu", ".cuh")))


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def none(complaints: list[str]) -> None:
    """Fail with all of them, one a line."""
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


# ---- C: the parts of a source --------------------------------------------------------------------------------------------------------

C_TOKEN = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)


def c_code(text: str, keep_strings: bool = False) -> str:
    """The source without comments; strings emptied unless wanted."""

    def blank(match: re.Match[str]) -> str:
        piece = match[0]
        if piece[0] == "/":
            return " " + "\n" * piece.count("\n")
        return piece if keep_strings else piece[0] * 2

    return C_TOKEN.sub(blank, text)


def c_strings(text: str) -> Iterator[str]:
    """String literals, those of #include lines left out."""
    code = re.sub(r"(?m)^\s*#\s*include.*$", "", c_code(text, keep_strings=True))
    for match in C_TOKEN.finditer(code):
        if match[0][0] == '"':
            yield match[0][1:-1]


def c_includes(text: str) -> list[str]:
    """What is included, in order: "x.h" as x.h, <x.h> as <x.h>."""
    found = re.findall(r'(?m)^\s*#\s*include\s+(?:"([^"]+)"|(<[^>]+>))', c_code(text, keep_strings=True))
    return [quoted or angled for quoted, angled in found]


# ---- C: the rules ----------------------------------------------------------------------------------------------------------------------


def upward_includes(path: str, text: str) -> list[str]:
    """`path` is relative to csrc/: base/err.c."""
    folder = path.split("/")[0]
    complaints = []
    for name in c_includes(text):
        if name.startswith("<"):
            continue
        target = (CSRC / Path(path).parent / name).resolve()
        if not target.is_relative_to(CSRC):
            complaints.append(f"{path} includes {name}, outside csrc/")
            continue
        other = target.relative_to(CSRC).parts[0]
        if other != folder and C_FLOORS.get(other, 99) >= C_FLOORS[folder]:
            complaints.append(f"{path} ({folder}) includes {name} ({other})")
    return complaints


def forbidden_calls(path: str, text: str) -> list[str]:
    """Nothing prints, exits or asserts; the heap has one door, base/mem.h."""
    words = ["printf", "fprintf", "vprintf", "puts", "fputs", "putchar", "perror", "exit", "_exit", "abort", "assert", "raise"]
    if not path.startswith("base/"):
        words += ["malloc", "calloc", "realloc", "free", "aligned_alloc", "posix_memalign", "strdup", "strndup", "alloca"]
    code = c_code(text)
    return [f"{path} calls {match[1]}" for match in re.finditer(rf"\b({'|'.join(words)})\s*\(", code)]


def python_headers(path: str, text: str) -> list[str]:
    """Python.h and NumPy belong to py/, where py.h, and in it Python.h, comes first."""
    includes = c_includes(text)
    if not path.startswith("py/"):
        return [f"{path} includes {name}" for name in includes if name == "<Python.h>" or name.startswith("<numpy/")]
    first = "<Python.h>" if path == "py/py.h" else "py.h"
    return [] if includes and includes[0] == first else [f"{path} must include {first} first"]


def row_macros(path: str, text: str) -> list[str]:
    """A row file undefines every macro that its rows use."""
    code = c_code(text)
    used = set(re.findall(r"(?m)^([A-Z])\(", code))
    undefined = set(re.findall(r"(?m)^#undef ([A-Z])\s*$", code))
    complaints = [f"{path} leaves {macro} defined" for macro in sorted(used - undefined)]
    return complaints if used else [*complaints, f"{path} has no rows"]


C_RULES = [upward_includes, forbidden_calls, python_headers]


@pytest.mark.parametrize("rule", C_RULES, ids=lambda rule: rule.__name__)
def test_c(rule: Callable[[str, str], list[str]]) -> None:
    files = [path for path in c_files() if path.name != "all.c"]
    assert len(files) > 40  # 57 at the time of writing: the rule has looked at something
    none([line for path in files for line in rule(str(path.relative_to(CSRC)), path.read_text())])


def test_row_macros() -> None:
    files = c_files(".def")
    assert len(files) > 8
    none([line for path in files for line in row_macros(str(path.relative_to(CSRC)), path.read_text())])


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (upward_includes, "base/err.c", '#include "../quant/format.h"\n'),
        (upward_includes, "plan/plan.c", '#include "../run/run.h"\n'),
        (upward_includes, "cpu/norm.c", '#include "../cuda/norm.h"\n'),
        (upward_includes, "file/gguf.c", '/* fine */\n  # include "../plan/model.h"\n'),
        (upward_includes, "base/err.c", '#include "../../../usr/include/x.h"\n'),
        (forbidden_calls, "plan/plan.c", 'int f(void) { printf("x"); return 0; }'),
        (forbidden_calls, "base/err.c", "void f(void) { exit (1); }"),
        (forbidden_calls, "base/err.c", "void f(int x) { assert(x); }"),
        (forbidden_calls, "run/run.c", "void f(void) { abort(); }"),
        (forbidden_calls, "run/run.c", "void *f(void) { return malloc(3); }"),
        (python_headers, "run/run.c", "#include <Python.h>\n"),
        (python_headers, "cpu/norm.c", "#include <numpy/arrayobject.h>\n"),
        (python_headers, "py/run.c", '#include <string.h>\n#include "py.h"\n'),
        (python_headers, "py/py.h", '#include "../base/err.h"\n#include <Python.h>\n'),
        (row_macros, "plan/x.def", "X( a )\nY( b )\n#undef X\n"),
        (row_macros, "plan/x.def", "/* X( a ) */\n#undef X\n"),
    ],
)
def test_c_rules_catch(rule: Callable[[str, str], list[str]], path: str, text: str) -> None:
    assert rule(path, text)


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (upward_includes, "cpu/norm.c", '#include "cpu.h"\n#include "../base/math.h"\n#include <math.h>\n'),
        (upward_includes, "base/err.c", '/* #include "../py/py.h" */\n// #include "../py/py.h"\n'),
        (forbidden_calls, "plan/plan.c", 'int f(char *s) { /* printf(s) */ return snprintf(s, 4, "exit(1)"); }'),
        (forbidden_calls, "base/mem.c", "void *f(void) { atexit(g); return malloc(3); }"),
        (forbidden_calls, "py/run.c", "void f(void *p) { PyMem_Free(p); _Static_assert(1, sizeof p); }"),
        (python_headers, "py/run.c", '#include "py.h"\n#include <string.h>\n'),
        (row_macros, "plan/x.def", "/* Z( no row ) */\nX( a )\n#undef X\n"),
    ],
)
def test_c_rules_do_not_catch(rule: Callable[[str, str], list[str]], path: str, text: str) -> None:
    assert not rule(path, text)


# ---- C: the core as one file -----------------------------------------------------------------------------------------------------------


def unit_complaints(text: str) -> list[str]:
    """all.c names every .c of its floors exactly once, floors in order; cuda/ is built by another compiler into its own library."""
    named = [name for name in c_includes(text) if name.endswith(".c")]
    wanted = {str(path.relative_to(CSRC)) for path in c_files(".c") if path.parent != CSRC and path.parent.name != "cuda"}
    complaints = [f"all.c has {name} {named.count(name)} times" for name in sorted(set(named)) if named.count(name) > 1]
    complaints += [f"all.c lacks {name}" for name in sorted(wanted - set(named))]
    complaints += [f"all.c has {name}, which is no source" for name in sorted(set(named) - wanted)]
    heights = [C_FLOORS.get(name.split("/")[0], -1) for name in named]
    return complaints + (["all.c is not in floor order"] if heights != sorted(heights) else [])


def test_one_file_has_every_source_once() -> None:
    text = (CSRC / "all.c").read_text()
    assert not unit_complaints(text)
    assert unit_complaints(text.replace('#include "run/run.c"', ""))
    assert unit_complaints(text + '\n#include "run/run.c"\n')
    assert unit_complaints(
        text.replace('#include "base/err.c"', "").replace('#include "run/run.c"', '#include "run/run.c"\n#include "base/err.c"')
    )


def compiled(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Does the translation unit pass?  A file-local name used twice, a macro defined twice, an undeclared function: it does not."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "no C compiler, and yet the extension is built"
    file = folder / "unit.c"
    file.write_text(source)
    includes = [f"-I{path}" for path in (CSRC, numpy.get_include(), sysconfig.get_paths()["include"])]
    macros = ["-DNPY_NO_DEPRECATED_API=NPY_2_0_API_VERSION", "-DNPY_TARGET_VERSION=NPY_2_0_API_VERSION", "-D_GNU_SOURCE"]
    strict = ["-std=c11", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Werror=implicit-function-declaration"]
    return subprocess.run([compiler, *strict, *macros, *includes, str(file)], capture_output=True, text=True, check=False)


def test_one_file_compiles_alone(tmp_path: Path) -> None:
    good = compiled(f'#include "{CSRC}/all.c"\n', tmp_path)
    assert good.returncode == 0, good.stderr[-3000:]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("int unit_extra(void) { return unit_undeclared(3); }", "implicit declaration"),
        ("static int plan_size(int x) { return x; }", "conflicting types"),
        ("#define O(a, b) int unit_##a;\n#define A(a, b, c, d) int unit_2;\n", None),
    ],
    ids=["undeclared function", "file-local name used twice", "row macros are free again"],
)
def test_one_file_would_notice(tmp_path: Path, more: str, says: str | None) -> None:
    answer = compiled(f'#include "{CSRC}/all.c"\n{more}\n', tmp_path)
    assert answer.returncode == 0 if says is None else says in answer.stderr


# ---- Python: imports ---------------------------------------------------------------------------------------------------------------------


def part_of(module: str) -> str | None:
    """aprender.sides.hf -> sides; None for other packages and for the package itself."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "aprender" and len(pieces) > 1 else None


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of everything that is imported anywhere in the file: inside functions, relative, or by importlib with a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if part_of(source):
                yield source
            else:
                yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def upward_imports(path: str, text: str) -> list[str]:
    """`path` is relative to the package: sides/hf.py."""
    module = "aprender." + path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    if path == "__init__.py":
        return []  # the doors may open on any floor
    mine = part_of(module) or ""
    height = PYTHON_FLOORS.get(mine, COMMANDS)
    complaints = []
    for name in imported(ast.parse(text), module, path.endswith("__init__.py")):
        other = part_of(name)
        if other is None or other == mine or other == "__version__":
            continue
        above = PYTHON_FLOORS.get(other, COMMANDS)
        siblings = {mine, other} == {"sides", "judge"}
        if above > height or siblings:
            complaints.append(f"{path} imports {name}")
    return complaints


def eager_doors(path: str, text: str) -> list[str]:
    """`import aprender` must stay cheap: __init__.py imports parts of the package, and other packages, only inside functions."""
    allowed = {"__future__", "typing", "importlib", "importlib.metadata", "collections.abc"}
    complaints = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
            complaints += [f"{path} imports {name} at once" for name in names if name not in allowed and part_of(name) != "errors"]
    return complaints


def test_imports_point_down() -> None:
    files = python_files()
    assert len(files) > 10
    none([line for path in files for line in upward_imports(str(path.relative_to(PACKAGE)), path.read_text())])


def test_doors_are_lazy() -> None:
    assert not eager_doors("__init__.py", (PACKAGE / "__init__.py").read_text())
    assert eager_doors("__init__.py", "import numpy\n")
    assert eager_doors("__init__.py", "from aprender.captures import Captures\n")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("stages.py", "from aprender import captures\nimport aprender.bisection\n"),
        ("captures.py", "def f():\n    from aprender.sides import own\n"),
        ("judge/noise.py", "import aprender.sides.hf\n"),
        ("sides/own.py", "from aprender.judge import witness\n"),
        ("sides/own.py", "from ..judge import witness\n"),
        ("judge/__init__.py", "from ..report import terminal\n"),
        ("bisection.py", "class A:\n    def f(self):\n        import aprender.report.terminal\n"),
        ("report/terminal.py", "import importlib\nimportlib.import_module('aprender.bisect')\n"),
        ("report/terminal.py", "from aprender import _command\n"),
        ("errors.py", "from aprender import _core, stages\n"),
    ],
)
def test_upward_imports_are_caught(path: str, text: str) -> None:
    assert upward_imports(path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("captures.py", "from aprender import _core, stages\nfrom aprender.errors import FormatError\nfrom . import text\n"),
        ("sides/own.py", "from aprender import __version__, arithmetic\nfrom . import base\nfrom ..captures import Captures\n"),
        ("judge/verdict.py", "from .noise import predict\nimport numpy\n"),
        ("bisection.py", "from aprender import judge, sides\n"),
        ("bisect.py", "from aprender import _command, report\n'import aprender.nowhere'\n"),
    ],
)
def test_downward_imports_are_not_caught(path: str, text: str) -> None:
    assert not upward_imports(path, text)


# ---- names are spelled once ------------------------------------------------------------------------------------------------------

STAGES = {row[0] for row in _core.STAGES}
OPS = {row[0] for row in _core.OPS}
FORMATS = {row[0] for row in _core.FORMATS}
ARCHS = {row[0] for row in _core.ARCHS}
NAMES = STAGES | OPS | FORMATS | ARCHS

#: Files that may spell names, and which.  In sides/ it is the name maps: constants of the module, in capitals.
#: text/words.py knows pre-tokenizers by name, and kinds of vocabulary; two of them are called what an architecture is called.
ALLOWED = {
    "mixes.py": FORMATS, "judge/witness.py": NAMES, "judge/faults.py": NAMES, "judge/noise.py": OPS, "judge/ggml.py": OPS | FORMATS,
    "text/words.py": {"qwen2", "llama"}, "judge/diagnose.py": OPS, "judge/shapes.py": {"BIAS"},
    **dict.fromkeys((f"judge/{name}.py" for name in ("case", "changes", "fits", "fused", "gauge", "narrow", "roundings")), OPS),
}  # fmt: skip


def spelled(literal: str) -> set[str]:
    """The names in a literal.  Prose (anything with a blank) is for people; a key is what code compares or looks up."""
    return set() if re.search(r"\s", literal) else set(re.findall(r"[\w-]+", literal)) & NAMES


def python_literals(text: str, skip_constants: bool) -> Iterator[tuple[int, str]]:
    """Line and value of every string but docstrings; with `skip_constants`, none of those inside `NAME = …` of the module."""
    tree = ast.parse(text)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                skipped.add(statement.value)  # a docstring, or one after a constant
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if skip_constants and any(isinstance(target, ast.Name) and target.id.isupper() for target in targets):
            skipped.update(ast.walk(statement))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.lineno, node.value


def python_names(path: str, text: str) -> list[str]:
    allowed = ALLOWED.get(path, set())
    found = python_literals(text, skip_constants=path.startswith("sides/"))
    return [f"{path}:{line} spells {name!r}" for line, literal in found for name in sorted(spelled(literal) - allowed)]


def c_names(path: str, text: str) -> list[str]:
    own = {name for name in FORMATS if Path(path).stem.upper() == name.upper()}
    return [f"{path} spells {name!r}" for literal in c_strings(text) for name in sorted(spelled(literal) - own)]


def test_python_spells_no_name() -> None:
    none([line for path in python_files() for line in python_names(str(path.relative_to(PACKAGE)), path.read_text())])


def test_c_spells_no_name() -> None:
    none([line for path in c_files() for line in c_names(str(path.relative_to(CSRC)), path.read_text())])


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("bisection.py", "last = captures['lm_head', None]\n"),
        ("report/terminal.py", "def f(row):\n    return row.op == 'MATMUL'\n"),
        ("sides/own.py", "def f(c):\n    return c['ffn_out', 3]\n"),
        ("captures.py", "NAME = f'lm_head.{3}'\n"),
        ("captures.py", "KEY = '3.attn_scores'\n"),
        ("info.py", "if arch == 'qwen2':\n    pass\n"),
        ("judge/noise.py", "def f(stage):\n    return stage == 'attn_norm'\n"),
        ("info.py", "if fmt in ('Q4_K', 'x'):\n    pass\n"),
    ],
)
def test_spelled_names_are_caught(path: str, text: str) -> None:
    assert python_names(path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("bisection.py", "'''About lm_head.'''\ndef f():\n    'lm_head'\n    return 'the lm_head is wrong'\n"),
        ("judge/witness.py", "x = {'lm_head': 1, 'qwen2': 2}\n"),
        ("judge/noise.py", "RULES = {'MATMUL': 1}\n"),
        ("sides/hf.py", "SITES = {'lm_head': 'lm_head', 'qwen2': 1}\nMAP: dict[str, str] = {'attention': 'o_proj'}\n"),
        ("stages.py", "x = 'my_lm_head_2'\n"),
        ("text/words.py", "PRE = {'qwen2': 1, 'llama-bpe': 2}\n"),
    ],
)
def test_other_strings_are_not_caught(path: str, text: str) -> None:
    assert not python_names(path, text)


def test_c_names_are_caught() -> None:
    assert c_names("run/run.c", 'int f(const char *s) { return !strcmp(s, "lm_head"); }')
    assert c_names("quant/q8_0.c", 'const char *f = "Q4_K";')
    assert not c_names("quant/q4_k.c", 'const char *f = "Q4_K"; int x = AP_W_output; /* "lm_head" */')
    assert not c_names("plan/tables.c", '#include "attention.c"\nconst char *f = "no lm_head here";')
