"""Floor 2: no file can do more than raise a documented error, soon, in a line, in little memory.

The corpus of ``hostile.py``, row by row: class and code, what the message names, the processor's time, the most bytes that the core held.
Then all of it in one process of little address space, one file of each code through the command line, and what the operating system can do
to a file while it is read: the calls are answered by a small library of our own, so that nothing depends on luck.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
from conftest import CANARY, PROMPT

from aprender import _core
from aprender.errors import Error, FormatError

ROOT = Path(__file__).resolve().parent.parent
CASES = hostile.cases()
CODES = {code for _, code, _ in _core.ERRORS}
SECONDS = 2.0
GIB = 1 << 30

#: AddressSanitizer maps terabytes for itself: a ceiling of address space means nothing under it.
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


# ---- row by row ------------------------------------------------------------------------------------------------------


def printable(text: str) -> bool:
    return all(" " <= letter <= "~" for letter in text)


def quoted_too_much(message: str, content: bytes) -> bool:
    """Whether 129 bytes of the file stand in the message."""
    shown = message.encode()
    return any(shown[at : at + 129] in content for at in range(len(shown) - 128))


def judge(case: hostile.Case, found: hostile.Outcome, target: Path) -> None:
    assert found.code in case.codes, found.message
    assert found.seconds < SECONDS
    assert found.growth <= found.ceiling
    if found.code == "OK":
        return
    said = found.message.removeprefix(str(target)).removeprefix("/model.safetensors").removeprefix(": ")
    assert said
    assert printable(said)
    assert len(said) < 480
    for value in case.says:
        assert value in said
    assert found.field is None or (printable(found.field) and len(found.field) <= 128)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_corpus(case: hostile.Case, tmp_path: Path) -> None:
    held = _core._live_bytes()
    found = hostile.outcome(case, tmp_path)
    judge(case, found, tmp_path / case.target if case.target else tmp_path)
    assert _core._live_bytes() == held  # and nothing is left behind
    if found.code != "OK":
        for path in tmp_path.iterdir():
            assert not path.is_file() or not quoted_too_much(found.message, path.read_bytes()[: 1 << 20])


def test_rows_are_told_apart() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert case.codes <= CODES | {"OK"}, case.name


def test_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    """A judge that accepts everything would make every row pass."""
    case = next(case for case in CASES if case.row == "G31")
    found = hostile.outcome(case, tmp_path)
    target = tmp_path / case.target
    judge(case, found, target)
    wrong: tuple[dict[str, Any], ...] = (
        {"code": "OK"}, {"code": "SHAPE"}, {"seconds": 3.0}, {"growth": found.ceiling + 1}, {"message": str(target)},
        {"message": f"{target}: two\nlines of 65536"}, {"message": f"{target}: no value"},
        {"message": found.message + "x" * 480}, {"field": "\x1b"},
    )  # fmt: skip
    for change in wrong:
        with pytest.raises(AssertionError):
            judge(case, hostile.replace(found, **change), target)
    assert quoted_too_much("x" * 129, b"y" + b"x" * 200)
    assert not quoted_too_much("x" * 128, b"x" * 200)


# ---- all of it in little memory --------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more


def python(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, env=environment(**more), cwd=ROOT)


def test_the_corpus_in_one_gibibyte(tmp_path: Path, record_property: Any) -> None:
    """RLIMIT_AS of 1 GiB over the whole process: no row may need more, and none may be answered differently."""
    ran = python(str(ROOT / "tests" / "hostile.py"), str(tmp_path), "0" if SANITIZED else str(GIB))
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["name"] for row in found] == [case.name for case in CASES]
    for case, row in zip(CASES, found, strict=True):
        assert row["code"] in case.codes, (case.name, row["message"])
    record_property("rows", len(found))
    record_property("slowest", max((row["seconds"], row["name"]) for row in found))
    record_property("most", max((row["growth"] / row["ceiling"], row["name"]) for row in found))


# ---- through the command line ----------------------------------------------------------------------------------------


def one_of_each_code() -> list[tuple[str, hostile.Case]]:
    first: dict[str, hostile.Case] = {}
    for case in CASES:
        if len(case.codes) == 1 and not any(callable(content) for content in case.files.values()):
            first.setdefault(next(iter(case.codes)), case)
    return sorted(first.items())


def test_command_line(tmp_path: Path) -> None:
    """Exit code 3, one line on stderr, that of the exception; 0 and nothing for a file that is sound."""

    def ask(numbered: tuple[int, tuple[str, hostile.Case]]) -> tuple[str, str, subprocess.CompletedProcess[str]]:
        number, (code, case) = numbered
        folder = tmp_path / str(number)
        folder.mkdir()
        return (
            code,
            hostile.outcome(case, folder).message,
            python("-m", "aprender.info", str(folder / case.target if case.target else folder)),
        )

    rows = [(code, case) for code, case in one_of_each_code() if code != "OK"]
    rows.append(("OK", next(case for case in CASES if case.name.startswith("M00"))))
    assert len(rows) >= 25
    with ThreadPoolExecutor(2) as pool:
        for code, message, ran in pool.map(ask, enumerate(rows)):
            if code == "OK":
                assert (ran.returncode, ran.stderr) == (0, "")
                continue
            assert (code, ran.returncode, ran.stderr.count("\n")) == (code, 3, 1), ran.stderr
            assert message in ran.stderr


# ---- what is opened --------------------------------------------------------------------------------------------------


def code_of(path: Path | str | bytes) -> str:
    try:
        _core.File(path)
    except Error as problem:
        return str(problem.code)
    except OSError as problem:
        return errno.errorcode[problem.errno]
    return "OK"


def test_special_files(tmp_path: Path) -> None:
    """X01: nothing hangs or fills the memory."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    assert code_of(tmp_path / "fifo") == code_of("/dev/zero") == "NOT_REGULAR"
    assert code_of(tmp_path / "loop") == "ELOOP"
    assert code_of(tmp_path / "empty") == "ENOENT"
    assert code_of("/proc/self/mem") == "TRUNCATED"  # a regular file of no bytes, as fstat says


