"""Record the Hugging Face stages of the canary's prompt, which the package carries as its default reference.

Owns ``aprender/data/canary/stages-float16`` and ``stages-float32``.  Refuses to finish when an answer is wrong, when the hooked logits are
not bit-equal to the unhooked ones, when a value is not finite, or when a path of this machine got into a manifest.  Called by hand after
``pack_canary.py`` (``python scripts/record_canary_stages.py``); ``tests/test_oracle.py`` records again and compares.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from aprender import captures
from aprender.manifest import Manifest
from aprender.oracle import record

HOME = Path(__file__).resolve().parent.parent / "aprender" / "data" / "canary"
PROMPT = "What is 2+2?"
ANSWER = " 2+2 is 4."
DTYPES = ("float16", "float32")
LONGEST = 16  # tokens of an answer; the canary ends its own after eight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HOME, help="folder that gets stages-float16 and stages-float32")
    out = parser.parse_args().out
    for dtype in DTYPES:
        folder = out / f"stages-{dtype}"
        written = captures.save(record(str(HOME), dtype, prompt=PROMPT, answer=LONGEST), folder)
        check(written, folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {len(written.tensors)} tensors, {size:,} bytes, answer {written.answer!r}, margin {written.answer_margin:.3f}")


def check(written: Manifest, folder: Path) -> None:
    """End the script unless the record is what the package should carry."""
    wrong = [
        (written.answer != ANSWER, f"the answer is {written.answer!r}"),
        (not written.attestation, "hooked and unhooked logits differ"),
        (any(note.nonfinite for note in written.tensors.values()), "values that are not finite"),
        (str(HOME.parent.parent.parent) in (folder / captures.MANIFEST).read_text(), "a path of this machine in the manifest"),
    ]
    for is_so, words in wrong:
        if is_so:
            raise SystemExit(f"{folder}: {words}")


if __name__ == "__main__":
    main()
