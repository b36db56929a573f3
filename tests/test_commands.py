"""The commands as a user meets them: exit codes, streams, one clear line for what is wrong, and that what they print is true.

Truth: the canary's README (formats, answer), the models that the tests write themselves, the row tables, and the sides called directly.
"""

from __future__ import annotations

import ast
import importlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import CANARY, PROMPT, write_folder
from hypothesis import given
from hypothesis import strategies as st

import aprender
from aprender import _command, _core, _show, info, run, stages, trace
from aprender.__main__ import COMMANDS, available
from aprender.__main__ import main as aprender_main
from aprender.captures import open_captures
from aprender.sides import open_side
from aprender.sides.own import OwnSide

PACKAGE = Path(aprender.__file__).parent
GGUF = str(CANARY / "canary.gguf")
ANSWER = [220, 17, 10, 17, 374, 220, 19, 13]  # " 2+2 is 4.", canary README

#: Words with which each command gets to its work; none of the files needs to exist.
WORDS: dict[str, list[str]] = {
    "bisect": [],
    "trace": ["model.gguf", "--prompt-ids", "1", "-o", "out"],
    "oracle": ["folder", "--prompt-ids", "1", "-o", "out"],
    "diff": ["a", "b"],
    "weights": ["a.gguf", "b"],
    "run": ["model.gguf", "--prompt-ids", "1"],
    "info": ["model.gguf"],
    "convert": ["model.gguf", "out.apr"],
    "env": [],
}
OURS = (trace, run, info)


def process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COLUMNS": "80"} | options.pop("env", {})
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=env, timeout=120, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad model files."""
    root = tmp_path_factory.mktemp("files")
    good = (CANARY / "canary.gguf").read_bytes()
    (root / "magic.gguf").write_bytes(b"NOPE" + good[4:])
    (root / "short.gguf").write_bytes(good[: len(good) // 2])
    (root / "empty.gguf").write_bytes(b"")
    (root / "text.txt").write_text("hello\n")
    tiny.save_gguf(tiny.Shape("llama", tied=True), root / "llama.gguf", "Q8_0")  # without tokenizer
    tiny.save_gguf(tiny.Shape("qwen3"), root / "qwen3.gguf", "F16")

    def hostile(writer: Any) -> None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(112)
        writer.add_name("evil\x1b[31m\nname")
        writer.add_string("llama.more", "x")

    tiny.save_gguf(tiny.Shape("llama"), root / "unbound.gguf", "F16", metadata=hostile)
    write_folder(root / "hf", tiny.Shape("qwen2", tied=True))
    (root / "hf-none").mkdir()
    (root / "occupied").mkdir()
    (root / "occupied" / "thesis.txt").write_text("important")
    return root


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """call(module, words...): exit code, stdout, stderr."""

    def called(module: Any, *words: object) -> tuple[int, str, str]:
        code = module.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return called


def one_line(err: str) -> None:
    assert err.startswith("aprender: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err


# ---- every command: the guard ----------------------------------------------------------------------------------------------------------


def command_modules() -> set[str]:
    """Modules of the package that define ``main`` under the guard."""
    found = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main" and any(ast.unparse(d) == "command" for d in node.decorator_list):
                found.add(path.stem)
    return found - {"__main__"}


def test_every_command_is_in_the_table_and_here() -> None:
    assert command_modules() == set(available())
    assert set(available()) <= set(COMMANDS)
    assert set(available()) <= set(WORDS)
    assert {"bisect", "trace", "run", "info"} <= set(available())


@pytest.fixture(scope="module")
def without_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is where the extension was never built."""
    root = tmp_path_factory.mktemp("bare")
    shutil.copytree(PACKAGE, root / "aprender", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.safetensors"))
    return root


# as python -m does; an editable installation would find the extension of the source tree
MODULE = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", sorted(available()))
def test_missing_core_is_exit_3(name: str, without_core: Path) -> None:
    for words in ([f"aprender.{name}"], ["aprender", name]):
        done = process("-c", MODULE, *words, *WORDS[name], cwd=without_core)
        assert done.returncode == 3, done.stderr
        assert done.stdout == ""
        one_line(done.stderr)
        assert "_core" in done.stderr


@pytest.mark.parametrize("name", sorted(available()))
def test_missing_core_does_not_stop_help(name: str, without_core: Path) -> None:
    done = process("-c", MODULE, f"aprender.{name}", "--help", cwd=without_core)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


INJECTED = """
import sys
from aprender import _command, {name}
def broken(*a, **k):
    raise {error}
{where} = broken
sys.exit({name}.main({words!r}))
"""


@pytest.mark.parametrize("error", ["ZeroDivisionError('two\\nlines')", "RuntimeError()", "MemoryError()", "RecursionError('deep')"])
@pytest.mark.parametrize("name", sorted(available()))
def test_an_unexpected_exception_is_exit_3(name: str, error: str) -> None:
    done = process("-c", INJECTED.format(name=name, error=error, where="_command.Parser.parse_args", words=WORDS[name]))
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    one_line(done.stderr)
    assert error.partition("(")[0] in done.stderr


@pytest.mark.parametrize("name", ["trace", "run", "info"])
def test_an_exception_deep_in_the_work_is_exit_3(name: str, tmp_path: Path) -> None:
    words = [GGUF, *([] if name == "info" else ["--prompt", "hi"]), *(["-o", str(tmp_path / "out")] if name == "trace" else [])]
    where = "from aprender import _core\n_core.Run"
    code = INJECTED.format(
        name=name, error="ZeroDivisionError('deep')", where=where, words=[*words, *(["--plan"] if name == "info" else [])]
    )
    done = process("-c", code)
    assert (done.returncode, done.stdout) == (3, "")
    one_line(done.stderr)
    shown = process("-c", code, env={"APRENDER_TRACEBACK": "1"})
    assert shown.returncode == 3
    assert "Traceback" in shown.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(available()))