def test_permissions(tmp_path: Path) -> None:
    """X02: a file that may not be read; one whose name goes while it is open."""
    path = tmp_path / "x.gguf"
    path.write_bytes(hostile.WHOLE)
    file = _core.File(path)
    path.unlink()
    hostile.check_minimal(file)
    folder = Path("/tmp") / f"aprender-{os.getpid()}"  # pytest's own folders are closed to others
    folder.mkdir(mode=0o755)
    try:
        shut = folder / "x.gguf"
        shut.write_bytes(hostile.WHOLE)
        shut.chmod(0)
        root = os.geteuid() == 0
        if root:
            assert code_of(shut) == "OK"
            os.seteuid(65534)
        try:
            assert code_of(shut) == "EACCES"
        finally:
            if root:
                os.seteuid(0)
    finally:
        shutil.rmtree(folder)


def test_odd_paths(tmp_path: Path) -> None:
    """X03: any bytes but NUL, for a good file and for a bad one."""
    for name in (b"a\nb.gguf", b"a \xff.gguf", "ä€.gguf".encode(), b"x" * 250 + b".gguf"):
        path = os.fsencode(tmp_path) + b"/" + name
        Path(os.fsdecode(path)).write_bytes(hostile.WHOLE)
        file = _core.File(path)
        hostile.check_minimal(file)
        assert os.fsencode(file.path) == path
        Path(os.fsdecode(path)).write_bytes(hostile.WHOLE[:-1])
        with pytest.raises(FormatError) as caught:
            _core.File(path)
        assert caught.value.code == "OFFSET"
        assert os.fsencode(str(caught.value.path)) == path
        ran = python("-m", "aprender.info", os.fsdecode(path))
        assert (ran.returncode, ran.stderr.count("\n")) == (3, 1)
    with pytest.raises(ValueError, match="null"):
        _core.File("a\0b")


# ---- what happens to a file while it is read -------------------------------------------------------------------------

