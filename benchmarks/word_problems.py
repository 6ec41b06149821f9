"""Real questions for a real model: SVAMP, GSM8K and generated word problems (reasoning-gym's gsm_symbolic) in one set.

    pip install reasoning-gym                                  # in an environment that also has secateurs, or beside it
    python benchmarks/word_problems.py OUT                     # OUT/calibration.jsonl, OUT/eval.jsonl
    secateurs study benchmarks/word_problems.toml --set model=FOLDER --out runs/words   # from the folder that holds OUT

Half of each file is SVAMP, a quarter GSM8K, a quarter generated; calibration takes training questions and other seeds.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import reasoning_gym

from secateurs.questions import question_set

COUNTS = {"calibration": 400, "eval": 100}
SEEDS = {"calibration": 11, "eval": 7}


def rows(split: str, count: int) -> list[dict[str, str]]:
    """`count` questions with their answers and families."""
    made = []
    for name, share in (("svamp", count // 2), ("gsm8k", count // 4)):
        found = islice(question_set(name).questions(split, 0), share)
        made += [{"question": q.prompt, "answer": q.answer, "family": name} for q in found]
    generated = reasoning_gym.create_dataset("gsm_symbolic", size=count // 4, seed=SEEDS[split])
    return made + [{"question": r["question"], "answer": str(r["answer"]), "family": "symbolic"} for r in generated]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        lines = [json.dumps(row) + "\n" for row in rows(split, count)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
        print(f"{folder / split}.jsonl: {len(lines)} questions")


if __name__ == "__main__":
    main()