def test_importing_a_command_is_cheap(name: str) -> None:
    heavy = "{'aprender._core', 'numpy', 'rich', 'torch', 'tokenizers', 'safetensors'}"
    done = process("-c", f"import sys, aprender.{name}; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", sorted(available()))
def test_wrong_usage_is_exit_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"aprender.{name}")
    for words in ([*WORDS[name], "--no-such-option"], [*WORDS[name], "a", "b", "c"]):
        assert module.main(words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        one_line(err)


@pytest.mark.parametrize("module", OURS, ids=lambda module: module.__name__)
def test_examples_of_the_help_work(module: Any, tmp_path: Path) -> None:
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(PACKAGE.parent)}
    for line in module.EXAMPLES:
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout, line


# ---- bad input -------------------------------------------------------------------------------------------------------------------------

BAD_FILES = [
    ("missing.gguf", "No such file"), ("magic.gguf", "NOPE"), ("text.txt", "no model file|none of: "), ("empty.gguf", "bytes|empty"),
    ("short.gguf", "(?i)truncated|beyond|ends|past|bytes"), ("hf-none", "no model.safetensors"),
]  # fmt: skip
BAD = [(module, file, says) for module in OURS for file, says in BAD_FILES]
BAD += [(module, "cuda:llama.gguf", "cuda") for module in (trace, run)]