#: Answers pread for the one file that VICTIM names.  DO says what to do at call AT (from 1).  "holes": what has no blocks on the disk is
#: zeros, and so is fresh memory: nothing is copied, and a file of gigabytes takes none.
SHIM = r"""
    #define _GNU_SOURCE
    #include <dlfcn.h>
    #include <errno.h>
    #include <fcntl.h>
    #include <limits.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/types.h>
    #include <unistd.h>

    static int is_victim(int fd) {
        char link[64], at[PATH_MAX + 1];
        const char *victim = getenv("VICTIM");
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = victim ? readlink(link, at, PATH_MAX) : -1;
        return n >= 0 && (size_t)n == strlen(victim) && !memcmp(at, victim, (size_t)n);
    }

    /* Before the call is made; errno to fail with, or 0. */
    static int act(const char *what, size_t *n) {
        const char *victim = getenv("VICTIM"), *other = getenv("OTHER");
        if (!strcmp(what, "EIO")) return EIO;
        if (!strcmp(what, "EINTR")) return EINTR;
        if (!strcmp(what, "truncate") && truncate(victim, 100)) abort();
        if (!strcmp(what, "empty") && truncate(victim, 0)) abort();
        if (!strcmp(what, "replace") && rename(other, victim)) abort();
        if (!strcmp(what, "unlink") && unlink(victim)) abort();
        if (!strcmp(what, "byte")) *n = *n > 1 ? 1 : *n;
        if (!strcmp(what, "append") || !strcmp(what, "write")) {
            int fd = open(victim, O_WRONLY | (*what == 'a' ? O_APPEND : 0));
            if (fd < 0 || write(fd, "x", 1) != 1 || close(fd)) abort();
        }
        return 0;
    }

    ssize_t pread(int fd, void *p, size_t n, off_t at) {
        static int calls;
        static ssize_t (*real)(int, void *, size_t, off_t);
        if (!real) real = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
        const char *what = getenv("DO"), *when = getenv("AT");
        if (what && is_victim(fd) && !strcmp(what, "holes")) {
            off_t data = lseek(fd, at, SEEK_DATA);
            if (data > at) return data - at < (off_t)n ? data - at : (ssize_t)n;
            off_t hole = lseek(fd, at, SEEK_HOLE);
            if (hole - at < (off_t)n) n = (size_t)(hole - at);
        }
        else if (what && is_victim(fd)) {
            int fails = ++calls == atoi(when) || !strcmp(what, "byte") || !strcmp(when, "all") ? act(what, &n) : 0;
            if (fails) { errno = fails; return -1; }
        }
        return real(fd, p, n, at);
    }
    ssize_t pread64(int fd, void *p, size_t n, off_t at) { return pread(fd, p, n, at); }
"""

#: Opens the file twice: the second time nothing happens to it any more.
OPENER = """
    import errno, sys
    from aprender import _core
    for _ in range(2):
        try:
            file = _core.File(sys.argv[1])
            print("OK", file.nbytes, sum(bytes(file.raw("b"))))
        except OSError as problem:
            print(errno.errorcode[problem.errno], problem.filename == sys.argv[1], 0)
        except Exception as problem:
            print(problem.code, problem.offset, 0)
        if _core._live_bytes() and "file" not in globals():
            print("leak", _core._live_bytes(), 0)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What to preload."""
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(textwrap.dedent(SHIM))
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", folder / "shim.so", folder / "shim.c", "-ldl"], check=True)
    return " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(folder / "shim.so")]))


def meanwhile(shim: str, folder: Path, do: str, at: str = "1") -> list[list[str]]:
    """What the two openings of a GGUF say when `do` befalls it at a call of pread."""
    victim, other = folder / "x.gguf", folder / "other"
    victim.write_bytes(hostile.WHOLE)
    other.write_bytes(bytes(hostile.replace(hostile.BG, data=bytes(len(hostile.BG.data)))))
    ran = python("-c", textwrap.dedent(OPENER), str(victim), LD_PRELOAD=shim, VICTIM=str(victim), OTHER=str(other), DO=do, AT=at)
    assert (ran.returncode, ran.stderr) == (0, "")
    return [line.split() for line in ran.stdout.splitlines()]


SOUND = ["OK", str(len(hostile.WHOLE)), str(sum(range(24)))]


