"""How many planted faults can the text show?  Six catalogue faults at every site of the embedded model, one at a time.

``python scripts/count_silent_faults.py`` writes ``evidence/silent-faults/``: for each fault, whether the greedy answers to five prompts
change, and whether ``bisect`` names it at its stage and layer.
"""

from __future__ import annotations

import json
import sys

from make_evidence import ROOT, environment

import aprender
from aprender import stages
from aprender.asking import Ask
from aprender.bisection import hunt
from aprender.judge import faults
from aprender.judgement import Hunt
from aprender.references import WitnessSide
from aprender.sides.own import OwnSide

PROMPTS = ("What is 2+2?", "What is 7+8?", "What is the capital of France?", "What is the opposite of hot?", "Who are you?")
TOKENS = 16
NAMES = ("transposed", "eps", "rope-pairs", "no-bias", "gqa-tile", "no-residual")
"""The whole catalogue, at every site, is in ``fault_matrix.py``; texts are made for these."""


def main() -> None:
    """Write the record."""
    clean = OwnSide(aprender.canary(), spelling="canary.gguf")
    tokenizer, data = clean.tokenizer(), clean.model_data()
    assert tokenizer is not None
    asked = [tokenizer.encode(prompt) for prompt in PROMPTS]
    right = [clean.generate(ids, TOKENS) for ids in asked]
    rows = []
    for fault in (faults.FAULTS[name] for name in NAMES):
        for key in fault.sites(data["flags"], data["hparams"]):
            side = OwnSide(aprender.canary(), edits=fault.edits(*key, data["flags"]), spelling="canary.gguf")
            changed = sum(side.generate(ids, TOKENS) != answer for ids, answer in zip(asked, right, strict=True))
            report = hunt(Hunt(side, WitnessSide(clean, "witness")), Ask(ids=tuple(asked[0])), answer=0)
            alone = [(found.stage, found.layer) for found in report.judged.wrong] == [key]
            rows.append({"fault": fault.name, "site": stages.spell(key), "answers_changed": changed, "named": alone})
    silent = sum(row["answers_changed"] == 0 for row in rows)
    folder = ROOT / "evidence" / "silent-faults"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    named = {True: "yes", False: "no"}
    body = "\n".join(f"| {row['fault']} | {row['site']} | {row['answers_changed']} | {named[row['named']]} |" for row in rows)
    text = (
        "# silent-faults\n\nHow many planted faults can the text show? Each of six catalogue faults at each of its sites in the"
        f" embedded model, one at a time; {TOKENS} greedy tokens for each of {json.dumps(PROMPTS)}.\n\n"
        "```\n$ python scripts/count_silent_faults.py\n```\n\n"
        f"**{len(rows)} faults: {silent} leave all {len(PROMPTS)} answers unchanged; {sum(row['named'] for row in rows)} are named by"
        " `bisect` at their stage and layer, and nothing else is.**\n\n"
        f"| fault | site | answers changed of {len(PROMPTS)} | named |\n|--|--|--|--|\n{body}\n"
    )
    (folder / "README.md").write_text(text)
    print(f"{len(rows)} faults, {silent} silent", file=sys.stderr)


if __name__ == "__main__":
    main()