@pytest.mark.parametrize(("module", "file", "says"), BAD, ids=[f"{module.__name__[9:]} {file}" for module, file, _ in BAD])
def test_bad_files(
    call: Callable[..., tuple[int, str, str]],
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    module: Any,
    file: str,
    says: str,
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("APRENDER_CUDA_LIBRARY", "no-such-library.so")  # whatever this machine has
    more = {trace: ["--prompt-ids", "1,2", "-o", tmp_path / "out"], run: ["--prompt-ids", "1,2"], info: []}[module]
    code, out, err = call(module, file, *more)
    assert (code, out) == (3, "")
    one_line(err)
    assert re.search(says, err)
    assert file.removeprefix("cuda:") in err or "cuda" in err
    assert not (tmp_path / "out").exists()


OUT = ["-o", "OUT"]
BAD_WORDS: list[tuple[Any, list[str], int, str]] = [
    (run, ["llama.gguf"], 2, "--prompt"),
    (run, ["llama.gguf", "--prompt", "a", "--prompt-ids", "1"], 2, "not allowed with"),
    (run, ["llama.gguf", "--prompt-ids", "1,x"], 2, "'1,x' is not a list of integers"),
    (run, ["llama.gguf", "--prompt-ids", ""], 2, "list of integers"),
    (run, ["llama.gguf", "--prompt-ids=-1"], 2, "negative"),
    (run, ["llama.gguf", "--prompt-ids", "1", "-n", "0"], 2, "at least one"),
    (run, ["llama.gguf", "--prompt-ids", "1", "-n", "x"], 2, "invalid int"),
    (run, ["llama.gguf", "--prompt-ids", "1", "--chat"], 2, "--chat"),
    (run, ["llama.gguf", "--prompt", "hi"], 3, "no tokenizer: give --prompt-ids"),
    (run, ["llama.gguf", "--prompt-ids", "112"], 3, r"112 .*0\.\.111"),
    (run, ["llama.gguf", "--prompt-ids", "99999999999999999999"], 3, ""),
    (run, [GGUF, "--prompt", ""], 3, "prompt is empty"),
    (run, ["saved:nowhere", "--prompt-ids", "1"], 3, ""),
    (run, ["hff:x", "--prompt-ids", "1"], 3, "did you mean 'hf'"),
    (trace, ["llama.gguf", "--prompt-ids", "1"], 2, "-o"),
    (trace, ["llama.gguf", *OUT], 2, "--prompt"),
    (trace, ["llama.gguf", "--prompt-ids", "1", *OUT, "--stages", "atn_out"], 2, "did you mean 'attn_out'"),
    (trace, ["llama.gguf", "--prompt-ids", "1", *OUT, "--stages", ""], 2, "empty pattern"),
    (trace, ["llama.gguf", "--prompt-ids", "1", *OUT, "--stages", "lm_head,,x"], 2, "empty pattern|no stage"),
    (trace, ["llama.gguf", "--prompt-ids", "1", *OUT, "--stages", "1.lm_head"], 2, "whole model"),
    (trace, ["llama.gguf", "--prompt-ids", "1", *OUT, "--layers", "1-2"], 2, r"a\.\.b"),
    (trace, ["llama.gguf", "--prompt-ids", "1", *OUT, "--layers", "1..1"], 2, "exclusive"),
    (trace, ["llama.gguf", "--prompt-ids", "1", *OUT, "--layers", "1..3"], 3, r"0\.\.2"),
    (trace, ["llama.gguf", "--prompt-ids", "1", *OUT, "--stages", "2.ffn_out,lm_head"], 3, "'2.ffn_out' is no stage of this model"),
    (trace, ["llama.gguf", "--prompt-ids", "1", *OUT, "--stages", "qkv_bias"], 3, "'qkv_bias' is no stage of this model"),
    (trace, ["llama.gguf", "--prompt-ids", "1", *OUT, "--stages", "0.ffn_out", "--layers", "1"], 3, "no stage of this model"),
    (trace, ["llama.gguf", "--prompt-ids", "112", *OUT], 3, r"112 .*0\.\.111"),
    (trace, ["llama.gguf", "--prompt", "hi", *OUT], 3, "no tokenizer"),
    (trace, [GGUF, "--prompt", "", *OUT], 3, "prompt is empty"),
    (trace, ["llama.gguf", "--prompt-ids", "1", "-o", "occupied"], 3, "thesis.txt"),
    (trace, ["llama.gguf", "--prompt-ids", "1", "-o", "text.txt"], 3, "not a folder"),
    (trace, ["llama.gguf", "--prompt-ids", "1", *OUT, "-q", "--json"], 2, "not allowed with"),
    (info, [], 2, "MODEL"),
    (info, ["llama.gguf", "--filter", "nothing*"], 3, "no tensor of the file matches 'nothing"),
    (info, ["llama.gguf", "--filter", "blk.0.attn_q.weigt"], 3, "did you mean 'blk.0.attn_q.weight'"),
]


@pytest.mark.parametrize(
    ("module", "words", "code", "says"), BAD_WORDS, ids=[f"{m.__name__[9:]} {' '.join(w)[-40:]}" for m, w, *_ in BAD_WORDS]
)
def test_bad_words(
    call: Callable[..., tuple[int, str, str]], files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    module: Any, words: list[str], code: int, says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(files)
    target = tmp_path / "out"
    found, out, err = call(module, *(str(target) if word == "OUT" else word for word in words))
    assert (found, out) == (code, "")
    one_line(err)
    assert re.search(says, err), err
    assert not target.exists()
    assert (files / "occupied" / "thesis.txt").read_text() == "important"


def test_a_reader_that_leaves_is_no_traceback(files: Path) -> None:
    line = f"'{sys.executable}' -m aprender.info '{files / 'qwen3.gguf'}' --plan --json | head -c 10"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert done.stdout == '{"schema":'
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("words", [["run", "--prompt", "What is 2+2?"], ["info"]], ids=["run", "info"])
def test_a_full_disk_is_exit_3(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "aprender", words[0], GGUF, *words[1:]], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 3
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


# ---- trace -----------------------------------------------------------------------------------------------------------------------------


def test_trace_saves_what_the_side_captures(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = call(trace, GGUF, "--prompt", "What is 2+2?", "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    saved, direct = open_captures(tmp_path / "out"), OwnSide(GGUF).capture(PROMPT)
    assert list(saved) == list(direct)
    assert all(np.array_equal(saved[key], direct[key]) for key in direct)
    said = saved.manifest
    tokenizer = OwnSide(GGUF).tokenizer()
    assert tokenizer is not None
    assert (said.prompt, said.tokens, said.attestation) == ("What is 2+2?", PROMPT, True)
    assert said.tokenizer_digest == tokenizer.digest
    assert out.startswith("Traced 7 tokens through qwen2: 80 tensors, ")  # 2 + 4 layers x 19 + 2
    assert "bit-equal" in out
    assert "261 What · 374 ␣is · 220 ␣ · 17 2" in out
    rows = [line.split()[0] for line in out.splitlines() if line]
    assert [row for row in rows if row in stages.by_name] == list(dict.fromkeys(key[0] for key in direct))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--stages", "1.attn_out,lm_head"], [("attn_out", 1), ("lm_head", None)]),
        (["--stages", "attn_out", "--layers", "1..3"], [("attn_out", 1), ("attn_out", 2)]),
        (["--stages", "*.k_cache,final_norm", "--layers", "3"], [("k_cache", 3), ("final_norm", None)]),
        (["--stages", "layer_output", "--layers", "0"], [("post_ffn_residual", 0)]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_trace_selections(call: Callable[..., tuple[int, str, str]], tmp_path: Path, words: list[str], wanted: list[stages.Key]) -> None:
    code, out, _ = call(trace, GGUF, "--prompt-ids", "1,2,3", "-o", tmp_path / "out", "-q", *words)
    assert code == 0
    assert out.count("\n") == 1
    saved = open_captures(tmp_path / "out")
    assert list(saved) == wanted
    assert saved.manifest.attestation is (True if ("lm_head", None) in wanted else None)


def test_trace_layers_keep_the_stages_of_the_whole_model(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert call(trace, GGUF, "--prompt-ids", "1,2,3", "-o", tmp_path / "out", "--layers", "2..4")[0] == 0
    assert {key[1] for key in open_captures(tmp_path / "out")} == {None, 2, 3}


def test_trace_json(call: Callable[..., tuple[int, str, str]], files: Path, tmp_path: Path) -> None:
    code, out, err = call(trace, files / "llama.gguf", "--prompt-ids", "1,2,3", "-o", tmp_path / "out", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    said, direct = json.loads(out), OwnSide(files / "llama.gguf").capture([1, 2, 3])
    assert [(row["stage"], row["layer"]) for row in said["stages"]] == list(direct)
    assert said["tensors"] == len(direct)
    assert said["bytes"] == sum(direct[key].nbytes for key in direct)
    assert (said["schema"], said["tokens"], said["pieces"], said["attestation"]) == ("aprender.trace/1", [1, 2, 3], None, True)
    for row in said["stages"]:
        array = direct[row["stage"], row["layer"]].astype(np.float64)
        assert row["shape"] == list(array.shape)
        assert row["largest"] == np.abs(array).max()
        assert row["rms"] == pytest.approx(np.sqrt(np.mean(array**2)), rel=1e-12)


def test_trace_counts_what_is_not_finite(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = {"target": "weight", "weight": "ffn_down", "layer": 1, "transform": "zero"}
    monkeypatch.setitem(own_transforms(), "zero", lambda weight, edit, size: np.full_like(weight, np.inf))
    side = OwnSide(GGUF, edits=[broken])
    monkeypatch.setattr("aprender.sides.open_side", lambda spelling: side)
    code, out, _ = call(trace, GGUF, "--prompt-ids", "1,2", "-o", tmp_path / "out", "--json")
    rows = {(row["stage"], row["layer"]): row for row in json.loads(out)["stages"]}
    assert code == 0
    assert rows["ffn_out", 1]["nonfinite"] == 2 * 256  # inf - inf or inf in every element
    assert rows["ffn_out", 0]["nonfinite"] == 0
    assert rows["ffn_out", 1]["largest"] is None
    assert "not finite" in call(trace, GGUF, "--prompt-ids", "1,2", "-o", tmp_path / "out")[1]


def own_transforms() -> dict[str, Any]:
    from aprender.sides.edits import TRANSFORMS

    assert isinstance(TRANSFORMS, dict)
    return TRANSFORMS


def test_trace_says_when_capturing_changes_the_logits(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = OwnSide.logits
    monkeypatch.setattr(OwnSide, "logits", lambda self, ids: real(self, ids) + np.float32(1))
    code, out, _ = call(trace, GGUF, "--prompt-ids", "1,2", "-o", tmp_path / "out")
    assert code == 1
    assert "DIFFER" in out
    assert open_captures(tmp_path / "out").manifest.attestation is False


def test_trace_replaces_a_capture(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    for ids in ("1,2", "3,4,5"):
        assert call(trace, GGUF, "--prompt-ids", ids, "-o", tmp_path / "out", "-q")[0] == 0
    assert open_captures(tmp_path / "out").tokens == (3, 4, 5)


def test_trace_of_another_side(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """A recording is a side like any other: a part of it can be cut out."""
    assert call(trace, f"cpu:{GGUF}", "--prompt-ids", "1,2", "-o", tmp_path / "all", "-q")[0] == 0
    assert call(trace, f"saved:{tmp_path / 'all'}", "--prompt-ids", "1,2", "-o", tmp_path / "part", "-q", "--stages", "lm_head")[0] == 0
    whole, part = open_captures(tmp_path / "all"), open_captures(tmp_path / "part")
    assert list(part) == [("lm_head", None)]
    assert np.array_equal(part.lm_head, whole.lm_head)


def test_beyond_the_context_is_said(call: Callable[..., tuple[int, str, str]], files: Path, tmp_path: Path) -> None:
    ids = ",".join(["1"] * 257)  # the tiny models have 256
    code, out, err = call(trace, files / "llama.gguf", "--prompt-ids", ids, "-o", tmp_path / "out", "--stages", "lm_head", "-q")
    assert (code, bool(out)) == (0, True)
    assert "257 tokens are beyond the 256" in err
    assert call(run, files / "llama.gguf", "--prompt-ids", ids[:-2], "-n", "1")[2].count("beyond") == 1
    assert call(run, files / "llama.gguf", "--prompt-ids", ids[:-4], "-n", "1")[2] == ""


# ---- run -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["canary.gguf", ""], ids=["gguf", "safetensors"])
def test_run_answers(call: Callable[..., tuple[int, str, str]], form: str) -> None:
    assert call(run, CANARY / form, "--prompt", "What is 2+2?") == (0, " 2+2 is 4.\n", "")
    ids = ",".join(map(str, PROMPT))
    assert call(run, CANARY / form, "--prompt-ids", ids, "-n", "3") == (0, " 2+\n", "")


def test_run_json_and_verbose(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = call(run, GGUF, "--prompt", "What is 2+2?", "--json", "-v")
    said = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert said == {
        "schema": "aprender.run/1", "side": GGUF, "prompt": "What is 2+2?", "prompt_ids": list(PROMPT), "ids": ANSWER, "text": " 2+2 is 4.",
        "end": "eos",
    }  # fmt: skip
    assert "220,17,10,17,374,220,19,13 (ended by the model)" in err
    assert re.search(r"then \d+\.\d tokens per second", err)
    said = json.loads(call(run, GGUF, "--prompt", "What is 2+2?", "--json", "-n", "8")[1])
    assert said["end"] == "length"  # it was not asked whether it would have ended


def test_run_without_tokenizer_tells_ids(call: Callable[..., tuple[int, str, str]], files: Path) -> None:
    side = OwnSide(files / "llama.gguf")
    ids = side.generate([1, 2, 3], 5)
    assert call(run, files / "llama.gguf", "--prompt-ids", "1,2,3", "-n", "5") == (0, ",".join(map(str, ids)) + "\n", "")


def test_run_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known is written and flushed before the next token is asked for."""
    seen: list[str] = []

    class Out(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Out())
    assert run.main([GGUF, "--prompt", "What is 2+2?"]) == 0
    assert list(dict.fromkeys(seen)) == [" ", " 2", " 2+", " 2+2", " 2+2 is", " 2+2 is ", " 2+2 is 4", " 2+2 is 4.", " 2+2 is 4.\n"]


def test_an_interrupted_run_ends_its_line(call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: OwnSide, ids: Sequence[int], n: int, on_token: Callable[[int], None]) -> list[int]:
        on_token(17)
        raise KeyboardInterrupt

    monkeypatch.setattr(OwnSide, "generate", stopped)
    assert call(run, GGUF, "--prompt", "What is 2+2?") == (3, "2\n", "aprender: interrupted\n")


def test_run_with_nothing_to_say(call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnSide, "generate", lambda self, ids, n, on_token: [])
    code, out, err = call(run, GGUF, "--prompt", "What is 2+2?", "-v")
    assert (code, out) == (0, "\n")
    assert "ids none (ended by the model)" in err


def decode(pieces: Sequence[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", "replace")


def told(pieces: Sequence[bytes]) -> list[str]:
    stream = run.Stream(lambda ids: decode([pieces[i] for i in ids]))
    return [*(stream.put(i) for i in range(len(pieces))), stream.end()]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.text(max_size=20), st.lists(st.integers(0, 100)))
def test_stream_never_breaks_a_character(text: str, places: list[int]) -> None:
    pieces = told(cut(text.encode(), places))
    assert "".join(pieces) == text
    if run.UNFINISHED not in text:
        assert not any(run.UNFINISHED in piece for piece in pieces)


@given(st.lists(st.binary(min_size=1, max_size=4), max_size=12))
def test_stream_of_bytes_that_are_no_text(pieces: list[bytes]) -> None:
    assert "".join(told(pieces)) == decode(pieces)


def test_stream_of_a_real_tokenizer() -> None:
    tokenizer = open_side(GGUF).tokenizer()
    text = "héllo → 🙂!"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # bytes: the small vocabulary has none of these
    stream = run.Stream(tokenizer.decode)
    pieces = [stream.put(i) for i in ids]
    assert "".join(pieces) + stream.end() == text
    assert "🙂" in pieces
    half = run.Stream(tokenizer.decode)
    assert [half.put(i) for i in tokenizer.encode("🙂")[:2]] == ["", ""]
    assert run.UNFINISHED in half.end()
    assert half.end() == ""


def test_stream_keeps_the_blank_of_tokenizers_that_drop_the_first() -> None:
    """Sentencepiece style: a blank at the beginning of a text is not decoded."""
    words = ["▁one", "▁two", "▁three"]
    stream = run.Stream(lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert [stream.put(i) for i in range(3)] == ["one", " two", " three"]


# ---- info ------------------------------------------------------------------------------------------------------------------------------


def test_info_of_the_canary(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = call(info, GGUF, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    said = json.loads(out)
    assert (said["schema"], said["problem"], said["plan"]) == ("aprender.info/1", None, None)
    assert (said["file"]["container"], said["file"]["version"], said["file"]["tensors"]) == ("gguf", 3, 51)
    assert said["file"]["bytes"] == os.path.getsize(GGUF)
    # README: output, and attn_v and ffn_down of two layers Q6_K; the other matrices Q4_K: 2 + 4 x 7 in all, norms 9 and biases 12 F32
    assert {row["format"]: row["tensors"] for row in said["formats"]} == {"Q4_K": 25, "Q6_K": 5, "F32": 21}
    assert sum(row["values"] for row in said["formats"]) == 2_559_744 == said["file"]["values"]
    assert sum(row["share"] for row in said["formats"]) == pytest.approx(1)
    bits = {row[0]: 8 * row[4] / row[3] for row in _core.FORMATS}
    assert all(row["bits_per_weight"] == bits[row["format"]] for row in said["formats"])
    model = said["model"]
    assert (model["arch"], set(model["flags"]), model["quirks"]) == ("qwen2", {"DENSE", "QKV_BIAS", "UNTIED"}, [])
    assert model["hparams"]["heads"] == {"value": 8, "source": "GGUF qwen2.attention.head_count"}
    assert model["hparams"]["head"] == {"value": 32, "source": "not given: width / heads"}
    assert (model["head"]["tied"], model["head"]["source"]) == (False, "output.weight is there: there is no other sign")
    tokenizer = said["tokenizer"]
    assert (tokenizer["kind"], tokenizer["pre"], tokenizer["tokens"], tokenizer["problem"]) == ("gpt2", "qwen2", 640, None)
    assert tokenizer["specials"]["eos"] == {"id": 639, "piece": "<|im_end|>"}


def test_info_tells_the_same_of_both_containers(call: Callable[..., tuple[int, str, str]]) -> None:
    gguf, folder = (json.loads(call(info, CANARY / form, "--json")[1]) for form in ("canary.gguf", ""))
    values = [{name: row["value"] for name, row in said["model"]["hparams"].items()} for said in (gguf, folder)]
    assert values[0] == values[1]
    assert gguf["model"]["flags"] == folder["model"]["flags"]
    assert folder["model"]["hparams"]["theta"]["source"] == "config.json rope_parameters.rope_theta"
    for key in ("tokens", "merges", "chat_template"):
        assert gguf["tokenizer"][key] == folder["tokenizer"][key]
    assert folder["tokenizer"]["specials"]["eos"] == gguf["tokenizer"]["specials"]["eos"]


def test_info_says_what_makes_a_head_tied(call: Callable[..., tuple[int, str, str]], files: Path) -> None:
    said = call(info, files / "llama.gguf")[1]
    assert "shared with token_embd (output.weight is absent: there is no other sign)" in said
    assert "ROPE_PAIRS" in said
    assert "shared with token_embd (config.json tie_word_embeddings)" in call(info, files / "hf")[1]
    assert "its own matrix (output.weight is there" in call(info, files / "qwen3.gguf")[1]
    assert "none in the container: prompts are token ids" in said


def test_info_lists_tensors(call: Callable[..., tuple[int, str, str]]) -> None:
    folded = call(info, GGUF)[1]
    assert re.search(r"blk\.\*\.ffn_down\.weight +0–1 +Q4_K +256×512 +147,456\n", folded)
    assert re.search(r"blk\.\*\.ffn_down\.weight +2–3 +Q6_K +256×512 +215,040\n", folded)
    listed = call(info, GGUF, "--filter", "blk.?.attn_v.*")[1]
    assert "Tensors: 8 of 51" in listed  # weight and bias of four layers
    assert re.search(r"blk\.3\.attn_v\.weight +Q6_K +64×256 +13,440 ", listed)
    assert "ffn_down" not in listed
    said = json.loads(call(info, GGUF, "--filter", "*norm*", "--json")[1])
    assert len(said["tensors"]) == 9
    assert len(json.loads(call(info, GGUF, "--json")[1])["tensors"]) == 51


@pytest.mark.parametrize("name", ["llama.gguf", "qwen3.gguf", "hf"])
def test_info_plan_is_the_plan(call: Callable[..., tuple[int, str, str]], files: Path, name: str) -> None:
    plan = _core.Run(_core.Model(_core.File(files / name))).plan(1)
    said = json.loads(call(info, files / name, "--plan", "--json")[1])["plan"]
    assert [{key: step[key] for key in step if key != "weights"} for step in said] == [
        {key: step[key] for key in step if key != "weights"} for step in plan
    ]
    assert [[(part["weight"], part["bias"], part["cols"]) for part in step["weights"]] for step in said] == [
        step["weights"] for step in plan
    ]
    shown = call(info, files / name, "--plan")[1].partition("Plan: ")[2].splitlines()
    rows = [line.split() for line in shown if re.match(r" *\d+ +(\d+|–) ", line)]
    assert [(row[2], row[3]) for row in rows] == [(step["stage"], step["op"]) for step in plan]
    common = " ".join(shown[1:3])
    for field in ("eps", "scale", "theta", "pairing", "kv_div", "kv_mod", "mask_offset", "window", "heads", "head", "pos", "keys"):
        assert re.search(rf"\b{field} [0-9]", common), field


def test_info_plan_shows_a_parameter_that_differs(capsys: pytest.CaptureFixture[str]) -> None:
    """The steps share one line of parameters; a step that does not agree says so itself."""
    step = {"stage": "s", "layer": 0, "op": "o", "rows": 1, "cols": 1, "k": 0, "weights": [], "a": -1, "b": -1, "eps": 1e-6, "window": 0}
    parts = list(info._plan_parts([step, step | {"window": 7, "layer": 1}]))
    _show.show(*parts)
    _, shared, _, *rows = capsys.readouterr().out.splitlines()
    assert shared == "all steps  eps 1e-06"
    assert [row.split()[-2:] for row in rows] == [["window", "0"], ["window", "7"]]


def test_info_plan_on_a_narrow_terminal_reads_by_number(call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_show, "narrow", lambda: True)
    plan = call(info, GGUF, "--plan")[1].partition("Plan: ")[2]
    assert re.search(r"5 +0 +q_post_rope +ROPE +1×256 +4 \+ 1\n", plan)  # after qkv_bias, step 4, with the table, step 1
    monkeypatch.setattr(_show, "narrow", lambda: False)
    assert "4 qkv_bias + 1 rope_table\n" in call(info, GGUF, "--plan")[1]


def test_info_describes_what_does_not_bind(call: Callable[..., tuple[int, str, str]], files: Path) -> None:
    code, out, err = call(info, files / "unbound.gguf")
    assert code == 3
    one_line(err)
    assert "llama.more" in err
    assert "which this engine does not run" in out
    assert "general.architecture = llama" in out
    assert re.search(r"F16 +1[56] ", out)
    assert "\x1b" not in out  # a file does not send commands to a terminal
    assert r"evil\x1b[31m\nname" in out
    code, out, err = call(info, files / "unbound.gguf", "--json", "--plan")
    said = json.loads(out)
    assert (code, said["model"], said["plan"]) == (3, None, None)
    assert "llama.more" in said["problem"]
    assert len(said["tensors"]) == said["file"]["tensors"] > 0


def test_info_of_weights_without_configuration(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    shutil.copy(CANARY / "model.safetensors", tmp_path)
    code, out, err = call(info, tmp_path / "model.safetensors")
    assert code == 3
    assert "config.json" in err
    assert re.search(r"BF16 +51 ", out)


def test_info_of_a_tokenizer_that_cannot_be_used(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    def strange(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("from the future")
        writer.add_token_list([f"t{i}" for i in range(112)])
        writer.add_token_merges(["t 1"])
        writer.add_eos_token_id(500)

    path = tiny.save_gguf(tiny.Shape("llama"), tmp_path / "x.gguf", "F16", metadata=strange)
    code, out, err = call(info, path)
    assert (code, err) == (0, "")
    assert "gpt2, pre-tokenizer from the future, 112 tokens, 1 merge (" in out
    assert re.search(r"cannot be used here: .*'from the future' is not known", " ".join(out.split()))
    folder = write_folder(tmp_path / "hf", tiny.Shape("qwen2"))
    (folder / "tokenizer.json").write_text("{")
    code, out, err = call(info, folder)
    assert (code, err) == (0, "")
    assert "cannot be used here" in out


# ---- aprender NAME ---------------------------------------------------------------------------------------------------------------------


def test_commands_by_name(call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    import aprender.__main__ as door

    assert call(door, "run", GGUF, "--prompt", "What is 2+2?") == (0, " 2+2 is 4.\n", "")
    code, out, err = call(door, "--help")
    assert (code, err) == (0, "")
    assert all(re.search(rf"^  {name} +\w", out, re.MULTILINE) for name in available())
    assert call(door, "--version") == (0, f"aprender {aprender.__version__}\n", "")
    code, out, err = call(door)
    assert (code, out) == (2, "")  # a script whose command got lost must not read "agree"
    assert "commands:" in err
    code, out, err = call(door, "tarce")
    assert (code, out, err) == (2, "", "aprender: there is no command 'tarce'; did you mean 'trace'?\n")
    assert call(door, "xyzzy")[0] == 2
    assert call(door, "captures")[0] == 2  # a module, not a command
    assert call(door, "run", "missing", "--prompt", "x")[0] == 3
    monkeypatch.setattr(sys, "argv", ["aprender", "run", GGUF, "--prompt-ids", "x"])
    assert aprender_main() == 2


def test_the_console_script_is_this_door() -> None:
    import tomllib

    path = PACKAGE.parent / "pyproject.toml"
    assert tomllib.loads(path.read_text())["project"]["scripts"] == {"aprender": "aprender.__main__:main"}
    done = process("-m", "aprender", "info", GGUF, cwd=PACKAGE.parent)
    assert done.returncode == 0
    assert done.stdout.startswith("A qwen2 model of 2.56 million weights")


# ---- looks -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["info", GGUF], ["trace", GGUF, "--prompt", "What is 2+2?", "-o", "OUT"]], ids=["info", "trace"])
def test_colour_only_where_it_is_wanted(words: list[str], tmp_path: Path) -> None:
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    plain = process("-m", "aprender", *words)
    assert "\x1b" not in plain.stdout
    lines = plain.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    assert not [line for line in lines if line != line.rstrip()]
    coloured = process("-m", "aprender", *words, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert "\x1b[1;32m" in coloured.stdout
    none = process("-m", "aprender", *words, env={"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color"})
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", none.stdout)


def test_progress_only_on_a_terminal_and_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        def __init__(self, terminal: bool) -> None:
            super().__init__()
            self.terminal = terminal

        def isatty(self) -> bool:
            return self.terminal

    def shown(terminal: bool, patience: float, quiet: bool = False) -> str:
        stream = Stream(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(_show, "PATIENCE", patience)
        with _show.Progress("tracing", quiet) as tell:
            tell(0.5)
            tell(1)
        return stream.getvalue()

    assert "tracing  50%" in shown(True, 0)
    assert shown(True, 0).endswith("\r\x1b[K")  # nothing stays
    assert shown(True, 60) == ""
    assert shown(False, 0) == ""
    assert shown(True, 0, quiet=True) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (640, "640"), (1e6, "1,000,000"), (float(np.float32(1e-6)), "1e-06"), (1 / np.sqrt(32), "0.176776695"),
        (1e-6, "1e-06"), (-1, "-1"), (0.5, "0.5"), (1e30, "1e+30"),
    ],
)  # fmt: skip
def test_numbers_read_well_and_stay_true(value: float, text: str) -> None:
    assert _show.number(value) == text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=1e-8)


def test_small_words() -> None:
    assert _show.spans([3, 0, 1, 2, 7, 5, 6]) == "0–3, 5–7"
    assert _show.spans([4]) == "4"
    assert _show.spans([]) == ""
    assert (_show.plural(1, "token"), _show.plural(2000, "token")) == ("1 token", "2,000 tokens")
    assert _show.visible("a b\tc\n\x1b[0m é🙂") == "a b\\tc\\n\\x1b[0m é🙂"


def test_usage_text_names_its_own_command() -> None:
    with pytest.raises(_command.Usage, match=r"aprender\.x --help"):
        _command.Parser("x", "about", ["example"]).error("no")