@pytest.mark.parametrize(("do", "offset"), [("truncate", "100"), ("empty", "0")])
def test_truncated_while_it_is_read(do: str, offset: str, shim: str, tmp_path: Path) -> None:
    """X04: the size was taken, then the file shrank; the message says where it ended."""
    first, second = meanwhile(shim, tmp_path, do)
    assert first[:2] == ["CHANGED", offset]
    assert second[0] in ("TRUNCATED", "STRING", "COUNT")


@pytest.mark.parametrize("do", ["append", "write"])
def test_written_while_it_is_read(do: str, shim: str, tmp_path: Path) -> None:
    """X04: what was read may be half old, half new."""
    first, _ = meanwhile(shim, tmp_path, do)
    assert first[0] == "CHANGED"


@pytest.mark.parametrize("do", ["replace", "unlink"])
def test_replaced_while_it_is_read(do: str, shim: str, tmp_path: Path) -> None:
    """X05: the open file is the old one, whole."""
    first, second = meanwhile(shim, tmp_path, do)
    assert first == SOUND
    assert second == (["ENOENT", "True", "0"] if do == "unlink" else ["OK", str(len(hostile.WHOLE)), "0"])


def test_truncated_after_it_was_read(tmp_path: Path) -> None:
    """X06: nothing is mapped, so a file that shrinks later changes no result and ends no process."""
    path = tmp_path / "canary.gguf"
    shutil.copy(CANARY / "canary.gguf", path)
    model = _core.Model(_core.File(path))
    key = ("lm_head", None)
    before = _core.Run(model, threads=1).forward(PROMPT, [key])[key]
    os.truncate(path, 0)
    after = _core.Run(model, threads=1).forward(PROMPT, [key])[key]
    assert before.tobytes() == after.tobytes()


def test_errors_of_the_disk(shim: str, tmp_path: Path) -> None:
    """X07: EIO is an OSError with path and number, EINTR is nothing, a byte at a time is enough."""
    assert meanwhile(shim, tmp_path, "EIO") == [["EIO", "True", "0"], SOUND]
    assert meanwhile(shim, tmp_path, "EIO", "all") == [["EIO", "True", "0"]] * 2
    assert meanwhile(shim, tmp_path, "EINTR") == [SOUND] * 2
    assert meanwhile(shim, tmp_path, "byte") == [SOUND] * 2
    assert meanwhile(shim, tmp_path, "nothing") == [SOUND] * 2


# ---- large files -----------------------------------------------------------------------------------------------------


def sparse(path: Path, pairs: tuple[bytes, ...], infos: tuple[hostile.Info, ...], at: dict[int, bytes], size: int) -> Path:
    """A GGUF with a hole for data: bytes at places of the data section, which has `size` bytes."""
    head = bytes(hostile.Gguf(pairs=pairs, infos=infos, data=b""))
    head += bytes(-len(head) % 32)
    with path.open("wb") as file:
        file.write(head)
        for place, data in at.items():
            file.seek(len(head) + place)
            file.write(data)
        file.truncate(len(head) + size)
    return path


FAR = (hostile.Info("filler", (1 << 32,), 24, 0), hostile.Info("far", (4,), 0, 1 << 32))
LARGE = """
    import resource, sys
    from aprender import _core
    if int(sys.argv[2]):
        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        print(_core.File(sys.argv[1]).dequantize(sys.argv[3]).tolist())
    except Exception as problem:
        print(type(problem).__name__, getattr(problem, "code", None))
"""


@pytest.mark.parametrize("ceiling", [0] if SANITIZED else [0, GIB])
def test_offsets_beyond_32_bits(ceiling: int, tmp_path: Path) -> None:
    """G59: a tensor behind 4 GiB, read in a process that could not hold the file; the one that cannot be held is a MemoryError."""
    path = sparse(tmp_path / "x.gguf", (), FAR, {1 << 32: np.arange(4, dtype="<f4").tobytes()}, (1 << 32) + 16)
    assert json.loads(python("-c", textwrap.dedent(LARGE), str(path), str(ceiling), "far").stdout) == [0, 1, 2, 3]
    if ceiling:
        assert python("-c", textwrap.dedent(LARGE), str(path), str(ceiling), "filler").stdout.split() == ["MemoryError", "None"]


