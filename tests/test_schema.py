"""What the commands print as JSON is what ``evidence/schema`` says: every command is run, its object is validated, and a changed one fails.

Truth: the JSON Schemas (draft 2020-12), checked by the ``jsonschema`` package.  A schema that lets everything through would pass the first
test; so each object is mutated in every property that it has, and each mutation must fail.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny
from conftest import CANARY, write_folder

import aprender
from aprender import stages
from aprender.captures import Captures, save

FOLDER = Path(__file__).resolve().parent.parent / "evidence" / "schema"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
GGUF, HF = str(CANARY / "canary.gguf"), str(CANARY)
LINES = {"bisect-jsonl-1": "aprender.bisect.jsonl/1", "weights-jsonl-1": "aprender.weights.jsonl/1"}
"""Schemas of lines, which carry no name of their own."""


@functools.cache
def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


@functools.cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema(name))


def strict(text: str) -> Any:
    """JSON as the standard has it: Python's own NaN and Infinity are refused."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def printed(capsys: pytest.CaptureFixture[str], code: int, command: str, *words: str) -> list[Any]:
    assert importlib.import_module(f"aprender.{command}").main(list(words)) == code
    return [strict(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captures and models that the commands read."""
    root = tmp_path_factory.mktemp("schema")
    write_folder(root / "tiny", tiny.Shape(), seed=1)
    tiny.save_gguf(tiny.Shape(), root / "tiny.gguf", "Q8_0", seed=1)
    write_folder(root / "other", tiny.Shape(eps=1e-5), seed=2)
    good = aprender.open_captures(CANARY / "stages-float16")
    arrays = {key: np.array(good[key]) for key in good}
    arrays["ffn_up", 1][3] = np.nan
    save(Captures(arrays, good.manifest), root / "nan")
    save(Captures({("attn_out", 3): good["attn_out", 3]}, good.manifest), root / "one")  # its input is not near enough to be estimated
    return root


# ---- the schemas themselves ----------------------------------------------------------------------------------------------------------


def objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "properties" in node and node.get("type") == "object":
            yield node
        for child in node.values():
            yield from objects(child)
    elif isinstance(node, list):
        for child in node:
            yield from objects(child)


def test_every_command_with_json_has_a_schema() -> None:
    """A command that names a schema in its source has the file, and no file is left over."""
    package = Path(aprender.__file__).parent
    said = {(path.stem, form) for path in package.glob("*.py") for form in re.findall(r'"--(jsonl?)"', path.read_text())}
    assert len(said) >= 9
    assert said == {(name.split("-")[0], "jsonl" if name in LINES else "json") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_well_formed_strict_and_described(name: str) -> None:
    found = schema(name)
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    stem, _, number = name.rpartition("-")
    assert found["$id"] == LINES.get(name, f"aprender.{stem}/{number}")
    assert name in LINES or found["properties"]["schema"]["const"] == found["$id"]
    for entry in objects(found):
        assert entry["additionalProperties"] is False
        bare = [key for key, value in entry["properties"].items() if "$ref" not in value and not value.get("description")]
        assert bare == []


# ---- what is printed is valid, and what is changed is not ------------------------------------------------------------------------------


def mutations(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """(where, how, value): a property too few, one too many, and a value of another kind, in the first item of each list."""
    if isinstance(value, dict):
        for key in value:
            yield from mutations(value[key], (*path, key))
    elif isinstance(value, list):
        yield from mutations(value[0], (*path, 0)) if value else ()
        yield path, "not a list", {"0": value}
    yield path, "another kind", [[[]]]


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    out = copy.deepcopy(data)
    at = out
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    return out


def check(name: str, data: Any) -> None:
    """Valid as it is; not valid with any property of another kind, without a required one, or with one more."""
    validator(name).validate(data)
    for path, how, value in mutations(data):
        assert not validator(name).is_valid(changed(data, path, value)), f"{name}: {how} at {path} passes"
    for key in schema(name)["required"]:
        assert not validator(name).is_valid({k: v for k, v in data.items() if k != key}), f"{name} without {key} passes"
    assert not validator(name).is_valid(data | {"more": 1})


def short(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The object with two items of each long list: every one of thousands was validated before."""
    return data | {key: data[key][:2] for key in keys if isinstance(data[key], list)}


def test_bisect_agree_and_divergence(capsys: pytest.CaptureFixture[str]) -> None:
    for code, more in ((0, ()), (1, ("--plant", "transposed@lm_head")), (0, ("--probe", "one,traced"))):
        (data,) = printed(capsys, code, "bisect", "--json", *more)
        validator("bisect-1").validate(data)
        check("bisect-1", short(data, "stages"))
    lines = printed(capsys, 0, "bisect", "--jsonl")
    assert len(lines) == 80
    for line in lines:
        validator("bisect-jsonl-1").validate(line)
    check("bisect-jsonl-1", lines[3])


def test_bisect_of_many_prompts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("What is 2+2?\nWhat is 7+8?\n")
    (data,) = printed(capsys, 0, "bisect", "--prompts", str(path), "--json", "--answer", "0")
    assert len(data["prompts"]) == 2
    check("bisect-1", short(data, "stages"))
    for line in printed(capsys, 0, "bisect", "--prompts", str(path), "--jsonl"):
        validator("bisect-jsonl-1").validate(line)
        assert "prompt" in line


def test_bisect_of_what_cannot_be_judged(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    """A side that shows one stage without its inputs: nothing was judged, exit 3, and the object says so."""
    (data,) = printed(capsys, 3, "bisect", f"saved:{made / 'one'}", "--against", f"saved:{CANARY / 'stages-float16'}", "--json")
    assert (data["verdict"], data["finding"], data["first"]) == ("not_comparable", None, None)
    assert len(data["unmeasured"]) == len(data["stages"]) > 1
    check("bisect-1", short(data, "stages", "unmeasured"))


def test_bisect_of_a_nan(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    """JSON has no NaN: figures that do not exist are null."""
    (data,) = printed(capsys, 1, "bisect", GGUF, "--against", f"saved:{made / 'nan'}", "--json", "--answer", "0")
    assert data["first"]["side"] == "reference"
    assert next(row for row in data["stages"] if (row["stage"], row["layer"]) == ("ffn_up", 1))["rel_l2"] is None
    check("bisect-1", short(data, "stages"))


def test_a_verdict_that_contradicts_itself_is_not_valid(capsys: pytest.CaptureFixture[str]) -> None:
    (agree,) = printed(capsys, 0, "bisect", "--json", "--answer", "0")
    (wrong,) = printed(capsys, 1, "bisect", "--json", "--answer", "0", "--plant", "eps@0.attn_norm")
    valid = validator("bisect-1").is_valid
    assert valid(agree)
    assert valid(wrong)
    assert not valid(agree | {"finding": "operation"})
    assert not valid(agree | {"verdict": "divergence"})
    assert not valid(wrong | {"first": None})
    assert not valid(wrong | {"wrong": []})
    assert not valid(wrong | {"finding": "a feeling"})
    assert not valid(wrong | {"verdict": "agree"})
    assert not valid(wrong | {"first": wrong["first"] | {"confidence": 1.5}})
    assert not valid(agree | {"stages": [agree["stages"][0] | {"state": "fine"}]})


def test_trace_and_diff(capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Path) -> None:
    (data,) = printed(capsys, 0, "trace", GGUF, "--prompt", "What is 2+2?", "-o", str(tmp_path / "a"), "--json")
    validator("trace-1").validate(data)
    check("trace-1", short(data, "stages"))
    printed(capsys, 0, "trace", HF, "--prompt", "What is 2+2?", "-o", str(tmp_path / "b"), "--json")
    (data,) = printed(capsys, 1, "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json")
    validator("diff-2").validate(data)
    check("diff-2", short(data, "stages"))
    (data,) = printed(capsys, 0, "diff", str(tmp_path / "a"), str(tmp_path / "a"), "--json", "--stages", "lm_head")
    check("diff-2", data)
    (data,) = printed(capsys, 1, "diff", str(CANARY / "stages-float16"), str(made / "nan"), "--json", "--stages", "*.ffn_up,lm_head")
    row = next(row for row in data["stages"] if row["state"] == "different")
    assert "nan" in (row["max_abs"], row["top"][0]["b"])
    check("diff-2", data | {"stages": [row]})


def test_trace_of_ids_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Path) -> None:
    words = ("--prompt-ids", "1,2,3", "-o", str(tmp_path / "a"), "--layers", "0..1", "--json")
    (data,) = printed(capsys, 0, "trace", str(made / "tiny"), *words)
    assert (data["prompt"], data["pieces"]) == (None, None)
    check("trace-1", data)


def test_weights(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    for code, a, b in ((0, GGUF, HF), (0, str(made / "tiny.gguf"), str(made / "tiny")), (1, str(made / "tiny"), str(made / "other"))):
        (data,) = printed(capsys, code, "weights", a, b, "--json")
        validator("weights-1").validate(data)
        check("weights-1", short(data, "tensors"))
        lines = printed(capsys, code, "weights", a, b, "--jsonl")
        assert lines == data["tensors"]
        for line in lines:
            validator("weights-jsonl-1").validate(line)
        check("weights-jsonl-1", lines[0])
    assert data["hparams"][0]["field"] == "eps"


def test_info(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    for words in ((GGUF, "--plan"), (HF, "--verify"), (str(made / "tiny.gguf"),), (str(made / "tiny"), "--plan")):
        (data,) = printed(capsys, 0, "info", *words, "--json")
        validator("info-1").validate(data)
        check("info-1", short(data, "tensors", "plan"))
    broken = write_folder(tmp_path / "broken", tiny.Shape(), num_hidden_layers=3)
    (data,) = printed(capsys, 3, "info", str(broken), "--json")
    assert (data["model"], data["problem"] is None) == (None, False)
    check("info-1", short(data, "tensors"))


def test_convert(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    for words in ((GGUF, str(tmp_path / "a.apr")), (str(made / "tiny"), str(tmp_path / "b.apr"), "--no-verify")):
        (data,) = printed(capsys, 0, "convert", *words, "--json")
        validator("convert-1").validate(data)
        check("convert-1", short(data, "tensors"))


def test_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APRENDER_CUDA_LIBRARY", "no-such-library.so")
    (data,) = printed(capsys, 0, "env", "--json")
    assert (data["cuda"]["built"], data["cuda"]["devices"], data["variables"]["APRENDER_CUDA_LIBRARY"]) == (False, [], "no-such-library.so")
    check("env-1", data)


def test_run(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    for words in ((GGUF, "--prompt", "What is 2+2?"), (str(made / "tiny"), "--prompt-ids", "1,2,3", "-n", "3")):
        (data,) = printed(capsys, 0, "run", *words, "--json")
        check("run-1", data)


def test_stage_names_are_those_of_the_table() -> None:
    """The schemas spell no stage: a new row of the table needs no new schema."""
    text = "".join(path.read_text() for path in FOLDER.glob("*.json"))
    assert not [name for name in stages.by_name if f'"{name}"' in text]
