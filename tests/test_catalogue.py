"""Every fault of the catalogue, planted and hunted: the first wrong stage is its site, nothing upstream is accused, its prediction fits.

Truth: what was planted is known.  The prediction of a row is carried out here with the witness's functions alone, so that planting (our
engine) and predicting (float64 definitions) meet in nothing but the row.  Sites are sampled; ``scripts/fault_matrix.py`` runs them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import CANARY, write_folder
from numpy.typing import NDArray

from aprender import bisect, bisection, stages
from aprender.arithmetic import F32
from aprender.asking import Ask
from aprender.captures import Captures
from aprender.errors import NotComparable
from aprender.judge import witness
from aprender.judge.faultrow import AGREE, HEALS, REFUSED, Change, FaultRow
from aprender.judge.faults import CONTROLS, FAULTS
from aprender.judge.local import local
from aprender.judge.replay import wiring
from aprender.judge.rounding import variance
from aprender.judgement import Hunt
from aprender.references import WitnessSide
from aprender.sides.own import OwnSide
from aprender.stages import Key

Float = NDArray[np.float64]

#: Faults that change no bit of a stage of the canary; a bigger epsilon moves no float32 where mean(x^2) is large.
UNSEEN: frozenset[tuple[str, Key]] = frozenset()


#: Faults that leave, bit for bit, what another row leaves: the first of them in the catalogue is named, the other is a tie.
SAME = {"decode-pos-0": "no-rope"}


# ---- the prediction, by the witness ----------------------------------------------------------------------------------------------------


class Predicted:
    """One stage as a row's changes make it, from the captured inputs."""

    def __init__(self, captures: Captures, model: witness.ModelData, key: Key, changes: tuple[Change, ...]) -> None:
        self.cap, self.model, self.key, self.changes = captures, model, key, changes
        self.row, self.hp = stages.stage(key[0]), dict(model.hparams)
        self.wires = wiring(model.flags, int(self.hp["layers"]))
        self.positions = np.arange(len(captures.tokens))
        for change in self.of("hparams"):
            self.hp[change["name"]] = change["value"] if "value" in change else self.hp[change["name"]] * change["factor"]

    def of(self, what: str) -> list[Change]:
        return [change for change in self.changes if change["of"] == what]

    def read(self, key: Key, which: int) -> Float:
        """What a stage reads."""
        source = self.wires[key][which]
        value = np.asarray(self.cap[source.key], np.float64)
        q, k = (int(self.hp[name]) * int(self.hp["head"]) for name in ("heads", "kv_heads"))
        part = {None: slice(None), "Q": slice(0, q), "K": slice(q, q + k), "V": slice(q + k, q + 2 * k)}
        return value[..., part[source.part]]

    def inputs(self) -> list[Float]:
        out = [self.read(self.key, i) for i in range(len(self.wires[self.key]))]
        for change in self.of("inputs"):
            stage, which = change["origin"]
            if stage == "zero":
                out[change["index"]] = np.zeros_like(out[change["index"]])
            elif which == "out":
                out[change["index"]] = np.asarray(self.cap[stage, self.key[1]], np.float64)
            else:
                out[change["index"]] = self.read((stage, self.key[1]), "ab".index(which))
        return out

    def weight(self, name: str, part: int, layer: int | None) -> Float:
        w = np.asarray(self.model.weights[name, layer], np.float64)
        for change in self.of("weights"):
            if change["part"] in (None, part) and w.ndim == (1 if self.row.op == "RMSNORM" else 2):
                w = self.changed(w, change, layer)
        return w

    def changed(self, w: Float, change: Change, layer: int | None) -> Float:
        rows, how = len(w), change["as"]
        if how == "origin":
            name, at = change["origin"], change.get("origin_layer", layer)
            return np.asarray(self.model.weights[name, None if name == "token_embd" else at], np.float64)
        if how == "transposed":
            return w.ravel().reshape(w.shape[1], rows).T
        if how == "scaled":
            return w * change["factor"]
        if how == "plus":
            return w + change["value"]
        out = w.copy()
        if how == "pairs":
            size = int(self.hp[change["size"]])
            for i in range(rows):
                head, at = divmod(i, size)
                out[i] = w[head * size + (at // 2 if at % 2 == 0 else at // 2 + size // 2)]
        elif how == "block":
            first = w.shape[1] // 64 * 32
            out[rows // 2, first : first + 32] *= change["factor"]
        elif how == "first-scale":
            for col in range(w.shape[1] // 32):
                lead, own = (np.abs(w[:, c * 32 : c * 32 + 32]).max(axis=1, keepdims=True) for c in (col // 8 * 8, col))
                out[:, col * 32 : col * 32 + 32] = w[:, col * 32 : col * 32 + 32] * lead / own
        elif how == "cut-columns":
            out[:, int(w.shape[1] * change["share"]) :] = 0
        else:
            assert how == "cut-rows"
            out[int(rows * change["share"]) :] = 0
        return out

    def parts(self, group: str | None) -> list[Float]:
        from aprender import _core

        names = [row[0] for row in _core.WEIGHTS if row[1] == group and (row[7] == "ALWAYS" or row[7] in self.model.flags or row[6])]
        return [self.weight(name, i, self.key[1]) for i, name in enumerate(names)]

    def bias(self) -> Float:
        factor = float(np.prod([change["factor"] for change in self.of("biases")]))
        return np.concatenate(self.parts(self.row.bias)) * factor

    def where(self) -> Float:
        at = self.positions.astype(np.float64)
        for change in self.of("positions"):
            start = self.positions // change.get("pieces", len(at)) * change.get("pieces", len(at))
            moved = start * change.get("scale", 1) + (self.positions - start) * change.get("step", 1) + change.get("shift", 0)
            at = np.where((start == 0) & (change.get("when") == "decode"), at, moved)
        return at

    def allowed(self) -> NDArray[np.bool_]:
        ahead = self.positions[None, :] - self.positions[:, None]
        shift = sum(change.get("shift", 0) for change in self.of("mask"))
        window = min([change["window"] for change in self.of("mask") if "window" in change], default=1 << 30)
        return np.asarray((ahead <= shift) & (ahead - shift > -window))

    def kv(self, x: Float) -> Float:
        """Key or value heads as each query head reads them: [H, J, h]."""
        heads, kv, size = (int(self.hp[name]) for name in ("heads", "kv_heads", "head"))
        change = dict((self.of("heads") or [{}])[0])
        which = [(n // change.get("div", heads // kv)) % change.get("mod", kv) for n in range(heads)]
        return x.reshape(len(x), kv, size).transpose(1, 0, 2)[which]

    def value(self) -> Float:
        y = getattr(self, f"op_{self.row.op.lower()}")(*self.inputs())
        for change in self.of("output"):
            y = self.output(y, change)
        return np.asarray(y)

    def op_embed(self) -> Float:
        return self.parts(self.row.weight)[0][list(self.cap.tokens)]

    def op_rope_table(self) -> Float:
        return witness.rope_table(self.where(), float(self.hp["theta"]), int(self.hp["head"]))

    def op_rmsnorm(self, x: Float) -> Float:
        return witness.rms_norm(x, self.parts(self.row.weight)[0], float(self.hp["eps"]))

    def op_matmul(self, x: Float) -> Float:
        from aprender import _core

        y = np.concatenate([witness.linear(x, w) for w in self.parts(self.row.weight)], axis=1)
        flag = {row[0]: row[7] for row in _core.WEIGHTS}.get(self.row.bias or "")
        return y + self.bias() if flag in self.model.flags else y

    def op_bias(self, x: Float) -> Float:
        return x + self.bias()

    def op_add(self, a: Float, b: Float) -> Float:
        return a + b

    def op_mul(self, a: Float, b: Float) -> Float:
        return a * b

    def op_rope(self, x: Float, table: Float) -> Float:
        size = int(self.hp["head"])
        for change in self.of("table"):
            assert np.allclose(table, witness.rope_table(self.positions, float(self.hp["theta"]), size), atol=1e-4)
            table = witness.rope_table(self.positions + change["shift"], float(self.hp["theta"]), size)
        if not self.of("rotation"):
            return witness.rope(x, table)
        z = (x.reshape(len(x), -1, size // 2, 2) @ np.array([1, 1j])) * (table[:, None, : size // 2] + 1j * table[:, None, size // 2 :])
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)

    def op_cache(self, x: Float) -> Float:
        return x

    def op_scores(self, q: Float, k: Float) -> Float:
        head = int(self.hp["head"])
        scale = 1 / np.sqrt(head)
        for change in self.of("scores"):
            scale = change["value"] if "value" in change else scale * change["factor"]
        dot = witness.heads_first(q, head) @ self.kv(k).transpose(0, 2, 1) * scale
        return np.asarray(np.where(self.allowed(), dot, 0.0))

    def op_softmax(self, s: Float) -> Float:
        return witness.softmax(s, self.allowed())

    def op_mix(self, p: Float, v: Float) -> Float:
        return (p @ self.kv(v)).transpose(1, 0, 2).reshape(p.shape[1], -1)

    def op_silu(self, x: Float) -> Float:
        name = self.of("act")[0]["name"] if self.of("act") else "silu"
        if name == "gelu":
            return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
        return x / (1 + np.exp(-x * (1.702 if name == "quick-gelu" else 1.0)))

    def output(self, y: Float, change: Change) -> Float:
        how, out = change["as"], y.copy()
        if how == "float16":
            return y.astype(np.float16).astype(np.float64)
        if how == "bfloat16":
            mantissa, exponent = np.frexp(y)
            return np.ldexp(np.rint(mantissa * 256) / 256, exponent)
        if how == "stale-row":
            out[-1] = y[-2]
        elif how == "nan":
            out[-1, 0] = np.nan
        elif how == "lost-head":
            size = int(self.hp["head"])
            out.reshape(len(y), -1, size)[:, change["head"]] = 0
        else:
            assert how == "rotated"
            return witness.rope(y, np.asarray(self.cap[change["by"], None], np.float64))
        return out


def misfit(captured: NDArray[np.float32], y: Float) -> float:
    """Relative L2 of what a prediction leaves; the places of NaN must agree."""
    if not np.array_equal(np.isnan(captured), np.isnan(y)):
        return np.inf
    x, y = np.nan_to_num(captured.astype(np.float64)), np.nan_to_num(y)
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))


# ---- one planted fault -----------------------------------------------------------------------------------------------------------------


class Bench:
    """A model, what it gives untouched, and the faults planted in it."""

    def __init__(self, path: Path, ids: list[int]) -> None:
        self.path, self.ids = path, ids
        self.side = OwnSide(path)
        self.data = self.side.model_data()
        self.model = witness.ModelData(**self.data)
        self.clean = self.side.capture(ids)

    def sites(self, row: FaultRow) -> list[Key]:
        return row.sites(self.data["flags"], self.data["hparams"])

    def planted(self, row: FaultRow, key: Key) -> OwnSide:
        return OwnSide(self.path, edits=row.edits(*key, self.data["flags"]))

    def check(self, row: FaultRow, key: Key) -> None:
        captures = self.planted(row, key).capture(self.ids)
        if np.array_equal(captures[key], self.clean[key]):
            assert (row.name, key) in UNSEEN, f"{row.name} at {stages.spell(key)} changes no bit"
            return
        results = [r for r in local(captures, self.model, self.side.profile) if r.state == "wrong"]
        wrong = [r.key for r in results]
        due = [key, *((stage, key[1]) for stage in row.also)]
        assert wrong[:1] == [key], f"{row.name} at {stages.spell(key)}: {wrong}"
        assert wrong == due
        for stage in stages.keys(self.data["flags"], int(self.data["hparams"]["layers"])):
            if stage == key:
                break
            seen = np.tril(np.ones((len(self.ids),) * 2, bool)) if stage[0] == "attn_scores" else True  # masked scores mean nothing
            assert np.array_equal(captures[stage] * seen, self.clean[stage] * seen), f"{row.name}: {stage} is upstream"
        self.check_prediction(row, key, captures)
        found = results[0].diagnosis
        assert found is not None
        assert found.kind == SAME.get(row.name, row.name), found.sentence
        assert row.name in (found.kind, *found.ties), found.sentence

    def check_prediction(self, row: FaultRow, key: Key, captures: Captures) -> None:
        """With its change the witness leaves dust, without it what was planted (where that is near one rounding: fewer unequal bits)."""
        made = Predicted(captures, self.model, key, row.prediction(key[0])).value()
        plain = Predicted(captures, self.model, key, ()).value()
        left, all_of_it = misfit(captures[key], made), misfit(captures[key], plain)
        off, all_off = (np.count_nonzero(y.astype(np.float32) != captures[key]) for y in (made, plain))
        said = f"{row.name} at {stages.spell(key)}: the prediction leaves {left:.1e} of {all_of_it:.1e}, {off} of {all_off} bits"
        assert left < max(1e-5, 0.05 * min(all_of_it, 0.01)), said
        assert all_of_it > 20 * left or all_off > 10 * off, said


COMBINATIONS = [*((arch, fmt) for arch in tiny.ARCHS for fmt in ("F32", "Q8_0")), ("llama", "biased")]


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Bench]:
    folder = tmp_path_factory.mktemp("catalogue")
    out = {}
    for arch, fmt in COMBINATIONS:
        biased = fmt == "biased"  # a GGUF of a Llama cannot have them
        shape = tiny.Shape(arch, attention_bias=biased)
        path = write_folder(folder / arch, shape) if biased else tiny.save_gguf(shape, folder / f"{arch}-{fmt}.gguf", fmt)
        out[arch, fmt] = Bench(path, np.random.default_rng(5).integers(0, shape.vocab, 9).tolist())
    return out


@pytest.mark.parametrize("at", COMBINATIONS, ids="-".join)
def test_a_clean_model_is_clean_and_the_plain_prediction_fits(benches: Mapping[Any, Bench], at: tuple[str, str]) -> None:
    """Must not: no stage is accused, and the unchanged prediction used here leaves nothing."""
    bench = benches[at]
    assert {r.state for r in local(bench.clean, bench.model, bench.side.profile)} <= {"exact", "noise"}
    for key in stages.keys(bench.data["flags"], int(bench.data["hparams"]["layers"])):
        assert misfit(bench.clean[key], Predicted(bench.clean, bench.model, key, ()).value()) < 1e-5


def _sampled() -> list[tuple[tuple[str, str], str]]:
    """Every row in every third model that can have it, from a different one on each row."""
    out = []
    for i, row in enumerate(FAULTS.values()):
        shapes = {at: tiny.Shape(at[0], attention_bias=at[1] == "biased") for at in COMBINATIONS}
        can = [at for at, shape in shapes.items() if row.sites(shape.flags, shape.hparams)]
        out += [(at, row.name) for at in (can[i % 3 :: 3] + can[:1] if len(can) > 3 else can)]
    return list(dict.fromkeys(out))


@pytest.mark.parametrize(("at", "name"), _sampled(), ids=lambda part: part if isinstance(part, str) else "-".join(part))
def test_every_fault_is_named_at_its_site(benches: Mapping[Any, Bench], at: tuple[str, str], name: str) -> None:
    """One site of a row in a model, of every row in two models at least; the site differs from model to model."""
    bench, row = benches[at], FAULTS[name]
    bench.check(row, bench.sites(row)[(7 * list(FAULTS).index(name) + COMBINATIONS.index(at)) % len(bench.sites(row))])


@pytest.fixture(scope="module")
def canary() -> Bench:
    side = OwnSide(CANARY / "canary.gguf")
    tokenizer = side.tokenizer()
    assert tokenizer is not None
    return Bench(CANARY / "canary.gguf", tokenizer.encode("What is 7+8? It is"))


@pytest.mark.parametrize("name", [name for i, name in enumerate(FAULTS) if i % 3 == 0])
def test_faults_in_trained_weights(canary: Bench, name: str) -> None:
    sites = canary.sites(FAULTS[name])
    canary.check(FAULTS[name], sites[5 * list(FAULTS).index(name) % len(sites)])


def test_probabilities_below_the_square_root_of_the_smallest_number() -> None:
    """Found by norm-plus-one and no-scale: a probability of 1e-170 was accused, for the variance of its rounding to 0 was lost."""
    assert variance(np.array([1e-170, 1e-60, 0.0]), F32).tolist() == [2.0**-1000, 1e-60**2, 0.0]


def test_every_row_fits_some_model(benches: Mapping[Any, Bench]) -> None:
    assert all(any(bench.sites(row) for bench in benches.values()) for row in [*FAULTS.values(), *CONTROLS.values()])


# ---- controls --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_raise_no_alarm(benches: Mapping[Any, Bench], name: str) -> None:
    bench, row = benches["qwen2", "F32"], CONTROLS[name]
    for key in bench.sites(row):
        hunt = Hunt(bench.planted(row, key), WitnessSide(bench.side, "witness"))
        ask = Ask(ids=tuple(bench.ids))
        if row.expect == REFUSED:
            with pytest.raises(NotComparable):
                bisection.hunt(hunt, ask, answer=0)
        elif row.expect == AGREE:
            assert bisection.hunt(hunt, ask, answer=0).verdict == "agree"
        else:
            assert row.expect == HEALS
            assert bisection.hunt(hunt, ask, answer=0).verdict == "agree"
            heals(bench, hunt.subject.capture(bench.ids), key[1])


def heals(bench: Bench, captures: Captures, layer: int | None) -> None:
    """Nothing but the two rotations is off, and their product does not see it: no stage after them differs by more than float32 noise."""
    results = local(captures, bench.model, bench.side.profile)
    assert not [r.key for r in results if r.state == "wrong"]
    assert {r.key for r in results if r.state == "heals"} == {(stage, layer) for stage in ("q_post_rope", "k_post_rope", "k_cache")}
    assert misfit(captures["attn_scores", layer], bench.clean["attn_scores", layer].astype(np.float64)) < 1e-5
    assert misfit(captures["lm_head", None], bench.clean["lm_head", None].astype(np.float64)) < 1e-5
    assert misfit(captures["q_post_rope", layer], bench.clean["q_post_rope", layer].astype(np.float64)) > 0.1


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def test_list_faults_shows_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert bisect.main(["--list-faults"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == [*FAULTS, *CONTROLS]
    assert all(line.split()[0] == "at" and "no place" not in line for line in lines[1::2])


@pytest.mark.parametrize(
    ("plant", "code", "first"),
    [
        ("gelu@2.ffn_silu", 1, "ffn_silu of layer 2 of the subject"),
        ("decode-pos-0", 1, "rope_table of the subject"),
        ("last-token", 3, ""),
    ],
)
def test_plant_from_the_command_line(capsys: pytest.CaptureFixture[str], plant: str, code: int, first: str) -> None:
    assert bisect.main(["--plant", plant, "--against", "witness", "-q"]) == code
    assert capsys.readouterr().out.startswith(first)