def test_a_gibibyte_of_metadata(shim: str, tmp_path: Path) -> None:
    """More than 1 GiB before the tensors is refused by code, also where there is the memory to read it; just below is read."""
    path = tmp_path / "x.gguf"
    holes = {"LD_PRELOAD": shim, "VICTIM": str(path), "DO": "holes", "AT": "0"}
    for count, wanted in ((GIB, ["FormatError", "LIMIT"]), (GIB - 4096, ["UnknownName", "LOOKUP"])):
        head = bytes(hostile.Gguf(pairs=(hostile.pair("k", 9, hostile.array(0, count)),), infos=(), data=b""))
        path.write_bytes(head)
        with path.open("r+b") as file:
            file.truncate(len(head) + count)
            file.seek(len(head) + count - 1)
            file.write(b"\0")
        assert python("-c", textwrap.dedent(LARGE), str(path), "0", "k", **holes).stdout.split() == wanted


# ---- too few of everything -------------------------------------------------------------------------------------------


def many_shards(folder: Path, count: int) -> Path:
    shards = {f"model-{n + 1:05}-of-{count:05}.safetensors": f"t{n}" for n in range(count)}
    for name, tensor in shards.items():
        (folder / name).write_bytes(hostile.framed(f'{{"{tensor}":{hostile.entry()}}}', bytes(16)))
    (folder / hostile.INDEX).write_bytes(hostile.index({tensor: name for name, tensor in shards.items()}))
    return folder


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


if hostile.reads("shards"):

    def test_few_descriptors(tmp_path: Path) -> None:
        """X09: a hundred shards, sixteen descriptors: opened one after the other, or EMFILE; none is lost either way."""
        folder, had = many_shards(tmp_path, 100), descriptors()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (had + 16, hard))
        try:
            assert code_of(folder) in ("OK", "EMFILE")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert descriptors() == had
        assert code_of(folder) == "OK"


def test_no_descriptor(tmp_path: Path) -> None:
    """X09: not even one, or too few for the configuration beside the weights."""
    case = next(case for case in CASES if case.name == "J21 valid")
    folder, had = case.write(tmp_path), descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(16)]
    top = max(spare)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, hard))
        found = []
        for fd in reversed(spare):
            found.append(code_of(folder))
            os.close(fd)
        found.append(code_of(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found[0] == "EMFILE"
    assert found[-1] == "OK"
    assert set(found) == {"EMFILE", "OK"}
    assert descriptors() == had


STEPS = """
    import json, resource, sys
    from pathlib import Path
    from aprender import _core
    path, prompt, size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    _core.Run(_core.Model(_core.File(path)), threads=1).forward(prompt)
    said = []
    for step in range(33):
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + step * size // 16, resource.RLIM_INFINITY))
        code = "OK"
        try:
            kept = _core.Run(_core.Model(_core.File(path)), threads=1).forward(prompt, "all")
        except MemoryError:
            code = "MemoryError"
        kept = None
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.append([code, _core._live_bytes()])
    print(json.dumps(said))
"""


def test_little_address_space(tmp_path: Path) -> None:
    """X10: RLIMIT_AS from what the process has up to twice the model more, in steps: MemoryError or a result, and nothing lost."""
    if SANITIZED:
        return
    table = "token_embd.weight"
    kind, (columns, rows), data = hostile.LLAMA_TENSORS[table]
    wide: dict[str, hostile.Stored] = {table: (kind, (columns, 4000 * rows), 4000 * data)}
    path = tmp_path / "x.gguf"
    path.write_bytes(hostile.llama({"llama.vocab_size": hostile.said_u32(4000 * rows)}, wide))
    ran = python("-c", textwrap.dedent(STEPS), str(path), "[1, 2, 3]", str(path.stat().st_size))
    assert ran.returncode == 0, ran.stderr
    codes = [code for code, _ in json.loads(ran.stdout)]
    assert codes[0] == "MemoryError"
    assert codes[-1] == "OK"
    assert set(codes) == {"MemoryError", "OK"}
    assert len({live for _, live in json.loads(ran.stdout)}) == 1
